"""Losses over labels: cross entropy and its binary form, focal, smoothed, and weighted by class.

Written with tensor methods, for tensors of any type and on any device. Each is torch's own where torch has it:
`cross_entropy` with `weight` and `label_smoothing`, `binary_cross_entropy_with_logits` with `pos_weight`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.contract import TrainingConfig
from finetune_trainer.tasks.base import Facts

WEIGHTS = "classWeights"
"""Name among a run's facts."""
_LEAST = 1e-15


@dataclass(frozen=True)
class ClassLoss:
    """The loss that a document asks for."""

    gamma: float | None = None
    """Of the focal loss (Lin et al. 2017): labels that are learned already count less, by (1 - p)^gamma."""
    smoothing: float = 0.0
    """Share of a label that is spread evenly over all labels (Szegedy et al. 2016)."""
    weights: tuple[float, ...] | None = None
    """By label: the weight of its rows; where a row may have several, that of its presence against its absence."""

    @classmethod
    def of(cls, config: TrainingConfig, facts: Facts) -> "ClassLoss":
        weights = facts.more.get(WEIGHTS)
        gamma = config.focal_gamma if config.loss == "focal" else None
        return cls(gamma, config.label_smoothing, tuple(weights) if weights else None)

    @property
    def plain(self) -> bool:
        """Whether it is the log loss."""
        return self == ClassLoss()

    def one(self, logits: Any, labels: Any) -> Any:
        """Losses [...] of labels [...], from logits [..., labels] in at least fp32. A mean divides by `shares`."""
        shares = _at_least_single(logits).log_softmax(-1)
        own = shares.gather(-1, labels[..., None])[..., 0]
        losses = -own
        if self.gamma is not None:
            losses = losses * (1 - own.exp()) ** self.gamma
        if self.weights is not None:
            weights = shares.new_tensor(self.weights)
            losses, shares = losses * weights[labels], shares * weights
        if self.smoothing:
            losses = (1 - self.smoothing) * losses - self.smoothing * shares.mean(-1)
        return losses

    def several(self, logits: Any, labels: Any) -> Any:
        """Losses [..., labels] of multi-hot labels of that shape. A mean divides by their number."""
        logits = _at_least_single(logits)
        zero = logits.new_zeros(())
        absent = logits.logaddexp(zero)  # softplus(x), the loss where there is no label
        if self.plain:
            return absent - logits * labels
        present = (-logits).logaddexp(zero)
        hot, cold = labels, 1 - labels
        if self.smoothing:
            hot, cold = (side * (1 - self.smoothing) + self.smoothing / 2 for side in (hot, cold))
        if self.weights is not None:
            hot = hot * logits.new_tensor(self.weights)
        if self.gamma is not None:
            hot, cold = hot * (-self.gamma * absent).exp(), cold * (-self.gamma * present).exp()
        return hot * present + cold * absent

    def of_shares(self, shares: NDArray[np.float64], labels: NDArray[Any]) -> NDArray[np.float64]:
        """`one` of labels [rows] from probabilities [rows, labels], for answers that no model gives."""
        logs = np.log(np.clip(shares, _LEAST, 1.0))
        own = logs[np.arange(len(labels)), labels]
        losses = -own if self.gamma is None else -own * (1 - np.exp(own)) ** self.gamma
        losses = losses * self.shares(labels)
        spread = logs.mean(1) if self.weights is None else (logs * self.weights).mean(1)
        return np.asarray((1 - self.smoothing) * losses - self.smoothing * spread)

    def of_chances(self, chances: NDArray[np.float64], labels: NDArray[Any]) -> NDArray[np.float64]:
        """`several` of multi-hot labels from independent probabilities, both [rows, labels]."""
        chances = np.clip(chances, _LEAST, 1 - _LEAST)
        hot = labels * (1 - self.smoothing) + self.smoothing / 2
        present, absent = -np.log(chances) * (self.weights or 1.0), -np.log1p(-chances)
        if self.gamma is not None:
            present, absent = present * (1 - chances) ** self.gamma, absent * chances**self.gamma
        return np.asarray(hot * present + (1 - hot) * absent)

    def shares(self, labels: NDArray[Any]) -> NDArray[np.float64]:
        """What each of `labels` counts in a mean of `one`."""
        return np.ones(labels.shape) if self.weights is None else np.array(self.weights)[labels]


def balanced(counts: NDArray[Any]) -> list[float]:
    """Weights in which each label that occurs counts the same, however often it does; their mean over all rows is 1."""
    occurs = counts > 0
    return [float(weight) for weight in np.where(occurs, counts.sum() / (occurs.sum() * np.maximum(counts, 1)), 1.0)]


def balanced_presence(counts: NDArray[Any], *, rows: int) -> list[float]:
    """Weights in which a label's presence counts as much as its absence, where both occur in the rows."""
    both = (counts > 0) & (counts < rows)
    return [float(weight) for weight in np.where(both, (rows - counts) / np.maximum(counts, 1), 1.0)]


def _at_least_single(logits: Any) -> Any:
    return logits.float() if logits.element_size() < 4 else logits
