"""The only importer of opentelemetry: a trace of every look at a FineTuneJob that did something, where it is asked for.

The environment asks, by the variables of OpenTelemetry's specification (configuration/sdk-environment-variables.md and
protocol/exporter.md). Those that are not read here are read by its SDK. Without an endpoint nothing of it is imported.

Whether a look is worth telling is known at its end, so what it does is noted while it goes on and becomes spans then. A
thread of the SDK's sends them from a bounded queue: an endpoint that does not answer costs spans and nothing else.
"""

import importlib.metadata
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from finetune_api.status import FineTuneJobStatus
from finetune_operator.verdict import reason_of
from finetune_operator.views import Subject

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

SERVICE = "finetune-operator"
"""`service.name`, unless the environment says another one."""
LOOK = "reconcile FineTuneJob"
"""The name of a look's span. Those of its requests are called by method and resource, as in `POST jobs`."""
PROTOCOL = "http/protobuf"
LAST_SECONDS = 3.0
"""What has not been sent so long after the operator's end is given up."""
AGAIN_SECONDS = 600.0
"""Between two lines of the log that say the same of what could not be sent."""
LONGEST_WORDS = 1000
"""Characters of an error."""


class Attribute:
    """Names of attributes: OpenTelemetry's where its semantic conventions have one, else with `finetune.`."""

    NAMESPACE = "k8s.namespace.name"
    JOB = "finetune.job.name"
    UID = "finetune.job.uid"
    RUN = "finetune.run.id"
    PHASE = "finetune.phase"
    REASON = "finetune.reason"
    ACTIONS = "finetune.actions"
    WRITTEN = "finetune.status.written"
    ERROR = "error.type"
    METHOD = "http.request.method"
    PATH = "url.path"
    ADDRESS = "server.address"
    PORT = "server.port"
    CODE = "http.response.status_code"


Value = str | bool | int | list[str]
_tracer: "Tracer | None" = None
_provider: "TracerProvider | None" = None


# --- whether, and where to ---


