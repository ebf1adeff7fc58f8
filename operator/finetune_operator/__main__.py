"""finetune-operator: watches FineTuneJobs, inside a cluster or from outside with --kubeconfig."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.resolve import Defaults
from finetune_operator import handlers
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.metrics import QUEUE, QUEUE_AGE, Phases, register
from finetune_operator.observe import Observer
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import KeyedQueue
from finetune_operator.reconcile import Reconciler

logger = logging.getLogger("finetune_operator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 after SIGTERM or SIGINT, 1 when a watch or the connection is lost for good."""
    options = _parser().parse_args(arguments)
    _log(options.log_format, options.log_level)
    if options.kubeconfig is not None:
        options.kubeconfig = os.path.abspath(os.path.expanduser(options.kubeconfig))
        os.environ["KUBECONFIG"] = options.kubeconfig  # where kopf looks
    return asyncio.run(_run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune-operator", description=__doc__)
    parser.add_argument("--kubeconfig", metavar="PATH", help="run outside the cluster that this file names")
    parser.add_argument(
        "--namespace", action="append", default=[], metavar="NS", help="watch this namespace; repeatable; default: all"
    )
    parser.add_argument("--trainer-image", required=True, metavar="REF", help="image of train pods")
    parser.add_argument("--preflight-image", required=True, metavar="REF", help="image of preflight pods")
    parser.add_argument("--metrics-port", type=int, default=8080, metavar="PORT", help="/metrics, /healthz; 0: off")
    parser.add_argument("--log-format", choices=["text", "json"], default="text")
    parser.add_argument("--log-level", choices=["debug", "info", "warning"], default="info")
    return parser


async def _run(options: argparse.Namespace) -> int:
    kube = await Kube.connect(options.kubeconfig)
    progress = ProgressReader(kube)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        if not await _crds_there(kube, stop):
            return 0
        return await _operate(options, kube, progress, stop)
    finally:
        await progress.close()
        await kube.close()


async def _crds_there(kube: Kube, stop: asyncio.Event) -> bool:
    """Wait until the API server serves our resources; False when stopped before."""
    told = False
    while not stop.is_set():
        try:
            if await kube.served():
                return True
            trouble = "the CustomResourceDefinitions are not installed; apply crds/*.yaml or the chart"
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            trouble = f"the API server does not answer: {error}"
        if not told:
            logger.warning("%s; waiting", trouble)
            told = True
        try:
            await asyncio.wait_for(stop.wait(), timeout=2.0)
        except TimeoutError:
            continue
    return False


async def _operate(options: argparse.Namespace, kube: Kube, progress: ProgressReader, stop: asyncio.Event) -> int:
    cache = Cache()
    defaults = Defaults(trainer_image=options.trainer_image, preflight_image=options.preflight_image)
    queue = KeyedQueue(Reconciler(cache, kube, Observer(cache, kube, progress, defaults=defaults)))
    register(Phases(cache.subjects))
    QUEUE.set_function(lambda: len(queue))
    QUEUE_AGE.set_function(lambda: queue.age)
    server = await _serve(options.metrics_port)
    where = ", ".join(options.namespace) or "all namespaces"
    logger.info("watching %s", where)
    tasks: set[asyncio.Task[Any]] = {
        asyncio.create_task(queue.run(), name="workers"),
        asyncio.create_task(handlers.resync(cache, kube, queue.add, namespaces=options.namespace), name="resync"),
        asyncio.create_task(stop.wait(), name="stop"),
    }
    await asyncio.sleep(0.01)  # kopf takes tasks that begin after its own for its own, and waits for them at the end
    watching = handlers.run(cache, queue.add, namespaces=options.namespace, kubeconfig=options.kubeconfig is not None)
    tasks.add(asyncio.create_task(watching, name="watches"))  # it takes over the signals: its end is the end
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await server.cleanup()
    return _outcome(done)


def _outcome(done: set[asyncio.Task[Any]]) -> int:
    """An orderly stop, or the loss of a part that must not end."""
    code = 0
    for task in done:
        error = task.exception()
        if error is not None:
            logger.error("%s ended: %s: %s", task.get_name(), type(error).__name__, error)
            code = 1
    return code


async def _serve(port: int) -> web.AppRunner:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    application = web.Application()
    application.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        if port:
            await web.TCPSite(runner, port=port).start()
    except OSError as error:
        raise SystemExit(f"--metrics-port: port {port} cannot be used ({error.strerror}); choose another") from error
    return runner


OF_A_JOB = ("job", "job_uid", "run", "phase")


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in OF_A_JOB if hasattr(record, name)},
        }
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _log(form: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json() if form == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(level.upper())
    logging.getLogger("kopf").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
