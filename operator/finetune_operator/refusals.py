"""Why the Job controller could not make pods: a quota, an admission rule. Only its Events say so.

They are read once for all Jobs of a namespace. An API server finds those of one Job no faster: it goes through all
Events of the namespace either way, and a thousand Jobs that wait for their first pods would have it do so for each.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_operator.kube import TROUBLE, Kube

logger = logging.getLogger(__name__)

AGAIN = 10.0
"""Seconds between two readings of a namespace."""


@dataclass
class _Place:
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    when: float | None = None
    said: Mapping[str, str] = field(default_factory=dict)


class Refusals:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._places: dict[str, _Place] = {}

    async def of(self, namespace: str, job_uid: str) -> str | None:
        """In the words of the newest Event; None if there is none. Without the right to read Events there is none."""
        place = self._places.setdefault(namespace, _Place())
        if not place.reading.locked() or place.when is None:  # what was said before does while somebody reads
            async with place.reading:
                await self._freshen(namespace, place)
        return place.said.get(job_uid)

    async def _freshen(self, namespace: str, place: _Place) -> None:
        if place.when is not None and time.monotonic() - place.when < AGAIN:
            return
        try:
            place.said = await self._kube.refusals(namespace)
        except TROUBLE as error:
            logger.debug("Events of %s cannot be read: %s", namespace, error)
        place.when = time.monotonic()
