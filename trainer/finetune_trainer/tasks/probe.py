"""Linear models on frozen features: what the base knows already, and so what tuning must beat."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.order import derive, permute

STRENGTHS = (0.01, 0.001, 0.1, 1.0)
"""Inverse regularisation, on standardised features; the first where too many labels make choosing slow."""
RIDGES = tuple(10.0**power for power in range(-1, 6))
"""Strengths of a ridge regression."""
_MANY = 50
FOLDS = 5
LEAST_ROWS = 50
"""Rows below which nobody should be told that a label is wrong."""
_LEAST = 1e-15


def classify(
    features: NDArray[np.float32], labels: NDArray[Any], answers: NDArray[np.float32], *, count: int, seed: int
) -> NDArray[np.float64]:
    """Probabilities [answers, count] of a logistic regression fitted on `features` and `labels`.

    Labels are numbers below `count` [rows], or multi-hot [rows, count]. The strength of the regularisation is chosen on
    a fifth of the rows held out, because a probe that overfits would flatter the tuned model.
    """
    strength = STRENGTHS[0]
    if np.unique(labels, axis=0).shape[0] <= _MANY:
        place = permute(np.arange(len(labels)), size=len(labels), key=derive(seed, "probe-strength"))
        held, rest = place[: len(place) // 5], place[len(place) // 5 :]
        losses = {
            candidate: float(
                log_loss(_fit(features[rest], labels[rest], features[held], candidate, count), labels[held]).mean()
            )
            for candidate in STRENGTHS
            if len(held)
        }
        strength = min(losses, key=lambda candidate: losses[candidate], default=strength)
    return _fit(features, labels, answers, strength, count)


def label_quality(
    features: NDArray[np.float32], labels: NDArray[Any], *, count: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """How likely each row's label is by a probe that has not seen the row, and the likeliest label: mistakes in the
    labels come first when sorted. The scores are cleanlab's (Northcutt, Jiang and Chuang, 2021), from probabilities
    of FOLDS fits. None where a label has too few rows for that.
    """
    known = np.bincount(labels, minlength=count)
    if (known > 0).sum() < 2 or len(labels) < LEAST_ROWS:
        return None
    from cleanlab.rank import get_label_quality_scores

    fold = permute(np.arange(len(labels)), size=len(labels), key=derive(seed, "folds")) % FOLDS
    shares = np.zeros((len(labels), count))
    for number in range(FOLDS):
        held = fold == number
        shares[held] = _fit(features[~held], labels[~held], features[held], STRENGTHS[0], count)
    present = np.flatnonzero(known)
    place = np.searchsorted(present, labels)
    shares = np.clip(shares[:, present], _LEAST, None)
    shares /= shares.sum(1, keepdims=True)
    scores = get_label_quality_scores(place, shares, method="self_confidence")
    return np.asarray(scores, dtype=np.float64), present[shares.argmax(1)]


def regress(
    features: NDArray[np.float32], values: NDArray[np.float64], answers: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Numbers [answers] of a ridge regression on standardised features, fitted on `features` and `values`.

    Its strength is chosen by leaving out each row in turn, which costs no more than one fit.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=RIDGES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a feature that is always the same
        model.fit(features.astype(np.float64), values)
    return np.asarray(model.predict(answers.astype(np.float64)), dtype=np.float64)


def log_loss(shares: NDArray[np.float64], labels: NDArray[Any]) -> NDArray[np.float64]:
    """The loss of each row: cross entropy, or the sum of binary cross entropies of multi-hot labels."""
    shares = np.clip(shares, _LEAST, 1 - _LEAST)
    if labels.ndim == 2:
        return np.asarray(-np.where(labels, np.log(shares), np.log1p(-shares)).sum(1))
    return np.asarray(-np.log(shares[np.arange(len(labels)), labels]))


def _fit(
    features: NDArray[np.float32], labels: NDArray[Any], answers: NDArray[np.float32], strength: float, count: int
) -> NDArray[np.float64]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shares = np.zeros((len(answers), count))
    if labels.ndim == 1 and labels.min() == labels.max():
        shares[:, labels[0]] = 1.0
        return shares
    regression = LogisticRegression(max_iter=1000, C=strength)
    model = make_pipeline(StandardScaler(), regression if labels.ndim == 1 else OneVsRestClassifier(regression))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label without a row, or a fit cut short, is still a baseline
        model.fit(features, labels)
        found = np.asarray(model.predict_proba(answers), dtype=np.float64)
    shares[:, np.asarray(model.classes_) if labels.ndim == 1 else np.arange(count)] = found
    return shares
