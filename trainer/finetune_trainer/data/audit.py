"""What people should know of their data before they train on it: near-duplicates, personal data, columns, lengths.

Counts over columns and byte lengths are exact. What takes long is looked for in a seeded sample of 20,000 rows, or in
all with `data.audit: Full`; each figure says which, and a sampled one carries a 95 % interval. No content of a row
leaves this module: rows are named by file and number.
"""

import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, exp, floor, log, log1p, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.data.near import NearDuplicates
from finetune_trainer.data.personal import KINDS, suspected
from finetune_trainer.data.split import content_hash

SAMPLE = 20_000
LOCATED = 10
"""Places that are named of one thing."""
COLUMNS = 1000
"""Columns that are looked at; data with more is no table."""
_KEPT = 4096
_EXACT_LENGTHS = 4096
_REMEMBERED = 1024

Place = tuple[int, int]
"""A row: position of its file in the manifest, and its number in the file."""


def wilson(found: int, of: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (1927): within 0 and 1, and right for rare things."""
    if not of:
        return 0.0, 1.0
    share = found / of
    middle = share + z * z / (2 * of)
    spread = z * sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    low = 0.0 if found == 0 else (middle - spread) / scale
    high = 1.0 if found == of else (middle + spread) / scale
    return max(0.0, low), min(1.0, high)


class Reservoir:
    """Which rows of a stream make a sample of `size`, each with the same chance (algorithm L of Li 1994).

    `offer` costs a comparison for nearly all rows.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self._size = size
        self._random = random.Random(seed)
        self._seen = 0
        self._next = size
        self._w = 1.0
        self._skip()

    def offer(self) -> int | None:
        """The place in the sample that the next row takes, or None."""
        number, self._seen = self._seen, self._seen + 1
        if number < self._size:
            return number
        if number < self._next:
            return None
        self._skip()
        return self._random.randrange(self._size)

    def _skip(self) -> None:
        self._w *= exp(log(1.0 - self._random.random()) / self._size)
        gap = log(1.0 - self._random.random()) / log1p(-self._w) if self._w < 1.0 else 0.0
        self._next = max(self._next, self._seen) + floor(gap)


@dataclass
class _Column:
    """What is known of one column. A long first value is remembered by its hash."""

    rows: int = 0
    empty: int = 0
    first: Any = None
    constant: bool = True

    def add(self, value: Any) -> None:
        self.rows += 1
        if value is None or value == "" or value == [] or (isinstance(value, str) and value.isspace()):
            self.empty += 1
        if self.constant:
            mark = _mark(value)
            if self.rows == 1:
                self.first = mark
            elif type(mark) is not type(self.first) or mark != self.first:
                self.constant, self.first = False, None


def _mark(value: Any) -> Any:
    return hash(value) if isinstance(value, str | bytes) and len(value) > _REMEMBERED else value


@dataclass
class _Lengths:
    """Bytes of texts; quantiles above 4,096 are rounded up to 1/64 of the next power of two."""

    counts: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    total: int = 0
    longest: int = 0

    def add(self, size: int) -> None:
        self.rows += 1
        self.total += size
        self.longest = max(self.longest, size)
        if size > _EXACT_LENGTHS:
            grain = 1 << (size.bit_length() - 6)
            size = ceil(size / grain) * grain
        self.counts[size] += 1

    def quantile(self, share: float) -> int:
        seen = 0
        for size, count in sorted(self.counts.items()):
            seen += count
            if seen >= share * self.rows:
                return min(size, self.longest)
        return 0


class Audit:
    """Takes every row once and reports in the end."""

    def __init__(self, *, full: bool, seed: int, scratch: Path, sample: int = SAMPLE) -> None:
        """`full`: look into all rows. `scratch`: a directory for a file of 512 bytes a row looked into."""
        self._full = full
        self._reservoir = Reservoir(sample, seed=seed)
        self._sample: dict[int, tuple[int, Place, str]] = {}
        self._columns: dict[str, _Column] = {}
        self._lengths = _Lengths()
        self._near = NearDuplicates(scratch)
        self._near_places = (array("i"), array("q"))
        self._hashes = array("Q")
        self._personal: dict[str, list[Place]] = {kind: [] for kind in KINDS}
        self._personal_rows: Counter[str] = Counter()
        self._personal_count: Counter[str] = Counter()
        self._looked = 0
        self.rows = 0

    def add(self, place: Place, *, text: str, values: Mapping[str, Any]) -> None:
        """One row; `text` is what the model learns from, "" where that is no text."""
        self.rows += 1
        for name, value in values.items():
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) >= COLUMNS:
                    continue
                column = self._columns[name] = _Column()
            column.add(value)
        if not text:
            return
        self._lengths.add(len(text) if text.isascii() else len(text.encode(errors="replace")))
        if self._full:
            self._look(place, text)
            return
        taken = self._reservoir.offer()
        if taken is not None:
            self._sample[taken] = (self._lengths.rows, place, text[:_KEPT])

    def report(self, sources: Sequence[str]) -> dict[str, Any]:
        """Everything found, as JSON values; `sources` names the files by position. Ends the audit."""
        for _, place, text in sorted(self._sample.values()):
            self._look(place, text)
        self._sample.clear()
        try:
            near, near_places = self._near_duplicates(sources)
        finally:
            self._near.close()
        columns = self._column_report()
        personal = {
            kind: {
                **self._share(self._personal_rows[kind]),
                "count": self._personal_count[kind],
                "where": [_named(place, sources) for place in self._personal[kind]],
            }
            for kind in KINDS
        }
        lengths = self._lengths
        report = {
            "rows": self.rows,
            "lookedInto": self._looked,
            "columns": columns,
            "bytes": {
                "exact": True,
                "mean": round(lengths.total / max(1, lengths.rows), 1),
                "p50": lengths.quantile(0.5),
                "p95": lengths.quantile(0.95),
                "p99": lengths.quantile(0.99),
                "max": lengths.longest,
            },
            "nearDuplicates": {**near, "where": near_places},
            "personalData": personal,
        }
        return {**report, "warnings": _warnings(report)}

    def _look(self, place: Place, text: str) -> None:
        """What takes a millisecond a row."""
        self._looked += 1
        self._near.add(text)
        self._hashes.append(content_hash(text))
        self._near_places[0].append(place[0])
        self._near_places[1].append(place[1])
        for kind, count in suspected(text).items():
            self._personal_rows[kind] += 1
            self._personal_count[kind] += count
            if len(self._personal[kind]) < LOCATED:
                self._personal[kind].append(place)

    def _near_duplicates(self, sources: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Rows that nearly, but not exactly, repeat an earlier one that was looked into."""
        found = self._near.find()
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        firsts = np.unique(hashes, return_index=True)[1]
        found = found[np.isin(found, firsts)]
        places = [(self._near_places[0][row], self._near_places[1][row]) for row in found[:LOCATED]]
        share = self._share(len(found))
        # Of two alike only both in the sample are seen.
        return {**share, "atLeast": not share["exact"]}, [_named(place, sources) for place in places]

    def _share(self, found: int) -> dict[str, Any]:
        exact = self._looked == self._lengths.rows
        low, high = wilson(found, self._looked)
        share = found / max(1, self._looked)
        interval = None if exact else [round(low, 6), round(high, 6)]
        return {"rows": found, "of": self._looked, "share": round(share, 6), "exact": exact, "interval": interval}

    def _column_report(self) -> dict[str, Any]:
        return {
            name: {
                "rows": column.rows,
                "missing": self.rows - column.rows,
                "empty": column.empty,
                "constant": column.constant and self.rows > 1 and column.rows == self.rows,
                "exact": True,
            }
            for name, column in self._columns.items()
        }


def _named(place: Place, sources: Sequence[str]) -> str:
    return f"{sources[place[0]]}:{place[1]}"


def _warnings(report: dict[str, Any]) -> list[str]:
    """Sentences for people, the most important first."""
    found = []
    for kind, figure in report["personalData"].items():
        if figure["rows"]:
            first = ", ".join(figure["where"][:3])
            found.append(f"Suspected {KINDS[kind]} in {_share_words(figure)}, the first at {first}.")
    near = report["nearDuplicates"]
    if near["share"] > 0.01:
        least = "At least " if near["atLeast"] else ""
        words = _share_words(near)
        found.append(f"{least}{words} nearly {'repeats' if near['rows'] == 1 else 'repeat'} the text of another row.")
    columns = report["columns"]
    if empty := [name for name, column in columns.items() if column["empty"] + column["missing"] == report["rows"]]:
        found.append(f"Empty in every row: {_columns(empty)}.")
    if constant := [name for name, column in columns.items() if column["constant"] and name not in empty]:
        found.append(f"The same value in every row: {_columns(constant)}.")
    return [sentence[:1024] for sentence in found]


def _share_words(figure: dict[str, Any]) -> str:
    rows = f"{figure['rows']:,} of {figure['of']:,}"
    if figure["exact"]:
        return f"{rows} rows"
    low, high = (100 * value for value in figure["interval"])
    return f"{rows} sampled rows ({low:.2g} to {high:.2g} % of all)"


def _columns(names: list[str]) -> str:
    shown = ", ".join(repr(name[:64]) for name in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{'the column' if len(names) == 1 else 'the columns'} {shown}{more}"
