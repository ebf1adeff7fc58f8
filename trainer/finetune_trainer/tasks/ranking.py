"""Which labels are mixed up, how well probabilities rank and how far they can be trusted.

Areas are macro averages over labels, one against the rest, of the labels that some of the rows have and some have not.
For one set of rows scikit-learn finds them. Intervals want them of hundreds of selections of the same rows: scores are
sorted once then, and a selection is a count a row (`Areas`, and drawn.py for other metrics).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
SHOWN_LABELS = 60
"""Labels that a confusion matrix has at most."""
MANY_LABELS = 1000
"""Beyond so many labels probabilities are not kept."""


def areas(hot: NDArray[np.bool_], shares: NDArray[np.floating]) -> dict[str, float]:
    """roc-auc and pr-auc (average precision) of multi-hot labels and probabilities [rows, labels]; none where no label
    can be ranked."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    ranked = _ranked(hot.sum(0), len(hot))
    if not ranked.any():
        return {}
    hot, shares = hot[:, ranked], shares[:, ranked]
    return {
        "roc-auc": float(np.mean([roc_auc_score(a, b) for a, b in zip(hot.T, shares.T, strict=True)])),
        "pr-auc": float(np.mean([average_precision_score(a, b) for a, b in zip(hot.T, shares.T, strict=True)])),
    }


class Areas:
    """The same for many selections of rows at once, each as how often each row is drawn."""

    def __init__(self, hot: NDArray[np.bool_], shares: NDArray[np.floating]) -> None:
        self._hot = hot
        self._orders = np.argsort(-shares, axis=0, kind="stable")
        self._ends = []  # of each run of equal scores, from the highest on
        for label, order in enumerate(self._orders.T):
            score = shares[order, label]
            self._ends.append(np.append(np.flatnonzero(np.diff(score)), len(score) - 1))

    def of(self, drawn: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """`drawn` [selections, rows] says how often each row is in each; [selections], NaN where no label can be
        ranked."""
        weights = drawn.astype(np.float64)
        ranked = _ranked(weights @ self._hot, drawn.sum(1, keepdims=True))
        sums = np.zeros((2, len(drawn)))
        with np.errstate(invalid="ignore", divide="ignore"):  # where a label cannot be ranked, which is left out
            for label in np.flatnonzero(ranked.any(0)):
                sums += np.where(ranked[:, label], self._of_label(int(label), weights), 0.0)
            roc, precision = sums / ranked.sum(1)
        return {"roc-auc": roc, "pr-auc": precision}

    def _of_label(self, label: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Both areas, [2, selections]."""
        order, ends = self._orders[:, label], self._ends[label]
        weights, hot = weights[:, order], self._hot[order, label]
        above = np.cumsum(weights * hot, axis=1)[:, ends]  # rows with the label, down to each score
        beyond = np.cumsum(weights, axis=1)[:, ends] - above
        hits, misses = np.diff(above, prepend=0.0), np.diff(beyond, prepend=0.0)
        roc = (misses * (above - hits / 2)).sum(1) / (above[:, -1] * beyond[:, -1])
        total = above + beyond
        precision = np.divide(above, total, out=np.zeros_like(above), where=total > 0)
        return np.stack([roc, (hits * precision).sum(1) / above[:, -1]])


def _ranked(hot: NDArray[Any], rows: Any) -> NDArray[np.bool_]:
    return np.asarray((hot > 0) & (hot < rows))


def trust(labels: NDArray[np.integer], shares: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For calibration: the bin and the gap (right minus confidence) of each decision, as rows of one column, or of a
    column a label for multi-hot `labels`. Confidence is the probability of what is predicted."""
    wide = np.asarray(shares, dtype=np.float64)
    if labels.ndim == 1:
        confidence = wide.max(1, keepdims=True)
        right = (wide.argmax(1) == labels)[:, None]
    else:
        confidence = np.maximum(wide, 1 - wide)
        right = (wide > 0.5) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return bins, right - confidence


def calibration_error(bins: NDArray[np.int64], gaps: NDArray[np.float64]) -> float:
    """The expected calibration error (Guo et al. 2017): how far confidence is from being right, in 15 equal bins."""
    sums = np.bincount(bins.ravel(), weights=gaps.ravel(), minlength=BINS)
    return float(np.abs(sums).sum() / max(1, gaps.size))


def confusion_matrix(labels: NDArray[Any], answers: NDArray[Any], count: int) -> NDArray[np.int64] | None:
    """[labels, answers]; None where there are too many labels for a person to look at."""
    if count > SHOWN_LABELS:
        return None
    return np.bincount(labels.astype(np.int64) * count + answers, minlength=count * count).reshape(count, count)
