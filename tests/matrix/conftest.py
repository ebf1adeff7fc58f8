import socket

import pytest
from tests.trainer.rank.conftest import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
