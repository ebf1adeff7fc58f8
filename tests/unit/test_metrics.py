"""What the operator's own metrics say, and that the documentation names each of them."""

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.test_decide import NOW, RUN, TRAINING, subject
from tests.unit.test_manifests import DOCUMENTS
from tests.unit.test_reconcile import Api, reconciler

from finetune_api.status import CheckpointStatus, FineTuneJobStatus, Ongoing, ProgressStatus, Restart, Usage
from finetune_operator import metrics
from finetune_operator.__main__ import _application, _Json, _Text
from finetune_operator.kube import _resource
from finetune_operator.metrics import Phases, Spent
from finetune_operator.queue import KeyedQueue
from finetune_operator.verdict import Action
from finetune_operator.views import format_time

ROOT = Path(__file__).resolve().parents[2]


def restart(attempt: int, *, at_step: int, lost: int) -> Restart:
    return Restart(attempt=attempt, reason="Killed", at="x", resumed_from_step=at_step, lost_steps=lost)


def spent(before: FineTuneJobStatus, **after: Any) -> Spent:
    return Spent.of(subject(status=before), before.model_copy(update=after))


ONCE = TRAINING.model_copy(
    update={"usage": Usage(gpu_seconds=1000, lost_steps=5, attempts=1), "restarts": [restart(1, at_step=20, lost=5)]}
)


def test_an_attempt_that_lost_steps_lost_their_share_of_its_time() -> None:
    """From step 20 it came to step 60, of which 50 is committed."""
    found = spent(
        ONCE,
        usage=Usage(gpu_seconds=1400, lost_steps=15, attempts=2),
        restarts=[restart(1, at_step=20, lost=5), restart(2, at_step=50, lost=10)],
    )
    assert found == Spent(gpu_seconds=400, lost_gpu_seconds=100, lost_steps=10, restarts=("Killed",))


@pytest.mark.parametrize("lost", [0, 7])
def test_an_attempt_that_committed_nothing_new_was_in_vain(lost: int) -> None:
    found = spent(
        ONCE,
        usage=Usage(gpu_seconds=1400, lost_steps=5 + lost, attempts=2),
        restarts=[restart(1, at_step=20, lost=5), restart(2, at_step=20, lost=lost)],
    )
    assert (found.gpu_seconds, found.lost_gpu_seconds, found.lost_steps) == (400, 400, lost)


def test_the_end_of_a_run_loses_nothing() -> None:
    assert spent(ONCE, usage=Usage(gpu_seconds=1400, lost_steps=5, attempts=2)) == Spent(gpu_seconds=400)


def test_gpu_seconds_are_counted_when_their_attempt_ends() -> None:
    taken = Ongoing(attempt=2, gpu_seconds=300, running_seconds=300)
    going = ONCE.model_copy(update={"usage": Usage(gpu_seconds=1300, ongoing=taken, lost_steps=5, attempts=2)})
    assert Spent.of(subject(status=ONCE), going) == Spent()
    assert spent(going, usage=Usage(gpu_seconds=1310, lost_steps=5, attempts=2)) == Spent(gpu_seconds=310)


def test_a_correction_downwards_takes_nothing_back() -> None:
    assert spent(ONCE, usage=Usage(gpu_seconds=1000, lost_steps=2, attempts=2)) == Spent()


def test_a_status_that_was_wiped_is_no_expense() -> None:
    assert Spent.of(subject(status=ONCE), FineTuneJobStatus()) == Spent()


FIRST = {"progress": ProgressStatus(step=1, total_steps=10, percent=10, updated_at=format_time(subject().created))}
LOADING = TRAINING.model_copy(update={"progress": None, "checkpoint": None})


@pytest.mark.parametrize(
    ("before", "counts"),
    [
        (LOADING, True),
        (LOADING.model_copy(update={"restarts": [restart(1, at_step=0, lost=0)]}), False),
        (LOADING.model_copy(update={"checkpoint": CheckpointStatus(step=5)}), False),
        (LOADING.model_copy(update=FIRST), False),
        (LOADING.model_copy(update={"usage": Usage(attempts=2)}), False),
    ],
    ids=["the first", "of a later attempt", "after a checkpoint", "told already", "of a later run"],
)
def test_the_first_step_of_a_run_is_counted_once(before: FineTuneJobStatus, counts: bool) -> None:
    assert (spent(before, **FIRST).first_step is not None) is counts


