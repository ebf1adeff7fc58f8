"""What the watches have brought, kept as views, and what our own writes changed before the watches bring it.

Entries are keyed by UID, so that a namesake is never mistaken for the object it followed, and the higher resource
version wins, so that an old event never undoes what a newer answer said. That holds for what is gone, too: an object
that lost the label which the watches select by is gone for them, and back in a later version once it has it again.

Who may create objects in one namespace may write the UID of any FineTuneJob into them: only what lies in the namespace
of a FineTuneJob is its own.
"""

import json
import logging
import time
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from math import inf
from typing import Any, Literal, TypeGuard

from pydantic import ValidationError

from finetune_operator.verdict import reason_of
from finetune_operator.views import (
    GENERATION,
    JOB_UID,
    RETRY,
    Child,
    Pinned,
    Pod,
    Profile,
    Raw,
    Subject,
    controller,
    number_of,
)

logger = logging.getLogger(__name__)

Kind = Literal["finetunejobs", "finetuneprofiles", "configmaps", "pods", "jobs"]
"""In the order in which they are compared: how a pod ended is to be known before that its Job did."""
NEWS_SECONDS = 2.0
"""How much later than a Job's end those of its pods may become known: watches are not of one moment."""
LEFT_SECONDS = 60.0
"""How long what a pod said last counts after it and its Job are gone: for the look that is to come."""
REMEMBERED = 10_000
UNFOLDED = 256
OF_METADATA = ("namespace", "name", "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp")


@dataclass(frozen=True, slots=True)
class Folded:
    """A ConfigMap of ours as it came: of most jobs nobody reads it again, and a Pinned takes ten times the room."""

    generation: int
    packed: bytes

    @classmethod
    def of(cls, raw: Raw) -> "Folded":
        meta = {name: raw["metadata"].get(name) for name in ("name", "labels", "annotations")}
        generation = number_of((meta["labels"] or {}).get(GENERATION))
        return cls(generation, _pack({"metadata": meta, "data": raw.get("data")}))

    def unfold(self) -> Pinned | None:
        """None for a config that this version cannot read."""
        return _unfolded(self.packed)


@dataclass(frozen=True, slots=True)
class Rested:
    """A FineTuneJob at rest. Few are read again, and a Subject takes ten times the room."""

    uid: str
    output: str
    phase: str
    reason: str
    packed: bytes

    @classmethod
    def of(cls, subject: Subject, raw: Raw) -> "Rested":
        meta = {name: value for name, value in raw["metadata"].items() if name in OF_METADATA}
        notes = raw["metadata"].get("annotations") or {}
        packed = _pack(
            {
                "metadata": {**meta, "annotations": {name: notes[name] for name in (RETRY,) if name in notes}},
                "spec": subject.spec,
                "status": raw.get("status"),
            }
        )
        return cls(subject.uid, subject.output, subject.status.phase or "Pending", reason_of(subject.status), packed)

    def unfold(self) -> Subject:
        return Subject.of(_unpack(self.packed))


def _pack(raw: Raw) -> bytes:
    return zlib.compress(json.dumps(raw, separators=(",", ":")).encode(), 1)


def _unpack(packed: bytes) -> Raw:
    raw: Raw = json.loads(zlib.decompress(packed))
    return raw


@lru_cache(maxsize=UNFOLDED)
def _unfolded(packed: bytes) -> Pinned | None:
    """A job that something happens to is looked at several times in a row."""
    try:
        return Pinned.of(_unpack(packed))
    except ValidationError:
        return None


View = Subject | Rested | Profile | Child | Pod | Folded
MAKERS: dict[Kind, Any] = {
    "finetunejobs": Subject,
    "finetuneprofiles": Profile,
    "jobs": Child,
    "pods": Pod,
    "configmaps": Folded,
}


@dataclass(frozen=True, slots=True)
class Entry:
    kind: Kind
    namespace: str
    version: int
    subject: str
    """UID of the FineTuneJob it belongs to; empty for a profile."""
    view: View


