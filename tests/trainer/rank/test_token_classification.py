"""Token classification with real models: equal to transformers.Trainer, resumed, published."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank.conftest import WORDS
from tests.trainer.rank.peers import losses_of_ours, losses_of_trainer
from tests.trainer.rank.test_loop import config

from finetune_trainer.checkpoint import OPTIMIZER, WEIGHTS
from finetune_trainer.model import load
from finetune_trainer.tasks.base import IGNORED

LABELS = ["B-colour", "I-colour", "O"]


def rows_with_spans(count: int) -> list[dict[str, Any]]:
    """Texts in which red and the blue or green behind it are an entity."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 12))]
        place = draw.randrange(len(words) - 1)
        words[place : place + 2] = "red", draw.choice(("blue", "green"))
        start = len(" ".join([*words[:place], ""])) if place else 0
        end = start + len(" ".join(words[place : place + 2]))
        found.append({"text": " ".join(words), "spans": [{"start": start, "end": end, "label": "colour"}]})
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_fifty_steps_equal_those_of_the_trainer(
    tiny_base: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    draw = np.random.default_rng(1)
    sizes = draw.integers(3, 20, 83)
    labels = [np.where(draw.random(size) < 0.3, IGNORED, draw.integers(0, 3, size)) for size in sizes]
    for row in labels:
        row[1] = 2
    store = Memory(input_ids=[draw.integers(4, 19, size) for size in sizes], labels=labels)
    learner = learner_of("token-classification", labels=LABELS)
    settings = config(max_steps=50)

    def model() -> Any:
        return load(tiny_base, learner=learner, seed=5, dropout=0.0).model.to(dtype)

    ours, batches = losses_of_ours(model(), learner, store, settings)
    theirs = losses_of_trainer(model(), batches, settings, work=tmp_path)
    assert len(theirs) == 50
    assert ours == pytest.approx(theirs, rel=tolerance)


SPEC: dict[str, Any] = {
    "task": {"type": "token-classification"},
    "training": {"maxSteps": 40, "batchSize": 16, "learningRate": 5e-3, "evaluateEvery": {"steps": 20}},
    "checkpoint": {"every": {"steps": 10}},
}


def test_a_run_on_spans_beats_the_trivial_answer_and_a_stop_changes_nothing(make_run: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    rows = rows_with_spans(400)
    calm = make_run(rows, name="calm", **SPEC)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    evaluation = calm.published()["outcome"]["evaluation"]
    assert evaluation["trivial"]["f1"] == 0.0
    assert evaluation["tuned"]["f1"] > 0.3, evaluation
    assert evaluation["tuned"].keys() == {"accuracy", "precision", "recall", "f1", "loss"}
    assert evaluation["probe"].keys() == evaluation["tuned"].keys()
    model = AutoModelForTokenClassification.from_pretrained(calm.model())
    assert list(model.config.id2label.values()) == LABELS
    made = make_run(rows, name="stopped", **SPEC)
    stop = ("finetune_trainer.training", "Duties", "due", 27, signal.SIGTERM.value)
    assert made.run(tmp_path / "work-1", stop=stop)[0] == 45
    assert made.run(tmp_path / "work-2")[0] == 0
    assert made.losses() == calm.losses()
    for name in (WEIGHTS, OPTIMIZER):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()
