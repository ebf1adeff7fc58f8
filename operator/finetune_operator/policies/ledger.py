"""What attempts have taken: seconds of running, and GPU seconds. Each attempt is counted once, when it ends.

What one takes that goes on is in the sums, too, and in `ongoing` beside them: so it can be taken out again.

Times come from the API objects and from the trainer, which has the clock of its pod's node. The operator's own clock
is asked only where those say nothing new. No clock that may jump adds more than UNHEARD by itself: one that jumps by a
year must not end a job. What a process has watched for longer counts in full.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api.contract import Progress
from finetune_api.status import FineTuneJobStatus, Ongoing, RunStatus, Usage
from finetune_operator.policies.accept import Target
from finetune_operator.policies.endings import End
from finetune_operator.verdict import PASSED, Observed, reason_of
from finetune_operator.views import Child, format_time, told_time

UNHEARD = timedelta(minutes=10)


@dataclass(frozen=True)
class Cost:
    """Of one attempt."""

    attempt: int
    running: int = 0
    """Seconds since the first pod got its node."""
    gpu: int = 0
    """Seconds times GPUs, of each pod since it got its own."""
    hour_price: float | None = None
    """Of one GPU, in the platform's currency."""
    watts: float | None = None
    """Of one GPU."""

    @classmethod
    def at_rates_of(cls, target: Target, attempt: int, running: float, gpu: float) -> "Cost":
        limits = target.config.limits
        return cls(attempt, int(running), int(gpu), limits.gpu_hour_price, limits.gpu_watts)

    def on(self, usage: Usage) -> dict[str, Any]:
        """The sums of the status with this in them. What has no rate is not told."""
        hours = self.gpu / 3600
        money = None if self.hour_price is None else hours * self.hour_price
        energy = None if self.watts is None else hours * self.watts / 1000
        return {
            "gpu_seconds": (usage.gpu_seconds or 0) + self.gpu,
            "running_seconds": (usage.running_seconds or 0) + self.running,
            "cost": _sum(usage.cost, money),
            "kilowatt_hours": _sum(usage.kilowatt_hours, energy),
        }


def _sum(before: float | None, more: float | None) -> float | None:
    """Rounded part by part: what is added can be taken out again."""
    return before if more is None else round((before or 0) + round(more, 4), 4)


def cost_of(o: Observed, target: Target, job: Child, end: End | None, *, now: datetime) -> Cost:
    """What an attempt has taken until its end, or so far."""
    began = _began(o, job, ended=end is not None)
    if began is None:
        return Cost(job.ordinal)
    until = max(began, _until(o, began, end, now=now))
    pods, started = target.config.pods, [pod.started for pod in o.pods_of(job) if pod.started is not None]
    running = (until - began).total_seconds()
    later = sum((min(max(start, began), until) - began).total_seconds() for start in started)
    return Cost.at_rates_of(target, job.ordinal, running, pods.gpus * (pods.nodes * running - later))


def with_attempt(usage: Usage | None, attempt: int) -> Usage:
    """The usage once this attempt is there. An earlier one whose end nobody saw is paid as far as it was seen."""
    usage = usage or Usage()
    going = usage.ongoing if usage.ongoing is not None and usage.ongoing.attempt == attempt else None
    return usage.model_copy(update={"attempts": max(usage.attempts or 0, attempt), "ongoing": going})


def with_cost(status: FineTuneJobStatus, cost: Cost) -> Usage:
    """The usage with an attempt's whole cost added, unless it was added before."""
    usage = status.usage or Usage()
    if cost.attempt <= (usage.counted or 0):
        return usage
    usage = with_attempt(usage, cost.attempt).settled
    return usage.model_copy(update={**cost.on(usage), "counted": cost.attempt})


def so_far(o: Observed, target: Target, job: Child, usage: Usage, *, now: datetime) -> Usage:
    """The usage with what an attempt that goes on has taken until now, once a node has said that it has a pod of it."""
    if job.ordinal <= (usage.counted or 0) or _placed(o, job, ended=False) is None:
        return usage
    cost, usage = cost_of(o, target, job, None, now=now), with_attempt(usage, job.ordinal).settled
    taken = Ongoing(attempt=job.ordinal, **cost.on(Usage()))
    return usage.model_copy(update={**cost.on(usage), "ongoing": taken})


