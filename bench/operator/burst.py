"""Many objects created at once: when each has its first pod, when each is done, and what that takes."""

import json
import multiprocessing
import os
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from bench.operator.api import Access, Api, Document
from bench.operator.contestants import OURS, Contestant
from bench.operator.plane import Plane, wait_for
from bench.operator.usage import Audit, Meter, Used
from finetune_operator.views import ROLE

THREADS = 8
PATIENCE = 1200.0
Requests = Counter[tuple[str, str, int]]


@dataclass
class Seen:
    """What the watches have told so far, with times, by name; pods by UID where their labels hold that."""

    pods: dict[str, float] = field(default_factory=dict)
    trains: dict[str, float] = field(default_factory=dict)
    """The first pod that trains: of a FineTuneJob not the one of preflight."""
    ended: dict[str, float] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)
    """Of FineTuneJobs: writes of a status by what they changed, `lifecycle`, `progress`, or `other`."""
    opened: int = 0
    """How often a watch began: once each, and again whenever the API server has closed it."""
    trouble: str = ""


@dataclass(frozen=True)
class Burst:
    """How it went. Times in seconds."""

    number: int
    creating: float
    """From the first create to the last."""
    total: float
    """From the first create until all are done."""
    to_pod: list[float]
    to_train: list[float]
    to_end: list[float]
    used: Used
    requests: dict[str, Requests]
    """By user."""
    turns: Counter[str]
    load: float
    """The machine's load average at the beginning."""


def run(plane: Plane, contestant: Contestant, number: int, *, first: int = 0, namespace: str = "bench") -> Burst:
    """Creates `number` objects as fast as the API server takes them, and waits until all are done.

    Raises RuntimeError when one of them fails, TimeoutError after 20 minutes.
    """
    numbers = range(first, first + number)
    load = os.getloadavg()[0]
    with watching(plane.access(), contestant, namespace) as seen:
        time.sleep(2)  # the API server writes its audit log in batches
        audit = Audit(plane.audit_log)
        pids = {name: process.pid for name, process in plane.processes.items()}
        meter = Meter(pids, now=time.time())
        created, uids = create(plane, contestant, numbers, namespace)
        all_created = time.time()
        _await_ends(plane, seen, number)
        used = meter.stop(now=time.time())
        time.sleep(3)
        requests = {user: audit.counts(user) for user in contestant.users}
    began = min(created.values())
    by = {uids[name]: at for name, at in created.items()} if contestant is OURS else created
    return Burst(
        number=number,
        creating=all_created - began,
        total=max(seen.ended.values()) - began,
        to_pod=[seen.pods[key] - at for key, at in by.items()],
        to_train=[seen.trains[key] - at for key, at in by.items()],
        to_end=[seen.ended[name] - at for name, at in created.items()],
        used=used,
        requests=requests,
        turns=seen.turns,
        load=load,
    )


def _await_ends(plane: Plane, seen: Seen, number: int) -> None:
    until, told = time.time() + PATIENCE, time.time()
    while len(seen.ended) < number:
        plane.check()
        if seen.trouble:
            raise RuntimeError(seen.trouble)
        if time.time() > until:
            raise TimeoutError(f"after {PATIENCE:.0f} s {len(seen.ended)} of {number} are done")
        if time.time() - told >= 15:
            told = time.time()
            print(f"    {len(seen.pods)} have pods, {len(seen.ended)} of {number} are done", flush=True)
        time.sleep(0.1)


def create(
    plane: Plane, contestant: Contestant, numbers: Iterable[int], namespace: str
) -> tuple[dict[str, float], dict[str, str]]:
    """By name: when each was asked for, and its UID. Raises ApiRefused when one is refused."""
    asked: dict[str, float] = {}
    uids: dict[str, str] = {}
    path = contestant.path.format(namespace)

    def one(api: Api, number: int) -> None:
        document = contestant.document(number)
        name = document["metadata"]["name"]
        asked[name] = time.time()
        uids[name] = api.call("POST", path, document)["metadata"]["uid"]

    in_threads(plane, numbers, one)
    return asked, uids


def in_threads(plane: Plane, numbers: Iterable[int], work: Callable[[Api, int], None]) -> None:
    """Each number is worked on once, by one of a few threads with a connection each. Raises what the first raises."""
    left, lock = iter(numbers), threading.Lock()
    failed: list[Exception] = []

    def thread() -> None:
        api = plane.connect()
        while not failed:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                work(api, number)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=thread) for _ in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if failed:
        raise failed[0]


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of all do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


# --- the watches, each in a process of its own: many events a second would keep this one from creating ---


