"""When checkpoints are due."""

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.contract import CheckpointConfig
from finetune_trainer.cadence import SHARE, SHORTEST, Cadence

SECONDS = st.floats(0.0, 500.0)


def cadence(*, grace: int = 120, **every: Any) -> Cadence:
    asked = {"every_seconds": None, "every_steps": None, "keep_last": 2, **every}
    return Cadence(CheckpointConfig(**asked), grace=grace, now=0.0)


def test_steps_are_counted_whatever_a_checkpoint_costs() -> None:
    asked = cadence(every_steps=20)
    assert [step for step in range(1, 61) if asked.due(step=step, now=1e6 * step)] == [20, 40, 60]
    asked.saved(now=1.0, stall=100.0, written=100.0)
    assert asked.due(step=80, now=2.0)


def test_a_time_is_kept_whatever_a_checkpoint_costs() -> None:
    asked = cadence(every_seconds=600.0)
    asked.saved(now=1000.0, stall=100.0, written=100.0)
    assert not asked.due(step=1, now=1599.0)
    assert asked.due(step=2, now=1600.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=20))
def test_without_either_training_stands_still_for_a_hundredth_of_its_time(costs: list[tuple[float, float]]) -> None:
    asked, now = cadence(), 0.0
    for stall, written in costs:
        began, wanted = now, asked.interval
        assert not asked.due(step=1, now=began + wanted * 0.99)
        now = began + wanted * 1.01
        assert asked.due(step=1, now=now)
        asked.saved(now=now, stall=stall, written=written)
        assert stall <= SHARE * asked.interval * 1.0001
        assert written <= asked.interval / 2
        assert asked.interval >= SHORTEST


def test_a_checkpoint_that_cost_much_once_is_forgotten_when_the_next_costs_little() -> None:
    asked = cadence()
    asked.saved(now=100.0, stall=10.0, written=3.0)
    assert asked.interval == 1000.0
    asked.saved(now=1100.0, stall=0.1, written=3.0)
    assert asked.interval == SHORTEST


def test_a_grace_period_that_is_too_short_is_told_once_with_a_longer_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    asked = cadence(grace=30)
    asked.saved(now=1.0, stall=0.1, written=30.0)
    assert not caplog.messages
    asked.saved(now=2.0, stall=0.1, written=45.0)
    asked.saved(now=3.0, stall=0.1, written=45.0)
    (told,) = caplog.messages
    assert "took 45 s, and pods have 30 s to stop" in told
    assert "terminationGracePeriodSeconds to 90" in told
