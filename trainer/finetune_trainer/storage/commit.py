"""The log of a run: what has been committed, and by which attempt.

Data objects come first, under keys used once; then one record, created with a conditional write. The highest valid
record is the truth, so nothing is ever half committed. Records are numbered without gaps and never deleted. An
attempt begins with a claim record, whose number is the attempt's name; from then on every older attempt finds its
next number taken and is fenced.

A record's body names the data objects that it commits under `objects`, a list of {key, size, digest, etag} with keys
relative to the store, or under `prefix`, which covers everything below it. Garbage collection believes these two
fields alone.
"""

import hashlib
import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from .base import (
    AlreadyExists,
    Damaged,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StorageError,
    Store,
    hash_object,
)

CURRENT = "current.json"
STOPPED = "stopped"
"""End of a training, in its record, that was ended before its time: a later attempt may go on."""
_FORMAT = 2
_SEAL = "sha256"
# A bound against a store that answers AlreadyExists for ever; a real log is never this far ahead of a reader.
_MAX_TRIES = 1000
_READERS = 16
"""Records that are asked for at once: what a read takes is mostly the way to the store and back."""
_BATCH = 512
"""Records that are begun before the first of them is waited for."""
_log = logging.getLogger(__name__)


class RecordKind(StrEnum):
    """What a record commits."""

    CLAIM = "claim"
    CHECKPOINT = "checkpoint"
    BASELINE = "baseline"
    RETENTION = "retention"
    MEASURED = "measured"
    TRAINED = "trained"
    EVALUATED = "evaluated"
    PUBLISHED = "published"


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: FineTuneJob UID, name of the Job and pod UID; empty where there is none."""

    job_uid: str = ""
    owner: str = ""
    pod_uid: str = ""

    def __str__(self) -> str:
        named = [f"{name} {value}" for name, value in asdict(self).items() if value]
        return ", ".join(named) or "an unnamed local process"


@dataclass(frozen=True)
class Record:
    """One committed record. `previous`, `sha256`: hex SHA-256; `live`: the numbers of the checkpoints still valid."""

    number: int
    kind: RecordKind
    attempt: int
    previous: str
    body: Mapping[str, Any]
    live: tuple[int, ...]
    at: datetime
    sha256: str = ""

    def content(self) -> dict[str, Any]:
        """Everything the digest covers."""
        return {
            "format": _FORMAT,
            "number": self.number,
            "kind": self.kind.value,
            "attempt": self.attempt,
            "previous": self.previous,
            "body": self.body,
            "live": list(self.live),
            "at": self.at.isoformat(),
        }

    def encoded(self) -> bytes:
        """The object's bytes: canonical JSON with the digest of the rest beside it."""
        return _canonical({**self.content(), _SEAL: self.sha256})


class Fenced(Exception):
    """A newer attempt has claimed the run: this one ends with exit code 44 and has changed nothing."""

    def __init__(self, run_id: str, attempt: int, newer: int, holder: Holder | None) -> None:
        self.run_id, self.attempt, self.newer, self.holder = run_id, attempt, newer, holder
        super().__init__(
            f"Attempt {attempt} of run {run_id} was superseded by attempt {newer}, "
            f"held by {holder or 'an unknown holder'}; nothing is to be done, the newer attempt goes on."
        )


