"""What all readers share: the row, the error, the limits, and what they know of the file they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
ROW_LIMIT = 64 * MIB
"""Bytes one row may have."""


class DataError(Exception):
    """The data is wrong: exit code 42. `reason` is PascalCase; the message names the file, the place and the remedy."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    `number` is the 1-based line where it starts (text formats), or the 1-based row (tables), sample (tar) or file
    (folder). `name` is what the file itself calls it, where it does: a tar's sample, a folder's file.
    """

    number: int
    values: dict[str, Any]
    name: str = ""


@dataclass
class File:
    """One object in the reading: what is wanted of it, and what was found."""

    uri: str
    wanted: Sequence[str]
    scratch: Path
    columns: list[str] = field(default_factory=list)
    """Names of the columns: the header, or the keys of the first row."""

    def invalid(self, said: str) -> DataError:
        """The file as a whole is wrong."""
        return DataError("InvalidFile", f"{self.uri}: {said}")

    def bad_row(self, number: int | str, said: str) -> DataError:
        """One row is wrong; `number` may say more than its number, such as 17:3 for a column of the line."""
        return DataError("InvalidRow", f"{self.uri}:{number}: {said}")

    def empty(self) -> DataError:
        return DataError("EmptyData", f"{self.uri}: the file is empty; give it at least one row.")

    def too_long(self, number: int) -> DataError:
        return self.bad_row(number, f"the row is longer than {ROW_LIMIT // MIB} MiB; split it.")


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first names, quoted, and how many more there are."""
    shown = ", ".join(repr(name)[:80] for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def weight(values: Mapping[str, Any]) -> int:
    """About the bytes that a row's cells take: text, bytes and what lies one level deeper."""
    total = 0
    for value in values.values():
        cells = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
        total += sum(len(cell) if isinstance(cell, str | bytes) else 8 for cell in cells)
    return total
