"""The vocabulary of decisions: what was seen, what is to be said, what is to be done."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from finetune_api.contract import Progress, RunConfig
from finetune_api.resolve import Defaults
from finetune_api.status import Condition, FineTuneJobStatus, Phase
from finetune_operator.views import Admission, Child, Counters, Pinned, Pod, Profile, Role, Subject

IDENTICAL = "IdenticalRunInProgress"
PASSED = "PreflightPassed"
STOPPING = "StoppingPreviousRun"


@dataclass(frozen=True)
class Rival:
    """Another FineTuneJob with the same output, or what is left of one."""

    name: str
    """namespace/name"""
    uid: str
    created: datetime
    run: str | None
    unfinished: bool
    holding: bool
    """It has a train Job that has not ended."""
    attended: bool = True
    """False: a Job or a pod (so named) of a FineTuneJob that is done, goes away or is gone."""


@dataclass(frozen=True)
class Group:
    """Another FineTuneJob of the same namespace and profile, without a queue, whose pods train together."""

    name: str
    """namespace/name"""
    uid: str
    created: datetime
    starts: bool
    """It has a train Job of which not all pods have a node; else it is ready to begin one."""


@dataclass(frozen=True)
class Observed:
    """Everything one decision depends on."""

    subject: Subject
    defaults: Defaults
    profiles: Mapping[str, Profile] = field(default_factory=dict, hash=False)
    pinned: Mapping[int, Pinned] = field(default_factory=dict, hash=False)
    """By generation."""
    unreadable: frozenset[int] = frozenset()
    """Generations whose ConfigMap this version cannot read."""
    children: tuple[Child, ...] = ()
    pods: tuple[Pod, ...] = ()
    rivals: tuple[Rival, ...] = ()
    groups: tuple[Group, ...] = ()
    """Looked for only where this one may want several pods."""
    progress: Progress | None = None
    """Of the newest train Job, when its pods answered."""
    silent: timedelta = timedelta(0)
    """How long this process has seen its pods run without an answer, by a clock that cannot jump."""
    refusals: Mapping[str, str] = field(default_factory=dict, hash=False)
    """By UID of a child Job: why the cluster refuses to create its pods."""
    unprepared: Mapping[str, tuple[str, str]] = field(default_factory=dict, hash=False)
    """By UID of a pod: why its node cannot prepare it, as reason and words."""
    kueue: bool = False
    """Whether Kueue's resources are served. Asked only where a queue is named."""
    admissions: Mapping[str, Admission] = field(default_factory=dict, hash=False)
    """By UID of a suspended child Job that Kueue has looked at: why it has not admitted it."""
    known_for: Mapping[str, timedelta] = field(default_factory=dict, hash=False)
    """By UID of a child Job that has ended: since when that is known, by a clock that nobody sets."""
    underway: int = 1
    """Train Jobs that have not ended, of all FineTuneJobs: those that wait for pods share the looks."""
    trainings: int = 1
    """Those of which a pod runs: they share what is asked of trainers and told of mere progress."""
    room: bool = True
    """Mere progress may be written: not so many others did just now."""
    last_write: datetime | None = None
    """When this process last wrote the status; None when it has not yet."""
    begun: int = 0
    """The number of the last attempt that this process has begun."""

    def jobs(self, role: Role) -> list[Child]:
        """Children that are not being deleted, the newest last; no preflight that an attempt has followed already."""
        return [child for child in self.remaining(role) if role == "train" or not self._spent(child)]

    def _spent(self, preflight: Child) -> bool:
        """Whether an attempt has followed it. One of the document before may be tried again beside it."""
        later = (child for child in self.children if child.role == "train" and child.ordinal > preflight.attempts)
        return preflight.attempts < self.attempts and all(child.key == preflight.key for child in later)

    def remaining(self, role: Role) -> list[Child]:
        """All children that are not being deleted, the newest last.

        A preflight Job stays when its attempt begins: the cluster removes it as it removes the train Job, some time
        after its end, and until then its log can be read.
        """
        mine = (child for child in self.children if child.role == role and not child.deleting)
        return sorted(mine, key=lambda child: (child.ordinal, child.created))

    @property
    def attempts(self) -> int:
        """Train Jobs so far, whether they are still there or not."""
        highest = max((child.ordinal for child in self.children if child.role == "train"), default=0)
        told = self.subject.status.usage.attempts if self.subject.status.usage else None
        return max(highest, told or 0)

    def pods_of(self, child: Child) -> list[Pod]:
        return sorted((pod for pod in self.pods if pod.owner == child.uid), key=lambda pod: (pod.index, pod.name))

    def knowing(self, facts: Mapping[str, Any]) -> "Observed":
        """The same, as if these fields of the status were written already."""
        status = self.subject.status.model_copy(update=dict(facts))
        return replace(self, subject=replace(self.subject, status=status))

    def next_ordinal(self, role: Role) -> int:
        if role == "train":
            return self.attempts + 1
        return max((child.ordinal for child in self.children if child.role == role), default=0) + 1


