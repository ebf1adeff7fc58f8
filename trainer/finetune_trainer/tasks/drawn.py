"""Metrics of many selections of the same rows at once: a selection is how often each row is drawn.

What is right, which label or number is true and which was answered are found once; a selection then is a row of a
matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.tasks.ranking import BINS, Areas, trust

Floats = NDArray[np.float64]
_CELLS = 2**20
"""Of a block of selections: more would not be faster, and take more memory."""


def blocks(draws: Iterable[NDArray[np.int64]], rows: int) -> Iterator[NDArray[np.int64]]:
    """Selections, given as places of rows, as how often each of `rows` rows is drawn, [selections, rows], some at a
    time."""
    block: list[NDArray[np.int64]] = []
    for draw in draws:
        block.append(np.bincount(draw, minlength=rows))
        if len(block) * rows >= _CELLS:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def joined(found: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """The metrics of one block of selections after the other, without those that are undefined in all of them."""
    every = {name: np.concatenate([block[name] for block in found]) for name in (found[0] if found else ())}
    return {name: values for name, values in every.items() if not np.isnan(values).all()}


class Drawn:
    """Metrics of selections of rows with one label each, int [rows], or with several, multi-hot [rows, labels]; with
    probabilities [rows, labels], if they are known."""

    def __init__(
        self, labels: NDArray[Any], answers: NDArray[Any], hot: NDArray[np.bool_] | None, shares: NDArray[Any] | None
    ) -> None:
        """`hot`: the labels, multi-hot, as wide as the probabilities."""
        self._labels, self._answers = labels, answers
        self._several = labels.ndim > 1
        self._right = (labels == answers).all(1) if self._several else labels == answers
        self._count = int(max(labels.max(initial=0), answers.max(initial=0))) + 1
        self._areas = None if hot is None or shares is None else Areas(hot, shares)
        self._gaps = None if shares is None else _gaps(*trust(labels, shares))
        self._decisions = labels.shape[1] if self._several else 1

    def metrics(self, drawn: NDArray[np.int64]) -> dict[str, Floats]:
        """`drawn` [selections, rows] says how often each row is in each; [selections], NaN where undefined."""
        weights, rows = drawn.astype(np.float64), drawn.sum(1)
        found = {"accuracy": weights @ self._right / rows}
        if self._several:
            true, given, both = (weights @ x for x in (self._labels, self._answers, self._labels & self._answers))
            found |= of_several(true, given, both, rows)
        else:
            right = self._right
            of_right = _by_label(weights[:, right], self._labels[right], self._count)
            true, given = (_by_label(weights, x, self._count) for x in (self._labels, self._answers))
            found |= of_one(true, given, of_right)
        if self._areas is not None:
            found |= self._areas.of(drawn)
        if self._gaps is not None:
            found["ece"] = np.abs(weights @ self._gaps).sum(1) / (rows * self._decisions)
        return found


class DrawnNumbers:
    """Metrics of selections of rows with a number each, float64 [rows], and with what was answered."""

    def __init__(self, numbers: Floats, answers: Floats) -> None:
        self._values = numbers, answers
        self._error = np.abs(numbers - answers)
        self._kinds = [np.unique(values, return_inverse=True)[1] for values in self._values]

    def metrics(self, drawn: NDArray[np.int64]) -> dict[str, Floats]:
        """`drawn` [selections, rows] says how often each row is in each; [selections], NaN where undefined: r2 where
        one number alone is drawn, correlations where that is so of numbers or answers."""
        weights, rows = drawn.astype(np.float64), drawn.sum(1, keepdims=True)
        squares = weights @ self._error**2
        counts = [_by_label(weights, kinds, int(kinds.max(initial=0)) + 1) for kinds in self._kinds]
        varied, answered = ((count > 0).sum(1) > 1 for count in counts)
        numbers, answers = (values - (weights @ values)[:, None] / rows for values in self._values)
        ranked = (_ranks(count)[:, kinds] for count, kinds in zip(counts, self._kinds, strict=True))
        place, answered_place = (ranks - (rows + 1) / 2 for ranks in ranked)
        error = squares / rows[:, 0]
        return {
            "mse": error,
            "rmse": np.sqrt(error),
            "mae": weights @ self._error / rows[:, 0],
            "r2": 1 - _ratio(squares, (weights * numbers**2).sum(1), varied),
            "pearson": _correlation(weights, numbers, answers, varied & answered),
            "spearman": _correlation(weights, place, answered_place, varied & answered),
        }


def _ranks(counts: Floats) -> Floats:
    """Of each kind of number, the smallest first, the mean rank of those drawn, from 1, [selections, kinds]."""
    return np.asarray(counts.cumsum(1) - (counts - 1) / 2)


def _correlation(weights: Floats, one: Floats, other: Floats, known: NDArray[np.bool_]) -> Floats:
    """Pearson's, of values whose mean in each selection is 0, [selections, rows]; NaN where it is not `known`."""
    spread, another = (np.sqrt((weights * values**2).sum(1)) for values in (one, other))
    return np.clip(_ratio((weights * one * other).sum(1), spread * another, known), -1.0, 1.0)


