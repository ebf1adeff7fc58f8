"""What only Events say: why the Job controller could not make pods (a quota, an admission rule), and why a node cannot
prepare a pod that it has taken (a volume, the network).

They are read once for all Jobs of a namespace. An API server finds those of one Job no faster: it goes through all
Events of the namespace either way, and a thousand Jobs that wait for their first pods would have it do so for each.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from finetune_operator.kube import TROUBLE

logger = logging.getLogger(__name__)
T = TypeVar("T")

AGAIN = 10.0
"""Seconds between two readings of a namespace."""


@dataclass
class _Place(Generic[T]):
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    when: float | None = None
    said: Mapping[str, T] = field(default_factory=dict)


class Told(Generic[T]):
    """`read` finds what is said in a namespace, by UID of the object that it is said of."""

    def __init__(self, read: Callable[[str], Awaitable[Mapping[str, T]]]) -> None:
        self._read = read
        self._places: dict[str, _Place[T]] = {}

    async def of(self, namespace: str, uid: str) -> T | None:
        """None if nothing is said. Without the right to read Events nothing is."""
        place = self._places.setdefault(namespace, _Place())
        if not place.reading.locked() or place.when is None:  # what was said before does while somebody reads
            async with place.reading:
                await self._freshen(namespace, place)
        return place.said.get(uid)

    async def _freshen(self, namespace: str, place: _Place[T]) -> None:
        if place.when is not None and time.monotonic() - place.when < AGAIN:
            return
        try:
            place.said = await self._read(namespace)
        except TROUBLE as error:
            logger.debug("Events of %s cannot be read: %s", namespace, error)
        place.when = time.monotonic()