def set_aside(o: Observed, target: Target, job: Child, usage: Usage, *, now: datetime) -> dict[str, Any]:
    """The status fields once the pods of a Job are gone because somebody suspended it: a queue, or a person.

    What they took is added, and the attempt is placed no more: it goes on with other pods, or never.
    """
    run, pods = o.subject.status.run, target.config.pods
    began = told_time(run.placed_at) if run is not None and run.id == job.run else None
    if run is None or began is None or began < job.created or job.ordinal <= (usage.counted or 0):
        return {}
    until = _left(o, job, began, grace=timedelta(seconds=pods.grace_seconds), now=now)
    if until is None:
        return {}
    seconds = max(0.0, (until - began).total_seconds())
    usage = with_attempt(usage, job.ordinal).settled
    cost = Cost.at_rates_of(target, job.ordinal, seconds, seconds * pods.nodes * pods.gpus)
    return {"usage": usage.model_copy(update=cost.on(usage)), "run": run.model_copy(update={"placed_at": None})}


def _left(o: Observed, job: Child, began: datetime, *, grace: timedelta, now: datetime) -> datetime | None:
    """About until when the pods ran that a suspension has ended; None where it has ended none, or not yet.

    Who gets its place back at once may have new pods before anybody sees that the old ones are gone.
    """
    pods = o.pods_of(job)
    if job.suspended_at is not None:
        return None if pods else min(max(now, job.suspended_at), job.suspended_at + grace)
    started = [pod.started for pod in pods if pod.started is not None]
    return job.released if started and began < job.released <= min(started) else None


def placed(o: Observed, job: Child, run: RunStatus) -> RunStatus:
    """The run with the time when the attempt got its first node: its pods may be gone before it ends."""
    began = _started(o, job)
    return run if began is None else run.model_copy(update={"placed_at": format_time(began)})


def _began(o: Observed, job: Child, *, ended: bool) -> datetime | None:
    """When the first pod got its node; None while all wait for one, and where the attempt ends before any got one."""
    began = _placed(o, job, ended=ended)
    if began is not None or (job.suspended and not ended):
        return began
    pods = o.pods_of(job)
    waits = all(pod.node is None for pod in pods) if pods or not ended else _only_waited(o, job)
    return None if waits else job.created


def _placed(o: Observed, job: Child, *, ended: bool) -> datetime | None:
    """When the first pod got its node, as the pods say that are there, or the status of those that were."""
    began, run = _started(o, job), o.subject.status.run
    if began is not None or (job.suspended and not ended):
        return began
    before = told_time(run.placed_at) if run is not None and run.id == job.run else None
    return before if before is not None and before >= job.created else None  # else it is an earlier attempt's


def _only_waited(o: Observed, job: Child) -> bool:
    """Whether the status speaks of this attempt and never saw it on a node: its pods are gone, and cannot tell."""
    status = o.subject.status
    same = status.run is not None and status.run.id == job.run
    attempts = status.usage.attempts if status.usage is not None else None
    # A preflight that has passed is Queued, too, and says nothing of the attempt that it replaces.
    return same and attempts == job.ordinal and status.phase == "Queued" and reason_of(status) != PASSED


def _started(o: Observed, job: Child) -> datetime | None:
    """By the nodes' clocks, but never before the Job was made by the API server's."""
    started = min((pod.started for pod in o.pods_of(job) if pod.started is not None), default=None)
    return None if started is None else max(started, job.created)


def _until(o: Observed, began: datetime, end: End | None, *, now: datetime) -> datetime:
    if end is not None:
        return min(end.at, now + UNHEARD)
    status = o.subject.status.progress
    said = told_time(o.progress.updated_at if o.progress else status.updated_at if status else None)
    known = min(max(said or began, began), now + UNHEARD)
    # In training it says something every few seconds; it may be silent while it loads or evaluates.
    return known if _trains(o.progress) else min(max(now, known), known + max(UNHEARD, o.silent))


def _trains(progress: Progress | None) -> bool:
    return progress is not None and progress.stage == "Training"