class Cache:
    """All objects of the watched namespaces that are ours or concern us."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._of: dict[str, set[str]] = defaultdict(set)
        self._outputs: dict[str, set[str]] = defaultdict(set)
        self._underway: set[str] = set()
        self._running: dict[str, set[str]] = defaultdict(set)
        """By UID of a train Job: its pods that run."""
        self._going: dict[str, set[str]] = defaultdict(set)
        """By run: UIDs of its train Jobs and their pods that have not ended."""
        self._wrote_to: OrderedDict[str, str] = OrderedDict()
        """By UID of a FineTuneJob that is gone: its output."""
        self._ends: dict[str, float] = {}
        """By UID of a Job or a pod: when its end became known, by the monotonic clock."""
        self._gone: OrderedDict[str, float] = OrderedDict()
        """As of which resource version."""
        self._left: dict[str, dict[tuple[str, int], tuple[float, Pod]]] = {}
        """By UID of a FineTuneJob, and by Job and index: pods that are gone, and since when by the monotonic clock."""

    @property
    def underway(self) -> int:
        """Train Jobs that have not ended, of all FineTuneJobs, whether they have pods or wait for them."""
        return len(self._underway)

    @property
    def trainings(self) -> int:
        """Those of which a pod runs: a cluster may have room for few of many."""
        return len(self._running)

    def apply(self, kind: Kind, raw: Raw) -> frozenset[str]:
        """Take an object as it is now. Returns the UIDs of the FineTuneJobs it concerns.

        What we wrote ourselves comes once more by the watch: then it concerns only others than who wrote it.
        """
        uid = raw["metadata"]["uid"]
        version = _version(raw)
        before = self._entries.get(uid)
        if version <= self._gone.get(uid, -1) or (before is not None and before.version > version):
            return frozenset()
        if before is not None and before.version == version > 0:  # 0 is no version
            return self._concerned(before) - {before.subject}
        view = _view(kind, raw)
        entry = Entry(kind, raw["metadata"].get("namespace", ""), version, _subject_of(raw, view), view)
        self._gone.pop(uid, None)
        ended = self._ends.get(uid)
        self._unlink(uid)
        if isinstance(view, Rested):
            self._left.pop(uid, None)
        if isinstance(view, Child) and view.suspended:  # it goes on with other pods, and what these took is counted
            self._forget_pods_of(uid, entry.subject)
        self._entries[uid] = entry
        self._of[entry.subject].add(uid)
        if isinstance(entry.view, Subject | Rested):
            self._outputs[entry.view.output].add(uid)
            for other in self._of[uid]:
                if not self._is_own(self._entries[other]):
                    self._uncount(other)
        if _is_underway(entry.view) and self._is_own(entry):
            self._underway.add(uid)
        if _runs(entry.view) and self._is_own(entry):
            self._running[entry.view.owner].add(uid)
        if isinstance(entry.view, Child | Pod) and entry.view.run and _goes_on(entry.view):
            self._going[entry.view.run].add(uid)
        if _ended(entry.view):
            self._ends[uid] = ended if ended is not None else time.monotonic()
        return self._concerned(entry) | (self._concerned(before) if before is not None else frozenset())

    def removed(self, raw: Raw) -> frozenset[str]:
        """A watch says that this object is gone, or is not one of ours any more. Returns what `forget` does.

        One that was never seen concerns whom it was made for: who makes it may hear of its end before the answer.
        """
        uid = raw["metadata"]["uid"]
        unseen = uid not in self._entries and uid not in self._gone
        entry = self._entries.get(uid)
        if entry is not None and isinstance(entry.view, Pod) and entry.version <= (_version(raw) or inf):
            # How it ended may come with the news that it is gone: one event stands for several.
            self._entries[uid] = replace(entry, view=Pod.of(raw))
        concerned = self.forget(uid, version=_version(raw) or inf)
        owner = (raw["metadata"].get("labels") or {}).get(JOB_UID, "")
        at_home = self._is_home(owner, raw["metadata"].get("namespace", ""))
        return frozenset({owner}) if unseen and owner and at_home else concerned

    def forget(self, uid: str, *, version: float = inf) -> frozenset[str]:
        """An object is gone, for good or as of a resource version. Returns UIDs of the FineTuneJobs it concerned."""
        entry = self._entries.get(uid)
        if entry is not None and entry.version > version:
            return frozenset()
        self._gone[uid] = max(version, self._gone.get(uid, -1))
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        if entry is None:
            return frozenset()
        concerned = self._concerned(entry)
        if isinstance(entry.view, Pod) and self._is_own(entry):
            self._remember(entry.view, entry.subject)
        if isinstance(entry.view, Subject | Rested):
            self._wrote_to[uid] = entry.view.output
            if len(self._wrote_to) > REMEMBERED:
                self._wrote_to.popitem(last=False)
        self._left.pop(uid, None)
        self._unlink(uid)
        del self._entries[uid]
        return concerned

    def _remember(self, pod: Pod, subject: str) -> None:
        """Its node removes a pod as soon as it has ended: who is about to look shall know how."""
        entry, job = self._entries.get(subject), self._entries.get(pod.owner)
        if job is not None and isinstance(job.view, Child) and job.view.suspended:
            return
        if entry is not None and isinstance(entry.view, Subject):
            self._left.setdefault(subject, {})[pod.owner, pod.index] = (time.monotonic(), pod.removed)

    def _forget_pods_of(self, job: str, subject: str) -> None:
        left = self._left.get(subject, {})
        for place in [place for place in left if place[0] == job]:
            del left[place]

    def knows(self, uid: str, version: int) -> bool:
        """Whether it has the object as of this resource version or later, or as gone by then."""
        entry = self._entries.get(uid)
        return self._gone.get(uid, -1) >= version or (entry is not None and entry.version >= version)

    def keep(self, kind: Kind, present: Collection[str], *, version: int, namespaces: Iterable[str]) -> frozenset[str]:
        """Forget what a list of this resource version did not have. No namespaces: it was of all of them.

        Returns the UIDs of the FineTuneJobs that this concerns.
        """
        where = set(namespaces)
        missing = [
            uid
            for uid, entry in self._entries.items()
            if entry.kind == kind
            and uid not in present
            and entry.version <= version
            and (not where or not entry.namespace or entry.namespace in where)
        ]
        concerned: set[str] = set()
        for uid in missing:
            concerned |= self.forget(uid, version=version)
        return frozenset(concerned)

    def subject(self, uid: str) -> Subject | None:
        entry = self._entries.get(uid)
        return None if entry is None else _subject(entry.view)

    def log_names(self, uid: str) -> dict[str, str]:
        """What a line of the log about a FineTuneJob carries."""
        subject = self.subject(uid)
        return {"job_uid": uid} if subject is None else subject.log_names

    def subjects(self) -> list[str]:
        """UIDs of all FineTuneJobs."""
        return [uid for uid, entry in self._entries.items() if isinstance(entry.view, Subject | Rested)]

    def rests(self, uid: str) -> bool:
        """Whether there is nothing to do for a FineTuneJob: it is done, goes away or is gone."""
        entry = self._entries.get(uid)
        return entry is None or isinstance(entry.view, Rested)

    def working(self) -> Iterator[Subject]:
        """FineTuneJobs for which something is to be done."""
        return (entry.view for entry in self._entries.values() if isinstance(entry.view, Subject))

    def phases(self) -> Counter[tuple[str, str]]:
        """How many FineTuneJobs are in each phase for each reason."""
        views = [entry.view for entry in self._entries.values()]
        going = Counter((v.status.phase or "Pending", reason_of(v.status)) for v in views if isinstance(v, Subject))
        return going + Counter((view.phase, view.reason) for view in views if isinstance(view, Rested))

    def profiles(self) -> dict[str, Profile]:
        views = [self._entries[uid].view for uid in self._of.get("", ())]
        return {view.name: view for view in views if isinstance(view, Profile)}

    def children(self, subject: str) -> tuple[Child, ...]:
        """Jobs that the FineTuneJob controls, by owner reference and not by name."""
        return tuple(view for view in self._views(subject) if isinstance(view, Child))

    def pods(self, subject: str) -> tuple[Pod, ...]:
        """Those that are there, and the last ones of Jobs that have ended or have just gone themselves."""
        here = tuple(view for view in self._views(subject) if isinstance(view, Pod))
        return here + self._last_pods(subject, {(pod.owner, pod.index) for pod in here})

    def _last_pods(self, subject: str, here: Collection[tuple[str, int]]) -> tuple[Pod, ...]:
        """A Job that has not ended makes new pods, or none because it is suspended."""
        left = self._left.get(subject)
        if not left:
            return ()
        old = time.monotonic() - LEFT_SECONDS
        for place in [place for place, (since, _) in left.items() if since < old and place[0] not in self._entries]:
            del left[place]
        jobs = {job.uid: job for job in self.children(subject)}
        return tuple(
            pod
            for place, (_, pod) in left.items()
            if place not in here and (pod.owner not in jobs or jobs[pod.owner].ended is not None)
        )

    def known_for(self, subject: str) -> dict[str, timedelta]:
        """By UID of a Job that has ended, or a pod of it: since when that is known."""
        known: dict[str, float] = {}
        for view in self._views(subject):
            if isinstance(view, Child | Pod) and view.uid in self._ends:
                job = view.uid if isinstance(view, Child) else view.owner
                known[job] = min(self._ends[view.uid], known.get(job, inf))
        now = time.monotonic()
        return {job: timedelta(seconds=now - since) for job, since in known.items()}

    def unsettled(self, subject: str) -> bool:
        """Whether a Job's end has just become known, and not yet of all of its pods why they are at an end.

        What a pod that goes away says is taken at once: once it is gone nobody knows it.
        """
        now, pods = time.monotonic(), self.pods(subject)
        return any(
            now - self._ends.get(job.uid, -inf) < NEWS_SECONDS
            and sum(pod.owner == job.uid and _leaves(pod) for pod in pods) < job.nodes
            for job in self.children(subject)
            if job.ended is not None and not job.deleting
        )

    def pinned(self, subject: str) -> Mapping[int, Pinned]:
        return {
            folded.generation: pinned for folded in self._folded(subject) if (pinned := folded.unfold()) is not None
        }

    def unreadable(self, subject: str) -> frozenset[int]:
        """Generations whose ConfigMap cannot be read."""
        return frozenset(folded.generation for folded in self._folded(subject) if folded.unfold() is None)

    def _folded(self, subject: str) -> list[Folded]:
        return [view for view in self._views(subject) if isinstance(view, Folded)]

    def same_output(self, subject: Subject) -> list[Subject]:
        """Other FineTuneJobs that write to the same place and are not at rest."""
        uids = self._outputs.get(subject.output, set()) - {subject.uid} if subject.output else set()
        return [view for uid in uids if isinstance(view := self._entries[uid].view, Subject)]

    def unattended(self, run: str, subject: Subject) -> list[Child | Pod]:
        """What has not ended of a run beside a FineTuneJob, though its own one is done, goes away or is gone.

        The same run may write to several outputs. Of what was gone when this process began nobody knows to which.
        """
        found = (self._entries[uid] for uid in sorted(self._going.get(run, ())))
        here = (e for e in found if e.namespace == subject.namespace and self._is_own(e))
        left = (e for e in here if self._may_write_to(subject.output, e.subject))
        return [entry.view for entry in left if isinstance(entry.view, Child | Pod)]

    def _may_write_to(self, output: str, other: str) -> bool:
        entry = self._entries.get(other)
        if entry is None:
            return self._wrote_to.get(other, output) == output
        return isinstance(entry.view, Rested) and entry.view.output == output

    def _views(self, subject: str) -> Iterator[View]:
        entries = (self._entries[uid] for uid in self._of.get(subject, ()) if uid != subject)
        return (entry.view for entry in entries if self._is_own(entry))

    def _is_own(self, entry: Entry) -> bool:
        return self._is_home(entry.subject, entry.namespace)

    def _is_home(self, subject: str, namespace: str) -> bool:
        """Whether a namespace is that of a FineTuneJob. Of one that is not known yet, or no more, each may be."""
        entry = self._entries.get(subject)
        return entry is None or entry.namespace == namespace

    def _concerned(self, entry: Entry) -> frozenset[str]:
        match entry.view:
            case Subject() | Rested():
                return frozenset(self._outputs.get(entry.view.output, ()) if entry.view.output else ()) | {
                    entry.subject
                }
            case Profile():
                return frozenset(subject.uid for subject in self.working())
        return frozenset({entry.subject}) if entry.subject and self._is_own(entry) else frozenset()

    def _unlink(self, uid: str) -> None:
        entry = self._entries.get(uid)
        if entry is None:
            return
        self._uncount(uid)
        self._ends.pop(uid, None)
        _discard(self._of, entry.subject, uid)
        if isinstance(entry.view, Child | Pod) and entry.view.run:
            _discard(self._going, entry.view.run, uid)
        if isinstance(entry.view, Subject | Rested):
            _discard(self._outputs, entry.view.output, uid)

    def _uncount(self, uid: str) -> None:
        view = self._entries[uid].view
        self._underway.discard(uid)
        if isinstance(view, Pod):
            _discard(self._running, view.owner, uid)


def _discard(index: dict[str, set[str]], key: str, uid: str) -> None:
    index[key].discard(uid)
    if not index[key]:
        del index[key]


def _version(raw: Raw) -> int:
    text = raw["metadata"].get("resourceVersion", "")
    return int(text) if text.isdigit() else 0


def _is_underway(view: View) -> bool:
    return isinstance(view, Child) and view.role == "train" and view.ended is None and not view.deleting


def _runs(view: View) -> TypeGuard[Pod]:
    return isinstance(view, Pod) and view.role == "train" and view.running


def _goes_on(view: Child | Pod) -> bool:
    return not view.over if isinstance(view, Pod) else _is_underway(view)


def _ended(view: View) -> bool:
    match view:
        case Child():
            return view.ended is not None
        case Pod():
            return view.exit is not None
    return False


def _leaves(pod: Pod) -> bool:
    return pod.exit is not None or pod.over or bool(pod.disrupted) or pod.gone_by is not None


def _subject_of(raw: Raw, view: View) -> str:
    match view:
        case Subject(uid=uid) | Rested(uid=uid):
            return uid
        case Pod(subject=uid):  # controlled by a Job that may be gone by now: the label tells whose it was
            return uid
        case Profile():
            return ""
    return controller(raw, "FineTuneJob")


def _view(kind: Kind, raw: Raw) -> View:
    view: View = MAKERS[kind].of(raw)
    return Rested.of(view, raw) if isinstance(view, Subject) and view.at_rest else view


def _subject(view: View) -> Subject | None:
    match view:
        case Subject():
            return view
        case Rested():
            return view.unfold()
    return None
