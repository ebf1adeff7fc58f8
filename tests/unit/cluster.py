"""A small cluster in memory: an API server, its controllers, trainers with their bucket, and watches that lag behind.

The operator's own Reconciler, Observer and Cache work against it. Time, deliveries, answers and deaths come only when
they are asked for, so that a test decides the order of everything.
"""

import json
import types
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

from finetune_api import GROUP, VERSION
from finetune_api.contract import LastMessage, PreflightOutcome, Progress, TrainOutcome
from finetune_api.resolve import Defaults
from finetune_api.status import EvaluationStatus, ModelStatus, PreflightStatus
from finetune_operator import cache, observe, reconcile, refusals
from finetune_operator.cache import Cache, Kind
from finetune_operator.kube import ApiError
from finetune_operator.observe import Observer
from finetune_operator.reconcile import Reconciler
from finetune_operator.verdict import condition
from finetune_operator.views import ASKED, GENERATION, JOB_UID, ROLE, RUN, Subject, controller, format_time, parse_time

Raw = dict[str, Any]
T = TypeVar("T")
KINDS: dict[str, Kind] = {"Job": "jobs", "ConfigMap": "configmaps", "FineTuneJob": "finetunejobs", "Pod": "pods"}
LAG = 1.5
"""Seconds by which a watch is behind at most, and so many changes of one object."""
CHANGES = 4
LEAST_PREFLIGHT = 3.0
"""Seconds that a preflight takes at least: it starts a pod, and talks to storage."""
GRACE, COMMIT = 120.0, 10.0
"""Seconds that a pod has after it was asked to go, and that a trainer takes of them."""
FIRST_ERROR, LONGEST_ERROR = 0.5, 30.0
DONE_STEP = 9


def controlled_by(kind: str, uid: str) -> Raw:
    """An owner reference as an API server holds it, as far as it matters."""
    version = {"Job": "batch/v1", "FineTuneJob": f"{GROUP}/{VERSION}"}[kind]
    return {"apiVersion": version, "kind": kind, "uid": uid, "controller": True}


@types.coroutine
def _turn() -> Generator[None, str, str]:
    """The request, or its answer, is on its way."""
    return (yield)


@dataclass
class Change:
    kind: Kind
    raw: Raw
    gone: bool
    at: float


@dataclass
class Stored:
    """A run in the bucket."""

    step: int = 0
    published: bool = False


@dataclass
class Trainer:
    """What a pod of an attempt does between its start and its end."""

    resumed: int
    step: int


