"""Runs on several nodes start all or none, one group after the other, and give back what they cannot complete."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.cluster import controlled_by
from tests.unit.test_decide import (
    GO,
    NOW,
    TRAINING,
    TWO_NODES,
    Row,
    ago,
    pinned,
    pod,
    resolved,
    said,
    settled,
    short,
    subject,
    t,
    truth,
    world,
)
from tests.unit.test_observe import document, seen, train_job

from finetune_api.status import FineTuneJobStatus, Restart, Usage
from finetune_operator.cache import Cache
from finetune_operator.decide import decide
from finetune_operator.verdict import CreatePreflight, Group, reason_of
from finetune_operator.views import Child, Counters, format_time

SEVERAL: dict[str, Any] = {"subject": subject(TWO_NODES), "pinned": {1: pinned(TWO_NODES)}}
IN_A_QUEUE = {**TWO_NODES, "queue": {"name": "team-a"}}


def job(seconds: float = 60, **changes: Any) -> Child:
    return t(created=ago(seconds), nodes=2, key=pinned(TWO_NODES).key, **changes)


def other(*, starts: bool, older: bool) -> Group:
    """The job itself is 1,000 seconds old."""
    return Group("ns/other", "other", ago(1001 if older else 999), starts)


def waiting(count: int) -> tuple[Group, ...]:
    """So many that are ready and older."""
    return tuple(Group(f"ns/{number}", f"uid-{number}", ago(2000 - number), False) for number in range(count))


def rested(times: int, *, seconds: float) -> FineTuneJobStatus:
    """So many groups in a row gave their nodes back, the last one so long ago."""
    restarts = [
        Restart(
            attempt=number, reason="GroupIncomplete", at=format_time(ago(seconds)), resumed_from_step=0, lost_steps=0
        )
        for number in range(1, times + 1)
    ]
    return said("Queued", "GroupIncomplete", passed="True", restarts=restarts, usage=Usage(attempts=times))


REFUSED: dict[str, Any] = {
    "subject": subject({**TWO_NODES, "task": 1}, generation=2),
    "pinned": {1: pinned(TWO_NODES)},
}
"""Generation 2 does not validate."""
ONE_PLACED = (pod(job(), name="a"), pod(job(), name="b", index=1, node=None, running=False, unschedulable="no room"))

ROWS = [
    Row("a group starts when no other does", world(GO, **SEVERAL), "Queued", "PodsPending", "begin t1"),
    Row(
        "one that starts already comes first, also a younger one",
        world(GO, groups=(other(starts=True, older=False),), **SEVERAL),
        "Queued",
        "AnotherGroupStarts",
        says="ns/other needs several nodes, too, and is first",
        again=5.0,
    ),
    Row(
        "of several it is told how many are first",
        world(GO, groups=(other(starts=True, older=False), *waiting(2)), **SEVERAL),
        "Queued",
        "AnotherGroupStarts",
        says="3 others need several nodes, too, and are first; groups of a namespace start one after the other",
    ),
    Row(
        "of those that are ready the oldest comes first",
        world(GO, groups=(other(starts=False, older=True),), **SEVERAL),
        "Queued",
        "AnotherGroupStarts",
    ),
    Row(
        "which is this one",
        world(GO, groups=(other(starts=False, older=False),), **SEVERAL),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "it begins by itself when the other has its pods",
        world(said("Queued", "AnotherGroupStarts", passed="True"), **SEVERAL),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "a lone pod waits for no group",
        world(GO, groups=(other(starts=True, older=True),)),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "nor does a group in a queue: Kueue starts all of it or none",
        world(
            GO,
            groups=(other(starts=True, older=True),),
            kueue=True,
            subject=subject(IN_A_QUEUE),
            pinned={1: pinned(IN_A_QUEUE)},
        ),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "a pod may wait for its node as long as the profile says",
        world(GO, job(599), *ONE_PLACED, **SEVERAL),
        "Queued",
        "Unschedulable",
    ),
    Row(
        "then all give their nodes back, and a preflight carries on what was counted",
        world(GO, job(600), *ONE_PLACED, **SEVERAL),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
    ),
    Row(
        "also beside a changed document, without a preflight for the old one",
        world(GO, job(600), *ONE_PLACED, **REFUSED),
        "Queued",
        "InvalidSpec",
        "delete t1",
        says="all give their nodes back for a while; generation 2 was refused",
    ),
    Row(
        "a group that has trained has met, and what is taken from it then is no lack of nodes",
        world(TRAINING, job(9999), ONE_PLACED[0], **SEVERAL),
        "Queued",
        "PodsPending",
    ),
    Row(
        "nor is a group incomplete whose Job has failed and whose other pod still commits",
        world(
            GO,
            job(9999, ended="Failed", ended_at=NOW),
            replace(ONE_PLACED[0], gone_by=NOW + timedelta(seconds=60), was_asked_to_go=True),
            **SEVERAL,
        ),
        "Starting",
        "Stopping",
    ),
    Row(
        "a pod that pulls its image has its node, however long that takes",
        world(
            GO,
            job(9999),
            *(pod(job(), name=name, running=False, waiting=("ContainerCreating", "")) for name in "ab"),
            **SEVERAL,
        ),
        "Starting",
        "PodsStarting",
    ),
    Row(
        "a Job that somebody suspended is no group that lacks nodes",
        world(GO, job(9999, suspended=True), **SEVERAL),
        "Queued",
        "JobSuspended",
    ),
    Row(
        "one that goes on waits anew",
        world(GO, job(9999, released=ago(599)), *ONE_PLACED, **SEVERAL),
        "Queued",
        "Unschedulable",
    ),
    Row(
        "one that a queue admits without the document naming it is the queue's business",
        world(GO, job(9999, queue="default"), *ONE_PLACED, **SEVERAL),
        "Queued",
        "Unschedulable",
    ),
    Row(
        "a lone pod keeps its place in the line for ever",
        world(GO, t(created=ago(9999)), pod(t(), node=None, running=False, unschedulable="no room")),
        "Queued",
        "Unschedulable",
    ),
    Row(
        "a group that gave its nodes back waits until its pods are gone",
        world(rested(1, seconds=9999), *(replace(one, gone_by=NOW) for one in ONE_PLACED), **SEVERAL),
        "Queued",
        "StoppingPreviousRun",
    ),
    Row(
        "and then for a while",
        world(rested(1, seconds=14), **SEVERAL),
        "Queued",
        "GroupIncomplete",
        says="the last group stayed incomplete and gave its nodes back; next try at",
    ),
    Row("before it is tried again", world(rested(1, seconds=46), **SEVERAL), "Queued", "PodsPending", "begin t2"),
    Row("later each time", world(rested(4, seconds=119), **SEVERAL), "Queued", "GroupIncomplete"),
    Row("but in the end it is", world(rested(9, seconds=901), **SEVERAL), "Queued", "PodsPending", "begin t10"),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_fact(row: Row) -> None:
    decision = settled(row.given)
    status = decision.status or row.given.subject.status
    assert short(decision) == row.does
    assert (status.phase, reason_of(status)) == (row.phase, row.reason), status.message
    assert row.says in (status.message or "")
    assert truth(status, "Stalled") == "False"
    if row.again is not None:
        assert decision.again_after == pytest.approx(row.again)


def test_first_it_is_told_what_is_missing() -> None:
    status = decide(world(GO, job(600), *ONE_PLACED, **SEVERAL), now=NOW).status
    assert status is not None
    assert (status.phase, reason_of(status)) == ("Queued", "GroupIncomplete")
    assert status.message == "1 of 2 pods got a node within 10m; all give their nodes back for a while"


def test_crashes_of_before_are_not_forgotten() -> None:
    given = world(GO, job(600, counters=Counters(failures=2, halve=True)), *ONE_PLACED, **SEVERAL)
    (begun,) = [action for action in settled(given).actions if isinstance(action, CreatePreflight)]
    assert begun.counters == Counters(failures=2, halve=True)


def test_what_an_incomplete_group_took_is_paid_and_counts_as_no_failure() -> None:
    given = world(GO, job(600), *(replace(one, started=ago(590)) for one in ONE_PLACED[:1]), ONE_PLACED[1], **SEVERAL)
    status = settled(given).status
    assert status is not None
    assert status.usage is not None
    assert (status.usage.running_seconds, status.usage.counted) == (590, 1)
    assert [restart.reason for restart in status.restarts or []] == ["GroupIncomplete"]
    assert status.run is not None
    assert status.run.interruptions is None


@given(times=st.integers(1, 30), seconds=st.integers(0, 2000))
def test_a_group_rests_at_least_15_seconds_and_at_most_15_minutes(times: int, seconds: int) -> None:
    begins = short(settled(world(rested(times, seconds=seconds), **SEVERAL))).startswith("begin")
    assert not begins if seconds < 15 else begins if seconds > 900 else True


def several(name: str, *, created: str = "2026-03-01T00:00:00Z", **status: Any) -> dict[str, Any]:
    raw = document(name, **status)
    raw["metadata"]["creationTimestamp"] = created
    return {**raw, "spec": {**raw["spec"], "resources": {"nodes": 2}}}


def ready(reason: str = "PreflightPassed") -> list[dict[str, Any]]:
    return [
        {
            "type": "Succeeded",
            "status": "Unknown",
            "reason": reason,
            "message": "",
            "lastTransitionTime": "x",
            "observedGeneration": 1,
        }
    ]


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"profile": "gpu"}, False),
        ({"queue": {"name": "team-a"}}, False),
        ({"resources": {"nodes": 1}}, False),
        ({"suspend": True}, False),
    ],
    ids=["like this one", "another profile", "in a queue", "a lone pod", "suspended"],
)
async def test_another_job_is_in_the_line_if_it_may_start_a_group(changes: dict[str, Any], counts: bool) -> None:
    cache = Cache()
    cache.apply("finetunejobs", several("one"))
    two = several("two", phase="Queued", conditions=ready(), observedGeneration=1)
    cache.apply("finetunejobs", {**two, "spec": {**two["spec"], **changes}})
    groups = (await seen(cache)).groups
    assert [(group.name, group.starts) for group in groups] == ([("ns/two", False)] if counts else [])


@pytest.mark.parametrize(
    ("placed", "changes", "starts"),
    [
        (0, {}, True),
        (1, {}, True),
        (2, {}, False),
        (0, {"ended": True}, False),
        (0, {"suspend": True}, False),
        (0, {"queue": "team-a"}, False),
    ],
    ids=[
        "no pod has a node",
        "one of two has",
        "both have, though they pull",
        "its Job has ended",
        "suspended",
        "queued",
    ],
)
async def test_a_group_starts_until_all_its_pods_have_a_node(
    placed: int, changes: dict[str, Any], starts: bool
) -> None:
    cache = Cache()
    cache.apply("finetunejobs", several("one"))
    cache.apply("finetunejobs", several("two", phase="Starting", conditions=ready("Loading"), observedGeneration=1))
    failed = [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-03-01T00:00:00Z"}]
    raw = train_job("two", conditions=failed if changes.get("ended") else [])
    if "queue" in changes:
        raw["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = changes["queue"]
    cache.apply("jobs", {**raw, "spec": {"parallelism": 2, "suspend": changes.get("suspend", False)}})
    for index in range(placed):
        cache.apply("pods", _placed_pod(index))
    assert [group.starts for group in (await seen(cache)).groups] == ([True] if starts else [])


def _placed_pod(index: int) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"two-t1-{index}",
            "namespace": "ns",
            "uid": f"uid-pod-{index}",
            "resourceVersion": "1",
            "labels": {"finetune.dev/role": "train", "finetune.dev/job-uid": "uid-two"},
            "ownerReferences": [controlled_by("Job", "uid-two-t1")],
        },
        "spec": {"nodeName": "node0"},
        "status": {"phase": "Pending"},
    }


async def test_a_lone_pod_looks_for_no_groups() -> None:
    cache = Cache()
    cache.apply("finetunejobs", document("one"))
    cache.apply("finetunejobs", several("two", phase="Queued", conditions=ready(), observedGeneration=1))
    assert (await seen(cache)).groups == ()


@pytest.mark.parametrize(("profile", "seconds"), [({}, 600), ({"startTimeout": "2m"}, 120)])
def test_a_group_waits_ten_minutes_for_its_nodes_unless_the_profile_says_otherwise(
    profile: dict[str, Any], seconds: float
) -> None:
    assert resolved(TWO_NODES, profile=profile).limits.start_seconds == seconds


def test_when_one_of_five_hundred_leaves_a_dozen_of_those_that_wait_say_so() -> None:
    """Each change of words is a write, within a minute."""
    told = [decide(world(GO, groups=waiting(count), **SEVERAL), now=NOW).status for count in range(1, 501)]
    words = [status.message.partition(" ")[0] for status in told if status is not None and status.message]
    assert words[:4] == ["ns/0", "2", "3", "4"]
    assert [status.message for status in told if status is not None][7] == (
        "8 to 15 others need several nodes, too, and are first; groups of a namespace start one after the other"
    )
    assert len({status.message for status in told if status is not None}) == 10