class RunLog:
    """The log of one run, as far as it has been read. Valid records are kept, because they never change."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.prefix = f"runs/{run_id}/log/"
        self._found: dict[int, Record] = {}
        self._last = 0

    def key(self, number: int) -> str:
        """Where a record lies."""
        return f"{self.prefix}{number}.json"

    @property
    def last(self) -> int:
        """The highest number seen, whether its record is valid or not; 0 when the log is empty."""
        return self._last

    @property
    def records(self) -> list[Record]:
        """Valid records in order, as far as read: the digest is right and the record before is the one it names."""
        return [self._found[number] for number, valid in self._judged() if valid]

    @property
    def damaged(self) -> list[int]:
        """Numbers whose record is missing, unreadable or does not continue the one before."""
        return [number for number, valid in self._judged() if not valid]

    def read(self, *, beat: Callable[[], None] = lambda: None) -> list[Record]:
        """Read what is new and return all valid records in order. `beat` is called for each that is read."""
        numbers = (_number_in(info, self.prefix) for info in self.store.list(self.prefix))
        # No digest covers a listing: what it names counts when something lies there. A claim behind a gap would leave
        # older attempts a number to commit under.
        last = max(self._last, *numbers, 0)
        with ThreadPoolExecutor(_READERS, "log") as pool:  # makes no thread that it does not need
            try:
                for start in range(1, last + 1, _BATCH):
                    batch = range(start, min(start + _BATCH, last + 1))
                    new = [number for number in batch if number not in self._found]
                    for number, found in zip(new, pool.map(self._there, new), strict=True):
                        self._take(number, found)
                        beat()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        while self.look(self._last + 1):  # a listing may lag behind
            pass
        return self.records

    def look(self, number: int) -> bool:
        """Read one number. True when something lies there, readable or not."""
        return number in self._found or self._take(number, self._there(number))

    def _there(self, number: int) -> tuple[bool, Record | None]:
        """Whether something lies under a number, and the record that it is."""
        try:
            record = decode(self.store.read(self.key(number)))
        except NotFound as error:
            if error.reason == "ObjectNotFound":
                return False, None
            raise
        except Damaged:
            record = None
        return True, record

    def _take(self, number: int, found: tuple[bool, Record | None]) -> bool:
        there, record = found
        if record is not None and record.number == number:
            self._found[number] = record
        if there:
            self._last = max(self._last, number)
        return there

    def claim(self, *, holder: Holder, numerics: Mapping[str, Any] | None = None) -> "Claim":
        """Begin an attempt: from the moment this returns, every older attempt is fenced.

        `numerics` is what decides bits but not the run (precision, micro-batch, world size, versions).
        """
        # The nonce tells two claims of one holder apart, and makes a repeated write of one claim recognisable.
        body = {"holder": asdict(holder), "numerics": dict(numerics or {}), "nonce": uuid.uuid4().hex}
        for _ in range(_MAX_TRIES):
            records = self.read()
            number = self._last + 1
            record = _sealed(number, RecordKind.CLAIM, attempt=number, records=records, body=body, live=_live(records))
            if self.put(record):
                return Claim(self, record)
        raise _never_free(self, "claim")

    def put(self, record: Record) -> bool:
        """Create a record. False when its number is taken by another; a lost answer to our own write is a success."""
        try:
            self.store.create(self.key(record.number), record.encoded())
        except AlreadyExists:
            self.look(record.number)
            found = self._found.get(record.number)
            return found is not None and found.sha256 == record.sha256
        self._found[record.number] = record
        self._last = max(self._last, record.number)
        return True

    def at(self, number: int) -> Record | None:
        """The readable record of that number, as far as read."""
        return self._found.get(number)

    def _judged(self) -> Iterator[tuple[int, bool]]:
        before: str | None = ""  # None: the record before is damaged, so its digest is unknown
        for number in range(1, self._last + 1):
            record = self._found.get(number)
            valid = record is not None and before in (None, record.previous)
            before = record.sha256 if record is not None and valid else None
            yield number, valid


def attempt_prefix(run_id: str, number: int) -> str:
    """Where an attempt's objects lie."""
    return f"runs/{run_id}/attempts/{number}/"


