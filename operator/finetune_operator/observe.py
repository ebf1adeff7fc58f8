"""Gathers everything that one decision depends on into one frozen Observed."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from finetune_api.base import at
from finetune_api.contract import Progress
from finetune_api.resolve import Defaults
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.policies.suspend import still_there
from finetune_operator.policies.waiting import ANOTHER_GROUP
from finetune_operator.progress import ProgressReader
from finetune_operator.refusals import Told
from finetune_operator.verdict import PASSED, Group, Observed, Rival, condition, reason_of
from finetune_operator.views import Admission, Child, Pod, Subject

PATIENCE = timedelta(seconds=4)
"""How long a Job may have no pods before its Events are read."""
SLOW = timedelta(seconds=30)
"""How long a node may take to mount a pod's volumes and to give it a network before its Events are read."""
ASKED_AGAIN = 10.0
"""Seconds between two questions whether Kueue is installed."""

READY = (PASSED, ANOTHER_GROUP.reason)
"""Reasons of a job that begins an attempt as soon as it may."""


class Observer:
    """Reads the cache; asks pods for their progress and the API server for Events only where a decision needs it."""

    def __init__(self, cache: Cache, kube: Kube, progress: ProgressReader, *, defaults: Defaults) -> None:
        self._cache = cache
        self._kube = kube
        self._progress = progress
        self._defaults = defaults
        self._heard: dict[str, float] = {}
        """By UID of a FineTuneJob: when its trainer last answered, or was first seen to run, by the monotonic clock."""
        self._refusals = Told(lambda namespace: kube.refusals(namespace))
        self._unprepared = Told(lambda namespace: kube.unprepared(namespace))
        self._kueue: str | None = None
        self._kueue_asked: float | None = None

    async def observe(
        self, uid: str, *, now: datetime, last_write: datetime | None, begun: int, ask: bool = True
    ) -> Observed | None:
        """None when there is no such FineTuneJob. Its trainer is asked only if `ask`, or if it has said nothing yet."""
        subject = self._cache.subject(uid)
        if subject is None:
            return None
        live = not subject.finished and not subject.deleting
        progress = await self._read_progress(uid, ask=ask) if live else None
        refusals = await self._read_refusals(uid, now=now) if live else {}
        unprepared = await self._read_unprepared(uid, now=now) if live else {}
        kueue = await self._kueue_version() if live and self._queued(subject) else None
        admissions = await self._read_admissions(subject, kueue) if kueue is not None else {}
        subject = self._cache.subject(uid)  # time has passed: take everything else from one moment
        if subject is None:
            return None
        pinned = self._cache.pinned(uid)
        rivals = [r for other in self._cache.same_output(subject) for r in self._rivals(other, now=now)]
        several = self._nodes(subject) > 1 or any(one.config.pods.nodes > 1 for one in pinned.values())
        return Observed(
            subject=subject,
            defaults=self._defaults,
            profiles=self._cache.profiles(),
            pinned=pinned,
            unreadable=self._cache.unreadable(uid),
            children=self._cache.children(uid),
            pods=self._cache.pods(uid),
            rivals=(*rivals, *self._unattended(subject, now=now)),
            groups=self._groups(subject) if several else (),
            progress=progress,
            silent=self._silence(uid, answered=progress is not None),
            refusals=refusals,
            unprepared=unprepared,
            kueue=kueue is not None,
            admissions=admissions,
            known_for=self._cache.known_for(uid),
            underway=self._cache.underway,
            trainings=self._cache.trainings,
            last_write=last_write,
            begun=begun,
        )

    def forget(self, uid: str) -> None:
        """A FineTuneJob that nothing is to be done for any more."""
        self._heard.pop(uid, None)

    def _rivals(self, other: Subject, *, now: datetime) -> list[Rival]:
        """One for each run that it trains, and one for what it asks for.

        Who asks for another run by now, is stalled or suspended keeps nobody waiting, unless it trains. Pods that are
        to end still train, whatever became of their Job: who claimed the run now would fence their last checkpoint.
        """
        run, pods = other.status.run, self._cache.pods(other.uid)
        trains = [c for c in self._cache.children(other.uid) if c.role == "train" and not c.deleting]
        held = {c.run for c in trains if c.run and c.ended is None}
        held |= {pod.run for pod in pods if pod.run and still_there(pod, now=now)}
        stalled = condition(other.status, "Stalled")
        willing = not other.suspended and (not stalled or stalled.status != "True")
        waiting = run is not None and run.generation == other.generation and willing
        asked = {run.id} if run is not None and waiting else set()
        runs: list[str | None] = [*sorted(held | asked)] or [None]
        return [
            Rival(
                name=f"{other.namespace}/{other.name}",
                uid=other.uid,
                created=other.created,
                run=one,
                unfinished=not other.finished and not other.deleting,
                holding=one in held,
            )
            for one in runs
        ]

    def _unattended(self, subject: Subject, *, now: datetime) -> list[Rival]:
        """Pods of the run whose FineTuneJob is done, goes away or is gone, and Jobs that are still to make theirs.

        They commit a last checkpoint if nobody fences them; what goes on has begun before what is to begin.
        """
        run = subject.status.run
        left = self._cache.unattended(run.id, subject) if run is not None else []
        pods = [pod for pod in left if isinstance(pod, Pod) and pod.exit is None]  # another container may go on
        names = [f"pod {pod.name}" for pod in pods if still_there(pod, now=now)]
        jobs = [job for job in left if isinstance(job, Child)]
        names += [f"Job {job.name}" for job in jobs if not self._pods_of(job, job.owner)]
        return [_unattended(name, run.id) for name in names if run is not None]

    def _nodes(self, subject: Subject) -> int:
        """How many pods it may want to train together, as far as its document and its profile say so."""
        profile = self._cache.profiles().get(_profile(subject))
        asked = [at(subject.spec, "resources.nodes"), at(profile.spec, "resources.nodes") if profile else None]
        return next((nodes for nodes in asked if isinstance(nodes, int)), 1)

    def _groups(self, subject: Subject) -> tuple[Group, ...]:
        """Others that start several pods without a queue, or are about to."""
        found = []
        for other in self._cache.working():
            same = (other.namespace, _profile(other)) == (subject.namespace, _profile(subject))
            if not same or other.uid == subject.uid:
                continue
            jobs = [c for c in self._cache.children(other.uid) if c.role == "train" and not c.deleting and not c.ended]
            starts = any(self._starts(job, other.uid) for job in jobs)
            ready = not jobs and not other.suspended and self._nodes(other) > 1 and "queue" not in other.spec
            if starts or (ready and reason_of(other.status) in READY):
                name = f"{other.namespace}/{other.name}"
                found.append(Group(name=name, uid=other.uid, created=other.created, starts=starts))
        return tuple(found)

    def _starts(self, job: Child, uid: str) -> bool:
        """Whether it may hold nodes and lack others: one that has them all waits for nobody's."""
        placed = sum(pod.node is not None or pod.over for pod in self._pods_of(job, uid))
        return job.nodes > 1 and placed < job.nodes and not job.queue and not job.suspended

    async def _read_progress(self, uid: str, *, ask: bool) -> Progress | None:
        trains = [child for child in self._cache.children(uid) if child.role == "train" and not child.deleting]
        newest = max(trains, key=lambda child: child.ordinal, default=None)
        subject = self._cache.subject(uid)
        if newest is None or subject is None:
            return None
        pods = self._pods_of(newest, uid)
        if not any(pod.running for pod in pods):
            return None
        progress = await self._progress.read(subject.namespace, pods, ask=ask)
        return progress if progress is not None and progress.run_id == newest.run else None

    def _silence(self, uid: str, *, answered: bool) -> timedelta:
        """Of the train pods that run now."""
        trains = {child.uid for child in self._cache.children(uid) if child.role == "train" and not child.deleting}
        if not any(pod.running and pod.owner in trains for pod in self._cache.pods(uid)):
            self._heard.pop(uid, None)
            return timedelta(0)
        now = time.monotonic()
        if answered:
            self._heard[uid] = now
        return timedelta(seconds=now - self._heard.setdefault(uid, now))

    async def _read_refusals(self, uid: str, *, now: datetime) -> Mapping[str, str]:
        found: dict[str, str] = {}
        subject = self._cache.subject(uid)
        for child in self._cache.children(uid):
            idle = child.ended is not None or child.deleting or child.suspended or now - child.created < PATIENCE
            if subject is None or idle or self._pods_of(child, uid):
                continue
            refusal = await self._refusals.of(subject.namespace, child.uid)
            if refusal:
                found[child.uid] = refusal
        return found

    async def _read_unprepared(self, uid: str, *, now: datetime) -> Mapping[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        subject = self._cache.subject(uid)
        for pod in self._cache.pods(uid):
            if subject is None or not pod.being_prepared or pod.placed is None or now - pod.placed < SLOW:
                continue
            told = await self._unprepared.of(subject.namespace, pod.uid)
            if told is not None:
                found[pod.uid] = told
        return found

    def _queued(self, subject: Subject) -> bool:
        """Whether a queue may matter."""
        named = "queue" in subject.spec or any("queue" in profile.spec for profile in self._cache.profiles().values())
        if named or any(child.queue or child.suspended for child in self._cache.children(subject.uid)):
            return True
        # A profile may name none any more: what is pinned holds. Looked into last, as it has to be unfolded.
        return any(one.config.pods.queue is not None for one in self._cache.pinned(subject.uid).values())

    async def _kueue_version(self) -> str | None:
        now = time.monotonic()
        if self._kueue_asked is None or now - self._kueue_asked >= ASKED_AGAIN:
            self._kueue, self._kueue_asked = await self._kube.kueue(), now
        return self._kueue

    async def _read_admissions(self, subject: Subject, version: str) -> Mapping[str, Admission]:
        found: dict[str, Admission] = {}
        for child in self._cache.children(subject.uid):
            if not child.suspended or child.ended is not None or child.deleting:
                continue
            try:
                workload = await self._kube.workload(subject.namespace, version=version, job_uid=child.uid)
            except ApiError as error:
                found[child.uid] = Admission(f"Kueue cannot be asked: {error}", stuck=False)
                continue
            if workload is not None:
                found[child.uid] = Admission.of(workload)
        return found

    def _pods_of(self, child: Child, uid: str) -> list[Pod]:
        return [pod for pod in self._cache.pods(uid) if pod.owner == child.uid]


def _unattended(name: str, run: str) -> Rival:
    """The newest of all: who trains already does not make room for it, it is fenced by then."""
    newest = datetime.max.replace(tzinfo=UTC)
    return Rival(name=name, uid="", created=newest, run=run, unfinished=True, holding=True, attended=False)


def _profile(subject: Subject) -> str:
    return str(subject.spec.get("profile") or "default")