class Cluster:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.version = 0
        self.made = 0
        self.there: dict[str, tuple[Kind, Raw]] = {}
        """By UID."""
        self.history: dict[str, list[Change]] = {}
        self.bucket: dict[str, Stored] = {}
        self.trainers: dict[str, Trainer] = {}
        """By UID of a pod that runs."""
        self.on_write: Callable[[str, str, Raw], None] = lambda uid, what, raw: None
        """Hears of each write of the operator that has an effect: whom it is for, what, and the object."""
        self.on_put: Callable[[Kind, Raw], None] = lambda kind, raw: None

    @property
    def now(self) -> datetime:
        return datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def time(self, *, later: float = 0.0) -> str:
        return format_time(self.now + timedelta(seconds=later))

    # --- the API server ---

    def put(self, kind: Kind, raw: Raw) -> Raw:
        self.version += 1
        raw = {**raw, "metadata": {**raw["metadata"], "resourceVersion": str(self.version)}}
        uid = raw["metadata"]["uid"]
        self.there[uid] = kind, raw
        self.history.setdefault(uid, []).append(Change(kind, raw, gone=False, at=self.seconds))
        self.on_put(kind, raw)
        return raw

    def remove(self, uid: str) -> None:
        self.version += 1
        kind, raw = self.there.pop(uid)
        raw = {**raw, "metadata": {**raw["metadata"], "resourceVersion": str(self.version)}}
        self.history[uid].append(Change(kind, raw, gone=True, at=self.seconds))
        self.trainers.pop(uid, None)

    def all(self, kind: Kind) -> list[Raw]:
        return [raw for found, raw in self.there.values() if found == kind]

    def named(self, kind: Kind, name: str) -> Raw | None:
        return next((raw for raw in self.all(kind) if raw["metadata"]["name"] == name), None)

    def create(self, kind: Kind, manifest: Raw) -> Raw:
        self.made += 1
        meta = {"uid": f"{self.made:08d}-0000", "creationTimestamp": self.time(), "generation": 1}
        return self.put(kind, {**manifest, "metadata": {**manifest["metadata"], **meta}})

    # --- what there is ---

    def subjects(self) -> list[Raw]:
        return self.all("finetunejobs")

    def jobs(self, role: str = "") -> list[Raw]:
        return [raw for raw in self.all("jobs") if not role or raw["metadata"]["labels"][ROLE] == role]

    def pods(self, job: Raw | None = None) -> list[Raw]:
        pods = self.all("pods")
        return pods if job is None else [pod for pod in pods if controller(pod, "Job") == job["metadata"]["uid"]]

    def running(self, role: str = "") -> list[Raw]:
        """Pods in which a container runs."""
        mine = (pod for pod in self.all("pods") if not role or pod["metadata"]["labels"][ROLE] == role)
        return [pod for pod in mine if "running" in state_of(pod)]

    def live(self, job: Raw) -> bool:
        """An attempt that goes on or is to begin."""
        ended = (job.get("status") or {}).get("conditions")
        return not ended and not any("terminated" in state_of(pod) for pod in self.pods(job))

    def config_of(self, pod: Raw) -> Raw | None:
        """What its program reads, of the very document."""
        labels = pod["metadata"]["labels"]
        same = {name: labels[name] for name in (JOB_UID, GENERATION)}.items()
        return next((raw for raw in self.all("configmaps") if same <= raw["metadata"]["labels"].items()), None)

    def stored(self, run: str) -> Stored:
        return self.bucket.setdefault(run, Stored())

    # --- the controllers: each of these is one step that one of them may take now ---

    def chores(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for job in self.jobs():
            found += self._chores_of_job(job)
        for pod in self.pods():
            uid, meta = pod["metadata"]["uid"], pod["metadata"]
            state = state_of(pod)
            if controller(pod, "Job") not in self.there and "deletionTimestamp" not in meta:
                found.append(lambda uid=uid: self.ask_to_go(uid))
            elif "deletionTimestamp" in meta and not self._commits(pod):
                found.append(lambda uid=uid: self._let_go(uid))
            elif not state and "deletionTimestamp" not in meta:
                found.append(lambda uid=uid: self._start(uid))
        going = {raw["metadata"]["uid"] for raw in self.subjects() if "deletionTimestamp" in raw["metadata"]}
        for raw in (*self.jobs(), *self.all("configmaps")):
            if controller(raw, "FineTuneJob") in going or controller(raw, "FineTuneJob") not in self.there:
                found.append(lambda uid=raw["metadata"]["uid"]: self.remove(uid))
        owners = {controller(raw, "FineTuneJob") for _, raw in self.there.values()}
        return [*found, *(lambda uid=uid: self.remove(uid) for uid in sorted(going - owners))]

    def _chores_of_job(self, job: Raw) -> list[Callable[[], None]]:
        uid, ended = job["metadata"]["uid"], (job.get("status") or {}).get("conditions")
        if ended:
            over = parse_time(ended[0]["lastTransitionTime"])
            assert over is not None
            old = (self.now - over).total_seconds() > job["spec"]["ttlSecondsAfterFinished"]
            return [lambda: self.remove(uid)] if old else []
        pods = self.pods(job)
        if not pods:
            if job.get("status"):  # its pod is gone: that counts as a failure
                return [lambda: self._end_job(uid, "Failed")]
            return [lambda: self._make_pod(uid)]
        codes = [state_of(pod)["terminated"]["exitCode"] for pod in pods if "terminated" in state_of(pod)]
        if codes:
            return [lambda: self._end_job(uid, "Failed" if any(codes) else "Complete")]
        going = any("deletionTimestamp" in pod["metadata"] for pod in pods)
        return [lambda: self._end_job(uid, "Failed")] if going else []

    def _make_pod(self, job: str) -> None:
        _, raw = self.there[job]
        self.put("jobs", {**raw, "status": {"active": 1}})
        template = raw["spec"]["template"]["metadata"]
        meta = {
            "name": f"{raw['metadata']['name']}-x",
            "namespace": "ns",
            "labels": template["labels"],
            "annotations": template["annotations"],
            "ownerReferences": [controlled_by("Job", job)],
        }
        self.create("pods", {"metadata": meta, "spec": {}, "status": {"phase": "Pending"}})

    def _start(self, pod: str) -> None:
        _, raw = self.there[pod]
        run = raw["metadata"]["labels"].get(RUN)
        if run is not None:
            step = self.stored(run).step
            self.trainers[pod] = Trainer(step, step)
        status = {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "startTime": self.time(),
            "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": self.time()}],
            "containerStatuses": [{"name": _container(raw), "state": {"running": {}}}],
        }
        self.put("pods", {**raw, "spec": {"nodeName": "n"}, "status": status})

    def _end_job(self, job: str, how: str) -> None:
        _, raw = self.there[job]
        ended = {"type": how, "status": "True", "lastTransitionTime": self.time()}
        self.put("jobs", {**raw, "status": {"conditions": [ended]}})

    def ask_to_go(self, pod: str, *, disrupted: bool = False) -> None:
        _, raw = self.there[pod]
        meta = {"deletionTimestamp": self.time(later=GRACE), "deletionGracePeriodSeconds": int(GRACE)}
        status = raw["status"]
        if disrupted:
            why = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "m"}
            status = {**status, "conditions": [*status.get("conditions", ()), why]}
        self.put("pods", {**raw, "metadata": {**raw["metadata"], **meta}, "status": status})

    def _commits(self, pod: Raw) -> bool:
        deadline = parse_time(pod["metadata"]["deletionTimestamp"])
        assert deadline is not None
        left = (deadline - self.now).total_seconds()
        return pod["metadata"]["uid"] in self.trainers and left > GRACE - COMMIT

    def _let_go(self, pod: str) -> None:
        """It stops in order if it runs, and is gone the next time."""
        _, raw = self.there[pod]
        if "running" in state_of(raw):
            self.end(pod, 45)
        else:
            self.remove(pod)

    # --- pods, by their programs ---

    def end(self, pod: str, code: int, *, said: bool = True) -> None:
        """The program ends, with its last message if it `said` one; 0 and 45 have committed what was done."""
        _, raw = self.there[pod]
        train = raw["metadata"]["labels"][ROLE] == "train"
        last = (self._trained(pod, raw, code) if train else self._looked(raw, code)) if code in (0, 45) else None
        self.trainers.pop(pod, None)
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": self.time()}
        if last is not None and said:
            ended["message"] = last.model_dump_json(by_alias=True)
        status = {**raw["status"], "phase": "Failed" if code else "Succeeded"}
        status["containerStatuses"] = [{"name": _container(raw), "state": {"terminated": ended}}]
        self.put("pods", {**raw, "status": status})

    def _trained(self, pod: str, raw: Raw, code: int) -> LastMessage:
        run, trainer = raw["metadata"]["labels"][RUN], self.trainers[pod]
        stored = self.stored(run)
        stored.step = trainer.step if code else DONE_STEP
        stored.published = stored.published or not code
        if code:
            done = {"step": stored.step, "reached_step": stored.step, "resumed_from_step": trainer.resumed or None}
            return LastMessage(code=code, reason="Stopped", message="m", run_id=run, **done)
        return LastMessage(code=0, reason="Trained", message="m", run_id=run, result=result_of(run))

    def _looked(self, raw: Raw, code: int) -> LastMessage | None:
        if code:
            return None
        run = self._run_of(raw)
        stored = self.bucket.get(run)
        state: Any = "Fresh" if stored is None else "Reused" if stored.published else "Resume"
        step = stored.step if stored is not None else None
        outcome = PreflightOutcome(state=state, run_id=run, step=step, summary=PreflightStatus())
        result = result_of(run) if state == "Reused" else None
        return LastMessage(code=0, reason=state, message="m", preflight=outcome, result=result)

    def _run_of(self, pod: Raw) -> str:
        """Equal documents are equal runs, whosever they are."""
        config = self.config_of(pod)
        assert config is not None
        return str(config["metadata"]["annotations"][ASKED])

    def may_end(self, pod: Raw) -> bool:
        created = parse_time(pod["metadata"]["creationTimestamp"])
        assert created is not None
        waited = (self.now - created).total_seconds()
        return pod["metadata"]["labels"][ROLE] == "train" or waited >= LEAST_PREFLIGHT

    def kill_overdue(self) -> None:
        for pod in self.pods():
            deadline = parse_time(pod["metadata"].get("deletionTimestamp"))
            if deadline is not None and deadline <= self.now:
                self.remove(pod["metadata"]["uid"])

    # --- people ---

    def edit(self, subject: Raw, spec: Raw) -> None:
        if spec != subject["spec"]:
            meta = {**subject["metadata"], "generation": subject["metadata"]["generation"] + 1}
            self.put("finetunejobs", {**subject, "metadata": meta, "spec": spec})


