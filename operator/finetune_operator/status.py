"""From a verdict to the status: conditions as kstatus reads them, transition times, and whether a write is worth it."""

from datetime import datetime, timedelta

from finetune_api.status import Condition, FineTuneJobStatus, Usage
from finetune_operator.policies.waiting import PENDING, STARTING, TOLD
from finetune_operator.policies.ways import SUSPENDED
from finetune_operator.verdict import PASSED, Mark, Note, Verdict, condition, mark_of, reason_of
from finetune_operator.views import Subject, format_time, told_time

NEVER_WITHIN = timedelta(seconds=10)
AT_LEAST_EVERY = timedelta(seconds=60)
STEPS = ("", "Checking", PASSED, PENDING.reason, STARTING.reason, "Loading", "Training", "Evaluating", "Publishing")
"""Reasons of a job that goes as it should, from none at the beginning to the last before its end."""
BUT_USAGE = tuple(name for name in FineTuneJobStatus.model_fields if name != "usage")
LOUD = tuple(name for name in BUT_USAGE if name not in ("message", "progress", "checkpoint", "conditions"))
"""Fields of the status whose every change is news."""
PROGRESS_WRITES = 5.0
"""Of mere progress, a second, of all FineTuneJobs together."""


def compose(subject: Subject, verdict: Verdict, *, now: datetime) -> FineTuneJobStatus:
    """The status that says the verdict; what the verdict does not speak of stays as it was."""
    marks = {**_lasting(subject), **verdict.marks, **_derived(verdict)}
    conditions = [_condition(subject, kind, mark, now=now) for kind, mark in marks.items()]
    facts = dict(verdict.facts)
    usage = facts.get("usage", subject.status.usage)
    if usage is not None and (verdict.final or verdict.reason == SUSPENDED.reason):  # nothing goes on any more
        facts["usage"] = usage.model_copy(update={"ongoing": None})
    progress = facts.get("progress", subject.status.progress)
    if progress is not None and verdict.phase != "Training":
        facts["progress"] = progress.model_copy(update={"estimated_completion_time": None})
    run = facts.get("run", subject.status.run)
    if run is not None and run.next_at is not None and verdict.phase != "Starting":
        facts["run"] = run.model_copy(update={"next_at": None})
    return subject.status.model_copy(
        update={
            **facts,
            "observed_generation": subject.generation,
            "phase": verdict.phase,
            "message": verdict.message[:2048],
            "conditions": conditions,
        }
    )


def _lasting(subject: Subject) -> dict[str, Mark]:
    return {
        "Accepted": mark_of(subject, "Accepted") or Mark("True", "Resolved", "the document is resolved and pinned"),
        "PreflightPassed": mark_of(subject, "PreflightPassed") or Mark("Unknown", "NotYet", "not looked at yet"),
        "Evaluated": mark_of(subject, "Evaluated") or Mark("Unknown", "NotYet", "not evaluated yet"),
    }


def _derived(verdict: Verdict) -> dict[str, Mark]:
    """Succeeded is Unknown while it may still happen. Stalled and Reconciling are never True together.

    Suspended is True once nothing runs any more, and then nothing is on its way either.
    """
    reason, message = verdict.reason, verdict.message
    succeeded = {"Succeeded": "True", "Failed": "False"}.get(verdict.phase, "Unknown")
    stalled = verdict.stalled or verdict.phase == "Failed"
    suspended = reason == SUSPENDED.reason
    working = not stalled and not verdict.final and not suspended
    return {
        "Succeeded": Mark(succeeded, reason, message),  # type: ignore[arg-type]
        "Suspended": Mark("True", reason, message) if suspended else Mark("False", "NotSuspended", ""),
        "Reconciling": Mark("True" if working else "False", reason, message),
        "Stalled": Mark("True", verdict.stalled_by or reason, message) if stalled else Mark("False", "Progressing", ""),
    }


def _condition(subject: Subject, kind: str, mark: Mark, *, now: datetime) -> Condition:
    before = condition(subject.status, kind)
    kept = before is not None and before.status == mark.status
    return Condition(
        type=kind,
        status=mark.status,
        reason=mark.reason[:128],
        message=mark.message[:2048],
        last_transition_time=before.last_transition_time if before and kept else format_time(now),
        observed_generation=subject.generation,
    )