@pytest.mark.parametrize("phase", ["Training", "Evaluating"])
def test_the_first_step_counts_from_when_it_was_done_however_late_it_is_seen(phase: Any) -> None:
    """Training is told with step 0 already, and what comes then is mere progress, which is written now and then."""
    began = LOADING.model_copy(update={"progress": ProgressStatus(step=0, total_steps=100, percent=0)})
    first, seen = (format_time(subject().created + timedelta(seconds=seconds)) for seconds in (61, 90))
    later = ProgressStatus(step=40, total_steps=100, percent=40, first_step_at=first, updated_at=seen)
    assert spent(began, phase=phase, progress=later).first_step == 61
    told = began.model_copy(update={"phase": phase, "progress": later})
    assert spent(told, progress=later.model_copy(update={"step": 50})).first_step is None, "it is counted once"


@pytest.mark.parametrize("said", ["yesterday", "2026-03-01T12:00:00"])
def test_a_time_that_a_pod_made_up_counts_nothing(said: str) -> None:
    progress = ProgressStatus(step=1, total_steps=10, percent=10, updated_at=said)
    assert spent(LOADING, progress=progress).first_step is None


def test_jobs_are_counted_by_phase_and_reason() -> None:
    counts = {("Training", "Training"): 2, ("Failed", "ColumnMissing"): 1}
    (family,) = Phases(lambda: counts).collect()
    assert {tuple(sample.labels.values()): sample.value for sample in family.samples} == counts


@pytest.mark.parametrize(
    ("path", "resource"),
    [
        ("/apis/finetune.dev/v1alpha1/namespaces/ns/finetunejobs/one/status", "finetunejobs/status"),
        ("/apis/batch/v1/namespaces/ns/jobs", "jobs"),
        ("/apis/batch/v1/namespaces/jobs/jobs/jobs", "jobs"),
        ("/apis/batch/v1/jobs", "jobs"),
        ("/api/v1/namespaces/ns/pods/one:8080/proxy/progress", "pods/proxy"),
        ("/apis/kueue.x-k8s.io", "discovery"),
        ("/apis/finetune.dev/v1alpha1", "discovery"),
    ],
)
def test_requests_are_counted_by_resource_and_never_by_name(path: str, resource: str) -> None:
    assert _resource(path) == resource


async def test_the_age_of_the_queue_is_that_of_the_first_key_that_waits() -> None:
    async def work(_: str) -> None:
        return None

    queue = KeyedQueue(work)
    assert queue.age == 0
    queue.add("a")
    await asyncio.sleep(0.2)
    queue.add("b")
    assert queue.age >= 0.2
    working = asyncio.create_task(queue.run())
    await asyncio.sleep(0.05)
    assert queue.age == 0
    working.cancel()


Samples = dict[tuple[str, tuple[str, ...]], float]


async def served() -> Samples:
    """What /metrics says: by the sample's name and the values of its labels."""
    async with TestClient(TestServer(_application(ready=lambda: True))) as client:
        text = await (await client.get("/metrics")).text()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


async def test_what_a_status_tells_was_spent_reaches_the_metrics() -> None:
    before = await served()
    end = {
        "usage": Usage(gpu_seconds=1400, lost_steps=15, attempts=2),
        "restarts": [restart(1, at_step=20, lost=5), restart(2, at_step=50, lost=10)],
    }
    look = reconciler(Api())
    await look._write(subject(status=ONCE), ONCE.model_copy(update=end), now=NOW)
    await look._write(subject(status=LOADING), LOADING.model_copy(update=FIRST), now=NOW)
    after = await served()
    expected = {
        ("finetune_gpu_seconds_total", ()): 400,
        ("finetune_gpu_seconds_lost_total", ()): 100,
        ("finetune_steps_lost_total", ()): 10,
        ("finetune_restarts_total", ("Killed",)): 1,
        ("finetune_first_step_seconds_count", ()): 1,
        ("finetune_status_writes_total", ("written",)): 2,
    }
    assert {name: after[name] - before.get(name, 0) for name in expected} == expected


