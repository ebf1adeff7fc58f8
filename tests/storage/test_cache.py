"""The cache that pods share: one download for all, bounded, never wrong, whoever is killed when."""

import errno
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from finetune_trainer.storage.cache import Cache
from finetune_trainer.storage.digests import digest_of, hex_of

pytestmark = pytest.mark.timeout(60)
FORK = multiprocessing.get_context("fork")
# Below BLAKE3's chunk of 1 KiB: children of a fork could not use its threads.
FILES = [bytes([number]) * (1000 + number) for number in range(8)]


def name(data: bytes) -> str:
    return hex_of(digest_of(data))


def get(cache: Cache, data: bytes, *, download: Callable[[Path], object] | None = None) -> Path | None:
    return cache.get(
        digest_of(data), size=len(data), download=download or (lambda path: path.write_bytes(data)), beat=lambda: None
    )


def never(path: Path) -> None:
    raise AssertionError(f"{path} is downloaded again")


def left(root: Path) -> set[str]:
    return {path.name for path in (root / "objects").iterdir()}


def start(function: Callable[[], object]) -> BaseProcess:
    process = FORK.Process(target=function)
    process.start()
    return process


def test_a_file_is_downloaded_once_and_read_by_all(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def slowly(path: Path) -> None:
        with open(calls, "a") as log:
            log.write("x")
        time.sleep(0.5)
        path.write_bytes(FILES[0])

    def use() -> None:
        found = get(Cache(tmp_path / "cache", limit=None), FILES[0], download=slowly)
        assert found is not None
        assert found.read_bytes() == FILES[0]

    users = [start(use) for _ in range(4)]
    for user in users:
        user.join(60)
    assert [user.exitcode for user in users] == [0] * 4
    assert calls.read_text() == "x"


def test_an_entry_that_was_damaged_is_downloaded_again(tmp_path: Path) -> None:
    first = Cache(tmp_path, limit=None)
    path = get(first, FILES[1])
    assert path is not None
    first.close()
    path.write_bytes(FILES[1][:-1] + b"!")
    again = get(Cache(tmp_path, limit=None), FILES[1])
    assert again == path
    assert again.read_bytes() == FILES[1]
    assert get(Cache(tmp_path, limit=None), FILES[1], download=never) == path, "while another uses it"


def test_what_was_used_longest_ago_makes_room_and_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=3500)
    for number in (0, 1, 2):
        assert get(cache, FILES[number])
        cache.close()
    user = Cache(tmp_path, limit=3500)
    assert get(user, FILES[0], download=never)  # and so it is the last one used
    assert get(cache, FILES[3])
    assert left(tmp_path) == {name(FILES[number]) for number in (0, 2, 3)}
    assert get(user, FILES[2], download=never)
    assert get(Cache(tmp_path, limit=3500), FILES[4]) is None, "all three are in use"
    user.close()
    assert get(cache, FILES[4])
    assert name(FILES[3]) in left(tmp_path)
    assert len(left(tmp_path)) == 3


def test_a_file_larger_than_the_limit_or_the_volume_is_not_kept_and_removes_nothing_in_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=1500)
    assert get(cache, FILES[0])
    assert cache.get(digest_of(b"large"), size=1501, download=never, beat=lambda: None) is None
    assert Cache(tmp_path, limit=None).get(digest_of(b"large"), size=1 << 60, download=never, beat=lambda: None) is None
    assert left(tmp_path) == {name(FILES[0])}


def test_a_download_under_way_keeps_its_room(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    def slowly(path: Path) -> None:
        started.set()
        assert go.wait(30)
        path.write_bytes(FILES[0])

    first = Cache(tmp_path, limit=2000)
    thread = threading.Thread(target=lambda: get(first, FILES[0], download=slowly))
    thread.start()
    assert started.wait(30)
    assert get(Cache(tmp_path, limit=2000), FILES[1]) is None
    go.set()
    thread.join(30)
    assert get(Cache(tmp_path, limit=2000), FILES[1]) is None, "the file is in use"
    first.close()
    assert get(Cache(tmp_path, limit=2000), FILES[1])
    assert left(tmp_path) == {name(FILES[1])}


def test_a_download_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.EIO, "broken")

    cache = Cache(tmp_path, limit=None)
    with pytest.raises(OSError, match="broken"):
        get(cache, FILES[0], download=fail)
    assert not left(tmp_path)
    assert not list((tmp_path / "incoming").iterdir())
    assert get(cache, FILES[0])


def test_who_waits_can_give_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=None)
    lock = cache._try_lock(f"{name(FILES[0])}.make")
    assert lock is not None

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Cache(tmp_path, limit=None).get(digest_of(FILES[0]), size=1000, download=never, beat=stop)
    os.close(lock)


def test_what_a_killed_download_has_left_is_cleared_away_and_its_room_is_free(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def hang(path: Path) -> None:
        path.write_bytes(b"half")
        ready.touch()
        time.sleep(60)

    victim = start(lambda: get(Cache(tmp_path / "cache", limit=2000), FILES[0], download=hang))
    until = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(30)
    assert get(Cache(tmp_path / "cache", limit=2000), FILES[1]), "another file"
    assert not list((tmp_path / "cache/incoming").iterdir())


def test_whoever_is_killed_when_files_are_right_and_within_the_limit(tmp_path: Path) -> None:
    """Processes use, let go of and download entries at random, and are killed at random."""
    root, limit, done = tmp_path / "cache", 5000, tmp_path / "done"
    done.mkdir()

    def use(number: int) -> None:
        draw = random.Random(number)
        uses = 0
        for _ in range(60):
            cache = Cache(root, limit=limit)
            for data in draw.sample(FILES, 2):

                def slowly(path: Path, data: bytes = data) -> None:
                    path.write_bytes(data[:500])
                    time.sleep(draw.random() / 200)
                    path.write_bytes(data)

                found = get(cache, data, download=slowly)
                if found is not None:
                    assert found.read_bytes() == data
                    uses += 1
            occupied = 0
            for path in (root / "objects").iterdir():
                try:
                    occupied += path.stat().st_size
                except FileNotFoundError:
                    continue
            assert occupied <= limit + max(map(len, FILES)), "one may have gone while they were counted"
            cache.close()
        (done / str(number)).write_text(json.dumps(uses))

    draw = random.Random(0)
    processes = [start(lambda number=number: use(number)) for number in range(6)]  # type: ignore[misc]
    for victim in processes[:3]:
        time.sleep(draw.random() / 5)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes[3:]] == [0] * 3
    assert all(json.loads((done / str(number)).read_text()) > 20 for number in range(3, 6))
    last = Cache(root, limit=limit)
    assert get(last, FILES[0])
    assert not list((root / "incoming").iterdir())
    kept = list((root / "objects").iterdir())
    assert sum(path.stat().st_size for path in kept) <= limit
    assert all(name(path.read_bytes()) == path.name for path in kept)
