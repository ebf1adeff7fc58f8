"""Downloads that several pods share: a directory of files addressed by their digest, such as a volume of a node.

    objects/<digest>      (without the algorithm) the file, complete and right when it was put there
    incoming/<digest>/    a download under way, and `reserved`, the bytes that it will take
    locks/<digest>        locked with flock(2): shared by those who use the file, exclusively while it is removed
    locks/<digest>.make   locked while the file is downloaded
    locks/room            locked while room is made

A lock ends with its process, whatever ends that; what a killed one leaves in incoming/ is found by its free lock. An
entry is read once through and compared with its digest whenever a process begins to use it, and removed when it is
wrong. When the files outgrow the limit, those whose use began longest ago go first, never one in use.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .base import MIB
from .digests import EVERYONE, Hasher, hex_of
from .files import sync

_ROOM, _MAKE = "room", ".make"
_WAIT = 0.5  # seconds between two looks at a lock that another process holds
_SPARE = 64 * MIB
"""Left free on the volume."""
_log = logging.getLogger("finetune.cache")

Beat = Callable[[], None]
"""Called while time passes; may raise to give up."""


class Cache:
    """One process's view of the directory. Holds the entries that it uses until it is closed or the process ends."""

    def __init__(self, root: Path, *, limit: int | None) -> None:
        """`limit` is in bytes, None for all of the volume. Raises OSError when the directory cannot be written."""
        self._objects, self._incoming, self._locks = (root / name for name in ("objects", "incoming", "locks"))
        self._limit = limit
        self._held: dict[str, int] = {}
        for directory in (self._objects, self._incoming, self._locks):
            directory.mkdir(parents=True, exist_ok=True)
            with suppress(PermissionError):  # another user's, who has done so
                directory.chmod(0o2775)

    def get(self, digest: str, *, size: int, download: Callable[[Path], Any], beat: Beat) -> Path | None:
        """The file with that digest and `size` in bytes, downloaded unless it is there; None without room for it.

        Of several processes one downloads, and the others wait. The file stays until `close`. Raises what `download`
        and `beat` raise, and OSError.
        """
        name = hex_of(digest)
        path = self._objects / name
        if digest in self._held:
            return path
        use = self._lock(name, fcntl.LOCK_SH, beat)  # from here on nobody removes it
        try:
            if not self._whole(path, digest, beat):
                with self._locked(f"{name}{_MAKE}", beat):
                    there = self._whole(path, digest, beat)  # another has downloaded it while this one waited
                    if not there and not self._download(path, size, download, beat):
                        os.close(use)
                        return None
            path.touch()
        except BaseException:
            os.close(use)
            raise
        self._held[digest] = use
        return path

    def close(self) -> None:
        """Let others remove what this process has used."""
        for lock in self._held.values():
            os.close(lock)
        self._held.clear()

    def _lock(self, name: str, how: int, beat: Beat) -> int:
        while (lock := self._try_lock(name, how)) is None:
            beat()
            time.sleep(_WAIT)
        return lock

    def _try_lock(self, name: str, how: int = fcntl.LOCK_EX) -> int | None:
        """A descriptor that holds the lock; closing it lets go. None while others are in the way."""
        lock = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        return lock

    @contextmanager
    def _locked(self, name: str, beat: Beat) -> Iterator[None]:
        lock = self._lock(name, fcntl.LOCK_EX, beat)
        try:
            yield
        finally:
            os.close(lock)

    def _whole(self, path: Path, digest: str, beat: Beat) -> bool:
        """Whether the file is there and what its name says; removed when it is another."""
        hasher = Hasher(digest, threads=EVERYONE)
        try:
            with open(path, "rb", buffering=0) as file:
                while block := file.read(4 * MIB):
                    hasher.update(block)
                    beat()
        except FileNotFoundError:
            return False
        if hasher.digest() == digest:
            _log.info("%s... is in the cache", path.name[:16])
            return True
        _log.warning("%s... was damaged in the cache and is downloaded again", path.name[:16])
        path.unlink(missing_ok=True)
        return False

    def _download(self, path: Path, size: int, download: Callable[[Path], Any], beat: Beat) -> bool:
        incoming = self._incoming / path.name
        shutil.rmtree(incoming, ignore_errors=True)  # of a process that was killed: the lock is ours
        try:
            with self._locked(_ROOM, beat):
                if not self._make_room(size):
                    _log.warning("%s... (%d MiB) finds no room in the cache", path.name[:16], size // MIB)
                    return False
                incoming.mkdir()
                (incoming / "reserved").write_text(str(size))
            download(incoming / path.name)
            os.rename(incoming / path.name, path)
            sync(self._objects)
            _log.info("%s... (%d MiB) is downloaded into the cache", path.name[:16], size // MIB)
            return True
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _make_room(self, size: int) -> bool:
        """Remove entries nobody uses, those used longest ago first, until there is room for `size` bytes more."""
        reserved = self._reserved()
        entries = self._entries()
        used = sum(size for _, size, _ in entries)
        for _, occupied, path in entries:
            if self._fits(size, used=used, reserved=reserved):
                return True
            lock = self._try_lock(path.name)
            if lock is not None:
                path.unlink(missing_ok=True)
                os.close(lock)
                used -= occupied
                _log.info("%s... is removed from the cache, to make room", path.name[:16])
        return self._fits(size, used=used, reserved=reserved)

    def _entries(self) -> list[tuple[int, int, Path]]:
        """When the use of each began, in nanoseconds, its bytes and its path; the longest ago first."""
        found = []
        for path in self._objects.iterdir():
            with suppress(FileNotFoundError):  # it was damaged, and its user removes it
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(found)

    def _fits(self, size: int, *, used: int, reserved: int) -> bool:
        free = shutil.disk_usage(self._objects).free
        within = self._limit is None or used + reserved + size <= self._limit
        return within and size + reserved + _SPARE <= free

    def _reserved(self) -> int:
        """Bytes that downloads under way will take; what killed processes have left is removed."""
        total = 0
        for directory in self._incoming.iterdir():
            lock = self._try_lock(f"{directory.name}{_MAKE}")
            if lock is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)
            else:
                with suppress(OSError, ValueError):  # it has just ended, or just begun
                    total += int((directory / "reserved").read_text())
        return total
