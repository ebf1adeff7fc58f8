"""When a checkpoint is due: after so many steps or seconds as the document says, or as often as costs little."""

import logging
import math
from collections import deque
from statistics import median

from finetune_api.contract import CheckpointConfig

SHARE = 0.01
"""Of its time, training may stand still for checkpoints."""
SHORTEST = 60.0
"""Seconds between two checkpoints that cost next to nothing."""
_WRITING = 2.0
"""Times the seconds that one takes to write: the store, too, is to have time for others."""
_SPARE = 1.25
"""Times the seconds that the last one took to write, which the next one is begun before it must be there."""
_QUICK = 1.0
"""Seconds that training waits rather than have checkpoints at other steps than the multiples of those asked for."""
_RECENT = 63
"""Steps whose lengths are remembered."""
_log = logging.getLogger("finetune.train")


class Cadence:
    """Decides on one rank for all. All times are in seconds, `now` on a clock that never goes back.

    An interval that the document gives is what a kill may cost at most. A checkpoint counts when it is committed, and
    it is written while training goes on; so it is begun early enough to be committed at the end of the interval, and
    a step waits where that was not early enough.
    """

    def __init__(self, config: CheckpointConfig, *, grace: int, step: int, now: float) -> None:
        """`grace` is what a pod gets to stop; `step` is where the attempt begins, by a checkpoint or at 0."""
        self._config, self._grace = config, grace
        self._last = self._safe = (step, now)
        self._stall = self._written = 0.0
        self._began: float | None = None
        self._lengths: deque[float] = deque(maxlen=_RECENT)
        self._warned = 0

    @property
    def interval(self) -> float:
        """From one checkpoint to the next, where no steps are given."""
        if self._config.every_seconds is not None:
            return self._config.every_seconds - _lead(self._config.every_seconds, self._written * _SPARE)
        # Where none can be committed while a pod stops, a stop costs what a kill does, and the store gets no rest.
        writing = _WRITING if self._written <= self._grace else _SPARE
        return max(SHORTEST, self._stall / SHARE, self._written * writing)

    def begin(self, *, step: int, now: float) -> tuple[bool, bool]:
        """Of the step that begins now, after which `step` steps are done: whether there should be a checkpoint after
        it, and whether it must wait for the one that is on its way."""
        if self._began is not None:
            self._lengths.append(now - self._began)
        waits = self._waits(step=step, now=now)
        self._began = None if waits else now  # one that waits does not tell how long a step takes
        return self._due(step=step, now=now), waits

    def _due(self, *, step: int, now: float) -> bool:
        every = self._config.every_steps
        if every is None:
            return now - self._last[1] >= self.interval
        lead = 0
        if self._written > _QUICK and self._lengths:
            lead = int(_lead(every, self._written * _SPARE / max(1e-6, median(self._lengths))))
        return step - self._last[0] >= every - lead or (not lead and step % every == 0)

    def _waits(self, *, step: int, now: float) -> bool:
        """Whether a kill after this step would cost more than the document says."""
        if self._last == self._safe:
            return False
        if self._config.every_steps is not None:
            return step - self._safe[0] > self._config.every_steps
        return self._config.every_seconds is not None and now - self._safe[1] > self._config.every_seconds

    def saved(self, *, step: int, now: float, stall: float, written: float) -> None:
        """A checkpoint was taken after `step` steps, for which training stood still; the one before took `written` to
        reach the store, and is there."""
        self._safe, self._last = self._last, (step, now)
        self._began = None
        self._stall, self._written = stall, written
        self._warn()

    def _warn(self) -> None:
        """A stop waits for the checkpoint that is on its way, then for its own."""
        risk = (2 * self._written > self._grace) + (self._written > self._grace)
        if risk <= self._warned:
            return
        self._warned = risk
        _log.warning(
            "writing a checkpoint took %.0f s, and pods have %d s to stop: a stop %s; set "
            "podTemplate.spec.terminationGracePeriodSeconds to %d",
            self._written,
            self._grace,
            ("while one is written loses the steps since that one", "loses the steps since the last one")[risk - 1],
            math.ceil(2 * self._written),
        )

    def committed(self) -> None:
        """Nothing is on its way any more."""
        self._safe = self._last


def _lead(interval: float, writing: float) -> float:
    """How much of an interval before its end a checkpoint is begun, that takes `writing` of the same unit.

    Begun x after the one before, it is there x + writing after it, which the interval must hold, or training waits.
    What takes longer than half of the interval makes training wait in any case, least when it is begun in the middle;
    what takes longer than all of it, when there are as few as can be.
    """
    if writing <= interval / 2:
        return writing
    return interval / 2 if writing <= interval else 0.0
