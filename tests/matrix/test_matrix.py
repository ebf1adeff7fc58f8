"""Every task with every method learns, or is refused with the reason: a covering part of docs/matrix.md."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from tests.matrix.cells import Cell, cells, covering, refusal, run
from tests.matrix.kinds import KINDS
from tests.trainer.rank.conftest import Ranks

from finetune_api.tasks import TaskType

SENSIBLE = [cell for cell in covering() if refusal(cell) is None]


@pytest.mark.parametrize("cell", SENSIBLE, ids=str)
def test_a_sensible_cell_beats_its_baseline(
    cell: Cell, tmp_path: Path, base_of: Callable[[str], Path], ranks: Ranks, free_port: int
) -> None:
    found = run(cell, tmp_path / "cell", base_of(cell.base), ranks=ranks, port=free_port)
    assert found.gain >= cell.margin, found


def test_every_task_is_in_the_matrix() -> None:
    assert set(KINDS) == set(get_args(TaskType))


def test_a_senseless_cell_is_refused_with_a_reason() -> None:
    reasons = {cell: refusal(cell) for cell in cells()}
    for cell, reason in reasons.items():
        if reason is not None:
            assert cell.task in reason, reason
            assert cell.method in reason, reason
            assert len(reason.split(": ", 1)[-1]) > 10, reason
