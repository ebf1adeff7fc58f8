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
from finetune_operator.views import GENERATION, JOB_UID, ROLE, RUN

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RUN_ID = "a" * 16


class Events:
    """An API server that knows only Events."""

    outside = False

    def __init__(self, refusal: str | None) -> None:
        self.answer = refusal
        self.asked: list[str] = []

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
