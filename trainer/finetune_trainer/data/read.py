"""Rows out of one object: jsonl, csv, tsv or parquet, the text formats also as .gz and .zst.

The object is read once, in a stream of bounded memory, and its SHA-256 comes out of the same pass. (Parquet keeps its
directory at the end of the file, so it goes through a scratch file, hashed while it is written.) Files come from
strangers: a row may have 64 MiB, and what decompresses to more than 200 times its size is refused.

Two kinds of error: a row that cannot be read is *yielded* as a DataError, so that one pass can report many of them; a
file that cannot be read any further *raises* one. No message holds a row's content.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune_trainer.storage import NotFound, Store

MIB = 1024 * 1024
ROW_LIMIT = 64 * MIB
"""Bytes one row may have."""
RATIO_LIMIT = 200
"""Times its own size a file may decompress to, once it has passed FREE_BYTES. Text compresses 3 to 20 times."""
FREE_BYTES = 64 * MIB
_BLOCK = MIB
# A zstd block of four bytes may stand for 128 KiB: small pieces bound what one call can produce to 64 MiB.
_ZSTD_PIECE = 2048
_ZSTD_WINDOW = 128 * MIB
_PARQUET_BATCH = 256
_COLUMN_CHUNK_LIMIT = 4096 * MIB
FORMATS = ("jsonl", "csv", "tsv", "parquet")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}


class DataError(Exception):
    """The data is wrong: exit code 42. `reason` is PascalCase; the message names the file, the place and the remedy."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `number` is the 1-based line where it starts (text formats) or the 1-based row (parquet)."""

    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """What a file's name says it is; `compression` is "", "gz" or "zst"."""

    kind: str
    compression: str


def format_of(uri: str) -> Format:
    """The format by the name's ending. Raises DataError UnknownFormat."""
    name = uri.rsplit("/", 1)[-1].lower()
    stem, _, last = name.rpartition(".")
    compression = last if last in ("gz", "zst") else ""
    kind = stem.rpartition(".")[2] if compression else last
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    if kind not in FORMATS or "." not in name or (kind == "parquet" and compression):
        raise DataError(
            "UnknownFormat",
            f"{uri}: its name ends in none of .jsonl, .csv, .tsv (each also with .gz or .zst) and .parquet; "
            "rename or convert the file.",
        )
    return Format(kind, compression)


