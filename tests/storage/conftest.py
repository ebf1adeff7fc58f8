"""Both stores behind one fixture, and a TCP proxy that breaks connections to the real server on purpose."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.storage.network import Listener, hang_up

from finetune_trainer.storage import StorageSettings, Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once in a directory and once on the real server."""
    if request.param == "local":
        return open_store((tmp_path / "a store").as_uri(), StorageSettings())
    bucket = request.getfixturevalue("s3_bucket")
    return open_store(f"s3://{bucket}/some/prefix", request.getfixturevalue("s3_settings"))


@dataclass
class Proxy(Listener):
    """Forwards TCP to the real server, except for what is armed.

    `drop_answers` answers to requests that contain `drop_marker` never come back, though the server has acted.
    `cuts` connections are closed after `cut_after` bytes of answers. `answers` are sent instead of asking the
    server, to requests that contain `answer_marker`. In answers that contain `damage`, its last byte is changed, as
    many times as `damages` has bytes to put there; in requests, those of `damages_sent` are put there. Each 64 KiB of a
    request take `pause` seconds.
    """

    upstream: tuple[str, int]
    drop_marker: bytes = b""
    drop_answers: int = 0
    cuts: int = 0
    cut_after: int = 0
    answers: list[bytes] = field(default_factory=list)
    answer_marker: bytes = b""
    damage: bytes = b""
    damages: list[bytes] = field(default_factory=list)
    damages_sent: list[bytes] = field(default_factory=list)
    pause: float = 0.0
    dropped: int = 0
    requests: int = 0

    def _take(self, client: socket.socket) -> None:
        server = socket.create_connection(self.upstream)
        self._sockets.append(server)
        state = {"drop": False}
        threading.Thread(target=self._requests, args=(client, server, state), daemon=True).start()
        threading.Thread(target=self._answers, args=(client, server, state), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                time.sleep(self.pause)
                with self._lock:
                    starts = data.split(b" ", 1)[0] in (b"GET", b"PUT", b"HEAD", b"POST", b"DELETE")
                    self.requests += starts
                    answerable = starts and self.answers and self.answer_marker in data
                    canned = self.answers.pop(0) if answerable else None
                    if self.damages_sent and self.damage in data:
                        data = data.replace(self.damage, self.damage[:-1] + self.damages_sent.pop(0))
                    if self.drop_answers and self.drop_marker in data:
                        self.drop_answers -= 1
                        state["drop"] = True
                if canned is not None:
                    client.sendall(canned)
                    break
                server.sendall(data)
        hang_up(client)
        hang_up(server)

    def _answers(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                with self._lock:
                    if state["drop"] and not data.startswith(b"HTTP/1.1 100"):
                        self.dropped += 1
                        break
                    if self.cuts and passed + len(data) > self.cut_after:
                        self.cuts -= 1
                        client.sendall(data[: self.cut_after - passed])
                        break
                    if self.damages and self.damage in data:
                        data = data.replace(self.damage, self.damage[:-1] + self.damages.pop(0))
                client.sendall(data)
                passed += len(data)
        hang_up(client)
        hang_up(server)


@pytest.fixture
def proxy(s3_settings: StorageSettings) -> Iterator[Proxy]:
    parts = urlsplit(s3_settings.endpoint or "")
    running = Proxy((parts.hostname or "", parts.port or 0))
    yield running
    running.close()


@pytest.fixture
def proxied(proxy: Proxy, s3_settings: StorageSettings, s3_bucket: str) -> Store:
    """A store that reaches the real server through the proxy."""
    return open_store(f"s3://{s3_bucket}/some/prefix", replace(s3_settings, endpoint=proxy.url))
