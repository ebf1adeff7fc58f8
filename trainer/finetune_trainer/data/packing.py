"""Several rows in one sequence: which ones share it, a pure function of their lengths.

Best-fit decreasing over the histogram of lengths (after Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination"): from the longest to the shortest, rows go to where they leave the least room. Packs of equal make
are handled together, so the work grows with the number of different lengths and not with that of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.order import Rows


@dataclass(frozen=True)
class Packs:
    """Packs 0 to n - 1."""

    rows: Rows
    """The rows of all packs, one pack behind the other."""
    offsets: NDArray[np.int64]
    """[packs + 1]; pack i has rows[offsets[i]:offsets[i + 1]]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> Rows:
        return self.rows[self.offsets[pack] : self.offsets[pack + 1]]

    def of(self, packs: Rows) -> list[Rows]:
        """The rows of each of some packs."""
        return [self[int(pack)] for pack in packs]

    def lengths(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each pack, from those of `rows`, in the order of the numbers in it."""
        return np.add.reduceat(lengths, self.offsets[:-1])


def joined(parts: Sequence[Packs]) -> Packs:
    """The packs of several parts, one part behind the other."""
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Packs(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]).astype(np.int64),
    )


class _Make(NamedTuple):
    """How many rows of which lengths are in each of so many packs."""

    parts: tuple[tuple[int, int], ...]
    packs: int


def pack(rows: Rows, lengths: NDArray[np.int64], *, limit: int) -> Packs:
    """Every row in exactly one pack, none longer than `limit`; `lengths` are those of `rows`, 1 to `limit` each."""
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= limit:
        raise ValueError(f"rows of {lengths.min()} to {lengths.max()} tokens do not fit into {limit}")
    found, counts = np.unique(lengths, return_counts=True)
    makes = _makes({int(n): int(c) for n, c in zip(found, counts, strict=True)}, limit=limit)
    order = np.argsort(lengths, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    waiting = {int(n): rows[order[starts[i] : starts[i + 1]]] for i, n in enumerate(found)}
    blocks: list[Rows] = []
    sizes: list[NDArray[np.int64]] = []
    for parts, number in makes:
        columns = []
        for length, copies in parts:
            columns.append(waiting[length][: number * copies].reshape(number, copies))
            waiting[length] = waiting[length][number * copies :]
        block = np.concatenate(columns, axis=1)
        blocks.append(block.reshape(-1))
        sizes.append(np.full(number, block.shape[1], dtype=np.int64))
    if not blocks:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    return Packs(np.concatenate(blocks), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64))


def _makes(counts: dict[int, int], *, limit: int) -> list[_Make]:
    """What packs are made of, from the number of rows of each length."""
    by_room: dict[int, list[_Make]] = {}
    for length in sorted(counts, reverse=True):
        left = counts[length]
        for room in sorted(room for room in by_room if room >= length):
            left = _fill(by_room, room, length=length, left=left)
            if not left:
                break
        copies = limit // length
        for fit, number in ((copies, left // copies), (left % copies, 1)):
            if fit and number:
                by_room.setdefault(limit - fit * length, []).append(_Make(((length, fit),), number))
    return [make for room in sorted(by_room) for make in by_room[room]]


def _fill(by_room: dict[int, list[_Make]], room: int, *, length: int, left: int) -> int:
    """Put rows of a length into packs that have so much room; returns how many are left."""
    fit = room // length
    makes, by_room[room] = by_room[room], []
    for make in makes:
        full = min(make.packs, left // fit)
        over = left - full * fit if full < make.packs else 0  # fewer than fit: one more pack takes them
        for copies, number in ((fit, full), (over, 1 if over else 0)):
            if number:
                part = _Make((*make.parts, (length, copies)), number)
                by_room.setdefault(room - copies * length, []).append(part)
        left -= full * fit + over
        rest = make.packs - full - (1 if over else 0)
        if rest:
            by_room[room].append(_Make(make.parts, rest))
    if not by_room[room]:
        del by_room[room]
    return left


def positions_of(lengths: Sequence[int], *, width: int) -> NDArray[np.int64]:
    """Positions in a sequence of rows of those lengths: each counts from 0, and so does the padding up to `width`."""
    counted = [*lengths, width - sum(lengths)]
    return np.concatenate([np.arange(length) for length in counted])
