"""From a verdict to the status: conditions as kstatus reads them, transition times, and whether a write is worth it."""

from datetime import datetime, timedelta

from finetune_api.status import Condition, FineTuneJobStatus
from finetune_operator.policies.waiting import TOLD
from finetune_operator.policies.ways import SUSPENDED
from finetune_operator.verdict import Mark, Note, Verdict, condition, mark_of, reason_of
from finetune_operator.views import Subject, format_time

NEVER_WITHIN = timedelta(seconds=10)
AT_LEAST_EVERY = timedelta(seconds=60)


def compose(subject: Subject, verdict: Verdict, *, now: datetime) -> FineTuneJobStatus:
    """The status that says the verdict; what the verdict does not speak of stays as it was."""
    marks = {**_lasting(subject), **verdict.marks, **_derived(verdict)}
    conditions = [_condition(subject, kind, mark, now=now) for kind, mark in marks.items()]
    return subject.status.model_copy(
        update={
            **verdict.facts,
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
        "Stalled": Mark("True", reason, message) if stalled else Mark("False", "Progressing", ""),
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
    before: FineTuneJobStatus, after: FineTuneJobStatus, *, now: datetime, last_write: datetime | None
) -> bool:
    """Every change at once, but mere progress only by the percent, the checkpoint or the minute, ten seconds apart."""
    if before == after:
        return False
    if _loud(before) != _loud(after) or last_write is None:
        return True
    if now - last_write < NEVER_WITHIN:
        return False
    moved = _percent(before) != _percent(after) or before.checkpoint != after.checkpoint
    return moved or now - last_write >= AT_LEAST_EVERY


def _loud(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The status without what changes with every step."""
    conditions = [c.model_copy(update={"message": ""}) for c in status.conditions or []]
    message = status.message if reason_of(status) in TOLD else None
    quiet = {"message": message, "progress": None, "checkpoint": None, "conditions": conditions}
    return status.model_copy(update=quiet)


def _percent(status: FineTuneJobStatus) -> int | None:
    return status.progress.percent if status.progress else None


def notes(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Note, ...]:
    """One Event for each new phase or reason; the event's reason is the condition's."""
    if (before.phase, reason_of(before)) == (after.phase, reason_of(after)):
        return ()
    stalled = condition(after, "Stalled")
    bad = after.phase == "Failed" or (stalled is not None and stalled.status == "True")
    return (Note("Warning" if bad else "Normal", reason_of(after) or str(after.phase), after.message or ""),)
