"""finetune-operator: watches FineTuneJobs, inside a cluster or from outside with --kubeconfig."""

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.resolve import Defaults
from finetune_operator import handlers, tracing
from finetune_operator.cache import Cache
from finetune_operator.kube import TROUBLE, Kube
from finetune_operator.leader import Alone, Elector
from finetune_operator.metrics import LEADER, QUEUE, QUEUE_AGE, Phases, register
from finetune_operator.observe import Observer
from finetune_operator.progress import ProgressReader
from finetune_operator.queue import KeyedQueue
from finetune_operator.reconcile import Reconciler

logger = logging.getLogger("finetune_operator")

COLLECTIONS = (20_000, 20, 10)
"""Cycles are rare, and a cache of thousands of jobs is large: looking for them as often as by default takes a sixth of
the time of reading it."""
END_SECONDS = 10.0
"""What has not ended by then is given up, together with the process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 after SIGTERM or SIGINT, 1 when a watch, the connection or the lead is lost for good."""
    options = _parser().parse_args(arguments)
    _log(options.log_format, options.log_level)
    if options.kubeconfig is not None:
        options.kubeconfig = os.path.abspath(os.path.expanduser(options.kubeconfig))
        os.environ["KUBECONFIG"] = options.kubeconfig  # where kopf looks
    gc.set_threshold(*COLLECTIONS)
    tracing.begin()
    try:
        return asyncio.run(_run(options))
    finally:
        tracing.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune-operator", description=__doc__)
    parser.add_argument("--kubeconfig", metavar="PATH", help="run outside the cluster that this file names")
    parser.add_argument(
        "--namespace", action="append", default=[], metavar="NS", help="watch this namespace; repeatable; default: all"
    )
    parser.add_argument("--trainer-image", required=True, metavar="REF", help="image of train pods")
    parser.add_argument("--preflight-image", required=True, metavar="REF", help="image of preflight pods")
    parser.add_argument(
        "--lease",
        type=_lease,
        metavar="NS/NAME",
        help="work only while holding this Lease, else follow; default: no election, there must be no other operator",
    )
    parser.add_argument(
        "--metrics-port", type=int, default=8080, metavar="PORT", help="/metrics, /healthz, /readyz; 0: off"
    )
    parser.add_argument("--log-format", choices=["text", "json"], default="text")
    parser.add_argument("--log-level", choices=["debug", "info", "warning"], default="info")
    return parser


def _lease(text: str) -> tuple[str, str]:
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise argparse.ArgumentTypeError(f"{text} is not NAMESPACE/NAME")
    return namespace, name


async def _run(options: argparse.Namespace) -> int:
    kube = await Kube.connect(options.kubeconfig)
    stop, full = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = web.AppRunner(_application(ready=full.is_set), access_log=None)
    try:
        await _serve(server, options.metrics_port)
        if not await _crds_there(kube, stop):
            return 0
        return await _operate(options, kube, full=full, stop=stop)
    finally:
        await server.cleanup()
        await kube.close()


async def _crds_there(kube: Kube, stop: asyncio.Event) -> bool:
    """Wait until the API server serves our resources; False when stopped before."""
    told = False
    while not stop.is_set():
        try:
            if await kube.served():
                return True
            trouble = "the CustomResourceDefinitions are not installed; apply crds/*.yaml or the chart"
        except TROUBLE as error:
            trouble = f"the API server does not answer: {error}"
        if not told:
            logger.warning("%s; waiting", trouble)
            told = True
        try:
            await asyncio.wait_for(stop.wait(), timeout=2.0)
        except TimeoutError:
            continue
    return False


