"""The Hub as a store, against a server that speaks its API."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.storage.hub import Hub, serve

from finetune_trainer.data.read import Row, Rows, locate
from finetune_trainer.storage import (
    AccessDenied,
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Store,
    Unavailable,
    Unreachable,
    open_store,
    split_uri,
)
from finetune_trainer.storage.digests import digest_of

WEIGHTS = bytes(range(256)) * 200
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "deep/notes.txt": b"deep", "empty.txt": b""}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield running


@pytest.fixture
def store(hub: Hub) -> Store:
    hub.commit("org/name", FILES)
    return open_store("hf://org/name", StorageSettings())


def test_a_repository_is_listed_and_read_as_any_store(store: Store) -> None:
    assert [(info.key, info.size) for info in store.list()] == [(name, len(FILES[name])) for name in sorted(FILES)]
    assert [info.key for info in store.list("deep/")] == ["deep/notes.txt"]
    assert list(store.list("nothing/")) == []
    assert {name: store.read(name) for name in FILES} == FILES
    assert store.read("model.safetensors", limit=8) == WEIGHTS[:8]
    assert store.head("nothing.json") is None
    assert store.head("deep") is None
    with store.stream("model.safetensors") as source:
        assert source.read(100) + source.read() == WEIGHTS


def test_the_digest_of_a_large_file_is_known_without_reading_it(hub: Hub, store: Store) -> None:
    info = store.head("model.safetensors")
    assert info is not None
    assert info.etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert info.digest == f"sha256:{info.etag}"
    assert not [request for request in hub.requests if "resolve" in request]


def test_a_revision_is_resolved_once_and_named_from_then_on(hub: Hub, store: Store) -> None:
    assert store.uri == "hf://org/name@main"
    before = store.read("config.json")
    commit = hub.branches["models", "org/name"]["main"]
    hub.commit("org/name", {"config.json": b'{"new": 1}'})
    assert store.read("config.json") == before
    assert store.uri == f"hf://org/name@{commit}"
    assert sum("/revision/" in request for request in hub.requests) == 1
    assert open_store(store.uri, StorageSettings()).read("config.json") == before
    assert open_store("hf://org/name", StorageSettings()).read("config.json") == b'{"new": 1}'


def test_another_version_than_the_one_asked_for_is_refused(hub: Hub, store: Store, tmp_path: Path) -> None:
    info = store.head("config.json")
    assert info is not None
    hub.commit("org/name", {"config.json": b'{"new": 1}'})
    with pytest.raises(PreconditionFailed, match="the revision has moved"):
        open_store("hf://org/name", StorageSettings()).download("config.json", tmp_path / "x", if_match=info.etag)


def test_a_branch_with_a_slash_and_a_directory_below_it(hub: Hub) -> None:
    hub.commit("org/name", FILES, branch="refs/pr/1")
    store = open_store("hf://org/name@refs%2Fpr%2F1/deep", StorageSettings())
    assert store.uri == "hf://org/name@refs%2Fpr%2F1/deep"
    assert [info.key for info in store.list()] == ["notes.txt"]
    assert store.read("notes.txt") == b"deep"


def test_a_download_is_whole_or_not_there(hub: Hub, store: Store, tmp_path: Path) -> None:
    done: list[int] = []
    info = store.download("model.safetensors", tmp_path / "weights", progress=done.append)
    assert (tmp_path / "weights").read_bytes() == WEIGHTS
    assert info.digest == digest_of(WEIGHTS)
    assert done[-1] == len(WEIGHTS)
    with pytest.raises(Damaged):
        store.download("config.json", tmp_path / "config", digest="blake3:" + "0" * 64)
    commit = hub.branches["models", "org/name"]["main"]
    listed = hub.commits["models", "org/name"][commit]
    listed["model.safetensors"] = b"\xff" + WEIGHTS[1:]  # what is stored no longer has the digest it is listed by
    with pytest.raises((Damaged, PreconditionFailed)):
        store.download("model.safetensors", tmp_path / "again", digest=info.digest)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_cut_connection_and_a_short_outage_are_got_over(hub: Hub, store: Store) -> None:
    hub.cut = 1000
    assert store.read("model.safetensors") == WEIGHTS
    hub.failures = [503, 503]
    assert store.read("model.safetensors") == WEIGHTS


def test_rows_of_a_dataset_repository_are_found_by_a_pattern(hub: Hub, tmp_path: Path) -> None:
    rows = b'{"text": "a"}\n'
    hub.commit("org/rows", {f"data/{part}.jsonl": rows * part for part in (1, 2)}, kind="datasets")
    found = locate("hf://datasets/org/rows@main/data/*.jsonl", StorageSettings())
    read = [Rows(place.store, place.key, uri=place.uri, wanted=("text",), scratch=tmp_path) for place in found]
    assert [sum(isinstance(row, Row) for row in rows) for rows in read] == [1, 2]
    assert read[1].digest == digest_of(rows * 2)


def test_a_private_repository_opens_with_the_token_among_the_credentials(hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/private", FILES)
    hub.tokens["org/private"] = "hf_t0ken"
    with pytest.raises(NotFound, match=r"or it is private \(no token; give HF_TOKEN\)") as error:
        open_store("hf://org/private", StorageSettings()).read("config.json")
    assert error.value.environment
    (tmp_path / "HF_TOKEN").write_text("hf_t0ken\n")
    store = open_store("hf://org/private", StorageSettings(credentials_dir=tmp_path))
    assert store.read("config.json") == b"{}"
    (tmp_path / "HF_TOKEN").write_text("wrong")
    with pytest.raises(NotFound) as error:
        open_store("hf://org/private", StorageSettings(credentials_dir=tmp_path)).read("config.json")
    assert "wrong" not in error.value.message


def test_what_is_missing_or_denied_is_named(hub: Hub, store: Store) -> None:
    with pytest.raises(NotFound, match=r"There is no object hf://org/name@\w+/none.txt"):
        store.read("none.txt")
    with pytest.raises(NotFound, match="no revision v9"):
        list(open_store("hf://org/name@v9", StorageSettings()).list())
    with pytest.raises(NotFound, match="no repository org/other"):
        list(open_store("hf://org/other", StorageSettings()).list())
    hub.gated.add("org/name")
    with pytest.raises(AccessDenied, match="gated; accept its terms"):
        list(open_store("hf://org/name", StorageSettings()).list())


def test_an_outage_ends_as_unavailable_and_a_wrong_address_as_unreachable(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.head("config.json")
    hub.failures = [500] * 50
    with pytest.raises(Unavailable, match="the Hub answered 500"):
        store.read("config.json")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"Nothing answered at http://127.0.0.1:9"):
        list(open_store("hf://org/name", StorageSettings()).list())


def test_the_hub_is_asked_although_libraries_are_told_not_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert store.read("config.json") == b"{}"
    assert constants.HF_HUB_OFFLINE


def test_nothing_is_written_to_the_hub(store: Store, tmp_path: Path) -> None:
    for write in (
        lambda: store.write("a", b""),
        lambda: store.create("a", b""),
        lambda: store.replace("a", b"", if_match=None),
        lambda: store.upload(tmp_path, "a"),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(StorageError, match="the Hub is read only") as error:
            write()
        assert error.value.reason == "ReadOnly"


@pytest.mark.parametrize("uri", ["hf://name", "hf://", "hf://org/name@a@b", "hf://org//x", "hf://org/na me/x"])
def test_an_address_that_names_no_repository_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="names no store"):
        split_uri(uri)


def test_addresses_are_split_into_repository_and_path() -> None:
    assert split_uri("hf://org/name@v1/a/b.json") == ("hf://org/name@v1", "a/b.json")
    assert split_uri("hf://datasets/org/name/b.json") == ("hf://datasets/org/name", "b.json")