class Claim:
    """One attempt's right to append. Safe to use from several threads."""

    def __init__(self, log: RunLog, record: Record) -> None:
        self.log = log
        self.record = record
        self.number = record.number
        self.prefix = attempt_prefix(log.run_id, record.number)
        self._lock = threading.Lock()

    @property
    def records(self) -> list[Record]:
        """Valid records in order, including this attempt's own."""
        return self.log.records

    def append(self, kind: RecordKind, body: Mapping[str, Any], *, live: Iterable[int] | None = None) -> Record:
        """Commit one record. Raises Fenced when a newer attempt holds the run.

        `live` are the numbers of the earlier checkpoints that stay valid; None keeps all of them. A checkpoint's own
        number is added by itself.
        """
        with self._lock:
            for _ in range(_MAX_TRIES):
                records = self.log.records
                kept = _live(records) if live is None else _known(live, records)
                number = self.log.last + 1
                if kind is RecordKind.CHECKPOINT:
                    kept = (*kept, number)
                record = _sealed(number, kind, attempt=self.number, records=records, body=body, live=kept)
                if self.log.put(record):
                    return record
                found = self.log.at(number)
                if found is not None and found.attempt > self.number:
                    self._check()
            raise _never_free(self.log, kind.value)

    def check(self) -> None:
        """Raise Fenced when a newer attempt holds the run."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        newest = max(self.log.read(), key=lambda record: record.attempt, default=self.record)
        if newest.attempt > self.number:
            claim = self.log.at(newest.attempt)
            raise Fenced(self.log.run_id, self.number, newest.attempt, holder_of(claim) if claim else None)


class Staging:
    """Writes objects that a record is to name, and knows their keys as soon as they are begun."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.keys: list[str] = []

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """As the store's."""
        self.keys.append(key)
        return self._store.write(key, data)

    def upload(self, path: Path, key: str, *, progress: Callable[[int], None] | None = None) -> ObjectInfo:
        """As the store's."""
        self.keys.append(key)
        return self._store.upload(path, key, progress=progress)


@contextmanager
def uncommitted(claim: Claim) -> Iterator[Staging]:
    """For objects and the record that is to name them. Should an error end that, and the attempt be superseded, the
    objects are taken away and Fenced is raised: when the newer attempt is done already, nobody else ever would."""
    staging = Staging(claim.log.store)
    try:
        yield staging
    except Exception as error:
        fenced = error if isinstance(error, Fenced) else superseded(claim)
        if fenced is None:
            raise
        # A record whose answer was lost may be there all the same.
        unnamed = [key for key in staging.keys if not _names(claim.records, key)]
        try:
            claim.log.store.delete(unnamed)
        except StorageError as failure:
            _log.warning("what this attempt has written too late was not deleted: %s", failure)
        raise fenced from None


def superseded(claim: Claim) -> Fenced | None:
    """What says that a newer attempt holds the run; None where none does, or the store does not tell."""
    try:
        claim.check()
    except Fenced as fenced:
        return fenced
    except StorageError as error:
        _log.warning("whether a newer attempt holds the run is not known: %s", error)
    return None


def find(records: Iterable[Record], kind: RecordKind) -> list[Record]:
    """All records of a kind, oldest first."""
    return [record for record in records if record.kind is kind]


def published(records: Iterable[Record]) -> Record | None:
    """The last publication, or None."""
    return next(reversed(find(records, RecordKind.PUBLISHED)), None)


def training_end(records: Sequence[Record], *, partial: bool) -> Record | None:
    """The record that says how training ended, or None while it goes on. `partial`: an end before its time counts,
    too, as long as no later checkpoint has been committed."""
    last = next(reversed(find(records, RecordKind.TRAINED)), None)
    if last is None or last.body.get("end") != STOPPED:
        return last
    newest = latest_checkpoint(records)
    return last if partial and (newest is None or newest.number < last.number) else None


def part_of(records: Sequence[Record], end: Record | None, *, weights: str) -> dict[str, Any] | None:
    """Names what there is of a training that was ended before its time: its step, and the checkpoint that is measured,
    for an evaluation that was due at that step may choose another one when the run goes on. None of a whole one."""
    if end is None or end.body.get("end") != STOPPED:
        return None
    chosen = next((record for record in records if record.number == end.body["weights"][weights]), None)
    return {"step": end.body["step"], "weights": chosen.sha256 if chosen is not None else None}


def live_checkpoints(records: Sequence[Record]) -> list[Record]:
    """Checkpoints that the last valid record still names, newest first: try them in this order."""
    live = set(_live(records))
    return [record for record in reversed(find(records, RecordKind.CHECKPOINT)) if record.number in live]


def latest_checkpoint(records: Sequence[Record]) -> Record | None:
    """The newest checkpoint that is still live, or None."""
    return next(iter(live_checkpoints(records)), None)


