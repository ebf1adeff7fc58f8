"""When is the next try, how many are there, and what did the last one cost?"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api.status import CheckpointStatus, FineTuneJobStatus, ProgressStatus, Restart, RunStatus, Usage
from finetune_operator.policies.accept import Target
from finetune_operator.policies.endings import End
from finetune_operator.policies.ledger import Cost, with_attempt, with_cost
from finetune_operator.policies.ways import GATES_CHANGED, JOB_LOST, MESSAGE_LOST, OOM_KILLED, Kind
from finetune_operator.verdict import Observed, Verdict
from finetune_operator.views import Child, Counters, format_time, told_time

LONGEST = timedelta(minutes=10)
SETTLED = timedelta(minutes=10)
"""An attempt that lasted this long proves that the environment had come back."""
FREE_WITHOUT_PROGRESS = 10
KEPT = 10
NO_PROGRESS = "NoProgress"
ENDED_UNHEARD = (MESSAGE_LOST.reason, JOB_LOST.reason, GATES_CHANGED.reason)
"""Why storage is asked what an attempt has left behind, which may be all there is to do."""
INTERRUPTED = (Kind.FREE, Kind.LOST, Kind.MEMORY)
"""Not counted against retries.max, and therefore bounded by the steps that are won."""


# --- delays ---


def _doubled(seconds: float, times: int) -> timedelta:
    return min(timedelta(seconds=seconds) * float(2 ** min(times, 10)), LONGEST)


LEAST_BETWEEN = timedelta(seconds=10)


def environment_delay(tries: int) -> timedelta:
    """10 s, doubled by each try, at most ten minutes."""
    return _doubled(10.0, tries)


def fenced_delay(tries: int) -> timedelta:
    """A minute, doubled by each try, at most ten minutes: the holder should get the time to finish."""
    return _doubled(60.0, tries)


def crash_delay(failures: int) -> timedelta:
    """5 s, doubled by each crash before, at most ten minutes."""
    return _doubled(5.0, failures)


def free_delay(interruptions: int) -> timedelta:
    """None at first; attempts that won no step wait longer and longer. `interruptions` counts the one that ended."""
    return timedelta(0) if interruptions <= 1 else crash_delay(interruptions - 2)


def due_at(o: Observed, job: Child, end: End, delay: timedelta, *, now: datetime) -> datetime:
    """When the next try begins after an end: by the clock, and however far ahead that may be, not before the delay, or
    LEAST_BETWEEN where it is longer, has passed since the end became known. Nor later, where the clock that told of the
    end is ahead: it was over when it became known."""
    known_for = o.known_for.get(job.uid)
    if known_for is None:
        return max(_told_end(o, job, end) + delay, now)
    known = now - known_for
    return max(min(end.at, known) + delay, known + min(delay, LEAST_BETWEEN))


def _told_end(o: Observed, job: Child, end: End) -> datetime:
    """Of a pod that never ends, as its node is dead, nobody knows when it did: what was told first holds."""
    last = next(reversed(o.subject.status.restarts or []), None)
    told = told_time(last.at) if last is not None and job.role == "train" and last.attempt == job.ordinal else None
    return end.at if told is None else min(told, end.at)


def jitter(key: str) -> float:
    """From 0.5 to 1.5, always the same for the same key: a decision that is made again decides the same."""
    return 0.5 + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32


DELAYS: dict[Kind, Callable[[int], timedelta]] = {
    Kind.FREE: free_delay,
    Kind.MEMORY: free_delay,
    Kind.LOST: free_delay,
    Kind.CRASH: crash_delay,
    Kind.ENVIRONMENT: environment_delay,
    Kind.FENCED: fenced_delay,
}
"""By how often it has happened before; interruptions count the one that ended."""


def after(child: Child, end: End) -> Counters:
    """What the next child Job carries."""
    before = child.counters
    if end.way is OOM_KILLED:
        return Counters(failures=before.failures, halve=True)
    if end.kind is Kind.CRASH:
        return Counters(failures=before.failures + 1, tries=0)
    if end.kind in (Kind.ENVIRONMENT, Kind.FENCED):
        settled = end.at - child.created > SETTLED
        return Counters(failures=before.failures, tries=1 if settled else before.tries + 1)
    return Counters(failures=before.failures, tries=0)


def carried(o: Observed, target: Target) -> Counters:
    """The same, as the status has it: the Job that counted may be gone. Another document begins with a clean sheet."""
    run = o.subject.status.run
    before = o.pinned.get(run.generation) if run is not None else None
    if run is None or before is None or before.key != target.key:
        return Counters()
    return Counters(failures=run.failures or 0, halve=bool(run.halve))


def no_progress(o: Observed, message: str) -> Verdict:
    """The end of retries that cost the user nothing but time. `message` tells the last ending."""
    advice = "look why it ends before a checkpoint is committed: lower checkpoint.every, or ask for nodes that stay"
    if o.subject.status.phase == "Evaluating":
        advice = "look why it ends before evaluation and publication are done, or ask for nodes that stay"
    said = f"interrupted {FREE_WITHOUT_PROGRESS} times in a row without one more committed step"
    message = f"{said}, the last time: {message}; {advice}; then change the annotation finetune.dev/retry"
    return Verdict("Failed", NO_PROGRESS, message)


# --- what an ended attempt cost ---


def committed_step(o: Observed, end: End | None) -> int:
    """The last committed step: the attempt itself knows best, before it told any the status does."""
    if end is not None and end.committed is not None:
        return end.committed
    checkpoint = o.subject.status.checkpoint
    return checkpoint.step if checkpoint else 0


def expected_step(status: FineTuneJobStatus) -> int:
    """The step that is committed, or was being committed when the last attempt was stopped; 0 where none is."""
    last = next(reversed(status.restarts or []), None)
    return max(status.checkpoint.step if status.checkpoint else 0, (last.resumed_from_step or 0) if last else 0)


def run_of(child: Child) -> RunStatus:
    """What a train Job says of its run: all there is where the status was wiped, or tells of another one."""
    return RunStatus(id=child.run or "", generation=child.generation, inputs=child.inputs)


def recorded(o: Observed, child: Child, end: End, cost: Cost) -> dict[str, Any]:
    """The status fields that tell of an ended attempt; empty when they do so already."""
    status = o.subject.status
    run = status.run if status.run is not None and status.run.id == child.run else None
    run = counted(run or run_of(child), after(child, end))
    usage = with_cost(status, cost)
    told = _Ended(child.ordinal, end.kind, end.reason, end.at, end.reached, end.began_at)
    return _told(o, run, told, usage=usage, committed=committed_step(o, end))


def counted(run: RunStatus, counters: Counters) -> RunStatus:
    """The run with what its next attempt carries, as its Job does, which may be deleted before."""
    return run.model_copy(
        update={"failures": counters.failures or None, "halve": counters.halve or None, "next_at": None}
    )


def lost(o: Observed, *, now: datetime) -> dict[str, Any]:
    """The same for an attempt whose Job vanished before anybody looked; nobody knows how long it had run."""
    status = o.subject.status
    attempts = (status.usage.attempts if status.usage else None) or 0
    if status.run is None or not attempts:
        return {}
    told = _Ended(attempts, JOB_LOST.kind, JOB_LOST.reason, now, None, None)
    return _told(o, status.run, told, usage=status.usage or Usage(), committed=committed_step(o, None))


def stopped(o: Observed, child: Child, cost: Cost, *, reason: str, now: datetime) -> dict[str, Any]:
    """The same for an attempt that we stop, for which it commits a checkpoint. Another run has its own restarts."""
    status = o.subject.status
    usage = with_cost(status, cost)
    if status.run is None or status.run.id != child.run:
        return {"usage": with_attempt(usage, child.ordinal)}
    step = status.progress.step if status.progress else 0
    told = _Ended(child.ordinal, Kind.ASKED, reason, now, None, None)
    facts = _told(o, status.run, told, usage=usage, committed=max(step, committed_step(o, None)))
    return {name: fact for name, fact in facts.items() if name != "checkpoint"}  # that it is there is only expected


@dataclass(frozen=True)
class _Ended:
    attempt: int
    kind: Kind
    reason: str
    at: datetime
    reached: int | None
    began_at: int | None


def _told(o: Observed, run: RunStatus, ended: _Ended, *, usage: Usage, committed: int) -> dict[str, Any]:
    status = o.subject.status
    restarts = list(status.restarts or [])
    if any(restart.attempt == ended.attempt for restart in restarts):
        return {}
    seen = max(ended.reached or 0, status.progress.step if status.progress else 0, committed)
    restart = Restart(
        attempt=ended.attempt,
        reason=ended.reason[:64],
        at=format_time(ended.at),
        resumed_from_step=committed,
        lost_steps=seen - committed,
    )
    totals = {
        "attempts": max(usage.attempts or 0, ended.attempt),
        "lost_steps": (usage.lost_steps or 0) + seen - committed,
    }
    began_at = ended.began_at or (restarts[-1].resumed_from_step if restarts else None) or 0
    won = committed > began_at
    interruptions = (0 if won else run.interruptions or 0) + (ended.kind in INTERRUPTED and not won)
    facts: dict[str, Any] = {
        "restarts": [*restarts, restart][-KEPT:],
        "usage": usage.model_copy(update=totals),
        "run": run.model_copy(update={"interruptions": interruptions or None, "next_at": None}),
        "checkpoint": checkpoint_at(status.checkpoint, committed),
    }
    # A failure that is final shows where it happened.
    return facts if ended.kind is Kind.FINAL else {**facts, "progress": rewound(status.progress, committed)}


def rewound(progress: ProgressStatus | None, step: int) -> ProgressStatus | None:
    """Where the next attempt begins: one that ends before it says anything must not lose the same steps again."""
    if progress is None or progress.step == step:
        return progress
    total = progress.total_steps
    return ProgressStatus(
        step=step,
        total_steps=total,
        percent=min(100, 100 * step // total) if total else 0,
        updated_at=progress.updated_at,
    )


def forgotten(status: FineTuneJobStatus) -> dict[str, Any]:
    """The status fields of a run that failed and begins anew: from its checkpoint, with a clean sheet."""
    clean = {"started_at": None, "interruptions": None, "failures": None, "halve": None, "next_at": None}
    run = status.run.model_copy(update=clean) if status.run else None
    progress = rewound(status.progress, status.checkpoint.step if status.checkpoint else 0)
    return {"run": run, "restarts": None, "progress": progress, "preflight_job": None}


def checkpoint_at(seen: CheckpointStatus | None, step: int) -> CheckpointStatus | None:
    """What is known of the last committed checkpoint, once somebody has said of which step it is."""
    if seen is not None and seen.step == step:
        return seen
    best = seen.best if seen is not None and seen.best is not None and seen.best.step <= step else None
    return CheckpointStatus(step=step, best=best) if step else None


def corrected(status: FineTuneJobStatus, *, resumed: int, attempt: int) -> dict[str, Any]:
    """What the restart before `attempt` cost, now that the step is known from which the run really goes on.

    A later step than anybody knew of was won by the attempt that ended: it was not in vain.
    """
    restarts = status.restarts or []
    last = restarts[-1] if restarts else None
    if last is None or last.attempt != attempt - 1 or last.resumed_from_step == resumed:
        return {}
    seen = (last.resumed_from_step or 0) + (last.lost_steps or 0)
    cost = max(0, seen - resumed)
    right = last.model_copy(update={"resumed_from_step": resumed, "lost_steps": cost})
    usage = status.usage or Usage()
    total = max(0, (usage.lost_steps or 0) + cost - (last.lost_steps or 0))
    facts: dict[str, Any] = {
        "restarts": [*restarts[:-1], right],
        "usage": usage.model_copy(update={"lost_steps": total}),
    }
    if status.run is not None and resumed > (last.resumed_from_step or 0):
        facts["run"] = status.run.model_copy(update={"interruptions": None})
    return facts


def nothing_lost(status: FineTuneJobStatus, *, step: int) -> dict[str, Any]:
    """The run was over at `step`, though its last attempt could not say so: no restart followed."""
    attempts = (status.usage.attempts if status.usage else None) or 0
    facts = corrected(status, resumed=step, attempt=attempts + 1)
    restarts = facts.get("restarts", status.restarts) or []
    if restarts and restarts[-1].attempt == attempts and restarts[-1].reason in ENDED_UNHEARD:
        facts["restarts"] = restarts[:-1] or None
    return facts
