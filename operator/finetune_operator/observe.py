"""Gathers everything that one decision depends on into one frozen Observed."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from finetune_api.contract import Progress
from finetune_api.resolve import Defaults
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.metrics import PROGRESS
from finetune_operator.policies.suspend import still_there
from finetune_operator.progress import ProgressReader
from finetune_operator.verdict import Observed, Rival, condition
from finetune_operator.views import Child, Pod, Subject

PATIENCE = timedelta(seconds=4)
"""How long a Job may have no pods before its Events are read."""


class Observer:
    """Reads the cache; asks pods for their progress and the API server for Events only where a decision needs it."""

    def __init__(self, cache: Cache, kube: Kube, progress: ProgressReader, *, defaults: Defaults) -> None:
        self._cache = cache
        self._kube = kube
        self._progress = progress
        self._defaults = defaults

    async def observe(self, uid: str, *, now: datetime, last_write: datetime | None) -> Observed | None:
        """None when there is no such FineTuneJob."""
        subject = self._cache.subject(uid)
        if subject is None:
            return None
        live = not subject.finished and not subject.deleting
        progress = await self._read_progress(uid) if live else None
        refusals = await self._read_refusals(uid, now=now) if live else {}
        subject = self._cache.subject(uid)  # time has passed: take everything else from one moment
        if subject is None:
            return None
        return Observed(
            subject=subject,
            defaults=self._defaults,
            profiles=self._cache.profiles(),
            pinned=self._cache.pinned(uid),
            unreadable=self._cache.unreadable(uid),
            children=self._cache.children(uid),
            pods=self._cache.pods(uid),
            rivals=tuple(self._rival(other, now=now) for other in self._cache.same_output(subject)),
            progress=progress,
            refusals=refusals,
            last_write=last_write,
        )

    def _rival(self, other: Subject, *, now: datetime) -> Rival:
        """Who asks for another run by now, is stalled or suspended keeps nobody waiting, unless it trains.

        Pods that are to end for spec.suspend still train: who claimed the run now would fence their last checkpoint.
        """
        run = other.status.run
        trains = [c for c in self._cache.children(other.uid) if c.role == "train" and not c.deleting]
        pods = self._cache.pods(other.uid) if other.suspended else ()
        lingering = any(pod.role == "train" and still_there(pod, now=now) for pod in pods)
        holding = run is not None and (any(c.run == run.id and c.ended is None for c in trains) or lingering)
        stalled = condition(other.status, "Stalled")
        willing = not other.suspended and (not stalled or stalled.status != "True")
        waiting = run is not None and run.generation == other.generation and willing
        return Rival(
            name=f"{other.namespace}/{other.name}",
            uid=other.uid,
            created=other.created,
            run=run.id if run is not None and (holding or waiting) else None,
            unfinished=not other.finished and not other.deleting,
            holding=holding,
        )

    async def _read_progress(self, uid: str) -> Progress | None:
        trains = [child for child in self._cache.children(uid) if child.role == "train" and not child.deleting]
        newest = max(trains, key=lambda child: child.ordinal, default=None)
        subject = self._cache.subject(uid)
        if newest is None or subject is None:
            return None
        pods = self._pods_of(newest, uid)
        if not any(pod.running for pod in pods):
            return None
        progress = await self._progress.read(subject.namespace, pods)
        fits = progress is not None and progress.run_id == newest.run
        PROGRESS.labels("answered" if fits else "silent").inc()
        return progress if fits else None

    async def _read_refusals(self, uid: str, *, now: datetime) -> Mapping[str, str]:
        found: dict[str, str] = {}
        subject = self._cache.subject(uid)
        for child in self._cache.children(uid):
            waits = child.ended is None and not child.deleting and now - child.created >= PATIENCE
            if subject is None or not waits or self._pods_of(child, uid):
                continue
            try:
                refusal = await self._kube.refusal(subject.namespace, uid=child.uid)
            except ApiError:
                continue  # without the right to read Events the status just says less
            if refusal:
                found[child.uid] = refusal
        return found

    def _pods_of(self, child: Child, uid: str) -> list[Pod]:
        return [pod for pod in self._cache.pods(uid) if pod.owner == child.uid]
