"""What every store promises, asked of the local directory and of the real S3 server alike."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from finetune_trainer.storage import (
    AlreadyExists,
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Store,
    open_store,
    probe_conditional_writes,
    remove_old_probes,
    split_uri,
)
from finetune_trainer.storage.digests import digest_of

MIB = 1 << 20


def in_threads(count: int, work: Callable[[int], str]) -> list[str]:
    """Run work(0..count-1) at once and return what each said."""
    gate = threading.Barrier(count)

    def start(number: int) -> str:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def test_what_is_written_is_read(store: Store) -> None:
    written = store.write("a/b.json", b"content")
    assert (written.key, written.size, written.digest) == ("a/b.json", 7, digest_of(b"content"))
    assert store.read("a/b.json") == b"content"
    assert store.read("a/b.json", limit=4) == b"cont"
    assert store.read("a/b.json", limit=99) == b"content"
    store.write("a/b.json", b"")
    assert store.read("a/b.json") == b""
    assert store.read("a/b.json", limit=4) == b""


def test_head_describes_an_object_and_knows_a_missing_one(store: Store) -> None:
    assert store.head("a/b") is None
    written = store.write("a/b", b"content")
    found = store.head("a/b")
    assert found is not None
    assert (found.key, found.size, found.etag) == ("a/b", 7, written.etag)
    assert found.modified is not None
    assert abs(found.modified - store.now()) < timedelta(seconds=10)
    assert store.head("a") is None


def test_the_store_has_a_clock(store: Store) -> None:
    store.write("a", b"1")
    assert abs(store.now() - datetime.now(UTC)) < timedelta(seconds=5)


def test_a_list_is_recursive_and_in_the_order_of_the_keys(store: Store) -> None:
    assert list(store.list()) == []
    for key in ("x/b/c", "x/b-c", "x/bb", "x/a", "y", "Ü/ñ"):
        store.write(key, key.encode())
    assert [info.key for info in store.list()] == ["x/a", "x/b-c", "x/b/c", "x/bb", "y", "Ü/ñ"]
    assert [info.key for info in store.list("x/b")] == ["x/b-c", "x/b/c", "x/bb"]
    assert [info.key for info in store.list("x/b/")] == ["x/b/c"]
    assert list(store.list("nothing/")) == []
    listed = next(iter(store.list("y")))
    assert listed.etag == (store.head("y") or listed).etag
    assert listed.size == 1


def test_a_list_goes_past_the_first_page(store: Store) -> None:
    in_threads(8, lambda part: [store.write(f"many/{part}-{number}", b"") for number in range(130)] and "")
    assert len(list(store.list("many/"))) == 1040


def test_a_missing_object_is_named_with_the_remedy(store: Store, tmp_path: Path) -> None:
    for read in (
        lambda: store.read("no/such"),
        lambda: store.download("no/such", tmp_path / "file"),
        lambda: store.stream("no/such").__enter__(),
    ):
        with pytest.raises(NotFound, match="no/such") as caught:
            read()
        assert caught.value.reason == "ObjectNotFound"
        assert caught.value.environment
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("key", ["../secret", "a/../../secret", "/etc/passwd", "", "a//b", "a/", "./a", "a\0b"])
def test_a_key_cannot_leave_the_root(store: Store, key: str) -> None:
    for use in (
        lambda: store.read(key),
        lambda: store.head(key),
        lambda: store.write(key, b""),
        lambda: store.delete([key]),
    ):
        with pytest.raises(StorageError) as caught:
            use()
        assert caught.value.reason == "InvalidKey"
        assert not caught.value.environment


def test_reads_are_of_the_version_asked_for(store: Store, tmp_path: Path) -> None:
    old = store.write("a", b"first")
    assert store.read("a", if_match=old.etag) == b"first"
    store.write("a", b"other")
    for read in (
        lambda: store.read("a", if_match=old.etag),
        lambda: store.download("a", tmp_path / "file", if_match=old.etag),
        lambda: store.stream("a", if_match=old.etag).__enter__(),
    ):
        with pytest.raises(PreconditionFailed) as caught:
            read()
        assert caught.value.reason == "ObjectChanged"
        assert not caught.value.environment
    assert list(tmp_path.glob("*file*")) == []


def test_a_large_file_goes_up_and_down_unchanged(store: Store, tmp_path: Path) -> None:
    data = os.urandom(64 * MIB + 12345)
    source, target, seen = tmp_path / "source", tmp_path / "deep" / "target", list[int]()
    source.write_bytes(data)
    sent = store.upload(source, "big/model.safetensors", progress=seen.append)
    assert (sent.size, sent.digest) == (len(data), digest_of(data))
    assert (len(seen) > 4, seen, seen[-1]) == (True, sorted(seen), len(data))
    seen.clear()
    got = store.download(sent.key, target, if_match=sent.etag, digest=sent.digest, progress=seen.append)
    assert target.read_bytes() == data
    assert (got.size, got.digest, got.etag) == (len(data), sent.digest, sent.etag)
    assert seen == sorted(seen)
    assert seen[-1] == len(data)
    with pytest.raises(PreconditionFailed):
        store.download(sent.key, tmp_path / "other", if_match="0" * 32)
    with pytest.raises(Damaged, match="digest") as caught:
        store.download(sent.key, tmp_path / "other", digest="0" * 64)
    assert caught.value.reason == "ChecksumMismatch"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source"]


@pytest.mark.parametrize("size", [0, 1, 16 * MIB, 16 * MIB + 1])
def test_every_size_is_copied_exactly(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    sent = store.upload(tmp_path / "source", "file")
    got = store.download("file", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert sent.digest == got.digest == digest_of(data)


def test_a_stream_reads_by_pieces_and_lines(store: Store) -> None:
    lines = [b"line %d\n" % number for number in range(300_000)]
    store.write("lines", b"".join(lines))
    with store.stream("lines") as source:
        assert source.read(5) == b"line "
        assert source.readline() == b"0\n"
        assert list(source) == lines[1:]
        assert source.read() == b""


def test_create_happens_exactly_once(store: Store) -> None:
    store.create("log/1", b"first")
    with pytest.raises(AlreadyExists, match="log/1") as caught:
        store.create("log/1", b"second")
    assert caught.value.reason == "AlreadyExists"
    assert store.read("log/1") == b"first"


def test_of_racing_creates_one_wins_in_each_of_20_races(store: Store) -> None:
    def create(number: int) -> str:
        try:
            store.create(f"race/{number % 20}", b"%d" % number)
        except AlreadyExists:
            return "lost"
        return str(number)

    said = in_threads(80, create)
    for race in range(20):
        winners = [answer for answer in said[race::20] if answer != "lost"]
        assert winners == [store.read(f"race/{race}").decode()]


def test_replace_needs_the_version_it_was_shown(store: Store) -> None:
    with pytest.raises(PreconditionFailed):
        store.replace("current", b"0", if_match="0" * 32)
    first = store.replace("current", b"1", if_match=None)
    with pytest.raises(PreconditionFailed):
        store.replace("current", b"2", if_match=None)
    second = store.replace("current", b"2", if_match=first.etag)
    with pytest.raises(PreconditionFailed) as caught:
        store.replace("current", b"3", if_match=first.etag)
    assert caught.value.reason == "ObjectChanged"
    assert store.read("current", if_match=second.etag) == b"2"


def test_of_racing_replaces_one_wins_in_each_of_20_races(store: Store) -> None:
    etags = [store.write(f"counter/{race}", b"start").etag for race in range(20)]

    def swap(number: int) -> str:
        try:
            return store.replace(f"counter/{number % 20}", b"%d" % number, if_match=etags[number % 20]).etag
        except PreconditionFailed:
            return "lost"

    said = in_threads(80, swap)
    for race in range(20):
        found = store.head(f"counter/{race}")
        assert found is not None
        assert [answer for answer in said[race::20] if answer != "lost"] == [found.etag]


def test_delete_forgets_objects_and_forgives_missing_ones(store: Store) -> None:
    store.delete(["never/was"])
    for key in ("a/1", "a/2", "b"):
        store.write(key, b"x")
    store.delete(["a/1", "a/2", "a/3"])
    store.delete([])
    assert [info.key for info in store.list()] == ["b"]
    store.write("a/1", b"again")
    assert store.read("a/1") == b"again"


def test_conditional_writes_are_probed_without_a_trace(store: Store) -> None:
    assert probe_conditional_writes(store, "runs/x")
    assert list(store.list()) == []


def test_probes_that_killed_processes_have_left_go_when_they_are_old(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("probe-notes.txt", "probe-00000000000000aa/a", "runs/probe-0123456789abcdef", "a")
    for key in ("probe-0123456789abcdef", "probe-ffffffffffffffff", *kept):
        store.write(key, b"first")
    assert remove_old_probes(store, "") == []
    now = store.now() + timedelta(hours=2)
    monkeypatch.setattr(store, "now", lambda: now)
    assert remove_old_probes(store, "") == ["probe-0123456789abcdef", "probe-ffffffffffffffff"]
    assert remove_old_probes(store, "runs/") == ["runs/probe-0123456789abcdef"]
    assert {info.key for info in store.list()} == {*kept} - {"runs/probe-0123456789abcdef"}


def test_a_download_that_is_interrupted_leaves_nothing(store: Store, tmp_path: Path) -> None:
    store.write("big", bytes(20 * MIB))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.download("big", tmp_path / "out" / "file", progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_download_that_is_killed_is_never_taken_for_whole(store: Store, tmp_path: Path) -> None:
    store.write("big", bytes(20 * MIB))
    settings = getattr(store, "settings", StorageSettings())
    script = (
        "import os, signal, sys; from pathlib import Path; from finetune_trainer.storage import *\n"
        "endpoint, credentials = sys.argv[2:]\n"
        "settings = StorageSettings(endpoint or None, 'us-east-1', Path(credentials) if credentials else None)\n"
        "store = open_store(sys.argv[1], settings)\n"
        "store.download('big', Path('file'), progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    arguments = [store.uri, settings.endpoint or "", str(settings.credentials_dir or "")]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "file").exists()
    here = open_store(tmp_path.as_uri(), StorageSettings())
    assert not [info.key for info in here.list() if "/" not in info.key]


def test_an_object_seen_during_writes_is_always_whole(store: Store) -> None:
    values = [bytes([number]) * 300_000 for number in range(6)]
    store.write("shared", values[0])

    def work(number: int) -> str:
        for turn in range(15):
            if number < 2:
                store.write("shared", values[(turn + number) % 6])
            else:
                assert store.read("shared") in values
        return "done"

    assert in_threads(4, work) == ["done"] * 4


def test_an_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(NotFound("ObjectNotFound", "gone")))
    assert (type(error), error.reason, str(error), error.environment) == (NotFound, "ObjectNotFound", "gone", True)


@pytest.mark.parametrize(
    "uri", ["", "x", "/tmp/x", "gs://bucket/x", "s3:/bucket", "s3://", "file://host/x", "s3://u:p@b/x"]
)
def test_an_unknown_uri_is_refused_with_the_schemes_that_exist(uri: str) -> None:
    with pytest.raises(StorageError, match=r"s3://.*file://") as caught:
        open_store(uri, StorageSettings())
    assert caught.value.reason == "InvalidUri"
    assert not caught.value.environment


def test_a_uri_is_split_into_store_and_key() -> None:
    assert split_uri("s3://bucket/a/b c%20.jsonl") == ("s3://bucket", "a/b c%20.jsonl")
    assert split_uri("file:///data/x%20y/train.jsonl") == ("file:///data/x%20y", "train.jsonl")
    assert split_uri("file:///train.jsonl") == ("file:///", "train.jsonl")
    for uri in ("s3://bucket", "s3://bucket/", "s3://bucket/a/", "file:///"):
        with pytest.raises(StorageError, match="names no object"):
            split_uri(uri)
