"""When a checkpoint is due: after so many steps or seconds as the document says, or as often as costs little."""

import logging

from finetune_api.contract import CheckpointConfig

SHARE = 0.01
"""Of its time, training may stand still for checkpoints."""
SHORTEST = 60.0
"""Seconds between two checkpoints that cost next to nothing."""
_WRITING = 2.0
"""Times the seconds that one takes to write: the store, too, is to have time for others."""
_log = logging.getLogger("finetune.train")


class Cadence:
    """Decides on one rank for all. All times are in seconds, `now` on a clock that never goes back."""

    def __init__(self, config: CheckpointConfig, *, grace: int, now: float) -> None:
        """`grace` is what a pod gets to stop."""
        self._config, self._grace = config, grace
        self._last = now
        self._stall = self._written = 0.0
        self._warned = False

    @property
    def interval(self) -> float:
        """From one checkpoint to the next, where no steps are given."""
        if self._config.every_seconds is not None:
            return self._config.every_seconds
        return max(SHORTEST, self._stall / SHARE, self._written * _WRITING)

    def due(self, *, step: int, now: float) -> bool:
        """Whether there should be a checkpoint after `step` steps."""
        if self._config.every_steps is not None:
            return step % self._config.every_steps == 0
        return now - self._last >= self.interval

    def saved(self, *, now: float, stall: float, written: float) -> None:
        """A checkpoint was taken, for which training stood still; the one before took `written` to reach the store."""
        self._last, self._stall, self._written = now, stall, written
        if written > self._grace and not self._warned:
            self._warned = True
            _log.warning(
                "writing a checkpoint took %.0f s, and pods have %d s to stop: a stop loses the steps since the last "
                "one; set podTemplate.spec.terminationGracePeriodSeconds to %.0f",
                written,
                self._grace,
                2 * written,
            )