async def test_each_look_is_in_the_histogram_and_counted_by_its_outcome() -> None:
    before = await served()
    await reconciler(Api())("uid-one")
    after = await served()
    for name in (("finetune_reconcile_seconds_count", ()), ("finetune_reconciles_total", ("done",))):
        assert after[name] - before[name] == 1
    took = ("finetune_reconcile_seconds_sum", ())
    assert after[took] > before[took]


def test_what_can_happen_has_a_series_before_it_does() -> None:
    """Else rate() and increase() would miss the first error."""
    fresh = "import finetune_operator.metrics as m, prometheus_client as p; print(p.generate_latest().decode())"
    said = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=True).stdout
    for line in (
        *(f'finetune_reconciles_total{{outcome="{outcome}"}} 0.0' for outcome in ("done", "error", "behind")),
        *(f'finetune_actions_total{{action="{action.__name__}"}} 0.0' for action in get_args(Action)),
        'finetune_status_writes_total{outcome="error"} 0.0',
        'finetune_progress_reads_total{outcome="silent"} 0.0',
    ):
        assert line in said.splitlines()


def test_no_label_names_a_single_object() -> None:
    """One series a job would be as many as there ever were jobs."""
    ours = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    labels = {name for metric in ours for name in metric._labelnames}
    (jobs,) = Phases(lambda: {("Failed", "x"): 1}).collect()
    labels |= {name for sample in jobs.samples for name in sample.labels}
    assert labels == {"outcome", "action", "verb", "resource", "code", "reason", "phase"}


def test_a_line_of_the_log_names_job_and_run() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "ns/one: Training", (), None)
    vars(record).update(job="ns/one", job_uid="u", run=RUN, phase="Training")
    told = json.loads(_Json().format(record))
    assert {"job": "ns/one", "job_uid": "u", "run": RUN, "phase": "Training"}.items() <= told.items()
    assert "job" not in json.loads(_Json().format(logging.LogRecord("x", logging.INFO, "", 0, "watching", (), None)))


def test_no_text_of_a_document_or_a_pod_looks_like_a_line_of_the_log() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Text())
    logger = logging.Logger("x")
    logger.addHandler(handler)
    logger.info("ns/one: %s", "no\nERROR forged\x1b[2K\u2028\ttext")
    try:
        raise ValueError("no\n2026-01-01 00:00:00,000 ERROR forged")
    except ValueError:
        logger.exception("ns/one")
    first, second, *others = stream.getvalue().splitlines()
    assert first == r"ns/one: no\nERROR forged\x1b[2K\u2028\ttext"
    assert second == "ns/one"
    assert [line for line in others if not line.startswith("  ")] == []


PAGE = (ROOT / "docs/observability.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_documentation_names_every_metric_and_no_other() -> None:
    families = {
        line.split()[2]: line.split()[3]
        for line in generate_latest().decode().splitlines()
        if line.startswith("# TYPE finetune_") and not line.split()[2].endswith("_created")
    }
    rows = dict(re.findall(r"^\|`(finetune_\w+)`\|(\w+)\|", section("Metrics of the operator"), re.M))
    assert rows == {**families, "finetune_jobs": "gauge"}
    parts = {
        f"{name}_{part}" for name, kind in rows.items() if kind == "histogram" for part in ("bucket", "sum", "count")
    }
    named = set(re.findall(r"finetune_\w+", section("Metrics of the operator")))
    assert named - parts == set(rows)


def test_the_example_of_a_pod_monitor_finds_train_pods_and_their_port() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", section("Metrics of a run"), re.S)
    monitor = yaml.safe_load(text)
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    pod = DOCUMENTS["train-job"]["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
