"""A train Job that is gone, deleted by somebody: preflight asks storage what it left, at once only the first time.

One that had ended may be deleted as well, by ttlAfterFinished for instance: what was to follow its end still does.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from finetune_operator.policies.accept import Target
from finetune_operator.policies.attempt import BESIDE
from finetune_operator.policies.restarts import FREE_WITHOUT_PROGRESS, LONGEST, free_delay, no_progress
from finetune_operator.policies.ways import JOB_LOST
from finetune_operator.verdict import Mark, Observed, Verdict, mark_of, reason_of
from finetune_operator.views import format_time, told_time

GONE = "the train Job is gone"


def gone(o: Observed, cost: Mapping[str, Any], *, now: datetime) -> Verdict:
    """Told before anything else is done, with what follows: while it rests nothing else is written. `cost` are the
    fields of the status that say so."""
    due = _due(o.knowing(cost), now=now)
    then = f"next try at {format_time(due)}" if now < due else "storage is asked what it has left"
    return _looking(o, f"{GONE}; {then}", again_after=0.0).stating(**cost, preflight_job=None)


def vanished(o: Observed, target: Target, *, now: datetime) -> Verdict | None:
    """None when preflight may look."""
    resting = _resting(o, target, now=now)
    if resting is not None:
        return resting
    status = o.subject.status
    last = next(reversed(status.restarts or []), None)
    attempts = status.usage.attempts if status.usage else None
    if last is None or last.reason != JOB_LOST.reason or last.attempt != attempts or o.jobs("preflight"):
        return None
    if _interruptions(o) >= FREE_WITHOUT_PROGRESS:
        return no_progress(o, GONE)
    due = _due(o, now=now)
    if now >= due:
        return None
    return _looking(o, f"{GONE}; next try at {format_time(due)}", again_after=(due - now).total_seconds())


def _resting(o: Observed, target: Target, *, now: datetime) -> Verdict | None:
    """As it was told when the last attempt ended, while it rests. The next one begins with a preflight."""
    status = o.subject.status
    due = told_time(status.run.next_at) if status.run is not None else None
    before = o.pinned.get(status.run.generation) if status.run is not None else None
    if due is None or before is None or before.key != target.key or not now < due <= now + LONGEST:
        return None
    message = (status.message or "").partition(BESIDE)[0]
    return Verdict("Starting", reason_of(status), message, again_after=(due - now).total_seconds())


def _due(o: Observed, *, now: datetime) -> datetime:
    """When storage is asked, after the last attempt was lost."""
    last = next(reversed(o.subject.status.restarts or []), None)
    at = told_time(last.at) if last is not None else None
    return (at or now) + free_delay(_interruptions(o))


def _interruptions(o: Observed) -> int:
    run = o.subject.status.run
    return (run.interruptions if run else None) or 0


def _looking(o: Observed, message: str, *, again_after: float) -> Verdict:
    verdict = Verdict("Preflight", JOB_LOST.reason, message, again_after=again_after)
    known = mark_of(o.subject, "PreflightPassed")
    if known is not None and known.status == "False":  # of a changed document: that stands
        return verdict
    return verdict.marking(PreflightPassed=Mark("Unknown", JOB_LOST.reason, message))
