"""Prometheus metrics of the operator. Labels name kinds of things, never single objects."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from finetune_api.status import FineTuneJobStatus, Restart, Usage
from finetune_operator.views import Subject, told_time

RECONCILES = Counter("finetune_reconciles_total", "Looks at a FineTuneJob.", ["outcome"])
RECONCILE_SECONDS = Histogram("finetune_reconcile_seconds", "Time one look took.")
ACTIONS = Counter("finetune_actions_total", "What was done for FineTuneJobs.", ["action"])
STATUS_WRITES = Counter("finetune_status_writes_total", "Writes of a status.", ["outcome"])
API_REQUESTS = Counter(
    "finetune_api_requests_total", "Requests to the API server, but for watches.", ["verb", "resource", "code"]
)
QUEUE = Gauge("finetune_queue_length", "FineTuneJobs that wait for a worker.")
QUEUE_AGE = Gauge("finetune_queue_age_seconds", "How long the first of them has waited.")
LEADER = Gauge("finetune_operator_leader", "1 where this operator leads and works, 0 where it follows another one.")
PROGRESS = Counter("finetune_progress_reads_total", "Questions to trainer pods.", ["outcome"])
RESTARTS = Counter("finetune_restarts_total", "Attempts that ended before their run was done.", ["reason"])
STEPS_LOST = Counter("finetune_steps_lost_total", "Training steps that have to be done again.")
GPU_SECONDS = Counter("finetune_gpu_seconds_total", "GPU seconds of attempts that have ended.")
GPU_SECONDS_LOST = Counter(
    "finetune_gpu_seconds_lost_total", "Of these, those of steps that have to be done again, or that led to no step."
)
FIRST_STEP = Histogram(
    "finetune_first_step_seconds",
    "From the creation of a FineTuneJob to its first training step.",
    buckets=(15, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400),
)

KNOWN: tuple[tuple[Counter, tuple[str, ...]], ...] = (
    (RECONCILES, ("done", "error", "behind")),
    (ACTIONS, ("CreateConfig", "CreatePreflight", "CreateTrain", "DeleteJob")),
    (STATUS_WRITES, ("written", "conflict", "error")),
    (PROGRESS, ("answered", "silent")),
)
for _counter, _values in KNOWN:
    for _value in _values:
        _counter.labels(_value)  # a series that begins with its first event hides that event from rate()


@dataclass(frozen=True)
class Spent:
    """What one write of a status tells that the one before did not."""

    gpu_seconds: float = 0.0
    lost_gpu_seconds: float = 0.0
    lost_steps: int = 0
    restarts: tuple[str, ...] = ()
    """Reasons."""
    first_step: float | None = None
    """Seconds since the FineTuneJob was created."""

    @classmethod
    def of(cls, subject: Subject, after: FineTuneJobStatus) -> "Spent":
        """`subject` has the status of before. Steps of an attempt are taken to have cost the same."""
        before = subject.status
        old, new = (before.usage or Usage()).settled, (after.usage or Usage()).settled
        told = {restart.attempt for restart in before.restarts or []}
        ends = [restart for restart in after.restarts or [] if restart.attempt not in told]
        seconds = max(0, (new.gpu_seconds or 0) - (old.gpu_seconds or 0))
        return cls(
            gpu_seconds=seconds,
            lost_gpu_seconds=seconds * _lost_share(before, ends[-1]) if ends else 0.0,
            lost_steps=max(0, (new.lost_steps or 0) - (old.lost_steps or 0)),
            restarts=tuple(restart.reason for restart in ends),
            first_step=_first_step(subject, after),
        )

    def count(self) -> None:
        GPU_SECONDS.inc(self.gpu_seconds)
        GPU_SECONDS_LOST.inc(self.lost_gpu_seconds)
        STEPS_LOST.inc(self.lost_steps)
        for reason in self.restarts:
            RESTARTS.labels(reason).inc()
        if self.first_step is not None:
            FIRST_STEP.observe(self.first_step)


def _lost_share(before: FineTuneJobStatus, end: Restart) -> float:
    """Of an attempt's time: 1 where it came no step further."""
    began = next((restart.resumed_from_step or 0 for restart in reversed(before.restarts or [])), 0)
    kept, lost = (end.resumed_from_step or 0) - began, end.lost_steps or 0
    return lost / (kept + lost) if kept > 0 else 1.0


def _first_step(subject: Subject, after: FineTuneJobStatus) -> float | None:
    before, progress = subject.status, after.progress
    attempts = (
        before.usage.attempts if before.usage else None
    ) or 0  # of all runs: a changed document is no first step
    earlier = attempts > 1 or before.restarts or before.checkpoint or (before.progress and before.progress.step)
    if earlier or progress is None or not progress.step:
        return None
    if progress.first_step_at is None and after.phase != "Training":  # an older trainer, which evaluates by now
        return None
    at = told_time(progress.first_step_at or progress.updated_at)
    return max(0.0, (at - subject.created).total_seconds()) if at is not None else None


class Phases(Collector):
    """Counts FineTuneJobs by phase and reason when asked, from what the cache holds."""

    def __init__(self, counts: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by phase and reason.", labels=["phase", "reason"])
        for (phase, reason), number in self._counts().items():
            family.add_metric([phase, reason], number)
        yield family


def register(phases: Phases) -> None:
    REGISTRY.register(phases)
