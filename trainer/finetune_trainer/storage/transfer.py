"""Large files in parallel: byte ranges written straight into place, and parts read ahead within bounded memory."""

import errno
import fcntl
import os
import select
import socket
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from .base import MIB
from .digests import Hasher
from .files import PIECE, file_changed

D = TypeVar("D")
T = TypeVar("T")

WORKERS = min(max(4, 2 * len(os.sched_getaffinity(0))), 16)
"""Ranges of a file on their way at once. A connection to S3 brings 85 to 90 MB/s (its performance guidelines), so that
many processors want many of them. Two are busy with four: more would only let the digest begin later."""
AHEAD = WORKERS + 1
"""Ranges begun before the digest comes to them. More would take its processor, and leave it to do at the end."""
UPLOAD_WORKERS = 4
_BEAT = 1.0
"""Seconds after which whoever waits for a part is told that it is still on its way."""
# S3 allows 10,000 parts; a range is large enough to hide the latency of its request and small enough to be repeated.
_MAX_PARTS = 10_000
_MIN_PART = 16 * MIB
_FEW_PARTS = 16
_MAX_RANGE = 64 * MIB
_FLUSHED = 64 * MIB
"""Bytes that are written to the disk at once, while later ones arrive."""
BLOCK = 256 * 1024
"""Bytes that are received, written or hashed at once: they stay in the processor's cache meanwhile."""
_SPLICED = 256 * 1024
"""Bytes that the kernel moves into a file at once: 64 KiB take a tenth more processor time. On a machine that had given
memory back (`files.PIECE`) 256 KiB have also cost twice as much; on another, after idle time, no more."""

_UNKNOWN_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""How a kernel, or a file's system, says that it does not know splice(2) or sendfile(2)."""


class Stopped(Exception):
    """The transfer ended with an error elsewhere; this range or part need not go on."""


class Disconnected(Exception):
    """The connection broke while a body was on its way."""


