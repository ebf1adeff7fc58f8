"""Observe, decide, act: one look at one FineTuneJob. The status is written once, at the end, if it changed."""

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from math import inf

from finetune_api import GROUP, VERSION
from finetune_api.contract import RunConfig
from finetune_api.status import FineTuneJobStatus
from finetune_operator import manifests, tracing
from finetune_operator.cache import NEWS_SECONDS, Cache, Kind
from finetune_operator.decide import decide, refused, undeleted
from finetune_operator.kube import TROUBLE, ApiError, Kube, NotLeading
from finetune_operator.manifests import Manifest
from finetune_operator.metrics import ACTIONS, RECONCILE_SECONDS, RECONCILES, STATUS_WRITES, Spent
from finetune_operator.observe import Observer
from finetune_operator.reading import with_unknown
from finetune_operator.status import PROGRESS_WRITES, notes
from finetune_operator.verdict import (
    Action,
    CreateConfig,
    CreatePreflight,
    CreateTrain,
    Decision,
    DeleteJob,
    Group,
    Note,
    Rival,
)
from finetune_operator.views import MANAGED_BY, MANAGER, SELECTOR, Subject, controller, format_time

logger = logging.getLogger(__name__)

LONGEST_BEHIND = 60.0
"""Seconds between two looks on a picture that does not get right."""
TURN_SECONDS = 1.1 / PROGRESS_WRITES
"""Between two turns; a little more than their share, so that one which comes late does not hold up all after it."""
LONGEST_REST = 600.0
"""Seconds after which a FineTuneJob that waits for a time is looked at again, or the clock that jumped while that time
was computed would decide. It is the longest delay that policies ask for."""
KINDS: dict[str, Kind] = {"Job": "jobs", "ConfigMap": "configmaps"}
UNANSWERED = 10.0
"""Seconds for which a train Job may be there of which the API server has not answered whether it took it."""
NAME_TAKEN, LABEL_LOST = "NameTaken", "LabelLost"
FAILED_LOOKS = 3
"""In a row, after which the FineTuneJob itself says so: a status that cannot be decided cannot tell why."""


class Behind(Exception):
    """The cache did not know an object that is there: look again, nothing is decided on a wrong picture."""


class _Pace:
    """No second has more than PROGRESS_WRITES of mere progress, however many trainings go on in step.

    Who has to wait gets the next turn that is free, so that nobody is passed over.
    """

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=int(PROGRESS_WRITES))
        self._turns: dict[str, float] = {}
        self._last_turn = 0.0

    def room(self, key: str) -> bool:
        now = time.monotonic()
        return self._turns.get(key, self._last_turn) <= now and self._full_until() <= now

    def waits(self, key: str) -> bool:
        """Whether it has been told to wait, and still has to."""
        return key in self._turns and not self.room(key)

    def take(self, key: str) -> None:
        self._turns.pop(key, None)
        self._taken.append(time.monotonic())

    def wait(self, key: str) -> float:
        """Seconds until its turn, which it keeps."""
        now = time.monotonic()
        if key not in self._turns:
            self._turns[key] = self._last_turn = max(now, self._last_turn) + TURN_SECONDS
        return max(self._turns[key] - now, self._full_until() - now, 0.01)

    def forget(self, key: str) -> None:
        self._turns.pop(key, None)

    def _full_until(self) -> float:
        return self._taken[0] + 1.0 if len(self._taken) == self._taken.maxlen else 0.0


