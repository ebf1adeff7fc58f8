"""What is particular to a directory as a store."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from finetune_trainer.storage import AccessDenied, PreconditionFailed, StorageError, StorageSettings, open_store
from finetune_trainer.storage.files import TEMPORARY
from finetune_trainer.storage.local import LocalStore


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = open_store((tmp_path / "root").as_uri(), StorageSettings())
    assert isinstance(store, LocalStore)
    return store


def test_reading_makes_no_directory(local: LocalStore) -> None:
    assert local.head("a") is None
    assert list(local.list()) == []
    local.delete(["a"])
    assert not local.root.exists()


def test_only_objects_are_left_behind(local: LocalStore) -> None:
    etag = local.write("a/b", b"1").etag
    local.replace("a/b", b"2", if_match=etag)
    local.create("a/c", b"3")
    for _ in range(2):
        with pytest.raises(StorageError):
            local.create("a/c", b"4")
    assert sorted(path.name for path in local.root.rglob("*")) == ["a", "b", "c"]
    local.delete(["a/b", "a/c"])
    assert list(local.root.iterdir()) == []


def test_what_was_begun_a_day_ago_and_never_finished_is_removed_by_the_next_write(
    local: LocalStore, tmp_path: Path
) -> None:
    for write in (lambda: local.write("a/y", b"y"), lambda: local.upload(tmp_path / "file", "a/z")):
        (tmp_path / "file").write_bytes(b"z")
        local.write("a/x", b"x")
        old, young = (local.root / "a" / f"{TEMPORARY}{name}" for name in ("old", "young"))
        old.touch()
        young.touch()
        two_days_ago = time.time() - 2 * 86400
        os.utime(old, (two_days_ago, two_days_ago))
        os.utime(local.root / "a/x", (two_days_ago, two_days_ago))
        write()
        assert not old.exists()
        assert young.exists()
        assert local.read("a/x") == b"x"


def test_equal_content_written_twice_has_two_etags(local: LocalStore) -> None:
    assert len({local.write("a", b"same").etag for _ in range(200)}) == 200


def test_writing_never_leaves_the_root_through_a_link(local: LocalStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    local.write("here", b"1")
    (local.root / "way").symlink_to(outside)
    for write in (local.write, local.create):
        with pytest.raises(StorageError, match="symbolic link") as caught:
            write("way/file", b"x")
        assert caught.value.reason == "InvalidKey"
    (local.root / "file").symlink_to(outside / "target")
    local.write("file", b"x")
    assert list(outside.iterdir()) == []
    assert local.read("file") == b"x"


def test_a_file_that_grows_while_it_is_read_is_noticed(local: LocalStore) -> None:
    local.write("data", bytes(3 << 20))
    with local.stream("data") as source:
        source.read(10)
        with open(local.root / "data", "ab") as file:
            file.write(b"more")
        with pytest.raises(PreconditionFailed, match="appended"):
            source.read()


def test_a_directory_that_denies_is_named(tmp_path: Path) -> None:
    """Asked as another user where this one is root, who is denied nothing."""
    store = LocalStore(tmp_path / "root")
    store.write("a", b"1")
    store.root.chmod(0o500)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        with pytest.raises(AccessDenied, match=r"denied .Permission denied.*: give user") as caught:
            store.write("b", b"2")
    finally:
        os.seteuid(user)
        store.root.chmod(0o700)
    assert caught.value.reason == "AccessDenied"
    assert caught.value.environment


def test_a_limit_of_space_is_told_as_such_and_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(StorageError, match=r"File too large.*free space") as caught:
            store.write("a", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.reason == "NoSpace"
    assert list(tmp_path.iterdir()) == []