def asked(environment: Mapping[str, str]) -> str | None:
    """The endpoint that traces go to; None where none are asked for. An empty variable is one that is not set.

    Raises ValueError, with words for the log, where they are asked for in a way that is not known here.
    """

    def said(*names: str) -> tuple[str, str]:
        """The first of these that is set, and its value."""
        found = ((name, text) for name in names if (text := environment.get(name, "").strip()))
        return next(found, (names[-1], ""))

    name, endpoint = said("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled, exporters = (said(one)[1].lower() for one in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"))
    wanted = [exporter.strip() for exporter in (exporters or "otlp").split(",")]
    if not endpoint or disabled == "true" or "none" in wanted:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:  # the value may hold a password: it is not told
        raise ValueError(f"{name} is no address of HTTP; write http://HOST:4318 or https://HOST:4318")
    if "otlp" not in wanted:
        raise ValueError(f"OTEL_TRACES_EXPORTER is {exporters}, and only otlp is known here; set it to otlp")
    name, protocol = said("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol.lower() not in ("", PROTOCOL):
        raise ValueError(
            f"{name} is {protocol}, and only {PROTOCOL} is known here; set it to that, and the endpoint to the "
            f"collector's port for HTTP, which is 4318 by default"
        )
    return endpoint


def begin() -> None:
    """From now on send traces, if the environment asks for them. Raises nothing: what it has wrong is logged."""
    global _tracer, _provider
    try:
        endpoint = asked(os.environ)
        if endpoint is None:
            return
        said = logging.getLogger("opentelemetry")
        said.handlers, said.propagate = [_Seldom()], False
        _provider = _connect()
        _tracer = _provider.get_tracer("finetune_operator", importlib.metadata.version("finetune-operator"))
    except Exception as error:  # jobs do not wait until somebody mends a variable
        logger.error("traces stay off: %s", error)
        return
    logger.info("traces go to %s", urlsplit(endpoint).hostname)


def _connect() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the SDK's word for none
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # it would wait for half a minute
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def end() -> None:
    """Send what is left, for at most LAST_SECONDS."""
    global _tracer, _provider
    provider, _tracer, _provider = _provider, None, None
    if provider is None:
        return
    last = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
    last.start()
    last.join(LAST_SECONDS)
    if last.is_alive():
        logger.warning("the last spans could not be sent within %g s", LAST_SECONDS)


class _Seldom(logging.Handler):
    """What the SDK says, each kind once in AGAIN_SECONDS: it says the same again for every batch it cannot send."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        kind, now = (record.name, record.lineno), time.monotonic()
        if now - self._told.get(kind, -inf) < AGAIN_SECONDS:
            return
        self._told[kind] = now
        words = re.sub(r"\?\S+", "?...", record.getMessage())[:LONGEST_WORDS]  # an endpoint may carry a key
        again = f"told at most every {AGAIN_SECONDS:g} s; jobs do not depend on it, see docs/observability.md"
        logger.warning("OpenTelemetry: %s; %s", words.rstrip("."), again)


# --- what a look does ---


@dataclass
class _Timed:
    """A span to be."""

    attributes: dict[str, Value]
    began: int = field(default_factory=time.time_ns)
    """Nanoseconds since 1970, like `ended`."""
    ended: int = 0
    failed: str | None = None
    """In words, which may be none."""

    def fail(self, error: Exception) -> None:
        name = type(error).__name__
        self.attributes[Attribute.ERROR] = name
        self.failed = f"{name}: {error}"[:LONGEST_WORDS]


@dataclass
class _Request(_Timed):
    name: str = ""

    def answered(self, code: int) -> None:
        self.attributes[Attribute.CODE] = code
        if code >= 400:
            self.attributes[Attribute.ERROR], self.failed = str(code), ""


@dataclass
class _Look(_Timed):
    actions: list[str] = field(default_factory=list)
    requests: list[_Request] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return self.failed is None and not self.actions and not self.attributes[Attribute.WRITTEN]


_current: ContextVar[_Look | None] = ContextVar("look", default=None)
_UNTOLD: AbstractContextManager[None] = nullcontext()
_UNTOLD_REQUEST: AbstractContextManager[Callable[[int], None]] = nullcontext(lambda code: None)


def look(subject: Subject | None) -> AbstractContextManager[None]:
    """Around one look at a FineTuneJob, which is told unless it changed nothing and raised nothing."""
    return _UNTOLD if _tracer is None or subject is None else _looking(_tracer, subject)


def acted(action: str) -> None:
    """This was done in the current look."""
    if (found := _current.get()) is not None:
        found.actions.append(action)


def wrote(status: FineTuneJobStatus) -> None:
    """This was written in the current look."""
    if (found := _current.get()) is not None:
        found.attributes.update({**_said(status), Attribute.WRITTEN: True})


def request(method: str, target: str, url: str) -> AbstractContextManager[Callable[[int], None]]:
    """Around one HTTP request, to be called with its status; told with the look it belongs to, if it does to one.

    `target` is what is asked for in words that do not differ from object to object. Of `url` no query is told.
    """
    found = _current.get()
    return _UNTOLD_REQUEST if found is None else _requesting(found, method, target, url)


@contextmanager
def _looking(tracer: "Tracer", subject: Subject) -> Iterator[None]:
    named = {Attribute.NAMESPACE: subject.namespace, Attribute.JOB: subject.name, Attribute.UID: subject.uid}
    found = _Look({**named, **_said(subject.status), Attribute.WRITTEN: False})
    token = _current.set(found)
    try:
        yield
    except Exception as error:
        found.fail(error)
        raise
    finally:
        _current.reset(token)
        found.ended = time.time_ns()
        if not found.idle:
            _tell(tracer, found)


@contextmanager
def _requesting(found: _Look, method: str, target: str, url: str) -> Iterator[Callable[[int], None]]:
    noted = _Request({Attribute.METHOD: method, **_where(url)}, name=f"{method} {target}")
    found.requests.append(noted)
    try:
        yield noted.answered
    except Exception as error:
        noted.fail(error)
        raise
    finally:
        noted.ended = time.time_ns()


def _where(url: str) -> dict[str, Value]:
    try:
        parts = urlsplit(url)
        found = {Attribute.ADDRESS: parts.hostname, Attribute.PORT: parts.port, Attribute.PATH: parts.path}
    except ValueError:  # to be told by whoever sends the request
        return {}
    return {name: value for name, value in found.items() if value is not None}


def _said(status: FineTuneJobStatus) -> dict[str, Value]:
    run = {Attribute.RUN: status.run.id} if status.run is not None else {}
    return {**run, Attribute.PHASE: status.phase or "Pending", Attribute.REASON: reason_of(status)}


def _tell(tracer: "Tracer", found: _Look) -> None:
    """A span for the look, and below it one for each of its requests."""
    from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context

    def finish(span: Span, timed: _Timed) -> None:
        if timed.failed is not None:
            span.set_status(StatusCode.ERROR, timed.failed or None)
        span.end(timed.ended)

    attributes = {**found.attributes, Attribute.ACTIONS: found.actions}
    parent = tracer.start_span(LOOK, attributes=attributes, start_time=found.began)
    context = set_span_in_context(parent)
    for one in found.requests:
        span = tracer.start_span(one.name, context, SpanKind.CLIENT, one.attributes, start_time=one.began)
        one.ended = one.ended or found.ended  # a question that the look did not wait for has no end yet
        finish(span, one)
    finish(parent, found)
