"""Leader election: of several operators the one that holds a Lease (coordination.k8s.io/v1) writes, the others wait.

After the algorithm of client-go's tools/leaderelection: the holder renews the Lease, whoever sees it unchanged for as
long as it says takes it over, and the resourceVersion lets one writer win. Clocks are never compared, only lengths of
time on one process' own clock; what stands in the Lease is for people. A leader's time counts from before it asked, a
follower's from after it was answered, and a leader gives up (`deadline`) well before a follower takes over
(`duration`): whatever is slow, stopped or unanswered between them, and with clocks of different speeds, no two lead.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol

from finetune_operator.kube import ApiError

logger = logging.getLogger(__name__)

Document = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Seconds. `duration`, `deadline` and `retry` are those of Kubernetes' own components."""

    duration: float = 15.0
    """For how long others leave a Lease alone that nobody renews."""
    deadline: float = 10.0
    """For how long a leader leads after it last asked with success."""
    retry: float = 2.0
    request: float = 3.0
    """The longest one request may take: several fit into the deadline."""


class LeadershipLost(Exception):
    """Another process leads, or may lead any moment: this one must end."""


class Leases(Protocol):
    """What the election asks of the API server. Raises ApiError, TimeoutError and what the network raises."""

    async def read_lease(self, namespace: str, name: str, *, seconds: float) -> Document: ...

    async def write_lease(self, lease: Mapping[str, Any], *, seconds: float) -> Document:
        """Creates it if it has no resourceVersion, else replaces that version. Returns it as written."""
        ...


def awake() -> float:
    """Seconds on a clock that nobody sets, and which goes on while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Alone:
    """No election: whoever starts this process sees to it that there is no other."""

    leading = True

    async def acquire(self) -> None:
        return None

    async def hold(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def release(self) -> None:
        return None


class Elector:
    """One contender: acquire, then hold until cancelled, then release. `identity` is of this process alone."""

    def __init__(
        self,
        leases: Leases,
        *,
        namespace: str,
        name: str,
        identity: str,
        timing: Timing | None = None,
        clock: Callable[[], float] = awake,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._leases = leases
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._timing = timing or Timing()
        self._clock = clock
        self._sleep = sleep
        self._lease: Document | None = None
        """As last read or written."""
        self._unchanged_since: float | None = None
        """When the Lease was first heard of as it is; None before the first answer."""
        self._until = -math.inf
        self._said = ""

    def __str__(self) -> str:
        return f"Lease {self._namespace}/{self._name}"

    @property
    def leading(self) -> bool:
        """Whether this process may write at this moment: it turns false by itself, though nothing runs."""
        return self._clock() < self._until

    async def acquire(self) -> None:
        """Returns when this process leads. However long the API server is away, it goes on asking."""
        while not self.leading:
            try:
                wait = await self._contend()
            except Exception as error:
                self._say(logging.WARNING, f"the {self} cannot be had: {_words(error)}; asking again")
                wait = self._timing.retry
            if not self.leading:
                await self._sleep(wait)
        self._said = ""
        logger.info("leading by the %s as %s", self, self._identity)

    async def hold(self) -> NoReturn:
        """Renews until cancelled. Raises LeadershipLost when another holds the Lease, or when time is up.

        Any error counts as not renewed.
        """
        trouble = "this process was stopped for too long"
        asked = self._clock()
        while self.leading:
            due = asked + self._timing.retry - self._clock()
            await self._sleep(max(min(due, self._left()), 0.01))
            if not self.leading:
                break
            asked = self._clock()
            try:
                await self._renew()
                trouble = "this process was stopped for too long"
            except LeadershipLost:
                raise
            except Exception as error:
                trouble = _words(error)
                logger.warning("the %s was not renewed: %s", self, trouble)
        late = f"the {self} was not renewed within {self._timing.deadline:g} s ({trouble})"
        raise LeadershipLost(f"{late}: another operator may lead by now")

    async def release(self) -> None:
        """Lets the next one lead at once. Only for a process whose last write has ended."""
        if not self.leading:
            return
        self._until = -math.inf
        try:
            await self._leases.write_lease(self._document(""), seconds=self._timing.request)
        except Exception as error:
            logger.warning("the %s was not released: %s; the next one waits until it expires", self, _words(error))

    # --- steps ---

    async def _contend(self) -> float:
        """One look at the Lease, and a try to take it if it is free. Returns seconds until the next look."""
        new = await self._read()
        heard = self._clock()
        first = self._unchanged_since is None
        if self._unchanged_since is None or _version(new) != _version(self._lease):
            self._unchanged_since = heard
        self._lease = new
        holder = _holder(new)
        # One that has been deleted has a holder that nobody knows: it gets the time that its Lease would have had.
        free = first if new is None else holder in ("", self._identity)
        free_at = self._unchanged_since + self._duration()
        if not free and heard < free_at:
            self._say(logging.INFO, f"following {holder or 'whoever holds it'} by the {self}")
            return min(self._timing.retry, free_at - heard)
        try:
            await self._write()
        except ApiError as error:
            if error.code != 409:  # a conflict: somebody else was faster
                raise
        return self._timing.retry

    async def _renew(self) -> None:
        try:
            await self._write()
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            self._lease = await self._read()  # we may have written it ourselves, and not heard the answer
            if self._lease is not None and _holder(self._lease) != self._identity:
                self._until = -math.inf  # nothing more is written, and another's Lease is not released
                who = _holder(self._lease) or "nobody"
                raise LeadershipLost(f"the {self} is held by {who}, no longer by this process") from error
            await self._write()

    async def _read(self) -> Document | None:
        try:
            return await self._leases.read_lease(self._namespace, self._name, seconds=self._patience())
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def _write(self) -> None:
        asked = self._clock()
        self._lease = await self._leases.write_lease(self._document(self._identity), seconds=self._patience())
        self._until = asked + self._timing.deadline

    def _document(self, holder: str) -> Document:
        """The Lease with this holder, other people's fields and labels as they were."""
        lease = self._lease or {"metadata": {"namespace": self._namespace, "name": self._name}}
        spec = lease.get("spec") or {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if holder and holder != spec.get("holderIdentity"):
            transitions = int(spec.get("leaseTransitions") or 0) + 1 if spec else 0
            spec = {**spec, "acquireTime": now, "leaseTransitions": transitions}
        duration = math.ceil(self._timing.duration)
        spec = {**spec, "holderIdentity": holder, "renewTime": now, "leaseDurationSeconds": duration}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": lease["metadata"],
            "spec": spec,
        }

    # --- times ---

    def _left(self) -> float:
        return self._until - self._clock()

    def _patience(self) -> float:
        """Seconds for one request: a leader's ends with its time."""
        left = self._left()
        return min(self._timing.request, left) if left > 0 else self._timing.request

    def _duration(self) -> float:
        """What the Lease's holder has promised to its followers."""
        said = ((self._lease or {}).get("spec") or {}).get("leaseDurationSeconds")
        return float(said) if said else self._timing.duration

    def _say(self, level: int, words: str) -> None:
        """Once, until there is something else to say."""
        if words != self._said:
            self._said = words
            logger.log(level, "%s", words)


def _version(lease: Document | None) -> str | None:
    return None if lease is None else lease["metadata"]["resourceVersion"]


def _holder(lease: Document | None) -> str:
    return str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