class Process:
    """An operator: it knows what the watches have brought so far, works on what is due, and forgets all as it dies."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.cache = Cache()
        self.cache.apply("finetuneprofiles", {"metadata": {"name": "default", "uid": "p", "resourceVersion": "1"}})
        self.read = {uid: len(changes) for uid, changes in cluster.history.items()}
        for kind, raw in cluster.there.values():
            self.cache.apply(kind, raw)
        self.due: dict[str, float] = dict.fromkeys(self.cache.subjects(), cluster.seconds)
        self.flights: dict[str, Any] = {}
        """Looks that wait for an answer, by key."""
        self._dirty: set[str] = set()
        self._errors: dict[str, int] = {}
        kube: Any = _Kube(cluster)
        progress: Any = _Progress(cluster)
        observer = Observer(self.cache, kube, progress, defaults=Defaults(trainer_image="t", preflight_image="p"))
        self._reconciler = Reconciler(self.cache, kube, observer, clock=lambda: cluster.now)

    # --- watches ---

    def behind(self) -> list[str]:
        """UIDs of objects of which changes are on their way."""
        history = self.cluster.history
        return [uid for uid in history if self.read.get(uid, 0) < len(history[uid])]

    def deliver(self, uid: str, *, newest: bool = False) -> None:
        """The next change of an object; or only the newest, which then stands for all of them."""
        changes, number = self.cluster.history[uid], self.read.get(uid, 0)
        first, number = number == 0, len(changes) - 1 if newest else number
        change = changes[number]
        self.read[uid] = number + 1
        concerned = self.cache.removed(change.raw) if change.gone else self.cache.apply(change.kind, change.raw)
        looked_at = change.kind == "finetunejobs" and (first or change.gone)
        for key in sorted({*concerned, *([uid] if looked_at else [])}):
            self.wake(key)

    def catch_up(self, *, older_than: float = 0.0) -> None:
        for uid in self.behind():
            changes = self.cluster.history[uid]
            late = self.cluster.seconds - older_than
            while (n := self.read.get(uid, 0)) < len(changes) and (changes[n].at <= late or len(changes) - n > CHANGES):
                self.deliver(uid)

    # --- the queue ---

    def wake(self, key: str) -> None:
        if key in self.flights:
            self._dirty.add(key)
        else:
            self.due[key] = self.cluster.seconds

    def ready(self) -> list[str]:
        return [key for key, at in self.due.items() if at <= self.cluster.seconds]

    def look(self, key: str) -> None:
        """Until its first request is on its way."""
        del self.due[key]
        self._dirty.discard(key)
        self.flights[key] = self._reconciler(key)
        self.go_on(key, first=True)

    def go_on(self, key: str, *, outcome: str = "", first: bool = False) -> None:
        """The request arrives, or its answer does; "lost": it does not."""
        flight = self.flights[key]
        try:
            flight.send(None if first else outcome)
            return
        except StopIteration as done:
            again = done.value
            self._errors.pop(key, None)
        except (ApiError, TimeoutError):
            again = min(FIRST_ERROR * 2 ** self._errors.get(key, 0), LONGEST_ERROR)
            self._errors[key] = self._errors.get(key, 0) + 1
        del self.flights[key]
        if key in self._dirty:
            self._dirty.discard(key)
            again = 0.0
        if again is not None:
            self.due[key] = self.cluster.seconds + again

    def finish(self, key: str) -> None:
        while key in self.flights:
            self.go_on(key)

    def drop(self, key: str) -> None:
        """The look waits for no answer any more."""
        if key in self.flights:
            self.flights.pop(key).close()

    def die(self) -> None:
        for key in list(self.flights):
            self.drop(key)


class _Kube:
    """The operator's requests, each of which takes two turns: to arrive, and to be answered."""

    outside = False

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def _request(self, effect: Callable[[], T]) -> T:
        if await _turn() == "lost":
            raise TimeoutError
        answer = effect()
        if await _turn() == "lost":
            raise TimeoutError
        return answer

    async def create(self, manifest: Raw) -> Raw:
        if manifest["kind"] == "Event":
            return manifest
        return await self._request(lambda: self._create(json.loads(json.dumps(manifest))))

    def _create(self, manifest: Raw) -> Raw:
        kind, name = KINDS[manifest["kind"]], manifest["metadata"]["name"]
        if self._cluster.named(kind, name) is not None:
            raise ApiError(409, "AlreadyExists", name)
        self._cluster.on_write(controller(manifest, "FineTuneJob"), "create", manifest)
        return self._cluster.create(kind, manifest)

    async def get(self, kind: str, namespace: str, name: str) -> Raw:
        def found() -> Raw:
            raw = self._cluster.named(KINDS[kind], name)
            if raw is None:
                raise ApiError(404, "NotFound", name)
            return raw

        return await self._request(found)

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        def effect() -> None:
            raw = self._cluster.named("jobs", name)
            if raw is not None and raw["metadata"]["uid"] == uid:
                self._cluster.on_write(controller(raw, "FineTuneJob"), "delete", raw)
                self._cluster.remove(uid)

        await self._request(effect)

    async def write_status(self, namespace: str, name: str, *, body: Raw) -> Raw:
        def effect() -> Raw:
            raw = self._cluster.named("finetunejobs", name)
            if raw is None:
                raise ApiError(404, "NotFound", name)
            if raw["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
                raise ApiError(409, "Conflict", name)
            self._cluster.on_write(raw["metadata"]["uid"], "status", raw)
            return self._cluster.put("finetunejobs", {**raw, "status": body["status"]})

        return await self._request(effect)

    async def refusals(self, namespace: str) -> dict[str, str]:
        return {}

    async def unprepared(self, namespace: str) -> dict[str, tuple[str, str]]:
        return {}


class _Progress:
    """What trainers answer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def read(self, namespace: str, pods: Any, *, ask: bool = True) -> Progress | None:
        for pod in pods:
            trainer = self._cluster.trainers.get(pod.uid)
            if trainer is not None:
                run = self._cluster.there[pod.uid][1]["metadata"]["labels"][RUN]
                now = self._cluster.time()
                return Progress(
                    run_id=run,
                    stage="Training",
                    step=trainer.step,
                    total_steps=DONE_STEP,
                    resumed_from_step=trainer.resumed or None,
                    started_at=now,
                    updated_at=now,
                )
        return None


def clock(cluster: Cluster) -> Callable[[], None]:
    """The operator's monotonic clock is the cluster's. Returns what undoes it."""
    told: Any = SimpleNamespace(monotonic=lambda: cluster.seconds)
    patches = [patch.object(module, "time", told) for module in (cache, observe, reconcile, refusals)]
    for each in patches:
        each.start()
    return lambda: [each.stop() for each in patches] and None


def state_of(pod: Raw) -> Raw:
    return next((c["state"] for c in pod["status"].get("containerStatuses", ())), {})


def result_of(run: str) -> TrainOutcome:
    return TrainOutcome(
        final_step=DONE_STEP,
        total_steps=DONE_STEP,
        evaluation=EvaluationStatus(tuned={"f1": 0.5}),
        model=ModelStatus(uri="s3://m", digest=f"sha256:{run}", size_bytes=1),
    )


def gave_up(subject: Raw) -> bool:
    """It is done, or keeps nobody waiting for a time."""
    told = Subject.of(subject)
    stalled = condition(told.status, "Stalled")
    return told.suspended or told.finished or (stalled is not None and stalled.status == "True")


def _container(pod: Raw) -> str:
    return {"train": "trainer"}.get(pod["metadata"]["labels"][ROLE], "preflight")
