"""The cluster as decisions see it: frozen, typed, and holding only the fields that a decision reads.

Each view is made from the raw object by `of`; nothing else in the operator looks into raw objects.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from finetune_api import GROUP
from finetune_api.contract import LastMessage, RunConfig
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_operator.reading import Place, heard, written

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "finetune-operator"
SELECTOR = f"{MANAGED_BY}={MANAGER}"
JOB_UID = "finetune.dev/job-uid"
ROLE = "finetune.dev/role"
RUN = "finetune.dev/run"
INPUTS = "finetune.dev/inputs"
GENERATION = "finetune.dev/generation"
RESTART_KEY = "finetune.dev/restart-key"
ASKED = "finetune.dev/asked"
ORDINAL = "finetune.dev/ordinal"
ATTEMPTS = "finetune.dev/attempts-before"
FAILURES = "finetune.dev/failures"
TRIES = "finetune.dev/tries"
INTERRUPTIONS = "finetune.dev/interruptions"
HALVE = "finetune.dev/halve-micro-batch"
FINISH = "finetune.dev/finish-now"
FIGURES = "finetune.dev/preflight"
RETRY = "finetune.dev/retry"
QUEUE = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"

LIVE = ("suspend", "deadline", "budget", "retries", "ttlAfterFinished", "checkpoint")
"""Parts of spec of which nothing that is done depends."""

Raw = Mapping[str, Any]
Role = Literal["preflight", "train"]
CONTAINERS: Mapping[Role, str] = {"preflight": "preflight", "train": "trainer"}
"""The name of a pod's own container, by its role."""


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time of the API server."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def told_time(text: str | None) -> datetime | None:
    """None for what is no time with a zone: what a pod says is not trusted, nor what stands in a status."""
    try:
        moment = parse_time(text)
    except ValueError:
        return None
    return moment if moment is not None and moment.tzinfo is not None else None


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC, to the second, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def number_of(text: str | None) -> int:
    """What stands in a label or an annotation; 0 for what is no number."""
    return int(text) if text and re.fullmatch(r"\d{1,9}", text) else 0


