"""Metrics of a model, and of what any model must beat: the most frequent label, and a linear probe.

A new head knows nothing, so the untouched base is no baseline. A linear model on its frozen features is: it tells what
tuning has added to what the base knew already.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.adapt.base import Inputs, InputsOf
from finetune_trainer.course import is_out_of_memory
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows, derive, permute
from finetune_trainer.tasks import Metrics, Task
from finetune_trainer.world import World

CHUNK = 64
"""Rows evaluated together; fixed, so that a loss does not depend on the micro-batch."""
PROBE_ROWS = 5000
STRENGTHS = (0.01, 0.001, 0.1, 1.0)
"""Inverse regularisation of the probe, on standardised features; the first where too many labels make choosing slow."""
_MANY = 50
_LEAST = 1e-15
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """Measures models on rows of the encoded store. Each chunk of rows is worked on by one rank of `world`."""

    task: Task
    encoded: Encoded
    world: World
    autocast: Callable[[], AbstractContextManager[Any]]
    beat: Callable[[], None]

    def measure(self, model: Any, rows: Rows, *, inputs_of: InputsOf) -> Metrics:
        """All metrics on `rows`, the same on every rank. Sets the model to eval mode."""
        model.eval()
        rows = self.longest_first(rows)
        labels = self.encoded.labels(rows)
        predictions = np.zeros_like(labels)
        losses = np.zeros(-(-len(rows) // CHUNK))
        for number, start in enumerate(range(0, len(rows), CHUNK)):
            if number % self.world.size == self.world.rank:
                self.beat()
                chunk = slice(start, start + CHUNK)
                logits, wanted = self._logits(model, rows[chunk], inputs_of)
                losses[number] = float(self.task.loss(logits, wanted)[0])
                predictions[chunk] = self.task.predict(logits, multi_label=labels.ndim == 2)
        self.world.total(torch.from_numpy(losses))
        self.world.total(torch.from_numpy(predictions))
        return self.task.metrics(labels, predictions, loss=float(losses.sum()) / self.task.count(labels))

    def longest_first(self, rows: Rows) -> Rows:
        """Little padding, and too little memory is noticed at once."""
        return rows[np.argsort(-self.encoded.lengths(rows), kind="stable")]

    def _logits(self, model: Any, rows: Rows, inputs_of: InputsOf) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of some rows, in halves where they do not fit into memory."""
        try:
            inputs = inputs_of(rows)
            labels = inputs.pop("labels")
            with torch.no_grad(), self.autocast():
                return model(**inputs).logits, labels
        except (MemoryError, RuntimeError) as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        parts = [self._logits(model, half, inputs_of) for half in np.array_split(rows, 2)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def majority(self, train: Rows, rows: Rows, *, count: int) -> Metrics:
        """Always answering the most frequent of `count` labels."""
        return self.task.majority(self.encoded.labels(train), self.encoded.labels(rows), count=count)

    def probe(self, trunk: Any, train: Rows, rows: Rows, *, inputs_of: InputsOf, seed: int) -> Metrics | None:
        """Logistic regression on the trunk's mean-pooled output, fitted on up to PROBE_ROWS training rows.

        None where those rows all have the same label.
        """
        count = min(PROBE_ROWS, len(train))
        chosen = train[np.sort(permute(np.arange(count), size=len(train), key=derive(seed, "probe")))]
        known, asked = self.longest_first(chosen), self.longest_first(rows)
        labels = self.encoded.labels(known)
        if labels.ndim == 1 and labels.min() == labels.max():
            return None
        trunk.eval()
        features = self._features(trunk, known, inputs_of)
        answers = self._features(trunk, asked, inputs_of)
        wanted = self.encoded.labels(asked)
        predictions, loss = _regress(features, labels, answers, wanted, seed=seed)
        return self.task.metrics(wanted, predictions, loss=loss)

    def _features(self, trunk: Any, rows: Rows, inputs_of: InputsOf) -> NDArray[np.float32]:
        found = []
        for start in range(0, len(rows), CHUNK):
            self.beat()
            inputs = inputs_of(rows[start : start + CHUNK])
            del inputs["labels"]
            with torch.no_grad(), self.autocast():
                found.append(_pooled(trunk(**inputs)[0].float(), inputs).cpu().numpy())
        return np.concatenate(found)


def _pooled(states: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The mean over a row's tokens: [rows, tokens, width] -> [rows, width]."""
    if states.ndim == 2:
        return states
    mask = inputs["attention_mask"][:, : states.shape[1], None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def _regress(
    features: NDArray[np.float32],
    labels: NDArray[Any],
    answers: NDArray[np.float32],
    wanted: NDArray[Any],
    *,
    seed: int,
) -> tuple[NDArray[Any], float]:
    """Predictions for `answers` in the form of `labels`, and their mean loss on `wanted`.

    The strength of the regularisation is chosen on a fifth of the rows held out, because a probe that overfits would
    flatter the tuned model.
    """
    strength = STRENGTHS[0]
    if np.unique(labels, axis=0).shape[0] <= _MANY:
        place = permute(np.arange(len(labels)), size=len(labels), key=derive(seed, "probe-strength"))
        held, rest = place[: len(place) // 5], place[len(place) // 5 :]
        losses = {
            candidate: _loss(*_shares(features[rest], labels[rest], features[held], candidate), labels[held])
            for candidate in STRENGTHS
            if len(held)
        }
        strength = min(losses, key=lambda candidate: losses[candidate], default=strength)
    classes, shares = _shares(features, labels, answers, strength)
    loss = _loss(classes, shares, wanted)
    if labels.ndim == 2:
        return (shares > 0.5).astype(labels.dtype), loss
    return classes[shares.argmax(1)].astype(labels.dtype), loss


def _shares(
    features: NDArray[np.float32], labels: NDArray[Any], answers: NDArray[np.float32], strength: float
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Classes, and the probability of each for each answer, of a regression with that inverse regularisation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if labels.ndim == 1 and labels.min() == labels.max():
        return labels[:1], np.ones((len(answers), 1))
    regression = LogisticRegression(max_iter=1000, C=strength)
    model = make_pipeline(StandardScaler(), regression if labels.ndim == 1 else OneVsRestClassifier(regression))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label without a row, or a fit cut short, is still a baseline
        model.fit(features, labels)
        return np.asarray(model.classes_), np.asarray(model.predict_proba(answers), dtype=np.float64)


def _loss(classes: NDArray[Any], shares: NDArray[np.float64], wanted: NDArray[Any]) -> float:
    shares = np.clip(shares, _LEAST, 1 - _LEAST)
    if wanted.ndim == 2:
        return float(-np.where(wanted, np.log(shares), np.log1p(-shares)).mean())
    hits = wanted[:, None] == classes[None, :]
    return float(-np.log(np.where(hits, shares, 0).sum(1).clip(min=_LEAST)).mean())