def _ratio(part: Floats, whole: Floats, known: NDArray[np.bool_]) -> Floats:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=known & (whole > 0))


def mean(weights: NDArray[np.int64], values: NDArray[Any], counts: NDArray[Any]) -> Floats:
    """Of each selection the sum of the rows' values by the sum of their counts, [selections]."""
    total = weights @ counts.astype(np.float64)
    return np.asarray(weights @ values.astype(np.float64) / np.where(total == 0, 1.0, total))


def _by_label(weights: Floats, labels: NDArray[np.integer], count: int) -> Floats:
    """How often each label is drawn, [selections, count]; `labels` are those of the rows."""
    found = np.zeros((len(weights), count))
    if len(labels):
        order = np.argsort(labels, kind="stable")
        kinds, first = np.unique(labels[order], return_index=True)
        found[:, kinds] = np.add.reduceat(weights[:, order], first, axis=1)
    return found


def _gaps(bins: NDArray[np.int64], gaps: Floats) -> Floats:
    """Of each row the sum of the gaps in each bin, [rows, bins]."""
    places = bins + BINS * np.arange(len(bins))[:, None]
    sums = np.bincount(places.ravel(), weights=gaps.ravel(), minlength=BINS * len(bins))
    return np.asarray(sums.reshape(len(bins), BINS), dtype=np.float64)


def of_one(true: Floats, given: Floats, both: Floats) -> Mapping[str, Floats]:
    """Precision, recall, F1 and MCC of rows of one label, from how often each label is true, is predicted, and is both,
    [selections, labels]. As scikit-learn has it, averages are over the labels that occur."""
    return {**_averages(true, given, both, true + given > 0), "mcc": matthews(true, given, both.sum(1))}


def of_several(true: Floats, given: Floats, both: Floats, rows: NDArray[np.int64]) -> Mapping[str, Floats]:
    """The same where a row, of which there are `rows` [selections], may have several labels: averages are over all."""
    every = rows[:, None].astype(np.float64)
    real, guess = (np.stack([every - x, x], -1) for x in (true, given))
    mcc = matthews(real, guess, every - true - given + 2 * both).mean(1)
    return {**_averages(true, given, both, np.full(true.shape, True)), "mcc": mcc}


def _averages(true: Floats, given: Floats, both: Floats, occur: NDArray[np.bool_]) -> dict[str, Floats]:
    f1, kinds = _share(2 * both, true + given), occur.sum(1)

    def over_labels(values: Floats) -> Floats:
        return np.asarray((values * occur).sum(1) / kinds)

    return {
        "precision": over_labels(_share(both, given)),
        "recall": over_labels(_share(both, true)),
        "f1": over_labels(f1),
        "f1-micro": _share(2 * both.sum(1), (true + given).sum(1)),
        "f1-weighted": _share((f1 * true).sum(1), true.sum(1)),
    }


def _share(part: Floats, whole: Floats) -> Floats:
    """0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def matthews(true: Floats, given: Floats, right: Floats) -> Floats:
    """Matthews' correlation (R_K of Gorodkin 2004) from how often each label is true and is predicted, [..., labels],
    and how often both are the same, [...]; 0 where there is but one."""
    rows = true.sum(-1)
    spread = (rows**2 - (given**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    return _share(right * rows - (true * given).sum(-1), np.sqrt(spread))
