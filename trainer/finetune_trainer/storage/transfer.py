"""Large files in parallel: byte ranges written straight into place, and parts read ahead within bounded memory."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .base import MIB
from .files import PIECE

WORKERS = 8
UPLOAD_WORKERS = 4
# S3 allows 10,000 parts; a range is large enough to hide the latency of its request and small enough to be repeated.
_MAX_PARTS = 10_000
_MIN_PART = 16 * MIB
_MAX_RANGE = 64 * MIB

Write = Callable[[int, bytes], None]
"""Put bytes at an offset of the file."""


class Stopped(Exception):
    """The transfer ended with an error elsewhere; this range need not go on."""


def range_size(size: int) -> int:
    """Bytes of one download range: 16 to 64 MiB, so that large files keep all workers busy with few requests."""
    return min(max(_MIN_PART, size // (WORKERS * 8)), _MAX_RANGE)


def part_size(size: int) -> int:
    """Bytes of one upload part: at least 16 MiB, and large enough for the file to fit into 10,000 parts."""
    least = -(-size // _MAX_PARTS)
    return max(_MIN_PART, -(-least // MIB) * MIB)


def fetch_ranges(
    fetch: Callable[[int, int, Write], None],
    target: Path,
    size: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Fill `target` with `size` bytes by parallel calls of fetch(offset, length, write); returns the hex SHA-256.

    The digest is taken of the file itself, range by range while later ones arrive, so it covers what was written.
    The first error of a range ends the others and is raised.
    """
    stop = threading.Event()
    length = range_size(size)
    starts = range(0, size, length)
    with open(target, "r+b", buffering=0) as file, ThreadPoolExecutor(WORKERS, "download") as pool:
        descriptor = file.fileno()
        if size:
            os.posix_fallocate(descriptor, 0, size)  # a full disk is found out before anything is fetched

        def write(offset: int, data: bytes) -> None:
            if stop.is_set():
                raise Stopped
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view[:PIECE], offset)
                view, offset = view[written:], offset + written

        waiting = deque(pool.submit(fetch, start, min(length, size - start), write) for start in starts)
        try:
            return _digest_in_order(descriptor, waiting, length, size, progress)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _digest_in_order(
    descriptor: int,
    waiting: "deque[Future[None]]",
    length: int,
    size: int,
    progress: Callable[[int], None] | None,
) -> str:
    sha256 = hashlib.sha256()
    done = 0
    while waiting:
        waiting.popleft().result()
        end = min(done + length, size)
        while done < end:
            block = os.pread(descriptor, min(4 * MIB, end - done), done)
            sha256.update(block)
            done += len(block)
        if progress is not None:
            progress(done)
    return sha256.hexdigest()


def send_parts(send: Callable[[int, bytes], str], parts: Iterator[bytes]) -> list[str]:
    """Call send(number from 1, bytes) for every part, a few at a time; returns the results in order.

    At most UPLOAD_WORKERS + 1 parts are in memory. The first error is raised after those under way have ended.
    """
    results: list[Future[str]] = []
    with ThreadPoolExecutor(UPLOAD_WORKERS, "upload") as pool:
        for number, part in enumerate(parts, 1):
            if number > UPLOAD_WORKERS:
                results[number - 1 - UPLOAD_WORKERS].result()
            results.append(pool.submit(send, number, part))
        return [result.result() for result in results]
