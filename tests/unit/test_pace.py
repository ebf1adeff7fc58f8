"""Progress of many trainings is told in turn: five writes a second, and nobody is passed over."""

import heapq
import random

import pytest

from finetune_operator import reconcile
from finetune_operator.reconcile import _Pace


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reconcile, "time", clock)
    return clock


def told(clock: Clock, number: int, *, seconds: float, spread: float) -> dict[str, list[float]]:
    """When each of so many trainings wrote. All want to, whenever the last time is long enough ago."""
    pace, generator = _Pace(), random.Random(17)
    apart, poll = max(10.0, number / 5), max(5.0, number / 10)
    writes: dict[str, list[float]] = {f"job-{i}": [] for i in range(number)}
    looks = [(clock.now + generator.uniform(0, spread), key) for key in writes]
    heapq.heapify(looks)
    end = clock.now + seconds
    while looks[0][0] < end:
        clock.now, key = heapq.heappop(looks)
        again = poll
        if not writes[key] or clock.now - writes[key][-1] >= apart:
            if pace.room(key):
                pace.take(key)
                writes[key].append(clock.now)
            else:
                again = min(again, pace.wait(key))
        heapq.heappush(looks, (clock.now + again + generator.uniform(0, 0.05), key))
    return writes


@pytest.mark.parametrize("spread", [0.1, 60.0])
@pytest.mark.parametrize("number", [3, 50, 100, 500])
def test_no_second_has_more_than_five_and_nobody_waits_for_much_longer_than_its_share(
    clock: Clock, number: int, spread: float
) -> None:
    began, seconds = clock.now, 1200.0
    writes = told(clock, number, seconds=seconds, spread=spread)
    moments = sorted(moment for of_one in writes.values() for moment in of_one)
    assert all(later - earlier >= 1.0 for earlier, later in zip(moments, moments[5:], strict=False))
    share, poll = max(10.0, number / 5), max(5.0, number / 10)
    for of_one in writes.values():
        gaps = [b - a for a, b in zip([began, *of_one], [*of_one, began + seconds], strict=True)]
        assert gaps[0] <= spread + 1.2 * number / 5 + 2
        assert max(gaps[1:]) <= 1.2 * share + poll + 2


def test_who_waits_keeps_its_turn(clock: Clock) -> None:
    pace = _Pace()
    for key in "abcde":
        assert pace.room(key)
        pace.take(key)
    assert not pace.room("f")
    assert (pace.wait("f"), pace.wait("g"), pace.wait("f")) == pytest.approx((1.0, 1.0, 1.0))
    clock.now += 0.3
    assert not pace.room("f")  # its turn has come, and still there were five within a second
    assert pace.waits("f")
    assert pace.wait("f") == pytest.approx(0.7)
    assert not pace.waits("a")
    clock.now += 0.8
    assert not pace.room("h") or pace.room("f")
    assert pace.room("f")
    assert pace.room("g")


def test_who_is_gone_waits_no_more(clock: Clock) -> None:
    pace = _Pace()
    pace.wait("a")
    pace.forget("a")
    clock.now += 10
    assert pace.room("a")
