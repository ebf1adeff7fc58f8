"""Fifty steps on equal batches give the losses of transformers.Trainer, though ours cuts them into micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.rank.peers import losses_of_trainer
from tests.trainer.rank.test_loop import Data, Quiet, config, model_in, setup_of

from finetune_trainer.checkpoint import State
from finetune_trainer.loop import train

STEPS = 50
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"schedule_minimum": 0.1},
    "constant": {},
    "polynomial": {"schedule_power": 2.0, "schedule_minimum": 0.05},
    "inverse-sqrt": {},
}
CASES = [
    *[("adamw", schedule, torch.float64, 1e-9) for schedule in SCHEDULES],
    ("adamw", "linear", torch.float32, 1e-5),
    ("adafactor", "linear", torch.float64, 1e-9),
]


@pytest.mark.parametrize(("optimizer", "schedule", "dtype", "tolerance"), CASES)
def test_fifty_steps_equal_those_of_the_trainer(
    tiny_base: Path, tmp_path: Path, optimizer: str, schedule: str, dtype: torch.dtype, tolerance: float
) -> None:
    settings = config(
        max_steps=STEPS, optimizer=optimizer, schedule=schedule, betas=[0.85, 0.99], epsilon=1e-7, **SCHEDULES[schedule]
    )
    data, state = Data(), State(micro_batch=3)
    train(setup_of(model_in(tiny_base, dtype=dtype, dropout=False), data, settings), state, Quiet())
    batches = [data.inputs_of(data.order.batch(step)) for step in range(STEPS)]
    theirs = losses_of_trainer(model_in(tiny_base, dtype=dtype, dropout=False), batches, settings, work=tmp_path)
    assert len(theirs) == STEPS
    assert state.losses == pytest.approx(theirs, rel=tolerance)
    assert state.losses[-1] < state.losses[0]
