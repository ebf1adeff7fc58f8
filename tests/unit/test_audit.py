"""`make audit` with a database of vulnerabilities of our own, in the form of osv.dev."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLAW: dict[str, Any] = {
    "id": "PYSEC-2026-7",
    "summary": "reads what it should not",
    "affected": [
        {
            "package": {"name": "botocore", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9999"}]}],
        }
    ],
}


@contextmanager
def database(flaws: dict[str, list[dict[str, Any]]], asked: list[str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query["package"]["name"])
            body = json.dumps({"vulns": found} if (found := flaws.get(asked[-1])) else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()


def audit(url: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OSV_URL": url, "PYTHON": sys.executable, "NO_PROXY": "127.0.0.1"}
    return subprocess.run([ROOT / "hack/audit"], env=environment, capture_output=True, text=True, check=False)


def test_every_package_of_both_images_is_asked_about() -> None:
    asked: list[str] = []
    with database({}, asked) as url:
        done = audit(url)
    assert done.returncode == 0, done.stderr
    assert {"kopf", "torch", "transformers", "botocore", "blake3"} <= set(asked)


def test_a_known_vulnerability_fails_with_its_name_and_its_remedy() -> None:
    with database({"botocore": [FLAW]}, []) as url:
        done = audit(url)
    assert done.returncode == 1
    assert "PYSEC-2026-7" in done.stdout
    assert "9999" in done.stdout


def test_a_database_that_is_not_there_is_no_clean_bill() -> None:
    with database({}, []) as url:
        pass
    assert audit(url).returncode != 0
