"""Arrow IPC, as a file (also called feather) and as a stream (what the datasets library writes): both are `.arrow`.

A file is a stream between a magic and a footer, so both are read as a stream, from a memory map. Before pyarrow sees
it, the messages are walked by hand: pyarrow allocates whatever a compressed buffer claims to need (layout: "Arrow
Columnar Format", section on IPC; the tables are FlatBuffers).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import MIB, ROW_LIMIT, DataError, File, Row, weight
from .parquet import cells

MAGIC = b"ARROW1"
_SLICE = 256
_BATCH_LIMIT = 512 * MIB
"""Bytes a compressed record batch may need; without compression it is mapped and needs next to nothing."""
_DICTIONARY, _BATCH = 2, 3


def rows(path: Path, file: File) -> Iterator[Row | DataError]:
    """A row a row. Raises where the file is not whole."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            stream = _stream(source.read_buffer(), file)
            _refuse_huge_batches(memoryview(stream), file)
            with pyarrow.ipc.open_stream(stream) as reader:
                file.columns = list(reader.schema.names)
            if len(set(file.columns)) < len(file.columns):
                raise file.invalid("the schema names a column twice; name each column once.")
            wanted = [number for number, name in enumerate(file.columns) if name in file.wanted]
            options = pyarrow.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
            with pyarrow.ipc.open_stream(stream, options=options) as reader:
                yield from _rows(reader, file, keep=bool(wanted))
    except (pyarrow.ArrowException, OSError, ValueError, struct.error) as error:
        raise file.invalid(f"not a whole arrow file ({type(error).__name__}); write it again.") from error


def _rows(reader: Any, file: File, *, keep: bool) -> Iterator[Row | DataError]:
    number = 0
    for batch in reader:
        batch.validate(full=True)  # offsets may lead anywhere
        for start in range(0, batch.num_rows, _SLICE):
            part = batch.slice(start, _SLICE)
            for values in cells(part) if keep else ({} for _ in range(part.num_rows)):
                number += 1
                yield Row(number, values) if weight(values) <= ROW_LIMIT else file.too_long(number)


def _stream(whole: Any, file: File) -> Any:
    """The stream inside a file; a stream is one already."""
    view = memoryview(whole)
    if bytes(view[:4]) == b"FEA1":
        raise file.invalid("a feather file of version 1; write it again with version 2.")
    if bytes(view[: len(MAGIC)]) != MAGIC:
        return whole
    if len(view) < 18 or bytes(view[-len(MAGIC) :]) != MAGIC:
        raise file.invalid("the arrow file ends too early; upload the whole file again.")
    (footer,) = struct.unpack_from("<i", view, len(view) - 10)
    if not 0 <= footer <= len(view) - 18:
        raise file.invalid("not a whole arrow file (its footer is damaged); write it again.")
    return whole.slice(8, len(view) - 18 - footer)


def _refuse_huge_batches(view: memoryview, file: File) -> None:
    at, batch = 0, 0
    while at + 4 <= len(view):
        (size,) = struct.unpack_from("<i", view, at)
        at += 4
        if size == -1:  # the continuation marker, which streams before version 0.15 lack
            (size,) = struct.unpack_from("<i", view, at)
            at += 4
        if size == 0:
            return
        if size < 0 or at + size > len(view):
            raise file.invalid("the arrow data ends too early; upload the whole file again.")
        kind, body, buffers = _message(view[at : at + size])
        at += size
        if body < 0 or at + body > len(view):
            raise file.invalid("the arrow data ends too early; upload the whole file again.")
        batch += kind == _BATCH
        needed = sum(_claimed(view[at : at + body], *buffer) for buffer in buffers)
        if needed > _BATCH_LIMIT:
            raise DataError(
                "DecompressionBomb",
                f"{file.uri}: the record batch {max(1, batch)} holds {needed // MIB} MiB, compressed to "
                f"{body / MIB:.1f} MiB; write the file in smaller batches or without compression.",
            )
        at += body


def _claimed(body: memoryview, offset: int, length: int) -> int:
    """Bytes a compressed buffer says it decompresses to; -1 means that it is stored as it is."""
    if length < 8:
        return 0
    (claimed,) = struct.unpack_from("<q", body, offset)
    return int(max(0, claimed))


def _message(data: memoryview) -> tuple[int, int, list[tuple[int, int]]]:
    """Kind and body length of a message, and offset and length of each buffer when they are compressed."""
    message = _Table(data, struct.unpack_from("<I", data, 0)[0])
    kind, body = message.value(1, "<B"), message.value(3, "<q")
    header = message.table(2)
    if kind == _DICTIONARY and header is not None:
        header = header.table(1)
    if kind not in (_DICTIONARY, _BATCH) or header is None or header.table(3) is None:
        return kind, body, []
    at = header.place(2)
    if at is None:
        return kind, body, []
    at += struct.unpack_from("<I", data, at)[0]
    (count,) = struct.unpack_from("<I", data, at)
    if count * 16 > len(data):
        raise ValueError("more buffers than bytes")
    return kind, body, [struct.unpack_from("<qq", data, at + 4 + 16 * number) for number in range(count)]


class _Table:
    """One FlatBuffers table: fields are found through its vtable."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at
        self._vtable = at - struct.unpack_from("<i", data, at)[0]
        if self._vtable < 0:
            raise ValueError("a table outside of its message")

    def place(self, slot: int) -> int | None:
        (size,) = struct.unpack_from("<H", self.data, self._vtable)
        if 4 + 2 * slot >= size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, self._vtable + 4 + 2 * slot)
        return self.at + offset if offset else None

    def value(self, slot: int, form: str) -> int:
        at = self.place(slot)
        return 0 if at is None else int(struct.unpack_from(form, self.data, at)[0])

    def table(self, slot: int) -> "_Table | None":
        at = self.place(slot)
        return None if at is None else _Table(self.data, at + struct.unpack_from("<I", self.data, at)[0])
