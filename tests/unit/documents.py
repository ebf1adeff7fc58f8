"""FineTuneJobs as an API server holds them: in every phase, and in whatever else tools that wait have to tell apart.

Each is a life: what was asked for, and what the operator saw of it, look by look. What its status says is what decide
made of that; nothing in it is written by hand.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from tests.unit.test_decide import (
    FASTER,
    FASTER_KEY,
    NOW,
    PROFILES,
    RESULT,
    RUN,
    SPEC,
    SUSPENDED,
    TRAINED,
    ago,
    ended,
    outcome,
    p,
    pinned,
    pod,
    rival,
    subject,
    t,
    world,
)

from finetune_api import GROUP, VERSION
from finetune_api.contract import Checkpointed, LastMessage, Progress
from finetune_api.status import BestCheckpoint, FineTuneJobStatus, GateStatus
from finetune_operator.decide import decide, refused
from finetune_operator.manifests import config_map
from finetune_operator.verdict import CreateConfig
from finetune_operator.views import Counters, Pinned, Subject, format_time

Document = dict[str, Any]
Look = tuple[Any, ...]
"""What is seen besides the FineTuneJob itself: children, pods, progress and rivals."""


@dataclass(frozen=True)
class Life:
    """What happened to one FineTuneJob until it was recorded."""

    fact: str
    looks: tuple[Look, ...] = ()
    spec: Document | None = None
    changed: Document | None = None
    """The spec of generation 2."""
    after: tuple[Look, ...] = ()
    """The looks since then. Without any, the operator has not seen the change yet."""
    profiles: bool = True
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """What else is seen, at every look."""
    refusal: tuple[str, str] | None = None
    """Reason and words of the API server, which does not take what the last look wants."""
    deleting: bool = False
    bare: bool = False
    """Without the status that the definition gives to what is new."""

    def document(self) -> Document:
        """The whole resource, as kubectl get prints it."""
        first = subject(self.spec or SPEC)
        pins: dict[int, Pinned] = {}
        lived = self._lived(first, self.looks, pins, since=0)
        if self.changed is not None:
            lived = replace(lived, generation=2, spec=self.changed)
            lived = self._lived(lived, self.after, pins, since=len(self.looks))
        return resource_of(lived, deleting=self.deleting, bare=self.bare)

    def _lived(self, before: Subject, looks: Iterable[Look], pins: dict[int, Pinned], *, since: int) -> Subject:
        """Looks are a second apart."""
        profiles = PROFILES if self.profiles else {}
        for number, parts in enumerate(looks, start=since):
            seen = world(None, *parts, subject=before, pinned=dict(pins), profiles=profiles, **self.cluster)
            now = NOW + timedelta(seconds=number)
            decision = decide(seen, now=now)
            if self.refusal is not None:
                reason, words = self.refusal
                decision = refused(seen, reason=reason, message=words, now=now)
            for action in decision.actions:
                if isinstance(action, CreateConfig):
                    made = Pinned.of(config_map(before, action.config, key=action.key))
                    pins[made.generation] = made
            before = replace(before, status=decision.status or before.status)
        return before


def resource_of(lived: Subject, *, deleting: bool = False, bare: bool = False) -> Document:
    """The whole object."""
    metadata: Document = {
        "name": lived.name,
        "namespace": lived.namespace,
        "uid": lived.uid,
        "generation": lived.generation,
        "creationTimestamp": format_time(lived.created),
    }
    if deleting:
        metadata |= {"deletionTimestamp": format_time(NOW + timedelta(minutes=1)), "deletionGracePeriodSeconds": 0}
    made = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FineTuneJob", "metadata": metadata, "spec": dict(lived.spec)}
    return made if bare else {**made, "status": lived.status.document()}


# --- what is seen ---


def told(stage: Any, step: int) -> Progress:
    """What the trainer answers."""
    best = BestCheckpoint(step=20, metric="f1", value=0.83)
    uri = f"s3://models/out/runs/{RUN}/attempts/1/checkpoints/30"
    saved = Checkpointed(step=30, uri=uri, committed_at=format_time(ago(20)), best=best)
    return Progress(
        run_id=RUN,
        attempt=1,
        stage=stage,
        step=step,
        total_steps=100,
        epoch=step / 50,
        loss=0.31 if step else None,
        learning_rate=1.6e-5,
        samples_per_second=212.0,
        estimated_completion_time=format_time(NOW + timedelta(minutes=14)),
        checkpoint=saved if step >= 30 else None,
        started_at=format_time(ago(50)),
        updated_at=format_time(ago(1)),
    )


def says(code: int, reason: str, text: str, **fields: Any) -> LastMessage:
    return LastMessage(code=code, reason=reason, message=text, **fields)


NO_BUCKET = says(
    49, "BucketNotFound", "spec.data.train[0].uri: there is no bucket named data; create it or name another"
)
NO_COLUMN = says(42, "ColumnMissing", "s3://data/train.jsonl: line 1 has no column label; it has text, intent")
NOT_MET = "f1 is 0.900 on test, wanted >= 0.95"
GATES = RESULT.evaluation.model_copy(
    update={"gates": [GateStatus(metric="f1", passed=False, value=0.9, wanted=">= 0.95")]}
)
UNMET = says(48, "GateNotMet", NOT_MET, run_id=RUN, attempt=1, result=RESULT.model_copy(update={"evaluation": GATES}))
PARTIAL = says(
    0, "Trained", "done", run_id=RUN, attempt=2, result=RESULT.model_copy(update={"partial": True, "final_step": 40})
)
STOPPED = says(45, "Stopped", "stopped on request", run_id=RUN, step=40)

NOTHING: Look = ()
CHECKING: Look = (p(), pod(p()))
FRESH: Look = (p(), ended(p(), 0, outcome("Fresh")))
NO_NODE: Look = (
    t(),
    pod(t(), node=None, running=False, unschedulable="0/8 nodes are available: 8 Insufficient nvidia.com/gpu"),
)
NO_IMAGE: Look = (t(), pod(t(), running=False, waiting=("ErrImagePull", "manifest unknown")))
ON_A_NODE = pod(t(), started=ago(55))
LOADS: Look = (t(), ON_A_NODE, told("Loading", 0))
TRAINS: Look = (t(), ON_A_NODE, told("Training", 40))
RATES: Look = (t(), ON_A_NODE, told("Evaluating", 100))
IS_DONE: Look = (t(), ended(t(), 0, TRAINED, started=ago(55)))
ENDS: Look = (pod(t(), started=ago(55), gone_by=NOW + timedelta(minutes=2), was_asked_to_go=True),)
HAS_ENDED: Look = (ended(t(), 45, STOPPED, started=ago(55)),)

PASSED = (NOTHING, CHECKING, FRESH, FRESH)
TRAINING = (*PASSED, NO_NODE, LOADS, TRAINS)
DONE = (*TRAINING, RATES, IS_DONE)

QUEUED = {**SPEC, "queue": {"name": "team-a"}}
QUEUED_KEY = pinned(QUEUED).key
WAITS = t(queue="team-a", suspended=True, key=QUEUED_KEY)
QUEUES: tuple[Look, ...] = (NOTHING, *((p(key=QUEUED_KEY), ended(p(key=QUEUED_KEY), 0, outcome("Fresh"))),) * 2)

# A budget of an hour, all of it used by the first attempt.
BUDGET = {**SPEC, "budget": {"gpuHours": 1}}
LONG = t(created=ago(3700))
FINISH = t(2, created=ago(30), counters=Counters(finish=True))
EXHAUSTED = (
    *PASSED,
    (LONG, pod(LONG, started=ago(3660)), told("Training", 40)),
    (LONG, pod(LONG, started=ago(3660)), told("Training", 40)),
    (ended(LONG, 45, STOPPED, started=ago(3660)),),
    (FINISH, pod(FINISH, started=ago(20)), told("Publishing", 40)),
    (FINISH, ended(FINISH, 0, PARTIAL, started=ago(20))),
)
SECOND = p(1, generation=2, key=FASTER_KEY)

LIVES: dict[str, Life] = {
    "no-status": Life("a document without the definition's default, which no API server answers", bare=True),
    "new": Life("applied; the operator has not looked yet"),
    "preflight": Life("preflight looks", (NOTHING, CHECKING)),
    "pending-bucket": Life("a bucket is missing; tried again", (NOTHING, (p(), ended(p(), 49, NO_BUCKET, at=2)))),
    "pending-profile": Life("the profile is missing; tried again", (NOTHING,), profiles=False),
    "pending-create": Life(
        "the API server refuses the pods' Job; tried again",
        (NOTHING,),
        refusal=("CreateForbidden", "exceeded quota: team-a"),
    ),
    "pending-kueue": Life("it names a queue, and there is no Kueue; tried again", QUEUES, spec=QUEUED),
    "pending-twin": Life("another job trains the same model", (*PASSED[:3], (*FRESH, rival(holding=True)))),
    "queued": Life("no node is free", (*PASSED, NO_NODE)),
    "queued-kueue": Life(
        "Kueue holds it",
        (*QUEUES, (WAITS,)),
        spec=QUEUED,
        cluster={"kueue": True, "admissions": {WAITS.uid: "insufficient unused quota for nvidia.com/gpu"}},
    ),
    "queued-suspended": Life("something else has suspended its Job", (*PASSED, (t(suspended=True),))),
    "starting": Life("the trainer loads", (*PASSED, LOADS)),
    "starting-image": Life("a node cannot pull the image; tried again", (*PASSED, NO_IMAGE)),
    "starting-again": Life(
        "its pod was evicted; the next attempt begins",
        (*TRAINING, (t(), ended(t(), 137, started=ago(55), disrupted="EvictionByEvictionAPI"))),
    ),
    "training": Life("it trains", TRAINING),
    "evaluating": Life("it evaluates", (*TRAINING, RATES)),
    "succeeded": Life("the model is published", DONE),
    "reused": Life("the very model was there", (NOTHING, (p(), ended(p(), 0, outcome("Reused"))))),
    "stopped-at-best": Life("the budget is used up; the best checkpoint is published", EXHAUSTED, spec=BUDGET),
    "refused": Life(
        "the profile forbids what the document asks for",
        (NOTHING,),
        spec={**SPEC, "storage": {"endpoint": "http://elsewhere.example.com"}},
    ),
    "failed-data": Life("the data is wrong", (NOTHING, (p(), ended(p(), 42, NO_COLUMN)))),
    "failed-gate": Life("a gate is not met", (*TRAINING, RATES, (t(), ended(t(), 48, UNMET, started=ago(55))))),
    "failed-crash": Life(
        "it has crashed more often than `retries.max`",
        (*TRAINING, (t(4, counters=Counters(failures=3)), ended(t(4), 1))),
    ),
    "suspending": Life("suspended; a checkpoint is committed", TRAINING, changed=SUSPENDED, after=(TRAINS, ENDS)),
    "suspended": Life("suspended; no pod is left", TRAINING, changed=SUSPENDED, after=(TRAINS, ENDS, HAS_ENDED)),
    "applied-suspended": Life("applied with `suspend: true`", (NOTHING,), spec=SUSPENDED),
    "succeeded-changed": Life("done, then changed; the operator has not looked yet", DONE, changed=FASTER),
    "failed-changed": Life(
        "failed, then changed; the operator has not looked yet",
        (NOTHING, (p(), ended(p(), 42, NO_COLUMN))),
        changed=FASTER,
    ),
    "training-changed": Life("changed while it trains", TRAINING, changed=FASTER, after=(TRAINS,)),
    "training-refused": Life(
        "changed while it trains, and the change is wrong",
        TRAINING,
        changed=FASTER,
        after=(TRAINS, (*TRAINS, SECOND, ended(SECOND, 42, NO_COLUMN))),
    ),
    "deleting": Life("deleted while it trains", TRAINING, deleting=True),
}


def status_of(document: Document) -> FineTuneJobStatus:
    """Raises ValidationError where the status is not one of ours."""
    return FineTuneJobStatus.model_validate(document.get("status", {}))
