"""The encoded store, memory-mapped: what models read of each row, nothing read before it is needed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.order import Rows

FORMAT = "finetune-encoded-2"
_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
_OFFSETS = ".offsets"


class EncodedError(ValueError):
    """The file is no encoded store of this version."""


class Encoded:
    """One encoded store (layout: run.py). Raises EncodedError when the file is something else."""

    def __init__(self, path: Path) -> None:
        self._tensors = _mapped(path)
        if missing := {"length", "split", "source", "row"} - self._tensors.keys():
            raise EncodedError(f"{path.name} holds no tensor {min(missing)}: encode the data again")

    def has(self, name: str) -> bool:
        """Whether the store has a column."""
        return name in self._tensors

    @property
    def size(self) -> int:
        """How many rows there are, of all splits."""
        return len(self._tensors["split"])

    def rows(self, split: int) -> Rows:
        """Numbers of the rows of a split, in order."""
        return np.flatnonzero(self._tensors["split"] == split)

    def lengths(self, rows: Rows) -> NDArray[np.int64]:
        """Tokens of each row, or whatever it costs."""
        return np.asarray(self._tensors["length"][rows], dtype=np.int64)

    def each(self, name: str, rows: Rows) -> list[NDArray[Any]]:
        """The values of each row in a ragged column."""
        values, offsets = self._tensors[name], self._tensors[name + _OFFSETS]
        return [values[offsets[row] : offsets[row + 1]] for row in rows]

    def sizes(self, name: str, rows: Rows) -> NDArray[np.int64]:
        """How many values each row has in a ragged column."""
        offsets = self._tensors[name + _OFFSETS]
        return np.asarray(offsets[rows + 1] - offsets[rows])

    def values(self, name: str, rows: Rows) -> NDArray[Any]:
        """The value of each row in a column of one value a row; `source` and `row` say where in the data it was."""
        return np.asarray(self._tensors[name][rows])


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
