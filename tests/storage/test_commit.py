"""The log of a run, on both stores: what is committed, who may commit, what is garbage."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from finetune_trainer.storage import ObjectInfo, StorageError, StorageSettings, Store, Unavailable, open_store
from finetune_trainer.storage.commit import (
    Claim,
    Fenced,
    Holder,
    Record,
    RecordKind,
    RunLog,
    Staging,
    _sealed,
    collect_garbage,
    decode,
    find,
    holder_of,
    latest_checkpoint,
    live_checkpoints,
    object_entry,
    publish_current,
    published,
    read_current,
    uncommitted,
)
from finetune_trainer.storage.local import LocalStore
from finetune_trainer.storage.s3 import S3Store

T = TypeVar("T")
MIB = 1024 * 1024
RUN = "1f3a9c0d2b7e4a55"


class SlowStore(LocalStore):
    """Takes its time for each object."""

    SECONDS = 0.02
    asked = 0

    def read(self, key: str, *, if_match: str | None = None, limit: int | None = None) -> bytes:
        self.asked += 1
        time.sleep(self.SECONDS)
        return super().read(key, if_match=if_match, limit=limit)


def holder(name: str) -> Holder:
    return Holder(job_uid="job", owner="owner", pod_uid=name)


def in_threads(count: int, work: Callable[[int], T]) -> list[T]:
    gate = threading.Barrier(count)

    def start(number: int) -> T:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def checkpoint(store: Store, claim: Claim, step: int, *, live: list[int] | None = None) -> tuple[Record, ObjectInfo]:
    """Data first, then the record."""
    info = store.write(f"{claim.prefix}step-{step}/0.safetensors", b"weights %d" % step)
    body = {"step": step, "objects": [object_entry(info)]}
    return claim.append(RecordKind.CHECKPOINT, body, live=live), info


def test_an_empty_log_is_no_error(store: Store) -> None:
    log = RunLog(store, RUN)
    assert log.read() == []
    assert log.damaged == []
    assert latest_checkpoint([]) is None
    assert published([]) is None


def test_records_are_read_back_in_order_with_all_they_say(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"), numerics={"precision": "fp32", "worldSize": 1})
    baseline = claim.append(RecordKind.BASELINE, {"f1": 0.1, "ü": [1, 2.5, None, {"x": True}]})
    first, _ = checkpoint(store, claim, 1)
    second, _ = checkpoint(store, claim, 2)
    done = claim.append(RecordKind.PUBLISHED, {"end": "complete"})
    assert claim.prefix == f"runs/{RUN}/attempts/1/"
    assert [info.key for info in store.list(f"runs/{RUN}/log/")] == [f"runs/{RUN}/log/{n}.json" for n in range(1, 6)]

    records = RunLog(store, RUN).read()
    assert records == [claim.record, baseline, first, second, done]
    assert [record.number for record in records] == [1, 2, 3, 4, 5]
    assert {record.attempt for record in records} == {1}
    assert [record.previous for record in records] == ["", *(record.sha256 for record in records[:-1])]
    assert [record.live for record in records] == [(), (), (3,), (3, 4), (3, 4)]
    assert records[1].body == {"f1": 0.1, "ü": [1, 2.5, None, {"x": True}]}
    assert holder_of(records[0]) == holder("p")
    assert records[0].body["numerics"] == {"precision": "fp32", "worldSize": 1}
    assert find(records, RecordKind.BASELINE) == [baseline]
    assert published(records) == done
    assert latest_checkpoint(records) == second
    assert live_checkpoints(records) == [second, first]


def test_a_checkpoint_that_is_no_longer_live_is_not_offered(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    first, _ = checkpoint(store, claim, 1)
    second, _ = checkpoint(store, claim, 2)
    third, _ = checkpoint(store, claim, 3, live=[second.number])
    assert third.live == (second.number, third.number)
    assert first not in live_checkpoints(RunLog(store, RUN).read())
    with pytest.raises(ValueError, match="no valid checkpoints"):
        claim.append(RecordKind.TRAINED, {}, live=[claim.number])


def test_an_older_attempt_is_fenced_and_changes_nothing(store: Store) -> None:
    old = RunLog(store, RUN).claim(holder=holder("old"))
    before, _ = checkpoint(store, old, 1)
    new = RunLog(store, RUN).claim(holder=holder("new"))
    assert new.number == 3
    assert latest_checkpoint(new.records) == before
    checkpoint(store, new, 2)
    keys = [info.key for info in store.list()]
    for use in (lambda: old.append(RecordKind.CHECKPOINT, {"step": 2}), old.check):
        with pytest.raises(Fenced, match=f"Attempt 1 of run {RUN} was superseded by attempt 3.*pod_uid new") as caught:
            use()
        assert caught.value.holder == holder("new")
        assert caught.value.newer == 3
    assert [info.key for info in store.list()] == keys
    new.check()


def test_the_newest_of_many_holders_is_named(store: Store) -> None:
    old = RunLog(store, RUN).claim(holder=holder("1"))
    for name in ("2", "3", "4"):
        RunLog(store, RUN).claim(holder=holder(name))
    with pytest.raises(Fenced) as caught:
        old.append(RecordKind.TRAINED, {})
    assert caught.value.holder == holder("4")


def test_of_racing_claims_one_attempt_remains_in_each_of_20_races(store: Store) -> None:
    claims = in_threads(60, lambda number: RunLog(store, f"run{number % 20}").claim(holder=holder("same")))

    def append(number: int) -> str:
        try:
            return claims[number].append(RecordKind.TRAINED, {"by": number}).body["by"]
        except Fenced:
            return "fenced"

    said = in_threads(60, append)
    for race in range(20):
        numbers = [claim.number for claim in claims[race::20]]
        assert sorted(numbers) == [1, 2, 3]
        records = RunLog(store, f"run{race}").read()
        winners = [answer for answer in said[race::20] if answer != "fenced"]
        assert winners == [claims.index(next(c for c in claims[race::20] if c.number == 3))]
        assert [record.kind for record in records] == [RecordKind.CLAIM] * 3 + [RecordKind.TRAINED]


@pytest.mark.chaos
@pytest.mark.parametrize("claimed", [True, False], ids=["claimed before", "claimed meanwhile"])
def test_each_of_100_races_for_a_record_on_a_real_server_has_one_winner(proxied: Store, claimed: bool) -> None:
    """An older attempt commits while a newer one commits, too, or claims the run."""

    def race(run: str) -> None:
        def log() -> RunLog:
            return RunLog(proxied, run)

        def commit(claim: Claim) -> int:
            try:
                return claim.append(RecordKind.TRAINED, {}).number
            except Fenced:
                return 0

        old = log().claim(holder=holder("old"))
        new = log().claim(holder=holder("new")) if claimed else None

        def act(who: int) -> int:
            if who == 0:
                return commit(old)
            return commit(new) if new else log().claim(holder=holder("new")).number

        said = in_threads(2, act)
        newest = new.number if new else said[1]
        records = log().read()
        assert [record.number for record in records] == list(range(1, len(records) + 1))
        assert all(record.attempt == newest for record in records if record.number >= newest)
        assert said in ([[0, 3]] if claimed else [[0, 2], [2, 3]])

    for number in range(100):
        race(f"race{number}")


def test_threads_of_one_attempt_append_one_after_the_other(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    in_threads(6, lambda number: claim.append(RecordKind.EVALUATED, {"chunk": number}))
    records = RunLog(store, RUN).read()
    assert [record.number for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(record.body["chunk"] for record in records[1:]) == [0, 1, 2, 3, 4, 5]


def test_a_long_log_on_a_slow_store_is_read_in_parallel_with_signs_of_life(tmp_path: Path) -> None:
    """A checkpoint a minute are 2,000 records in a day and a half."""
    store = SlowStore(tmp_path)
    records = [RunLog(store, RUN).claim(holder=holder("p")).record]
    for number in range(2, 2001):
        next_one = _sealed(number, RecordKind.EVALUATED, attempt=1, records=records[-1:], body={}, live=())
        (tmp_path / f"runs/{RUN}/log/{number}.json").write_bytes(next_one.encoded())
        records.append(next_one)
    (tmp_path / f"runs/{RUN}/log/7.json").write_bytes(b"rubbish")
    log, told = RunLog(store, RUN), [time.monotonic()]
    found = log.read(beat=lambda: told.append(time.monotonic()))
    assert found == records[:6] + records[7:]
    assert (log.last, log.damaged) == (2000, [7])
    assert told[-1] - told[0] < 2000 * SlowStore.SECONDS / 2
    assert len(told) == 2001

    def stop() -> None:
        raise InterruptedError

    asked, log = store.asked, RunLog(store, RUN)
    with pytest.raises(InterruptedError):
        log.read(beat=stop)
    assert store.asked - asked < 100


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"number": 3}', None])
def test_a_damaged_record_is_skipped_and_named(store: Store, damage: bytes | None) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    first, _ = checkpoint(store, claim, 1)
    checkpoint(store, claim, 2)
    key = RunLog(store, RUN).key(3)
    if damage is None:  # one digit changed, everything else right
        damage = store.read(key).replace(b'"step":2', b'"step":7')
    store.write(key, damage)

    log = RunLog(store, RUN)
    assert [record.number for record in log.read()] == [1, 2]
    assert log.damaged == [3]
    assert latest_checkpoint(log.records) == first

    claim = log.claim(holder=holder("q"))
    assert claim.number == 4
    third, _ = checkpoint(store, claim, 3)
    log = RunLog(store, RUN)
    assert [record.number for record in log.read()] == [1, 2, 4, 5]
    assert latest_checkpoint(log.records) == third
    assert third.live == (2, 5)


def test_an_unreadable_record_in_the_way_is_passed_by(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    store.write(claim.log.key(2), b"rubbish")
    record = claim.append(RecordKind.TRAINED, {})
    assert record.number == 3
    assert RunLog(store, RUN).read() == [claim.record, record]


def test_a_number_that_only_a_listing_names_leaves_no_gap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    RunLog(store, RUN).claim(holder=holder("p"))
    listed = store.list

    def misread(prefix: str = "") -> Iterator[ObjectInfo]:
        yield from (dataclasses.replace(info, key=info.key.replace("/1.json", "/5.json")) for info in listed(prefix))

    monkeypatch.setattr(store, "list", misread)
    assert RunLog(store, RUN).claim(holder=holder("q")).number == 2


def test_a_record_that_does_not_continue_the_log_is_not_believed(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    other = RunLog(store, "other").claim(holder=holder("q"))
    other.append(RecordKind.PUBLISHED, {"end": "complete"})
    store.write(claim.log.key(2), store.read(other.log.key(2)))
    log = RunLog(store, RUN)
    assert log.read() == [claim.record]
    assert log.damaged == [2]


def test_a_record_under_another_number_is_not_believed(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    store.write(claim.log.key(2), store.read(claim.log.key(1)))
    assert RunLog(store, RUN).read() == [claim.record]


def test_foreign_names_in_the_log_are_ignored(store: Store) -> None:
    for name in ("notes.txt", "01.json", "-1.json", "x.json", "2/1.json"):
        store.write(f"runs/{RUN}/log/{name}", b"x")
    assert RunLog(store, RUN).claim(holder=holder("p")).number == 1


@pytest.mark.parametrize("changed", [{"format": 1}, {"format": 99}, {"kind": "dreamt"}])
def test_a_whole_record_of_another_version_is_refused_and_no_other(store: Store, changed: dict[str, Any]) -> None:
    from finetune_trainer.storage import commit

    log = RunLog(store, RUN)
    content = {**log.claim(holder=holder("p")).record.content(), **changed, "number": 2}
    sealed = json.dumps({**content, "sha256": commit._seal(content)}).encode()
    with pytest.raises(StorageError, match=r"^Record 2 .*: use the version that wrote it\.$") as caught:
        decode(sealed)
    assert (caught.value.reason, caught.value.environment) == ("UnknownFormat", False)
    assert decode(json.dumps({**content, "sha256": "0" * 64}).encode()) is None
    store.create(log.key(2), sealed)
    with pytest.raises(StorageError, match="use the version that wrote it"):
        log.claim(holder=holder("q"))


def test_what_is_no_json_is_refused_before_anything_is_written(store: Store) -> None:
    claim = RunLog(store, RUN).claim(holder=holder("p"))
    with pytest.raises(ValueError, match="JSON"):
        claim.append(RecordKind.TRAINED, {"loss": float("nan")})
    assert claim.append(RecordKind.TRAINED, {"loss": 0.5}).number == 2


def test_a_lost_answer_to_a_claim_and_a_record_is_recognised(proxied: Store, proxy: Any) -> None:
    log = RunLog(proxied, RUN)
    proxied.write("warm", b"1")
    proxy.drop_marker, proxy.drop_answers = b"PUT /", 1
    claim = log.claim(holder=holder("p"))
    proxy.drop_answers = 1
    record = claim.append(RecordKind.TRAINED, {})
    assert proxy.dropped == 2
    assert (claim.number, record.number) == (1, 2)
    assert RunLog(proxied, RUN).read() == [claim.record, record]


class Forgetful:
    """A real store whose `create` succeeds and then says that the key was taken, or that the store was unavailable."""

    def __init__(self, store: Store, error: StorageError | None) -> None:
        self._store, self._error = store, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        self._store.create(key, data)
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._store.create(key, data)


def test_the_log_itself_recognises_its_own_digest(store: Store) -> None:
    log = RunLog(Forgetful(store, None), RUN)  # type: ignore[arg-type]
    claim = log.claim(holder=holder("p"))
    record = claim.append(RecordKind.TRAINED, {})
    assert (claim.number, record.number) == (1, 2)
    assert RunLog(store, RUN).read() == [claim.record, record]


def test_a_record_that_landed_after_all_is_continued(store: Store) -> None:
    forgetful = Forgetful(store, None)
    claim = RunLog(forgetful, RUN).claim(holder=holder("p"))  # type: ignore[arg-type]
    forgetful._error = Unavailable("StoreUnavailable", "no answer")
    with pytest.raises(Unavailable):
        claim.append(RecordKind.TRAINED, {"try": 1})
    again = claim.append(RecordKind.TRAINED, {"try": 2})
    assert again.number == 3
    assert [record.body.get("try") for record in RunLog(store, RUN).read()] == [None, 1, 2]


def test_current_is_replaced_as_a_whole(store: Store) -> None:
    publish_current(store, {"run": "a"})
    publish_current(store, {"run": "b"})
    publish_current(store, {"run": "b"})
    assert read_current(store) == {"run": "b"}
    for damaged in (store.read("current.json").replace(b'"b"', b'"c"'), b"{", b"[]"):
        store.write("current.json", damaged)
        assert read_current(store) is None
    publish_current(store, {"run": "b"})
    in_threads(4, lambda number: publish_current(store, {"run": number}))
    assert json.loads(store.read("current.json"))["run"] in range(4)


def test_garbage_is_what_no_record_needs(store: Store) -> None:
    old = RunLog(store, RUN).claim(holder=holder("old"))
    first, dropped = checkpoint(store, old, 1)
    second, kept = checkpoint(store, old, 2)
    torn = store.write(f"{old.prefix}step-3/0.safetensors", b"torn")
    report = store.write(f"{old.prefix}evaluation/0.json", b"{}")
    old.append(RecordKind.EVALUATED, {"objects": [object_entry(report)]})
    new = RunLog(store, RUN).claim(holder=holder("new"))
    model = store.write(f"{new.prefix}model/model.safetensors", b"model")
    new.append(RecordKind.PUBLISHED, {"prefix": f"{new.prefix}model/"}, live=[second.number])
    third, mine = checkpoint(store, new, 3)
    on_its_way = store.write(f"{new.prefix}step-4/0.safetensors", b"not committed yet")
    newer = store.write(f"runs/{RUN}/attempts/99/x", b"of an attempt to come")
    other = store.write("runs/other/attempts/1/x", b"of another run")
    foreign = store.write(f"runs/{RUN}/attempts/notes/x", b"not ours")

    assert sorted(collect_garbage(new)) == sorted([dropped.key, torn.key])
    left = {info.key for info in store.list()}
    assert {item.key for item in (kept, report, model, mine, on_its_way, newer, other, foreign)} <= left
    assert {dropped.key, torn.key} & left == set()
    assert first.number not in third.live

    _, last = checkpoint(store, new, 5, live=[third.number])
    assert collect_garbage(new) == [kept.key]
    checkpoint(store, new, 6, live=[last_number(new)])
    assert collect_garbage(new) == [mine.key]
    assert store.head(last.key) is not None


def last_number(claim: Claim) -> int:
    record = latest_checkpoint(claim.records)
    assert record is not None
    return record.number


def test_only_the_newest_attempt_collects_garbage(store: Store) -> None:
    old = RunLog(store, RUN).claim(holder=holder("old"))
    torn = store.write(f"{old.prefix}torn", b"x")
    RunLog(store, RUN).claim(holder=holder("new"))
    with pytest.raises(Fenced):
        collect_garbage(old)
    assert store.head(torn.key) is not None


def test_what_a_superseded_attempt_has_written_is_taken_away_unless_a_record_names_it(store: Store) -> None:
    """Whatever has ended it; and a record can be there though its writer was told that the store is gone."""
    old = RunLog(store, RUN).claim(holder=holder("old"))

    def ended(*acts: Callable[[Staging], Any]) -> None:
        with uncommitted(old) as staging:
            for act in acts:
                act(staging)
            raise Unavailable("StoreUnavailable", "no answer")

    def write(name: str) -> Callable[[Staging], Any]:
        return lambda staging: staging.write(f"{old.prefix}{name}", b"x")

    def name_it(_: Staging) -> None:
        info = store.head(f"{old.prefix}named")
        assert info is not None
        old.append(RecordKind.EVALUATED, {"objects": [object_entry(info)]})

    with pytest.raises(Unavailable):
        ended(write("of an attempt that is to be repeated"))
    with pytest.raises(Fenced):
        ended(write("named"), name_it, write("late"), lambda _: RunLog(store, RUN).claim(holder=holder("new")))
    left = {info.key.removeprefix(old.prefix) for info in store.list(old.prefix)}
    assert left == {"named", "of an attempt that is to be repeated"}


KILLED_IN_AN_UPLOAD = """
import os, signal, sys
from pathlib import Path
from finetune_trainer.storage import StorageSettings, open_store
uri, endpoint, credentials, file, key = sys.argv[1:]
store = open_store(uri, StorageSettings(endpoint or None, "us-east-1", Path(credentials) if credentials else None))
last = "_complete" if endpoint else "_finish"  # all bytes are there
setattr(store, last, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
store.upload(Path(file), key)
"""


def unfinished(store: Store) -> list[str]:
    """Keys or files of uploads that have not ended."""
    if isinstance(store, S3Store):
        return [key for key, _ in store._unfinished("")]
    return [str(path) for path in Path(store.uri.removeprefix("file://").replace("%20", " ")).rglob(".finetune-tmp-*")]


def killed_in_an_upload(store: Store, key: str, path: Path) -> None:
    settings = getattr(store, "settings", StorageSettings())
    arguments = [store.uri, settings.endpoint or "", str(settings.credentials_dir or ""), str(path), key]
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_AN_UPLOAD, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL


def test_what_a_killed_attempt_had_begun_to_upload_takes_no_room_for_ever(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(33 * MIB))
    old = RunLog(store, RUN).claim(holder=holder("old"))
    killed_in_an_upload(store, f"{old.prefix}step-1/weights.safetensors", tmp_path / "file")
    assert len(unfinished(store)) == 1
    new = RunLog(store, RUN).claim(holder=holder("new"))
    killed_in_an_upload(store, f"{new.prefix}step-1/weights.safetensors", tmp_path / "file")
    killed_in_an_upload(store, f"runs/other/attempts/{old.number}/step-1/weights.safetensors", tmp_path / "file")
    assert len(unfinished(store)) == 3
    assert collect_garbage(new) == []
    assert len(left := unfinished(store)) == 2
    assert not any(old.prefix in one for one in left)


@pytest.mark.parametrize("released", [True, False])
def test_the_model_that_consumers_read_stays_when_its_record_is_lost(store: Store, released: bool) -> None:
    old = RunLog(store, RUN).claim(holder=holder("old"))
    model = store.write(f"{old.prefix}model/model.safetensors", b"model")
    old.append(RecordKind.PUBLISHED, {"objects": [object_entry(model)]})
    if released:
        publish_current(store, {"model": f"{store.uri}/{old.prefix}model"})
    store.delete([old.log.key(2)])
    assert collect_garbage(RunLog(store, RUN).claim(holder=holder("new"))) == ([] if released else [model.key])


def test_records_cannot_be_changed_in_place(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri(), StorageSettings())
    record = RunLog(store, RUN).claim(holder=Holder()).record
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.number = 2  # type: ignore[misc]
    assert "an unnamed local process" in str(Fenced(RUN, 1, 2, holder_of(record)))
