"""Regression with real models: equal to transformers.Trainer, resumed, published, trained on."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank.conftest import tiny_rows
from tests.trainer.rank.peers import losses_of_ours, losses_of_trainer
from tests.trainer.rank.test_loop import config

from finetune_trainer.checkpoint import OPTIMIZER, WEIGHTS
from finetune_trainer.model import load
from finetune_trainer.tasks.regression import DEVIATION, MEAN


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_fifty_steps_equal_those_of_the_trainer(
    tiny_base: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    draw = np.random.default_rng(1)
    texts = [draw.integers(4, 19, size) for size in draw.integers(3, 20, 83)]
    store = Memory(input_ids=texts, value=draw.normal(7, 3, 83))
    learner = learner_of("regression", more={MEAN: 7.0, DEVIATION: 3.0})
    settings = config(max_steps=50)

    def model() -> Any:
        return load(tiny_base, learner=learner, seed=5, dropout=0.0).model.to(dtype)

    ours, batches = losses_of_ours(model(), learner, store, settings)
    for batch in batches:
        batch["labels"] = batch["labels"].to(dtype)
    theirs = losses_of_trainer(model(), batches, settings, work=tmp_path)
    assert len(theirs) == 50
    assert ours == pytest.approx(theirs, rel=tolerance)


WORTH = {"red": 10.0, "green": 20.0, "blue": 40.0}
SPEC: dict[str, Any] = {
    "task": {"type": "regression"},
    "training": {"maxSteps": 60, "batchSize": 16, "learningRate": 5e-3, "evaluateEvery": {"steps": 20}},
    "checkpoint": {"every": {"steps": 10}},
}


def test_a_run_says_numbers_a_stop_changes_nothing_and_its_result_is_a_base(make_run: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    texts, labels = tiny_rows(500)
    rows = [{"text": text, "value": WORTH[label]} for text, label in zip(texts, labels, strict=True)]
    calm = make_run(rows, name="calm", **SPEC)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    evaluation = calm.published()["outcome"]["evaluation"]
    assert evaluation["tuned"]["r2"] > 0.5, evaluation
    assert evaluation["trivial"]["r2"] < 0.05
    assert evaluation["probe"].keys() == evaluation["tuned"].keys()

    model = AutoModelForSequenceClassification.from_pretrained(calm.model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(calm.model())
    config = AutoConfig.from_pretrained(calm.model())
    with torch.no_grad():
        logits = model(**tokenizer(texts[9::10], padding=True, return_tensors="pt")).logits[:, 0]
    said = (logits * config.target_deviation + config.target_mean).numpy()
    wanted = np.array([row["value"] for row in rows[9::10]])
    assert ((said - wanted) ** 2).mean() == pytest.approx(evaluation["tuned"]["mse"], rel=1e-3)

    made = make_run(rows, name="stopped", **SPEC)
    stop = ("finetune_trainer.training", "Duties", "due", 27, signal.SIGTERM.value)
    assert made.run(tmp_path / "work-1", stop=stop)[0] == 45
    assert made.run(tmp_path / "work-2")[0] == 0
    assert made.losses() == calm.losses()
    for name in (WEIGHTS, OPTIMIZER):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()

    more = make_run(rows[:300], name="more", base=calm.model(), **{**SPEC, "training": {"maxSteps": 1}})
    assert more.record.facts[MEAN] == config.target_mean
    code, log = more.run(tmp_path / "work-3")
    assert code == 0, log
    assert more.published()["outcome"]["evaluation"]["base"]["r2"] > 0.5
