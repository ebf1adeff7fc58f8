"""In which order rows are seen: a pure function of (seed, epoch, step).

Nothing is stored and nothing is drawn, so a resumed run, a run on more machines and a person with a question all
compute the same batch. The shuffle is a keyed permutation (a Feistel network with cycle walking, Black and Rogaway
2002), which needs no memory however many rows there are. Rows are shuffled over the whole epoch; within a window of
consecutive batches they are sorted by length, cut into batches, and the batches are shuffled: little padding, and still
each row exactly once an epoch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW = 64
"""Batches that are sorted by length together."""
_ROUNDS = 6
Rows = NDArray[np.int64]


class Lengths(Protocol):
    """Tokens of rows: a numpy array, or anything that is indexed like one."""

    def __getitem__(self, rows: Rows, /) -> NDArray[np.int64]: ...


def derive(*parts: int | str) -> int:
    """A seed of 63 bits for one purpose, named by `parts`, the first of which is the run's seed."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permute(positions: Rows, *, size: int, key: int) -> Rows:
    """Where a keyed permutation of range(size) puts `positions`. O(1) memory in `size`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(derive(key, number)) for number in range(_ROUNDS)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():  # cycle walking: the domain is at most four times `size`
        walking = values[outside]
        left, right = walking >> np.uint64(half), walking & mask
        for number in keys:
            left, right = right, left ^ (_mix(right ^ number) & mask)
        values[outside] = left << np.uint64(half) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Part:
    """Rows `first` to `first + rows - 1`, which come from one source, each seen `weight` times an epoch."""

    first: int
    rows: int
    weight: float = 1.0

    @property
    def copies(self) -> int:
        """How often every row is seen each epoch."""
        return int(self.weight)

    @property
    def chosen(self) -> int:
        """How many rows are seen once more; at least one where otherwise none would be seen."""
        rest = round((self.weight - self.copies) * self.rows)
        return max(rest, min(1, self.rows)) if not self.copies else rest

    @property
    def size(self) -> int:
        """Rows an epoch, the same in every epoch."""
        return self.copies * self.rows + self.chosen


class Mixture:
    """Which rows an epoch is made of, when sources are seen more or less often than others (rehearsal data is one).

    An epoch is a range of virtual rows, part after part. Of a part with the weight w every row comes floor(w) times,
    and a choice of the fraction's rows once more. The choices of consecutive epochs follow each other through one keyed
    permutation of the part: over the epochs each row is seen as often as any other, give or take one. Nothing is
    stored, however many rows there are.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([part.size for part in self.parts])
        self._keys = [derive(seed, "weight", number) for number in range(len(self.parts))]

    @property
    def rows(self) -> int:
        """Rows an epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def resolve(self, epoch: int, virtual: Rows) -> Rows:
        """The rows behind virtual rows of an epoch. With weights of 1 these are themselves."""
        found = np.empty_like(virtual)
        numbers = np.searchsorted(self._ends, virtual, side="right")
        for number in np.unique(numbers):
            part, mine = self.parts[number], numbers == number
            places = virtual[mine] - (self._ends[number] - part.size)
            whole = part.copies * part.rows
            chosen = (epoch * part.chosen + places - whole) % part.rows
            again = permute(chosen, size=part.rows, key=self._keys[number])
            found[mine] = part.first + np.where(places < whole, places % part.rows, again)
        return found


def parts_of(sources: NDArray[np.integer], weights: Mapping[int, float]) -> list[Part]:
    """Parts for rows whose sources are given, equal ones beside each other; a source without a weight has 1."""
    starts = np.flatnonzero(np.diff(sources, prepend=-1))
    ends = np.append(starts, len(sources))[1:]
    return [
        Part(int(start), int(end - start), weights.get(int(sources[start]), 1.0))
        for start, end in zip(starts, ends, strict=True)
    ]


@dataclass(frozen=True)
class Order:
    """The batches of a run over rows 0 to `rows` - 1, whose tokens are counted by `lengths`.

    With a mixture `rows` is its number of rows an epoch, and the batches hold the rows behind them.
    """

    rows: int
    batch_size: int
    seed: int
    lengths: Lengths
    mixture: Mixture | None = None

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.rows / self.batch_size)

    def batch(self, step: int) -> Rows:
        """The rows of a step, counted from 0 over all epochs, shortest first. One batch of an epoch may be short."""
        epoch, number = divmod(step, self.steps_per_epoch)
        window, place = divmod(number, WINDOW)
        batches = _window(self, epoch, window)
        return batches[place]

    # lru_cache compares keys: an order is itself, whatever array it holds.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


@lru_cache(maxsize=2)
def _window(order: Order, epoch: int, window: int) -> list[Rows]:
    """The batches of one window, in the order of their steps."""
    first = window * WINDOW * order.batch_size
    last = min(order.rows, first + WINDOW * order.batch_size)
    rows = permute(np.arange(first, last), size=order.rows, key=derive(order.seed, "rows", epoch))
    if order.mixture is not None:
        rows = order.mixture.resolve(epoch, rows)
    rows = rows[np.argsort(order.lengths[rows], kind="stable")]
    batches = [rows[start : start + order.batch_size] for start in range(0, len(rows), order.batch_size)]
    places = permute(np.arange(len(batches)), size=len(batches), key=derive(order.seed, "batches", epoch, window))
    return [batches[place] for place in places]


def micro_batches(
    groups: Sequence[tuple[Rows, float]], *, size: int, rank: int = 0, ranks: int = 1
) -> list[tuple[int, Rows, float]]:
    """The pieces of a batch that a rank works on, each with its number among all pieces and what goes with its group;
    none for a rank left over. No piece holds rows of two groups."""
    pieces = [(rows[start : start + size], more) for rows, more in groups for start in range(0, len(rows), size)]
    return [(number, *piece) for number, piece in enumerate(pieces)][rank::ranks]


def total_steps(*, rows: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimizer steps of a whole run; exactly one of `epochs` and `max_steps` is given."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return max(1, ceil(round(epochs * ceil(rows / batch_size), 6)))


def evaluation_interval(*, steps_per_epoch: int, steps: int | None, epochs: float | None) -> int:
    """Optimizer steps between two evaluations; exactly one of `steps` and `epochs` is given."""
    if steps is not None:
        return steps
    assert epochs is not None
    return max(1, round(epochs * steps_per_epoch))
