"""Comma- and tab-separated values as RFC 4180 says, with a header."""

import csv
from collections.abc import Iterator

from .base import MIB, ROW_LIMIT, DataError, File, Row, some
from .lines import Line


def rows(source: Iterator[Line], file: File, *, kind: str) -> Iterator[Row | DataError]:
    """A row a record, numbered by the line where it starts; `kind` is csv or tsv. Values are text."""
    csv.field_size_limit(ROW_LIMIT)
    feed = _Lines(source)
    reader = csv.reader(feed, delimiter="\t" if kind == "tsv" else ",", strict=True)
    while True:
        feed.begin()
        start = feed.number + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            hint = "a quotation mark opens here and is not closed" if feed.number > start else str(error)
            problem = file.bad_row(start, f"not {kind} ({hint}); quote fields as RFC 4180 says.")
            if not file.columns:
                raise problem from error
            yield problem
            continue
        if fields is None:
            return
        if feed.error is not None:
            if not file.columns:
                raise feed.error
            yield feed.error
        elif not file.columns:
            file.columns = _header(fields, start, file, kind)
        elif fields:
            yield _record(fields, start, file)


def _header(fields: list[str], line: int, file: File, kind: str) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        said = f"the header names {some(twice)} twice; name each column once."
        raise DataError("InvalidFile", f"{file.uri}:{line}: {said}")
    foreign = next((mark for mark in ";\t|," if len(fields) == 1 and mark in fields[0]), None)
    if foreign:
        name = "a tab" if foreign == "\t" else repr(foreign)
        wanted = "tabs" if kind == "tsv" else "commas"
        said = f"the header has one column, whose name holds {name}; separate fields by {wanted}."
        raise DataError("InvalidFile", f"{file.uri}:{line}: {said}")
    return fields


def _record(fields: list[str], line: int, file: File) -> Row | DataError:
    if len(fields) != len(file.columns):
        return file.bad_row(
            line,
            f"the row has {len(fields)} fields where the header has {len(file.columns)}; "
            "quote fields that hold separators or line breaks.",
        )
    return Row(line, dict(zip(file.columns, fields, strict=True)))


class _Lines:
    """Feeds the csv reader, which asks for as many lines as a record has, and notes what was wrong with one of them."""

    def __init__(self, source: Iterator[Line]) -> None:
        self._source = source
        self._size = 0
        self.number = 0
        self.error: DataError | None = None

    def begin(self) -> None:
        self._size, self.error = 0, None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._source)
        if isinstance(line, DataError):
            self.error = self.error or line
            return "\n"
        self._size += len(line)
        if self._size > ROW_LIMIT:
            raise csv.Error(f"longer than {ROW_LIMIT // MIB} MiB")
        return line
