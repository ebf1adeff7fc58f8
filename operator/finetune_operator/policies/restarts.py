"""When is the next try, and what did the last one cost?"""

from datetime import datetime, timedelta
from typing import Any

from finetune_api.job import FineTuneJobStatus, Restart, Usage
from finetune_operator.policies.endings import End, Kind
from finetune_operator.verdict import Observed
from finetune_operator.views import Child, Counters, format_time

LONGEST = timedelta(minutes=10)
SETTLED = timedelta(minutes=10)
"""An attempt that lasted this long proves that the environment had come back."""
FREE_WITHOUT_PROGRESS = 10
KEPT = 10


def _doubled(seconds: float, times: int) -> timedelta:
    return min(timedelta(seconds=seconds) * float(2 ** min(times, 10)), LONGEST)


def environment_delay(tries: int) -> timedelta:
    """10 s, doubled by each try, at most ten minutes."""
    return _doubled(10.0, tries)


def fenced_delay(tries: int) -> timedelta:
    """A minute, doubled by each try, at most ten minutes: the holder should get the time to finish."""
    return _doubled(60.0, tries)


def crash_delay(failures: int) -> timedelta:
    """5 s, doubled by each crash before, at most ten minutes."""
    return _doubled(5.0, failures)


def free_delay(in_vain: int) -> timedelta:
    """None at first; attempts that won no step wait longer and longer."""
    return timedelta(0) if in_vain == 0 else crash_delay(in_vain - 1)


def lost_delay(tries: int) -> timedelta:
    """None at first: the work is done, as a rule. A container that never says anything is no reason to hurry."""
    return timedelta(0) if tries == 0 else environment_delay(tries - 1)


def after(child: Child, end: End) -> Counters:
    """What the next child Job carries."""
    before = child.counters
    if end.kind is Kind.CRASH:
        return Counters(failures=before.failures + 1, tries=0)
    if end.kind in (Kind.ENVIRONMENT, Kind.FENCED, Kind.LOST):
        settled = end.at - child.created > SETTLED
        return Counters(failures=before.failures, tries=1 if settled else before.tries + 1)
    return Counters(failures=before.failures, tries=0)


def in_vain(status: FineTuneJobStatus, *, committed: int) -> int:
    """How many of the last restarts in a row began at the step that is still the last committed one."""
    count = 0
    for restart in reversed(status.restarts or []):
        if restart.resumed_from_step != committed:
            break
        count += 1
    return count


def committed_step(o: Observed, end: End | None) -> int:
    """The last committed step as far as anybody said."""
    said = end.last.step if end is not None and end.last is not None else None
    checkpoint = o.subject.status.checkpoint
    return max(said or 0, checkpoint.step if checkpoint else 0)


def recorded(o: Observed, child: Child, end: End, *, began: datetime, gpus: int) -> dict[str, Any]:
    """The status fields that tell of an ended attempt; empty when they do so already."""
    status = o.subject.status
    restarts = list(status.restarts or [])
    if any(restart.attempt == child.ordinal for restart in restarts):
        return {}
    committed = committed_step(o, end)
    seen = max(status.progress.step if status.progress else 0, committed)
    restart = Restart(
        attempt=child.ordinal,
        reason=end.reason[:64],
        at=format_time(end.at),
        resumed_from_step=committed,
        lost_steps=seen - committed,
    )
    usage = used(status, began=began, ended=end.at, gpus=gpus)
    usage = usage.model_copy(update={"lost_steps": (usage.lost_steps or 0) + seen - committed})
    return {"restarts": [*restarts, restart][-KEPT:], "usage": usage}


def lost(o: Observed, *, now: datetime) -> dict[str, Any]:
    """The same for an attempt whose Job vanished before anybody looked; empty when no attempt had begun."""
    status = o.subject.status
    begun = status.run is not None and status.run.started_at is not None
    attempt = (status.usage.attempts if status.usage else None) or 0
    if not begun or any(restart.attempt == attempt for restart in status.restarts or []):
        return {}
    committed = committed_step(o, None)
    seen = max(status.progress.step if status.progress else 0, committed)
    restart = Restart(
        attempt=attempt,
        reason="JobLost",
        at=format_time(now),
        resumed_from_step=committed,
        lost_steps=seen - committed,
    )
    return {"restarts": [*(status.restarts or []), restart][-KEPT:]}


def used(status: FineTuneJobStatus, *, began: datetime, ended: datetime, gpus: int) -> Usage:
    """The usage with this attempt's GPU seconds added."""
    usage = status.usage or Usage()
    seconds = max(0, int((ended - began).total_seconds())) * gpus
    return usage.model_copy(update={"gpu_seconds": (usage.gpu_seconds or 0) + seconds})
