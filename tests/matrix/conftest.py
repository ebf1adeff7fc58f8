import pytest
from tests import ports
from tests.trainer.rank.conftest import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def free_port() -> int:
    return ports.free_port()