async def _operate(options: argparse.Namespace, kube: Kube, *, full: asyncio.Event, stop: asyncio.Event) -> int:
    cache, turn, fresh = Cache(), asyncio.Event(), asyncio.Event()
    candidate = _candidate(kube, options.lease)
    kube.write_only_while(lambda: candidate.leading)
    defaults = Defaults(trainer_image=options.trainer_image, preflight_image=options.preflight_image)
    progress = ProgressReader(kube, wake=lambda uid: queue.add(uid), log_names=cache.log_names)
    queue = KeyedQueue(Reconciler(cache, kube, Observer(cache, kube, progress, defaults=defaults)))
    register(Phases(lambda: cache.phases() if turn.is_set() else {}))
    QUEUE.set_function(lambda: len(queue))
    QUEUE_AGE.set_function(lambda: queue.age)
    LEADER.set_function(lambda: float(turn.is_set() and candidate.leading))

    def add(key: str) -> None:
        if fresh.is_set():  # before, nothing is remembered: every FineTuneJob is looked at then
            queue.add(key)

    logger.info("watching %s", ", ".join(options.namespace) or "all namespaces")
    # Kopf takes tasks that begin after its own for its own, and waits for them at the end: these begin before.
    tasks: set[asyncio.Task[Any]] = {
        asyncio.create_task(queue.run(), name="workers"),
        asyncio.create_task(_lead(candidate, full, turn), name="leadership"),
        asyncio.create_task(
            _keep_up(cache, kube, queue, full, turn, fresh, namespaces=options.namespace), name="resync"
        ),
        asyncio.create_task(stop.wait(), name="stop"),
    }
    await asyncio.sleep(0.01)
    watching = handlers.run(
        cache, kube, add, full=full, namespaces=options.namespace, kubeconfig=options.kubeconfig is not None
    )
    tasks.add(asyncio.create_task(watching, name="watches"))  # it takes over the signals: its end is the end
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    code = _outcome(done)
    await _end(pending)
    await candidate.release()
    await progress.close()
    return code


async def _lead(candidate: Elector | Alone, full: asyncio.Event, turn: asyncio.Event) -> None:
    """Only who knows the cluster stands for election: one that cannot list must not take the lead from one that can."""
    await full.wait()
    await candidate.acquire()
    turn.set()
    await candidate.hold()


async def _keep_up(
    cache: Cache,
    kube: Kube,
    queue: KeyedQueue,
    full: asyncio.Event,
    turn: asyncio.Event,
    fresh: asyncio.Event,
    *,
    namespaces: Sequence[str],
) -> None:
    """`fresh` is set once this operator leads and nothing that a watch has missed is wrong in its picture."""
    await full.wait()
    await handlers.follow(cache, kube, turn, namespaces=namespaces)
    fresh.set()
    for uid in cache.subjects():
        queue.add(uid)
    await handlers.resync(cache, kube, queue.add, namespaces=namespaces)


def _candidate(kube: Kube, lease: tuple[str, str] | None) -> Elector | Alone:
    """The name is of this process alone: a restarted one is another contender."""
    if lease is None:
        return Alone()
    namespace, name = lease
    return Elector(kube, namespace=namespace, name=name, identity=f"{socket.gethostname()}_{uuid.uuid4()}")


def _outcome(done: Iterable[asyncio.Task[Any]]) -> int:
    """An orderly stop, or the loss of a part that must not end."""
    code = 0
    for task in done:
        error = task.exception()
        if error is not None:
            logger.error("%s ended: %s: %s", task.get_name(), type(error).__name__, error)
            code = 1
    return code


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels them. Whoever may no longer lead must not live on for one that does not end."""
    for task in tasks:
        task.cancel()
    ended, stuck = await asyncio.wait(tasks, timeout=END_SECONDS)
    for task in ended:
        if not task.cancelled() and task.exception() is not None:
            logger.debug("%s, at the end: %s", task.get_name(), task.exception())
    if stuck:
        names = ", ".join(sorted(task.get_name() for task in stuck))
        logger.error("%s did not end within %g s; the process ends anyway", names, END_SECONDS)
        os._exit(1)


def _application(*, ready: Callable[[], bool]) -> web.Application:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        """Not whether it leads: a rollout waits until the next leader's picture is full, not until it leads."""
        return web.Response(text="ok\n") if ready() else web.Response(text="the watches begin\n", status=503)

    application = web.Application()
    application.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    return application


async def _serve(server: web.AppRunner, port: int) -> None:
    await server.setup()
    try:
        if port:
            await web.TCPSite(server, port=port).start()
    except OSError as error:
        raise SystemExit(f"--metrics-port: port {port} cannot be used ({error.strerror}); choose another") from error


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


class _Text(logging.Formatter):
    """Messages on one line, and what follows an error indented: texts of documents and pods look like no other line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {_printable(line)}" for line in super().formatException(ei).splitlines())


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _log(form: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = _Text("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json() if form == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(level.upper())
    logging.getLogger("kopf").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
