"""Samples -> the encoded store: what models read, in one safetensors file that trainers map into memory (run.py).

Equal input gives an equal file, byte by byte. Memory is bounded: every tensor grows in a scratch file, and the
safetensors file is put together from them in one pass that also takes its digest.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune_api.status import TokenLengths
from finetune_trainer.data.check import Example
from finetune_trainer.data.read import DataError
from finetune_trainer.run import LEFT_OUT, TRAIN
from finetune_trainer.storage.digests import Hasher
from finetune_trainer.tasks.base import MAX_LABEL, Column, Piece, RowError, Task, Tools, encodable

FORMAT = "finetune-encoded-2"
OURS: Mapping[str, Column] = {
    "length": Column("I32"),
    "split": Column("U8"),
    "source": Column("I32"),
    "row": Column("I64"),
}
"""The columns that every store has beside its task's."""
SLICE_VALUES = 100
"""Values of a column of evaluation.slices that are told apart."""
_BATCH_ROWS = 1024
_BATCH_SIZE = 4 * 1024 * 1024
_BLOCK = 1024 * 1024
_CODES = {"I32": ("i", np.int32), "I64": ("q", np.int64), "U8": ("B", np.uint8), "F64": ("d", np.float64)}


@dataclass(frozen=True)
class Encoded:
    """A finished encoded store: where it lies, and what it holds."""

    path: Path
    digest: str
    size: int
    rows: int
    examples_by_split: Mapping[int, int]
    """Rows of the data; some tasks make several rows of the store of one."""
    truncated: int
    dropped: int
    lengths: TokenLengths
    """Tokens a row, before anything is cut; of rows far beyond the limit estimated from their beginning (Text.cut)."""
    tokens: int
    """Tokens of all rows, after any cut."""
    unknown: int
    """Those among them that stand for what the tokenizer does not know."""