def holder_of(claim: Record) -> Holder:
    """Who made a claim record; an empty holder where the record names none."""
    found = claim.body.get("holder")
    known = found if isinstance(found, Mapping) else {}
    return Holder(**{item.name: str(known.get(item.name, "")) for item in fields(Holder)})


def object_entry(info: ObjectInfo) -> dict[str, Any]:
    """How a record's body names a data object: key, size in bytes, digest and the store's own tag."""
    return {"key": info.key, "size": info.size, "digest": info.digest, "etag": info.etag}


def what_is_wrong(
    store: Store, entries: Sequence[Mapping[str, Any]], *, beat: Callable[[], None] = lambda: None
) -> str | None:
    """The first of the objects that is gone or damaged, in words; None when all are whole.

    An object whose tag is still that of its record has not been written since; another is read and compared with its
    digest, with a call of `beat` for each block.
    """
    for entry in entries:
        key = str(entry["key"])
        info = store.head(key)
        if info is None:
            return f"{key} is missing"
        if info.size != entry["size"]:
            return f"{key} has {info.size} bytes instead of {entry['size']}"
        like = entry["digest"]
        if info.etag != entry.get("etag") and hash_object(store, info, like=like, beat=beat) != like:
            return f"{key} is damaged"
    return None if entries else "it names no objects"


def publish_current(
    store: Store, body: Mapping[str, Any], *, unless: Callable[[dict[str, Any] | None], bool] = lambda _: False
) -> bool:
    """Replace `current.json`, what consumers read: the last act, after the published record. It carries its digest.

    `unless` is asked first, with what is there (as read_current has it), and may refuse: False is returned then. No
    other version is replaced than the one it was asked about. Raises PreconditionFailed when others replace it faster
    than this process can.
    """
    data = _canonical({**body, _SEAL: _seal(body)})
    for tries_left in reversed(range(10)):
        found = store.head(CURRENT)
        try:
            said = _read_current(store, found.etag) if found else b""
            if unless(_current_in(said)):
                return False
            if said != data:
                store.replace(CURRENT, data, if_match=found.etag if found else None)
            return True
        except PreconditionFailed:
            if not tries_left:
                raise
    return False


def read_current(store: Store) -> dict[str, Any] | None:
    """What `current.json` says, None where it is missing or not as a run has written it.

    Earlier versions wrote no digest into it.
    """
    return _current_in(_read_current(store))


def _read_current(store: Store, etag: str | None = None) -> bytes:
    try:
        return store.read(CURRENT, if_match=etag)
    except (NotFound, Damaged):
        return b""


