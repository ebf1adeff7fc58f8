"""Lines of text, decoded, and plain text itself: a row a line, in the column `text`."""

from collections.abc import Iterator
from typing import BinaryIO

from .base import ROW_LIMIT, DataError, File, Row

Line = tuple[int, str | DataError]
"""A line with its 1-based number and its end, or what is wrong with it."""


def lines(source: BinaryIO, file: File) -> Iterator[Line]:
    """Decoded lines, a byte order mark left out. Raises where nothing further can be read."""
    number = 0
    while line := source.readline(ROW_LIMIT + 1):
        number += 1
        if len(line) > ROW_LIMIT:
            raise file.too_long(number)
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise file.invalid("the file is UTF-16; convert it to UTF-8.")
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, _decoded(line, file, number)
    if number == 0:
        raise file.empty()


def _decoded(line: bytes, file: File, number: int) -> str | DataError:
    if (at := line.find(b"\0")) >= 0:
        return file.bad_row(
            f"{number}:{at + 1}", "a NUL byte; the file is damaged, not text, or UTF-16: write it as UTF-8."
        )
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return file.bad_row(number, f"byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8.")


def plain_text(source: Iterator[Line], file: File) -> Iterator[Row | DataError]:
    """Plain text: every line that is not blank is a row {"text": the line without its end}; blank lines are skipped."""
    file.columns = ["text"]
    for number, line in source:
        if isinstance(line, DataError):
            yield line
        elif line and not line.isspace():
            yield Row(number, {"text": line.rstrip("\r\n")})
