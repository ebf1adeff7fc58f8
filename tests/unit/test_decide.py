"""What the operator does, as a table: each row is a world, what is said of it, and what is done about it."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from finetune_api.contract import (
    Checkpointed,
    LastMessage,
    PreflightOutcome,
    Progress,
    RunConfig,
    TrainOutcome,
)
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, resolve, restart_key
from finetune_api.status import (
    CheckpointStatus,
    EvaluationStatus,
    FineTuneJobStatus,
    ModelStatus,
    PreflightJobStatus,
    PreflightStatus,
    ProgressStatus,
    Restart,
    RunStatus,
    Usage,
)
from finetune_operator.decide import decide, refused, undeleted
from finetune_operator.policies.endings import End
from finetune_operator.policies.restarts import due_at, jitter
from finetune_operator.policies.suspend import unasked
from finetune_operator.policies.ways import JOB_LOST
from finetune_operator.status import compose, notes
from finetune_operator.verdict import (
    CreateConfig,
    CreatePreflight,
    CreateTrain,
    Decision,
    DeleteJob,
    Mark,
    Observed,
    Rival,
    Truth,
    Verdict,
    condition,
    reason_of,
)
from finetune_operator.views import Child, Counters, Exit, Pinned, Pod, Profile, Subject, format_time

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
UID = "11111111-aaaa-bbbb-cccc-000000000001"
RUN, OTHER_RUN = "a" * 16, "b" * 16
DEFAULTS = Defaults(trainer_image="trainer:1", preflight_image="preflight:1")
SPEC: dict[str, Any] = {
    "task": {"type": "text-classification"},
    "model": {"uri": "s3://models/base"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "output": {"uri": "s3://models/out"},
    "resources": {"nodes": 1, "perNode": {"gpus": 1}},
}
FASTER = {**SPEC, "training": {"learningRate": 0.001}}
"""Another run."""
SUSPENDED = {**SPEC, "suspend": True}
"""The same run, which is not to go on."""
PATIENT = {**SPEC, "retries": {"max": 1}}
"""The same run: only a live field differs."""
STRICTER = {**SPEC, "evaluation": {"gates": [{"metric": "f1", "atLeast": 0.95}]}}
"""The same run, judged by a gate."""
SEARCHED = {**SPEC, "data": {**SPEC["data"], "audit": "Full"}}
"""The same run, whose rows are searched otherwise for what is wrong."""
TWO_NODES = {**SPEC, "resources": {"nodes": 2, "perNode": {"gpus": 1}}}
PROFILES = {"default": Profile("default", {})}
RESULT = TrainOutcome(
    final_step=100,
    total_steps=100,
    final_loss=0.1,
    evaluation=EvaluationStatus(on="test", rows=50, trivial={"f1": 0.1}, probe={"f1": 0.7}, tuned={"f1": 0.9}),
    model=ModelStatus(uri="s3://models/out/runs/a/model", digest="sha256:1", size_bytes=9),
)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


# --- the parts of a world ---


def subject(spec: dict[str, Any] = SPEC, **changes: Any) -> Subject:
    made = Subject(
        namespace="ns",
        name="one",
        uid=UID,
        generation=1,
        resource_version="5",
        created=ago(1000),
        deleting=False,
        retry=None,
        spec=spec,
        status=FineTuneJobStatus(),
    )
    return replace(made, **changes)


def resolved(spec: dict[str, Any] = SPEC, *, profile: dict[str, Any] | None = None, generation: int = 1) -> RunConfig:
    return resolve(
        FineTuneJobSpec.model_validate(spec),
        FineTuneProfileSpec.model_validate(profile or {}),
        job="ns/one",
        job_uid=UID,
        generation=generation,
        defaults=DEFAULTS,
    )


def pinned(spec: dict[str, Any] = SPEC, *, generation: int = 1) -> Pinned:
    config = resolved(spec, generation=generation)
    return Pinned(generation, config, restart_key(config), subject(spec).asked)


KEY, FASTER_KEY = pinned().key, pinned(FASTER).key


def said(
    phase: Any,
    reason: str,
    *,
    generation: int = 1,
    passed: Truth = "Unknown",
    stalled: bool = False,
    run: str | None = RUN,
    run_generation: int | None = None,
    run_at: datetime | None = None,
    **facts: Any,
) -> FineTuneJobStatus:
    """A status as the operator itself wrote it before."""
    blank = subject(generation=generation)
    verdict = Verdict(phase, reason, "as it was", stalled=stalled).marking(
        PreflightPassed=Mark(passed, reason, "as it was")
    )
    if run is not None:
        placed = format_time(run_at) if run_at is not None else None
        made = RunStatus(id=run, generation=run_generation or generation, started_at="t", placed_at=placed)
        facts = {"run": made, **facts}
    return compose(blank, verdict.stating(**facts), now=ago(100))


def child(role: Any, ordinal: int, **changes: Any) -> Child:
    made = Child(
        name=f"one-11111-{role[0]}{ordinal}",
        uid=f"{role}-{ordinal}",
        owner=UID,
        role=role,
        generation=1,
        run=RUN if role == "train" else None,
        key=KEY,
        ordinal=ordinal,
        counters=Counters(),
        attempts=9 if role == "preflight" else 0,  # it began after all of them
        retry="",
        created=ago(60),
        deleting=False,
        nodes=1,
        queue="",
        suspended=False,
        suspended_at=None,
        released=changes.get("created", ago(60)),
        ended=None,
        ended_at=None,
    )
    return replace(made, **changes)


def p(ordinal: int = 1, **changes: Any) -> Child:
    return child("preflight", ordinal, **changes)


def t(ordinal: int = 1, **changes: Any) -> Child:
    return child("train", ordinal, **changes)


def pod(of: Child, **changes: Any) -> Pod:
    made = Pod(
        name=f"{of.name}-x",
        uid=f"pod-of-{of.uid}",
        owner=of.uid,
        subject=UID,
        key=of.key,
        role=of.role,
        index=0,
        phase="Running",
        ip="10.0.0.1",
        node="node0",
        placed=None,
        started=None,
        gone_by=None,
        was_asked_to_go=False,
        disrupted="",
        words="",
        never_began=False,
        unreachable=False,
        unschedulable="",
        waiting=None,
        running=True,
        exit=None,
        run=of.run,
    )
    return replace(made, **changes)


def ended(of: Child, code: int, last: LastMessage | None = None, *, at: float = 0, **changes: Any) -> Pod:
    word = changes.pop("word", "Completed" if code == 0 else "Error")
    made = pod(of, phase="Succeeded" if code == 0 else "Failed", running=False, exit=Exit(code, word, ago(at), last))
    return replace(made, **changes)


REFUSED: dict[str, Any] = {
    "phase": "Failed",
    "running": False,
    "never_began": True,
    "disrupted": "UnexpectedAdmissionError",
    "words": "Allocate failed",
}
"""A pod that its node did not take."""
DELETED_EARLY: dict[str, Any] = {
    **REFUSED,
    "disrupted": "PodNotStarted",
    "words": "",
    "gone_by": ago(-1),
    "was_asked_to_go": True,
}
"""A pod that was deleted, and had not begun."""


def message(code: int, reason: str, **fields: Any) -> LastMessage:
    return LastMessage(code=code, reason=reason, message=f"{reason} it is", **fields)


def outcome(state: Any, step: int | None = None, run: str = RUN) -> LastMessage:
    found = PreflightOutcome(state=state, run_id=run, step=step, summary=PreflightStatus(labels=2))
    return message(0, state, run_id=run, preflight=found, result=RESULT if state == "Reused" else None)


TRAINED = message(0, "Trained", run_id=RUN, attempt=7, result=RESULT)
UNMET = message(48, "GateNotMet", run_id=RUN, attempt=7, result=RESULT)


def unmet(run: str = RUN) -> LastMessage:
    """What a preflight says of a model that is there and not good enough."""
    return outcome("Reused", run=run).model_copy(update={"code": 48, "reason": "GateNotMet"})


def progress(stage: Any = "Training", step: int = 40, **fields: Any) -> Progress:
    return Progress(
        run_id=RUN, stage=stage, step=step, total_steps=100, started_at="s", updated_at="u", attempt=7, **fields
    )


def rival(name: str = "ns/two", **changes: Any) -> Rival:
    made = Rival(name=name, uid=name, created=ago(5000), run=RUN, unfinished=True, holding=False)
    return replace(made, **changes)


def world(status: FineTuneJobStatus | None = None, *parts: Any, **changes: Any) -> Observed:
    """A FineTuneJob of generation 1 that is pinned, unless told otherwise."""
    chosen = changes.pop("subject", subject())
    if status is not None:
        chosen = replace(chosen, status=status)
    made = Observed(
        subject=chosen,
        defaults=DEFAULTS,
        profiles=PROFILES,
        pinned={1: pinned()},
        children=tuple(part for part in parts if isinstance(part, Child)),
        pods=tuple(part for part in parts if isinstance(part, Pod)),
        rivals=tuple(part for part in parts if isinstance(part, Rival)),
        progress=next((part for part in parts if isinstance(part, Progress)), None),
    )
    return replace(made, **changes)


# --- the table ---


@dataclass(frozen=True)
class Row:
    fact: str
    given: Observed
    phase: str | None = None
    """None: the status is left alone."""
    reason: str | None = None
    does: str = ""
    """Actions in short: pin g1, begin p1, begin t1, delete t1."""
    says: str = ""
    """A part of the message."""
    stalled: bool = False
    passed: str | None = None
    again: float | None = None


def short(decision: Decision) -> str:
    def one(action: Any) -> str:
        match action:
            case CreateConfig(config):
                return f"pin g{config.generation}"
            case CreatePreflight():
                return f"begin p{action.ordinal}"
            case CreateTrain():
                return f"begin t{action.ordinal}"
            case DeleteJob():
                return f"delete {action.name.rsplit('-', 1)[1]}"
        raise AssertionError(action)

    return ", ".join(one(action) for action in decision.actions)


PREFLIGHT = said("Preflight", "Checking", run=None)
GO = said("Queued", "PreflightPassed", passed="True")


def looked_at(phase: Any = "Preflight", reason: str = "Checking", **counted: Any) -> FineTuneJobStatus:
    """A preflight Job was begun, as the status says."""
    return said(phase, reason, run=None, preflight_job=PreflightJobStatus(generation=1, **counted))


def missing(words: str) -> FineTuneJobStatus:
    """Preflight has found that the environment lacks something."""
    mark = Mark("Unknown", "BucketNotFound", words)
    verdict = Verdict("Pending", "BucketNotFound", words, stalled=True).marking(PreflightPassed=mark)
    return compose(subject(), verdict, now=ago(100))


TRAINING = said(
    "Training",
    "Training",
    passed="True",
    progress=ProgressStatus(step=40, total_steps=100, percent=40),
    checkpoint=CheckpointStatus(step=30),
    usage=Usage(attempts=1),
)
PLACED = TRAINING.model_copy(
    update={"run": RunStatus(id=RUN, generation=1, started_at="t", placed_at=format_time(ago(55)))}
)
"""Its pod has a node since 55 seconds ago."""
FAILED = said("Failed", "ColumnMissing", passed="False", run=None)
SUCCEEDED = said("Succeeded", "Trained", passed="True")
WAITING = said("Pending", "IdenticalRunInProgress", passed="True")


def restarts(count: int, *, at_step: int = 30, first: int = 1) -> list[Restart]:
    return [
        Restart(attempt=first + i, reason="PodDeleted", at="x", resumed_from_step=at_step, lost_steps=0)
        for i in range(count)
    ]


def tired(count: int) -> FineTuneJobStatus:
    """Interrupted so many times in a row without one more committed step."""
    assert TRAINING.run is not None
    run = TRAINING.run.model_copy(update={"interruptions": count})
    return TRAINING.model_copy(update={"restarts": restarts(count)[-10:], "run": run})


HALTED = {"subject": subject(SUSPENDED, generation=2), "pinned": {1: pinned(), 2: pinned(SUSPENDED, generation=2)}}
"""Generation 2 is suspended; else it asks for the same."""
RESUMED = {
    "subject": subject(generation=3),
    "pinned": {1: pinned(), 2: pinned(SUSPENDED, generation=2), 3: pinned(generation=3)},
}
"""Generation 3 is not suspended any more."""
CHANGED = {"subject": subject(FASTER, generation=2), "pinned": {1: pinned(), 2: pinned(FASTER, generation=2)}}
"""Generation 2 asks for another run than generation 1."""
GATED = {"subject": subject(STRICTER, generation=2), "pinned": {1: pinned(), 2: pinned(STRICTER, generation=2)}}
"""Generation 2 asks for a gate; the run is the same."""
RUNNING = (t(1), pod(t(1)))
LOOKING = pod(p(), running=False, waiting=("ContainerCreating", ""), placed=ago(40))
CREATING = pod(t(), running=False, waiting=("ContainerCreating", ""), placed=ago(40))
"""Pods that their node does not get ready."""
REFUSED2 = said("Training", "ColumnMissing", generation=2, passed="False", run_generation=1)
PASSED2 = said("Queued", "PreflightPassed", generation=2, passed="True", run=OTHER_RUN)

ACCEPTING = [
    Row("a new document is pinned and looked at", world(pinned={}), "Preflight", "Checking", "pin g1, begin p1"),
    Row("a pinned document is not resolved again", world(profiles={}), "Preflight", "Checking", "begin p1"),
    Row(
        "a stored spec that does not validate is final",
        world(subject=subject({**SPEC, "training": {"learningRate": -1}}), pinned={}),
        "Failed",
        "InvalidSpec",
        says="spec.training.learningRate: Input should be greater than 0",
    ),
    Row(
        "a profile that is not there is waited for",
        world(profiles={}, pinned={}),
        "Pending",
        "ProfileNotFound",
        says="no FineTuneProfile named default",
        stalled=True,
    ),
    Row(
        "a profile that is named is not replaced by the default one",
        world(subject=subject({**SPEC, "profile": "gpu"}), pinned={}),
        "Pending",
        "ProfileNotFound",
        says="named gpu",
        stalled=True,
    ),
    Row(
        "a profile that does not validate is waited for",
        world(profiles={"default": Profile("default", {"images": 3})}, pinned={}),
        "Pending",
        "InvalidProfile",
        says="spec.images",
        stalled=True,
    ),
    Row(
        "an endpoint that the profile forbids is final",
        world(subject=subject({**SPEC, "storage": {"endpoint": "http://evil"}}), pinned={}),
        "Failed",
        "EndpointNotAllowed",
        says="http://evil is not allowed",
    ),
    Row(
        "a file of one machine is refused in a cluster",
        world(subject=subject({**SPEC, "model": {"uri": "file:///m"}}), pinned={}),
        "Failed",
        "FileUriInCluster",
        says="spec.model.uri",
    ),
    Row(
        "a config of another version is not guessed at",
        world(pinned={}, unreadable=frozenset({1})),
        "Pending",
        "PinnedConfigUnreadable",
        stalled=True,
    ),
    Row("what goes away is left alone", world(subject=subject(deleting=True))),
    Row("what has succeeded is never touched again", world(SUCCEEDED, pinned={}, profiles={})),
    Row("what has failed is never touched again", world(FAILED, pinned={}, profiles={})),
    Row(
        "another spec brings a finished job back",
        world(SUCCEEDED, **{**CHANGED, "pinned": {1: pinned()}}),
        "Preflight",
        "Checking",
        "pin g2, begin p1",
        passed="Unknown",
    ),
]

LOOKING = [
    Row("a preflight Job that runs is waited for", world(None, p(), pod(p())), "Preflight", "Checking"),
    Row("a preflight Job without pods is looked at again", world(None, p()), "Preflight", "Checking", again=5.0),
    Row(
        "a preflight pod that no node takes says so",
        world(None, p(), pod(p(), node=None, running=False, unschedulable="0/3 nodes are available")),
        "Preflight",
        "Unschedulable",
        says="0/3 nodes are available",
    ),
    Row(
        "an image that cannot be pulled stalls",
        world(None, p(), pod(p(), running=False, waiting=("ErrImagePull", "manifest unknown"))),
        "Pending",
        "ImagePullBackOff",
        says="manifest unknown",
        stalled=True,
    ),
    Row(
        "a Secret that the kubelet misses is named",
        world(None, p(), pod(p(), running=False, waiting=("CreateContainerConfigError", 'secret "s3" not found'))),
        "Pending",
        "SecretNotFound",
        says='secret "s3" not found',
        stalled=True,
    ),
    Row(
        "so is what its node cannot mount",
        world(None, p(), LOOKING, unprepared={LOOKING.uid: ("FailedMount", 'configmap "one-g1" not found')}),
        "Pending",
        "FailedMount",
        says='configmap "one-g1" not found',
        stalled=True,
        again=30.0,
    ),
    Row(
        "and that is looked into though nothing happens",
        world(None, p(), LOOKING),
        "Preflight",
        "Checking",
        again=30.0,
    ),
    Row(
        "pods that the cluster refuses are told in its words",
        world(None, p(), refusals={p().uid: "exceeded quota: team-a"}),
        "Pending",
        "PodsRefused",
        says="exceeded quota: team-a",
        stalled=True,
    ),
    Row(
        "a fresh run may begin once its name is written",
        world(PREFLIGHT, p(), ended(p(), 0, outcome("Fresh"))),
        "Queued",
        "PreflightPassed",
        passed="True",
        again=0.0,
    ),
    Row(
        "a run with a checkpoint says from where it goes on",
        world(PREFLIGHT, p(), ended(p(), 0, outcome("Resume", 30))),
        "Queued",
        "PreflightPassed",
        says="goes on from step 30",
        passed="True",
    ),
    Row(
        "the very model that is there already is reported and nothing is trained",
        world(PREFLIGHT, p(), ended(p(), 0, outcome("Reused"))),
        "Succeeded",
        "Reused",
        says="f1 0.900 on test (trivial 0.100, probe 0.700)",
        passed="True",
    ),
    Row(
        "wrong data is final, in the words of preflight",
        world(PREFLIGHT, p(), ended(p(), 42, message(42, "ColumnMissing"))),
        "Failed",
        "ColumnMissing",
        says="ColumnMissing it is",
        passed="False",
    ),
    Row(
        "storage that does not answer is looked at again in 10 s",
        world(PREFLIGHT, p(), ended(p(), 49, message(49, "BucketNotFound"), at=2)),
        "Pending",
        "BucketNotFound",
        says="BucketNotFound it is; next try at 2026-03-01T12:00:08Z",
        stalled=True,
        again=8.0,
    ),
    Row(
        "and in 40 s after the third time",
        world(PREFLIGHT, p(3, counters=Counters(tries=2)), ended(p(3), 49, message(49, "BucketNotFound"), at=2)),
        "Pending",
        "BucketNotFound",
        stalled=True,
        again=38.0,
    ),
    Row(
        "and never later than in ten minutes",
        world(PREFLIGHT, p(3, counters=Counters(tries=99)), ended(p(3), 49, message(49, "BucketNotFound"), at=0)),
        "Pending",
        "BucketNotFound",
        stalled=True,
        again=600.0,
    ),
    Row(
        "when the time has come the next preflight begins",
        world(PREFLIGHT, p(), ended(p(), 49, message(49, "BucketNotFound"), at=11)),
        "Pending",
        "BucketNotFound",
        "begin p2, delete p1",
        stalled=True,
    ),
    Row(
        "a preflight whose node is silent says so",
        world(PREFLIGHT, p(), pod(p(), unreachable=True)),
        "Preflight",
        "NodeSilent",
        says="node node0 does not answer, and may be lost",
        again=30.0,
    ),
    Row(
        "a preflight Job that somebody wants no pod of says so",
        world(PREFLIGHT, p(nodes=0)),
        "Pending",
        "FewerPodsWanted",
        says="the parallelism of Job one-11111-p1 was set to 0 instead of 1",
        stalled=True,
    ),
    Row(
        "it goes on to say what is missing until the next one knows",
        world(missing("no bucket; next try at 2026-03-01T12:00:00Z"), p(2, counters=Counters(tries=1)), pod(p(2))),
        "Pending",
        "BucketNotFound",
        says="no bucket; looking again now",
        stalled=True,
    ),
    Row(
        "what its pod waited for is there once the pod runs",
        world(missing("no such image"), p(2, counters=Counters(tries=1)), pod(p(2))),
        "Preflight",
        "Checking",
    ),
    Row(
        "what took the pod away says nothing of what is missing",
        world(missing("no bucket; looking again now"), p(3, counters=Counters(tries=2, interruptions=1)), pod(p(3))),
        "Preflight",
        "Checking",
    ),
    Row(
        "the Job before is deleted when the next one is there",
        world(PREFLIGHT, p(1), p(2), pod(p(2)), ended(p(1), 49, message(49, "BucketNotFound"), at=11)),
        "Preflight",
        "Checking",
        "delete p1",
    ),
    Row(
        "a preflight that crashes is tried again",
        world(PREFLIGHT, p(), ended(p(), 1, at=6)),
        "Preflight",
        "Crashed",
        "begin p2, delete p1",
        says="exit code 1 (no last message)",
    ),
    Row(
        "but not for ever",
        world(PREFLIGHT, p(4, counters=Counters(failures=3)), ended(p(4), 137, word="OOMKilled")),
        "Failed",
        "HostOutOfMemory",
        says="(crash 4, 3 are forgiven)",
        passed="False",
    ),
    Row(
        "a preflight pod that was evicted is nobody's fault",
        world(PREFLIGHT, p(counters=Counters(failures=3)), ended(p(), 137, disrupted="EvictionByEvictionAPI", at=11)),
        "Preflight",
        "EvictionByEvictionAPI",
        "begin p2, delete p1",
    ),
    Row(
        "a preflight whose message is lost looks again",
        world(PREFLIGHT, p(ended="Complete", ended_at=ago(11))),
        "Preflight",
        "MessageLost",
        "begin p2, delete p1",
    ),
    Row(
        "a preflight of a document that is no more wanted goes",
        world(said("Preflight", "Checking", run=None), p(), pod(p()), **CHANGED),
        "Preflight",
        "Checking",
        "begin p2, delete p1",
    ),
    Row(
        "a preflight that a live change does not concern goes on",
        world(
            PREFLIGHT,
            p(),
            pod(p()),
            subject=subject(PATIENT, generation=2),
            pinned={1: pinned(), 2: pinned(PATIENT, generation=2)},
        ),
        "Preflight",
        "Checking",
    ),
]

BEGINNING = [
    Row("what has passed begins", world(GO, p(), ended(p(), 0, outcome("Fresh"))), "Queued", "PodsPending", "begin t1"),
    Row("and also when the preflight Job is gone", world(GO), "Queued", "PodsPending", "begin t1"),
    Row(
        "one that is gone before the status told of it is an attempt, too: it would be begun again for ever",
        world(GO, p(attempts=0), ended(p(), 0, outcome("Fresh")), begun=1),
        "Preflight",
        "Checking",
        "begin p2, delete p1",
        passed="Unknown",
    ),
    Row(
        "one that was told is not begun anew as another",
        world(GO.model_copy(update={"usage": Usage(attempts=1)}), begun=1),
        "Queued",
        "PodsPending",
        "begin t2",
    ),
    Row(
        "numbers of attempts are never used twice",
        world(GO.model_copy(update={"usage": Usage(attempts=4)})),
        "Queued",
        "PodsPending",
        "begin t5",
    ),
    Row(
        "a preflight Job that was begun beside it goes",
        world(GO, p(), *RUNNING),
        "Starting",
        "Loading",
        "delete p1",
    ),
    Row(
        "the preflight Job before it stays, and the cluster removes it as it removes the train Job",
        world(GO, p(attempts=0), ended(p(), 0, outcome("Fresh")), *RUNNING),
        "Starting",
        "Loading",
    ),
    Row(
        "an older twin goes first",
        world(GO, p(), rival()),
        "Pending",
        "IdenticalRunInProgress",
        "delete p1",
        says="ns/two",
        passed="True",
    ),
    Row(
        "a younger twin does not matter",
        world(GO, rival(created=ago(1))),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "a younger twin that trains already goes on",
        world(GO, rival(created=ago(1), holding=True)),
        "Pending",
        "IdenticalRunInProgress",
    ),
    Row(
        "a twin with another run does not matter", world(GO, rival(run=OTHER_RUN)), "Queued", "PodsPending", "begin t1"
    ),
    Row(
        "a twin that has ended does not matter", world(GO, rival(unfinished=False)), "Queued", "PodsPending", "begin t1"
    ),
    Row(
        "a pod of a FineTuneJob that was deleted is waited for",
        world(GO, p(), rival("pod two-t1-x", holding=True, attended=False)),
        "Pending",
        "IdenticalRunInProgress",
        "delete p1",
        says="pod two-t1-x of a FineTuneJob that is over still trains the very same model",
        again=5.0,
    ),
    Row("one that waits keeps waiting", world(WAITING, rival()), "Pending", "IdenticalRunInProgress", again=60.0),
    Row(
        "when the twin is done preflight looks again",
        world(WAITING, rival(unfinished=False)),
        "Preflight",
        "Checking",
        "begin p1",
        passed="Unknown",
    ),
    Row("when the twin is gone preflight looks again", world(WAITING), "Preflight", "Checking", "begin p1"),
    Row(
        "two that train at once: the younger gives way",
        world(TRAINING, *RUNNING, rival(holding=True)),
        "Pending",
        "IdenticalRunInProgress",
        "delete t1",
    ),
    Row(
        "two that train at once: the older goes on",
        world(TRAINING, *RUNNING, rival(holding=True, created=ago(1))),
        None,
    ),
]

TRAINING_ROWS = [
    Row("without a node it is queued", world(GO, t(), pod(t(), node=None, running=False)), "Queued", "PodsPending"),
    Row(
        "the scheduler's words are passed on",
        world(GO, t(), pod(t(), node=None, running=False, unschedulable="Insufficient nvidia.com/gpu")),
        "Queued",
        "Unschedulable",
        says="Insufficient nvidia.com/gpu",
    ),
    Row("a suspended Job is queued", world(GO, t(suspended=True)), "Queued", "JobSuspended"),
    Row(
        "on a node it starts",
        world(GO, t(), pod(t(), running=False, waiting=("ContainerCreating", ""))),
        "Starting",
        "PodsStarting",
    ),
    Row(
        "an image name that is none stalls the start",
        world(GO, t(), pod(t(), running=False, waiting=("InvalidImageName", "couldn't parse"))),
        "Starting",
        "InvalidImageName",
        stalled=True,
    ),
    Row(
        "of a pod that its node refuses, the node's words are told until its Job ends",
        world(GO, t(), pod(t(), **REFUSED)),
        "Starting",
        "UnexpectedAdmissionError",
        says="a pod of Job one-11111-t1 did not start (UnexpectedAdmissionError: Allocate failed); the Job ends",
    ),
    Row(
        "and not what its container waited for",
        world(GO, t(), pod(t(), **REFUSED, waiting=("ErrImagePull", "manifest unknown"))),
        "Starting",
        "UnexpectedAdmissionError",
    ),
    Row(
        "also of a preflight pod",
        world(PREFLIGHT, p(), pod(p(), **REFUSED)),
        "Preflight",
        "UnexpectedAdmissionError",
        says="did not start (UnexpectedAdmissionError: Allocate failed); the Job ends",
    ),
    Row(
        "just after the scheduler placed it that is told with what follows",
        world(GO, t(), pod(t(), **REFUSED, placed=ago(8))),
        None,
        again=3.0,
    ),
    Row(
        "also where it was said already that its container starts",
        world(
            said("Starting", "PodsStarting", passed="True", usage=Usage(attempts=1)),
            t(),
            pod(t(), **REFUSED, placed=ago(8)),
        ),
        None,
        again=3.0,
    ),
    Row(
        "a pod that was deleted before it began ends no Job that goes on with another",
        world(
            GO,
            t(),
            pod(t(), **DELETED_EARLY),
            pod(t(), name="new", running=False, waiting=("ContainerCreating", "")),
        ),
        "Starting",
        "PodsStarting",
    ),
    Row(
        "nor one that has its place in the queue again, and no other pod yet",
        world(
            said("Starting", "PodsStarting", passed="True", run_at=ago(55), usage=Usage(attempts=1)),
            t(queue="team", released=ago(1)),
            pod(t(), **DELETED_EARLY),
            kueue=True,
        ),
        "Queued",
        "PodsPending",
        says="waiting for a node",
    ),
    Row(
        "and while it is not known whether its Job goes on, it changes nothing",
        world(
            said("Starting", "ImagePullBackOff", stalled=True, passed="True", run_at=ago(55), usage=Usage(attempts=1)),
            t(),
            pod(t(), **DELETED_EARLY),
        ),
        None,
    ),
    Row(
        "what the cluster itself says of one that is deleted is told",
        world(GO, t(), pod(t(), **{**DELETED_EARLY, "disrupted": "PreemptionByScheduler"})),
        "Starting",
        "PreemptionByScheduler",
    ),
    Row("a trainer that loads starts", world(GO, *RUNNING, progress("Loading", 0)), "Starting", "Loading"),
    Row(
        "a trainer that trains is followed",
        world(GO, *RUNNING, progress(loss=0.5)),
        "Training",
        "Training",
        says="step 40 of 100, loss 0.5",
    ),
    Row("a trainer that evaluates", world(TRAINING, *RUNNING, progress("Evaluating")), "Evaluating", "Evaluating"),
    Row("a trainer that publishes", world(TRAINING, *RUNNING, progress("Publishing")), "Evaluating", "Publishing"),
    Row("a pod that is gone before its Job says so changes nothing", world(PLACED, t()), None, again=5.0),
    Row(
        "nor one of several",
        world(
            PLACED,
            t(key=pinned(TWO_NODES).key, nodes=2),
            pod(t(key=pinned(TWO_NODES).key, nodes=2)),
            subject=subject(TWO_NODES),
            pinned={1: pinned(TWO_NODES)},
        ),
        None,
    ),
    Row(
        "nor one that was asked to go before",
        world(said("Training", "Stopping", passed="True", run_at=ago(55), usage=Usage(attempts=1)), t()),
        None,
    ),
    Row(
        "nor one that had only begun",
        world(said("Starting", "PodsStarting", passed="True", run_at=ago(55), usage=Usage(attempts=1)), t()),
        None,
    ),
    *(
        Row(
            f"nor one whose container was never started: {reason}",
            world(
                said("Starting", reason, stalled=stalled, passed="True", run_at=ago(55), usage=Usage(attempts=1)),
                t(),
            ),
            None,
        )
        for reason, stalled in (
            ("ImagePullBackOff", True),
            ("SecretNotFound", True),
            ("InvalidImageName", True),
            ("UnexpectedAdmissionError", False),
        )
    ),
    Row(
        "what is said of a changed document goes on beside it",
        world(
            REFUSED2.model_copy(update={"run": PLACED.run, "message": "step 40 of 100; generation 2 was refused: no"}),
            t(),
            **CHANGED,
        ),
        "Training",
        "ColumnMissing",
        says="step 40 of 100; generation 2 was refused: as it was",
        passed="False",
    ),
    Row(
        "an attempt that follows has had no pod yet",
        world(PLACED, t(2, created=ago(1))),
        "Queued",
        "PodsPending",
    ),
    Row(
        "nor has one that was suspended meanwhile",
        world(PLACED, t(released=ago(1))),
        "Queued",
        "PodsPending",
    ),
    Row(
        "what a cluster refuses to create is told",
        world(PLACED, t(), refusals={t().uid: "exceeded quota"}),
        "Queued",
        "PodsRefused",
        stalled=True,
    ),
    Row(
        "what keeps a node from preparing a pod is told",
        world(PLACED, t(), CREATING, unprepared={CREATING.uid: ("FailedAttachVolume", "Multi-Attach error for cache")}),
        "Starting",
        "FailedAttachVolume",
        says="Multi-Attach error for cache",
        stalled=True,
        again=5.0,
    ),
    Row(
        "numbers that are made up for each try are not: each would be a change",
        world(
            PLACED,
            t(),
            CREATING,
            unprepared={CREATING.uid: ("FailedCreatePodSandBox", f'no network for sandbox "{"0af1" * 16}": EOF')},
        ),
        "Starting",
        "FailedCreatePodSandBox",
        says="no network for sandbox ...: EOF",
        stalled=True,
    ),
    Row(
        "once it runs that is over",
        world(TRAINING, *RUNNING, unprepared={RUNNING[1].uid: ("FailedMount", "timed out")}),
        None,
    ),
    Row("a trainer that says nothing changes nothing", world(TRAINING, *RUNNING), None, again=5.0),
    Row(
        "that it trains is not believed where no trainer has said it",
        world(said("Training", "Training", passed="True", run=None), *RUNNING),
        "Starting",
        "Loading",
        says="the trainer starts",
    ),
    Row(
        "two pods run when both run",
        world(
            GO,
            t(key=pinned(TWO_NODES).key, nodes=2),
            pod(t(key=pinned(TWO_NODES).key, nodes=2)),
            subject=subject(TWO_NODES),
            pinned={1: pinned(TWO_NODES)},
        ),
        "Queued",
        "PodsPending",
    ),
    Row(
        "the end with a result is success",
        world(TRAINING, t(), ended(t(), 0, TRAINED)),
        "Succeeded",
        "Trained",
        says="f1 0.900",
        passed="True",
    ),
    Row(
        "also when everything else of the status was wiped",
        world(None, t(), ended(t(), 0, TRAINED)),
        "Succeeded",
        "Trained",
        passed="True",
    ),
    Row(
        "a running Job is taken up again after the status was wiped",
        world(None, *RUNNING, progress()),
        "Training",
        "Training",
        passed="True",
    ),
    Row(
        "a lost message is looked up in storage",
        world(TRAINING, t(ended="Complete", ended_at=ago(1))),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
        passed="Unknown",
    ),
    Row(
        "and while that goes on nothing else is begun",
        world(said("Preflight", "Checking"), p(), pod(p()), t(ended="Complete", ended_at=ago(1))),
        "Preflight",
        "Checking",
        "delete t1",
    ),
    Row(
        "a Job that is gone is looked up in storage",
        world(TRAINING),
        "Preflight",
        "Checking",
        "begin p1",
        passed="Unknown",
    ),
    Row(
        "what preflight said before that is out of date",
        world(TRAINING, p(), ended(p(), 0, outcome("Fresh"))),
        "Preflight",
        "JobLost",
        "delete p1",
        says="storage is asked what it has left",
        passed="Unknown",
    ),
    Row(
        "what was acted upon before is nothing to go by, even though it is still there",
        world(TRAINING, p(attempts=0), ended(p(), 0, outcome("Fresh"))),
        "Preflight",
        "Checking",
        "begin p2, delete p1",
        passed="Unknown",
    ),
    Row(
        "also when the attempt ended without a word",
        world(TRAINING, p(attempts=0), ended(p(), 0, outcome("Fresh")), t(ended="Complete"), ended(t(), 0)),
        "Preflight",
        "Checking",
        "begin p2, delete p1, delete t1",
        passed="Unknown",
    ),
    Row(
        "after which the next attempt goes on",
        world(
            said(
                "Queued",
                "PreflightPassed",
                passed="True",
                usage=Usage(attempts=1),
                checkpoint=CheckpointStatus(step=30),
            ),
            p(),
            ended(p(), 0, outcome("Resume", 30)),
        ),
        "Queued",
        "PodsPending",
        "begin t2",
    ),
]

FAILING = [
    Row(
        "a crash is tried again after 5 s",
        world(TRAINING, t(), ended(t(), 1, at=2)),
        "Starting",
        "Crashed",
        says="going on from step 30 at 2026-03-01T12:00:03Z",
        again=3.0,
    ),
    Row(
        "when the time has come the next attempt begins and the old Job goes",
        world(TRAINING, t(), ended(t(), 1, at=6)),
        "Starting",
        "Crashed",
        "begin t2, delete t1",
    ),
    Row(
        "a twin that took over the run meanwhile is waited for",
        world(TRAINING, t(), ended(t(), 1, at=6), rival(holding=True, created=ago(1))),
        "Pending",
        "IdenticalRunInProgress",
        "delete t1",
        again=60.0,
    ),
    Row(
        "the third crash waits longer",
        world(TRAINING, t(3, counters=Counters(failures=2)), ended(t(3), 139, at=2)),
        "Starting",
        "Crashed",
        again=18.0,
    ),
    Row(
        "more crashes than retries.max are final",
        world(TRAINING, t(4, counters=Counters(failures=3)), ended(t(4), 1)),
        "Failed",
        "Crashed",
        says="crash 4, 3 are forgiven",
    ),
    Row(
        "retries.max counts as it stands now",
        world(
            TRAINING,
            t(2, counters=Counters(failures=1)),
            ended(t(2), 1),
            subject=subject(PATIENT, generation=2),
            pinned={1: pinned(), 2: pinned(PATIENT, generation=2)},
        ),
        "Failed",
        "Crashed",
    ),
    Row(
        "a loss that is no number is final: the trainer has tried twice, and would come to the same end",
        world(TRAINING, t(), ended(t(), 47, message(47, "Diverged"), at=1)),
        "Failed",
        "Diverged",
    ),
    Row("a hung trainer is counted", world(TRAINING, t(), ended(t(), 46, message(46, "Hung"))), "Starting", "Hung"),
    Row("damaged data is counted", world(TRAINING, t(), ended(t(), 43, message(43, "Damaged"))), "Starting", "Damaged"),
    Row(
        "a container killed for its memory is free, too: the next attempt is told to halve the micro-batch",
        world(TRAINING, t(counters=Counters(failures=3)), ended(t(), 137, word="OOMKilled")),
        "Starting",
        "HostOutOfMemory",
        "begin t2, delete t1",
        says="raise spec.resources.perNode.memory; going on from step 30",
    ),
    Row(
        "memory that the trainer has told of is free: the next attempt halves the micro-batch",
        world(TRAINING, t(counters=Counters(failures=3)), ended(t(), 50, message(50, "GpuOutOfMemory"))),
        "Starting",
        "GpuOutOfMemory",
        "begin t2, delete t1",
    ),
    Row(
        "but it is bounded",
        world(tired(9), t(10), ended(t(10), 50, message(50, "GpuOutOfMemory"))),
        "Failed",
        "NoProgress",
        says="the last time: GpuOutOfMemory it is; look why",
    ),
    Row(
        "a preflight has no micro-batch to halve: its memory is counted",
        world(PREFLIGHT, p(4, counters=Counters(failures=3)), ended(p(4), 50, message(50, "HostOutOfMemory"))),
        "Failed",
        "HostOutOfMemory",
        says="(crash 4, 3 are forgiven)",
    ),
    Row(
        "wrong data found while training is final",
        world(TRAINING, t(), ended(t(), 42, message(42, "InputChanged"))),
        "Failed",
        "InputChanged",
    ),
    Row("a gate that is not met is final", world(TRAINING, t(), ended(t(), 48)), "Failed", "GateNotMet"),
    Row(
        "and says what was measured",
        world(TRAINING, t(), ended(t(), 48, UNMET)),
        "Failed",
        "GateNotMet",
        says="GateNotMet it is",
        passed="True",
    ),
    Row(
        "gates changed while the pods ran are judged by a preflight",
        world(TRAINING, t(), ended(t(), 0, TRAINED), **GATED),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
        passed="Unknown",
    ),
    Row(
        "so are gates that were not met and have changed since",
        world(said("Failed", "GateNotMet", passed="True"), t(), ended(t(), 48, UNMET), **GATED),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
        passed="Unknown",
    ),
    Row(
        "and gates that are added to a model that is there",
        world(SUCCEEDED, t(), ended(t(), 0, TRAINED), **GATED),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
        passed="Unknown",
    ),
    Row(
        "while the pods run, changed gates restart nothing", world(TRAINING, *RUNNING, **GATED), "Training", "Training"
    ),
    Row(
        "a pod that was deleted is free and goes on at once",
        world(TRAINING, t(counters=Counters(failures=3), ended="Failed", ended_at=ago(0))),
        "Starting",
        "PodDeleted",
        "begin t2, delete t1",
    ),
    Row(
        "so is one that committed a checkpoint and stopped when asked by the cluster",
        world(TRAINING, t(), ended(t(), 45, message(45, "Stopped", step=40))),
        "Starting",
        "Stopped",
        "begin t2, delete t1",
        says="going on from step 40",
    ),
    Row(
        "so is an eviction, whatever the exit code",
        world(TRAINING, t(), ended(t(), 137, disrupted="Evicted")),
        "Starting",
        "Evicted",
        "begin t2, delete t1",
    ),
    Row(
        "interruptions that win no step are spaced",
        world(tired(3), t(4, ended="Failed", ended_at=ago(0))),
        "Starting",
        "PodDeleted",
        again=20.0,
    ),
    Row(
        "also when a crash or an outage came in between",
        world(tired(9).model_copy(update={"restarts": [*restarts(8), *restarts(2, first=9)]}), t(11), ended(t(11), 45)),
        "Failed",
        "NoProgress",
    ),
    Row(
        "outages are waited for, however many there were",
        world(tired(9), t(10), ended(t(10), 49, message(49, "Unreachable"))),
        "Pending",
        "Unreachable",
        stalled=True,
    ),
    Row(
        "the tenth without a step is final",
        world(tired(9), t(10, ended="Failed", ended_at=ago(0))),
        "Failed",
        "NoProgress",
        says="interrupted 10 times in a row without one more committed step, the last time: a pod of Job",
    ),
    Row(
        "where evaluation is not reached the end of, it says so",
        world(
            tired(9).model_copy(update={"phase": "Evaluating"}),
            t(10, ended="Failed", ended_at=ago(0)),
        ),
        "Failed",
        "NoProgress",
        says="before evaluation and publication are done",
    ),
    Row(
        "a Job that is deleted again and again is spaced, too",
        world(tired(3).model_copy(update={"usage": Usage(attempts=4)})),
        "Preflight",
        "JobLost",
        says="the train Job is gone; next try at 2026-03-01T12:00:20Z",
        again=20.0,
        passed="Unknown",
    ),
    Row(
        "and given up at the tenth time",
        world(tired(9).model_copy(update={"usage": Usage(attempts=10)})),
        "Failed",
        "NoProgress",
        says="the last time: the train Job is gone",
    ),
    Row(
        "so is a preflight that is taken away again and again",
        world(
            PREFLIGHT,
            p(10, counters=Counters(tries=9, interruptions=9)),
            ended(p(10), 137, disrupted="EvictionByEvictionAPI"),
        ),
        "Failed",
        "NoProgress",
        says="preflight was interrupted 10 times in a row",
        passed="False",
    ),
    Row(
        "a preflight Job that somebody deletes is not made again at once",
        world(looked_at()),
        "Preflight",
        "PreflightJobLost",
        says="deleted by hand or by another program (interruption 1 of 10 in a row); next try at 2026-03-01T12:00:",
        passed="Unknown",
        again=10 * jitter(f"{UID}/1"),
    ),
    Row(
        "but later each time",
        world(looked_at(tries=3, interruptions=3)),
        "Preflight",
        "PreflightJobLost",
        says="(interruption 4 of 10 in a row)",
        again=80 * jitter(f"{UID}/4"),
    ),
    Row(
        "but never later than in ten minutes, either",
        world(looked_at(tries=30, interruptions=8)),
        "Preflight",
        "PreflightJobLost",
        again=min(600 * jitter(f"{UID}/31"), 600),
    ),
    Row(
        "while it rests nothing is begun, and its words stay",
        world(looked_at("Preflight", "PreflightJobLost", tries=1, interruptions=1, next_at=format_time(ago(-7)))),
        again=7.0,
    ),
    Row(
        "when it has rested the next one begins",
        world(looked_at("Preflight", "PreflightJobLost", tries=1, interruptions=1, next_at=format_time(ago(0)))),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "a time of rest that no delay can have made is not waited for",
        world(looked_at("Preflight", "PreflightJobLost", tries=1, next_at=format_time(ago(-1000)))),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "the tenth preflight Job in a row that is deleted was the last, and the status says what to look for",
        world(looked_at(tries=9, interruptions=9)),
        "Failed",
        "NoProgress",
        says="the last time: the preflight Job is gone: deleted by hand or by another program; look what deletes it",
        passed="False",
    ),
    Row(
        "a preflight Job that has ended, and is deleted before the next one is due, has said what it found",
        world(
            said(
                "Pending",
                "BucketNotFound",
                run=None,
                stalled=True,
                preflight_job=PreflightJobStatus(generation=1, tries=4, next_at=format_time(ago(-50))),
            )
        ),
        again=50.0,
    ),
    Row(
        "a preflight Job of another document is none that was deleted",
        world(looked_at(tries=3, interruptions=3), **CHANGED),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "one that goes on beside an old run rests, too",
        world(
            said(
                "Training",
                "Training",
                generation=2,
                run_generation=1,
                preflight_job=PreflightJobStatus(generation=2),
            ),
            *RUNNING,
            progress(step=50),
            **CHANGED,
        ),
        "Training",
        "Training",
        says="step 50 of 100; generation 2: the preflight Job is gone",
        passed="Unknown",
    ),
    Row(
        "while its node is silent the status says so, beside what the trainer said last",
        world(TRAINING, t(), pod(t(), unreachable=True), progress(loss=0.5)),
        "Training",
        "NodeSilent",
        says="node node0 does not answer, and may be lost; step 40 of 100, loss 0.5",
        again=5.0,
    ),
    Row(
        "a pod that nothing ends on a dead node does not hold the run: FailureTarget is enough",
        world(
            TRAINING,
            t(ended="Failed", ended_at=ago(0)),
            pod(t(), gone_by=ago(-30), was_asked_to_go=True, disrupted="DeletionByTaintManager", unreachable=True),
        ),
        "Starting",
        "DeletionByTaintManager",
        "begin t2, delete t1",
    ),
    Row(
        "a pod that is drained commits its checkpoint before the next attempt claims the run",
        world(
            TRAINING,
            t(ended="Failed", ended_at=ago(0)),
            pod(t(), gone_by=ago(-30), was_asked_to_go=True, disrupted="EvictionByEvictionAPI"),
        ),
        "Training",
        "Stopping",
        says="a checkpoint is committed before the next attempt begins",
        again=2.0,
    ),
    Row(
        "once it has, and until the Job says so, nothing starts",
        world(TRAINING, t(), ended(t(), 45, message(45, "Stopped", step=40), gone_by=ago(-30), was_asked_to_go=True)),
        "Training",
        "Stopping",
        again=2.0,
    ),
    Row(
        "which is not said of one that did not end in order",
        world(TRAINING, t(), ended(t(), 137, gone_by=ago(-30), was_asked_to_go=True)),
    ),
    Row(
        "also when the other pod is gone already",
        world(
            TRAINING,
            t(ended="Failed", ended_at=ago(0), key=pinned(TWO_NODES).key),
            pod(t(), gone_by=ago(-30), was_asked_to_go=True),
            subject=subject(TWO_NODES),
            pinned={1: pinned(TWO_NODES)},
        ),
        "Training",
        "Stopping",
    ),
    Row(
        "but no longer than it was given",
        world(
            TRAINING,
            t(ended="Failed", ended_at=ago(120)),
            pod(t(), gone_by=ago(0), was_asked_to_go=True, disrupted="EvictionByEvictionAPI"),
        ),
        "Starting",
        "EvictionByEvictionAPI",
        "begin t2, delete t1",
    ),
    Row(
        "one pod of two that goes takes the whole group back to the same record",
        world(
            TRAINING,
            t(ended="Failed", ended_at=ago(0), key=pinned(TWO_NODES).key),
            ended(t(), 45, message(45, "Stopped", step=40), was_asked_to_go=True, gone_by=ago(-100)),
            ended(t(), 45, index=1, name="x-1"),
            subject=subject(TWO_NODES),
            pinned={1: pinned(TWO_NODES)},
        ),
        "Starting",
        "Stopped",
        "begin t2, delete t1",
        says="going on from step 40",
    ),
    Row(
        "ten that won steps are none of these",
        world(
            tired(9).model_copy(update={"checkpoint": CheckpointStatus(step=35)}),
            t(10, ended="Failed", ended_at=ago(0)),
        ),
        "Starting",
        "PodDeleted",
        "begin t11, delete t10",
    ),
    Row(
        "one that is fenced looks again after a minute",
        world(TRAINING, t(), ended(t(), 44, message(44, "Fenced"), at=20)),
        "Preflight",
        "Fenced",
        passed="Unknown",
        again=40.0,
    ),
    Row(
        "by way of preflight",
        world(TRAINING, t(), ended(t(), 44, message(44, "Fenced"), at=61)),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
        passed="Unknown",
    ),
    Row(
        "storage that went away stalls, and preflight looks for it",
        world(TRAINING, t(), ended(t(), 49, message(49, "Unreachable"), at=3)),
        "Pending",
        "Unreachable",
        stalled=True,
        again=7.0,
    ),
    Row(
        "the most telling code of several pods counts",
        world(TRAINING, t(ended="Failed", ended_at=ago(0)), ended(t(), 1), ended(t(), 42, index=1)),
        "Failed",
        "InvalidConfiguration",
    ),
    Row(
        "the crash counts, not the stop of the pods that were deleted for it",
        world(TRAINING, t(ended="Failed", ended_at=ago(0)), ended(t(), 45, index=1), ended(t(), 139)),
        "Starting",
        "Crashed",
    ),
]

CHANGING = [
    Row(
        "another run is looked at while the old one goes on",
        world(TRAINING, *RUNNING, progress(step=50), **CHANGED),
        "Training",
        "Training",
        "begin p1",
        says="step 50 of 100; generation 2: checking storage",
        passed="Unknown",
    ),
    Row(
        "a new generation that is refused leaves the old run alone and says so",
        world(
            TRAINING,
            *RUNNING,
            progress(),
            p(generation=2, key=FASTER_KEY),
            ended(p(key=FASTER_KEY), 42, message(42, "ColumnMissing")),
            **CHANGED,
        ),
        "Training",
        "ColumnMissing",
        says="generation 2 was refused: ColumnMissing it is",
        passed="False",
    ),
    Row(
        "and is not looked at again when its Job is gone",
        world(REFUSED2, *RUNNING, progress(), **CHANGED),
        "Training",
        "ColumnMissing",
        passed="False",
    ),
    Row(
        "when the old run ends its model counts, and the refusal stands",
        world(REFUSED2, t(), ended(t(), 0, TRAINED), **CHANGED),
        "Failed",
        "ColumnMissing",
        says="as it was; the model is that of generation 1",
        passed="False",
    ),
    Row(
        "also where that model is not good enough",
        world(REFUSED2, t(), ended(t(), 48, UNMET), **CHANGED),
        "Failed",
        "ColumnMissing",
        says="as it was; the model is that of generation 1",
        passed="False",
    ),
    Row(
        "an old run that crashes meanwhile is tried again",
        world(REFUSED2, t(), ended(t(), 1, at=9), **CHANGED),
        "Starting",
        "ColumnMissing",
        "begin t2, delete t1",
    ),
    Row(
        "a document that does not validate leaves the old run alone",
        world(TRAINING, *RUNNING, progress(), subject=subject({**SPEC, "task": 1}, generation=2)),
        "Training",
        "InvalidSpec",
        says="generation 2 was refused: spec.task",
    ),
    Row(
        "an old run whose pinned configuration was deleted cannot be followed, and ends",
        world(TRAINING, *RUNNING, subject=subject({**SPEC, "task": 1}, generation=2), pinned={}),
        "Failed",
        "InvalidSpec",
        "delete t1",
    ),
    Row(
        "also where the new generation only waits for something",
        world(TRAINING, *RUNNING, subject=subject({**SPEC, "profile": "gpu"}, generation=2), pinned={}),
        "Pending",
        "ProfileNotFound",
        "delete t1",
        stalled=True,
    ),
    Row(
        "one that another version pinned is left alone: that version may come back",
        world(TRAINING, *RUNNING, pinned={}, unreadable=frozenset({1})),
        "Pending",
        "PinnedConfigUnreadable",
        stalled=True,
    ),
    Row(
        "a new generation that has passed is named before the old run is stopped",
        world(
            TRAINING,
            *RUNNING,
            p(generation=2, key=FASTER_KEY),
            ended(p(key=FASTER_KEY), 0, outcome("Fresh", run=OTHER_RUN)),
            **CHANGED,
        ),
        "Queued",
        "PreflightPassed",
        passed="True",
    ),
    Row(
        "then the old run is stopped", world(PASSED2, *RUNNING, **CHANGED), "Queued", "StoppingPreviousRun", "delete t1"
    ),
    Row(
        "its pods commit a checkpoint first",
        world(PASSED2, pod(t(), gone_by=NOW + timedelta(seconds=100)), **CHANGED),
        "Queued",
        "StoppingPreviousRun",
        again=2.0,
    ),
    Row(
        "a pod on a dead node is not waited for",
        world(PASSED2, pod(t(), gone_by=ago(61)), **CHANGED),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row("then the new run begins", world(PASSED2, ended(t(), 45), **CHANGED), "Queued", "PodsPending", "begin t1"),
    Row(
        "a live change moves the generation and nothing else",
        world(
            TRAINING,
            *RUNNING,
            progress(),
            subject=subject(PATIENT, generation=2),
            pinned={1: pinned(), 2: pinned(PATIENT, generation=2)},
        ),
        "Training",
        "Training",
        passed="True",
    ),
    Row(
        "reverting the spec keeps the run that still goes on",
        world(
            said("Training", "Training", generation=2, run_generation=1),
            *RUNNING,
            progress(),
            p(generation=2, key=FASTER_KEY),
            subject=subject(generation=3),
            pinned={1: pinned(), 2: pinned(FASTER, generation=2), 3: pinned(generation=3)},
        ),
        "Training",
        "Training",
        "delete p1",
        passed="True",
    ),
    Row(
        "a model that is there already ends the old run",
        world(
            TRAINING,
            *RUNNING,
            p(generation=2, key=FASTER_KEY),
            ended(p(key=FASTER_KEY), 0, outcome("Reused", run=OTHER_RUN)),
            **CHANGED,
        ),
        "Succeeded",
        "Reused",
        "delete t1",
    ),
    Row(
        "so does one that is there and not good enough",
        world(
            TRAINING,
            *RUNNING,
            p(generation=2, key=FASTER_KEY),
            ended(p(key=FASTER_KEY), 48, unmet(OTHER_RUN)),
            **CHANGED,
        ),
        "Failed",
        "GateNotMet",
        "delete t1",
        passed="True",
    ),
]

HALTING = said("Suspended", "Suspending", generation=2, usage=Usage(attempts=1), restarts=restarts(1))
SECOND_HALTING = HALTING.model_copy(
    update={
        "run": RunStatus(id=RUN, generation=1, attempt=2),
        "usage": Usage(attempts=2),
        "restarts": [*(HALTING.restarts or []), Restart(attempt=2, reason="Suspended", at="x", resumed_from_step=30)],
    }
)
IDLE = said(
    "Suspended",
    "Suspended",
    generation=2,
    usage=Usage(attempts=1),
    checkpoint=CheckpointStatus(step=40),
    restarts=[Restart(attempt=1, reason="Suspended", at="x", resumed_from_step=40, lost_steps=0)],
)
HALTED_AT_40 = HALTING.model_copy(
    update={
        "checkpoint": CheckpointStatus(step=30),
        "restarts": [Restart(attempt=1, reason="Suspended", at="x", resumed_from_step=40, lost_steps=0)],
    }
)
GOING = pod(t(), gone_by=NOW + timedelta(seconds=100), was_asked_to_go=True)
SUSPENDING = [
    Row(
        "a new document that is suspended is pinned, and nothing is begun",
        world(subject=subject(SUSPENDED), pinned={}),
        "Suspended",
        "Suspended",
        "pin g1",
        says="suspended; set spec.suspend to false to go on",
        passed="Unknown",
    ),
    Row(
        "one that cannot be resolved is suspended all the same",
        world(subject=subject({**SUSPENDED, "profile": "gpu"}), pinned={}),
        "Suspended",
        "Suspended",
    ),
    Row("a preflight is ended", world(PREFLIGHT, p(), pod(p()), **HALTED), "Suspended", "Suspending", "delete p1"),
    Row(
        "what has passed does not begin",
        world(GO, p(), ended(p(), 0, outcome("Fresh")), **HALTED),
        "Suspended",
        "Suspended",
        "delete p1",
        says="suspended before a checkpoint was committed; set spec.suspend to false to go on",
    ),
    Row(
        "of checkpoints nothing is claimed where the status was wiped",
        world(FineTuneJobStatus(), **HALTED),
        "Suspended",
        "Suspended",
        says="suspended; set spec.suspend to false to go on",
    ),
    Row("one that waits for a twin waits no longer", world(WAITING, rival(), **HALTED), "Suspended", "Suspended"),
    Row("what trains is stopped", world(TRAINING, *RUNNING, **HALTED), "Suspended", "Suspending", "delete t1"),
    Row(
        "and nothing is left of it",
        world(HALTING, p(attempts=0), ended(p(), 0, outcome("Fresh")), t(), GOING, **HALTED),
        "Suspended",
        "Suspending",
        "delete t1, delete p1",
    ),
    Row(
        "so is what waits for a node",
        world(GO, t(), pod(t(), node=None, running=False), **HALTED),
        "Suspended",
        "Suspending",
        "delete t1",
    ),
    Row(
        "so is what goes on beside a changed document",
        world(
            REFUSED2,
            *RUNNING,
            subject=subject({**FASTER, "suspend": True}, generation=3),
            pinned={1: pinned(), 3: pinned({**FASTER, "suspend": True}, generation=3)},
        ),
        "Suspended",
        "Suspending",
        "delete t1",
    ),
    Row(
        "its pods commit a checkpoint first, which is waited for",
        world(HALTING, GOING, **HALTED),
        "Suspended",
        "Suspending",
        again=2.0,
    ),
    Row(
        "but not on a dead node",
        world(HALTING, replace(GOING, gone_by=ago(61)), **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 30",
    ),
    Row(
        "that of which nothing is heard any more is expected to have committed",
        world(HALTED_AT_40, **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 40",
    ),
    Row(
        "so is what ended in order without a word",
        world(HALTED_AT_40, ended(t(), 45), **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 40",
    ),
    Row(
        "what was killed has committed no more than before",
        world(HALTED_AT_40, ended(t(), 137), **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 30",
    ),
    Row(
        "nor has what is gone without an end",
        world(HALTED_AT_40, GOING.removed, **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 30",
    ),
    Row(
        "nor what could not commit",
        world(HALTED_AT_40, ended(t(), 49, message(49, "Unreachable", run_id=RUN)), **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 30",
    ),
    Row(
        "as long as one still goes on nobody knows",
        world(HALTED_AT_40, ended(t(), 137), replace(GOING, index=1), **HALTED),
        "Suspended",
        "Suspending",
    ),
    Row(
        "what they have committed is told",
        world(HALTING, ended(t(), 45, message(45, "Stopped", run_id=RUN, step=45)), **HALTED),
        "Suspended",
        "Suspended",
        says="suspended at step 45",
    ),
    Row(
        "not what an earlier attempt had committed",
        world(
            SECOND_HALTING,
            ended(t(1), 45, message(45, "Stopped", run_id=RUN, attempt=1, step=20)).removed,
            pod(t(2), gone_by=ago(61), was_asked_to_go=True),
            **HALTED,
        ),
        "Suspended",
        "Suspended",
        says="suspended at step 30",
    ),
    Row(
        "an attempt that has just ended with a model is a success",
        world(TRAINING, t(), ended(t(), 0, TRAINED), **HALTED),
        "Succeeded",
        "Trained",
        passed="True",
    ),
    Row(
        "one that has just crashed is not tried again",
        world(TRAINING, t(), ended(t(), 1, at=60), **HALTED),
        "Suspended",
        "Suspending",
        "delete t1",
    ),
    Row(
        "what has succeeded stays so, though the profile would not allow it any more",
        world(SUCCEEDED, profiles={}, **{**HALTED, "pinned": {1: pinned()}}),
        "Succeeded",
        "Trained",
    ),
    Row(
        "also when it is edited once more meanwhile",
        world(
            said("Succeeded", "Trained", generation=2, passed="True", run_generation=1),
            profiles={},
            subject=subject({**SUSPENDED, "deadline": "2h"}, generation=3),
        ),
        "Succeeded",
        "Trained",
    ),
    Row(
        "what has succeeded stays so",
        world(SUCCEEDED, **HALTED),
        "Succeeded",
        "Trained",
        passed="True",
    ),
    Row("and what has failed", world(FAILED, **HALTED), "Failed", "ColumnMissing", passed="False"),
    Row(
        "unless another run is asked for",
        world(
            SUCCEEDED,
            subject=subject({**FASTER, "suspend": True}, generation=2),
            pinned={1: pinned(), 2: pinned({**FASTER, "suspend": True}, generation=2)},
        ),
        "Suspended",
        "Suspended",
    ),
    Row("what goes away is not suspended", world(TRAINING, subject=subject(SUSPENDED, deleting=True))),
    Row(
        "resumed, preflight asks storage what there is",
        world(IDLE, **RESUMED),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "also when the attempt before still ends",
        world(HALTING, GOING, **RESUMED),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "which the next attempt waits for",
        world(said("Queued", "PreflightPassed", generation=3, passed="True"), GOING, **RESUMED),
        "Queued",
        "StoppingPreviousRun",
        again=2.0,
    ),
    Row(
        "then the next attempt goes on",
        world(
            said("Queued", "PreflightPassed", generation=3, passed="True", usage=Usage(attempts=1)),
            p(generation=3),
            ended(p(), 0, outcome("Resume", 40)),
            **RESUMED,
        ),
        "Queued",
        "PodsPending",
        "begin t2",
    ),
    Row(
        "unless a twin has taken the run over meanwhile",
        world(
            said("Queued", "PreflightPassed", generation=3, passed="True"),
            rival(created=ago(1), holding=True),
            **RESUMED,
        ),
        "Pending",
        "IdenticalRunInProgress",
    ),
    Row(
        "resumed when it was told to end and had not yet been, it ends: it is paid for",
        world(HALTING.model_copy(update={"usage": Usage(attempts=1, counted=1)}), *RUNNING, progress(), **RESUMED),
        "Starting",
        "StoppingPreviousRun",
        "delete t1",
    ),
    Row(
        "resumed before anything was stopped, it goes on as if nothing had been asked",
        world(TRAINING, *RUNNING, progress(), **RESUMED),
        "Training",
        "Training",
    ),
]

RETRY = subject(retry="1")
RETRYING = [
    Row(
        "the annotation brings a failed job back",
        world(FAILED, p(), ended(p(), 42, message(42, "ColumnMissing")), subject=RETRY),
        "Preflight",
        "Checking",
        "begin p2, delete p1",
        passed="Unknown",
    ),
    Row(
        "and what was begun for it is not begun twice",
        world(FAILED, p(2, retry="1"), pod(p(2)), subject=RETRY),
        "Preflight",
        "Checking",
    ),
    Row("once is enough", world(FAILED.model_copy(update={"last_handled_retry": "1"}), subject=RETRY)),
    Row("a success is not trained again", world(SUCCEEDED, subject=RETRY)),
    Row(
        "while it runs the annotation is noted and does nothing",
        world(TRAINING, *RUNNING, subject=RETRY),
        "Training",
        "Training",
    ),
]

FAILED_BEFORE = said("Failed", "Crashed", passed="True")
RETRYING += [
    Row(
        "a change of the document brings a failed job back too, whatever its Jobs ended with",
        world(
            FAILED_BEFORE,
            t(4, counters=Counters(failures=3)),
            ended(t(4), 1),
            subject=subject(PATIENT, generation=2),
            pinned={1: pinned(), 2: pinned(PATIENT, generation=2)},
        ),
        "Preflight",
        "Checking",
        "begin p1, delete t4",
        passed="Unknown",
    ),
    Row(
        "a container that ends without a word again and again is given time",
        world(tired(3), t(4), ended(t(4), 0, at=5)),
        "Preflight",
        "MessageLost",
        again=15.0,
    ),
]

ROWS = [*ACCEPTING, *LOOKING, *BEGINNING, *TRAINING_ROWS, *FAILING, *CHANGING, *SUSPENDING, *RETRYING]


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_fact(row: Row) -> None:
    decision = settled(row.given)
    assert short(decision) == row.does
    if row.again is not None:
        assert decision.again_after == pytest.approx(row.again)
    if row.phase is None:
        assert decision.status is None
        return
    status = decision.status
    assert status is not None
    assert (status.phase, reason_of(status)) == (row.phase, row.reason), status.message
    assert row.says in (status.message or "")
    assert status.observed_generation == row.given.subject.generation
    if row.passed is not None:
        assert truth(status, "PreflightPassed") == row.passed
    assert truth(status, "Succeeded") == {"Succeeded": "True", "Failed": "False"}.get(row.phase, "Unknown")
    assert truth(status, "Stalled") == str(row.stalled or row.phase == "Failed")
    assert truth(status, "Suspended") == str(row.reason == "Suspended")
    over = row.phase in ("Succeeded", "Failed") or row.reason == "Suspended"
    assert truth(status, "Reconciling") == str(not row.stalled and not over)


def settled(given: Observed) -> Decision:
    """Where something is told before it is acted upon: what is done then."""
    first = decide(given, now=NOW)
    if (
        first.status is None
        or first.actions
        or first.again_after != 0.0
        or reason_of(first.status) == "PreflightPassed"
    ):
        return first
    second = decide(replace(given, subject=replace(given.subject, status=first.status)), now=NOW)
    return second if second.status is not None else replace(second, status=first.status)


def truth(status: FineTuneJobStatus, kind: str) -> str:
    found = condition(status, kind)
    assert found is not None
    return found.status


def test_a_silent_node_is_told_once_however_often_it_is_looked_at() -> None:
    """An operator that came after it fell silent has no news of the trainer, only the words of the status."""
    given = world(TRAINING, t(), pod(t(), unreachable=True))
    first = decide(given, now=NOW).status
    assert first is not None
    assert first.message == "node node0 does not answer, and may be lost"
    assert decide(replace(given, subject=replace(given.subject, status=first)), now=NOW).status is None


def test_every_fact_has_a_name_of_its_own() -> None:
    assert len({row.fact for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_a_decision_made_twice_does_nothing_twice(row: Row) -> None:
    """The operator may die after the actions and before the status: what it then begins has the same names."""
    once, twice = decide(row.given, now=NOW), decide(row.given, now=NOW)
    assert once == twice
    assert not _begun_again(once, _carried_out(row.given, once))


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_a_decision_that_was_carried_out_and_told_begins_nothing_twice(row: Row) -> None:
    """Each Job that is begun is begun once, also when the status was written."""
    decision = decide(row.given, now=NOW)
    done = _carried_out(row.given, decision)
    if decision.status is not None:
        done = replace(done, subject=replace(done.subject, status=decision.status))
    assert not _begun_again(decision, done)


def _begun_again(decision: Decision, done: Observed) -> list[Any]:
    before = {type(a) for a in decision.actions if isinstance(a, CreatePreflight | CreateTrain | CreateConfig)}
    return [action for action in decide(done, now=NOW).actions if type(action) in before]


def _carried_out(o: Observed, decision: Decision) -> Observed:
    """The world after the actions, as the API server would show it at once."""
    children, known = list(o.children), dict(o.pinned)
    for action in decision.actions:
        match action:
            case CreateConfig(config, key):
                known[config.generation] = Pinned(config.generation, config, key, o.subject.asked)
            case CreatePreflight(config, key, ordinal, counters, attempts, _):
                job = p(ordinal, uid=f"new-p{ordinal}", key=key, counters=counters, attempts=attempts, created=NOW)
                children.append(replace(job, retry=o.subject.retry or "", generation=config.generation))
            case CreateTrain(config, key, run_id, ordinal, counters, inputs):
                job = t(ordinal, uid=f"new-t{ordinal}", key=key, counters=counters, created=NOW, run=run_id)
                retry = o.subject.retry or ""
                children.append(replace(job, retry=retry, generation=config.generation, inputs=inputs))
            case DeleteJob(_, uid):
                children = [c for c in children if c.uid != uid]
    return replace(o, children=tuple(children), pinned=known)


# --- facts that a row is too short for ---


IDLE_AT_30 = said("Suspended", "Suspended", usage=Usage(attempts=1), checkpoint=CheckpointStatus(step=30))
BEGUN: dict[str, tuple[Observed, str | None]] = {
    "a new document": (world(), None),
    "a document that was suspended": (world(IDLE_AT_30, **RESUMED), RUN),
    "a live field was changed as well": (
        world(
            IDLE_AT_30,
            subject=subject(PATIENT, generation=2),
            pinned={1: pinned(), 2: pinned(PATIENT, generation=2)},
        ),
        RUN,
    ),
    "a gate was changed": (world(IDLE_AT_30, **GATED), RUN),
    "another run is asked for": (world(IDLE_AT_30, **CHANGED), None),
    "it is asked for again": (
        world(IDLE_AT_30, subject=subject(generation=3), pinned={1: pinned(), 2: pinned(FASTER, generation=2)}),
        RUN,
    ),
    "the search of the rows was changed": (
        world(
            IDLE_AT_30,
            subject=subject(SEARCHED, generation=2),
            pinned={1: pinned(), 2: pinned(SEARCHED, generation=2)},
        ),
        None,
    ),
    "the train Job was deleted": (world(TRAINING.model_copy(update={"usage": Usage(attempts=1, counted=1)})), RUN),
    "storage went away": (world(TRAINING, t(), ended(t(), 49, message(49, "Unreachable"), at=300)), RUN),
    "another attempt had it": (world(TRAINING, t(), ended(t(), 44, message(44, "Fenced"), at=900)), RUN),
    "its message is lost": (world(TRAINING, t(ended="Complete", ended_at=ago(300))), RUN),
    "it has failed and is tried again": (
        world(
            said("Failed", "Diverged", passed="True", usage=Usage(attempts=1, counted=1)),
            subject=subject(retry="now", status=said("Failed", "Diverged", passed="True")),
        ),
        RUN,
    ),
    "its configuration was deleted": (world(IDLE_AT_30, pinned={}), None),
    "what names it is no run": (world(said("Suspended", "Suspended", run="--config")), None),
}


@pytest.mark.parametrize("fact", BEGUN)
def test_a_preflight_of_the_same_document_is_told_of_the_run_that_was_begun(fact: str) -> None:
    """What an attempt has cost may have to be told first."""
    given, run = BEGUN[fact]
    decision = decide(given, now=NOW)
    for _ in range(4):
        begun = [action.run for action in decision.actions if isinstance(action, CreatePreflight)]
        if begun:
            break
        given = _carried_out(given, decision)
        if decision.status is not None:
            given = replace(given, subject=replace(given.subject, status=decision.status))
        decision = decide(given, now=NOW)
    assert begun == [run]


MINE, OTHERS = "ab" * 16, "cd" * 16
"""What preflights of two documents of one run have pinned."""


def reading(status: FineTuneJobStatus, inputs: str) -> FineTuneJobStatus:
    assert status.run is not None
    return status.model_copy(update={"run": status.run.model_copy(update={"inputs": inputs})})


def test_attempts_read_what_the_preflight_of_their_document_has_pinned() -> None:
    passed = outcome("Fresh")
    assert passed.preflight is not None
    found = passed.preflight.model_copy(update={"inputs": MINE})
    given = world(PREFLIGHT, p(), ended(p(), 0, passed.model_copy(update={"preflight": found})))
    told = _status(given)
    assert told.run is not None
    assert told.run.inputs == MINE
    first = settled(replace(given, subject=replace(given.subject, status=told)))
    assert [action.inputs for action in first.actions if isinstance(action, CreateTrain)] == [MINE]
    crashed = world(reading(TRAINING, OTHERS), t(inputs=MINE), ended(t(), 1, at=60))
    assert [action.inputs for action in settled(crashed).actions if isinstance(action, CreateTrain)] == [MINE]


def test_what_an_attempt_reads_stands_in_the_status_also_where_that_was_wiped_or_the_document_changed_back() -> None:
    for before in (FineTuneJobStatus(), reading(TRAINING, OTHERS)):
        run = _status(world(before, t(inputs=MINE), pod(t()), progress())).run
        assert run is not None
        assert (run.id, run.inputs) == (RUN, MINE)


def test_a_preflight_of_the_same_document_is_told_what_its_run_reads() -> None:
    for given, known in ((world(IDLE_AT_30, **RESUMED), (RUN, MINE)), (world(IDLE_AT_30, **CHANGED), (None, None))):
        told = replace(given.subject, status=reading(given.subject.status, MINE))
        (looked,) = [
            action for action in settled(replace(given, subject=told)).actions if isinstance(action, CreatePreflight)
        ]
        assert (looked.run, looked.inputs) == known


def test_an_attempt_of_the_document_before_does_not_answer_a_preflight_of_this_one() -> None:
    other, same = p(2, key=FASTER_KEY, attempts=1), p(2, attempts=1)
    assert world(TRAINING, other, t(2)).jobs("preflight") == [other]
    assert world(TRAINING, same, t(2)).jobs("preflight") == []
    assert world(TRAINING, same, t(1)).jobs("preflight") == [same]
    assert world(TRAINING, p(1, attempts=0)).jobs("preflight") == []  # the attempt itself is gone, and told


def test_a_container_that_starts_is_told_after_three_seconds() -> None:
    """Before, the status would only be written once more: where the image is there, it runs within a second or two."""
    placed = {"running": False, "waiting": ("ContainerCreating", "")}
    young = decide(world(GO, t(), pod(t(), placed=ago(2.5), **placed)), now=NOW)
    assert (young.status, young.again_after, young.actions) == (None, 3.0, ())
    for moment in (ago(3), None):  # None: nobody says when
        decision = decide(world(GO, t(), pod(t(), placed=moment, **placed)), now=NOW)
        assert decision.status is not None
        assert (decision.status.phase, reason_of(decision.status)) == ("Starting", "PodsStarting")


def _status(given: Observed) -> FineTuneJobStatus:
    decided = decide(given, now=NOW).status
    assert decided is not None
    return decided


def test_a_success_tells_model_evaluation_and_gpu_time() -> None:
    status = _status(world(TRAINING, t(created=ago(500)), ended(t(), 0, TRAINED, at=30, started=ago(90))))
    assert status.model == RESULT.model
    assert status.evaluation == RESULT.evaluation
    assert status.progress is not None
    assert status.progress.percent == 100
    assert status.usage == Usage(gpu_seconds=60, running_seconds=60, counted=1, attempts=1)
    assert status.run is not None
    assert status.run.attempt == 7


def test_a_restart_tells_what_it_cost_once() -> None:
    given = world(TRAINING, t(created=ago(60)), ended(t(), 1, at=2))
    status = _status(given)
    restart = Restart(attempt=1, reason="Crashed", at=format_time(ago(2)), resumed_from_step=30, lost_steps=10)
    assert status.restarts == [restart]
    assert status.usage == Usage(gpu_seconds=58, running_seconds=58, counted=1, attempts=1, lost_steps=10)
    later = decide(replace(given, subject=replace(given.subject, status=status)), now=NOW + timedelta(seconds=1))
    assert later.status is None or later.status.restarts == [restart]


def test_where_a_run_really_went_on_corrects_what_the_restart_cost() -> None:
    before = TRAINING.model_copy(
        update={"restarts": [Restart(attempt=1, reason="Killed", at="x", resumed_from_step=30, lost_steps=10)]}
    )
    status = _status(world(before, t(2), pod(t(2)), progress("Training", 21, resumed_from_step=20)))
    assert status.restarts is not None
    assert (status.restarts[0].resumed_from_step, status.restarts[0].lost_steps) == (20, 20)


def test_an_attempt_whose_job_vanished_is_told_at_once_and_once() -> None:
    status = _status(world(TRAINING))
    told = Restart(attempt=1, reason="JobLost", at=format_time(NOW), resumed_from_step=30, lost_steps=10)
    assert status.restarts == [told]
    assert status.usage == Usage(attempts=1, lost_steps=10)
    looking = _status(world(status, p(), ended(p(), 0, outcome("Resume", 35))))
    right = told.model_copy(update={"resumed_from_step": 35, "lost_steps": 5})
    assert (looking.restarts, looking.usage) == ([right], Usage(attempts=1, lost_steps=5))
    assert looking.checkpoint == CheckpointStatus(step=35)
    begun = _status(world(looking))
    assert (begun.restarts, begun.usage) == ([right], Usage(attempts=2, lost_steps=5))


@pytest.mark.parametrize("seen", [(pod(t()), progress()), (ended(t(), 0, TRAINED),), (ended(t(), 45),)])
def test_what_preflight_had_found_is_told_again_after_the_status_was_wiped(seen: tuple[Any, ...]) -> None:
    figures = PreflightStatus(labels=2, truncated_percent=0.3)
    job = t(figures=figures.model_dump_json(by_alias=True, exclude_none=True))
    assert _status(world(FineTuneJobStatus(), job, *seen)).preflight == figures
    kept = PreflightStatus(labels=3)
    status = _status(world(TRAINING.model_copy(update={"preflight": kept, "phase": "Starting"}), job, *seen))
    assert status.preflight == kept


def test_of_a_second_attempt_that_vanished_it_is_told_at_once_when_storage_is_asked() -> None:
    """While it waits for that, nothing else is news."""
    status = _status(world(tired(1).model_copy(update={"usage": Usage(attempts=2)})))
    assert status.message == "the train Job is gone; next try at 2026-03-01T12:00:05Z"
    assert decide(world(status), now=NOW).status is None


def test_an_attempt_that_vanished_before_it_said_anything_is_counted() -> None:
    status = _status(world(said("Queued", "PodsPending", passed="True", usage=Usage(attempts=1))))
    assert [(r.attempt, r.reason, r.lost_steps) for r in status.restarts or []] == [(1, "JobLost", 0)]


def test_what_a_preflight_job_has_counted_is_not_lost_with_it() -> None:
    """Or one that crashes, and is deleted each time, would never have crashed too often."""
    last = p(counters=Counters(failures=2))
    crashed = _status(world(PREFLIGHT, last, ended(last, 1)))
    assert crashed.preflight_job == PreflightJobStatus(generation=1, failures=3, next_at=format_time(ago(-20)))
    later = NOW + timedelta(seconds=20)
    decision = decide(world(crashed), now=later)
    assert [a.counters for a in decision.actions if isinstance(a, CreatePreflight)] == [Counters(failures=3)]


def test_what_a_train_job_has_counted_is_not_lost_with_it() -> None:
    """ttlAfterFinished may take it within its rest: what is told of the next attempt holds all the same."""
    job = t(counters=Counters(failures=2), ended="Failed", ended_at=NOW)
    crashed = _status(world(TRAINING, job, ended(job, 1)))
    assert crashed.run is not None
    assert (crashed.run.failures, crashed.run.next_at) == (3, format_time(ago(-20)))
    assert crashed.message is not None
    assert crashed.message.endswith("going on from step 30 at 2026-03-01T12:00:20Z")
    resting = decide(world(crashed), now=NOW)
    assert (resting.status, resting.actions, resting.again_after) == (None, (), 20.0)
    looked = decide(world(crashed), now=NOW + timedelta(seconds=20))
    (begun,) = looked.actions
    assert isinstance(begun, CreatePreflight)
    assert begun.counters == Counters(failures=3)
    assert looked.status is not None
    assert looked.status.run is not None
    assert looked.status.run.next_at is None
    passed = _status(world(looked.status, p(counters=begun.counters), ended(p(), 0, outcome("Resume", 30))))
    for there in ((), (p(counters=begun.counters), ended(p(), 0, outcome("Resume", 30)))):
        (train,) = decide(world(passed, *there), now=NOW).actions
        assert isinstance(train, CreateTrain)
        assert train.counters == Counters(failures=3), "whether somebody has deleted the preflight Job, too"


def test_crashes_stay_counted_when_the_next_attempt_vanishes_while_it_runs() -> None:
    second = t(2, counters=Counters(failures=1))
    running = _status(world(TRAINING, second, pod(second), progress(step=50)))
    assert running.run is not None
    assert running.run.failures == 1
    gone = _status(world(running))
    (begun,) = decide(world(gone), now=NOW).actions
    assert isinstance(begun, CreatePreflight)
    assert begun.counters == Counters(failures=1)


def test_half_a_micro_batch_is_not_lost_with_the_job_that_ran_out_of_memory() -> None:
    crashed = _status(world(TRAINING, t(), ended(t(), 137, word="OOMKilled")))
    assert crashed.run is not None
    assert crashed.run.halve is True
    (begun,) = decide(world(crashed), now=NOW).actions
    assert isinstance(begun, CreatePreflight)
    assert begun.counters == Counters(halve=True)
    again = p(counters=begun.counters)
    crashed = _status(world(_status(world(crashed, again, pod(again))), again, ended(again, 1)))
    (begun,) = decide(world(crashed), now=NOW + timedelta(seconds=5)).actions
    assert isinstance(begun, CreatePreflight)
    assert begun.counters == Counters(failures=1, halve=True), "whatever befalls the preflight and its Job meanwhile"
    passed = _status(world(crashed, p(counters=begun.counters), ended(p(), 0, outcome("Resume", 30))))
    (train,) = decide(world(passed), now=NOW).actions
    assert isinstance(train, CreateTrain)
    assert train.counters.halve
    status = _status(world(passed, t(2, counters=train.counters), pod(t(2))))
    assert status.run is not None
    assert status.run.halve is None, "once it has begun it is done"


def test_storage_that_is_missing_is_asked_as_seldom_when_the_job_that_missed_it_is_gone() -> None:
    job = t(counters=Counters(failures=1, tries=3))
    waits = _status(world(TRAINING, job, ended(job, 49, message(49, "BucketNotFound"))))
    assert waits.preflight_job == PreflightJobStatus(generation=1, next_at=format_time(ago(-80)), failures=1, tries=4)
    resting = decide(world(waits), now=NOW)
    assert (resting.status, resting.actions, resting.again_after) == (None, (), 80.0)


def test_another_document_begins_with_a_clean_sheet() -> None:
    job = t(counters=Counters(failures=2))
    crashed = _status(world(TRAINING, job, ended(job, 1)))
    (_, begun) = decide(world(crashed, subject=subject(FASTER, generation=2)), now=NOW).actions
    assert isinstance(begun, CreatePreflight)
    assert begun.counters == Counters()
    halted = _status(world(crashed, **HALTED))
    assert halted.run is not None
    assert (halted.run.failures, halted.run.next_at) == (3, None), "suspended it waits for nothing"
    failed = _status(world(FAILED.model_copy(update={"run": crashed.run}), subject=RETRY))
    assert failed.run is not None
    assert failed.run.failures is None, "whoever asks for another try gets all of them"


def test_a_preflight_job_that_is_not_there_any_more_is_not_waited_for_once_it_has_said_what_it_found() -> None:
    there = p(), pod(p())
    running = _status(world(None, *there))
    assert running.preflight_job == PreflightJobStatus(generation=1)
    passed = _status(world(running, p(), ended(p(), 0, outcome("Fresh"))))
    assert passed.preflight_job is None
    refused_ = _status(world(running, p(), ended(p(), 42, message(42, "ColumnMissing"))))
    assert refused_.preflight_job is None
    suspended = _status(world(running, *there, **HALTED))
    assert suspended.preflight_job is None


def test_numbers_of_attempts_are_told_when_they_begin() -> None:
    """Or one that vanishes at once is forgotten, and its number used again."""
    status = settled(world(TRAINING, t(), ended(t(), 45))).status
    assert status is not None
    assert status.usage is not None
    assert status.usage.attempts == 2


def test_what_an_attempt_cost_is_told_before_its_job_goes() -> None:
    """Or an operator that dies in between forgets it."""
    given = world(TRAINING, t(), ended(t(), 45))
    first = decide(given, now=NOW)
    assert (short(first), first.again_after) == ("", 0.0)
    assert first.status is not None
    assert [restart.attempt for restart in first.status.restarts or []] == [1]
    second = decide(replace(given, subject=replace(given.subject, status=first.status)), now=NOW)
    assert short(second) == "begin t2, delete t1"


def test_steps_between_two_readings_are_counted_where_the_pod_could_still_say_so() -> None:
    last = message(1, "Crashed", step=45, reached_step=60, resumed_from_step=0)
    status = _status(world(TRAINING, t(), ended(t(), 1, last, at=2)))
    assert status.restarts is not None
    assert (status.restarts[0].resumed_from_step, status.restarts[0].lost_steps) == (45, 15)
    assert status.usage is not None
    assert status.usage.lost_steps == 15
    assert status.checkpoint == CheckpointStatus(step=45)
    assert status.progress is not None
    assert (status.progress.step, status.progress.percent) == (45, 45)


def test_steps_are_not_lost_twice_when_the_next_attempt_ends_before_it_says_anything() -> None:
    first = _status(world(TRAINING, t(), ended(t(), 1, at=60)))
    second = _status(world(first, t(2), ended(t(2), 1)))
    assert [restart.lost_steps for restart in second.restarts or []] == [10, 0]
    assert second.usage is not None
    assert (second.usage.attempts, second.usage.lost_steps) == (2, 10)


def test_a_correction_reaches_the_total_and_only_the_restart_before() -> None:
    cost = Restart(attempt=1, reason="Killed", at="x", resumed_from_step=30, lost_steps=10)
    before = TRAINING.model_copy(update={"restarts": [cost], "usage": Usage(attempts=2, lost_steps=10)})
    status = _status(world(before, t(2), pod(t(2)), progress(step=21, resumed_from_step=20)))
    assert status.usage == Usage(attempts=2, lost_steps=20)
    assert status.checkpoint == CheckpointStatus(step=20)
    later = _status(world(before, t(3), pod(t(3)), progress(step=61, resumed_from_step=60)))
    assert (later.restarts, later.usage) == ([cost], Usage(attempts=3, lost_steps=10))


def test_an_attempt_that_is_heard_only_when_it_is_done_corrects_the_restart_before() -> None:
    cost = Restart(attempt=1, reason="Killed", at="x", resumed_from_step=30, lost_steps=10)
    counted = tired(1).model_copy(update={"restarts": [cost], "usage": Usage(attempts=2, lost_steps=10)})
    for code, last in ((0, TRAINED), (48, UNMET)):
        won = ended(t(2), code, last.model_copy(update={"resumed_from_step": 35}))
        status = _status(world(counted, t(2), won))
        assert [(r.resumed_from_step, r.lost_steps) for r in status.restarts or []] == [(35, 5)]
        assert status.usage is not None
        assert (status.usage.attempts, status.usage.lost_steps) == (2, 5)
        assert status.run is not None
        assert status.run.interruptions is None
        again = ended(t(2), code, last.model_copy(update={"resumed_from_step": 20}))
        status = _status(world(counted, t(2), again))
        assert [(r.resumed_from_step, r.lost_steps) for r in status.restarts or []] == [(20, 20)]
        assert status.run is not None
        assert status.run.interruptions == 1


def test_an_attempt_that_is_heard_only_when_it_fails_corrects_the_restart_before_and_loses_its_own_steps() -> None:
    cost = Restart(attempt=1, reason="Killed", at="x", resumed_from_step=30, lost_steps=10)
    rewound = ProgressStatus(step=30, total_steps=100, percent=30)
    before = tired(1).model_copy(
        update={"restarts": [cost], "usage": Usage(attempts=2, lost_steps=10), "progress": rewound}
    )
    for resumed, costs in ((20, [(20, 20), (20, 5)]), (35, [(35, 5), (35, 5)])):
        last = message(1, "Crashed", run_id=RUN, reached_step=resumed + 5, resumed_from_step=resumed)
        status = _status(world(before, t(2), ended(t(2), 1, last)))
        assert [(r.resumed_from_step, r.lost_steps) for r in status.restarts or []] == costs
        assert status.usage is not None
        assert status.usage.lost_steps == sum(lost for _, lost in costs)
        assert status.checkpoint == CheckpointStatus(step=resumed)
        assert f"going on from step {resumed}" in str(status.message)


def test_an_attempt_that_trains_without_saying_from_where_began_with_nothing() -> None:
    cost = Restart(attempt=1, reason="Killed", at="x", resumed_from_step=30, lost_steps=10)
    before = TRAINING.model_copy(update={"restarts": [cost], "usage": Usage(attempts=2, lost_steps=10)})
    loading = _status(world(before, t(2), pod(t(2)), progress("Loading", step=0)))
    assert loading.restarts == [cost]
    status = _status(world(before, t(2), pod(t(2)), progress(step=1)))
    assert status.usage == Usage(attempts=2, lost_steps=40)
    assert status.checkpoint is None


def test_a_run_that_was_done_though_nobody_could_say_so_has_no_restart() -> None:
    before = TRAINING.model_copy(update={"usage": Usage(attempts=1)})
    given = world(before, t(created=ago(61)), ended(t(), 0, at=1))
    looking = _status(given)
    assert [restart.reason for restart in looking.restarts or []] == ["MessageLost"]
    assert looking.usage == Usage(gpu_seconds=60, running_seconds=60, counted=1, attempts=1, lost_steps=10)
    status = _status(world(looking, p(), ended(p(), 0, outcome("Reused"))))
    assert (status.phase, status.restarts) == ("Succeeded", None)
    assert status.usage == Usage(gpu_seconds=60, running_seconds=60, counted=1, attempts=1, lost_steps=0)


def test_a_run_that_was_done_when_its_job_was_lost_has_no_restart() -> None:
    """What an attempt before it cost stays."""
    before = TRAINING.model_copy(update={"restarts": restarts(1), "usage": Usage(attempts=2)})
    looking = _status(world(before))
    assert [restart.reason for restart in looking.restarts or []] == ["PodDeleted", "JobLost"]
    status = _status(world(looking, p(), ended(p(), 0, outcome("Reused"))))
    assert (status.phase, status.restarts) == ("Succeeded", restarts(1))
    assert status.usage == Usage(attempts=2, lost_steps=0)


def test_a_restart_whose_job_was_lost_stays_when_another_attempt_followed_it() -> None:
    cost = Restart(attempt=1, reason="JobLost", at="x", resumed_from_step=30, lost_steps=10)
    usage = Usage(attempts=2, lost_steps=10)
    looking = said("Preflight", "Checking", restarts=[cost], usage=usage)
    status = _status(world(looking, p(), ended(p(), 0, outcome("Reused"))))
    assert (status.phase, status.restarts, status.usage) == ("Succeeded", [cost], usage)


def test_an_attempt_that_a_changed_document_stops_is_paid_for() -> None:
    status = _status(world(PASSED2, t(created=ago(50)), pod(t(), started=ago(40)), **CHANGED))
    assert status.usage == Usage(gpu_seconds=40, running_seconds=40, counted=1, attempts=1)
    assert status.restarts is None


def test_new_resources_restart_the_run_and_say_so() -> None:
    more = {"subject": subject(TWO_NODES, generation=2), "pinned": {1: pinned(), 2: pinned(TWO_NODES, generation=2)}}
    passed = said(
        "Queued",
        "PreflightPassed",
        generation=2,
        passed="True",
        checkpoint=CheckpointStatus(step=30),
        progress=ProgressStatus(step=40, total_steps=100, percent=40),
    )
    status = _status(world(passed, t(created=ago(50)), pod(t(), started=ago(40)), **more))
    assert [(r.reason, r.resumed_from_step, r.lost_steps) for r in status.restarts or []] == [
        ("DocumentChanged", 40, 0)
    ]
    assert status.usage == Usage(gpu_seconds=40, running_seconds=40, counted=1, attempts=1, lost_steps=0)
    assert status.checkpoint == CheckpointStatus(step=30), "that of step 40 is only expected"


def test_a_suspended_attempt_is_paid_for_and_counts_as_no_failure() -> None:
    given = world(TRAINING, t(created=ago(50)), pod(t(), started=ago(40)), **HALTED)
    first = decide(given, now=NOW)
    assert (short(first), first.again_after) == ("", 0.0), "told before the Job goes"
    assert first.status is not None
    assert first.status.usage == Usage(gpu_seconds=40, running_seconds=40, counted=1, attempts=1, lost_steps=0)
    assert [(r.attempt, r.reason, r.resumed_from_step) for r in first.status.restarts or []] == [(1, "Suspended", 40)]
    assert first.status.run is not None
    assert first.status.run.interruptions is None
    second = decide(replace(given, subject=replace(given.subject, status=first.status)), now=NOW)
    assert short(second) == "delete t1"
    assert second.status is None, "paid once"


def test_an_attempt_that_was_done_when_it_was_told_to_end_has_no_restart() -> None:
    status = _status(world(HALTING, t(), ended(t(), 0, TRAINED), **HALTED))
    assert (status.phase, status.restarts) == ("Succeeded", None)


def test_once_suspended_nothing_happens() -> None:
    assert decide(world(_status(world(IDLE, **HALTED)), **HALTED), now=NOW) == Decision()


def test_what_the_pods_say_when_they_end_corrects_what_was_expected() -> None:
    status = _status(world(HALTING, ended(t(), 45, message(45, "Stopped", run_id=RUN, step=45)), **HALTED))
    assert status.checkpoint == CheckpointStatus(step=45)
    assert [(r.resumed_from_step, r.lost_steps) for r in status.restarts or []] == [(45, 0)]
    other = ended(t(), 45, message(45, "Stopped", run_id=OTHER_RUN, step=99))
    assert _status(world(HALTING, other, **HALTED)).checkpoint is None, "that was another run"


def test_what_was_killed_before_it_committed_has_lost_its_steps() -> None:
    given = world(HALTED_AT_40, ended(t(), 137), **HALTED)
    status = _status(given)
    assert [(r.resumed_from_step, r.lost_steps) for r in status.restarts or []] == [(30, 10)]
    assert (status.usage or Usage()).lost_steps == 10
    assert status.checkpoint == CheckpointStatus(step=30)
    assert decide(replace(given, subject=replace(given.subject, status=status)), now=NOW) == Decision(), "told once"
    later = decide(world(status, **HALTED), now=NOW)
    assert later == Decision(), "also once its pods are forgotten"


def test_a_document_that_cannot_be_resolved_says_so_while_it_is_suspended() -> None:
    status = _status(world(subject=subject({**SUSPENDED, "profile": "gpu"}), pinned={}))
    found = condition(status, "Accepted")
    assert found is not None
    assert (found.status, found.reason) == ("False", "ProfileNotFound")


def test_a_failed_job_that_is_suspended_with_another_document_begins_anew_when_it_is_resumed() -> None:
    worn = tired(10).model_copy(update={"phase": "Failed"})
    halted = {**FASTER, "suspend": True}
    status = _status(world(worn, subject=subject(halted, generation=2), pinned={1: pinned()}))
    assert (status.phase, status.restarts) == ("Suspended", None)
    assert status.run is not None
    assert status.run.interruptions is None


def test_a_step_that_was_won_unseen_was_won_all_the_same() -> None:
    before = tired(9).model_copy(update={"usage": Usage(attempts=9)})
    trains = _status(world(before, t(10), pod(t(10)), progress(step=36, resumed_from_step=35)))
    looked = _status(world(before, p(), ended(p(), 0, outcome("Resume", 35))))
    for status in (trains, looked):
        assert status.run is not None
        assert status.run.interruptions is None
    same = _status(world(before, t(10), pod(t(10)), progress(step=36, resumed_from_step=30)))
    assert same.run is not None
    assert same.run.interruptions == 9


def test_a_step_that_was_won_starts_the_count_of_interruptions_anew() -> None:
    won = tired(9).model_copy(update={"checkpoint": CheckpointStatus(step=31)})
    status = _status(world(won, t(10), ended(t(10), 45)))
    assert status.run is not None
    assert status.run.interruptions is None
    again = _status(world(status, t(11), ended(t(11), 45)))
    assert again.run is not None
    assert again.run.interruptions == 1


def test_the_pods_of_a_job_that_was_deleted_by_hand_may_commit_before_the_next_attempt_claims_the_run() -> None:
    going = pod(t(), gone_by=NOW + timedelta(seconds=100), was_asked_to_go=True)
    assert short(decide(world(GO, going), now=NOW)) == ""
    assert short(decide(world(GO, replace(going, gone_by=ago(61))), now=NOW)) == "begin t1"


def test_progress_is_copied_with_its_checkpoint() -> None:
    committed = Checkpointed(step=30, uri="s3://c", committed_at="c")
    status = _status(world(GO, *RUNNING, progress(loss=0.25, learning_rate=1e-5, checkpoint=committed)))
    assert status.progress == ProgressStatus(
        step=40, total_steps=100, percent=40, loss=0.25, learning_rate=1e-5, updated_at="u"
    )
    assert status.checkpoint == CheckpointStatus(step=30, uri="s3://c", committed_at="c")
    assert status.run == RunStatus(id=RUN, generation=1, attempt=7, started_at="t")


A_YEAR = 365 * 86400


@pytest.mark.parametrize(
    ("given", "job", "delay"),
    [
        (world(PREFLIGHT, p(), ended(p(), 49, message(49, "BucketNotFound"), at=A_YEAR)), p(), 10.0),
        (world(GO, t(), ended(t(), 1, at=A_YEAR)), t(), 5.0),
    ],
)
def test_a_clock_that_is_ahead_voids_no_delay(given: Observed, job: Child, delay: float) -> None:
    """Ends are told by other clocks than ours: by ours, these were a year ago."""
    early = decide(replace(given, known_for={job.uid: timedelta(seconds=2)}), now=NOW)
    assert early.again_after == delay - 2
    assert early.actions == ()
    late = replace(given, known_for={job.uid: timedelta(seconds=11)})
    told = decide(late, now=NOW)  # what it cost is told before its Job goes
    for _ in range(2):
        if told.status is not None and not told.actions:
            told = decide(replace(late, subject=replace(late.subject, status=told.status)), now=NOW)
    assert any(isinstance(action, CreatePreflight | CreateTrain) for action in told.actions)


def test_an_attempt_that_somebody_wants_no_pod_of_trains_no_more() -> None:
    """kubectl patch job ... parallelism: 0"""
    asked = pod(t(nodes=0), gone_by=NOW + timedelta(seconds=60), was_asked_to_go=True)
    assert _status(world(TRAINING, t(nodes=0), asked)).message == "a pod is taken away; " + (
        "a checkpoint is committed before the next attempt begins"
    )
    status = _status(world(TRAINING, t(nodes=0)))
    assert (status.phase, reason_of(status), truth(status, "Stalled")) == ("Queued", "FewerPodsWanted", "True")
    back = _status(world(status, t(), pod(t()), progress(step=41)))
    assert (back.phase, truth(back, "Stalled")) == ("Training", "False")


UNSEEN = pod(t(), name="one-11111-t1-0-abcde")
"""Its Job has lost the label by which it is found."""


def test_what_trains_for_a_job_that_is_not_seen_is_named_and_not_said_to_end() -> None:
    decision = decide(world(GO, UNSEEN), now=NOW)
    assert decision.status is not None
    assert decision.actions == ()
    assert (decision.status.phase, reason_of(decision.status)) == ("Queued", "StoppingPreviousRun")
    where = "put its label app.kubernetes.io/managed-by=finetune-operator back, or delete it"
    words = f"pod one-11111-t1-0-abcde of this run goes on, and its Job one-11111-t1 is not found: {where}"
    assert decision.status.message == words


@pytest.mark.parametrize(
    "given",
    [
        world(PASSED2, UNSEEN, **CHANGED),
        world(TRAINING, UNSEEN, subject=subject(SUSPENDED, generation=2)),
    ],
    ids=["changed", "suspended"],
)
def test_what_trains_for_a_job_that_is_not_seen_ends_where_nothing_of_it_is_wanted(given: Observed) -> None:
    decision = decide(given, now=NOW)
    assert DeleteJob("one-11111-t1", "train-1") in decision.actions
    assert decision.status is not None
    assert "commits a checkpoint and ends" in (decision.status.message or "")


AN_HOUR = 3600


@pytest.mark.parametrize(
    ("given", "job", "delay"),
    [
        (world(PREFLIGHT, p(), ended(p(), 49, message(49, "BucketNotFound"), at=-AN_HOUR)), p(), 10.0),
        (world(GO, t(), ended(t(), 1, at=-AN_HOUR)), t(), 5.0),
        (world(GO, t(), ended(t(), 45, at=-AN_HOUR, disrupted="EvictionByEvictionAPI")), t(), 0.0),
    ],
    ids=["a wait", "a crash", "an eviction"],
)
def test_a_nodes_clock_that_is_ahead_lengthens_no_delay(given: Observed, job: Child, delay: float) -> None:
    """Ends are told by other clocks than ours: by ours, these will be in an hour."""
    for known in (1.0, 4.0, 30.0):
        told = _once_told(replace(given, known_for={job.uid: timedelta(seconds=known)}))
        begins = any(isinstance(action, CreatePreflight | CreateTrain) for action in told.actions)
        assert begins is (known >= delay)
        assert begins or told.again_after == delay - known


def _once_told(o: Observed) -> Decision:
    """What it cost is told before its Job goes."""
    decision = decide(o, now=NOW)
    while decision.status is not None and decision.again_after == 0.0 and not decision.actions:
        o = replace(o, subject=replace(o.subject, status=decision.status))
        decision = decide(o, now=NOW)
    return decision


def test_mere_progress_is_written_seldom() -> None:
    told = _status(world(GO, *RUNNING, progress(step=40)))
    moved = replace(world(told, *RUNNING, progress(step=41)), last_write=ago(5))
    assert decide(moved, now=NOW).status is None
    assert decide(replace(moved, last_write=ago(11)), now=NOW).status is not None
    same_percent = replace(world(told, *RUNNING, progress(step=40, loss=0.1)), last_write=ago(30))
    assert decide(same_percent, now=NOW).status is None
    assert decide(replace(same_percent, last_write=ago(61)), now=NOW).status is not None
    evaluating = replace(world(told, *RUNNING, progress("Evaluating", 41)), last_write=ago(1))
    assert decide(evaluating, now=NOW).status is not None


def test_trainers_are_asked_less_often_where_many_train() -> None:
    one = world(GO, *RUNNING, progress(step=40))
    assert decide(one, now=NOW).again_after == 5.0
    assert decide(replace(one, trainings=40), now=NOW).again_after == 5.0
    assert decide(replace(one, trainings=500), now=NOW).again_after == 62.5
    loading = world(GO, *RUNNING, progress("Loading", 0))
    assert decide(replace(loading, trainings=500), now=NOW).again_after == 25.0


def test_attempts_that_wait_for_a_node_are_looked_at_less_often_where_there_are_many_and_slow_no_trainer_down() -> None:
    waits = world(GO, t(), pod(t(), node=None, running=False, unschedulable="Insufficient nvidia.com/gpu"))
    assert decide(waits, now=NOW).again_after == 5.0
    assert decide(replace(waits, underway=1000, trainings=10), now=NOW).again_after == 50.0
    trains = replace(world(GO, *RUNNING, progress(step=40)), underway=1000, trainings=10)
    assert decide(trains, now=NOW).again_after == 5.0
    told = decide(trains, now=NOW).status
    later = replace(world(told, *RUNNING, progress(step=41)), underway=1000, trainings=10, last_write=ago(11))
    assert decide(later, now=NOW).status is not None


def test_mere_progress_waits_while_others_tell_theirs() -> None:
    told = _status(world(GO, *RUNNING, progress(step=40)))
    crowded = replace(world(told, *RUNNING, progress(step=80)), last_write=ago(61), room=False)
    decision = decide(crowded, now=NOW)
    assert (decision.status, decision.events, decision.routine) == (None, (), True)
    assert decide(replace(crowded, room=True), now=NOW).routine
    news = decide(replace(world(told, *RUNNING, progress("Evaluating", 80)), room=False), now=NOW)
    assert news.status is not None
    assert not news.routine


def test_another_run_keeps_the_model_and_forgets_the_progress() -> None:
    before = said(
        "Training",
        "Training",
        passed="True",
        model=RESULT.model,
        progress=ProgressStatus(step=40, total_steps=100, percent=40),
        restarts=restarts(2),
    )
    found = ended(p(key=FASTER_KEY), 0, outcome("Fresh", run=OTHER_RUN))
    status = _status(world(before, *RUNNING, p(generation=2, key=FASTER_KEY), found, **CHANGED))
    assert status.model == RESULT.model
    assert (status.progress, status.restarts) == (None, None)
    assert status.run == RunStatus(id=OTHER_RUN, generation=2)


def test_a_refused_generation_still_gets_the_model_of_the_old_run() -> None:
    status = _status(world(REFUSED2, t(), ended(t(), 0, TRAINED), **CHANGED))
    assert status.model == RESULT.model


def test_what_is_said_of_a_refused_generation_is_not_said_again_with_each_look_at_a_trainer_that_is_silent() -> None:
    told = _status(world(REFUSED2, *RUNNING, progress(), **CHANGED))
    assert told.message == "step 40 of 100; generation 2 was refused: as it was"
    later = NOW + timedelta(seconds=100)
    assert decide(world(told, *RUNNING, **CHANGED), now=later).status is None
    again = decide(world(told, *RUNNING), now=later).status  # the document was changed back
    assert again is not None
    assert again.message == "step 40 of 100"


def test_of_an_old_run_that_failed_a_refused_generation_says_nothing() -> None:
    status = _status(world(REFUSED2, t(), ended(t(), 47, message(47, "Diverged")), **CHANGED))
    assert (status.phase, status.message, status.model) == ("Failed", "as it was", None)


def test_counters_are_carried_from_job_to_job() -> None:
    decision = settled(world(TRAINING, t(counters=Counters(failures=1)), ended(t(), 1, at=60)))
    created = next(a for a in decision.actions if isinstance(a, CreateTrain))
    assert created.counters == Counters(failures=2)
    decision = settled(world(TRAINING, t(counters=Counters(failures=1, tries=1)), ended(t(), 44, at=300)))
    looked = next(a for a in decision.actions if isinstance(a, CreatePreflight))
    assert looked.counters == Counters(failures=1, tries=2)
    decision = decide(world(GO, p(counters=Counters(failures=1, tries=2)), ended(p(), 0, outcome("Fresh"))), now=NOW)
    begun = next(a for a in decision.actions if isinstance(a, CreateTrain))
    assert begun.counters == Counters(failures=1, tries=2)


def test_a_handled_retry_is_remembered() -> None:
    assert _status(world(FAILED, subject=RETRY)).last_handled_retry == "1"


def test_events_tell_each_new_reason_once() -> None:
    decision = decide(world(PREFLIGHT, p(), ended(p(), 42, message(42, "ColumnMissing"))), now=NOW)
    assert [(e.kind, e.reason, e.message) for e in decision.events] == [
        ("Warning", "ColumnMissing", "ColumnMissing it is")
    ]
    told = decide(world(GO, *RUNNING, progress(step=40)), now=NOW)
    assert told.status is not None
    again = replace(world(told.status, *RUNNING, progress(step=60)), last_write=ago(100))
    assert decide(again, now=NOW).events == ()


def test_a_refused_train_job_is_asked_for_again_later_and_told_once() -> None:
    """A quota on Jobs, say. The phase must not claim that something runs, or the next look takes it for lost."""
    passed = said("Queued", "PreflightPassed", passed="True")
    o = world(passed)
    first = decide(o, now=NOW)
    assert short(first) == "begin t1"
    told = refused(o, reason="CreateForbidden", message="exceeded quota", now=NOW)
    assert told.status is not None
    assert (told.status.phase, told.again_after) == ("Pending", 60.0)
    words = "the API server refuses what the job needs: exceeded quota; tried again every 60 s"
    assert told.status.message == words
    assert truth(told.status, "Stalled") == "True"
    again = replace(o, subject=replace(o.subject, status=told.status))
    assert short(decide(again, now=NOW)) == "begin t1"
    assert refused(again, reason="CreateForbidden", message="exceeded quota", now=NOW) == Decision(again_after=60.0)


def _while_configs_are_refused(o: Observed) -> tuple[Observed, list[str]]:
    """The world after some looks, and what was carried out meanwhile."""
    done: list[str] = []
    for _ in range(6):
        decision = decide(o, now=NOW)
        actions = list(decision.actions)
        at = next((i for i, action in enumerate(actions) if isinstance(action, CreateConfig)), len(actions))
        taken = Decision(actions=tuple(actions[:at]))
        if at < len(actions):
            decision = refused(o, reason="CreateForbidden", message="exceeded quota", now=NOW)
        done += [short(taken)] if taken.actions else []
        after = _carried_out(o, taken)
        there = {c.uid for c in after.children}
        o = replace(after, pods=tuple(pod for pod in o.pods if pod.owner in there))
        if decision.status is not None:
            o = replace(o, subject=replace(o.subject, status=decision.status))
    return o, done


@pytest.mark.parametrize("parts", [RUNNING, (p(), pod(p()))], ids=["training", "preflight"])
def test_what_is_suspended_ends_though_its_configuration_cannot_be_pinned(parts: tuple[Any, ...]) -> None:
    before = TRAINING if parts is RUNNING else PREFLIGHT
    o, done = _while_configs_are_refused(world(before, *parts, subject=subject(SUSPENDED, generation=2)))
    assert done == ["delete t1" if parts is RUNNING else "delete p1"]
    status = o.subject.status
    assert (status.phase, reason_of(status), truth(status, "Suspended")) == ("Suspended", "Suspended", "True")
    accepted = condition(status, "Accepted")
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("Unknown", "CreateForbidden")
    assert short(decide(o, now=NOW)) == "pin g2", "asked for again"
    if parts is RUNNING:
        assert [r.reason for r in status.restarts or []] == ["Suspended"]


@pytest.mark.parametrize("spec", [PATIENT, FASTER], ids=["the same run", "another run"])
@pytest.mark.parametrize("limit", [{"deadline": "1m"}, {"budget": {"gpuHours": 0.001}}], ids=["deadline", "budget"])
def test_what_reaches_its_limit_ends_though_an_edit_cannot_be_pinned(
    spec: dict[str, Any], limit: dict[str, Any]
) -> None:
    bound = pinned({**SPEC, **limit})
    job = t(key=bound.key, created=ago(75))
    parts = (job, pod(job, started=ago(70)), progress().model_copy(update={"updated_at": format_time(NOW)}))
    edited = subject({**spec, **limit}, generation=2)
    o, done = _while_configs_are_refused(world(TRAINING, *parts, subject=edited, pinned={1: bound}))
    assert done == ["delete t1"]
    assert o.subject.status.usage is not None
    assert (o.subject.status.usage.running_seconds, o.subject.status.usage.counted) == (70, 1)


def _three_tries(o: Observed) -> list[FineTuneJobStatus]:
    """What is written while preflight looks three times for a bucket that is missing."""
    written, now = [], NOW

    def look(o: Observed) -> tuple[Observed, float | None]:
        decision = decide(o, now=now)
        status = decision.status or o.subject.status
        written.append(status)
        after = _carried_out(o, decision)
        return replace(after, subject=replace(o.subject, status=status), last_write=now), decision.again_after

    for _ in range(3):
        o, _ = look(o)
        (job,) = o.jobs("preflight")
        others = tuple(pod for pod in o.pods if pod.role == "train")
        o, _ = look(replace(o, pods=(*others, pod(job))))
        gone = replace(ended(job, 49, message(49, "BucketNotFound")), exit=None)
        exit_ = Exit(49, "Error", now, message(49, "BucketNotFound"))
        o, again = look(replace(o, pods=(*others, replace(gone, exit=exit_))))
        assert again is not None
        now += timedelta(seconds=10 * 2 ** len(written))
    return written


def test_what_is_missing_is_told_once_however_often_it_is_looked_for() -> None:
    """Who waits for the job would hear of work and of failure in turn."""
    written = _three_tries(world())
    assert [note.reason for a, b in pairwise(written) for note in notes(a, b)] == ["BucketNotFound"]
    told = written[2:]
    assert {(s.phase, reason_of(s), truth(s, "Stalled"), truth(s, "Reconciling")) for s in told} == {
        ("Pending", "BucketNotFound", "True", "False")
    }
    assert len({c.last_transition_time for s in told for c in s.conditions or [] if c.type == "Stalled"}) == 1
    words = [(status.message or "").partition(";")[2][:12] for status in told]
    assert words == [" next try at", *[" looking aga", " looking aga", " next try at"] * 2]


def test_what_a_changed_document_misses_is_told_once_while_the_run_before_it_goes_on() -> None:
    written = _three_tries(world(TRAINING, *RUNNING, progress(), **CHANGED))
    assert [note.reason for a, b in pairwise(written) for note in notes(a, b)] == ["BucketNotFound"]
    assert {(status.phase, reason_of(status)) for status in written[2:]} == {("Training", "BucketNotFound")}


def _while_jobs_are_kept(o: Observed, names: Collection[str], *, looks: int = 5) -> list[FineTuneJobStatus]:
    """What is written, while a policy of the cluster lets none of these Jobs be deleted."""
    written = []
    for _ in range(looks):
        decision = decide(o, now=NOW)
        kept = [a.name for a in decision.actions if isinstance(a, DeleteJob) and a.name in names]
        if kept:
            words = dict.fromkeys(kept, "kept for the auditors")
            decision = undeleted(o, words, reason="DeleteForbidden", now=NOW)
        if decision.status is not None:
            written.append(decision.status)
            o = replace(o, subject=replace(o.subject, status=decision.status))
        o = replace(o, last_write=ago(1))
    return written


KEPT_T1 = "; the API server refuses to delete Job one-11111-t1: kept for the auditors; tried again every 60 s"


@pytest.mark.parametrize(
    ("given", "phase", "reason"),
    [
        (world(TRAINING, *RUNNING, subject=subject(SUSPENDED, generation=2)), "Suspended", "Suspending"),
        (
            world(TRAINING, t(ended="Complete", ended_at=ago(1)), subject=subject(SUSPENDED, generation=2)),
            "Suspended",
            "Suspending",
        ),
        (
            world(TRAINING, p(ended="Complete"), *RUNNING, subject=subject(SUSPENDED, generation=2)),
            "Suspended",
            "Suspending",
        ),
        (world(PASSED2, *RUNNING, **CHANGED), "Queued", "StoppingPreviousRun"),
        (world(TRAINING, *RUNNING, rival(holding=True)), "Pending", "IdenticalRunInProgress"),
    ],
    ids=["suspended", "suspended when it has ended", "suspended, with its preflight", "changed", "for a twin"],
)
def test_a_job_that_may_not_be_deleted_is_told_once_with_what_waits_for_its_end(
    given: Observed, phase: str, reason: str
) -> None:
    written = _while_jobs_are_kept(given, ["one-11111-t1", "one-11111-p1"])
    last = written[-1]
    assert len(written) <= 2
    assert (last.phase, reason_of(last)) == (phase, reason)
    assert (last.message or "").endswith(KEPT_T1)
    stalled, working = condition(last, "Stalled"), condition(last, "Reconciling")
    assert stalled is not None
    assert working is not None
    assert (stalled.status, stalled.reason, working.status) == ("True", "DeleteForbidden", "False")
    told = [note for before, after in pairwise([given.subject.status, *written]) for note in notes(before, after)]
    assert (told[-1].kind, told[-1].reason) == ("Warning", "DeleteForbidden")


def test_a_job_that_may_not_be_deleted_and_that_nothing_waits_for_is_not_told() -> None:
    followed = world(GO, t(ended="Failed", ended_at=ago(9)), t(2), pod(t(2)), progress(step=40))
    (written,) = _while_jobs_are_kept(followed, ["one-11111-t1"])
    assert (written.phase, written.message, truth(written, "Stalled")) == ("Training", "step 40 of 100", "False")
    refusal = undeleted(followed, {"one-11111-t1": "kept"}, reason="DeleteForbidden", now=NOW)
    assert refusal.again_after == 5.0


def test_a_job_that_may_not_be_deleted_keeps_no_success_from_being_told() -> None:
    done = (t(2, ended="Complete", ended_at=ago(1)), ended(t(2), 0, TRAINED))
    (written,) = _while_jobs_are_kept(world(GO, t(), *done), ["one-11111-t1"])
    assert written.phase == "Succeeded"
    said = "; Job one-11111-t1 goes on, as the API server refuses to delete it: kept for the auditors"
    assert (written.message or "").endswith(said)
    over = t(ended="Failed", ended_at=ago(9))
    (written,) = _while_jobs_are_kept(world(GO, over, *done), ["one-11111-t1"])
    assert "refuses" not in (written.message or "")


def test_a_success_shows_the_checkpoint_of_its_last_step() -> None:
    """The last one is committed between two questions to the trainer more often than not."""
    seen = said("Training", "Training", passed="True", checkpoint=CheckpointStatus(step=40, uri="s3://models/out/40"))
    decision = decide(world(seen, t(), ended(t(), 0, message(0, "Completed", result=RESULT))), now=NOW)
    assert decision.status is not None
    assert decision.status.checkpoint == CheckpointStatus(step=RESULT.final_step)


@pytest.mark.parametrize(
    "seen", [world(TRAINING, t(), ended(t(), 48, UNMET)), world(PREFLIGHT, p(), ended(p(), 48, unmet()))]
)
def test_a_model_that_is_not_good_enough_is_shown_all_the_same(seen: Observed) -> None:
    status = decide(seen, now=NOW).status
    assert status is not None
    assert (status.phase, status.evaluation, status.model) == ("Failed", RESULT.evaluation, RESULT.model)
    said = {c.type: (c.status, c.reason) for c in status.conditions or []}
    assert said["Succeeded"] == ("False", "GateNotMet")
    assert said["Stalled"] == ("True", "GateNotMet")
    assert said["Evaluated"] == ("True", "GateNotMet")
    assert said["PreflightPassed"][0] == "True"
    assert decide(world(status, p(), ended(p(), 48, unmet())), now=NOW) == Decision()


def test_a_reused_result_shows_its_step_and_loss() -> None:
    """`kubectl get` tells as much of it as of one that was just trained."""
    looked = outcome("Reused").model_copy(update={"result": RESULT})
    decision = decide(world(said("Preflight", "Checking"), p(), ended(p(), 0, looked)), now=NOW)
    status = decision.status
    assert status is not None
    assert (status.phase, status.progress and status.progress.loss) == ("Succeeded", RESULT.final_loss)
    assert status.checkpoint == CheckpointStatus(step=RESULT.final_step)


def test_a_kubelet_that_goes_back_and_forth_between_two_words_changes_nothing() -> None:
    """The registry's own words are told, whatever it puts before them."""
    registry = "failed to resolve reference: not found"
    back_off = f'Back-off pulling image "trainer:1": ErrImagePull: {registry}'
    given = world(None, t(), pod(t(), running=False, waiting=("ErrImagePull", registry)))
    after = decide(given, now=NOW).status
    assert after is not None
    assert after.message == registry
    backing = replace(given, pods=(pod(t(), running=False, waiting=("ImagePullBackOff", back_off)),))
    backing = replace(backing, subject=replace(given.subject, status=after))
    assert decide(backing, now=NOW + timedelta(hours=1)).status is None


