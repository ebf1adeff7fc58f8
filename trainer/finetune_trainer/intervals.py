"""How sure a figure is: bootstrap intervals over evaluated rows, the same for the same seed.

Rows are drawn again with replacement and measured each time; the interval holds the middle 95 % of the results (the
percentile method of Efron, 1979). Two models are compared on the same draws, so that what makes rows hard for both
cancels out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.tasks import Learner, Outcomes

Samples = dict[str, NDArray[np.float64]]
"""Values of each metric, one a draw; NaN where a draw leaves a metric undefined."""
TAILS = (2.5, 97.5)
"""Percentiles between which 95 % of the draws lie."""
_ROWS_DRAWN = 5_000_000
_FEWEST = 50
_BETWEEN_BEATS = 16


@dataclass(frozen=True)
class Draws:
    """The draws of one evaluation: how many is a matter of the task and the number of rows, never of the machine."""

    rows: int
    seed: int
    count: int

    @classmethod
    def of(cls, learner: Learner, rows: int, *, seed: int) -> "Draws":
        return cls(rows, seed, max(_FEWEST, min(learner.draws, _ROWS_DRAWN // max(1, rows))))

    def each(self, beat: Callable[[], None] = lambda: None) -> Iterable[NDArray[np.int64]]:
        """Places of rows, int64 [rows], one draw after the other; the same ones each time they are gone through."""
        return _Each(self, beat)

    def measured(
        self, learner: Learner, outcomes: Outcomes, *, needed: str = "", beat: Callable[[], None] = lambda: None
    ) -> Samples:
        """The metrics of each draw of `outcomes`, which must have `rows` rows. The metric `needed` is among them where
        outcomes have it, if only from a few draws, because the learner has no fast way."""
        found = learner.resampled(outcomes, self.each(beat))
        if needed and needed not in found and needed in learner.metrics(outcomes):
            slow = Learner.resampled(learner, outcomes, islice(self.each(beat), _FEWEST))
            found[needed] = slow[needed]
        return found


@dataclass(frozen=True)
class _Each:
    draws: Draws
    beat: Callable[[], None]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for number in range(self.draws.count):
            if number % _BETWEEN_BEATS == 0:
                self.beat()
            yield np.random.default_rng((self.draws.seed, number)).integers(0, self.draws.rows, self.draws.rows)


def interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The middle 95 % of `values`, None where most of them are undefined."""
    known = values[np.isfinite(values)]
    if 2 * len(known) < len(values) or not len(known):
        return None
    low, high = np.percentile(known, TAILS)
    return float(low), float(high)


def intervals(samples: Samples) -> dict[str, tuple[float, float]]:
    """Of every metric that has one."""
    found = {name: interval(values) for name, values in samples.items()}
    return {name: ends for name, ends in found.items() if ends is not None}


def gains(
    samples: Samples, rivals: Samples, *, higher_is_better: Callable[[str], bool]
) -> Mapping[str, tuple[float, float]]:
    """Intervals of how much better `samples` are than `rivals`, drawn alike."""
    signs = {name: 1.0 if higher_is_better(name) else -1.0 for name in samples}
    known = [name for name in samples if name in rivals and len(samples[name]) == len(rivals[name])]
    return intervals({name: signs[name] * (samples[name] - rivals[name]) for name in known})
