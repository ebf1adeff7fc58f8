"""Traces: none unless the environment asks, and then what each look did, without bodies, tokens or queries."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.unit.test_decide import TRAINING, subject
from tests.unit.test_kube import JOB, Answer, Client, kube
from tests.unit.test_progress import HOST, Gate, answering, good, impatient, pod, reader
from tests.unit.test_reconcile import Api, ours, reconciler

from finetune_api.contract import PROGRESS_PORT
from finetune_operator import tracing
from finetune_operator.kube import ApiError, Kube
from finetune_operator.progress import ProgressReader
from finetune_operator.tracing import LOOK, Attribute, asked
from finetune_operator.views import MANAGED_BY, MANAGER

__all__ = ["impatient", "reader"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]
BASE, OWN = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
SPEAKS, OWN_SPEAKS = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
URL = "http://collector:4318"
SECRET = "correct-horse"


class Spans:
    """What has been told."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def all(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def look(self) -> ReadableSpan:
        (found,) = (span for span in self.all() if span.parent is None)
        return found

    def requests(self) -> list[ReadableSpan]:
        parent = self.look().context
        children = [span for span in self.all() if span.parent is not None]
        assert {(c.parent.span_id, c.parent.trace_id) for c in children} <= {(parent.span_id, parent.trace_id)}
        return children


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    made = Spans()
    monkeypatch.setattr(tracing, "_tracer", made.provider.get_tracer("test"))
    return made


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No variable of OpenTelemetry is set, and afterwards the logs are as they were."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    said = logging.getLogger("opentelemetry")
    before = said.handlers, said.propagate
    yield monkeypatch
    tracing.end()
    said.handlers, said.propagate = before


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# --- whether ---


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({BASE: ""}, None),
        ({BASE: URL}, URL),
        ({OWN: f"{URL}/v1/traces"}, f"{URL}/v1/traces"),
        ({BASE: "http://other", OWN: URL}, URL),
        ({BASE: URL, "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({BASE: URL, "OTEL_SDK_DISABLED": "1"}, URL),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": ""}, URL),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "console,otlp"}, URL),
        ({BASE: URL, SPEAKS: "http/protobuf"}, URL),
        ({BASE: URL, SPEAKS: "grpc", OWN_SPEAKS: "http/protobuf"}, URL),
        ({SPEAKS: "grpc"}, None),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": URL}, None),
    ],
)
def test_an_endpoint_switches_traces_on_and_the_specifications_switches_off(
    environment: dict[str, str], endpoint: str | None
) -> None:
    assert asked(environment) == endpoint


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        (SPEAKS, "grpc", "set it to that, and the endpoint to the collector's port for HTTP"),
        (OWN_SPEAKS, "http/json", "only http/protobuf is known here"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "set it to otlp"),
        (BASE, "no address of HTTP", "write http://HOST:4318"),
        (OWN, "no address of HTTP", "write http://HOST:4318"),
    ],
)
def test_what_is_not_known_is_told_in_one_line_and_traces_stay_off(
    name: str, value: str, remedy: str, plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain.setenv(BASE, URL)
    plain.setenv(name, f"user:{SECRET}@collector:4318" if name in (BASE, OWN) else value)
    tracing.begin()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"traces stay off: {name} is {value}")
    assert remedy in record.getMessage()
    assert SECRET not in record.getMessage()
    assert tracing._tracer is None


