"""A small client of an API server: JSON over one connection, and watches as they come."""

import http.client
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]


class ApiRefused(Exception):
    """The API server said no."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"{code}: {words}")
        self.code = code


@dataclass(frozen=True)
class Access:
    """Where an API server is, and as whom to speak to it."""

    host: str
    port: int
    certificate: Path
    token: str

    def connect(self) -> "Api":
        return Api(self)


class Api:
    """Not safe for use by several threads: each takes one of its own."""

    def __init__(self, access: Access) -> None:
        context = ssl.create_default_context(cafile=str(access.certificate))
        self._connection = http.client.HTTPSConnection(access.host, access.port, context=context, timeout=3600)
        self._headers = {"Authorization": f"Bearer {access.token}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: Document | None = None) -> Document:
        """Raises ApiRefused."""
        self._connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise ApiRefused(answer.status, f"{method} {path}: {content[:500].decode(errors='replace')}")
        found: Document = json.loads(content)
        return found

    def watch(self, path: str) -> Iterator[tuple[float, bytes]]:
        """Every line, one event each, with the moment at which it was read; ends when the API server ends it.

        The first one comes at once: an empty line that says that the watch is there.
        """
        self._connection.request("GET", f"{path}?watch=1&resourceVersion=0", headers=self._headers)
        answer = self._connection.getresponse()
        if answer.status >= 300:
            raise ApiRefused(answer.status, f"watch {path}: {answer.read()[:500].decode(errors='replace')}")
        yield time.time(), b""
        rest = b""
        while chunk := answer.read1(1 << 20):
            now = time.time()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield now, line