class Encoder:
    """Encodes samples in batches and grows the store in scratch files."""

    def __init__(
        self,
        task: Task,
        tools: Tools,
        *,
        scratch: Path,
        sources: Sequence[str],
        problem: Callable[[DataError], None],
        beat: Callable[[int], None] = lambda rows: None,
        slices: Sequence[str] = (),
    ) -> None:
        """`sources` are the URIs by position in the manifest; `problem` takes what is wrong with a row; `beat` is
        called with the number of rows done after every batch; `slices` are columns whose values are kept."""
        self.slices: dict[str, list[str]] = {name: [] for name in slices}
        """The values of those columns, as found so far."""
        self._task = task
        self._tools = tools
        self._scratch = scratch
        self._sources = sources
        self._problem = problem
        self._beat = beat
        self._pending: list[tuple[Example, int, int]] = []
        self._taken = 0
        self._size = 0
        self._lengths: Counter[int] = Counter()
        self._truncated = self._dropped = self._rows = 0
        self._examples_by_split: Counter[int] = Counter()
        kept = {f"slice.{number}": Column("I32") for number in range(len(slices))}
        self._spec = {**task.store, **OURS, **kept}
        self._columns = {name: _Growing(scratch / f"{name}.bin", column.kind) for name, column in self._spec.items()}
        self._offsets = {name: _Growing(scratch / f"{name}.offsets.bin", "I64") for name in self._ragged}
        for offsets in self._offsets.values():
            offsets.extend([0])
        self._ordinals = _Growing(scratch / "ordinals.bin", "I64")
        """Which example a row of the store came from, in the order of `add`."""
        self._unknown = self._tokens = 0

    @property
    def _ragged(self) -> list[str]:
        return [name for name, column in self._spec.items() if column.ragged]

    def add(self, example: Example, *, split: int, source: int) -> None:
        """Take one example; `source` is the position of its file in the manifest."""
        self._pending.append((example, split, source))
        self._size += max(example.size, len(example.sample.content))
        if len(self._pending) >= _BATCH_ROWS or self._size >= _BATCH_SIZE:
            self._flush()

    def finish(self, labels: Sequence[str], *, path: Path, marks: NDArray[np.uint8] | None = None) -> Encoded:
        """Put the store together at `path`. `labels`, in the order of the model's outputs, must cover all rows'.
        `marks` has a number for each example in the order of `add`: those that are not 0 belong to no split."""
        self._flush()
        self._ordinals.close()
        growing = {**self._columns, **{f"{name}.offsets": offsets for name, offsets in self._offsets.items()}}
        for column in growing.values():
            column.close()
        for name, spec in self._spec.items():
            if spec.labels:
                self._renumber(growing[name], labels)
        if marks is not None and marks.any():
            self._leave_out(growing["split"], marks)
        digest, size = _assemble(path, growing)
        for column in (*growing.values(), self._ordinals):
            column.path.unlink()
        return Encoded(
            path=path,
            digest=digest,
            size=size,
            rows=self._rows,
            examples_by_split=self._examples_by_split,
            truncated=self._truncated,
            dropped=self._dropped,
            lengths=self._quantiles(),
            tokens=self._tokens,
            unknown=self._unknown,
        )

    def _leave_out(self, column: "_Growing", marks: NDArray[np.uint8]) -> None:
        """Marked rows stay where they are, so that nothing else moves, but belong to no split."""
        path = column.path.with_suffix(".final")
        self._examples_by_split = Counter()
        before = -1
        with open(path, "wb") as target:
            for block, ordinals in zip(column.blocks(_BLOCK), self._ordinals.blocks(_BLOCK), strict=True):
                split = np.where(marks[ordinals] == 0, block, LEFT_OUT).astype(block.dtype)
                first = np.diff(ordinals, prepend=before) != 0
                before = int(ordinals[-1])
                self._examples_by_split.update(dict(enumerate(np.bincount(split[first]).tolist())))
                target.write(split.tobytes())
        path.replace(column.path)

    def _flush(self) -> None:
        pending, self._pending, self._size = self._pending, [], 0
        if not pending:
            return
        found = self._task.encode([example.sample for example, _, _ in pending], self._tools)
        for (example, split, source), pieces in zip(pending, found, strict=True):
            self._taken += 1
            where = f"{self._sources[source]}:{example.row}"
            if isinstance(pieces, RowError):
                self._problem(DataError("InvalidRow", f"{where}: {pieces}; mend or remove the row."))
                continue
            self._lengths[sum(piece.tokens for piece in pieces)] += 1
            if any(piece.cut for piece in pieces):
                if self._tools.overlong == "Fail":
                    self._problem(self._too_long(where, max(piece.tokens for piece in pieces)))
                    continue
                if self._tools.overlong == "Drop":
                    self._dropped += 1
                    continue
                self._truncated += 1
            self._examples_by_split[split] += 1
            for piece in pieces:
                self._check_tokens(piece, where)
                self._append(example, split, source, piece)
        self._beat(self._rows)

    def _check_tokens(self, piece: Piece, where: str) -> None:
        ids = piece.columns.get("input_ids")
        if ids is None:
            return
        self._tokens += len(ids)
        if self._tools.text and self._tools.text.unknown_id is not None:
            self._unknown += list(ids).count(self._tools.text.unknown_id)
        vocabulary = self._tools.text.vocabulary if self._tools.text else None
        if not len(ids):
            self._problem(DataError("InvalidRow", f"{where}: the text gives no token; mend or remove the row."))
        elif vocabulary is not None and max(ids) >= vocabulary:
            raise DataError(
                "ModelIncomplete",
                f"tokenizer.json has the token {max(ids)} where config.json says vocab_size {vocabulary}: the files "
                "belong to different models; upload those of one.",
            )

    def _append(self, example: Example, split: int, source: int, piece: Piece) -> None:
        self._rows += 1
        self._ordinals.extend([self._taken - 1])
        ours = {"length": piece.length, "split": split, "source": source, "row": example.row}
        for number, (name, values) in enumerate(self.slices.items()):
            ours[f"slice.{number}"] = -1 if split == TRAIN else _numbered(example.values.get(name), values)
        for name, value in (*piece.columns.items(), *ours.items()):
            column = self._columns[name]
            if name in self._offsets:
                column.extend(value)
                self._offsets[name].extend([column.length])
            else:
                column.extend([value])

    def _too_long(self, where: str, length: int) -> DataError:
        limit = self._tools.text.max_length if self._tools.text else 0
        return DataError(
            "RowTooLong",
            f"{where}: the row has about {length} tokens, {limit} are allowed and overlong is Fail; raise "
            "data.maxLength, shorten the row or choose Truncate.",
        )

    def _renumber(self, column: "_Growing", labels: Sequence[str]) -> None:
        """Labels were numbered as they came; now their order is known. Numbers below 0 stay."""
        order = {label: number for number, label in enumerate(labels)}
        final = np.array([order[name] for name in self._tools.numbers] or [0], dtype=np.dtype(column.dtype))
        path = column.path.with_suffix(".final")
        with open(path, "wb") as target:
            for block in column.blocks(1024 * 1024):
                target.write(np.where(block < 0, block, final[np.maximum(block, 0)]).astype(block.dtype).tobytes())
        path.replace(column.path)

    def _quantiles(self) -> TokenLengths:
        total = sum(self._lengths.values())
        ordered = sorted(self._lengths.items())

        def quantile(share: float) -> int:
            seen = 0
            for length, count in ordered:
                seen += count
                if seen >= share * total:
                    return length
            return 0

        longest = ordered[-1][0] if ordered else 0
        return TokenLengths(p50=quantile(0.5), p95=quantile(0.95), p99=quantile(0.99), max=longest)


