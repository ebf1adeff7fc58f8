"""Question answering end to end: losses equal to those of transformers.Trainer, and a stop that changes nothing."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.trainer.memory import Memory, learner_of
from tests.trainer.rank.architectures import SMALL
from tests.trainer.rank.conftest import COLOURS, WORDS
from tests.trainer.rank.peers import losses_of_trainer
from tests.trainer.rank.test_loop import Quiet, config, setup_of

from finetune_trainer.checkpoint import WEIGHTS, State
from finetune_trainer.data.order import Order
from finetune_trainer.loop import Objective, train

KIND = "question-answering"
LEARNER = learner_of(KIND, more={"token_types": True})
ROWS, TOKENS, STEPS = 40, 12, 50


class Windows:
    """Windows of equal length: what everybody's loss makes of padding is not what ours does, see docs/decisions.md."""

    def __init__(self) -> None:
        draw = np.random.default_rng(3)
        start = draw.integers(4, TOKENS - 2, ROWS)
        ids = draw.integers(5, 60, (ROWS, TOKENS)).astype(np.int32)
        ids[np.arange(ROWS), start] = 4  # what the answer begins with
        none = np.zeros(ROWS, np.int64)
        none[::5] = 1
        spans = np.arange(2 * (TOKENS - 3), dtype=np.int32)
        self.store = Memory(
            input_ids=list(ids),
            token_type_ids=[np.array([0] * 3 + [1] * (TOKENS - 3), np.uint8)] * ROWS,
            start=np.where(none, 0, start),
            end=np.where(none, 0, start + 1),
            context_at=[3] * ROWS,
            spans=[spans] * ROWS,
            answerable=1 - none,
        )
        self.order = Order(ROWS, 8, 5, np.full(ROWS, TOKENS))

    def inputs_of(self, rows: Any) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in LEARNER.collate(self.store, rows).items()}


def bert(dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    settings = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForQuestionAnswering(settings).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_fifty_steps_equal_those_of_the_trainer(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    data, state, settings = Windows(), State(micro_batch=3), config(max_steps=STEPS)
    model = bert(dtype)
    train(setup_of(model, data, settings, objective=Objective(model, LEARNER), learner=LEARNER), state, Quiet())
    batches = []
    for step in range(STEPS):
        batch = data.inputs_of(data.order.batch(step))
        del batch["context"]
        labels = batch.pop("labels")
        batches.append({**batch, "start_positions": labels[:, 0], "end_positions": labels[:, 1]})
    theirs = losses_of_trainer(bert(dtype), batches, settings, work=tmp_path)
    assert state.losses == pytest.approx(theirs, rel=tolerance)
    assert state.losses[-1] < state.losses[0]


def questions(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Which colour comes right after a word? Contexts of up to three windows; every ninth does not tell."""
    draw, found = random.Random(seed), []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(6, 50))]
        place = draw.randrange(len(words))
        colour = draw.choice(COLOURS)
        before = " ".join([*words[:place], "zeta"])
        context = " ".join([before, colour, *words[place:]])
        answers = [{"text": colour, "start": len(before) + 1}] if number % 9 else []
        found.append({"question": "zeta", "context": context, "answers": answers})
    return found


SPEC: dict[str, Any] = {
    "task": {"type": KIND, "stride": 8},
    "data": {"maxLength": 24},
    "training": {
        "maxSteps": 12,
        "batchSize": 16,
        "microBatch": 8,
        "learningRate": 3e-3,
        "evaluateEvery": {"steps": 6},
    },
    "checkpoint": {"every": {"steps": 4}},
}


def test_a_stop_changes_nothing_in_the_weights(make_run: Any, tmp_path: Path) -> None:
    calm, stopped = (make_run(questions(120), name=name, **SPEC) for name in ("calm", "stopped"))
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    stop = ("finetune_trainer.training", "Duties", "due", 7, signal.SIGTERM.value)
    code, log = stopped.run(tmp_path / "work-1", stop=stop)
    assert code == 45, log
    code, log = stopped.run(tmp_path / "work-2")
    assert code == 0, log
    assert calm.losses() == stopped.losses()
    assert calm.last(WEIGHTS).read_bytes() == stopped.last(WEIGHTS).read_bytes()
    evaluation = calm.published()["outcome"]["evaluation"]
    assert set(evaluation["tuned"]) >= {"exact-match", "f1", "loss", "has-answer-accuracy", "no-answer-accuracy"}
    assert evaluation["rows"] == 12  # questions, not windows
    assert evaluation["trivial"]["f1"] > 0
    assert evaluation == stopped.published()["outcome"]["evaluation"]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(calm.model())
    assert model.config.num_labels == 2


def test_an_answer_that_is_not_where_the_row_says_names_file_and_row(make_run: Any) -> None:
    rows = questions(30)
    rows[4]["answers"][0]["start"] += 1
    with pytest.raises(Exception, match=r"train\.jsonl:5: answer 1 in the column 'answers'.*'context'"):
        make_run(rows, **SPEC)