def test_a_variable_that_the_sdk_refuses_leaves_traces_off_and_the_operator_running(
    plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain.setenv(BASE, URL)
    plain.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    tracing.begin()
    assert "traces stay off: max_queue_size must be a positive integer" in caplog.text
    assert tracing._tracer is None


LOADED = """
import sys
import finetune_operator.__main__
from finetune_operator import tracing
tracing.begin()
print(sorted({"opentelemetry", "google.protobuf"} & set(sys.modules)), tracing._tracer is not None)
tracing.end()
"""


@pytest.mark.parametrize(
    ("more", "loaded"),
    [({}, "[] False"), ({BASE: "http://127.0.0.1:9"}, "['google.protobuf', 'opentelemetry'] True")],
    ids=["not asked for", "asked for"],
)
def test_nothing_is_imported_unless_it_is_asked_for(more: dict[str, str], loaded: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", LOADED], env={**environment, **more}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == loaded, done.stderr


# --- what ---


async def test_a_look_tells_what_it_did_for_whom(spans: Spans) -> None:
    await reconciler(Api())("uid-one")
    found = spans.look()
    assert found.name == LOOK
    assert told(found) == {
        "k8s.namespace.name": "ns",
        "finetune.job.name": "one",
        "finetune.job.uid": "uid-one",
        "finetune.phase": "Preflight",
        "finetune.reason": "Checking",
        "finetune.actions": ("CreateConfig", "CreatePreflight"),
        "finetune.status.written": True,
    }
    assert found.status.status_code is StatusCode.UNSET


async def test_a_look_that_changes_nothing_is_not_told(spans: Spans) -> None:
    class WithoutEvents(Api):
        async def refusals(self, namespace: str) -> dict[str, str]:
            return {}

    api = WithoutEvents()
    look = reconciler(api)
    await look("uid-one")
    assert len(api.statuses) == 1
    spans.exporter.clear()
    assert await look("uid-one") is not None
    assert len(api.statuses) == 1
    assert spans.all() == []


async def test_a_look_at_what_is_gone_is_not_told(spans: Spans) -> None:
    assert await reconciler(Api())("uid-of-nobody") is None
    assert spans.all() == []


async def test_a_look_that_raises_tells_the_words(spans: Spans) -> None:
    class Away(Api):
        async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
            raise ApiError(503, "ServiceUnavailable", "the server is busy")

    with pytest.raises(ApiError):
        await reconciler(Away())("uid-one")
    found = spans.look()
    assert found.status.status_code is StatusCode.ERROR
    assert found.status.description == "ApiError: 503 ServiceUnavailable: the server is busy"
    assert told(found)["error.type"] == "ApiError"
    assert told(found)["finetune.actions"] == ()
    assert told(found)["finetune.status.written"] is False


async def test_a_look_on_an_old_picture_says_which_object_it_lacked(spans: Spans) -> None:
    assert await reconciler(Api(there=ours(**{MANAGED_BY: MANAGER})))("uid-one") == 0.0
    words = spans.look().status.description or ""
    assert re.fullmatch(r"Behind: ConfigMap one-\S+ is there, and the watch has not brought it yet", words)


def test_run_phase_and_reason_are_those_after_the_look(spans: Spans) -> None:
    with tracing.look(subject()):
        tracing.wrote(TRAINING)
    found = told(spans.look())
    assert TRAINING.run is not None
    assert (found["finetune.run.id"], found["finetune.phase"]) == (TRAINING.run.id, "Training")
    assert found["finetune.reason"] == "Training"


async def test_a_request_is_a_child_by_method_and_resource(spans: Spans) -> None:
    api, _ = kube(Answer(201, {}), Answer(409, {"reason": "AlreadyExists", "message": "there"}))
    with tracing.look(subject()):
        await api.create(JOB)
        with pytest.raises(ApiError):
            await api.create(JOB)
        tracing.acted("CreateTrain")
    first, second = spans.requests()
    path = "/apis/batch/v1/namespaces/team-a/jobs"
    assert (first.name, first.kind) == ("POST jobs", SpanKind.CLIENT)
    assert told(first) == {"http.request.method": "POST", "url.path": path, "http.response.status_code": 201}
    assert first.status.status_code is StatusCode.UNSET
    assert told(second) == {
        "http.request.method": "POST",
        "url.path": path,
        "http.response.status_code": 409,
        "error.type": "409",
    }
    assert second.status.status_code is StatusCode.ERROR
    parent = spans.look()
    assert parent.status.status_code is StatusCode.UNSET
    times = [parent.start_time, first.start_time, first.end_time, second.start_time, second.end_time, parent.end_time]
    assert times == sorted(times)


async def test_a_request_without_an_answer_says_why(spans: Spans) -> None:
    class Silent(Client):
        async def call_api(self, *_: Any, **__: Any) -> Answer:
            raise TimeoutError("no answer within 30 s")

    with tracing.look(subject()), pytest.raises(TimeoutError):
        await Kube(Silent(), outside=False).get("Job", "team-a", "one")
    with tracing.look(subject()):
        with pytest.raises(TimeoutError):
            await Kube(Silent(), outside=False).create(JOB)
        tracing.acted("CreateTrain")
    (request,) = spans.requests()
    assert request.status.description == "TimeoutError: no answer within 30 s"
    assert told(request)["error.type"] == "TimeoutError"
    assert "http.response.status_code" not in told(request)


async def test_a_question_to_a_trainer_is_a_child(spans: Spans, reader: ProgressReader) -> None:
    runner = await answering(good)
    with tracing.look(subject()):
        await reader.read("ns", [pod()])
        tracing.acted("DeleteJob")
    await runner.cleanup()
    (request,) = spans.requests()
    assert request.name == "GET /progress"
    assert told(request) == {
        "http.request.method": "GET",
        "url.path": "/progress",
        "server.address": HOST,
        "server.port": PROGRESS_PORT,
        "http.response.status_code": 200,
    }


async def test_a_question_that_a_look_does_not_wait_for_is_told_as_far_as_it_went(
    spans: Spans, impatient: ProgressReader
) -> None:
    gate = Gate()
    runner = await answering(gate)
    with tracing.look(subject()):
        assert await impatient.read("ns", [pod()]) is None
        tracing.acted("DeleteJob")
    (request,) = spans.requests()
    assert request.start_time < request.end_time
    assert "http.response.status_code" not in told(request)
    gate.open.set()
    await runner.cleanup()


async def test_a_request_that_belongs_to_no_look_is_not_told(spans: Spans) -> None:
    """Lists, and the Lease every two seconds."""
    api, client = kube()
    await api.list("jobs", None, exact=False)
    await api.read_lease("system", "operator", seconds=1.0)
    assert len(client.sent) == 2
    assert spans.all() == []


async def test_no_span_holds_a_body_a_query_or_a_token(spans: Spans) -> None:
    class WithToken(Client):
        async def param_serialize(self, *, method: str, resource_path: str, **_: Any) -> tuple[Any, ...]:
            url = f"https://user:{SECRET}@server:6443{resource_path}?token={SECRET}"
            return method, url, {"authorization": f"Bearer {SECRET}"}, None, []

    answers = [Answer(200, {"metadata": {}, "data": SECRET}), Answer(422, {"message": "x"})]
    api = Kube(WithToken(answers), outside=False)
    with tracing.look(subject()):
        await api.create({**JOB, "spec": {"value": SECRET}})
        with pytest.raises(ApiError):
            await api.create({**JOB, "spec": {"value": SECRET}})
        tracing.acted("CreateTrain")
    first, _ = spans.requests()
    assert (told(first)["server.address"], told(first)["server.port"]) == ("server", 6443)
    assert SECRET not in json.dumps([json.loads(span.to_json()) for span in spans.all()])


async def test_an_address_that_is_none_fails_by_itself_and_not_for_the_trace(spans: Spans) -> None:
    with tracing.look(subject()), tracing.request("GET", "/progress", "http://[nonsense]:99/progress") as answered:
        answered(200)
        tracing.acted("DeleteJob")
    (request,) = spans.requests()
    assert told(request) == {"http.request.method": "GET", "http.response.status_code": 200}


def test_without_traces_looks_and_requests_note_nothing() -> None:
    assert tracing._tracer is None
    with tracing.look(subject()), tracing.request("GET", "jobs", "http://x") as answered:
        answered(200)
        tracing.acted("DeleteJob")
        tracing.wrote(TRAINING)
        assert tracing._current.get() is None


# --- sending ---


@pytest.fixture
def nobody() -> Iterator[str]:
    """The address of who takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_endpoint_that_never_answers_holds_up_neither_looks_nor_the_end(
    plain: pytest.MonkeyPatch, nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain.setenv(BASE, nobody)
    plain.setenv("NO_PROXY", "127.0.0.1")
    plain.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    plain.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    plain.setattr(tracing, "LAST_SECONDS", 0.5)
    tracing.begin()
    assert tracing._tracer is not None
    started = time.monotonic()
    for _ in range(500):
        with tracing.look(subject()):
            tracing.acted("CreateTrain")
    assert time.monotonic() - started < 2.0
    started = time.monotonic()
    tracing.end()
    assert 0.5 <= time.monotonic() - started < 2.5
    assert "the last spans could not be sent within 0.5 s" in caplog.text
    assert caplog.text.count("Queue full") == 1


def test_the_same_words_of_the_sdk_are_told_once(plain: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plain.setenv(BASE, URL)
    tracing.begin()
    caplog.clear()
    for number in range(100):
        error = f"url: /v1/traces?key={SECRET} (try {number})"
        logging.getLogger("opentelemetry.exporter").error("Failed to export: %s", error)
    (record,) = caplog.records
    assert record.name == "finetune_operator.tracing"
    assert (
        "OpenTelemetry: Failed to export: url: /v1/traces?... (try 0); told at most every 600 s" in record.getMessage()
    )


@pytest.mark.parametrize(
    ("variables", "service"),
    [
        ({}, "finetune-operator"),
        ({"OTEL_SERVICE_NAME": "tuner"}, "tuner"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=from-attributes"}, "from-attributes"),
    ],
)
def test_the_service_has_the_name_that_the_environment_says(
    variables: dict[str, str], service: str, plain: pytest.MonkeyPatch
) -> None:
    plain.setenv(BASE, "http://127.0.0.1:9")
    for name, value in variables.items():
        plain.setenv(name, value)
    tracing.begin()
    assert tracing._provider is not None
    assert tracing._provider.resource.attributes["service.name"] == service


# --- the documentation ---


def test_the_documentation_names_every_span_and_attribute() -> None:
    text = (ROOT / "docs/observability.md").read_text()
    names = [value for name, value in vars(Attribute).items() if name.isupper()]
    assert len(names) > 10
    assert [name for name in (LOOK, "GET /progress", *names) if f"`{name}`" not in text] == []