def _numbered(value: Any, values: list[str]) -> int:
    """The number of a value among those of its column, -1 for none, and for new ones when there are too many."""
    if value is None or isinstance(value, list | dict):
        return -1
    text = str(value).lower() if isinstance(value, bool) else str(value)[:MAX_LABEL]
    if not encodable(text):
        return -1
    if text not in values:
        if len(values) == SLICE_VALUES:
            return -1
        values.append(text)
    return values.index(text)


class _Growing:
    """One tensor in the making: values of one kind in a file, little-endian."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        code, self.dtype = _CODES[kind]
        self._buffer = array(code)
        self.length = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - open as long as the column grows

    def extend(self, values: Sequence[Any]) -> None:
        self.length += len(values)
        if isinstance(values, bytes):
            self._buffer.frombytes(values)
        else:
            self._buffer.extend(values)
        if len(self._buffer) * self._buffer.itemsize >= _BLOCK:
            self._spill()

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def _spill(self) -> None:
        self.write(
            np.frombuffer(self._buffer, dtype=self.dtype).astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
        )
        self._buffer = array(self._buffer.typecode)

    def close(self) -> None:
        if self._buffer:
            self._spill()
        self._file.close()

    def blocks(self, length: int) -> list[NDArray[Any]]:
        """The column in pieces of `length` values, mapped from the file."""
        if not self.path.stat().st_size:
            return []
        whole = np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")
        return [whole[start : start + length] for start in range(0, len(whole), length)]


def _assemble(path: Path, columns: Mapping[str, _Growing]) -> tuple[str, int]:
    """Write the safetensors file; returns its digest and size in bytes. Wide types first, so that all are aligned."""
    width = {"F64": 0, "I64": 0, "I32": 1, "U8": 2}
    names = sorted(columns, key=lambda name: (width[columns[name].kind], name))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    at = 0
    for name in names:
        size = columns[name].path.stat().st_size
        header[name] = {"dtype": columns[name].kind, "shape": [columns[name].length], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher = Hasher()
    with open(path, "wb") as target:
        for data in (len(text).to_bytes(8, "little"), text):
            hasher.update(data)
            target.write(data)
        for name in names:
            with open(columns[name].path, "rb") as source:
                while block := source.read(_BLOCK):
                    hasher.update(block)
                    target.write(block)
    return hasher.digest(), 8 + len(text) + at
