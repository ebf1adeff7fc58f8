"""Text classification: one label a row, or a list of labels a row."""

from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.tasks.base import Columns, Labels, Metrics, RowError

MAX_LABEL = 256
_SHOWN = 12


class TextClassification:
    """Single-label (cross entropy) and multi-label (binary cross entropy) classification."""

    auto_class = "AutoModelForSequenceClassification"

    def read_row(self, row: Mapping[str, Any], *, columns: Columns) -> tuple[str, Labels]:
        for name in columns:
            if name not in row:
                raise RowError(f"the column {name!r} is missing; columns found: {_listed(row)}")
        text = row[columns.text]
        if not isinstance(text, str):
            raise RowError(f"the column {columns.text!r} must hold text, found {_kind(text)}")
        value = row[columns.label]
        if hasattr(value, "tolist"):  # numpy arrays and scalars, as parquet readers give them
            value = value.tolist()
        if isinstance(value, list | tuple):
            return text, list(dict.fromkeys(_label(item, columns.label) for item in value))
        return text, _label(value, columns.label)

    def order_labels(
        self, found: Collection[str], *, wanted: Sequence[str] | None, base: Sequence[str] | None
    ) -> list[str]:
        if wanted is not None:
            return list(wanted)
        if base is not None and set(found) <= set(base):
            return list(base)
        return sorted(set(found))

    def encode_labels(
        self, rows: Sequence[Labels], *, labels: Sequence[str], multi_label: bool
    ) -> NDArray[np.int32] | NDArray[np.uint8]:
        index = {label: number for number, label in enumerate(labels)}
        try:
            if not multi_label:
                return np.array([index[_single(row)] for row in rows], dtype=np.int32)
            hot = np.zeros((len(rows), len(labels)), dtype=np.uint8)
            for number, row in enumerate(rows):
                for label in _several(row):
                    hot[number, index[label]] = 1
        except KeyError as error:
            raise RowError(f"the label {error.args[0]!r} is not among the labels {_listed(labels)}") from None
        return hot

    def model_settings(self, labels: Sequence[str], *, multi_label: bool) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
        }

    def collate(
        self, texts: Sequence[NDArray[np.int32]], labels: NDArray[Any], *, pad_token_id: int
    ) -> dict[str, NDArray[Any]]:
        longest = max(len(text) for text in texts)
        ids = np.full((len(texts), longest), pad_token_id, dtype=np.int64)
        mask = np.zeros((len(texts), longest), dtype=np.int64)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = text
            mask[number, : len(text)] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels.astype(np.int64 if labels.ndim == 1 else np.float32),
        }

    def count(self, labels: NDArray[Any]) -> int:
        return labels.size

    def loss(self, logits: Any, labels: Any) -> tuple[Any, int]:
        if logits.element_size() < 4:
            logits = logits.float()
        if labels.ndim == 1:
            losses = -logits.log_softmax(-1).gather(-1, labels[:, None])
        else:  # softplus(x) - x y
            losses = logits.logaddexp(logits.new_zeros(())) - logits * labels
        return losses.sum(), labels.numel()

    def predict(self, logits: Any, *, multi_label: bool) -> NDArray[Any]:
        if multi_label:
            return np.asarray((logits > 0).cpu().numpy(), dtype=np.uint8)
        return np.asarray(logits.argmax(-1).cpu().numpy(), dtype=np.int32)

    def metrics(self, labels: NDArray[Any], predictions: NDArray[Any], *, loss: float | None) -> Metrics:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        def averaged(average: str) -> tuple[float, float, float]:
            precision, recall, f1, _ = precision_recall_fscore_support(
                labels, predictions, average=average, zero_division=0
            )
            return float(precision), float(recall), float(f1)

        precision, recall, f1 = averaged("macro")
        found = {
            "accuracy": float(accuracy_score(labels, predictions)),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1-micro": averaged("micro")[2],
            "f1-weighted": averaged("weighted")[2],
        }
        return found if loss is None else {**found, "loss": loss}

    def majority(self, train: NDArray[Any], labels: NDArray[Any], *, count: int) -> Metrics:
        """The loss is that of answering with the shares of the labels in `train`; `count` is the number of labels."""
        if labels.ndim == 1:
            seen = np.bincount(train, minlength=count)
            share = (seen + 1) / (
                seen.sum() + count
            )  # plus one: a label that is new in `labels` costs, but not infinitely
            loss = float(-np.log(share)[labels].mean())
            return self.metrics(labels, np.full_like(labels, seen.argmax()), loss=loss)
        share = (train.sum(0, dtype=np.int64) + 1) / (len(train) + 2)
        loss = float(-np.where(labels, np.log(share), np.log1p(-share)).mean())
        return self.metrics(labels, np.broadcast_to(share > 0.5, labels.shape).astype(np.uint8), loss=loss)

    def higher_is_better(self, metric: str) -> bool:
        return metric != "loss"


def _label(value: Any, column: str) -> str:
    """A label is text, a whole number in decimal, or true/false."""
    label: str | None = None
    if isinstance(value, bool):
        label = "true" if value else "false"
    elif isinstance(value, str):
        label = value
    elif isinstance(value, int):
        label = str(value)
    elif isinstance(value, float | Decimal) and isfinite(value) and value == int(value):
        label = str(int(value))
    if label is None:
        raise RowError(
            f"the column {column!r} must hold a label (text, a whole number, true or false), or a list of them, "
            f"found {_kind(value)}"
        )
    if not label or len(label) > MAX_LABEL:
        raise RowError(f"the column {column!r} holds a label of {len(label)} characters; 1 to {MAX_LABEL} are allowed")
    return label


def _single(row: Labels) -> str:
    if isinstance(row, str):
        return row
    raise RowError("the row has a list of labels where other rows have a single label; use lists in all rows or none")


def _several(row: Labels) -> list[str]:
    if isinstance(row, str):
        raise RowError("the row has a single label where other rows have a list; use lists in all rows or none")
    return row


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float | Decimal):
        return f"the number {value}"
    return {"str": "text", "list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)


def _listed(names: Collection[str]) -> str:
    shown = [str(name) for name in names][:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "none"
