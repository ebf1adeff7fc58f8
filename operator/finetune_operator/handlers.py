"""The only importer of kopf: its watches feed the cache and the queue, and that is all it does for us.

on.event fills and freshens the cache and names the FineTuneJobs to look at; `fill` knows when all has come that was
there. It writes no annotations, finalizers or Events. Kopf lists again after a watch was cut off, but does not tell
what vanished meanwhile; `resync` finds that out.

All of this goes on in an operator that does not lead, so that its picture is whole when its turn comes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, get_args

import kopf

from finetune_api import GROUP, VERSION
from finetune_operator.cache import Cache, Kind
from finetune_operator.kube import TROUBLE, Kube, Listing, Outline
from finetune_operator.views import SELECTOR

logger = logging.getLogger(__name__)

WATCHED: dict[Kind, tuple[str, str]] = {
    "finetunejobs": (GROUP, VERSION),
    "finetuneprofiles": (GROUP, VERSION),
    "jobs": ("batch", "v1"),
    "pods": ("", "v1"),
    "configmaps": ("", "v1"),
}
RESYNC_SECONDS = 60.0
RESYNC_SHARE, LONGEST_REST_SECONDS = 0.01, 300.0
"""Of the processor, at most, for comparing each kind."""
LOOK_SECONDS = 0.1
OVERDUE_SECONDS = 3.0
"""Of kopf's lists, which all come at once: nothing has come of them for so long."""
ON_ITS_WAY_SECONDS = 1.0
"""A list may be that much ahead of the watches."""
CHUNK = 500
"""Whole objects in one answer."""
IDLE_SECONDS = 0.5
"""Kopf holds a task for each object for so long after an event of it: with five seconds, for thousands at a time."""
YOUNG_SECONDS = 5.0
"""A picture of this age is not drawn again when an operator begins to lead: it has just started."""


