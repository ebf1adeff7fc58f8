"""Files that appear whole or not at all: written under a temporary name beside their place, made durable, renamed."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .base import AccessDenied, StorageError

# Hidden from a local store's listings, so that what a killed process leaves is never taken for an object.
TEMPORARY = ".finetune-tmp-"
PIECE = 32 * 1024
"""Files are written in pieces of this size: a GiB in pieces of 128 KiB costs the kernel 3 to 5 CPU seconds where these
cost 0.3 to 1 (Linux 6.18, ext4). It takes a folio of memory as large as the piece, and a virtual machine has given free
memory of 128 KiB and more back to its host, which must fetch it again."""


@contextmanager
def temporary(final: Path) -> Iterator[Path]:
    """A fresh empty file beside `final`, gone afterwards unless it was renamed. Makes directories as needed."""
    path = final.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    for tries_left in reversed(range(10)):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
            break
        except FileNotFoundError:  # another process pruned the empty directory in between
            if not tries_left:
                raise
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(source: Path, final: Path) -> None:
    """Make a finished temporary file visible under its name, durably."""
    sync(source)
    os.replace(source, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """fsync(2) of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_changed(path: Path) -> StorageError:
    """The error for a file that grew or shrank while it was uploaded."""
    return StorageError(
        "FileChanged", f"{path} changed while it was uploaded: upload files that nothing writes to.", environment=False
    )


def local_failure(error: OSError, what: str) -> StorageError | None:
    """The error for a file system that denies or is full; None for any other failure."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        place = error.filename or "the directory"
        return AccessDenied(
            "AccessDenied",
            f"The {what} was denied ({error.strerror}): give user {os.getuid()} the permission on {place}.",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError("NoSpace", f"The {what} failed ({error.strerror}): free space or use a larger volume.")
    return None


@contextmanager
def file_error(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into StorageError."""
    try:
        yield
    except OSError as error:
        found = local_failure(error, f"writing of {path}")
        if found is None:
            raise
        raise found from error


def pour(data: bytes, sink: BinaryIO) -> None:
    """Write all of `data`, in pieces."""
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        sink.write(view[start : start + PIECE])
