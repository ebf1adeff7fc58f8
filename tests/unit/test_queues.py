"""spec.queue: Kueue decides when a Job runs, and the status says in its words why not yet."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.test_decide import (
    GO,
    NOW,
    SPEC,
    TRAINING,
    Row,
    p,
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

from finetune_api.contract import QueueConfig
from finetune_operator.decide import decide
from finetune_operator.verdict import reason_of
from finetune_operator.views import Admission, Child, parse_time

QUEUED: dict[str, Any] = {**SPEC, "queue": {"name": "team-a"}}
HELD = {"subject": subject(QUEUED), "pinned": {1: pinned(QUEUED)}}
KEY = pinned(QUEUED).key


def says(words: str, *, stuck: bool = False) -> dict[str, Any]:
    """Kueue, of the Job that waits."""
    return {"kueue": True, "admissions": {waiting().uid: Admission(words, stuck)}}


def waiting(**changes: Any) -> Child:
    return t(queue="team-a", suspended=True, key=KEY, **changes)


def through_preflight() -> dict[str, Any]:
    """The profile sends preflight Jobs through the queue, too."""
    made = pinned(QUEUED)
    queue = QueueConfig(name="team-a", preflight=True)
    pods = made.config.pods.model_copy(update={"queue": queue})
    return {
        "subject": subject(QUEUED),
        "pinned": {1: replace(made, config=made.config.model_copy(update={"pods": pods}))},
    }


ROWS = [
    Row("its Job is begun where there is a Kueue", world(GO, kueue=True, **HELD), "Queued", "PodsPending", "begin t1"),
    Row(
        "and is not where there is none",
        world(GO, **HELD),
        "Pending",
        "KueueNotInstalled",
        says="queue team-a: Kueue is not installed; install it, or name no queue",
        stalled=True,
        passed="True",
        again=30.0,
    ),
    Row(
        "once Kueue is installed it is begun by itself",
        world(said("Pending", "KueueNotInstalled", passed="True"), kueue=True, **HELD),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "a Job that Kueue has not looked at yet is asked about soon",
        world(GO, waiting(), kueue=True, **HELD),
        "Queued",
        "WaitingForQueue",
        says="queue team-a: Kueue has not seen the Job yet",
        again=5.0,
    ),
    Row(
        "so is one of which it has said nothing yet",
        world(GO, waiting(), **says(""), **HELD),
        "Queued",
        "WaitingForQueue",
        says="queue team-a: Kueue has not decided yet",
        again=5.0,
    ),
    Row(
        "one that it never looks at needs somebody",
        world(GO, waiting(created=NOW - timedelta(minutes=2)), kueue=True, **HELD),
        "Queued",
        "Inadmissible",
        says=f"queue team-a: Kueue makes no Workload of Job {waiting().name}: it is down",
        stalled=True,
        again=60.0,
    ),
    Row(
        "where there is no such queue, somebody has to mend something",
        world(GO, waiting(), **says("LocalQueue team-a doesn't exist", stuck=True), **HELD),
        "Queued",
        "Inadmissible",
        says="queue team-a: LocalQueue team-a doesn't exist",
        stalled=True,
        again=60.0,
    ),
    Row(
        "then Kueue's own words are passed on, and it is asked seldom",
        world(GO, waiting(), **says("insufficient unused quota"), **HELD),
        "Queued",
        "WaitingForQueue",
        says="queue team-a: insufficient unused quota",
        again=60.0,
    ),
    Row(
        "one that has lost its place waits like that, too",
        world(TRAINING, waiting(), **says("Preempted to accommodate another"), **HELD),
        "Queued",
        "WaitingForQueue",
        says="Preempted to accommodate another",
    ),
    Row(
        "while its pods commit a checkpoint it is stopping",
        world(
            TRAINING,
            waiting(),
            pod(waiting(), gone_by=t().created.replace(year=2030), was_asked_to_go=True),
            kueue=True,
            **HELD,
        ),
        "Training",
        "Stopping",
    ),
    Row(
        "a Kueue that was removed while a Job waits is missed",
        world(GO, waiting(), **HELD),
        "Queued",
        "KueueNotInstalled",
        stalled=True,
    ),
    Row(
        "a Job that somebody deletes while it waits is made anew without a look",
        world(said("Queued", "WaitingForQueue", passed="True"), kueue=True, **HELD),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "so is one that was deleted because there is no Kueue any more, once there is",
        world(said("Queued", "KueueNotInstalled", passed="True"), kueue=True, **HELD),
        "Queued",
        "PodsPending",
        "begin t1",
    ),
    Row(
        "a preflight that somebody suspends is queued",
        world(None, p(suspended=True)),
        "Queued",
        "JobSuspended",
        passed="Unknown",
    ),
    Row(
        "a Kueue that holds what names no queue is told in its words",
        world(GO, t(suspended=True), kueue=True, admissions={t().uid: Admission("LocalQueue  doesn't exist", True)}),
        "Queued",
        "JobSuspended",
        says="Kueue holds Job one-11111-t1, which names no queue (LocalQueue  doesn't exist); name one as spec.queue "
        "or in the profile",
    ),
    Row(
        "of a Job that somebody else suspends it says nothing",
        world(GO, t(suspended=True), kueue=True),
        "Queued",
        "JobSuspended",
        says="Job one-11111-t1 is suspended by the cluster",
    ),
    Row(
        "and is made anew when somebody deletes it",
        world(said("Queued", "JobSuspended", run=None)),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "one that is to go through the queue is not begun without a Kueue",
        world(None, **through_preflight()),
        "Pending",
        "KueueNotInstalled",
        stalled=True,
        passed="Unknown",
    ),
    Row(
        "and is begun with one",
        world(None, kueue=True, **through_preflight()),
        "Preflight",
        "Checking",
        "begin p1",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_fact(row: Row) -> None:
    decision = settled(row.given)
    status = decision.status
    assert status is not None
    assert short(decision) == row.does
    assert (status.phase, reason_of(status)) == (row.phase, row.reason), status.message
    assert row.says in (status.message or "")
    assert truth(status, "Stalled") == str(row.stalled)
    if row.again is not None:
        assert decision.again_after == pytest.approx(row.again)
    if row.passed is not None:
        assert truth(status, "PreflightPassed") == row.passed


def test_what_kueue_says_is_told_at_once() -> None:
    before = settled(world(GO, waiting(), kueue=True, **HELD)).status
    assert before is not None
    given = world(before, waiting(), **says("insufficient unused quota"), **HELD)
    given = replace(given, subject=replace(HELD["subject"], status=before), last_write=NOW - timedelta(seconds=5))
    after = decide(given, now=NOW).status
    assert after is not None
    assert after.message == "queue team-a: insufficient unused quota"
    given = replace(given, subject=replace(given.subject, status=after))
    assert decide(given, now=NOW).status is None, "the same words are no change"


def queue_of(spec: dict[str, Any], profile: dict[str, Any]) -> QueueConfig | None:
    return resolved({**SPEC, **spec}, profile=profile).pods.queue


def test_the_jobs_queue_counts_before_the_profiles() -> None:
    theirs = {"queue": {"name": "all", "workloadPriorityClass": "low"}}
    assert queue_of({}, {}) is None
    assert queue_of({}, theirs) == QueueConfig(name="all", priority="low")
    assert queue_of({"queue": {"name": "mine"}}, theirs) == QueueConfig(name="mine")


def test_whether_preflight_waits_is_the_platforms_word_whatever_the_queue() -> None:
    theirs = {"queue": {"name": "all", "preflight": True}}
    assert queue_of({"queue": {"name": "mine"}}, theirs) == QueueConfig(name="mine", preflight=True)


def test_another_queue_begins_another_attempt() -> None:
    assert pinned(QUEUED).key != pinned({**SPEC, "queue": {"name": "team-b"}}).key != pinned().key


@pytest.mark.parametrize(
    ("condition", "suspended_at", "released"),
    [
        (None, None, "2026-03-01T10:00:00Z"),
        ({"status": "True"}, "2026-03-01T11:00:00Z", "2026-03-01T10:00:00Z"),
        ({"status": "False"}, None, "2026-03-01T11:00:00Z"),
    ],
    ids=["never suspended", "suspended", "resumed"],
)
def test_a_job_tells_since_when_it_is_suspended_and_since_when_it_is_not(
    condition: dict[str, str] | None, suspended_at: str | None, released: str
) -> None:
    said_then = {"type": "Suspended", "lastTransitionTime": "2026-03-01T11:00:00Z"}
    made = {"name": "one-t1", "uid": "u", "creationTimestamp": "2026-03-01T10:00:00Z"}
    raw = {"metadata": made, "status": {"conditions": [{**said_then, **condition}] if condition else []}}
    child = Child.of(raw)
    assert (child.suspended_at, child.released) == (parse_time(suspended_at), parse_time(released))
