"""Why the Job controller could not make pods: a quota, an admission rule. Only its Events say so.

They are read once for all Jobs of a namespace. An API server finds those of one Job no faster: it goes through all
Events of the namespace either way, and a thousand Jobs that wait for their first pods would have it do so for each.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_operator.kube import ApiError, Kube

AGAIN = 10.0
"""Seconds between two readings of a namespace."""


@dataclass
class _Place:
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    when: float = -AGAIN
    said: Mapping[str, str] = field(default_factory=dict)


class Refusals:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._places: dict[str, _Place] = {}

    async def of(self, namespace: str, job_uid: str) -> str | None:
        """In the words of the newest Event; None if there is none."""
        place = self._places.setdefault(namespace, _Place())
        async with place.reading:
            if time.monotonic() - place.when >= AGAIN:
                with contextlib.suppress(ApiError):  # without the right to read Events the status just says less
                    place.said = await self._kube.refusals(namespace)
                place.when = time.monotonic()
        return place.said.get(job_uid)
