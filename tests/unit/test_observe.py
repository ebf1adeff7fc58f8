"""What one decision gets to see: only what concerns it, and of twins only those that really stand in the way."""

from datetime import UTC, datetime
from typing import Any, cast

import pytest

from finetune_api.resolve import Defaults
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.observe import Observer
from finetune_operator.progress import ProgressReader
from finetune_operator.verdict import Observed
from finetune_operator.views import GENERATION, JOB_UID, ROLE, RUN, admission

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

    async def refusal(self, namespace: str, *, uid: str) -> str | None:
        self.asked.append(uid)
        if self.answer == "forbidden":
            raise ApiError(403, "Forbidden", "no Events for you")
        return self.answer


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
            "ownerReferences": [{"uid": f"uid-{owner}", "controller": True}],
        },
        "status": status,
    }


async def seen(cache: Cache, *, events: Events | None = None) -> Observed:
    kube = cast("Kube", events or Events(None))
    defaults = Defaults(trainer_image="t", preflight_image="p")
    observer = Observer(cache, kube, ProgressReader(kube), defaults=defaults)
    observed = await observer.observe("uid-one", now=NOW, last_write=None)
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


@pytest.mark.parametrize(
    ("deadline", "phase", "holds"),
    [
        ("2026-03-01T12:01:00Z", "Running", True),
        ("2026-03-01T12:01:00Z", "Failed", False),
        ("2026-03-01T11:58:59Z", "Running", False),
    ],
    ids=["its pod commits a checkpoint", "its pod has ended", "its pod is on a dead node"],
)
async def test_a_suspended_twin_holds_the_run_until_its_pods_have_ended(deadline: str, phase: str, holds: bool) -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("finetunejobs", document("two", suspend=True, phase="Suspended", run=run(), observedGeneration=1))
    pod = {
        "metadata": {
            "name": "two-t1-x",
            "namespace": "ns",
            "uid": "uid-pod",
            "resourceVersion": "1",
            "deletionTimestamp": deadline,
            "labels": {ROLE: "train", JOB_UID: "uid-two"},
        },
        "status": {"phase": phase},
    }
    cache.apply("pods", pod)
    (rival,) = (await seen(cache)).rivals
    assert (rival.holding, rival.run) == ((True, RUN_ID) if holds else (False, None))


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


async def test_without_the_right_to_read_events_the_rest_is_seen() -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", train_job("one"))
    observed = await seen(cache, events=Events("forbidden"))
    assert observed.refusals == {}
    assert [child.name for child in observed.children] == ["one-t1"]


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
    assert observed.admissions == {"uid-one-t1": "insufficient unused quota for nvidia.com/gpu"}
    assert api.asked == ["kueue", "v1beta1 uid-one-t1"]


async def test_kueue_is_not_asked_about_what_it_has_admitted() -> None:
    cache, api = Cache(), Events(None, workload=no_quota())
    cache.apply("finetunejobs", document("one"))
    cache.apply("jobs", queued_job(suspended=False))
    assert (await seen(cache, events=api)).admissions == {}
    assert "v1beta1 uid-one-t1" not in api.asked


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


PREEMPTED = {"type": "Evicted", "status": "True", "message": "Preempted to accommodate a workload"}
CHECK = {"name": "provision", "state": "Pending", "message": "no nodes yet"}


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        ({}, ""),
        (no_quota(), "insufficient unused quota for nvidia.com/gpu"),
        (
            {"status": {"conditions": [*no_quota()["status"]["conditions"], PREEMPTED]}},
            "Preempted to accommodate a workload; insufficient unused quota for nvidia.com/gpu",
        ),
        (
            {"status": {"conditions": [{"type": "QuotaReserved", "status": "True"}], "admissionChecks": [CHECK]}},
            "provision: no nodes yet",
        ),
        ({"status": {"admissionChecks": [{"name": "provision", "state": "Ready"}]}}, ""),
    ],
    ids=["nothing is said", "no quota", "preempted", "an admission check", "a check that is done"],
)
def test_what_kueue_says_of_a_workload_that_waits(workload: dict[str, Any], words: str) -> None:
    assert admission(workload) == words


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
        observed = await observer.observe("uid-one", now=NOW, last_write=None)
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
            "ownerReferences": [{"uid": "uid-one-t1", "controller": True}],
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
