"""When checkpoints are due, and when training waits for one."""

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_api.contract import CheckpointConfig
from finetune_trainer.cadence import SHARE, SHORTEST, Cadence

SECONDS = st.floats(0.0, 500.0)


def cadence(*, grace: int = 120, **every: Any) -> Cadence:
    asked = {"every_seconds": None, "every_steps": None, "keep_last": 2, **every}
    return Cadence(CheckpointConfig(**asked), grace=grace, step=0, now=0.0)


@dataclass
class Trained:
    """What a run of steps came to. Seconds are of the run's clock."""

    saved: list[int]
    """Steps after which a checkpoint was taken."""
    waits: list[float]
    """Seconds that training waited, by step."""
    steps_at_risk: int
    """Most steps that were done since the last committed checkpoint."""


def trained(cadence: Cadence, *, steps: int, step: float, writing: float) -> Trained:
    """Steps of `step` seconds and checkpoints that take `writing` seconds beside them, in the order of loop.train."""
    now = there = 0.0
    safe = 0
    found = Trained([], [], 0)
    for number in range(1, steps + 1):
        if now >= there:
            cadence.committed()
        due, hold = cadence.begin(step=number, now=now)
        now += step
        wait = max(0.0, there - now) if hold else 0.0
        now = max(now, there) if hold else now
        if now >= there:
            safe = found.saved[-1] if found.saved else 0
        found.steps_at_risk = max(found.steps_at_risk, number - safe)
        if due:
            wait += max(0.0, there - now)
            now = max(now, there)
            cadence.saved(step=number, now=now, stall=0.0, written=writing if found.saved else 0.0)
            safe, there = found.saved[-1] if found.saved else 0, now + writing
            found.saved.append(number)
        found.waits.append(wait)
    return found


def test_what_is_written_within_a_step_is_due_at_multiples() -> None:
    run = trained(cadence(every_steps=20), steps=100, step=4.0, writing=2.5)
    assert run.saved == [20, 40, 60, 80, 100]
    assert not any(run.waits)


def test_what_is_written_within_a_second_is_due_at_multiples_and_training_waits() -> None:
    run = trained(cadence(every_steps=20), steps=100, step=0.25, writing=1.0)
    assert run.saved == [20, 40, 60, 80, 100]
    assert sum(run.waits) == 4 * 0.75


def test_what_takes_some_steps_is_begun_before_it_must_be_there() -> None:
    run = trained(cadence(every_steps=20), steps=100, step=1.0, writing=4.0)
    assert run.saved == [20, 40, 55, 70, 85, 100]
    assert sum(run.waits[41:]) == 0


def test_what_takes_longer_than_the_interval_is_due_at_multiples_and_training_waits() -> None:
    run = trained(cadence(every_steps=5), steps=30, step=1.0, writing=10.0)
    assert run.saved == [5, 10, 15, 20, 25, 30]
    assert sum(run.waits) > 40


@given(every=st.integers(1, 60), step=st.floats(0.01, 10.0), writing=st.floats(0.0, 300.0))
@example(every=3, step=1.0, writing=3.0)
def test_no_kill_costs_more_steps_than_asked_for(every: int, step: float, writing: float) -> None:
    assert trained(cadence(every_steps=every), steps=300, step=step, writing=writing).steps_at_risk <= every


@given(every=st.floats(1.0, 600.0), step=st.floats(0.01, 10.0), writing=st.floats(0.0, 300.0))
def test_no_kill_costs_more_time_than_asked_for_and_a_step(every: float, step: float, writing: float) -> None:
    run = trained(cadence(every_seconds=every), steps=300, step=step, writing=writing)
    assert run.steps_at_risk * step <= every + 2 * step


@given(every=st.integers(4, 60), step=st.floats(0.01, 10.0), share=st.floats(0.0, 0.4))
def test_training_waits_for_none_that_is_written_in_less_than_half_of_the_interval(
    every: int, step: float, share: float
) -> None:
    run = trained(cadence(every_steps=every), steps=300, step=step, writing=share * every * step)
    second, *rest = run.saved[1:]
    assert sum(run.waits[second + every :]) <= len(rest)  # a second for each
    if share * every * step > 1:
        assert sum(run.waits[second + every :]) == 0
    assert all(later - before >= every // 2 for before, later in pairwise(rest))


def test_a_kill_costs_nothing_more_while_nothing_is_on_its_way() -> None:
    asked = cadence(every_steps=10)
    assert asked.begin(step=50, now=50.0) == (True, False)
    asked.saved(step=50, now=50.0, stall=0.0, written=0.0)
    assert asked.begin(step=51, now=51.0) == (False, True)
    asked.committed()
    assert asked.begin(step=51, now=51.0) == (False, False)


def test_a_time_is_kept_whatever_a_checkpoint_stalls() -> None:
    asked = cadence(every_seconds=600.0)
    asked.saved(step=1, now=1000.0, stall=100.0, written=0.0)
    asked.committed()
    assert asked.begin(step=2, now=1599.0) == (False, False)
    assert asked.begin(step=3, now=1600.0) == (True, False)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=20))
def test_without_either_training_stands_still_for_a_hundredth_of_its_time(costs: list[tuple[float, float]]) -> None:
    asked, now = cadence(), 0.0
    for number, (stall, written) in enumerate(costs, 1):
        began, wanted = now, asked.interval
        assert asked.begin(step=number, now=began + wanted * 0.99) == (False, False)
        now = began + wanted * 1.01
        assert asked.begin(step=number, now=now) == (True, False)
        asked.saved(step=number, now=now, stall=stall, written=written)
        assert stall <= SHARE * asked.interval * 1.0001
        assert written <= asked.interval / 2
        assert asked.interval >= SHORTEST


def test_a_checkpoint_that_cost_much_once_is_forgotten_when_the_next_costs_little() -> None:
    asked = cadence()
    asked.saved(step=1, now=100.0, stall=10.0, written=3.0)
    assert asked.interval == 1000.0
    asked.saved(step=2, now=1100.0, stall=0.1, written=3.0)
    assert asked.interval == SHORTEST


def test_a_grace_period_that_is_too_short_is_told_once_with_a_longer_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    asked = cadence(grace=30)
    asked.saved(step=1, now=1.0, stall=0.1, written=30.0)
    assert not caplog.messages
    asked.saved(step=2, now=2.0, stall=0.1, written=45.0)
    asked.saved(step=3, now=3.0, stall=0.1, written=45.0)
    (told,) = caplog.messages
    assert "took 45 s, and pods have 30 s to stop" in told
    assert "terminationGracePeriodSeconds to 90" in told
