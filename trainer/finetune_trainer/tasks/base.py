"""The protocol of a task."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Labels = str | list[str]
"""Of one row: a label, or the list of its labels where rows have several."""
Metrics = dict[str, float]


class Columns(NamedTuple):
    """Names of the columns in the data."""

    text: str = "text"
    label: str = "label"


class RowError(ValueError):
    """A row cannot be used. The message says what is wrong with which column; the caller adds file and row."""


class Task(Protocol):
    """What a task must know. Arrays of labels are as in the encoded store: int32 [rows] or uint8 [rows, labels]."""

    @property
    def auto_class(self) -> str:
        """Name of the transformers class that loads the published model."""
        ...

    def read_row(self, row: Mapping[str, Any], *, columns: Columns) -> tuple[str, Labels]:
        """Text and normalised label or labels of a row. Raises RowError."""
        ...

    def order_labels(
        self, found: Collection[str], *, wanted: Sequence[str] | None, base: Sequence[str] | None
    ) -> list[str]:
        """The labels in the order of the model's outputs: `wanted`, else those of the base model where they cover
        `found` (its head is kept), else `found` by code point."""
        ...

    def encode_labels(
        self, rows: Sequence[Labels], *, labels: Sequence[str], multi_label: bool
    ) -> NDArray[np.int32] | NDArray[np.uint8]:
        """Labels of rows as an array. Raises RowError for a label outside `labels`."""
        ...

    def model_settings(self, labels: Sequence[str], *, multi_label: bool) -> dict[str, Any]:
        """What the model's config must say: id2label, label2id, problem_type."""
        ...

    def collate(
        self, texts: Sequence[NDArray[np.int32]], labels: NDArray[Any], *, pad_token_id: int
    ) -> dict[str, NDArray[Any]]:
        """One micro-batch: token ids padded on the right to its longest row, int64 [rows, tokens], and labels."""
        ...

    def count(self, labels: NDArray[Any]) -> int:
        """How many labelled positions the rows have: what a mean loss divides by."""
        ...

    def loss(self, logits: Any, labels: Any) -> tuple[Any, int]:
        """Sum of the loss over the labelled positions (a tensor, in at least fp32), and their number."""
        ...

    def predict(self, logits: Any, *, multi_label: bool) -> NDArray[Any]:
        """Decisions, int32 [rows] or uint8 [rows, labels]; logits are never kept."""
        ...

    def metrics(self, labels: NDArray[Any], predictions: NDArray[Any], *, loss: float | None) -> Metrics:
        """All metrics of the task; `loss` is a mean over labelled positions."""
        ...

    def majority(self, train: NDArray[Any], labels: NDArray[Any], *, count: int) -> Metrics:
        """Metrics on `labels` of always answering what is most frequent in `train`."""
        ...

    def higher_is_better(self, metric: str) -> bool:
        """The direction of a metric."""
        ...
