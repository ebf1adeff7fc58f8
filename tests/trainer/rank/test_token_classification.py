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
from tests.trainer.rank.peers import losses_of_trainer
from tests.trainer.rank.test_loop import Quiet, config, setup_for

from finetune_trainer.checkpoint import OPTIMIZER, WEIGHTS, State
from finetune_trainer.loop import train
from finetune_trainer.model import load
from finetune_trainer.tasks.base import IGNORED

LABELS = ["B-colour", "I-colour", "O"]


def tagged_rows(count: int) -> list[dict[str, Any]]:
    """Words of which a red one, and what follows it, is an entity."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 12))]
        tags = ["O"] * len(words)
        place = draw.randrange(len(words) - 1)
        words[place] = "red"
        tags[place : place + 2] = ["B-colour", "I-colour"]
        found.append({"tokens": words, "tags": tags})
    return found


def with_spans(row: dict[str, Any]) -> dict[str, Any]:
    """The same row as a text."""
    place = row["tags"].index("B-colour")
    start = len(" ".join([*row["tokens"][:place], ""]))
    end = start + len(" ".join(row["tokens"][place : place + 2]))
    return {"text": " ".join(row["tokens"]), "spans": [{"start": start, "end": end, "label": "colour"}]}


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

    setup, inputs_of = setup_for(model(), learner, store, settings)
    state = State(micro_batch=3)
    train(setup, state, Quiet())
    batches = [inputs_of(setup.order.batch(step)) for step in range(50)]
    theirs = losses_of_trainer(model(), batches, settings, work=tmp_path)
    assert state.losses == pytest.approx(theirs, rel=tolerance)


SPEC: dict[str, Any] = {
    "task": {"type": "token-classification"},
    "training": {"maxSteps": 60, "batchSize": 16, "learningRate": 5e-3, "evaluateEvery": {"steps": 30}},
    "checkpoint": {"every": {"steps": 20}},
}


@pytest.mark.parametrize("form", ["words", "spans"])
def test_a_run_beats_the_probe_and_a_stop_changes_nothing(make_run: Any, tmp_path: Path, form: str) -> None:
    from transformers import AutoModelForTokenClassification

    rows = tagged_rows(400)
    if form == "spans":
        rows = [with_spans(row) for row in rows]
    calm = make_run(rows, name="calm", **SPEC)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    evaluation = calm.published()["outcome"]["evaluation"]
    assert evaluation["tuned"]["f1"] > evaluation["probe"]["f1"] + 0.2, evaluation
    assert evaluation["trivial"]["f1"] == 0.0
    assert evaluation["tuned"].keys() == {"accuracy", "precision", "recall", "f1", "loss"}
    model = AutoModelForTokenClassification.from_pretrained(calm.model())
    assert list(model.config.id2label.values()) == LABELS
    if form == "words":
        made = make_run(rows, name="stopped", **SPEC)
        stop = ("finetune_trainer.training", "Duties", "due", 37, signal.SIGTERM.value)
        assert made.run(tmp_path / "work-1", stop=stop)[0] == 45
        assert made.run(tmp_path / "work-2")[0] == 0
        assert made.losses() == calm.losses()
        for name in (WEIGHTS, OPTIMIZER):
            assert made.last(name).read_bytes() == calm.last(name).read_bytes()