def _created(meta: Raw) -> datetime:
    return parse_time(meta.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class Subject:
    """A FineTuneJob."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: datetime
    deleting: bool
    retry: str | None
    """The annotation finetune.dev/retry."""
    spec: Raw = field(hash=False)
    status: FineTuneJobStatus
    unknown: Mapping[Place, Any] = field(default_factory=dict, hash=False)
    """Fields of the status that another version of this operator has written."""

    @classmethod
    def of(cls, raw: Raw) -> "Subject":
        """What of its status cannot be read counts as wiped: everything in it can be found out again."""
        meta = raw["metadata"]
        status, rest = written(FineTuneJobStatus, raw.get("status") or {})
        return cls(
            namespace=meta["namespace"],
            name=meta["name"],
            uid=meta["uid"],
            generation=meta.get("generation", 1),
            resource_version=meta.get("resourceVersion", ""),
            created=_created(meta),
            deleting="deletionTimestamp" in meta,
            retry=(meta.get("annotations") or {}).get(RETRY, "")[:256] or None,
            spec=raw.get("spec") or {},
            status=status or FineTuneJobStatus(),
            unknown=rest,
        )

    @property
    def log_names(self) -> dict[str, str]:
        """By which the lines of one FineTuneJob are found in a log of JSON."""
        run, phase = self.status.run, self.status.phase
        known = {"run": run.id if run is not None else None, "phase": phase}
        named = {"job": f"{self.namespace}/{self.name}", "job_uid": self.uid}
        return {**named, **{name: value for name, value in known.items() if value}}

    @property
    def finished(self) -> bool:
        """Terminal for the generation that is asked for now."""
        return self.status.phase in ("Succeeded", "Failed") and self.status.observed_generation == self.generation

    @property
    def retry_asked(self) -> bool:
        """To try a failed one again, by the annotation."""
        return self.status.phase == "Failed" and self.retry is not None and self.retry != self.status.last_handled_retry

    @property
    def at_rest(self) -> bool:
        """Nothing is to be done for it, whatever else there is."""
        return self.deleting or (self.finished and not self.retry_asked)

    @property
    def suspended(self) -> bool:
        """spec.suspend, not as it is pinned: it holds for a document that cannot be resolved, too."""
        return self.spec.get("suspend") is True

    @property
    def asked(self) -> str:
        """Names what the document asks for, whatever it says of when and for how long: equal for equal documents."""
        lasting = {name: value for name, value in self.spec.items() if name not in LIVE}
        return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def output(self) -> str:
        output = self.spec.get("output") or {}
        return str(output.get("uri", "")).rstrip("/")


@dataclass(frozen=True, slots=True)
class Profile:
    """A FineTuneProfile; whether its spec is valid is found out when it is used."""

    name: str
    spec: Raw = field(hash=False)

    @classmethod
    def of(cls, raw: Raw) -> "Profile":
        return cls(name=raw["metadata"]["name"], spec=raw.get("spec") or {})


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a ConfigMap of ours holds. `key` was computed when it was pinned: a newer operator may compute another."""

    generation: int
    config: RunConfig
    key: str
    asked: str
    """Subject.asked of the document that was pinned."""
    name: str = ""
    """Of the ConfigMap, which another version may have named otherwise."""

    @classmethod
    def of(cls, raw: Raw) -> "Pinned":
        """Raises ValidationError for a config that this version cannot read."""
        meta = raw["metadata"]
        return cls(
            generation=number_of((meta.get("labels") or {}).get(GENERATION)),
            config=RunConfig.model_validate_json((raw.get("data") or {}).get("config.json", "")),
            key=(meta.get("annotations") or {}).get(RESTART_KEY, ""),
            asked=(meta.get("annotations") or {}).get(ASKED, ""),
            name=meta["name"],
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """What is carried from one child Job to the next, so that no memory of ours matters."""

    failures: int = 0
    """Crashes so far: those that `retries.max` bounds."""
    tries: int = 0
    """Attempts in a row that the environment ended: they only space the next ones."""
    interruptions: int = 0
    """Of preflight: times in a row that the cluster took the pod away, or somebody the Job."""
    halve: bool = False
    """Of a train Job: the container before was killed for its memory, and nothing but this can say so."""
    finish: bool = False
    """Of a train Job: it trains no more, and publishes the best checkpoint."""


@dataclass(frozen=True, slots=True)
class Child:
    """A batch/v1 Job that a FineTuneJob controls."""

    name: str
    uid: str
    owner: str
    """UID of the controlling FineTuneJob."""
    role: Role
    generation: int
    run: str | None
    key: str
    ordinal: int
    counters: Counters
    attempts: int
    """Of a preflight: how many train Jobs there were when it began."""
    retry: str
    created: datetime
    deleting: bool
    nodes: int
    """Pods that it runs at a time."""
    queue: str
    """Kueue's queue that decides when it may run, or an empty string."""
    suspended: bool
    suspended_at: datetime | None
    """When the Job controller began to take its pods away for that."""
    released: datetime
    """When it may first have pods: its creation, or the end of its last suspension."""
    ended: Literal["Complete", "Failed"] | None
    """Failed already at FailureTarget: Failed itself waits for pods that a dead node never ends."""
    ended_at: datetime | None
    patient: bool = False
    """Neither are pods replaced, nor do they count as failed, before they have ended: podReplacementPolicy Failed."""
    figures: str = ""
    """What preflight had found before a train Job, as JSON: a status that somebody wiped has it no more."""
    inputs: str | None = None
    """Of a train Job: names what it reads, as preflight has pinned it for its document."""

    @property
    def preflight(self) -> PreflightStatus | None:
        return heard(PreflightStatus, self.figures)

    @classmethod
    def of(cls, raw: Raw) -> "Child":
        meta, status = raw["metadata"], raw.get("status") or {}
        labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
        ended, when = _job_end(status)
        return cls(
            name=meta["name"],
            uid=meta["uid"],
            owner=controller(raw, "FineTuneJob"),
            role="train" if labels.get(ROLE) == "train" else "preflight",
            generation=number_of(labels.get(GENERATION)),
            run=labels.get(RUN),
            key=notes.get(RESTART_KEY, ""),
            ordinal=number_of(notes.get(ORDINAL)),
            counters=Counters(
                failures=number_of(notes.get(FAILURES)),
                tries=number_of(notes.get(TRIES)),
                interruptions=number_of(notes.get(INTERRUPTIONS)),
                halve=HALVE in notes,
                finish=FINISH in notes,
            ),
            attempts=number_of(notes.get(ATTEMPTS)),
            retry=notes.get(RETRY, ""),
            created=_created(meta),
            deleting="deletionTimestamp" in meta,
            nodes=(raw.get("spec") or {}).get("parallelism", 1),
            queue=labels.get(QUEUE, ""),
            suspended=bool((raw.get("spec") or {}).get("suspend")),
            suspended_at=_transition(status, "Suspended", "True"),
            released=max(_created(meta), _transition(status, "Suspended", "False") or _created(meta)),
            ended=ended,
            ended_at=when,
            patient=(raw.get("spec") or {}).get("podReplacementPolicy") == "Failed",
            figures=notes.get(FIGURES, ""),
            inputs=notes.get(INPUTS),
        )


def _job_end(status: Raw) -> tuple[Literal["Complete", "Failed"] | None, datetime | None]:
    for condition in status.get("conditions") or []:
        if condition.get("status") == "True" and condition.get("type") in ("FailureTarget", "Failed", "Complete"):
            ended: Literal["Complete", "Failed"] = "Complete" if condition["type"] == "Complete" else "Failed"
            return ended, parse_time(condition.get("lastTransitionTime"))
    return None, None


def _transition(status: Raw, kind: str, to: str) -> datetime | None:
    """When a condition became so; None where it is otherwise."""
    found = _condition(status, kind)
    return parse_time(found.get("lastTransitionTime")) if found.get("status") == to else None


@dataclass(frozen=True, slots=True)
class Admission:
    """What Kueue says of a Workload that does not run."""

    words: str
    """Its own, or an empty string before it has said any."""
    stuck: bool
    """It will not be admitted until somebody mends something."""

    @classmethod
    def of(cls, workload: Raw) -> "Admission":
        """A Workload that lost its place says why, and then what it waits for."""
        status = workload.get("status") or {}
        finished, evicted = _true(status, "Finished"), _true(status, "Evicted")
        quota, holds = _condition(status, "QuotaReserved"), not evicted and bool(_true(status, "QuotaReserved"))
        checks = status.get("admissionChecks") or [] if holds else []
        again = (status.get("requeueState") or {}).get("requeueAt")
        said = [
            finished.get("message"),
            evicted.get("message"),
            quota.get("message") if holds or quota.get("status") == "False" else None,
            *(f"{c.get('name')}: {c.get('message') or c.get('state')}" for c in checks if c.get("state") != "Ready"),
            f"tried again at {again}" if again else None,
        ]
        inadmissible = quota.get("status") == "False" and quota.get("reason") == "Inadmissible"
        inactive = (workload.get("spec") or {}).get("active") is False
        return cls(
            words="; ".join(dict.fromkeys(words.strip() for words in said if words)),
            stuck=inadmissible or inactive or bool(finished),
        )


OWNERS: Mapping[str, str] = {"FineTuneJob": GROUP, "Job": "batch"}
"""API groups of the kinds that own something here."""


def controller(raw: Raw, kind: Literal["FineTuneJob", "Job"]) -> str:
    """UID of the controlling owner, or an empty string where none is of that kind.

    Anybody may write any owner, and the garbage collector lets what an unknown kind owns be for ever.
    """
    references = raw["metadata"].get("ownerReferences") or []
    return next((str(ref["uid"]) for ref in references if ref.get("controller") and _is_of(ref, kind)), "")


def _is_of(reference: Raw, kind: str) -> bool:
    group = str(reference.get("apiVersion", "")).rpartition("/")[0]
    return reference.get("kind") == kind and group == OWNERS[kind]


SIGKILLED = 137
"""Exit code of a container that somebody has killed: the kernel, the kubelet at the end of a grace period, a person."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended."""

    code: int
    reason: str
    """The kubelet's word: Completed, Error, OOMKilled, ..."""
    at: datetime | None
    last: LastMessage | None
    """None when the message is empty or not one of ours."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a child Job."""

    name: str
    uid: str
    owner: str
    """UID of the controlling Job."""
    subject: str
    """UID of the FineTuneJob, from the label."""
    key: str
    role: str
    index: int
    phase: str
    ip: str | None
    node: str | None
    placed: datetime | None
    """When the scheduler gave it its node."""
    started: datetime | None
    """When its node took it."""
    gone_by: datetime | None
    """The deletion's deadline, grace period included, when the pod is being deleted."""
    was_asked_to_go: bool
    """It is being deleted. One that ended before that ended by itself."""
    disrupted: str
    """Why the cluster took the pod away or its node refused it, in one word, or an empty string."""
    words: str
    """The same in the cluster's words."""
    never_began: bool
    """Failed before a container of it ran."""
    unreachable: bool
    """Its node does not answer, as the cluster has noticed."""
    unschedulable: str
    """The scheduler's words while no node fits, or an empty string."""
    waiting: tuple[str, str] | None
    """Reason and message of a container that waits."""
    running: bool
    exit: Exit | None
    run: str | None = None
    """Of a train pod."""
    ready_to_start: bool = False
    """Its volumes are mounted, and its network is there: what it waits for is its image, or the container itself."""

    @classmethod
    def of(cls, raw: Raw) -> "Pod":
        meta, status = raw["metadata"], raw.get("status") or {}
        labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
        state = next(_states(status), {})
        waiting = state.get("waiting")
        ended, running = _exit(state.get("terminated")), "running" in state
        disrupted, words = _disruption(status)
        return cls(
            name=meta["name"],
            uid=meta["uid"],
            owner=controller(raw, "Job"),
            subject=labels.get(JOB_UID, ""),
            key=notes.get(RESTART_KEY, ""),
            role=labels.get(ROLE, ""),
            index=number_of(notes.get("batch.kubernetes.io/job-completion-index")),
            phase=status.get("phase", "Pending"),
            ip=status.get("podIP"),
            node=(raw.get("spec") or {}).get("nodeName"),
            placed=_transition(status, "PodScheduled", "True"),
            started=parse_time(status.get("startTime")),
            gone_by=parse_time(meta.get("deletionTimestamp")),
            was_asked_to_go=_asked_to_go(meta, ended),
            disrupted=disrupted,
            words=words,
            never_began=status.get("phase") == "Failed" and ended is None,
            unreachable=running and _unreachable(_condition(status, "Ready")),
            unschedulable=_unschedulable(status),
            waiting=(waiting.get("reason", ""), waiting.get("message", "")) if waiting else None,
            running=running,
            exit=ended,
            run=labels.get(RUN),
            ready_to_start=bool(_true(status, "PodReadyToStartContainers")),
        )

    @property
    def being_prepared(self) -> bool:
        """Its node has taken it, and is not done with its volumes and its network."""
        idle = not self.running and self.exit is None and not self.over and self.gone_by is None
        return idle and self.node is not None and not self.ready_to_start

    @property
    def over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def removed(self) -> "Pod":
        """The same, now that it is no longer there: nothing of it runs or waits."""
        return replace(self, phase=self.phase if self.over else "Failed", running=False, waiting=None)


def _condition(status: Raw, kind: str) -> Raw:
    return next((c for c in status.get("conditions") or [] if c.get("type") == kind), {})


def _true(status: Raw, kind: str) -> Raw:
    """The condition where it holds, else an empty one."""
    condition = _condition(status, kind)
    return condition if condition.get("status") == "True" else {}


def _asked_to_go(meta: Raw, ended: Exit | None) -> bool:
    """Whether its deletion was asked for, and it had not ended before. Both times are whole seconds: what has ended in
    the very second did so for that, unless by a SIGKILL, which comes at the end of a grace period.
    """
    deadline = parse_time(meta.get("deletionTimestamp"))
    if deadline is None:
        return False
    if ended is None or ended.at is None:
        return True
    grace = timedelta(seconds=int(meta.get("deletionGracePeriodSeconds") or 0))
    asked = deadline - grace
    return ended.at > asked or (ended.at == asked and not (grace and ended.code == SIGKILLED))


def _unreachable(ready: Raw) -> bool:
    """Not Ready without a reason: so the node controller marks the pods of a node that is silent, or not Ready itself.

    A kubelet always gives a reason, for example of a container that was injected beside ours.
    """
    return ready.get("status") == "False" and not ready.get("reason")


def _disruption(status: Raw) -> tuple[str, str]:
    """Reason and message."""
    target = _condition(status, "DisruptionTarget")
    if target.get("status") == "True":
        return str(target.get("reason") or "Disrupted"), str(target.get("message") or "")
    if status.get("phase") != "Failed":
        return "", ""
    reason, words = str(status.get("reason") or ""), str(status.get("message") or "")
    if reason in ("Evicted", "NodeLost", "Terminated", "Shutdown", "NodeShutdown", "Preempting"):
        return reason, words
    began = any("terminated" in state for state in _states(status))
    return ("", "") if began else (reason or "PodNotStarted", words)


def _states(status: Raw) -> Iterator[Raw]:
    """Of our own container: a service mesh or a log shipper may have put others beside it, and they sort by name."""
    return (c.get("state") or {} for c in status.get("containerStatuses") or [] if c.get("name") in CONTAINERS.values())


def _unschedulable(status: Raw) -> str:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return str(scheduled.get("message") or scheduled.get("reason") or "no node fits")
    return ""


def _exit(terminated: Raw | None) -> Exit | None:
    if terminated is None:
        return None
    return Exit(
        code=int(terminated.get("exitCode", 0)),
        reason=terminated.get("reason", ""),
        at=parse_time(terminated.get("finishedAt")),
        last=heard(LastMessage, terminated.get("message", "")),
    )
