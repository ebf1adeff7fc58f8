"""What tests share: a real S3 server (SeaweedFS on the loopback), bases that know a little, a server of ranks."""

import os
import secrets
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hack.seaweed import S3Server, serve

from finetune_trainer.storage import StorageSettings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores are many times slower than one


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with two identities: `admin` may do anything, `read_only` may only read and list."""
    with serve(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


@pytest.fixture
def s3_settings(s3_server: S3Server) -> StorageSettings:
    """How to reach the server with all permissions."""
    return s3_server.settings()


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """The name of a fresh bucket."""
    name = f"test-{secrets.token_hex(6)}"
    client = s3_server.client()
    client.create_bucket(Bucket=name)
    yield name
    client.delete_bucket(Bucket=name)  # this server deletes full ones, too


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """A process that has imported torch, for all tests that start ranks."""
    from tests.trainer.rank.conftest import Ranks

    server = Ranks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def base_of() -> Callable[[str], Path]:
    """The directory, to be read only, of one of tests/matrix's bases by name: the first who asks trains it, for all."""
    from tests.matrix.kinds import kept_base

    return cache(kept_base)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest go first, so that no worker is idle while another ends with one of them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
