"""When checkpoints are due, and when training waits for one."""

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
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
        assert written * (2 if written <= 120 else 1.25) <= asked.interval
        assert asked.interval >= SHORTEST


def test_a_checkpoint_that_cost_much_once_is_forgotten_when_the_next_costs_little() -> None:
    asked = cadence()
    asked.saved(step=1, now=100.0, stall=10.0, written=3.0)
    assert asked.interval == 1000.0
    asked.saved(step=2, now=1100.0, stall=0.1, written=3.0)
    assert asked.interval == SHORTEST


@pytest.mark.parametrize(
    ("grace", "stall", "written", "interval"),
    [
        (120, 0.0, 20.0, SHORTEST),
        (120, 0.0, 60.0, 120.0),
        (120, 0.0, 120.0, 240.0),  # half of the stops find one on its way, and wait for it
        (120, 0.0, 121.0, 151.25),  # none is committed while a pod stops: the sooner the next, the less is lost
        (30, 0.0, 40.0, SHORTEST),
        (30, 0.0, 200.0, 250.0),
        (30, 10.0, 200.0, 1000.0),  # training stands still for a hundredth of its time all the same
    ],
)
def test_the_store_gets_rest_as_long_as_a_stop_can_commit(
    grace: int, stall: float, written: float, interval: float
) -> None:
    asked = cadence(grace=grace)
    asked.saved(step=1, now=1000.0, stall=stall, written=written)
    assert asked.interval == interval


def lost(*, grace: int, step: float, writing: float, at: float) -> float:
    """Seconds of training that a stop costs, of a pod that is killed `grace` s after it was asked to stop."""
    asked, now, trained = cadence(grace=grace), 0.0, 0.0
    there, begun, before, written = 0.0, 0.0, 0.0, 0.0
    """When the last checkpoint is or was committed; what had been trained when it and the one before were begun."""
    number = 0
    while now < at:
        number += 1
        due, _ = asked.begin(step=number, now=now)
        now, trained = now + step, trained + step
        if due and now < at:
            now = max(now, there)
            asked.saved(step=number, now=now, stall=0.0, written=written)
            there, begun, before, written = now + writing, trained, begun, writing
    end = at + grace
    if max(now, there) + writing <= end:
        return 0.0
    return trained - (begun if there <= end else before)


@given(
    grace=st.integers(5, 120),
    step=st.floats(2.0, 5.0),
    writing=st.floats(0.0, 300.0),
    at=st.floats(0.0, 1500.0),
)
@example(grace=30, step=1.0, writing=200.0, at=820.0)
@example(grace=60, step=1.0, writing=40.0, at=190.0)
@settings(deadline=None)
def test_a_stop_costs_nothing_where_two_writings_fit_into_the_grace_period_and_little_where_one_does(
    grace: int, step: float, writing: float, at: float
) -> None:
    cost = lost(grace=grace, step=step, writing=writing, at=at)
    if 2 * writing + step <= grace:
        assert cost == 0
    elif writing + step <= grace:
        assert cost <= 2 * writing - grace + step
    else:
        assert cost <= max(SHORTEST, writing * 1.25) + max(0.0, writing - grace) + 3 * step


def test_a_grace_period_that_does_not_hold_two_writings_is_told_once_with_one_that_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    asked = cadence(grace=30)
    asked.saved(step=1, now=1.0, stall=0.1, written=15.0)
    assert not caplog.messages
    for step, written in ((2, 20.2), (3, 20.2), (4, 45.0), (5, 20.2), (6, 45.0)):
        asked.saved(step=step, now=step, stall=0.1, written=written)
    first, second = caplog.messages
    assert "took 20 s, and pods have 30 s to stop: a stop while one is written loses the steps since that one" in first
    assert first.endswith("terminationGracePeriodSeconds to 41")
    assert "took 45 s, and pods have 30 s to stop: a stop loses the steps since the last one" in second
    assert second.endswith("terminationGracePeriodSeconds to 90")
