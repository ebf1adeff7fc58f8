"""The only importer of kopf: its watches feed the cache and the queue, and that is all it does for us.

`kopf.index` fills the cache before any event is handled, on.event keeps it fresh and names the FineTuneJobs to look at.
Neither writes annotations, finalizers or Events. Kopf lists again after a watch was cut off, but does not tell what
vanished meanwhile; `resync` finds that out.
"""

import asyncio
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

WATCHED: dict[Kind, tuple[str, str]] = {
    "finetunejobs": (GROUP, VERSION),
    "finetuneprofiles": (GROUP, VERSION),
    "jobs": ("batch", "v1"),
    "pods": ("", "v1"),
    "configmaps": ("", "v1"),
}
RESYNC_SECONDS = 60.0


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
    concerned: dict[str, frozenset[str]] = {}

    async def fill(body: kopf.Body, **_: Any) -> None:
        """Called with every event but DELETED, before `changed`, and with everything listed before any event."""
        uid = body["metadata"]["uid"]
        concerned[uid] = concerned.get(uid, frozenset()) | cache.apply(kind, body)

    async def changed(event: kopf.RawEvent, **_: Any) -> None:
        raw: Any = event["object"]
        uid = raw["metadata"]["uid"]
        keys = concerned.pop(uid, frozenset())
        if event["type"] == "DELETED":
            keys |= cache.forget(uid)
        # A change that is known already is our own write: what follows from it was decided with it.
        looked_at = kind == "finetunejobs" and event["type"] != "MODIFIED"
        for key in {*keys, *([uid] if looked_at else [])}:
            add(key)

    kopf.index(group, version, kind, id=f"fill-{kind}", registry=handlers)(fill)
    kopf.on.event(group, version, kind, id=f"changed-{kind}", registry=handlers)(changed)


async def run(cache: Cache, add: Callable[[str], None], *, namespaces: Sequence[str], kubeconfig: bool) -> None:
    """Watch until cancelled; ends by itself only when a watch is lost for good or on a signal."""
    await kopf.operator(
        registry=registry(cache, add, kubeconfig=kubeconfig),
        settings=settings(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=list(namespaces),
    )


async def resync(cache: Cache, kube: Kube, add: Callable[[str], None], *, namespaces: Sequence[str]) -> None:
    """Every minute: find what the watches have missed. Runs until cancelled."""
    while True:
        await asyncio.sleep(RESYNC_SECONDS)
        for kind in get_args(Kind):
            try:
                await _compare(cache, kube, kind, add, namespaces=namespaces)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                logger.warning("%s could not be listed: %s", kind, error)


async def _compare(
    cache: Cache, kube: Kube, kind: Kind, add: Callable[[str], None], *, namespaces: Sequence[str]
) -> None:
    places: list[str | None] = [None] if not namespaces or kind == "finetuneprofiles" else list(namespaces)
    for place in places:
        listing = await kube.list(kind, place)
        where = [place] if place else []
        for key in cache.replace(kind, listing.items, version=listing.version, namespaces=where):
            add(key)
