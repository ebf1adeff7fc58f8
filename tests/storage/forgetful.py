"""An S3 server that ignores a condition of writes, as some do: the real one, behind a proxy that takes the header away.

Headers are signed, so the proxy signs what is left of a request anew.
"""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_UNSIGNED = {"authorization", "x-amz-date", "content-length", "connection", "expect", "host", "user-agent"}


class _SigV4(S3SigV4Auth):  # type: ignore[misc]
    """The body stays as it was, so its digest does."""

    def payload(self, request: Any) -> str:
        return str(self._told)

    def _modify_request_before_signing(self, request: Any) -> None:
        self._told = request.headers["x-amz-content-sha256"]
        super()._modify_request_before_signing(request)


@contextmanager
def serve(endpoint: str, credentials: Path, *, ignores: str) -> Iterator[str]:
    """Ignores that header of PUTs; yields the address."""
    signer = _SigV4(
        Credentials(*((credentials / f"AWS_{name}").read_text() for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))),
        "s3",
        "us-east-1",
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            kept = {name: value for name, value in headers.items() if name not in _UNSIGNED}
            if self.command == "PUT":
                kept.pop(ignores, None)
            request = AWSRequest(self.command, f"{endpoint}{self.path}", kept, body)
            signer.add_auth(request)
            server = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=30)
            server.request(self.command, self.path, body or None, dict(request.headers.items()))
            answer = server.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            server.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
