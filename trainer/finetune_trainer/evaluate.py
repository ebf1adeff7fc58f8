"""Metrics of a model, and of what any model must beat: the most frequent label, and a linear probe.

A new head knows nothing, so the untouched base is no baseline. A linear model on its frozen features is: it tells what
tuning has added to what the base knew already.
"""

import logging
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
        predictions, loss = _regress(features, labels, answers, wanted)
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
    features: NDArray[np.float32], labels: NDArray[Any], answers: NDArray[np.float32], wanted: NDArray[Any]
) -> tuple[NDArray[Any], float]:
    """Predictions for `answers` in the form of `labels`, and their mean loss on `wanted`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    single = labels.ndim == 1
    regression = LogisticRegression(max_iter=1000)
    model = make_pipeline(StandardScaler(), regression if single else OneVsRestClassifier(regression))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label without a row, or a fit cut short, is still a baseline
        model.fit(features, labels)
        shares = np.asarray(model.predict_proba(answers), dtype=np.float64)
    shares = np.clip(shares, 1e-15, 1 - 1e-15)
    if not single:
        loss = -np.where(wanted, np.log(shares), np.log1p(-shares)).mean()
        return (shares > 0.5).astype(labels.dtype), float(loss)
    classes = np.asarray(model.classes_)
    hits = wanted[:, None] == classes[None, :]
    chosen = np.where(hits.any(1), np.where(hits, shares, 0).sum(1), 1e-15)
    return classes[shares.argmax(1)].astype(labels.dtype), float(-np.log(chosen).mean())
