"""The keyed queue: one worker a key, nothing lost, errors spaced."""

import asyncio
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.queue import KeyedQueue


async def until(condition: "asyncio.Event", seconds: float = 5.0) -> None:
    await asyncio.wait_for(condition.wait(), seconds)


@settings(max_examples=60, deadline=None)
@given(
    additions=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), min_size=1, max_size=60),
    workers=st.integers(1, 5),
    fails=st.sets(st.integers(0, 40), max_size=5),
)
def test_a_key_is_never_worked_on_twice_at_once_and_its_last_state_is_always_seen(
    additions: list[tuple[str, int, bool]], workers: int, fails: set[int]
) -> None:
    asyncio.run(_check(additions, workers, fails))


async def _check(additions: list[tuple[str, int, bool]], workers: int, fails: set[int]) -> None:
    working: Counter[str] = Counter()
    state: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    calls = 0

    async def work(key: str) -> float | None:
        nonlocal calls
        calls += 1
        working[key] += 1
        assert working[key] == 1
        looked = state[key]
        try:
            await asyncio.sleep(0)
            if calls in fails:
                raise RuntimeError("as told")
            await asyncio.sleep(0)
        finally:
            working[key] -= 1
        seen[key] = looked
        return None

    queue = KeyedQueue(work, workers=workers, first_error_delay=0.001)
    task = asyncio.create_task(queue.run())
    for key, pauses, later in additions:
        state[key] += 1
        if later:
            queue.add_after(key, 0.001)
        else:
            queue.add(key)
        for _ in range(pauses):
            await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while seen != state:  # noqa: ASYNC110 (the state is the thing waited for)
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert max(working.values(), default=0) == 0


async def test_again_after_is_kept() -> None:
    times: list[float] = []
    enough = asyncio.Event()

    async def work(key: str) -> float | None:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 3:
            enough.set()
            return None
        return 0.05

    queue = KeyedQueue(work, workers=2)
    task = asyncio.create_task(queue.run())
    queue.add("a")
    await until(enough)
    task.cancel()
    assert all(0.04 < later - before < 1.0 for before, later in itertools.pairwise(times))


async def test_an_event_comes_before_again_after_and_replaces_it() -> None:
    calls = 0

    async def work(key: str) -> float | None:
        nonlocal calls
        calls += 1
        return 0.1 if calls == 1 else None

    queue = KeyedQueue(work)
    task = asyncio.create_task(queue.run())
    queue.add("a")
    await asyncio.sleep(0.02)
    queue.add("a")
    await asyncio.sleep(0.2)
    task.cancel()
    assert calls == 2


async def test_errors_are_spaced_more_and_more_and_forgotten_after_a_success() -> None:
    times: list[float] = []
    enough = asyncio.Event()

    async def work(key: str) -> float | None:
        times.append(asyncio.get_running_loop().time())
        if len(times) in (1, 2, 3, 5):
            raise RuntimeError("as told")
        if len(times) == 4:
            return 0.001
        enough.set()
        return None

    queue = KeyedQueue(work, first_error_delay=0.03)
    task = asyncio.create_task(queue.run())
    queue.add("a")
    await until(enough)
    task.cancel()
    waits = [later - before for before, later in itertools.pairwise(times)]
    assert waits[0] >= 0.029
    assert waits[1] >= 0.059
    assert waits[2] >= 0.119
    assert 0.029 <= waits[4] < 0.1


async def test_a_failing_key_does_not_hold_up_others() -> None:
    done = asyncio.Event()

    async def work(key: str) -> float | None:
        if key == "bad":
            raise RuntimeError("as told")
        done.set()
        return None

    queue = KeyedQueue(work, workers=1)
    task = asyncio.create_task(queue.run())
    queue.add("bad")
    queue.add("good")
    await until(done)
    task.cancel()


async def test_keys_that_rest_take_no_memory() -> None:
    async def work(key: str) -> float | None:
        return None

    queue = KeyedQueue(work)
    task = asyncio.create_task(queue.run())
    for number in range(1000):
        queue.add(str(number))
    await asyncio.sleep(0.2)
    task.cancel()
    assert queue.known == 0
