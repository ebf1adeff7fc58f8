"""A small server that speaks the part of the Hub's API that reading a repository needs, on the loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
LARGE = 1000
"""Bytes from which on a file is stored as LFS stores it, with its SHA-256."""


@dataclass
class Hub:
    """Repositories by kind and name, each with commits by hash and branches that point to one."""

    endpoint: str = ""
    commits: dict[tuple[str, str], dict[str, Files]] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    """The token a private repository asks for."""
    gated: set[str] = field(default_factory=set)
    failures: list[int] = field(default_factory=list)
    """Statuses that the next requests are answered with."""
    cut: int | None = None
    """Bytes after which the next answer with content ends."""
    requests: list[str] = field(default_factory=list)

    def commit(self, name: str, files: Files, *, kind: str = "models", branch: str = "main") -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault((kind, name), {})[sha] = dict(files)
        self.branches.setdefault((kind, name), {})[branch] = sha
        return sha


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the API describes it: git's hash, and of a large one its SHA-256."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if len(data) >= LARGE:
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self._answer(self.rfile.read(size).decode())

    def do_GET(self) -> None:
        self._answer("")

    def do_HEAD(self) -> None:
        self._answer("")

    def _answer(self, body: str) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.failures:
            self._send(self.hub.failures.pop(0), b"{}")
            return
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, what, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3:]
        if not self._allowed(kind, name):
            return
        if api and what == "revision":
            sha = self._sha(kind, name, "/".join(rest))
            if sha:
                self._send(200, json.dumps({"id": name, "sha": sha, "siblings": []}).encode())
            return
        sha = self._sha(kind, name, rest[0])
        if sha is None:
            return
        files = self.hub.commits[kind, name][sha]
        if what == "tree":
            self._tree(files, "/".join(rest[1:]))
        elif what == "paths-info":
            wanted = parse_qs(body).get("paths") or json.loads(body or "{}").get("paths", [])
            self._send(200, json.dumps([entry(path, files[path]) for path in wanted if path in files]).encode())
        elif what == "resolve":
            self._content(files, "/".join(rest[1:]), sha)
        else:
            self._send(404, b"{}")

    def _allowed(self, kind: str, name: str) -> bool:
        token = self.hub.tokens.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if name in self.hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif (kind, name) not in self.hub.commits or (token is not None and token != given):
            self._send(404 if given else 401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such"})
        else:
            return True
        return False

    def _sha(self, kind: str, name: str, revision: str) -> str | None:
        sha = self.hub.branches[kind, name].get(revision, revision)
        if sha in self.hub.commits[kind, name]:
            return sha
        self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such"})
        return None

    def _tree(self, files: Files, directory: str) -> None:
        inside = {path: data for path, data in files.items() if not directory or path.startswith(f"{directory}/")}
        if not inside:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such"})
            return
        folders = sorted({path.rpartition("/")[0] for path in inside if "/" in path})
        listed = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        self._send(200, json.dumps(listed + [entry(path, data) for path, data in inside.items()]).encode())

    def _content(self, files: Files, path: str, sha: str) -> None:
        data = files.get(path)
        if data is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such"})
            return
        first, last = 0, len(data) - 1
        if wanted := self.headers.get("Range"):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        headers = {"X-Repo-Commit": sha, "ETag": '"x"', "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._send(206 if wanted else 200, data[first : last + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.hub.cut is not None and status in (200, 206) and len(body) > self.hub.cut:
            body, self.hub.cut = body[: self.hub.cut], None
            self.close_connection = True
        self.wfile.write(body)


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