class Reconciler:
    """The queue's work. Keys are UIDs of FineTuneJobs."""

    def __init__(
        self, cache: Cache, kube: Kube, observer: Observer, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._cache = cache
        self._kube = kube
        self._observer = observer
        self._clock = clock
        self._behind: dict[str, int] = {}
        """How often in a row an object that is there was not in the cache: without its labels it never comes."""
        self._failed: dict[str, int] = {}
        """How many looks in a row have failed."""
        self._written: dict[str, datetime] = {}
        """When a status was last written, to space writes of mere progress; nothing else depends on it."""
        self._unanswered: dict[str, tuple[Subject, FineTuneJobStatus]] = {}
        """What a status was written over and with, where no answer told whether it is."""
        self._begun: dict[str, int] = {}
        """The last attempt that was begun, to know it if its Job is gone before the status tells of it."""
        self._claims: dict[str, tuple[str, float]] = {}
        """The run of which an attempt is being begun, and until when that counts, by the monotonic clock."""
        self._pace = _Pace()

    async def __call__(self, key: str) -> float | None:
        """Seconds until the next look, or None. Raises ApiError and what the network raises."""
        started = time.monotonic()
        outcome = "error"
        try:
            again = None
            await self._hear(key)
            if self._cache.rests(key):
                self._forget(key)
            else:
                with tracing.look(self._cache.subject(key)):
                    again = await self._look(key)
            outcome = "done"
            self._behind.pop(key, None)
            return again
        except Behind:
            outcome = "behind"
            times = self._behind[key] = self._behind.get(key, 0) + 1
            return min(2.0 ** (times - 2), LONGEST_BEHIND) if times > 1 else 0.0
        except Exception as error:
            await self._tell_failure(key, error)
            raise
        finally:
            RECONCILES.labels(outcome).inc()
            RECONCILE_SECONDS.observe(time.monotonic() - started)

    async def _look(self, key: str) -> float | None:
        if self._cache.unsettled(key):
            return NEWS_SECONDS / 4
        now = self._clock()
        last_write, begun = self._written.get(key), self._begun.get(key, 0)
        ask = not self._pace.waits(key)  # until its turn what the trainer said last will do
        observed = await self._observer.observe(key, now=now, last_write=last_write, begun=begun, ask=ask)
        if observed is None:
            self._forget(key)
            return None
        rivals = (*observed.rivals, *self._claiming(observed.rivals))
        groups = tuple(self._starting(observed.groups))
        observed = replace(observed, room=self._pace.room(key), rivals=rivals, groups=groups)
        decision = self._paced(key, decide(observed, now=now))
        refusal: ApiError | None = None
        try:
            with self._claimed(key, decision):
                undone = await self._carry_out(key, observed.subject, decision.actions)
            if undone:
                refusal = next(iter(undone.values()))
                words = {name: _steady(error.message) for name, error in undone.items()}
                decision = self._paced(key, undeleted(observed, words, reason=f"Delete{refusal.reason}", now=now))
        except ApiError as error:
            if not self._refuses(key, error):
                raise
            refusal = error
            reason = error.reason if error.reason in (NAME_TAKEN, LABEL_LOST) else f"Create{error.reason}"
            decision = self._paced(key, refused(observed, reason=reason, message=_steady(error.message), now=now))
        if decision.status is not None:
            await self._write(observed.subject, decision.status, now=now)
        await self._tell(observed.subject, decision.events, now=now)
        if refusal is None or refusal.lasting:
            self._failed.pop(key, None)
        return None if decision.again_after is None else min(decision.again_after, LONGEST_REST)

    async def _tell_failure(self, key: str, error: Exception) -> None:
        """In the log each time, in an Event once; not what is of the API server or the network, and not of this job."""
        times = self._failed[key] = self._failed.get(key, 0) + 1
        subject, names = self._cache.subject(key), self._cache.log_names(key)
        words = f"{type(error).__name__}: {error}"
        logger.warning("%s: look %d in a row failed: %s", names.get("job", key), times, words, extra=names)
        trouble = isinstance(error, (*TROUBLE, NotLeading))
        ours = error.lasting or error.internal if isinstance(error, ApiError) else not trouble
        if subject is None or times != FAILED_LOOKS or not ours:
            return
        note = Note(
            "Warning", "ReconcileError", f"{times} looks in a row failed; tried again until one does not. {words}"
        )
        try:
            await self._tell(subject, (note,), now=self._clock())
        except (*TROUBLE, NotLeading) as trouble:
            logger.warning("%s: no Event %s: %s", names["job"], note.reason, trouble, extra=names)

    @contextmanager
    def _claimed(self, key: str, decision: Decision) -> Iterator[None]:
        """A twin or a group that is looked at meanwhile does not see the train Job before the API server answers."""
        run = next((action.run_id for action in decision.actions if isinstance(action, CreateTrain)), None)
        if run is None:
            yield
            return
        self._claims[key] = run, inf
        answered = False
        try:
            yield
            answered = True
        except Behind:
            answered = True
            raise
        except ApiError as error:
            answered = error.code < 500
            raise
        finally:
            self._claims[key] = run, -inf if answered else time.monotonic() + UNANSWERED

    def _claiming(self, rivals: Iterable[Rival]) -> Iterator[Rival]:
        for rival in rivals:
            run = self._beginning(rival.uid)
            if run:
                yield replace(rival, run=run, holding=True)

    def _starting(self, groups: Iterable[Group]) -> Iterator[Group]:
        """One that is being begun has no Job yet, and does not wait for an older one any more."""
        for group in groups:
            yield replace(group, starts=True) if self._beginning(group.uid) else group

    def _beginning(self, uid: str) -> str:
        """The run of which an attempt is being begun, or an empty string."""
        run, until = self._claims.get(uid, ("", -inf))
        return run if time.monotonic() < until else ""

    def _paced(self, key: str, decision: Decision) -> Decision:
        if not decision.routine:
            return decision
        if decision.status is None:
            again = decision.again_after if decision.again_after is not None else inf
            return replace(decision, again_after=min(self._pace.wait(key), again))
        self._pace.take(key)
        return decision

    def _forget(self, key: str) -> None:
        self._failed.pop(key, None)
        self._written.pop(key, None)
        self._begun.pop(key, None)
        self._claims.pop(key, None)
        self._unanswered.pop(key, None)
        self._pace.forget(key)
        self._observer.forget(key)

    # --- actions ---

    async def _carry_out(self, key: str, subject: Subject, actions: Iterable[Action]) -> dict[str, ApiError]:
        """By name the Jobs that the API server refuses to delete, which keeps nothing else from being done."""
        undone: dict[str, ApiError] = {}
        for action in actions:
            try:
                await self._act(subject, action)
            except ApiError as error:
                if not isinstance(action, DeleteJob) or not self._refuses(key, error):
                    raise
                logger.warning(
                    "%s/%s: Job %s is not deleted: %s",
                    *(subject.namespace, subject.name, action.name, error),
                    extra=subject.log_names,
                )
                undone[action.name] = error
        return undone

    def _refuses(self, key: str, error: ApiError) -> bool:
        """Whether somebody has to change something first. What is internal may be over the next time."""
        return error.lasting or (error.internal and self._failed.get(key, 0) + 1 >= FAILED_LOOKS)

    async def _act(self, subject: Subject, action: Action) -> None:
        logger.info("%s/%s: %s", subject.namespace, subject.name, _told(action), extra=subject.log_names)
        match action:
            case CreateConfig(config, key):
                await self._create(subject, manifests.config_map(subject, config, key=key))
            case CreatePreflight(config, key, ordinal, counters, attempts, run, inputs):
                job = manifests.preflight_job(
                    subject,
                    config,
                    key=key,
                    ordinal=ordinal,
                    counters=counters,
                    attempts=attempts,
                    run=run,
                    inputs=inputs,
                    pinned_in=self._pinned_in(subject, config),
                )
                await self._create(subject, job)
            case CreateTrain(config, key, run_id, ordinal, counters, inputs):
                if config.pods.nodes > 1:
                    await self._create(subject, manifests.service(subject))
                job = manifests.train_job(
                    subject,
                    config,
                    key=key,
                    run_id=run_id,
                    ordinal=ordinal,
                    counters=counters,
                    inputs=inputs,
                    pinned_in=self._pinned_in(subject, config),
                )
                await self._create(subject, job)
                self._begun[subject.uid] = ordinal
            case DeleteJob(name, uid):
                await self._kube.delete_job(subject.namespace, name, uid=uid)
                self._cache.forget(uid)
                if name == manifests.child_name(subject, "train", self._begun.get(subject.uid, 0)):
                    del self._begun[subject.uid]  # it is not lost, and what it cost was told before
        ACTIONS.labels(type(action).__name__).inc()
        tracing.acted(type(action).__name__)

    def _pinned_in(self, subject: Subject, config: RunConfig) -> str:
        pinned = self._cache.pinned(subject.uid).get(config.generation)
        return pinned.name if pinned is not None else ""

    async def _create(self, subject: Subject, manifest: Manifest) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            created = await self._kube.create(manifest)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            there = await self._kube.get(kind, subject.namespace, name)
            if controller(there, "FineTuneJob") != subject.uid:
                message = f"{kind} {name} is in the way: {_whose(there)}"
                raise ApiError(422, NAME_TAKEN, message) from error
            if kind in KINDS and (there["metadata"].get("labels") or {}).get(MANAGED_BY) != MANAGER:
                message = f"{kind} {name} is there, but without its label {SELECTOR}; put it back, or delete the {kind}"
                raise ApiError(422, LABEL_LOST, message) from error
            if kind in KINDS:
                self._cache.apply(KINDS[kind], there)
                raise Behind(f"{kind} {name} is there, and the watch has not brought it yet") from error
            return
        if kind in KINDS:
            self._cache.apply(KINDS[kind], created)

    # --- the status ---

    async def _write(self, subject: Subject, status: FineTuneJobStatus, *, now: datetime) -> None:
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "FineTuneJob",
            "metadata": {
                "name": subject.name,
                "namespace": subject.namespace,
                "uid": subject.uid,
                "resourceVersion": subject.resource_version,
            },
            "spec": dict(subject.spec),
            "status": with_unknown(subject.status.document(), status.document(), subject.unknown),
        }
        self._unanswered[subject.uid] = subject, status
        try:
            written = await self._kube.write_status(subject.namespace, subject.name, body=body)
        except ApiError as error:
            if error.code < 500:
                del self._unanswered[subject.uid]
            STATUS_WRITES.labels("conflict" if error.code == 409 else "error").inc()
            if error.code == 404:
                return
            if error.code == 409:
                raise ApiError(409, error.reason, "the document changed meanwhile") from error
            raise
        STATUS_WRITES.labels("written").inc()
        tracing.wrote(status)
        del self._unanswered[subject.uid]
        Spent.of(subject, status).count()
        self._written[subject.uid] = now
        self._cache.apply("finetunejobs", written)
        run = {"run": status.run.id} if status.run is not None else {}
        told = {**subject.log_names, **run, "phase": status.phase}
        logger.info("%s/%s: %s: %s", subject.namespace, subject.name, status.phase, status.message, extra=told)

    async def _hear(self, key: str) -> None:
        """Whether a status that nobody answered was written: then it counts, and is told, like any other."""
        subject = self._cache.subject(key)
        before, status = self._unanswered.get(key, (subject, None))
        if subject is None or before is None or status is None or subject.resource_version == before.resource_version:
            return
        del self._unanswered[key]
        if subject.status == status:
            Spent.of(before, status).count()
            await self._tell(before, notes(before.status, status), now=self._clock())

    async def _tell(self, subject: Subject, events: tuple[Note, ...], *, now: datetime) -> None:
        for note in events:
            manifest = manifests.event(
                subject, kind=note.kind, reason=note.reason, message=note.message, now=format_time(now)
            )
            try:
                await self._kube.create(manifest)
            except ApiError as error:  # the status says the same
                if error.reason == "AlreadyExists":
                    continue
                words = (subject.namespace, subject.name, note.reason, error)
                logger.warning("%s/%s: no Event %s: %s", *words, extra=subject.log_names)


def _steady(words: str) -> str:
    """Without the port that a connection happened to have: another with each try would be a change of the status."""
    return re.sub(r"\b(read|write) tcp \S+?->", r"\1 tcp ", words)


def _whose(there: Manifest) -> str:
    owners = there["metadata"].get("ownerReferences") or ()
    names = [owner["name"] for owner in owners if owner.get("kind") == "FineTuneJob" and owner.get("controller")]
    if names:
        return f"it belongs to FineTuneJob {names[0]}, whose name and UID begin alike; make this one under another name"
    return "it belongs to something else; delete it"


def _told(action: Action) -> str:
    match action:
        case CreateConfig(config):
            return f"pin generation {config.generation}"
        case CreatePreflight():
            return f"begin preflight {action.ordinal}"
        case CreateTrain():
            return f"begin attempt {action.ordinal} of run {action.run_id}"
        case DeleteJob():
            return f"delete Job {action.name}"