def test_a_refusal_names_the_job_and_not_the_pod_that_each_try_gives_another_name() -> None:
    def told(name: str, before: FineTuneJobStatus | None) -> FineTuneJobStatus | None:
        words = f'pods "{name}" is forbidden: exceeded quota: team-a'
        given = world(before, p(), refusals={p().uid: words})
        return decide(given, now=NOW + timedelta(hours=1 if before else 0)).status

    after = told(f"{p().name}-x7k2p", None)
    assert after is not None
    assert f'pods "{p().name}" is forbidden: exceeded quota: team-a' in (after.message or "")
    assert told(f"{p().name}-qqqqq", after) is None


def test_what_an_attempt_has_cost_is_told_before_its_job_makes_room_for_a_twin() -> None:
    decision = decide(world(TRAINING, t(), ended(t(), 1, at=6), rival(holding=True)), now=NOW)
    assert decision.actions == ()
    assert decision.again_after == 0.0
    assert decision.status is not None
    assert [restart.reason for restart in decision.status.restarts or []] == ["Crashed"]


def test_the_end_of_a_pod_that_never_ends_is_when_it_was_told_first() -> None:
    """On a dead node it ends at each look: the next attempt would be due in five seconds for ever."""

    def due(job: Child, *, told: float, now: datetime) -> datetime:
        restart = Restart(attempt=1, reason="NodeLost", at=format_time(ago(told)))
        o = world(TRAINING.model_copy(update={"restarts": [restart]}), job)
        return due_at(o, job, End(JOB_LOST, "NodeLost", "m", now), timedelta(seconds=5), now=now)

    assert due(t(), told=6, now=NOW) == NOW
    later = NOW + timedelta(seconds=2)
    assert due(t(), told=1, now=NOW) == due(t(), told=1, now=later) == NOW + timedelta(seconds=4)
    assert due(t(2), told=6, now=NOW) == NOW + timedelta(seconds=5), "it is of the attempt before"
    assert due(p(), told=6, now=NOW) == NOW + timedelta(seconds=5), "it is of no preflight"


@pytest.mark.parametrize(("name", "is_ours"), [("one-11111-t1-0-abcde", True), ("nightly-t1-0-abcde", False)])
def test_a_pod_names_no_job_to_be_deleted_but_one_of_its_own_fine_tune_job(name: str, is_ours: bool) -> None:
    """Who may create pods may label and own them as he likes, and may have no right to delete Jobs."""
    o = world(said("Suspended", "Suspending"), pod(t(), name=name), **HALTED)
    assert [one.name for one in unasked(o, now=NOW)] == ([name] if is_ours else [])
    does = [action.name for action in decide(o, now=NOW).actions if isinstance(action, DeleteJob)]
    assert does == (["one-11111-t1"] if is_ours else [])


def test_a_job_without_its_label_that_may_not_be_deleted_is_told() -> None:
    o = world(said("Suspended", "Suspending"), pod(t(), name="one-11111-t1-0-abcde"), **HALTED)
    decision = undeleted(o, {"one-11111-t1": "kept"}, reason="DeleteForbidden", now=NOW)
    assert decision.again_after == 60.0
    assert decision.status is not None
    assert (decision.status.message or "").endswith(
        "the API server refuses to delete Job one-11111-t1: kept; tried again every 60 s"
    )
