"""Prometheus metrics of the operator. Labels name kinds of things, never single objects."""

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from finetune_operator.views import Subject

RECONCILES = Counter("finetune_reconciles_total", "Looks at a FineTuneJob.", ["outcome"])
RECONCILE_SECONDS = Histogram("finetune_reconcile_seconds", "Time one look took.")
ACTIONS = Counter("finetune_actions_total", "What was done for FineTuneJobs.", ["action"])
STATUS_WRITES = Counter("finetune_status_writes_total", "Writes of a status.", ["outcome"])
QUEUE = Gauge("finetune_queue_length", "FineTuneJobs that wait for a worker.")
LEADER = Gauge("finetune_operator_leader", "1 where this operator leads and works, 0 where it follows another one.")
PROGRESS = Counter("finetune_progress_reads_total", "Questions to trainer pods.", ["outcome"])


class Phases(Collector):
    """Counts FineTuneJobs by phase when asked, from what the cache holds."""

    def __init__(self, subjects: Callable[[], Iterable[Subject]]) -> None:
        self._subjects = subjects

    def collect(self) -> Iterator[Metric]:
        counts = Count(subject.status.phase or "Pending" for subject in self._subjects())
        family = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by phase.", labels=["phase"])
        for phase, number in counts.items():
            family.add_metric([phase], number)
        yield family


def register(phases: Phases) -> None:
    REGISTRY.register(phases)
