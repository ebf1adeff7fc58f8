"""A keyed work queue: one worker at a time per key, nothing lost, errors spaced, "again after" kept.

A key that is added while it is worked on is worked on once more afterwards. Work looks at the whole state, so any
number of additions in between count as one.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

FIRST_ERROR_DELAY = 0.5
LONGEST_ERROR_DELAY = 30.0


@dataclass
class _Key:
    queued: bool = False
    since: float = 0.0
    """When it was queued, by the monotonic clock."""
    working: bool = False
    dirty: bool = False
    """Added while it was worked on."""
    errors: int = 0
    timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        return not (self.queued or self.working or self.dirty or self.errors or self.timer)


class KeyedQueue:
    """`work(key)` returns seconds after which the key comes again, or None; what it raises is tried again later."""

    def __init__(
        self,
        work: Callable[[str], Awaitable[float | None]],
        *,
        workers: int = 16,
        first_error_delay: float = FIRST_ERROR_DELAY,
    ) -> None:
        self._work = work
        self._first_error_delay = first_error_delay
        self._workers = workers
        self._keys: dict[str, _Key] = {}
        self._ready: asyncio.Queue[str] = asyncio.Queue()

    def __len__(self) -> int:
        """Keys that wait for a worker."""
        return self._ready.qsize()

    @property
    def known(self) -> int:
        """Keys that wait for a worker, for a time or for the end of their work."""
        return len(self._keys)

    @property
    def age(self) -> float:
        """Seconds that the first key has waited for a worker."""
        waits = [state.since for state in self._keys.values() if state.queued]
        return time.monotonic() - min(waits) if waits else 0.0

    def add(self, key: str) -> None:
        """Have `key` worked on as soon as possible."""
        state = self._keys.setdefault(key, _Key())
        if state.timer is not None:
            state.timer.cancel()
            state.timer = None
        if state.working:
            state.dirty = True
        elif not state.queued:
            state.queued, state.since = True, time.monotonic()
            self._ready.put_nowait(key)

    def add_after(self, key: str, seconds: float) -> None:
        """Have `key` worked on in a while, if nothing calls for it before."""
        if seconds <= 0:
            return self.add(key)
        state = self._keys.setdefault(key, _Key())
        if state.timer is not None:
            state.timer.cancel()
        state.timer = asyncio.get_running_loop().call_later(seconds, self.add, key)
        return None

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._worker())
        finally:
            for state in self._keys.values():
                if state.timer is not None:
                    state.timer.cancel()

    async def _worker(self) -> None:
        while True:
            key = await self._ready.get()
            state = self._keys[key]
            state.queued, state.working, state.dirty = False, True, False
            again = await self._once(key, state)
            state.working = False
            if state.dirty:
                state.dirty = False
                self.add(key)
            elif again is not None:
                self.add_after(key, again)
            if state.idle:
                del self._keys[key]

    async def _once(self, key: str, state: _Key) -> float | None:
        try:
            again = await self._work(key)
        except Exception as error:
            delay = min(self._first_error_delay * float(2 ** min(state.errors, 10)), LONGEST_ERROR_DELAY)
            state.errors += 1
            # Whoever works tells what it was about; here nothing is known but a key.
            logger.debug("%s: %s: %s; again in %g s", key, type(error).__name__, error, delay, exc_info=True)
            return delay
        state.errors = 0
        return again