def _current_in(data: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(data)
        seal = body.pop(_SEAL, None)
    except (ValueError, TypeError, AttributeError):
        return None
    return dict(body) if seal is None or seal == _seal(body) else None


def collect_garbage(claim: Claim) -> list[str]:
    """Delete what no valid record needs any more; returns the keys. Raises Fenced when a newer attempt holds the run.

    Of older attempts, everything goes that is not committed by a record that is needed: checkpoints are while they are
    live, pieces of measurements until a model is published, all others for ever; but for the model that `current.json`
    names. Of this attempt, only what was committed and is no longer needed goes, since what no record names may be on
    its way. What older attempts have begun to write and not finished goes,
    too, where the store shows it. No age is asked for: older attempts are fenced, so what no
    record names now none ever will, and what was dropped is never live again.
    """
    claim.check()
    store, root = claim.log.store, f"runs/{claim.log.run_id}/attempts/"
    kept = needed(claim.records)
    numbers = {record.number for record in kept}
    dropped = [record for record in claim.records if record.number not in numbers]
    garbage: list[str] = []
    unnamed: list[str] = []
    for info in store.list(root):
        attempt = _attempt_in(info.key, root)
        if not attempt or attempt > claim.number or _names(kept, info.key):
            continue
        if _names(dropped, info.key):
            garbage.append(info.key)
        elif attempt < claim.number:
            unnamed.append(info.key)
    if unnamed:  # also of a publication whose record is damaged
        released = (read_current(store) or {}).get("model")
        garbage += [key for key in unnamed if not released or not f"{store.uri}/{key}".startswith(f"{released}/")]
    store.delete(garbage)
    if claim.number > 1:
        store.end_unfinished(root, lambda key: 0 < _attempt_in(key, root) < claim.number)
    return garbage


def needed(records: Sequence[Record]) -> list[Record]:
    """Those whose objects are still good for something; the others' may be gone."""
    live, last = set(_live(records)), published(records)

    def is_needed(record: Record) -> bool:
        if record.kind is RecordKind.CHECKPOINT:
            return record.number in live
        return record.kind is not RecordKind.MEASURED or last is None or record.number > last.number

    return [record for record in records if is_needed(record)]


def decode(data: bytes) -> Record | None:
    """The record in an object's bytes, or None when they are none. Raises StorageError for one that is whole and of
    another version: of another format, or of a kind that this one does not know."""
    try:
        content = json.loads(data)
        number, kind, version = int(content["number"]), str(content["kind"]), content.get("format")
        whole = _seal({key: value for key, value in content.items() if key != _SEAL}) == content[_SEAL]
        if not whole:
            return None
        if version != _FORMAT:
            raise _of_another_version(number, f"has format {version}, this version knows {_FORMAT}")
        if kind not in set(RecordKind):
            raise _of_another_version(number, f"is of kind {kind}, which this version does not know")
        return Record(
            number=number,
            kind=RecordKind(kind),
            attempt=int(content["attempt"]),
            previous=str(content["previous"]),
            body=dict(content["body"]),
            live=tuple(int(number) for number in content["live"]),
            at=datetime.fromisoformat(content["at"]),
            sha256=str(content[_SEAL]),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _of_another_version(number: int, why: str) -> StorageError:
    return StorageError("UnknownFormat", f"Record {number} {why}: use the version that wrote it.", environment=False)


def _sealed(
    number: int,
    kind: RecordKind,
    *,
    attempt: int,
    records: Sequence[Record],
    body: Mapping[str, Any],
    live: tuple[int, ...],
) -> Record:
    """A record with its digest, continuing `records`."""
    previous = records[-1].sha256 if records else ""
    # Through JSON once, so that what is kept in memory is what a reader will find.
    plain = json.loads(_canonical(body))
    record = Record(number, kind, attempt, previous, plain, tuple(sorted(set(live))), datetime.now(UTC))
    return replace(record, sha256=_seal(record.content()))


def _live(records: Sequence[Record]) -> tuple[int, ...]:
    return records[-1].live if records else ()


def _known(live: Iterable[int], records: Iterable[Record]) -> tuple[int, ...]:
    wanted = tuple(live)
    unknown = set(wanted) - {record.number for record in find(records, RecordKind.CHECKPOINT)}
    if unknown:
        raise ValueError(f"live names {sorted(unknown)}, which are no valid checkpoints of this log")
    return wanted


def _names(records: Iterable[Record], key: str) -> bool:
    """Whether one of the records commits this key."""
    for record in records:
        prefix = record.body.get("prefix")
        if isinstance(prefix, str) and prefix and key.startswith(prefix.rstrip("/") + "/"):
            return True
        if any(entry.get("key") == key for entry in record.body.get("objects") or ()):
            return True
    return False


def _attempt_in(key: str, root: str) -> int:
    """Whose object lies at a key below `root`; 0 when it is no attempt's."""
    name = key.removeprefix(root).partition("/")[0]
    return int(name) if name.isdecimal() else 0


def _number_in(info: ObjectInfo, prefix: str) -> int:
    name = info.key.removeprefix(prefix).removesuffix(".json")
    return int(name) if name.isdecimal() and name == str(int(name)) else 0


def _seal(body: Mapping[str, Any]) -> str:
    """What a record or `current.json` carries beside its content: hex SHA-256, as anyone's tools compute it."""
    return hashlib.sha256(_canonical(body)).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    """One byte string for equal values. NaN and infinity raise ValueError, because JSON has none."""
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    )


def _never_free(log: RunLog, what: str) -> StorageError:
    return StorageError(
        "LogContended",
        f"No free number for a {what} record of run {log.run_id} in {log.store.uri} after {_MAX_TRIES} tries: "
        "check that the store's conditional writes work.",
    )