class Rows:
    """The rows of one object, to be iterated once.

    Iterating yields a Row or, for a row that cannot be read, a DataError; it raises DataError where nothing further can
    be read and StorageError where the store fails. Afterwards `sha256` holds the hex digest of the object's bytes as
    they are stored. `columns` are the names found: the header, or the keys of the first row.
    """

    def __init__(self, store: Store, key: str, *, uri: str, wanted: Sequence[str], scratch: Path) -> None:
        """`wanted`: columns that are needed, all that is read of a parquet file. `scratch`: a directory for temporary
        files.

        Raises DataError UnknownFormat, StorageError when the object does not exist.
        """
        self.uri = uri
        self.format = format_of(uri)
        info = store.head(key)
        if info is None:
            raise NotFound("ObjectNotFound", f"There is no object {uri}: correct the address or upload the file.")
        self.info = info
        self.columns: list[str] = []
        self.sha256: str | None = None
        self._store, self._key, self._wanted, self._scratch = store, key, tuple(wanted), scratch

    def __iter__(self) -> Iterator[Row | DataError]:
        if self.info.size == 0:
            raise _empty(self.uri)
        if self.format.kind == "parquet":
            yield from self._parquet()
        else:
            yield from self._text()

    def _text(self) -> Iterator[Row | DataError]:
        with self._store.stream(self._key, if_match=self.info.etag) as stream:
            source = _Hashed(stream)
            lines = _lines(self._plain(source), self.uri)
            yield from self._jsonl(lines) if self.format.kind == "jsonl" else self._csv(lines)
            while source.read(_BLOCK):
                pass
            self.sha256 = source.sha256.hexdigest()

    def _plain(self, source: "_Hashed") -> BinaryIO:
        """The decompressed bytes; raises where the first bytes contradict the name."""
        first = source.peek(4)
        found = next((name for magic, name in _MAGIC.items() if first.startswith(magic)), "")
        wanted = {"": "", "gz": "gzip", "zst": "zstd"}[self.format.compression]
        if found != wanted:
            named = self.uri.rsplit("/", 1)[-1]
            said = f"is named {named} but is {found or f'not {wanted}'} data"
            raise DataError("InvalidFile", f"{self.uri}: the file {said}; give it the name of its format.")
        if not wanted:
            return cast("BinaryIO", io.BufferedReader(source, _BLOCK))
        inflate = _gunzip if wanted == "gzip" else _unzstd
        return cast("BinaryIO", io.BufferedReader(_Inflated(source, inflate, self.uri), _BLOCK))

    def _jsonl(self, lines: Iterator[tuple[int, str | DataError]]) -> Iterator[Row | DataError]:
        for number, line in lines:
            if isinstance(line, DataError):
                yield line
            elif line and not line.isspace():
                row = _json_row(line, number, self.uri)
                if not self.columns and isinstance(row, Row):
                    self.columns = list(row.values)
                yield row

    def _csv(self, lines: Iterator[tuple[int, str | DataError]]) -> Iterator[Row | DataError]:
        csv.field_size_limit(ROW_LIMIT)
        feed = _CsvLines(lines)
        reader = csv.reader(feed, delimiter="\t" if self.format.kind == "tsv" else ",", strict=True)
        while True:
            feed.begin()
            start = feed.number + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                where = f"{self.uri}:{start}"
                quoted = feed.number > start
                hint = "a quotation mark opens here and is not closed" if quoted else str(error)
                problem = DataError(
                    "InvalidRow", f"{where}: not {self.format.kind} ({hint}); quote fields as RFC 4180 says."
                )
                if not self.columns:
                    raise problem from error
                yield problem
                continue
            if fields is None:
                return
            if feed.error is not None:
                if not self.columns:
                    raise feed.error
                yield feed.error
            elif not self.columns:
                self.columns = self._header(fields, start)
            elif fields:
                yield self._record(fields, start)

    def _header(self, fields: list[str], line: int) -> list[str]:
        twice = sorted({name for name in fields if fields.count(name) > 1})
        if twice:
            raise DataError(
                "InvalidFile", f"{self.uri}:{line}: the header names {_some(twice)} twice; name each column once."
            )
        return fields

    def _record(self, fields: list[str], line: int) -> Row | DataError:
        if len(fields) != len(self.columns):
            return DataError(
                "InvalidRow",
                f"{self.uri}:{line}: the row has {len(fields)} fields where the header has {len(self.columns)}; "
                "quote fields that hold separators or line breaks.",
            )
        return Row(line, dict(zip(self.columns, fields, strict=True)))

    def _parquet(self) -> Iterator[Row | DataError]:
        path = self._scratch / "input.parquet"
        try:
            info = self._store.download(self._key, path, if_match=self.info.etag)
            yield from self._parquet_rows(path)
        finally:
            path.unlink(missing_ok=True)
        self.sha256 = info.sha256

    def _parquet_rows(self, path: Path) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
                self.columns = list(file.schema_arrow.names)
                present = [name for name in dict.fromkeys(self._wanted) if name in self.columns]
                _refuse_huge_chunks(file.metadata, present, self.uri)
                number = 0
                for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=present, use_threads=False):
                    values = [column.to_pylist() for column in batch.columns]
                    for cells in zip(*values, strict=True) if values else ((),) * batch.num_rows:
                        number += 1
                        yield Row(number, dict(zip(batch.schema.names, cells, strict=True)))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            kind = type(error).__name__
            raise DataError("InvalidFile", f"{self.uri}: not a whole parquet file ({kind}); write it again.") from error


def _json_row(line: str, number: int, uri: str) -> Row | DataError:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return DataError(
            "InvalidRow", f"{uri}:{number}:{error.colno}: not JSON ({error.msg}); every line must be one JSON object."
        )
    except _ConstantError as error:
        return DataError("InvalidRow", f"{uri}:{number}: {error} is not JSON; use null or leave the field out.")
    except (RecursionError, ValueError):
        return DataError(
            "InvalidRow", f"{uri}:{number}: nested too deeply, or a number of too many digits; simplify the row."
        )
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        return DataError(
            "InvalidRow", f'{uri}:{number}: the line is {kind}, not an object; write rows as {{"column": value, ...}}.'
        )
    return Row(number, value)


class _ConstantError(Exception):
    """NaN or an infinity, which Python reads and JSON does not have."""


def _refuse_constant(name: str) -> None:
    raise _ConstantError(name)


def _lines(source: BinaryIO, uri: str) -> Iterator[tuple[int, str | DataError]]:
    """Decoded lines with their 1-based numbers, line ends kept, a byte order mark left out."""
    number = 0
    while line := source.readline(ROW_LIMIT + 1):
        number += 1
        if len(line) > ROW_LIMIT:
            raise _too_long(uri, number)
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError("InvalidFile", f"{uri}: the file is UTF-16; convert it to UTF-8.")
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, _decoded(line, uri, number)
    if number == 0:
        raise _empty(uri)


