"""The encoded store, memory-mapped: rows of token ids and labels, nothing read before it is needed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.order import Rows

FORMAT = "finetune-encoded-1"
_TYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}


class EncodedError(ValueError):
    """The file is no encoded store of this version."""


class Encoded:
    """One encoded store (layout: run.py). Raises EncodedError when the file is something else."""

    def __init__(self, path: Path) -> None:
        tensors = _mapped(path)
        try:
            self._ids = tensors["input_ids"]
            self._offsets = tensors["offsets"]
            self._labels = tensors["labels"]
            self._split = tensors["split"]
        except KeyError as error:
            raise EncodedError(f"{path.name} holds no tensor {error}: encode the data again") from None

    def rows(self, split: int) -> Rows:
        """Numbers of the rows of a split, in order."""
        return np.flatnonzero(self._split == split)

    def lengths(self, rows: Rows) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.asarray(self._offsets[rows + 1] - self._offsets[rows])

    def texts(self, rows: Rows) -> list[NDArray[np.int32]]:
        """Token ids of each row, special tokens included."""
        return [self._ids[self._offsets[row] : self._offsets[row + 1]] for row in rows]

    def labels(self, rows: Rows) -> NDArray[Any]:
        """Labels as stored: int32 [rows] or uint8 [rows, labels]."""
        return np.asarray(self._labels[rows])


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file as read-only memory maps: the library's numpy reader copies them whole."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = {}
        try:
            header = json.loads(file.read(size))
            found = header.pop("__metadata__", {}).get("format")
        except (ValueError, AttributeError):
            found = None
    if found != FORMAT:
        raise EncodedError(f"{path.name} has format {found}, this version reads {FORMAT}: encode the data again")
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        kind, shape, (start, _) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        empty = 0 in shape  # what is empty cannot be mapped
        tensors[name] = (
            np.zeros(shape, kind) if empty else np.memmap(path, kind, "r", offset=8 + size + start, shape=shape)
        )
    return tensors