def range_size(size: int) -> int:
    """Bytes of one download range: 16 to 64 MiB, so that large files keep all workers busy with few requests.

    Multiples of 16 MiB, as servers keep objects in blocks of 4 or 8.
    """
    return min(max(_MIN_PART, size // (WORKERS * 4) // _MIN_PART * _MIN_PART), _MAX_RANGE)


def part_size(size: int) -> int:
    """Bytes of one upload part: 16 MiB, from 512 MiB on 32, or as many more as it takes to have 10,000 parts at most.

    Each part costs a millisecond or two of processor for its request alone.
    """
    least = -(-size // _MAX_PARTS)
    usual = _MIN_PART if size < 2 * _MIN_PART * _FEW_PARTS else 2 * _MIN_PART
    return max(usual, -(-least // MIB) * MIB)


class Target:
    """A file that is filled at several places at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stopped = threading.Event()
        # The kernel lets one write at a time into a file, and burns a processor for each that waits.
        self._writing = threading.Lock()

    def stop(self) -> None:
        """Let nobody write any more."""
        self._stopped.set()

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes in their place. Raises Stopped, and OSError for what the file's system refuses."""
        with self._writing:
            self._put(offset, data)

    def splice(self, offset: int, pipe: int, size: int) -> None:
        """Put the next `size` bytes of a pipe in their place. Raises as `write` does."""
        with self._writing:
            while size:
                self._check()
                most = min(size, _SPLICED)
                try:
                    moved = os.splice(pipe, self._descriptor, most, offset_dst=offset)
                except OSError as error:
                    if error.errno not in _UNKNOWN_CALL:
                        raise
                    data = os.read(pipe, most)
                    self._put(offset, data)
                    moved = len(data)
                size, offset = size - moved, offset + moved

    def _put(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._check()
            written = os.pwrite(self._descriptor, view[:PIECE], offset)
            view, offset = view[written:], offset + written

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped


class Response(HTTPResponse):
    """An answer over plain HTTP whose body the kernel can move into a file: it is not copied through this process."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._socket = sock

    def pour(self, target: Target, offset: int, length: int) -> Iterator[int]:
        """Move the next `length` bytes, but for a few, to `offset` of the file; yields how many, each time.

        The last few are to be read, which gives the connection back. Moves fewer, or none, where the body ends early,
        has no known length, or the kernel does not know how. Raises Disconnected, Stopped, and OSError for what the
        file's system refuses.
        """
        left = min(length, self.length or 0) - _SPLICED
        if left <= 0:
            return
        with _disconnected():  # all that came together with the header; the rest is in the socket
            data = self.read1(min(left, BLOCK))
        target.write(offset, data)
        yield len(data)
        left, offset = left - len(data), offset + len(data)
        with closing(Pipe()) as pipe:
            while left and (moved := pipe.take(self._socket, left)):
                self.length = (self.length or 0) - moved
                target.splice(offset, pipe.end, moved)
                yield moved
                left, offset = left - moved, offset + moved


class Pipe:
    """What splice(2) moves the bytes of a socket into, on their way to a file."""

    def __init__(self) -> None:
        self.end, self._begin = os.pipe()
        with suppress(OSError):  # all large pipes of a user have a limit together
            fcntl.fcntl(self._begin, fcntl.F_SETPIPE_SZ, MIB)

    def take(self, sock: socket.socket, most: int) -> int:
        """Wait for bytes and take up to `most` of them; returns how many, none where there will be no more of them or
        the kernel does not know how. Raises Disconnected."""
        with _disconnected():
            while True:
                try:
                    return os.splice(sock.fileno(), self._begin, min(most, MIB))
                except BlockingIOError:
                    _wait(sock, select.POLLIN)
                except OSError as error:
                    if error.errno not in _UNKNOWN_CALL:
                        raise
                    return 0

    def close(self) -> None:
        """Let go of both ends, and of what is in between."""
        os.close(self._begin)
        os.close(self.end)


@contextmanager
def _disconnected() -> Iterator[None]:
    """Tell what a connection fails with from what a file does."""
    try:
        yield
    except TimeoutError as error:
        raise Disconnected("Read timed out") from error
    except (OSError, HTTPException) as error:
        raise Disconnected(str(error) or type(error).__name__) from error


def fetch_ranges(
    fetch: Callable[[int, int, Target], None],
    path: Path,
    size: int,
    *,
    like: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Fill a file with `size` bytes by parallel calls of fetch(offset, length, target); returns its digest.

    The digest, of the kind of `like`, is taken of the file itself, range by range while later ones arrive, so it covers
    what was written. The first error of a range ends the others and is raised.
    """
    length = range_size(size)
    starts = range(0, size, length)
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(WORKERS, "download") as pool:
        descriptor = file.fileno()
        if size:
            os.posix_fallocate(descriptor, 0, size)  # a full disk is found out before anything is fetched
        target = Target(descriptor)

        def begin(start: int) -> Future[None]:
            return pool.submit(fetch, start, min(length, size - start), target)

        try:
            with _flushed(descriptor) as flush:

                def advance(done: int) -> None:
                    flush(done)
                    if progress is not None:
                        progress(done)

                return _digest_in_order(descriptor, Hasher(like), map(begin, starts), length, size, advance)
        except BaseException:
            target.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _digest_in_order(
    descriptor: int,
    hasher: Hasher,
    ranges: Iterator[Future[None]],
    length: int,
    size: int,
    progress: Callable[[int], None],
) -> str:
    buffer, done = memoryview(bytearray(MIB)), 0
    waiting = deque(islice(ranges, AHEAD))
    while waiting:
        waiting.popleft().result()
        waiting.extend(islice(ranges, 1))
        end = min(done + length, size)
        while done < end:
            read = os.preadv(descriptor, [buffer[: end - done]], done)
            hasher.update(buffer[:read])
            done += read
        progress(done)
    return hasher.digest()


@contextmanager
def _flushed(descriptor: int) -> Iterator[Callable[[int], None]]:
    """Have a file written to the disk while it grows: the kernel would begin with that at its final fsync.

    Gives a function that takes how many bytes there are. Raises OSError for what the disk says: it says it once.
    """
    with ThreadPoolExecutor(1, "flush") as pool:
        last, flushing = 0, Future[None]()
        flushing.set_result(None)

        def flush(done: int) -> None:
            nonlocal last, flushing
            if done - last >= _FLUSHED and flushing.done():
                flushing.result()
                last, flushing = done, pool.submit(os.fdatasync, descriptor)

        yield flush
        flushing.result()


class Checksum(Protocol):
    """A checksum in the making, as hashlib has them."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""
        ...

    def digest(self) -> bytes:
        """The checksum of all bytes so far."""
        ...


class Crc32:
    """CRC-32, four bytes with the highest first."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


@dataclass(frozen=True)
class FilePart:
    """A stretch of an open file and the checksum of its bytes."""

    source: BinaryIO
    offset: int
    size: int
    checksum: bytes
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set when the part need not be sent any more."""

    def body(self) -> "FileBody":
        """The bytes as a file of their own."""
        return FileBody(self)


class FileBody:
    """A part as HTTP clients take a request's body: read piece by piece while it is sent, never whole in memory."""

    def __init__(self, part: FilePart) -> None:
        self.part, self._position = part, 0

    def __len__(self) -> int:
        return self.part.size

    def read(self, size: int = -1) -> bytes:
        """The next bytes, none at the end. Raises FileChanged when the file has become shorter, Stopped."""
        self.check()
        left = self.part.size - self._position
        wanted = left if size < 0 else min(size, left)
        data = os.pread(self.part.source.fileno(), wanted, self.part.offset + self._position)
        if len(data) < wanted:
            raise file_changed(Path(self.part.source.name))
        self._position += wanted
        return data

    def check(self) -> None:
        """Raise Stopped when the part need not be sent any more."""
        if self.part.stopped.is_set():
            raise Stopped

    def tell(self) -> int:
        """Where the next bytes are read."""
        return self._position

    def seek(self, position: int) -> int:
        """Go to `position`, counted from the beginning."""
        self._position = position
        return position


def send_file(body: FileBody, sock: socket.socket) -> None:
    """Send the rest of a body by sendfile(2), or as it is read where the file's system does not know that.

    Raises StorageError FileChanged when the file has become shorter, TimeoutError when the other end takes nothing,
    Stopped.
    """
    part = body.part
    while body.tell() < part.size:
        body.check()
        at = part.offset + body.tell()
        try:
            sent = os.sendfile(sock.fileno(), part.source.fileno(), at, part.size - body.tell())
        except BlockingIOError:
            _wait(sock, select.POLLOUT)
            continue
        except OSError as error:
            if error.errno not in _UNKNOWN_CALL:
                raise
            sock.sendall(body.read(BLOCK))
            continue
        if not sent:
            raise file_changed(Path(part.source.name))
        body.seek(body.tell() + sent)


def _wait(sock: socket.socket, until: int) -> None:
    """A socket with a time limit does not block by itself. Raises TimeoutError when the limit is over."""
    limit = sock.gettimeout()
    poll = select.poll()
    poll.register(sock, until)
    if not poll.poll(None if limit is None else limit * 1000):
        raise TimeoutError("timed out")


def read_parts(
    source: BinaryIO, size: int, *, whole: Hasher, each: Callable[[], Checksum], stopped: threading.Event | None = None
) -> Iterator[FilePart]:
    """Cut a file into parts of `size` bytes with a checksum of each() and add all bytes to `whole`, in order.

    The bytes are read again when they are sent, out of the page cache: that is cheaper than to keep them in memory.
    """
    buffer, offset = memoryview(bytearray(BLOCK)), 0
    stopped = stopped or threading.Event()
    while True:
        checksum, length = each(), 0
        while read := os.preadv(source.fileno(), [buffer[: size - length]], offset + length):
            whole.update(buffer[:read])
            checksum.update(buffer[:read])
            length += read
        if length:
            yield FilePart(source, offset, length, checksum.digest(), stopped)
        if length < size:
            return
        offset += length


def send_parts(
    send: Callable[[int, D], T],
    parts: Iterator[D],
    *,
    beat: Callable[[], None] = lambda: None,
    stop: Callable[[], None] = lambda: None,
) -> list[T]:
    """Call send(number from 1, part) for every part, UPLOAD_WORKERS at a time; returns the results in order.

    At most UPLOAD_WORKERS + 1 parts are taken and not done. `beat` is called for each part and every second. The first
    error, of a part or of `beat`, is raised when those under way have ended, which `stop` is to bring about.
    """
    results: list[Future[T]] = []
    with ThreadPoolExecutor(UPLOAD_WORKERS, "upload") as pool:
        try:
            for number, part in enumerate(parts, 1):
                beat()
                if number > UPLOAD_WORKERS:
                    _awaited(results[number - 1 - UPLOAD_WORKERS], beat)
                results.append(pool.submit(send, number, part))
            return [_awaited(result, beat) for result in results]
        except BaseException:
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _awaited(result: Future[T], beat: Callable[[], None]) -> T:
    while not wait([result], timeout=_BEAT).done:
        beat()
    return result.result()
