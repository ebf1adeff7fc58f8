import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.matrix.kinds import make_base
from tests.trainer.rank.conftest import one_thread, ranks

__all__ = ["one_thread", "ranks"]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a base by name, made when it is first asked for."""
    root = tmp_path_factory.mktemp("bases")
    return cache(lambda name: make_base(name, root / name))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