def _decoded(line: bytes, uri: str, number: int) -> str | DataError:
    if (at := line.find(b"\0")) >= 0:
        return DataError("InvalidRow", f"{uri}:{number}:{at + 1}: a NUL byte; the file is damaged or not text.")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return DataError(
            "InvalidRow", f"{uri}:{number}: byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8."
        )


class _CsvLines:
    """Feeds the csv reader, which asks for as many lines as a record has, and notes what was wrong with one of them."""

    def __init__(self, lines: Iterator[tuple[int, str | DataError]]) -> None:
        self._lines = lines
        self._bytes = 0
        self.number = 0
        self.error: DataError | None = None

    def begin(self) -> None:
        self._bytes, self.error = 0, None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, DataError):
            self.error = self.error or line
            return "\n"
        self._bytes += len(line)
        if self._bytes > ROW_LIMIT:
            raise csv.Error(f"longer than {ROW_LIMIT // MIB} MiB")
        return line


class _Hashed(io.RawIOBase):
    """Reads through and takes the SHA-256 as the bytes pass."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._ahead = b""
        self.sha256 = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size and (block := self._source.read(size - len(self._ahead))):
            self._ahead += block
        return self._ahead

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        block = self._ahead or self._source.read(len(buffer))
        self._ahead = b""
        self.sha256.update(block)
        self.count += len(block)
        buffer[: len(block)] = block
        return len(block)


Inflate = Callable[[Iterator[bytes], str], Iterator[bytes]]


class _Inflated(io.RawIOBase):
    """Decompressed bytes, as long as they stay in proportion to the compressed ones."""

    def __init__(self, source: _Hashed, inflate: Inflate, uri: str) -> None:
        self._source = source
        self._uri = uri
        self._blocks = inflate(iter(lambda: source.read(_BLOCK) or b"", b""), uri)
        self._block = memoryview(b"")
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
            self._count += len(block)
            if self._count > FREE_BYTES and self._count > RATIO_LIMIT * self._source.count:
                raise DataError(
                    "DecompressionBomb",
                    f"{self._uri}: decompresses to more than {RATIO_LIMIT} times its size; store it uncompressed.",
                )
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


def _gunzip(blocks: Iterator[bytes], uri: str) -> Iterator[bytes]:
    """All members of a gzip file; zeros after the last one are padding."""
    decoder = None
    try:
        for block in blocks:
            rest = block
            while rest:
                if decoder is None:
                    rest = rest.lstrip(b"\0")
                    if not rest:
                        break
                    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
                yield decoder.decompress(rest, 4 * _BLOCK)
                if decoder.eof:
                    rest, decoder = decoder.unused_data, None
                else:
                    rest = decoder.unconsumed_tail
        if decoder is not None:
            yield decoder.flush()
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError("InvalidFile", f"{uri}: damaged gzip data ({error}); upload the file again.") from error
    if decoder is not None and not decoder.eof:
        raise DataError("InvalidFile", f"{uri}: the gzip data ends too early; upload the whole file again.")


def _unzstd(blocks: Iterator[bytes], uri: str) -> Iterator[bytes]:
    """All frames of a zstd file."""
    import zstandard

    decoder = None
    try:
        for block in blocks:
            for at in range(0, len(block), _ZSTD_PIECE):
                rest = block[at : at + _ZSTD_PIECE]
                while rest:
                    if decoder is None:
                        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                    yield decoder.decompress(rest)
                    rest = b""
                    if decoder.eof:
                        rest, decoder = decoder.unused_data, None
    except zstandard.ZstdError as error:
        raise DataError("InvalidFile", f"{uri}: damaged zstd data ({error}); upload the file again.") from error
    if decoder is not None:
        raise DataError("InvalidFile", f"{uri}: the zstd data ends too early; upload the whole file again.")


def _refuse_huge_chunks(metadata: Any, columns: list[str], uri: str) -> None:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            if chunk.path_in_schema.split(".")[0] in columns and chunk.total_uncompressed_size > _COLUMN_CHUNK_LIMIT:
                raise DataError(
                    "DecompressionBomb",
                    f"{uri}: row group {group + 1} holds more than {_COLUMN_CHUNK_LIMIT // MIB} MiB in the column "
                    f"{chunk.path_in_schema}; write the file with smaller row groups.",
                )


def _some(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(repr(name)[:80] for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def _empty(uri: str) -> DataError:
    return DataError("EmptyData", f"{uri}: the file is empty; give it at least one row.")


def _too_long(uri: str, number: int) -> DataError:
    return DataError("InvalidRow", f"{uri}:{number}: the row is longer than {ROW_LIMIT // MIB} MiB; split it.")
