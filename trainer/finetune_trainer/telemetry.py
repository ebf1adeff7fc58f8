"""One port for everybody who watches a pod: /progress (JSON), /metrics (Prometheus) and /healthz.

All of it comes from the file progress.json that rank 0 replaces as it goes on, so that serving never touches a rank.
"""

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_api.contract import Progress

log = logging.getLogger("finetune.telemetry")

STAGES = ("Loading", "Training", "Evaluating", "Publishing")


def read_progress(path: Path) -> Progress | None:
    """The last progress a rank has written; None when there is none (yet)."""
    try:
        return Progress.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


class ProgressCollector(Collector):
    """Progress as gauges. Names follow Prometheus' conventions; the job is named by the labels of the scrape."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def collect(self) -> Iterator[GaugeMetricFamily]:
        progress = read_progress(self._path)
        stage = GaugeMetricFamily("finetune_stage", "1 for the stage the run is in.", labels=["stage"])
        for name in STAGES:
            stage.add_metric([name], float(progress is not None and progress.stage == name))
        yield stage
        if progress is None:
            return
        best = progress.checkpoint.best if progress.checkpoint else None
        values: dict[str, tuple[str, float | None]] = {
            "finetune_step": ("Optimizer steps done.", progress.step),
            "finetune_planned_steps": ("Optimizer steps the run will have.", progress.total_steps),
            "finetune_epoch": ("How often each row has been seen.", progress.epoch),
            "finetune_loss": ("Training loss, a mean over labels.", progress.loss),
            "finetune_learning_rate": ("Learning rate of the last step.", progress.learning_rate),
            "finetune_samples_per_second": ("Rows trained on per second, over all ranks.", progress.samples_per_second),
            "finetune_attempt": ("Number of this attempt's claim.", progress.attempt),
            "finetune_resumed_step": ("Step this attempt went on from.", progress.resumed_from_step),
            "finetune_checkpoint_step": (
                "Step of the last committed checkpoint.",
                progress.checkpoint.step if progress.checkpoint else None,
            ),
            "finetune_checkpoint_timestamp_seconds": (
                "When the last checkpoint was committed, in seconds since 1970.",
                _seconds(progress.checkpoint.committed_at) if progress.checkpoint else None,
            ),
            "finetune_best_checkpoint_step": ("Step of the best checkpoint.", best.step if best else None),
            "finetune_estimated_completion_timestamp_seconds": (
                "When the run is expected to be done, in seconds since 1970.",
                _seconds(progress.estimated_completion_time),
            ),
            "finetune_progress_timestamp_seconds": (
                "When progress was last reported, in seconds since 1970.",
                _seconds(progress.updated_at),
            ),
        }
        for name, (text, value) in values.items():
            if value is not None:
                yield GaugeMetricFamily(name, text, value=value)


def _seconds(time: str | None) -> float | None:
    if time is None:
        return None
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        with suppress(OSError, AttributeError):
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _ServerV4(_Server):
    address_family = socket.AF_INET


def serve(path: Path, port: int) -> ThreadingHTTPServer | None:
    """Serve the progress file at `port` on all addresses, in threads; None, with a warning, when that cannot be."""
    registry = CollectorRegistry()
    registry.register(ProgressCollector(path))

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            route = self.path.partition("?")[0]
            if route == "/healthz":
                self._answer(200, "text/plain; charset=utf-8", b"ok\n")
            elif route == "/metrics":
                self._answer(200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry))
            elif route == "/progress":
                progress = read_progress(path)
                if progress is None:
                    self._answer(503, "application/json", b'{"error": "no progress yet"}\n')
                else:
                    self._answer(200, "application/json", progress.model_dump_json(by_alias=True).encode())
            else:
                self._answer(404, "text/plain; charset=utf-8", b"/progress, /metrics and /healthz are here\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class says so
            """Scrapes come every few seconds and are not worth a line."""

    for kind, address in ((_Server, "::"), (_ServerV4, "")):
        try:
            server = kind((address, port), Handler)
        except OSError as error:
            problem = error
            continue
        threading.Thread(target=server.serve_forever, name="telemetry", daemon=True).start()
        return server
    log.warning("port %d cannot be served (%s): progress is not visible from outside", port, problem)
    return None