def worth_writing(
    before: FineTuneJobStatus,
    after: FineTuneJobStatus,
    *,
    now: datetime,
    last_write: datetime | None,
    trainings: int = 1,
    brief: bool = False,
) -> bool:
    """Every change at once, but mere progress only by the percent, the checkpoint or the minute, ten seconds apart.

    Further apart where so many trainings go on that together they would write more often than PROGRESS_WRITES. What is
    `brief` is told with what follows, if nothing went wrong before.
    """
    if _same(before, after) or (brief and (_waits_for_pods(before) or _starts(before))):
        return False
    ours = last_write is not None and last_write <= now  # or the clock was set back since
    last = last_write if ours else _told_at(before, now=now)
    if not mere_progress(before, after) or last is None:
        return True
    apart = max(NEVER_WITHIN, timedelta(seconds=trainings / PROGRESS_WRITES))
    if now - last < apart:
        return False
    moved = _percent(before) != _percent(after) or before.checkpoint != after.checkpoint
    return moved or now - last >= max(AT_LEAST_EVERY, apart)


def mere_progress(before: FineTuneJobStatus, after: FineTuneJobStatus) -> bool:
    """Whether they differ in nothing else."""
    alike = _waits_for_pods(before) and _waits_for_pods(after)
    return _loud(before, alike=alike) == _loud(after, alike=alike)


def _same(before: FineTuneJobStatus, after: FineTuneJobStatus) -> bool:
    """But for what an attempt that goes on takes: with each second more, and told when something else is."""
    was, is_now = before.usage, after.usage
    usage = was is is_now or (was.settled if was else None) == (is_now.settled if is_now else None)
    return usage and all(getattr(before, name) == getattr(after, name) for name in BUT_USAGE)


def _told_at(status: FineTuneJobStatus, *, now: datetime) -> datetime | None:
    """About when the progress in a status was written, perhaps by an operator before this one."""
    at = told_time(status.progress.updated_at) if status.progress else None
    return at if at is not None and at <= now else None


def _waits_for_pods(status: FineTuneJobStatus) -> bool:
    """That the train Job is made meanwhile is told with what follows, which the pods' own state says."""
    return status.phase == "Queued" and reason_of(status) in (PASSED, PENDING.reason)


def _starts(status: FineTuneJobStatus) -> bool:
    return status.phase == "Starting" and reason_of(status) == STARTING.reason


def _loud(status: FineTuneJobStatus, *, alike: bool) -> tuple[object, ...]:
    """The status without what changes with every step, nor, if `alike`, with the attempt's beginning."""
    conditions = [
        (c.type, c.status, None if alike else c.reason, c.last_transition_time, c.observed_generation)
        for c in status.conditions or []
    ]
    usage = None if status.usage is None else status.usage.settled
    if alike:
        usage = (usage or Usage()).model_copy(update={"attempts": None})
    message = status.message if reason_of(status) in TOLD else None
    return (message, conditions, usage, *(getattr(status, name) for name in LOUD))


def _percent(status: FineTuneJobStatus) -> int | None:
    return status.progress.percent if status.progress else None


def notes(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Note, ...]:
    """One Event for each new reason, and for each end; the event's reason is the condition's.

    None for one ordinary step after another: the status tells them while they last, and nobody asks for them later.
    """
    goes_on = after.phase not in ("Succeeded", "Failed") and _bad(before) == _bad(after)
    if _reason(before) == _reason(after) and (goes_on or before.phase == after.phase):
        return ()
    if reason_of(after) in STEPS and reason_of(before) in STEPS:
        return ()
    return (Note("Warning" if _bad(after) else "Normal", _reason(after) or str(after.phase), after.message or ""),)


def _reason(status: FineTuneJobStatus) -> str:
    """Of what is bad why it is, which may be another reason than that of the phase."""
    stalled = condition(status, "Stalled")
    return stalled.reason if stalled is not None and stalled.status == "True" else reason_of(status)


def _bad(status: FineTuneJobStatus) -> bool:
    stalled = condition(status, "Stalled")
    return status.phase == "Failed" or (stalled is not None and stalled.status == "True")
