"""Rows out of one object, whatever its format."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from finetune_trainer.storage import NotFound, ObjectInfo, StorageError, Store
from finetune_trainer.storage.digests import Hasher, digest_of

from . import arrow, folder, jsonl, parquet, separated, tar
from .base import MIB, ROW_LIMIT, DataError, File, Row
from .compressed import BLOCK, Hashed, check_magic, plain
from .images import ImageError, ImageInfo, image_bytes, inspect, relative_key
from .lines import lines, plain_text

FORMATS = ("jsonl", "csv", "tsv", "txt", "parquet", "arrow", "tar")
_TABLES = ("parquet", "arrow")
"""Formats that are read at several places, and so from a scratch file."""
_NAMES = {
    "ndjson": ("jsonl", ""),
    "text": ("txt", ""),
    "feather": ("arrow", ""),
    "ipc": ("arrow", ""),
    "tgz": ("tar", "gz"),
}


@dataclass(frozen=True)
class Format:
    """What a file's name says it is; `compression` is "", "gz" or "zst"."""

    kind: str
    compression: str


def format_of(uri: str) -> Format:
    """The format by the name's ending; what ends with a slash is a folder of images. Raises DataError UnknownFormat."""
    if uri.endswith("/"):
        return Format("folder", "")
    name = uri.rsplit("/", 1)[-1].lower()
    stem, _, last = name.rpartition(".")
    compression = last if last in ("gz", "zst") else ""
    kind = stem.rpartition(".")[2] if compression else last
    kind, implied = _NAMES.get(kind, (kind, ""))
    compression = compression or implied
    if kind not in FORMATS or "." not in name or (kind in _TABLES and compression):
        hint = " A .json file that holds one object a line is jsonl." if kind == "json" else ""
        raise DataError(
            "UnknownFormat",
            f"{uri}: its name ends in none of .jsonl, .csv, .tsv, .txt, .tar (each also with .gz or .zst), .parquet "
            f"and .arrow; rename or convert the file.{hint}",
        )
    return Format(kind, compression)


class Rows:
    """The rows of one object, to be iterated once.

    Iterating yields a Row or, for a row that cannot be read, a DataError; it raises DataError where nothing further can
    be read and StorageError where the store fails. Afterwards `digest` holds the digest of the object's bytes as
    they are stored (of a folder: of its paths and their digests), together with those of images it names.
    """

    def __init__(self, store: Store, key: str, *, uri: str, wanted: Sequence[str], scratch: Path) -> None:
        """`wanted`: columns that are needed, all that is read of a table. `scratch`: a directory for temporary files.

        Raises DataError UnknownFormat, StorageError when the object does not exist.
        """
        self.uri = uri
        self.format = format_of(uri)
        self.digest: str | None = None
        self._file = File(uri, tuple(wanted), scratch)
        self._store, self._key = store, key
        self._images = Hasher()
        self._opened = False
        self._files: list[ObjectInfo] = []
        info: ObjectInfo | None
        if self.format.kind == "folder":
            self._files, info = folder.listing(store, key, self._file)
        else:
            info = store.head(key)
        if info is None:
            raise NotFound("ObjectNotFound", f"There is no object {uri}: correct the address or upload the file.")
        self.info = info

    @property
    def columns(self) -> list[str]:
        """Names of the columns found: the header, or the keys of the first row."""
        return self._file.columns

    def where(self, row: Row) -> str:
        """The place of a row, for messages."""
        if self.format.kind == "folder":
            return f"{self.uri}{row.name}"
        return f"{self.uri}:{row.number} ({row.name})" if row.name else f"{self.uri}:{row.number}"

    def image(self, row: Row, column: str) -> tuple[bytes, ImageInfo]:
        """The image in a row: its bytes as they are stored, and what they decode to.

        Raises DataError where there is no usable image, StorageError where the store fails.
        """
        try:
            data = image_bytes(row.values.get(column), sibling=self._sibling)
            return data, inspect(data)
        except ImageError as error:
            raise DataError("InvalidRow", f"{self.where(row)}: {error}") from error

    def _sibling(self, path: str) -> bytes:
        """The image that a row names by a path relative to this file."""
        key = relative_key(self._key, path)
        try:
            data = self._store.read(key, limit=ROW_LIMIT + 1)
        except NotFound:
            raise ImageError(f"there is no image {path[:200]!r} beside the file; upload it or mend the row.") from None
        except StorageError as error:
            if error.reason != "InvalidKey":
                raise
            raise ImageError(f"the path {path[:200]!r} is not a plain relative path; mend the row.") from None
        if len(data) > ROW_LIMIT:
            raise ImageError(f"the image {path[:200]!r} has more than {ROW_LIMIT // MIB} MiB; make it smaller.")
        self._opened = True
        self._images.update(f"{path}\0{digest_of(data)}\n".encode(errors="replace"))
        return data

    def __iter__(self) -> Iterator[Row | DataError]:
        if self.info.size == 0:
            raise self._file.empty()
        found = False
        for item in self._read():
            found = True
            yield item
        if not found:
            raise DataError("EmptyData", f"{self.uri}: the file has no rows; give it at least one.")
        if self._opened and self.digest is not None:
            self.digest = digest_of(f"{self.digest}\n{self._images.digest()}".encode())

    def _read(self) -> Iterator[Row | DataError]:
        if self.format.kind == "folder":
            return self._folder()
        return self._table() if self.format.kind in _TABLES else self._stream()

    def _folder(self) -> Iterator[Row | DataError]:
        whole = Hasher()
        yield from folder.rows(self._store, self._key, self._files, self._file, hashed=whole.update)
        self.digest = whole.digest()

    def _stream(self) -> Iterator[Row | DataError]:
        with self._store.stream(self._key, if_match=self.info.etag) as stream:
            source = Hashed(stream)
            yield from self._reader()(plain(source, self._file, compression=self.format.compression), self._file)
            while source.read(BLOCK):
                pass
            self.digest = source.digest()

    def _reader(self) -> Callable[[BinaryIO, File], Iterator[Row | DataError]]:
        kind = self.format.kind
        if kind == "tar":
            return tar.rows
        if kind == "jsonl":
            return lambda source, file: jsonl.rows(lines(source, file), file)
        if kind == "txt":
            return lambda source, file: plain_text(lines(source, file), file)
        return lambda source, file: separated.rows(lines(source, file), file, kind=kind)

    def _table(self) -> Iterator[Row | DataError]:
        path = self._file.scratch / f"input.{self.format.kind}"
        try:
            info = self._store.download(self._key, path, if_match=self.info.etag)
            with open(path, "rb") as file:
                first = file.read(64)
            if self.format.kind == "parquet":
                check_magic(first, self._file, wanted="parquet")
            elif not first.startswith((b"FEA1", arrow.MAGIC)):
                check_magic(first, self._file, wanted="")
            read = parquet.rows if self.format.kind == "parquet" else arrow.rows
            yield from read(path, self._file)
        finally:
            path.unlink(missing_ok=True)
        self.digest = info.digest
