"""A directory as a store: the same promises as S3, made of rename(2), link(2) and flock(2).

An object's etag is `size-mtime_ns-inode`. Every write makes a new file whose modification time is set to the
nanosecond, so two versions never share a tag even where the kernel's own timestamps are coarse and inodes are reused
at once.

Reading follows symbolic links of files, because model directories are often made of them; writing replaces a link
instead of following it and refuses a directory link that leads out of the root.
"""

import errno
import fcntl
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

from .base import (
    MIB,
    AlreadyExists,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StorageError,
    Unavailable,
    check_key,
    check_prefix,
    mismatch,
)
from .digests import Hasher, digest_of
from .files import TEMPORARY, file_changed, local_failure, pour, publish, sync, temporary

_BLOCK = 4 * MIB
_DAY = 86400.0


class LocalStore:
    """Objects are files below one directory, which is created by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri() if root != Path("/") else "file:///"

    def __repr__(self) -> str:
        return f"LocalStore({self.uri})"

    def now(self) -> datetime:
        return datetime.now(UTC)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with self._errors("head", key):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return None if path.is_dir() else _info(key, status)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        start = self.root / prefix.rpartition("/")[0]
        found: list[ObjectInfo] = []
        with self._errors("list", prefix):
            for directory, below, names in os.walk(start, onerror=_raise_unless_missing):
                relative = Path(directory).relative_to(self.root)
                if Path(directory) == start:
                    below[:] = [name for name in below if name.startswith(prefix.rpartition("/")[2])]
                for name in names:
                    key = (relative / name).as_posix()
                    if name.startswith(TEMPORARY) or not key.startswith(prefix):
                        continue
                    with suppress(FileNotFoundError):  # deleted since the directory was read
                        found.append(_info(key, (self.root / key).stat()))
        return iter(sorted(found, key=lambda info: info.key))

    def read(self, key: str, *, if_match: str | None = None, limit: int | None = None) -> bytes:
        with self.stream(key, if_match=if_match) as source:
            return source.read() if limit is None else source.read(limit)

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        path = self._path(key)
        with self._errors("read", key):
            raw = _Unchanging(path, lambda: self._changed(key))
        with raw:
            if if_match is not None and raw.etag != if_match:
                raise self._changed(key)
            yield cast("BinaryIO", io.BufferedReader(raw, MIB))

    def download(
        self,
        key: str,
        path: Path,
        *,
        if_match: str | None = None,
        digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ObjectInfo:
        with self.stream(key, if_match=if_match) as source, self._errors("download", key), temporary(path) as target:
            found, size = _copy(source, target, progress, like=digest)
            if digest is not None and found != digest:
                raise mismatch(self._name(key), wanted=digest, found=found)
            raw = cast("_Unchanging", cast("io.BufferedReader", source).raw)
            info = ObjectInfo(key, size, raw.etag, raw.modified, found)
            publish(target, path)
        return info

    def write(self, key: str, data: bytes) -> ObjectInfo:
        return self._store(key, data, self._rename)

    def upload(self, path: Path, key: str, *, progress: Callable[[int], None] | None = None) -> ObjectInfo:
        final = self._path(key, writing=True)
        _tidy(final.parent)
        with self._errors("upload", key), open(path, "rb") as source, temporary(final) as target:
            found, size = _copy(source, target, progress)
            if size != os.fstat(source.fileno()).st_size:
                raise file_changed(path)
            return self._finish(key, target, final, found, self._rename)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        try:
            return self._store(key, data, _link)
        except _TakenError:
            raise AlreadyExists(
                "AlreadyExists", f"{self._name(key)} exists already and is never overwritten."
            ) from None

    def replace(self, key: str, data: bytes, *, if_match: str | None) -> ObjectInfo:
        if if_match is None:
            try:
                return self._store(key, data, _link)
            except _TakenError:
                raise self._changed(key) from None

        def swap(temporary_file: Path, final: Path) -> None:
            with self._lock():
                current = self.head(key)
                if current is None or current.etag != if_match:
                    raise self._changed(key)
                os.replace(temporary_file, final)

        return self._store(key, data, swap)

    def delete(self, keys: Iterable[str]) -> None:
        paths = {key: self._path(key, writing=True) for key in keys}
        if not self.root.is_dir():
            return
        with self._lock():
            for key, path in paths.items():
                with self._errors("delete", key), suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
                self._prune(path.parent)

    def end_unfinished(self, prefix: str, wanted: Callable[[str], bool]) -> None:
        start = self.root / check_prefix(prefix).rpartition("/")[0]
        with self._errors("list", prefix):
            for directory, _, names in os.walk(start, onerror=_raise_unless_missing):
                for path in (Path(directory, name) for name in names if name.startswith(TEMPORARY)):
                    key = path.relative_to(self.root).as_posix()
                    if key.startswith(prefix) and wanted(key):
                        path.unlink(missing_ok=True)
                        self._prune(path.parent)

    def _store(self, key: str, data: bytes, commit: Callable[[Path, Path], None]) -> ObjectInfo:
        final = self._path(key, writing=True)
        _tidy(final.parent)
        with self._errors("write", key), temporary(final) as target:
            target.write_bytes(data)
            return self._finish(key, target, final, digest_of(data), commit)

    def _finish(
        self, key: str, target: Path, final: Path, digest: str, commit: Callable[[Path, Path], None]
    ) -> ObjectInfo:
        """Make a written temporary file durable, then visible."""
        now = time.time_ns()
        os.utime(target, ns=(now, now))
        sync(target)
        info = _info(key, target.stat(), digest)
        commit(target, final)
        sync(final.parent)
        return info

    def _rename(self, target: Path, final: Path) -> None:
        with self._lock():
            os.replace(target, final)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One lock for the store, on its root, which is never deleted: what was compared is what is swapped."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _prune(self, directory: Path) -> None:
        """Remove directories that deleting has left empty: an object store has none."""
        while directory != self.root and self.root in directory.parents:
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent

    def _path(self, key: str, *, writing: bool = False) -> Path:
        path = self.root / check_key(key)
        if path.name.startswith(TEMPORARY):
            raise StorageError("InvalidKey", f"The key {key!r} is reserved for temporary files.", environment=False)
        if writing:
            root = self.root.resolve()
            parent = path.parent.resolve()
            if parent != root and root not in parent.parents:
                raise StorageError(
                    "InvalidKey",
                    f"{self._name(key)} lies behind a symbolic link that leads out of the store: "
                    "write to that place's own URI.",
                    environment=False,
                )
        return path

    def _name(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def _changed(self, key: str) -> PreconditionFailed:
        return PreconditionFailed(
            "ObjectChanged",
            f"{self._name(key)} is not the version that was asked for: it was replaced, appended to or deleted since.",
        )

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translated(error, operation, key) from error

    def _translated(self, error: OSError, operation: str, key: str) -> StorageError:
        what = f"{operation} of {self._name(key)}"
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            missing = "no such file" if self.root.is_dir() else f"the directory {self.root} does not exist"
            if isinstance(error, IsADirectoryError):
                missing = "it is a directory"
            return NotFound("ObjectNotFound", f"The {what} failed: {missing}; correct the path or put the file there.")
        return local_failure(error, what) or Unavailable(
            "StoreUnavailable", f"The {what} failed ({error.strerror or error}): check the file system."
        )


class _TakenError(Exception):
    """link(2) found the name taken."""


class _Unchanging(io.FileIO):
    """A file that notices, at its end, when it was written to while it was read."""

    def __init__(self, path: Path, error: Callable[[], PreconditionFailed]) -> None:
        super().__init__(path, "rb")
        status = os.fstat(self.fileno())
        self.etag = _etag(status)
        self.modified = datetime.fromtimestamp(status.st_mtime, UTC)
        self._error = error

    def readinto(self, buffer) -> int | None:  # type: ignore[no-untyped-def]
        count = super().readinto(buffer)
        if count == 0:
            self._check()
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._check()
        return data

    def _check(self) -> None:
        if _etag(os.fstat(self.fileno())) != self.etag:
            raise self._error()


def _tidy(directory: Path) -> None:
    """Remove what killed processes have left here, hidden from listings. Nobody writes for a day without a byte."""
    before = time.time() - _DAY
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY) and entry.stat().st_mtime < before:
                os.unlink(entry)


def _link(source: Path, final: Path) -> None:
    """Give the file its name unless the name is taken; raises _TakenError."""
    try:
        os.link(source, final)
    except FileExistsError:
        raise _TakenError from None
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise StorageError(
                "ConditionalWritesUnsupported",
                f"The file system of {final.parent} has no hard links, which creating a record exactly once needs: "
                "use a POSIX file system or object storage.",
            ) from error
        raise


def _copy(
    source: BinaryIO, target: Path, progress: Callable[[int], None] | None, *, like: str | None = None
) -> tuple[str, int]:
    """Copy to the end; the digest is taken as the bytes pass."""
    hasher, size = Hasher(like), 0
    with open(target, "wb") as sink:
        while block := source.read(_BLOCK):
            hasher.update(block)
            pour(block, sink)
            size += len(block)
            if progress is not None:
                progress(size)
    return hasher.digest(), size


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _info(key: str, status: os.stat_result, digest: str | None = None) -> ObjectInfo:
    modified = datetime.fromtimestamp(status.st_mtime, UTC)
    return ObjectInfo(key, status.st_size, _etag(status), modified, digest)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