class _NoDiffs(kopf.DiffBaseStorage):  # type: ignore[misc]
    """kopf copies every object to see later what has changed in it, which only other kinds of handlers ask."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):  # type: ignore[misc]
    """Kopf copies every object's annotations without those of its handlers: ours write none."""

    def fetch(self, *, key: Any, body: kopf.Body) -> None:
        return None

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        return None

    def purge(self, *, key: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        return None

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


def settings() -> kopf.OperatorSettings:
    """Nothing that writes, no scanning for other resources, children filtered by the API server."""
    chosen = kopf.OperatorSettings()
    chosen.queueing.worker_limit = None
    chosen.queueing.idle_timeout = IDLE_SECONDS
    chosen.watching.chunk_size = CHUNK
    chosen.scanning.disabled = True
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.persistence.diffbase_storage = _NoDiffs()
    chosen.persistence.progress_storage = _NoProgress()
    for kind in ("jobs", "pods", "configmaps"):
        group, version = WATCHED[kind]
        chosen.watching.label_selectors[group, version, kind] = SELECTOR
    return chosen


def registry(cache: Cache, add: Callable[[str], None], *, kubeconfig: bool) -> kopf.OperatorRegistry:
    """Handlers that put objects into the cache and UIDs of FineTuneJobs into the queue."""
    handlers = kopf.OperatorRegistry()
    login = kopf.login_with_kubeconfig if kubeconfig else kopf.login_with_service_account
    kopf.on.login(registry=handlers)(login)
    for kind, (group, version) in WATCHED.items():
        _register(handlers, kind, group, version, cache=cache, add=add)
    return handlers


def _register(
    handlers: kopf.OperatorRegistry,
    kind: Kind,
    group: str,
    version: str,
    *,
    cache: Cache,
    add: Callable[[str], None],
) -> None:
    async def changed(event: kopf.RawEvent, **_: Any) -> None:
        raw: Any = event["object"]
        uid = raw["metadata"]["uid"]
        concerned = cache.removed(raw) if event["type"] == "DELETED" else cache.apply(kind, raw)
        # A change that is known already is our own write: what follows from it was decided with it.
        looked_at = kind == "finetunejobs" and event["type"] != "MODIFIED"
        for key in {*concerned, *([uid] if looked_at else [])}:
            add(key)

    kopf.on.event(group, version, kind, id=f"changed-{kind}", registry=handlers)(changed)


async def run(
    cache: Cache,
    kube: Kube,
    add: Callable[[str], None],
    *,
    full: asyncio.Event,
    namespaces: Sequence[str],
    kubeconfig: bool,
) -> None:
    """Watch until cancelled, and set `full` once all is known that was there at the beginning.

    Ends by itself only when a watch is lost for good or on a signal.
    """
    there = await outline(kube, namespaces=namespaces)
    filling = asyncio.create_task(fill(cache, kube, there, full, namespaces=namespaces), name="fill")
    del there  # for as long as it runs
    await asyncio.sleep(0)  # the task is there before kopf's own
    try:
        await kopf.operator(
            registry=registry(cache, add, kubeconfig=kubeconfig),
            settings=settings(),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=list(namespaces),
        )
    finally:
        filling.cancel()


async def outline(kube: Kube, *, namespaces: Sequence[str]) -> list[tuple[Kind, Outline]]:
    """All there is, asked for patiently: an API server that does not answer is no empty cluster."""
    there: list[tuple[Kind, Outline]] = []
    for kind in get_args(Kind):
        for place in _places(kind, namespaces):
            there += [(kind, item) for item in (await _patiently(kube, kind, place)).items]
    return there


async def _patiently(kube: Kube, kind: Kind, place: str | None) -> Listing:
    while True:
        try:
            return await kube.list(kind, place, exact=True)
        except TROUBLE as error:
            logger.warning("%s cannot be listed: %s; asking again", kind, error)
            await asyncio.sleep(1.0)


async def fill(
    cache: Cache,
    kube: Kube,
    there: Sequence[tuple[Kind, Outline]],
    full: asyncio.Event,
    *,
    namespaces: Sequence[str],
) -> None:
    """Sets `full` once the cache has all that was there, as kopf lists it.

    kopf's own indexes would tell the same, but wake every object listed so far for each that follows: with thousands of
    jobs that takes minutes. What does not come for a while is gone by now, or nobody can read it: it is asked for.
    """
    waiting = await _come(cache, there)
    asked = bool(waiting)
    while waiting:
        waiting = [(kind, item) for kind, item in waiting if not await _fetched(cache, kube, kind, item)]
        if waiting:
            await asyncio.sleep(OVERDUE_SECONDS)
    if asked:  # an object that was read here may be gone before kopf lists its kind
        await refresh(cache, kube, _nobody, namespaces=namespaces, exact=True)
    full.set()


async def _come(cache: Cache, there: Sequence[tuple[Kind, Outline]]) -> Sequence[tuple[Kind, Outline]]:
    """What has not come, once nothing more of it does."""
    clock = asyncio.get_running_loop().time
    waiting, since = there, clock()
    while left := [(kind, item) for kind, item in waiting if not cache.knows(item.uid, item.version)]:
        if len(left) < len(waiting):
            waiting, since = left, clock()
        if clock() - since >= OVERDUE_SECONDS:
            break
        await asyncio.sleep(LOOK_SECONDS)
    return left


async def _fetched(cache: Cache, kube: Kube, kind: Kind, item: Outline) -> bool:
    try:
        await _fetch(cache, kube, kind, item, _nobody)
    except TROUBLE as error:
        logger.warning("%s %s cannot be read: %s; asking again", kind, item.full_name, error)
        return False
    return True


async def follow(cache: Cache, kube: Kube, turn: asyncio.Event, *, namespaces: Sequence[str]) -> None:
    """Returns when this operator's turn has come, with a fresh picture: what a watch has missed is found out first."""
    began = asyncio.get_running_loop().time()
    rounds = _Rounds()
    while not await _within(rounds.rest, turn):
        await rounds.go(cache, kube, _nobody, namespaces=namespaces)
    if asyncio.get_running_loop().time() - began > YOUNG_SECONDS:
        await refresh(cache, kube, _nobody, namespaces=namespaces, exact=True)


async def resync(cache: Cache, kube: Kube, add: Callable[[str], None], *, namespaces: Sequence[str]) -> None:
    """Every minute: find what the watches have missed. Runs until cancelled."""
    rounds = _Rounds()
    while True:
        await asyncio.sleep(rounds.rest)
        await rounds.go(cache, kube, add, namespaces=namespaces)


class _Rounds:
    """Which kind's turn it is: every minute, but where there is so much of it that this takes long, less often."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._due = dict.fromkeys(get_args(Kind), self._clock() + RESYNC_SECONDS)

    @property
    def rest(self) -> float:
        return max(0.0, min(self._due.values()) - self._clock())

    async def go(self, cache: Cache, kube: Kube, add: Callable[[str], None], *, namespaces: Sequence[str]) -> None:
        for kind in [kind for kind, due in self._due.items() if due <= self._clock()]:
            began = time.process_time()  # an API server that does not answer costs none
            behind = await _behind(cache, kube, kind, add, namespaces=namespaces, exact=False)
            rest = min((time.process_time() - began) / RESYNC_SHARE, LONGEST_REST_SECONDS)
            self._due[kind] = self._clock() + max(RESYNC_SECONDS, rest)
            await _catch_up(cache, kube, behind, add)


async def refresh(
    cache: Cache, kube: Kube, add: Callable[[str], None], *, namespaces: Sequence[str], exact: bool = False
) -> None:
    """List what there is and compare. What cannot be listed stays as it was."""
    behind: list[tuple[Kind, Outline]] = []
    for kind in get_args(Kind):
        behind += await _behind(cache, kube, kind, add, namespaces=namespaces, exact=exact)
    await _catch_up(cache, kube, behind, add)


async def _behind(
    cache: Cache, kube: Kube, kind: Kind, add: Callable[[str], None], *, namespaces: Sequence[str], exact: bool
) -> list[tuple[Kind, Outline]]:
    """Forgets what is gone. Returns what there is in a newer version than is known."""
    found: list[tuple[Kind, Outline]] = []
    async with _tolerant(kind):
        for place in _places(kind, namespaces):
            listing = await kube.list(kind, place, exact=exact)
            present = {item.uid for item in listing.items}
            for key in cache.keep(kind, present, version=listing.version, namespaces=[place] if place else []):
                add(key)
            found += [(kind, item) for item in listing.items if not cache.knows(item.uid, item.version)]
    return found


async def _catch_up(
    cache: Cache, kube: Kube, behind: Sequence[tuple[Kind, Outline]], add: Callable[[str], None]
) -> None:
    if behind:
        await asyncio.sleep(ON_ITS_WAY_SECONDS)
    for kind, item in behind:
        async with _tolerant(kind):
            await _fetch(cache, kube, kind, item, add)


@contextlib.asynccontextmanager
async def _tolerant(kind: Kind) -> AsyncIterator[None]:
    try:
        yield
    except TROUBLE as error:
        logger.warning("%s could not be listed: %s", kind, error)
    except Exception:  # an answer that nobody expects must not end the process, now and after each restart
        logger.exception("what was listed of %s could not be taken in", kind)


async def _fetch(cache: Cache, kube: Kube, kind: Kind, item: Outline, add: Callable[[str], None]) -> None:
    """Unless a watch has brought it meanwhile. One object that nobody can read must not hide the others."""
    if cache.knows(item.uid, item.version):
        return
    raw = await kube.read(kind, item.namespace, item.name)
    try:
        if raw is not None and raw["metadata"]["uid"] == item.uid:
            concerned = cache.apply(kind, raw)
        else:
            concerned = cache.forget(item.uid, version=item.version)
    except Exception as error:
        logger.warning("%s %s cannot be read: %s: %s", kind, item.full_name, type(error).__name__, error)
        return
    for key in concerned:
        add(key)


def _places(kind: Kind, namespaces: Sequence[str]) -> list[str | None]:
    return [None] if not namespaces or kind == "finetuneprofiles" else list(namespaces)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether it is set by then. Begins no task of its own: kopf would take it for one of kopf's at the end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _nobody(_: str) -> None:
    """Whom a change concerns while another operator leads."""