@contextmanager
def watching(access: Access, contestant: Contestant, namespace: str) -> Iterator[Seen]:
    """Watches the objects and their pods from now on; what they tell is filled in as it comes."""
    seen = Seen()
    here, there = multiprocessing.Pipe(duplex=False)
    pods = f"/api/v1/namespaces/{namespace}/pods"
    fork = multiprocessing.get_context("fork")
    watchers = [
        fork.Process(target=_watch_pods, args=(access, pods, contestant.pod_label, there), daemon=True),
        fork.Process(target=_watch_objects, args=(access, contestant, namespace, there), daemon=True),
    ]
    for watcher in watchers:
        watcher.start()
    there.close()
    threading.Thread(target=_take, args=(here, seen), daemon=True).start()
    wait_for("the watches are there", lambda: seen.opened >= len(watchers))
    try:
        yield seen
    finally:
        for watcher in watchers:
            watcher.terminate()
            watcher.join()


def _take(told: Connection, seen: Seen) -> None:
    while True:
        try:
            what, key, at = told.recv()
        except (EOFError, OSError):
            return
        if what == "pod":
            seen.pods[key] = at
        elif what == "train":
            seen.trains[key] = at
        elif what == "ended":
            seen.ended[key] = at
        elif what == "turn":
            seen.turns[key] += 1
        elif what == "watching":
            seen.opened += 1
        else:
            seen.trouble = key


_PREFLIGHT = f'"{ROLE}":"preflight"'.encode()


def _watch_pods(access: Access, path: str, label: str, tell: Connection) -> None:
    """Searches the lines instead of parsing them: it must not fall behind, or the API server closes the watch."""
    pattern = re.compile(rb'"%s":"([^"]+)"' % label.encode())
    known: set[bytes] = set()
    training: set[bytes] = set()
    while True:
        for at, line in access.connect().watch(path):
            if not line:
                tell.send(("watching", "", at))
                continue
            found = pattern.search(line)
            if found is None:
                continue
            if found[1] not in known:
                known.add(found[1])
                tell.send(("pod", found[1].decode(), at))
            if found[1] not in training and _PREFLIGHT not in line:
                training.add(found[1])
                tell.send(("train", found[1].decode(), at))


def _watch_objects(access: Access, contestant: Contestant, namespace: str, tell: Connection) -> None:
    ended: set[str] = set()
    said: dict[str, Said] = {}
    while True:
        for at, line in access.connect().watch(contestant.path.format(namespace)):
            if not line:
                tell.send(("watching", "", at))
                continue
            event = json.loads(line)
            if event["type"] not in ("ADDED", "MODIFIED"):
                continue
            document = event["object"]
            if contestant is OURS:
                _tell_turn(document, said, tell, at)
            name = document["metadata"]["name"]
            try:
                if name not in ended and contestant.ended(document):
                    ended.add(name)
                    tell.send(("ended", name, at))
            except RuntimeError as error:
                tell.send(("trouble", str(error)[:1000], at))


@dataclass(frozen=True)
class Said:
    """What a version of a FineTuneJob's status says: in which step it is, and all else but its progress."""

    version: str
    step: tuple[str, str]
    rest: str


def said_by(document: Document) -> Said | None:
    """None before the operator has written anything."""
    status = document.get("status") or {}
    conditions = status.get("conditions") or []
    if not conditions:
        return None
    reason = next((one["reason"] for one in conditions if one["type"] == "Succeeded"), "")
    rest = {name: value for name, value in status.items() if name not in ("message", "progress", "checkpoint")}
    rest["conditions"] = [{**one, "message": ""} for one in conditions]
    rest["usage"] = {name: value for name, value in (status.get("usage") or {}).items() if name != "ongoing"}
    step = (status.get("phase", ""), reason)
    return Said(document["metadata"]["resourceVersion"], step, json.dumps(rest, sort_keys=True))


def turn(before: Said | None, after: Said) -> str | None:
    """What a write has changed: another phase or reason, mere progress of what goes on, or else; None: nothing new."""
    if before is not None and before.version == after.version:
        return None
    if before is None or before.step != after.step:
        return "lifecycle"
    return "progress" if before.rest == after.rest and after.step[0] in ("Training", "Evaluating") else "other"


def _tell_turn(document: Document, said: dict[str, Said], tell: Connection, at: float) -> None:
    uid, now = document["metadata"]["uid"], said_by(document)
    what = turn(said.get(uid), now) if now is not None else None
    if now is not None and what is not None:
        said[uid] = now
        tell.send(("turn", what, at))