@dataclass(frozen=True)
class CreateConfig:
    config: RunConfig
    key: str


@dataclass(frozen=True)
class CreatePreflight:
    config: RunConfig
    key: str
    ordinal: int
    counters: Counters
    attempts: int
    """Observed.attempts when it begins."""
    run: str | None
    """The run that was begun for this document before, if any."""
    inputs: str | None = None
    """And what it was found to read."""


@dataclass(frozen=True)
class CreateTrain:
    config: RunConfig
    key: str
    run_id: str
    ordinal: int
    counters: Counters
    inputs: str | None = None
    """RunStatus.inputs of this document: another one of the same run may have other test rows."""


@dataclass(frozen=True)
class DeleteJob:
    """In the background, and only if the UID still is this one: its pods get SIGTERM and their grace period."""

    name: str
    uid: str

    @classmethod
    def of(cls, child: Child) -> "DeleteJob":
        return cls(name=child.name, uid=child.uid)


Action = CreateConfig | CreatePreflight | CreateTrain | DeleteJob
Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Mark:
    """A condition without its times."""

    status: Truth
    reason: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a FineTuneJob, and done for it. Succeeded, Suspended, Reconciling and Stalled follow."""

    phase: Phase
    reason: str
    message: str
    stalled: bool = False
    """Nothing moves until somebody mends something; it is tried again all the same."""
    stalled_by: str | None = None
    """The reason of Stalled, if it is not that of the phase."""
    marks: Mapping[str, Mark] = field(default_factory=dict, hash=False)
    """Accepted, PreflightPassed and Evaluated, as far as this decision knows more than the status."""
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of the status, by name, where they change."""
    actions: tuple[Action, ...] = ()
    again_after: float | None = None
    """Seconds until the next look, whatever happens before."""
    brief: bool = False
    """It is over within moments, as a rule."""

    @property
    def final(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    def doing(self, *actions: Action) -> "Verdict":
        return replace(self, actions=(*self.actions, *(a for a in actions if a not in self.actions)))

    def marking(self, **marks: Mark) -> "Verdict":
        return replace(self, marks={**self.marks, **marks})

    def stating(self, **facts: Any) -> "Verdict":
        return replace(self, facts={**self.facts, **facts})


@dataclass(frozen=True)
class Note:
    """An Event to be."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    status: FineTuneJobStatus | None = None
    """The whole new status; None: leave it as it is."""
    routine: bool = False
    """It tells of mere progress, or would if there were room for it."""
    actions: tuple[Action, ...] = ()
    again_after: float | None = None
    events: tuple[Note, ...] = ()


def condition(status: FineTuneJobStatus, kind: str) -> Condition | None:
    return next((c for c in status.conditions or [] if c.type == kind), None)


def reason_of(status: FineTuneJobStatus) -> str:
    """Why the phase is what it is: the reason of Succeeded."""
    found = condition(status, "Succeeded")
    return found.reason if found else ""


def mark_of(subject: Subject, kind: str) -> Mark | None:
    """A condition, if it speaks of the generation that is asked for now."""
    found = condition(subject.status, kind)
    if found is None or found.observed_generation != subject.generation:
        return None
    return Mark(found.status, found.reason, found.message)
