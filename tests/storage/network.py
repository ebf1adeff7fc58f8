"""What stands between pods and storage in other people's networks: authorities of their own, and forward proxies."""

import base64
import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from hack.seaweed import Tls

DOMAIN = "s3.localhost"


@dataclass(frozen=True)
class Authority:
    """A certificate authority that nobody knows, and what it has signed: a server of this machine."""

    ca_file: Path
    tls: Tls


def authority(directory: Path, *, host: str = "127.0.0.1") -> Authority:
    """Made by openssl, with keys that are quickly made. `host` is the server's address."""
    ca, key = directory / "ca.crt", directory / "ca.key"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    own = ["-subj", "/CN=an authority of the tests", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    _run([*new, "-days", "2", "-keyout", key, "-out", ca, *own])
    tls = Tls(directory / "server.crt", directory / "server.key", DOMAIN)
    names = f"subjectAltName=IP:{host},DNS:{DOMAIN},DNS:*.{DOMAIN}"
    leaf = ["-CA", ca, "-CAkey", key, "-subj", "/CN=server", "-addext", names, "-addext", "basicConstraints=CA:FALSE"]
    _run([*new, "-days", "2", "-keyout", tls.key, "-out", tls.certificate, *leaf])
    return Authority(ca, tls)


def _run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Listener:
    """Takes connections to a port of the loopback, each in its own way, until it is closed."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """With all connections."""
        for item in self._sockets:
            hang_up(item)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                self._take(client)

    def _take(self, client: socket.socket) -> None:
        """Must not wait for what the client sends."""
        raise NotImplementedError  # each proxy has its own


def hang_up(item: socket.socket) -> None:
    """Also for who waits for it in another thread."""
    with contextlib.suppress(OSError):
        item.shutdown(socket.SHUT_RDWR)
    item.close()


@dataclass
class ForwardProxy(Listener):
    """Takes absolute URLs over plain HTTP and opens tunnels by CONNECT, as proxies of companies do.

    It knows names below DOMAIN as the loopback, which this machine need not. `seen` are the hosts that were asked for,
    with their ports, after `CONNECT` for tunnels. `cuts` connections are closed after `cut_after` bytes of answers.
    With `password` it wants `user:password`.
    """

    password: str = ""
    cuts: int = 0
    cut_after: int = 0
    seen: list[str] = field(default_factory=list)

    def _take(self, client: socket.socket) -> None:
        threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        at = ""
        with contextlib.suppress(OSError), client.makefile("rb") as source:
            while head := _head(source):
                method, target, version = head[0].split()
                fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                if self.password and fields.get("proxy-authorization") != self._wanted:
                    client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                    continue
                url = urlsplit(f"//{target}" if method == "CONNECT" else target)
                with self._lock:
                    self.seen.append(f"CONNECT {target}" if method == "CONNECT" else url.netloc)
                if server is None or at != url.netloc:
                    server, at = self._connect(url.hostname or "", url.port or 80), url.netloc
                    if method == "CONNECT":
                        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    threading.Thread(target=self._answers, args=(client, server), daemon=True).start()
                if method == "CONNECT":
                    while data := source.read1(1 << 16):
                        server.sendall(data)
                    break
                origin = (url.path or "/") + (f"?{url.query}" if url.query else "")
                lines = [f"{method} {origin} {version}"]
                lines += [line for line in head[1:] if not line.lower().startswith("proxy-")]
                server.sendall("\r\n".join([*lines, "", ""]).encode())
                left = int(fields.get("content-length", "0"))
                while left and (data := source.read1(min(left, 1 << 16))):
                    server.sendall(data)
                    left -= len(data)
        hang_up(client)
        if server is not None:
            hang_up(server)

    @property
    def _wanted(self) -> str:
        return "Basic " + base64.b64encode(f"user:{self.password}".encode()).decode()

    def _connect(self, host: str, port: int) -> socket.socket:
        own = host == DOMAIN or host.endswith(f".{DOMAIN}")
        server = socket.create_connection(("127.0.0.1" if own else host, port))
        self._sockets.append(server)
        return server

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                with self._lock:
                    cut = self.cuts > 0 and passed + len(data) > self.cut_after
                    self.cuts -= cut
                client.sendall(data[: self.cut_after - passed] if cut else data)
                passed += len(data)
                if cut:
                    break
        hang_up(client)
        hang_up(server)


def _head(source: BinaryIO) -> list[str]:
    """The lines of a request up to its body, none at the end."""
    lines: list[str] = []
    while line := source.readline().decode("latin-1").rstrip("\r\n"):
        lines.append(line)
    return lines


@contextmanager
def forwarding(password: str = "") -> Iterator[ForwardProxy]:
    proxy = ForwardProxy(password)
    try:
        yield proxy
    finally:
        proxy.close()
