"""`finetune data where`: the rows it names are those that training has seen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.rank.conftest import COLOURS, MakeRun, dictionaries, tiny_rows, write
from tests.trainer.rank.lm import save_lm
from tests.trainer.rank.test_causal_lm import SPEC as LANGUAGE
from tests.trainer.rank.test_causal_lm import texts

from finetune_trainer.data.read import DataError
from finetune_trainer.run import TRAIN
from finetune_trainer.where import Step, rows_of_step


def test_the_loss_of_each_step_is_that_of_the_rows_that_are_named(
    make_run: MakeRun, tiny_base: Path, tmp_path: Path
) -> None:
    """With a learning rate of nearly nothing every step's loss is the base's own on its batch."""
    more = tmp_path / "more.jsonl"
    write(more, dictionaries(tiny_rows(11, seed=5)))
    made = make_run(
        tiny_rows(40),
        labels=list(COLOURS),
        data={"train": [{"uri": (tmp_path / "run/train.jsonl").as_uri()}, {"uri": more.as_uri(), "weight": 1.5}]},
        training={"epochs": 2, "batchSize": 8, "learningRate": 1e-30, "dropout": 0.0, "evaluateEvery": {"steps": 100}},
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    losses = made.losses()
    steps = [rows_of_step(made.config, step=number, run=None, credentials=None) for number in range(1, len(losses) + 1)]
    assert [(step.epoch, step.batch) for step in steps] == [
        (epoch, batch) for epoch in (1, 2) for batch in range(1, steps[0].batches + 1)
    ]
    model = base_of(made, tiny_base)
    for step, loss in zip(steps, losses, strict=True):
        assert mean_loss(model, tiny_base, rows_at(step)) == pytest.approx(loss, rel=1e-5)
    seen = [place for step in steps[: steps[0].batches] for place in places_of(step)]
    assert len(set(seen)) == len((tmp_path / "run/train.jsonl").read_text().splitlines()) + 11
    assert len(seen) == len(set(seen)) + round(0.5 * 11)


def base_of(made: Any, directory: Path) -> Any:
    from finetune_trainer import tasks
    from finetune_trainer.model import load

    learner = tasks.get(made.config).learner(tasks.Facts(labels=made.record.labels, form=made.record.form))
    return load(directory, learner=learner, seed=made.config.training.seed, dropout=0.0).model.eval()


def places_of(step: Step) -> list[str]:
    return [place for sequence in step.sequences for place in sequence]


def rows_at(step: Step) -> list[dict[str, Any]]:
    """The rows, read from their files."""
    found = []
    for place in places_of(step):
        uri, _, line = place.rpartition(":")
        found.append(json.loads(Path(uri.removeprefix("file://")).read_text().splitlines()[int(line) - 1]))
    return found


def mean_loss(model: Any, base: Path, rows: list[dict[str, Any]]) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([COLOURS.index(row["label"]) for row in rows])
    with torch.no_grad():
        return float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss)


def test_rows_that_share_a_sequence_are_named_together_once_that_is_settled(make_run: MakeRun, tmp_path: Path) -> None:
    training = {name: value for name, value in LANGUAGE["training"].items() if name != "maxSteps"}
    spec = {**LANGUAGE, "training": {**training, "epochs": 1}}
    made = make_run(texts(80), base=save_lm(tmp_path / "llama"), **spec)
    with pytest.raises(DataError, match="once the run has committed a checkpoint"):
        rows_of_step(made.config, step=1, run=None, credentials=None)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    first = rows_of_step(made.config, step=1, run=made.record.run_id, credentials=None)
    assert first.packed
    steps = [rows_of_step(made.config, step=1 + n, run=None, credentials=None) for n in range(first.batches)]
    seen = sorted(int(place.rpartition(":")[2]) for step in steps for place in places_of(step))
    encoded = made.encoded
    assert seen == sorted(encoded.values("row", encoded.rows(TRAIN)).tolist())  # long rows have become several
    assert max(len(sequence) for step in steps for sequence in step.sequences) > 1
