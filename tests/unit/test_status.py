"""Conditions as kstatus reads them, their times, and which status is worth a write."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.status import CheckpointStatus, FineTuneJobStatus, Ongoing, ProgressStatus, Usage
from finetune_operator.status import compose, notes, worth_writing
from finetune_operator.verdict import Mark, Verdict, condition, mark_of, reason_of
from finetune_operator.views import Subject, format_time

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)


def subject(status: FineTuneJobStatus | None = None, *, generation: int = 1) -> Subject:
    return Subject(
        namespace="ns",
        name="one",
        uid="u",
        generation=generation,
        resource_version="1",
        created=NOW,
        deleting=False,
        retry=None,
        spec={},
        status=status or FineTuneJobStatus(),
    )


def told(verdict: Verdict, before: FineTuneJobStatus | None = None, *, at: datetime = NOW) -> FineTuneJobStatus:
    return compose(subject(before), verdict, now=at)


def truths(status: FineTuneJobStatus) -> dict[str, str]:
    return {c.type: c.status for c in status.conditions or []}


RUNNING = Verdict("Training", "Training", "step 1 of 9")
STALLED = Verdict("Pending", "BucketNotFound", "no bucket", stalled=True)


def kstatus(status: FineTuneJobStatus, *, generation: int) -> str:
    """How kstatus reads a custom resource: the rules of its generic part."""
    if status.observed_generation != generation:
        return "InProgress"
    found = truths(status)
    if found.get("Reconciling") == "True":
        return "InProgress"
    return "Failed" if found.get("Stalled") == "True" else "Current"


@pytest.mark.parametrize(
    ("verdict", "reading", "succeeded"),
    [
        (RUNNING, "InProgress", "Unknown"),
        (Verdict("Queued", "Unschedulable", "no node"), "InProgress", "Unknown"),
        (STALLED, "Failed", "Unknown"),
        (Verdict("Failed", "ColumnMissing", "no column"), "Failed", "False"),
        (Verdict("Succeeded", "Trained", "done"), "Current", "True"),
        (Verdict("Suspended", "Suspending", "a checkpoint is committed"), "InProgress", "Unknown"),
        (Verdict("Suspended", "Suspended", "suspended at step 3"), "Current", "Unknown"),
    ],
)
def test_kstatus_reads_what_is_meant(verdict: Verdict, reading: str, succeeded: str) -> None:
    status = told(verdict)
    assert kstatus(status, generation=1) == reading
    assert truths(status)["Succeeded"] == succeeded
    assert kstatus(status, generation=2) == "InProgress"


def test_all_seven_conditions_are_always_there_and_speak_of_the_generation() -> None:
    status = compose(subject(generation=4), RUNNING, now=NOW)
    assert [c.type for c in status.conditions or []] == [
        "Accepted",
        "PreflightPassed",
        "Evaluated",
        "Succeeded",
        "Suspended",
        "Reconciling",
        "Stalled",
    ]
    assert {c.observed_generation for c in status.conditions or []} == {4} == {status.observed_generation}


def test_a_transition_time_moves_only_with_the_truth() -> None:
    first = told(RUNNING)
    second = told(Verdict("Training", "Other", "step 2 of 9"), first, at=LATER)
    kept = condition(second, "Succeeded")
    assert kept is not None
    assert (kept.reason, kept.last_transition_time) == ("Other", format_time(NOW))
    third = told(Verdict("Succeeded", "Trained", "done"), second, at=LATER)
    moved = condition(third, "Succeeded")
    assert moved is not None
    assert moved.last_transition_time == format_time(LATER)


def test_what_a_verdict_does_not_speak_of_stays() -> None:
    passed = told(
        RUNNING.marking(PreflightPassed=Mark("True", "Fresh", "go")).stating(checkpoint=CheckpointStatus(step=3))
    )
    status = told(RUNNING, passed)
    assert mark_of(subject(status), "PreflightPassed") == Mark("True", "Fresh", "go")
    assert status.checkpoint == CheckpointStatus(step=3)


def test_only_what_trains_says_when_it_will_be_done() -> None:
    done_at = format_time(NOW + timedelta(minutes=4))
    progress = ProgressStatus(step=5, total_steps=9, percent=55, estimated_completion_time=done_at)
    facts = {"progress": progress}
    assert told(Verdict("Training", "Training", "step 5 of 9", facts=facts)).progress == progress
    before = FineTuneJobStatus(phase="Training", progress=progress)
    for phase in ("Queued", "Starting", "Suspended", "Failed"):
        after = told(Verdict(phase, "Words", "words"), before).progress
        assert after == ProgressStatus(step=5, total_steps=9, percent=55)


def test_what_was_said_of_another_generation_is_not_said_of_this_one() -> None:
    passed = told(RUNNING.marking(PreflightPassed=Mark("True", "Fresh", "go")))
    assert mark_of(subject(passed, generation=2), "PreflightPassed") is None
    status = compose(subject(passed, generation=2), RUNNING, now=NOW)
    assert truths(status)["PreflightPassed"] == "Unknown"


def test_the_same_again_is_not_written() -> None:
    status = told(RUNNING)
    assert told(RUNNING, status, at=LATER) == status
    assert not worth_writing(status, told(RUNNING, status, at=LATER), now=LATER, last_write=None)


def moved(status: FineTuneJobStatus, **changes: Any) -> FineTuneJobStatus:
    return status.model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "seconds", "written"),
    [
        ({"message": "step 2 of 9"}, 30, False),
        ({"message": "step 2 of 9"}, 60, True),
        ({"progress": ProgressStatus(step=2, total_steps=9, percent=22)}, 11, True),
        ({"progress": ProgressStatus(step=2, total_steps=9, percent=22)}, 9, False),
        ({"checkpoint": CheckpointStatus(step=2)}, 11, True),
        ({"checkpoint": CheckpointStatus(step=2)}, 9, False),
        ({"phase": "Evaluating"}, 0, True),
        ({"last_handled_retry": "x"}, 0, True),
    ],
)
def test_mere_progress_waits_and_all_else_is_written_at_once(
    changes: dict[str, Any], seconds: int, written: bool
) -> None:
    before = told(RUNNING)
    after = moved(before, **changes)
    last = NOW - timedelta(seconds=seconds)
    assert worth_writing(before, after, now=NOW, last_write=last) is written
    assert worth_writing(before, after, now=NOW, last_write=None)


def test_that_pods_are_looked_for_is_no_news_to_who_knows_that_the_run_may_begin() -> None:
    before = told(Verdict("Queued", "PreflightPassed", "the run may begin"))
    after = moved(told(Verdict("Queued", "PodsPending", "waiting for a node"), before), usage=Usage(attempts=1))
    for seconds, written in ((59, False), (60, True)):
        last = NOW - timedelta(seconds=seconds)
        assert worth_writing(before, after, now=NOW, last_write=last) is written
    no_room = told(Verdict("Queued", "Unschedulable", "no node has room"), before)
    assert worth_writing(before, no_room, now=NOW, last_write=NOW)
    assert worth_writing(after, no_room, now=NOW, last_write=NOW)


def test_a_container_that_starts_at_once_is_told_with_what_follows() -> None:
    before = told(Verdict("Queued", "PreflightPassed", "the run may begin"))
    starting = told(Verdict("Starting", "PodsStarting", "the node starts it"), before)
    assert not worth_writing(before, starting, now=NOW, last_write=NOW - timedelta(hours=1), brief=True)
    assert worth_writing(before, starting, now=NOW, last_write=NOW)
    trouble = told(Verdict("Queued", "Unschedulable", "no node has room"))
    assert worth_writing(trouble, starting, now=NOW, last_write=NOW, brief=True)  # that it is over is news


def test_what_an_attempt_takes_is_told_with_what_is_written_anyway() -> None:
    def after(seconds: int) -> FineTuneJobStatus:
        taken = Ongoing(attempt=1, gpu_seconds=seconds, running_seconds=seconds)
        return moved(told(RUNNING), usage=Usage(gpu_seconds=seconds, running_seconds=seconds, ongoing=taken))

    assert not worth_writing(after(10), after(9999), now=LATER, last_write=NOW)
    assert not worth_writing(after(10), after(9999), now=LATER, last_write=None)
    assert worth_writing(after(10), moved(after(20), phase="Evaluating"), now=NOW, last_write=NOW)
    assert worth_writing(after(10), moved(after(20), message="step 2 of 9"), now=LATER, last_write=NOW)
    assert not worth_writing(after(10), moved(after(20), message="step 2 of 9"), now=NOW, last_write=NOW)


def test_a_restarted_operator_writes_no_sooner_than_the_one_before_would_have() -> None:
    wrote = ProgressStatus(step=1, total_steps=9, percent=11, updated_at=format_time(NOW))
    before = moved(told(RUNNING), progress=wrote)
    after = moved(before, progress=wrote.model_copy(update={"step": 2, "percent": 22}))
    for seconds, written in ((9, False), (11, True)):
        assert worth_writing(before, after, now=NOW + timedelta(seconds=seconds), last_write=None) is written
    assert worth_writing(before, after, now=NOW - timedelta(seconds=1), last_write=None)  # its clock goes wrong


def test_a_clock_that_is_set_back_holds_no_progress_up() -> None:
    before = told(RUNNING)
    after = moved(before, progress=ProgressStatus(step=2, total_steps=9, percent=22))
    assert worth_writing(before, after, now=NOW, last_write=NOW + timedelta(hours=1))


def test_many_trainings_share_the_writes_of_mere_progress() -> None:
    before = told(RUNNING)
    after = moved(before, progress=ProgressStatus(step=2, total_steps=9, percent=22))
    for seconds, written in ((99, False), (100, True)):
        last = NOW - timedelta(seconds=seconds)
        assert worth_writing(before, after, now=NOW, last_write=last, trainings=500) is written
    assert worth_writing(before, moved(before, phase="Evaluating"), now=NOW, last_write=NOW, trainings=500)


def test_an_event_is_told_for_a_new_reason_and_for_an_end_only() -> None:
    before = told(RUNNING)
    assert notes(before, told(Verdict("Training", "Training", "step 2 of 9"), before)) == ()
    assert notes(before, told(Verdict("Evaluating", "Evaluating", "evaluating"), before)) == ()  # an ordinary step
    for reason in ("Checking", "PreflightPassed"):
        assert notes(FineTuneJobStatus(), told(Verdict("Preflight", reason, "an ordinary step, too"))) == ()
    assert notes(told(STALLED), told(RUNNING)) != ()  # that trouble is over
    (note,) = notes(before, told(STALLED, before))
    assert (note.kind, note.reason, note.message) == ("Warning", "BucketNotFound", "no bucket")
    (note,) = notes(before, told(Verdict("Succeeded", "Trained", "done"), before))
    assert note.kind == "Normal"
    stops = told(Verdict("Training", "BudgetExhausted", "0.5 GPU hours are used"))
    assert notes(stops, told(Verdict("Queued", "BudgetExhausted", "the attempt before ends"), stops)) == ()
    crashed = told(Verdict("Starting", "Crashed", "exit code 1; going on from step 0"))
    (note,) = notes(crashed, told(Verdict("Failed", "Crashed", "exit code 1"), crashed))
    assert (note.kind, note.message) == ("Warning", "exit code 1")
    (note,) = notes(stops, told(Verdict("Pending", "BudgetExhausted", "refused", stalled=True), stops))
    assert note.kind == "Warning"


def test_texts_are_cut_to_what_the_schema_takes() -> None:
    status = told(Verdict("Failed", "X" * 200, "m" * 5000))
    assert len(status.message or "") == 2048
    assert len(reason_of(status)) == 128
    FineTuneJobStatus.model_validate(status.document())
