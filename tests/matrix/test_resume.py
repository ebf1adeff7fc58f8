"""A killed run of any task ends with the weights of an undisturbed one, byte for byte."""

import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.matrix.cells import Cell, with_files
from tests.matrix.kinds import KINDS
from tests.trainer.rank.conftest import Made, Ranks, made, write

from finetune_api.tasks import TaskType
from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS

ROWS, TEST_ROWS = 80, 12
STEPS, EVERY = 9, 2
DUE = ("finetune_trainer.training", "Duties", "due")
"""Called once a step."""
VARIANTS: Mapping[str, tuple[TaskType, dict[str, Any]]] = {
    **{task: (task, {}) for task in KINDS},
    "pairs of texts": ("text-classification", {"task": {"columns": {"pair": "second"}}}),
    "weighted classes": ("text-classification", {"training": {"classWeights": "balanced", "loss": {"type": "focal"}}}),
    "a mean of the weights": ("regression", {"training": {"ema": {"decay": 0.9}}}),
    "augmented images": ("image-classification", {"task": {"augment": {"crop": 0.6, "flip": True}}}),
}


def prepared(variant: str, root: Path, base: Path, ranks: Ranks) -> Made:
    task, more = VARIANTS[variant]
    cell = Cell(task, "full", 1)
    root.mkdir()
    draw = random.Random(17)
    for name, count in (("train", ROWS), ("test", TEST_ROWS)):
        rows = KINDS[task].rows(draw, count)
        if variant == "pairs of texts":
            rows = [{**row, "second": row["text"].split()[0]} for row in rows]
        write(root / f"{name}.jsonl", with_files(rows, root / name))
    document = cell.document(root, base)
    training = {name: value for name, value in document["training"].items() if name != "epochs"}
    document["task"] |= more.get("task", {})
    document["training"] = {**training, "batchSize": 8, "maxSteps": STEPS, **more.get("training", {})}
    document["checkpoint"] = {"every": {"steps": EVERY}}
    return made(root, document, ranks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_like_an_undisturbed_one(
    variant: str, tmp_path: Path, base_of: Callable[[str], Path], ranks: Ranks
) -> None:
    base = base_of(Cell(VARIANTS[variant][0], "full", 1).base)
    calm, hurt = (prepared(variant, tmp_path / name, base, ranks) for name in ("calm", "hurt"))
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    first = random.Random(variant).randint(1, STEPS)
    for number, call in enumerate((first, random.Random(first).randint(1, 3))):
        code, log = hurt.run(tmp_path / f"work-{number}", stop=(*DUE, call, signal.SIGKILL.value))
        assert code in (0, -signal.SIGKILL), log  # it may be through by then
        if code == 0:
            break
    else:
        code, log = hurt.run(tmp_path / "work-last")
        assert code == 0, log
    assert len(calm.losses()) == STEPS
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert hurt.last(name).read_bytes() == calm.last(name).read_bytes(), name
    ours, theirs = (run.published()["outcome"] for run in (hurt, calm))
    assert ours["model"]["digest"] == theirs["model"]["digest"]
    assert ours["evaluation"]["tuned"] == theirs["evaluation"]["tuned"]
