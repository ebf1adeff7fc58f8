"""What one decision gets to see: only what concerns it, and of twins only those that really stand in the way."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from tests.unit.cluster import controlled_by
from tests.unit.test_decide import SPEC, resolved

from finetune_api.resolve import Defaults
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.manifests import config_map
from finetune_operator.observe import Observer
from finetune_operator.policies.rivals import ahead
from finetune_operator.progress import ProgressReader
from finetune_operator.refusals import Told
from finetune_operator.verdict import Observed
from finetune_operator.views import GENERATION, JOB_UID, ROLE, RUN, Admission, Subject

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RUN_ID = "a" * 16


class Events:
    """An API server that knows only Events and Workloads."""

    outside = False

    def __init__(self, refusal: str | None, *, workload: dict[str, Any] | None = None) -> None:
        self.answer = refusal
        self.waits = workload
        self.asked: list[str] = []

    async def kueue(self) -> str | None:
        self.asked.append("kueue")
        return "v1beta1" if self.waits is not None else None

    async def workload(self, namespace: str, *, version: str, job_uid: str) -> dict[str, Any] | None:
        self.asked.append(f"{version} {job_uid}")
        return self.waits or None

    async def refusals(self, namespace: str) -> dict[str, str]:
        self.asked.append(namespace)
        await asyncio.sleep(0)
        if self.answer == "forbidden":
            raise ApiError(403, "Forbidden", "no Events for you")
        return {} if self.answer is None else {f"uid-{name}-t1": self.answer for name in ("one", "two")}

    async def unprepared(self, namespace: str) -> dict[str, tuple[str, str]]:
        self.asked.append(f"pods of {namespace}")
        return {} if self.answer is None else {"uid-one-t1-x": ("FailedMount", self.answer)}


def document(
    name: str, *, generation: int = 1, output: str = "s3://out", suspend: bool = False, **status: Any
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-{name}",
            "resourceVersion": "1",
            "generation": generation,
            "creationTimestamp": "2026-03-01T00:00:00Z",
        },
        "spec": {"output": {"uri": output}, "suspend": suspend},
        "status": status,
    }


def train_job(owner: str, *, created: str = "2026-03-01T11:59:50Z", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"{owner}-t1",
            "namespace": "ns",
            "uid": f"uid-{owner}-t1",
            "resourceVersion": "1",
            "creationTimestamp": created,
            "labels": {ROLE: "train", RUN: RUN_ID, GENERATION: "1", JOB_UID: f"uid-{owner}"},
            "ownerReferences": [controlled_by("FineTuneJob", f"uid-{owner}")],
        },
        "status": status,
    }


async def seen(cache: Cache, *, events: Events | None = None) -> Observed:
    kube = cast("Kube", events or Events(None))
    defaults = Defaults(trainer_image="t", preflight_image="p")
    observer = Observer(cache, kube, ProgressReader(kube), defaults=defaults)
    observed = await observer.observe("uid-one", now=NOW, last_write=None, begun=0)
    assert observed is not None
    return observed


def run(generation: int = 1) -> dict[str, Any]:
    return {"id": RUN_ID, "generation": generation}


def stalled() -> list[dict[str, Any]]:
    return [
        {
            "type": "Stalled",
            "status": "True",
            "reason": "BucketNotFound",
            "message": "",
            "lastTransitionTime": "x",
            "observedGeneration": 1,
        }
    ]


@pytest.mark.parametrize(
    ("twin", "stands"),
    [
        (document("two", phase="Queued", run=run(), observedGeneration=1), True),
        (document("two", phase="Pending", run=run(), observedGeneration=1, conditions=stalled()), False),
        (document("two", generation=2, phase="Pending", run=run(1), observedGeneration=2), False),
        (document("two", phase="Succeeded", run=run(), observedGeneration=1), False),
        (document("two", phase="Queued", run=run(), observedGeneration=1, output="s3://elsewhere"), False),
        (document("two"), False),
        (document("two", suspend=True, phase="Suspended", run=run(), observedGeneration=1), False),
    ],
    ids=[
        "it is about to train",
        "it is stalled",
        "it asks for another run by now",
        "it is done",
        "elsewhere",
        "new",
        "suspended",
    ],
)
async def test_a_twin_stands_in_the_way_only_if_it_will_train(twin: dict[str, Any], stands: bool) -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("finetunejobs", twin)
    rivals = (await seen(cache)).rivals
    assert any(rival.unfinished and rival.run == RUN_ID for rival in rivals) is stands


async def test_a_twin_that_trains_stands_in_the_way_even_if_it_asks_for_another_run_by_now() -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("finetunejobs", document("two", generation=2, phase="Training", run=run(1), observedGeneration=2))
    cache.apply("jobs", train_job("two"))
    (rival,) = (await seen(cache)).rivals
    assert (rival.holding, rival.run) == (True, RUN_ID)


async def test_a_twin_holds_the_run_that_it_trains_and_the_one_that_it_has_asked_for_since() -> None:
    """The next look stops the train Job, and its pods commit a checkpoint."""
    cache, since = Cache(), {"id": "b" * 16, "generation": 2}
    cache.apply("finetunejobs", document("one"))
    cache.apply("finetunejobs", document("two", generation=2, phase="Queued", run=since, observedGeneration=2))
    cache.apply("jobs", train_job("two"))
    found = {rival.run: rival.holding for rival in (await seen(cache)).rivals}
    assert found == {RUN_ID: True, "b" * 16: False}


@pytest.mark.parametrize("suspended", [True, False], ids=["suspended", "without its Job"])
@pytest.mark.parametrize(
    ("deadline", "phase", "holds"),
    [
        ("2026-03-01T12:01:00Z", "Running", True),
        ("2026-03-01T12:01:00Z", "Failed", False),
        ("2026-03-01T11:58:59Z", "Running", False),
    ],
    ids=["its pod commits a checkpoint", "its pod has ended", "its pod is on a dead node"],
)
async def test_a_twin_holds_the_run_until_its_pods_have_ended(
    deadline: str, phase: str, holds: bool, suspended: bool
) -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    told = "Suspended" if suspended else "Training"
    cache.apply("finetunejobs", document("two", suspend=suspended, phase=told, run=run(), observedGeneration=1))
    pod = {
        "metadata": {
            "name": "two-t1-x",
            "namespace": "ns",
            "uid": "uid-pod",
            "resourceVersion": "1",
            "deletionTimestamp": deadline,
            "labels": {ROLE: "train", JOB_UID: "uid-two", RUN: RUN_ID},
        },
        "status": {"phase": phase},
    }
    cache.apply("pods", pod)
    (rival,) = (await seen(cache)).rivals
    assert (rival.holding, rival.run) == (holds, RUN_ID if holds or not suspended else None)


def train_pod(owner: str, *, phase: str = "Running", beside_a_proxy: bool = False, **meta: Any) -> dict[str, Any]:
    labels = {ROLE: "train", JOB_UID: f"uid-{owner}", RUN: RUN_ID}
    references = [controlled_by("Job", f"uid-{owner}-t1")]
    fixed = {"name": f"{owner}-t1-x", "namespace": "ns", "uid": f"uid-{owner}-t1-x", "resourceVersion": "1"}
    containers = [
        {"name": "proxy", "state": {"running": {}}},
        {"name": "trainer", "state": {"terminated": {"exitCode": 1, "finishedAt": "2026-03-01T11:59:59Z"}}},
    ]
    status = {"phase": phase, **({"containerStatuses": containers} if beside_a_proxy else {})}
    return {"metadata": {**fixed, "labels": labels, "ownerReferences": references, **meta}, "status": status}


GOING = {"deletionTimestamp": "2026-03-01T12:01:00Z"}
FAILED = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-03-01T11:59:59Z"}]}


@pytest.mark.parametrize(
    ("left", "waited_for"),
    [
        ([train_pod("two", **GOING)], "pod two-t1-x"),
        ([train_job("two"), train_pod("two")], "pod two-t1-x"),
        ([train_job("two")], "Job two-t1"),
        ([train_job("two", **FAILED)], None),
        ([train_job("two"), train_pod("two", phase="Succeeded")], None),
        ([train_pod("two", deletionTimestamp="2026-03-01T11:58:59Z")], None),
        ([train_pod("two", namespace="another", **GOING)], None),
        ([train_pod("two", beside_a_proxy=True)], None),
        ([train_pod("two", labels={ROLE: "train", JOB_UID: "uid-two", RUN: "b" * 16}, **GOING)], None),
    ],
    ids=[
        "its pod commits a checkpoint",
        "nobody has asked its pod to end",
        "its Job is still to make a pod",
        "its Job has ended",
        "its pod has ended",
        "its pod is on a dead node",
        "in another namespace",
        "its trainer has ended, and a proxy beside it goes on",
        "of another run",
    ],
)
@pytest.mark.parametrize("over", ["gone", "going", "failed"])
async def test_what_is_left_of_a_fine_tune_job_that_is_over_holds_its_run(
    left: list[dict[str, Any]], waited_for: str | None, over: str
) -> None:
    """Deleted and applied again, the one that comes goes on from what the one that goes has committed."""
    cache = Cache()
    cache.apply("finetunejobs", document("one", run=run()))
    two = document("two", run=run(), phase="Failed" if over == "failed" else "Training", observedGeneration=1)
    two["metadata"] |= GOING if over == "going" else {}
    cache.apply("finetunejobs", two)
    for raw in left:
        cache.apply("jobs" if raw["metadata"]["name"] == "two-t1" else "pods", raw)
    if over == "gone":
        cache.forget("uid-two")
    found = [(rival.name, rival.run, rival.holding) for rival in (await seen(cache)).rivals if not rival.attended]
    assert found == ([(waited_for, RUN_ID, True)] if waited_for else [])


@pytest.mark.parametrize("gone", [True, False])
async def test_what_is_left_of_a_run_with_another_output_is_not_waited_for(gone: bool) -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one", run=run()))
    two = document("two", output="s3://another", run=run(), phase="Failed", observedGeneration=1)
    cache.apply("finetunejobs", two)
    cache.apply("pods", train_pod("two", **GOING))
    if gone:
        cache.forget("uid-two")
    assert (await seen(cache)).rivals == ()


async def test_who_trains_does_not_make_room_for_what_is_left_of_another() -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one", run=run()))
    cache.apply("pods", train_pod("two", **GOING))
    observed = await seen(cache)
    assert ahead(observed, RUN_ID, holding=True) is None
    assert ahead(observed, RUN_ID, holding=False) is not None
    cache.forget("uid-two-t1-x")
    assert (await seen(cache)).rivals == ()


async def test_events_are_read_only_for_a_job_that_has_no_pods_for_a_while() -> None:
    cache, events = Cache(), Events("exceeded quota")
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one", created="2026-03-01T11:59:58Z"))
    assert (await seen(cache, events=events)).refusals == {}
    assert events.asked == []
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one"))
    assert (await seen(cache, events=events)).refusals == {"uid-one-t1": "exceeded quota"}


async def test_events_of_a_namespace_are_read_every_ten_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("finetune_operator.refusals.time.monotonic", lambda: clock[0])
    cache, events = Cache(), Events("exceeded quota")
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one"))
    kube = cast("Kube", events)
    observer = Observer(cache, kube, ProgressReader(kube), defaults=Defaults(trainer_image="t", preflight_image="p"))
    for moment, asked in ((100.0, 1), (109.0, 1), (111.0, 2)):
        clock[0] = moment
        observed = await observer.observe("uid-one", now=NOW, last_write=None, begun=0)
        assert observed is not None
        assert observed.refusals == {"uid-one-t1": "exceeded quota"}
        assert len(events.asked) == asked


async def test_jobs_of_a_namespace_that_wait_at_once_have_its_events_read_once() -> None:
    cache, events = Cache(), Events("exceeded quota")
    kube = cast("Kube", events)
    observer = Observer(cache, kube, ProgressReader(kube), defaults=Defaults(trainer_image="t", preflight_image="p"))
    for name in ("one", "two"):
        cache.apply("finetunejobs", document(name))
        cache.apply("jobs", train_job(name))
    looks = [observer.observe(f"uid-{name}", now=NOW, last_write=None, begun=0) for name in ("one", "two")]
    found = [observed.refusals for observed in await asyncio.gather(*looks) if observed is not None]
    assert found == [{"uid-one-t1": "exceeded quota"}, {"uid-two-t1": "exceeded quota"}]
    assert events.asked == ["ns"]


async def test_who_comes_while_events_are_read_again_is_told_what_they_said_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("finetune_operator.refusals.time.monotonic", lambda: clock[0])
    events = Events("exceeded quota")
    refusals = Told(lambda namespace: events.refusals(namespace))
    assert await refusals.of("ns", "uid-one-t1") == "exceeded quota"
    clock[0], slow = 120.0, asyncio.Event()

    async def stuck(_: str) -> dict[str, str]:
        await slow.wait()
        raise TimeoutError

    events.refusals = stuck  # type: ignore[method-assign]
    reading = asyncio.create_task(refusals.of("ns", "uid-one-t1"))
    await asyncio.sleep(0)
    assert await refusals.of("ns", "uid-two-t1") == "exceeded quota"
    slow.set()
    assert await reading == "exceeded quota"


async def test_without_the_right_to_read_events_the_rest_is_seen() -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one"))
    observed = await seen(cache, events=Events("forbidden"))
    assert observed.refusals == {}
    assert [child.name for child in observed.children] == ["one-t1"]


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, True),
        ({"since": "2026-03-01T11:59:45Z"}, False),
        ({"node": None}, False),
        ({"state": {"running": {}}}, False),
        ({"prepared": True}, False),
    ],
    ids=["half a minute on its node", "not so long", "no node yet", "it runs", "prepared: it pulls its image"],
)
async def test_events_of_pods_are_read_only_for_one_that_its_node_does_not_prepare(
    changes: dict[str, Any], reads: bool
) -> None:
    cache, events = Cache(), Events("no such volume")
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one"))
    cache.apply("pods", slow_pod(**changes))
    observed = await seen(cache, events=events)
    assert observed.unprepared == ({"uid-one-t1-x": ("FailedMount", "no such volume")} if reads else {})
    assert events.asked == (["pods of ns"] if reads else [])


def slow_pod(
    *,
    since: str = "2026-03-01T11:59:25Z",
    node: str | None = "n",
    state: Mapping[str, Any] | None = None,
    prepared: bool = False,
) -> dict[str, Any]:
    waits = {"waiting": {"reason": "ContainerCreating"}}
    conditions = [
        {"type": "PodScheduled", "status": "True" if node else "False", "lastTransitionTime": since},
        {"type": "PodReadyToStartContainers", "status": str(prepared), "lastTransitionTime": since},
    ]
    return {
        "metadata": {
            "name": "one-t1-x",
            "namespace": "ns",
            "uid": "uid-one-t1-x",
            "resourceVersion": "1",
            "labels": {ROLE: "train", JOB_UID: "uid-one"},
            "ownerReferences": [controlled_by("Job", "uid-one-t1")],
        },
        "spec": {"nodeName": node} if node else {},
        "status": {
            "phase": "Pending",
            "conditions": conditions,
            "containerStatuses": [{"name": "trainer", "state": state or waits}],
        },
    }


async def test_of_a_job_that_is_done_nothing_is_asked() -> None:
    cache, events = Cache(), Events("exceeded quota")
    cache.apply("finetunejobs", document("one", phase="Succeeded", observedGeneration=1))
    cache.apply("jobs", train_job("one"))
    assert (await seen(cache, events=events)).refusals == {}
    assert events.asked == []


def queued_job(*, suspended: bool = True) -> dict[str, Any]:
    raw = train_job("one")
    raw["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "team-a"
    return {**raw, "spec": {"suspend": suspended}}


def no_quota(**status: Any) -> dict[str, Any]:
    said = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for nvidia.com/gpu"}
    return {"status": {"conditions": [said], **status}}


async def test_kueue_is_asked_why_a_suspended_job_of_a_queue_waits() -> None:
    cache, api = Cache(), Events(None, workload=no_quota())
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", queued_job())
    observed = await seen(cache, events=api)
    assert observed.kueue
    words = "insufficient unused quota for nvidia.com/gpu"
    assert observed.admissions == {"uid-one-t1": Admission(words, stuck=False)}
    assert api.asked == ["kueue", "v1beta1 uid-one-t1"]


async def test_kueue_is_not_asked_about_what_it_has_admitted() -> None:
    cache, api = Cache(), Events(None, workload=no_quota())
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", queued_job(suspended=False))
    assert (await seen(cache, events=api)).admissions == {}
    assert "v1beta1 uid-one-t1" not in api.asked


async def test_kueue_is_asked_about_a_suspended_job_that_names_no_queue() -> None:
    cache, api = Cache(), Events(None, workload=no_quota())
    cache.apply("finetunejobs", document("one"))
    job = queued_job()
    del job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    cache.apply("jobs", job)
    assert [*(await seen(cache, events=api)).admissions] == ["uid-one-t1"]


async def test_nobody_asks_for_kueue_where_no_queue_is_named() -> None:
    cache, api = Cache(), Events(None, workload=no_quota())
    cache.apply("finetunejobs", document("one"))
    assert not (await seen(cache, events=api)).kueue
    assert api.asked == []


@pytest.mark.parametrize(
    ("profile", "spec"), [({"queue": {"name": "team-a"}}, {}), ({}, {"queue": {"name": "team-a"}})]
)
async def test_it_is_looked_for_where_the_job_or_a_profile_names_one(
    profile: dict[str, Any], spec: dict[str, Any]
) -> None:
    cache = Cache()
    raw = document("one")
    cache.apply("finetunejobs", {**raw, "spec": {**raw["spec"], **spec}})
    cache.apply(
        "finetuneprofiles", {"metadata": {"name": "p", "uid": "uid-p", "resourceVersion": "1"}, "spec": profile}
    )
    assert (await seen(cache, events=Events(None, workload=no_quota()))).kueue
    assert not (await seen(cache, events=Events(None))).kueue


def workload(*conditions: dict[str, Any], active: bool = True, **status: Any) -> dict[str, Any]:
    return {"spec": {"active": active}, "status": {"conditions": list(conditions), **status}}


def said(kind: str, status: str, message: str, reason: str = "Pending") -> dict[str, Any]:
    return {"type": kind, "status": status, "message": message, "reason": reason}


EVICTED = said("Evicted", "True", "Preempted to accommodate a workload", "Preempted")
BEFORE = said("Evicted", "False", "Previously: Preempted to accommodate a workload", "QuotaReserved")
RESERVED = said("QuotaReserved", "True", "Quota reserved in ClusterQueue gpus")
WANTING = said("QuotaReserved", "False", "insufficient unused quota")
NO_QUEUE = said("QuotaReserved", "False", "LocalQueue team-a doesn't exist", "Inadmissible")
OFF = said("Evicted", "True", "The workload is deactivated", "Deactivated")
FAILED = said("Finished", "True", "conflict for nodeSelector", "FailedToStart")
CHECK = {"name": "provision", "state": "Pending", "message": "no nodes yet"}


@pytest.mark.parametrize(
    ("workload", "words", "stuck"),
    [
        ({}, "", False),
        (workload(WANTING), "insufficient unused quota", False),
        (workload(EVICTED, RESERVED), "Preempted to accommodate a workload", False),
        (workload(EVICTED, WANTING), "Preempted to accommodate a workload; insufficient unused quota", False),
        (workload(BEFORE, WANTING), "insufficient unused quota", False),
        (
            workload(RESERVED, admissionChecks=[CHECK]),
            "Quota reserved in ClusterQueue gpus; provision: no nodes yet",
            False,
        ),
        (workload(WANTING, admissionChecks=[CHECK]), "insufficient unused quota", False),
        (
            workload(RESERVED, admissionChecks=[{**CHECK, "state": "Ready"}]),
            "Quota reserved in ClusterQueue gpus",
            False,
        ),
        (
            workload(WANTING, requeueState={"count": 2, "requeueAt": "2026-03-01T12:03:00Z"}),
            "insufficient unused quota; tried again at 2026-03-01T12:03:00Z",
            False,
        ),
        (workload(NO_QUEUE), "LocalQueue team-a doesn't exist", True),
        (workload(OFF, active=False), "The workload is deactivated", True),
        (workload(FAILED, RESERVED), "conflict for nodeSelector; Quota reserved in ClusterQueue gpus", True),
    ],
    ids=[
        "nothing is said",
        "no quota",
        "about to lose its place",
        "it has lost its place",
        "long ago",
        "an admission check",
        "a check whose turn has not come",
        "a check that is done",
        "tried again later",
        "no such queue",
        "deactivated",
        "it can never be started",
    ],
)
def test_what_kueue_says_of_a_workload_that_waits(workload: dict[str, Any], words: str, stuck: bool) -> None:
    assert Admission.of(workload) == Admission(words, stuck)


async def test_how_long_running_pods_say_nothing_is_measured_by_a_clock_that_cannot_jump(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, clock = Cache(), [100.0]
    monkeypatch.setattr("finetune_operator.observe.time.monotonic", lambda: clock[0])
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one"))
    observer = Observer(
        cache,
        cast("Kube", Events(None)),
        ProgressReader(cast("Kube", Events(None))),
        defaults=Defaults(trainer_image="t", preflight_image="p"),
    )

    async def silent() -> float:
        observed = await observer.observe("uid-one", now=NOW, last_write=None, begun=0)
        assert observed is not None
        return observed.silent.total_seconds()

    assert await silent() == 0, "nothing runs"
    pod = {
        "metadata": {
            "name": "one-t1-x",
            "namespace": "ns",
            "uid": "uid-pod",
            "resourceVersion": "1",
            "labels": {ROLE: "train", JOB_UID: "uid-one"},
            "ownerReferences": [controlled_by("Job", "uid-one-t1")],
        },
        "status": {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]},
    }
    cache.apply("pods", pod)
    clock[0] = 1000.0
    assert await silent() == 0, "it is seen to run for the first time"
    clock[0] = 8200.0
    assert await silent() == 7200
    cache.forget("uid-pod")
    assert await silent() == 0


async def test_a_queue_that_is_pinned_counts_though_no_profile_names_it_any_more() -> None:
    pinned_queue = resolved({**SPEC, "resources": {"nodes": 2}}, profile={"queue": {"name": "team-a"}})
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    assert not (await seen(cache, events=Events(None, workload=no_quota()))).kueue
    raw = config_map(cast("Subject", cache.subject("uid-one")), pinned_queue, key="k")
    raw["metadata"] |= {"uid": "uid-config", "resourceVersion": "1"}
    cache.apply("configmaps", raw)
    assert (await seen(cache, events=Events(None, workload=no_quota()))).kueue


async def test_a_question_to_kueue_that_fails_is_told_as_such() -> None:
    class Refusing(Events):
        async def workload(self, namespace: str, *, version: str, job_uid: str) -> dict[str, Any] | None:
            raise ApiError(403, "Forbidden", "no Workloads for you")

    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", queued_job())
    (said,) = (await seen(cache, events=Refusing(None, workload=no_quota()))).admissions.values()
    assert said == Admission("Kueue cannot be asked: 403 Forbidden: no Workloads for you", stuck=False)
