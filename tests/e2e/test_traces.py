"""Traces of a real operator on a real API server, as a collector gets them: decoded by the protocol's own classes."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.e2e.test_operator import TOKEN, Place, Plane, a_place, a_plane, eventually

pytestmark = pytest.mark.e2e

NAME = "one"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "200", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with a_plane(tmp_path_factory.mktemp("plane")) as running:
        yield running


class Collector:
    """Takes what is sent to it, on the loopback."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str, bytes]] = []
        """Path, content type and body of each request."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.received.append((self.path, self.headers["Content-Type"], body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for _, _, body in list(self.received)]

    def spans(self) -> list[Span]:
        resources = (resource for request in self.requests() for resource in request.resource_spans)
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@contextmanager
def nobody() -> Iterator[str]:
    """The address of who takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def sending(plane: Plane, directory: Path, endpoint: str, **more: str) -> Iterator[Place]:
    """A place whose operator sends its traces there."""
    environment = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **more}
    with a_place(plane, directory, environment=environment) as place:
        yield place


def attributes(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


def test_a_collector_gets_a_trace_of_every_look_that_did_something(
    plane: Plane, tmp_path: Path, collector: Collector
) -> None:
    with sending(plane, tmp_path, collector.url) as place:
        uid = place.apply(NAME)["metadata"]["uid"]
        place.reaches(NAME, "Succeeded", "Trained")
        eventually("the last look is told", lambda: "Succeeded" in str(collector.spans()))
    assert {(path, kind) for path, kind, _ in collector.received} == {("/v1/traces", "application/x-protobuf")}
    (resource,) = {str(r.resource) for request in collector.requests() for r in request.resource_spans}
    assert 'string_value: "finetune-operator"' in resource
    spans = collector.spans()
    looks = [span for span in spans if not span.parent_span_id]
    told = [attributes(look) for look in looks]
    assert {look.name for look in looks} == {"reconcile FineTuneJob"}
    assert {(t["k8s.namespace.name"], t["finetune.job.name"], t["finetune.job.uid"]) for t in told} == {
        (place.name, NAME, uid)
    }
    done = [action for one in told for action in one["finetune.actions"]]
    assert [action for action in done if action != "DeleteJob"] == ["CreateConfig", "CreatePreflight", "CreateTrain"]
    last = told[-1]
    assert (last["finetune.phase"], last["finetune.reason"], last["finetune.run.id"]) == (
        "Succeeded",
        "Trained",
        "a" * 16,
    )
    assert last["finetune.status.written"] is True

    of = {look.span_id: look for look in looks}
    children = [span for span in spans if span.parent_span_id]
    assert {span.kind for span in children} == {Span.SPAN_KIND_CLIENT}
    for child in children:
        look = of[child.parent_span_id]
        assert child.trace_id == look.trace_id
        assert look.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        assert child.end_time_unix_nano <= look.end_time_unix_nano
    assert {"POST configmaps", "POST jobs", "POST events", "PUT finetunejobs/status"} <= {c.name for c in children}
    created = [attributes(child) for child in children if child.name == "POST jobs"]
    assert [(one["http.response.status_code"], one["server.port"]) for one in created] == [(201, plane.port)] * 2
    assert {one["url.path"] for one in created} == {f"/apis/batch/v1/namespaces/{place.name}/jobs"}
    assert TOKEN.encode() not in b"".join(body for _, _, body in collector.received)


def test_the_last_spans_are_sent_at_the_end(plane: Plane, tmp_path: Path, collector: Collector) -> None:
    with sending(plane, tmp_path, collector.url, OTEL_BSP_SCHEDULE_DELAY="600000") as place:
        place.apply(NAME)
        place.reaches(NAME, "Succeeded", "Trained")
        assert collector.received == []
        place.operator.signal(signal.SIGTERM)
        assert place.operator.ended() == 0
    assert "CreateTrain" in str(collector.spans())


def test_a_look_that_fails_says_why(plane: Plane, tmp_path: Path, collector: Collector) -> None:
    """A quota forbids the ConfigMap, which lasts: the status tells it, and the request that was refused is red."""
    with sending(plane, tmp_path, collector.url) as place:
        path = f"/api/v1/namespaces/{place.name}/resourcequotas"
        spec = {"hard": {"configmaps": "0"}}
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": spec}
        place.plane.create(path, quota)
        eventually("the quota counts", lambda: "hard" in place.plane.get(f"{path}/none").get("status", {}))
        place.apply(NAME)
        place.reaches(NAME, "Pending", "CreateForbidden")
        eventually("it is told", lambda: "CreateForbidden" in str(collector.spans()))
    refused = next(span for span in collector.spans() if span.name == "POST configmaps")
    assert refused.status.code == Status.STATUS_CODE_ERROR
    assert attributes(refused)["error.type"] == "403"


def test_an_endpoint_that_never_answers_changes_nothing_for_the_job(plane: Plane, tmp_path: Path) -> None:
    with (
        nobody() as endpoint,
        sending(plane, tmp_path, endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="0.5", OTEL_BSP_SCHEDULE_DELAY="100") as place,
    ):
        for number in range(3):
            place.apply(f"job-{number}")
        for number in range(3):
            place.reaches(f"job-{number}", "Succeeded", "Trained")
            assert place.kubelet.jobs_of(f"job-{number}") == ["p1", "t1"]
        eventually("the log tells it", lambda: "Failed to export" in place.operator.log.read_text())
        place.operator.signal(signal.SIGTERM)
        assert place.operator.ended() == 0
    told = [line for line in place.operator.log.read_text().splitlines() if "OpenTelemetry: " in line]
    assert len(told) == len({line.partition("OpenTelemetry: ")[2][:20] for line in told}) <= 3


def test_without_an_endpoint_nothing_is_said_of_traces(plane: Plane, tmp_path: Path) -> None:
    with a_place(plane, tmp_path) as place:
        place.apply(NAME)
        place.reaches(NAME, "Succeeded", "Trained")
    assert "trace" not in place.operator.log.read_text()
