"""Rows that repeat others, over all files: counted exactly, and taken out of training where that is asked for.

Rows are compared by 64 bits of a hash of their normalised content; what is equal there is confirmed by 64 bits of
another hash, so that no two rows are taken for equal by chance. The hashes lie in scratch files, 37 bytes a row, and
are compared in parts of about two million rows at most: memory grows by one byte a row.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.run import TEST, TRAIN, VALIDATION

PART = 1 << 21
_BUFFER = 1 << 16
_SHOWN = 5
_KINDS: dict[str, tuple[str, Any]] = {
    "content": ("Q", np.uint64),
    "check": ("Q", np.uint64),
    "answer": ("Q", np.uint64),
    "row": ("q", np.int64),
    "source": ("i", np.int32),
    "split": ("B", np.uint8),
}


class Mark(IntEnum):
    """Why a training row is not trained on."""

    KEPT = 0
    DUPLICATE = 1
    """Content and answer are those of an earlier training row."""
    NEAR = 2
    """Its text nearly repeats an earlier one."""
    VALIDATION = 3
    """Its content is among the validation rows."""
    TEST = 4
    """Its content is among the test rows, and not among the validation rows."""


Marks = NDArray[np.uint8]


@dataclass(frozen=True)
class Repeated:
    """What was found. Rows are counted by their content, whatever their answer, unless it says otherwise."""

    duplicates: int
    """Rows that repeat an earlier one's content."""
    conflicts: int
    """Answers in excess of one for each content."""
    validation_in_train: int
    """Validation rows whose content is among the training rows."""
    test_in_train: int
    marks: Marks
    """A Mark a row, in the order of `add`: what could be dropped; near-duplicates are not among it."""
    examples: tuple[tuple[int, int], ...]
    """Numbers of the first training rows of the marks VALIDATION and TEST, and of a row whose content they have."""

    def document(self) -> dict[str, int]:
        """The counts, for the report."""
        return {
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "validationInTrain": self.validation_in_train,
            "testInTrain": self.test_in_train,
        }


class Contents:
    """Takes the hashes of every row, in order, and says in the end which rows repeat others."""

    def __init__(self, scratch: Path) -> None:
        self._columns = {name: _Column(scratch / f"contents-{name}.bin", *kind) for name, kind in _KINDS.items()}
        self.count = 0

    def add(self, *, content: int, check: int, answer: int, place: tuple[int, int], split: int) -> None:
        """One row: two hashes of its content, one of its answer, its file and number, and its side of the split."""
        columns = self._columns
        columns["content"].append(content)
        columns["check"].append(check)
        columns["answer"].append(answer)
        columns["source"].append(place[0])
        columns["row"].append(place[1])
        columns["split"].append(split)
        self.count += 1

    def find(self, *, part: int = PART) -> Repeated:
        """Compare all rows, `part` of them at a time (about, and in the mean)."""
        marks = np.zeros(self.count, dtype=np.uint8)
        counts = np.zeros(4, dtype=np.int64)
        examples: list[tuple[int, int]] = []
        bits = max(0, (self.count // part).bit_length())
        for number in range(1 << bits):
            rows = self._part(bits, number)
            found = self._loaded(rows)
            counts += _counts(found)
            _mark(found, rows, marks, examples)
        duplicates, conflicts, validation, test = map(int, counts)
        return Repeated(duplicates, conflicts, validation, test, marks, tuple(sorted(examples)[:_SHOWN]))

    def leaked(self, marks: Marks) -> list[int]:
        """Contents of the training rows that are left out because of the test rows alone, in ascending order."""
        found: list[int] = []
        for start, block in self._columns["content"].blocks():
            found += block[marks[start : start + len(block)] == Mark.TEST].tolist()
        return sorted(set(found))

    def place(self, number: int, sources: Sequence[str]) -> str:
        """File and row of the row with that number; `sources` names the files."""
        source, row = (int(self._columns[name].take(np.array([number]))[0]) for name in ("source", "row"))
        return f"{sources[source]}:{row}"

    def close(self) -> None:
        for column in self._columns.values():
            column.close()

    def _part(self, bits: int, number: int) -> NDArray[np.int64]:
        """Numbers of the rows whose content begins with these bits."""
        if not bits:
            return np.arange(self.count)
        shift = np.uint64(64 - bits)
        blocks = self._columns["content"].blocks()
        return np.concatenate([start + np.flatnonzero(block >> shift == number) for start, block in blocks])

    def _loaded(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {name: self._columns[name].take(rows) for name in ("content", "check", "answer", "split")}


def _counts(found: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Duplicates, conflicts, validation rows and test rows in train, of one part."""
    groups, answers = _groups(found["content"], found["check"]), found["answer"]
    kinds = int(groups.max(initial=-1)) + 1
    pairs = int(_groups(groups.astype(np.uint64), answers).max(initial=-1)) + 1
    trained = np.zeros(kinds, dtype=bool)
    trained[groups[found["split"] == TRAIN]] = True
    sides = [int(trained[groups[found["split"] == split]].sum()) for split in (VALIDATION, TEST)]
    return np.array([len(groups) - kinds, pairs - kinds, *sides])


def _mark(
    found: dict[str, NDArray[Any]], rows: NDArray[np.int64], marks: Marks, examples: list[tuple[int, int]]
) -> None:
    """Mark the training rows of one part that could be dropped."""
    split = found["split"]
    groups = _groups(found["content"], found["check"])
    pairs = _groups(groups.astype(np.uint64), found["answer"])
    training = np.flatnonzero(split == TRAIN)
    firsts = training[np.unique(pairs[training], return_index=True)[1]]
    later = np.setdiff1d(training, firsts, assume_unique=True)
    marks[rows[later]] = Mark.DUPLICATE
    for side, mark in ((TEST, Mark.TEST), (VALIDATION, Mark.VALIDATION)):
        held = np.flatnonzero(split == side)
        names, where = np.unique(groups[held], return_index=True)
        leaked = training[np.isin(groups[training], names)]
        marks[rows[leaked]] = mark
        twins = held[where[np.searchsorted(names, groups[leaked[:_SHOWN]])]] if len(held) else held
        examples += zip(rows[leaked[:_SHOWN]].tolist(), rows[twins].tolist(), strict=True)


def _groups(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A number from 0 for each different pair."""
    order = np.lexsort((low, high))
    new = np.zeros(len(order), dtype=np.int64)
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = np.cumsum(new)
    return groups


class _Column:
    """Values of one kind, growing in a file."""

    def __init__(self, path: Path, code: str, kind: Any) -> None:
        self._path, self._kind = path, np.dtype(kind)
        self._buffer = array(code)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - open as long as rows come

    def append(self, value: int) -> None:
        self._buffer.append(value)
        if len(self._buffer) >= _BUFFER:
            self._spill()

    def _spill(self) -> None:
        self._file.write(self._buffer.tobytes())
        del self._buffer[:]

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Pieces of the column with the number of their first row; what is read is not kept."""
        self._spill()
        self._file.flush()
        start = 0
        with open(self._path, "rb") as source:
            while data := source.read(self._kind.itemsize * PART // 4):
                block = np.frombuffer(data, self._kind)
                yield start, block
                start += len(block)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The values of rows, whose numbers ascend."""
        found = np.empty(len(rows), self._kind)
        for start, block in self.blocks():
            first, last = np.searchsorted(rows, (start, start + len(block)))
            found[first:last] = block[rows[first:last] - start]
        return found

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
