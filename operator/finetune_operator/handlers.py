"""The only importer of kopf: its watches feed the cache and the queue, and that is all it does for us.

`fill` lists all there is before any event is handled, on.event keeps it fresh and names the FineTuneJobs to look at.
It writes no annotations, finalizers or Events. Kopf lists again after a watch was cut off, but does not tell what
vanished meanwhile; `resync` finds that out.

All of this goes on in an operator that does not lead, so that its picture is whole when its turn comes.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, get_args

import aiohttp
import kopf

from finetune_api import GROUP, VERSION
from finetune_operator.cache import Cache, Kind
from finetune_operator.kube import ApiError, Kube
from finetune_operator.views import SELECTOR

logger = logging.getLogger(__name__)

TROUBLE = (ApiError, aiohttp.ClientError, TimeoutError, OSError)
WATCHED: dict[Kind, tuple[str, str]] = {
    "finetunejobs": (GROUP, VERSION),
    "finetuneprofiles": (GROUP, VERSION),
    "jobs": ("batch", "v1"),
    "pods": ("", "v1"),
    "configmaps": ("", "v1"),
}
RESYNC_SECONDS = 60.0
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


def settings() -> kopf.OperatorSettings:
    """Nothing that writes, no scanning for other resources, children filtered by the API server."""
    chosen = kopf.OperatorSettings()
    chosen.queueing.worker_limit = None
    chosen.scanning.disabled = True
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.persistence.diffbase_storage = _NoDiffs()
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
    """Fill the cache, then watch until cancelled; ends by itself only when a watch is lost for good or on a signal."""
    await fill(cache, kube, full, namespaces=namespaces)
    await kopf.operator(
        registry=registry(cache, add, kubeconfig=kubeconfig),
        settings=settings(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=list(namespaces),
    )


async def fill(cache: Cache, kube: Kube, full: asyncio.Event, *, namespaces: Sequence[str]) -> None:
    """Lists everything once, patiently, and sets `full`.

    kopf's own indexes would do the same, but wake every object listed so far for each that follows: with thousands of
    jobs that takes minutes.
    """
    for kind in get_args(Kind):
        while True:
            try:
                await _compare(cache, kube, kind, _nobody, namespaces=namespaces)
                break
            except TROUBLE as error:
                logger.warning("%s cannot be listed: %s; asking again", kind, error)
                await asyncio.sleep(1.0)
    full.set()


async def follow(cache: Cache, kube: Kube, turn: asyncio.Event, *, namespaces: Sequence[str]) -> None:
    """Returns when this operator's turn has come, with a fresh picture: what a watch has missed is found out first."""
    clock = asyncio.get_running_loop().time
    began = clock()
    while not await _within(RESYNC_SECONDS, turn):
        await refresh(cache, kube, _nobody, namespaces=namespaces)
    if clock() - began > YOUNG_SECONDS:
        await refresh(cache, kube, _nobody, namespaces=namespaces)


async def resync(cache: Cache, kube: Kube, add: Callable[[str], None], *, namespaces: Sequence[str]) -> None:
    """Every minute: find what the watches have missed. Runs until cancelled."""
    while True:
        await asyncio.sleep(RESYNC_SECONDS)
        await refresh(cache, kube, add, namespaces=namespaces)


async def refresh(cache: Cache, kube: Kube, add: Callable[[str], None], *, namespaces: Sequence[str]) -> None:
    """List everything and compare. What cannot be listed stays as it was."""
    for kind in get_args(Kind):
        try:
            await _compare(cache, kube, kind, add, namespaces=namespaces)
        except TROUBLE as error:
            logger.warning("%s could not be listed: %s", kind, error)
        except Exception:  # an answer that nobody expects must not end the process, now and after each restart
            logger.exception("what was listed of %s could not be taken in", kind)


async def _compare(
    cache: Cache, kube: Kube, kind: Kind, add: Callable[[str], None], *, namespaces: Sequence[str]
) -> None:
    for place in _places(kind, namespaces):
        listing = await kube.list(kind, place)
        where = [place] if place else []
        for key in cache.replace(kind, listing.items, version=listing.version, namespaces=where):
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
