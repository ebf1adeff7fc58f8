"""The election: one leads, the others follow, whatever is slow, lost, stopped or killed; and never two lead."""

import asyncio
import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import virtual_time
from tests.virtual_time import now

from finetune_operator.kube import ApiError
from finetune_operator.leader import Alone, Elector, LeadershipLost, Timing

Document = dict[str, Any]
TIMING = Timing()


class Server:
    """One Lease with resourceVersions, as the API server keeps it."""

    def __init__(self) -> None:
        self.lease: Document | None = None
        self.written: list[tuple[float, str]] = []
        """When, and by whom it was held then."""
        self._version = 0

    def read(self) -> Document:
        if self.lease is None:
            raise ApiError(404, "NotFound", "there is no such Lease")
        return copy.deepcopy(self.lease)

    def write(self, lease: Document) -> Document:
        there = None if self.lease is None else self.lease["metadata"]["resourceVersion"]
        asked = lease["metadata"].get("resourceVersion")
        if asked is None and there is not None:
            raise ApiError(409, "AlreadyExists", "the Lease exists")
        if asked is not None and there is None:
            raise ApiError(404, "NotFound", "there is no such Lease")
        if asked != there:
            raise ApiError(409, "Conflict", "the Lease has changed")
        self._version += 1
        self.lease = copy.deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self._version)
        self.written.append((now(), self.holder))
        return self.read()

    @property
    def holder(self) -> str:
        assert self.lease is not None
        return str(self.lease["spec"].get("holderIdentity", ""))


class Killed(BaseException):
    """SIGKILL: nothing of the process runs any more."""


class Terminated(BaseException):
    """SIGTERM."""


Fate = Literal["answered", "unheard", "lost", "refused", "killed", "terminated"]


@dataclass(frozen=True)
class Luck:
    """What happens to one request, and how long the process is stopped when it waits. Seconds."""

    there: float = 0.01
    back: float = 0.01
    fate: Fate = "answered"
    stopped: float = 0.0


CALM = Luck()


@dataclass
class Line:
    """From one process to the server. What is on its way arrives, whatever has become of who sent it."""

    server: Server
    luck: list[Luck] = field(default_factory=list)
    """Of the next requests; what comes after them is calm."""
    heard: Callable[[], None] = lambda: None

    async def read_lease(self, namespace: str, name: str, *, seconds: float) -> Document:
        return await self._ask(self.server.read, seconds)

    async def write_lease(self, lease: Any, *, seconds: float) -> Document:
        sent = copy.deepcopy(dict(lease))
        return await self._ask(lambda: self.server.write(sent), seconds)

    async def _ask(self, question: Callable[[], Document], seconds: float) -> Document:
        luck = self.luck.pop(0) if self.luck else CALM
        assert 0 < seconds <= TIMING.request
        if luck.fate == "refused":
            await asyncio.sleep(luck.there + luck.stopped)
            raise ApiError(503, "ServiceUnavailable", "not now")
        answer: list[Document | ApiError] = []
        if luck.fate != "lost":
            asyncio.get_running_loop().call_later(luck.there, self._arrives, question, answer)
        if luck.fate in ("killed", "terminated"):
            await asyncio.sleep(luck.stopped)
            raise Killed if luck.fate == "killed" else Terminated
        if luck.fate in ("lost", "unheard") or luck.there + luck.back > seconds:
            await asyncio.sleep(seconds + luck.stopped)
            raise TimeoutError
        await asyncio.sleep(luck.there + luck.back + luck.stopped)
        asyncio.get_running_loop().call_soon(self.heard)  # once the process has done with the answer
        (said,) = answer
        if isinstance(said, ApiError):
            raise said
        return said

    @staticmethod
    def _arrives(question: Callable[[], Document], answer: list[Document | ApiError]) -> None:
        try:
            answer.append(question())
        except ApiError as error:
            answer.append(error)


def contender(line: Line, name: str, **more: Any) -> Elector:
    more = {"clock": now, **more}
    return Elector(line, namespace="system", name="operator", identity=name, **more)


# --- taking and keeping ---


def test_the_first_one_creates_the_lease_and_leads_at_once() -> None:
    async def story() -> None:
        server = Server()
        one = contender(Line(server), "one")
        assert not one.leading
        await one.acquire()
        assert one.leading
        assert now() < 0.1
        assert server.lease is not None
        assert server.lease["metadata"] == {"namespace": "system", "name": "operator", "resourceVersion": "1"}
        spec = server.lease["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 15, 0)
        assert spec["acquireTime"] == spec["renewTime"]

    virtual_time.run(story())


def test_a_leader_that_renews_leads_on_and_another_follows() -> None:
    async def story() -> None:
        server = Server()
        one, two = contender(Line(server), "one"), contender(Line(server), "two")
        await one.acquire()
        holding, waiting = asyncio.create_task(one.hold()), asyncio.create_task(two.acquire())
        await asyncio.sleep(600)
        assert (one.leading, two.leading) == (True, False)
        assert not holding.done()
        waiting.cancel()
        holding.cancel()
        assert {holder for _, holder in server.written} == {"one"}
        assert len(server.written) == pytest.approx(600 / TIMING.retry, rel=0.05)

    virtual_time.run(story())


def test_a_follower_takes_over_when_the_lease_was_not_renewed_for_as_long_as_it_says() -> None:
    async def story() -> None:
        server = Server()
        one, two = contender(Line(server), "one"), contender(Line(server), "two")
        await one.acquire()
        holding, waiting = asyncio.create_task(one.hold()), asyncio.create_task(two.acquire())
        await asyncio.sleep(61)
        holding.cancel()  # killed, with nothing on its way: it releases nothing
        last = server.written[-1][0]
        await waiting
        assert two.leading
        assert last + TIMING.duration < now() < last + TIMING.duration + TIMING.retry + 0.1
        assert not one.leading
        assert server.lease is not None
        assert server.lease["spec"]["leaseTransitions"] == 1

    virtual_time.run(story())


@pytest.mark.parametrize("renewed", ["1970-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z", None])
def test_times_in_the_lease_count_for_nothing(renewed: str | None) -> None:
    """The wall clock of whoever wrote them may be anything."""

    async def story() -> None:
        server = Server()
        spec = {"holderIdentity": "gone", "leaseDurationSeconds": 15, "renewTime": renewed, "acquireTime": renewed}
        server.write({"metadata": {"name": "operator", "namespace": "system"}, "spec": spec})
        two = contender(Line(server), "two")
        await two.acquire()
        assert TIMING.duration < now() < TIMING.duration + 0.1

    virtual_time.run(story())


def test_the_duration_is_the_one_that_the_lease_promises() -> None:
    async def story() -> None:
        server = Server()
        spec = {"holderIdentity": "gone", "leaseDurationSeconds": 40}
        server.write({"metadata": {"name": "operator", "namespace": "system"}, "spec": spec})
        await contender(Line(server), "two").acquire()
        assert 40 < now() < 40.1

    virtual_time.run(story())


def test_what_others_have_written_into_the_lease_stays() -> None:
    async def story() -> None:
        server = Server()
        meta = {"name": "operator", "namespace": "system", "labels": {"team": "a"}}
        server.write({"metadata": meta, "spec": {"strategy": "OldestEmulationVersion"}})
        await contender(Line(server), "one").acquire()
        assert server.lease is not None
        assert server.lease["metadata"]["labels"] == {"team": "a"}
        assert server.lease["spec"]["strategy"] == "OldestEmulationVersion"

    virtual_time.run(story())


# --- losing ---


@pytest.mark.parametrize("fate", ["refused", "lost"])
def test_a_leader_that_cannot_renew_ends_when_its_time_is_up_and_before_anybody_takes_over(fate: Fate) -> None:
    async def story() -> None:
        server = Server()
        bad = Luck(fate=fate)
        one = contender(Line(server, [CALM, CALM, *[bad] * 100]), "one")
        two = contender(Line(server), "two")
        await one.acquire()
        waiting = asyncio.create_task(two.acquire())
        with pytest.raises(LeadershipLost, match=r"Lease system/operator was not renewed within 10 s \((Api|Timeout)"):
            await one.hold()
        assert TIMING.deadline <= now() < TIMING.deadline + 0.1
        assert not one.leading
        assert not two.leading
        await waiting
        assert now() > TIMING.duration

    virtual_time.run(story())


def test_one_renewal_that_fails_costs_nothing() -> None:
    async def story() -> None:
        luck = [CALM, CALM, Luck(fate="refused"), Luck(there=7), CALM, CALM]
        one = contender(Line(Server(), luck), "one")
        await one.acquire()
        holding = asyncio.create_task(one.hold())
        await asyncio.sleep(60)
        assert one.leading
        assert not holding.done()
        holding.cancel()

    virtual_time.run(story())


def test_a_renewal_that_was_written_but_not_answered_is_found_to_be_its_own() -> None:
    async def story() -> None:
        server = Server()
        one = contender(Line(server, [CALM, CALM, Luck(fate="unheard")]), "one")
        await one.acquire()
        holding = asyncio.create_task(one.hold())
        await asyncio.sleep(30)
        assert one.leading
        assert not holding.done()
        holding.cancel()

    virtual_time.run(story())


def test_a_lease_that_was_taken_but_not_answered_is_found_to_be_its_own() -> None:
    async def story() -> None:
        server = Server()
        one = contender(Line(server, [CALM, Luck(fate="unheard")]), "one")
        await one.acquire()
        assert one.leading
        assert now() < TIMING.duration

    virtual_time.run(story())


def test_who_finds_another_holder_ends_at_once_and_says_whom() -> None:
    async def story() -> None:
        server = Server()
        one = contender(Line(server), "one")
        await one.acquire()
        assert server.lease is not None
        server.write({**server.lease, "spec": {"holderIdentity": "two", "leaseDurationSeconds": 15}})
        with pytest.raises(LeadershipLost, match="Lease system/operator is held by two, no longer by this process"):
            await one.hold()
        assert now() < TIMING.retry + 0.1
        assert not one.leading, "nothing more is written"
        await one.release()
        assert server.holder == "two", "another's Lease is not released"

    virtual_time.run(story())


def test_a_process_that_was_stopped_does_not_lead_when_it_wakes_whatever_it_does_first() -> None:
    async def story() -> None:
        server = Server()
        one, two = contender(Line(server), "one"), contender(Line(server), "two")
        await one.acquire()  # and then nothing of it runs
        await two.acquire()
        assert two.leading
        assert not one.leading
        calls = len(server.written)
        with pytest.raises(LeadershipLost, match=r"\(this process was stopped for too long\)"):
            await one.hold()
        assert len(server.written) == calls

    virtual_time.run(story())


def test_a_renewal_that_is_answered_after_a_long_stop_does_not_count() -> None:
    """It was written in time, but ages ago: the time counts from before it was asked for."""

    async def story() -> None:
        server = Server()
        line = Line(server, [CALM, CALM, Luck(stopped=60)])
        one, two = contender(line, "one"), contender(Line(server), "two")
        led: list[float] = []
        line.heard = lambda: led.append(now()) if one.leading else None
        await one.acquire()
        waiting = asyncio.create_task(two.acquire())
        with pytest.raises(LeadershipLost):
            await one.hold()
        assert now() > 60
        assert waiting.done()
        assert server.holder == "two"
        assert max(led) < 1

    virtual_time.run(story())


# --- handing over ---


def test_a_lease_that_was_released_is_taken_at_the_next_look() -> None:
    async def story() -> None:
        server = Server()
        one, two = contender(Line(server), "one"), contender(Line(server), "two")
        await one.acquire()
        waiting = asyncio.create_task(two.acquire())
        await asyncio.sleep(5)
        await one.release()
        assert not one.leading
        assert server.holder == ""
        released = now()
        await waiting
        assert now() <= released + TIMING.retry + 0.1

    virtual_time.run(story())


def test_who_does_not_lead_releases_nothing() -> None:
    async def story() -> None:
        server = Server()
        one, two = contender(Line(server), "one"), contender(Line(server), "two")
        await one.acquire()
        await two.release()
        assert server.holder == "one"

    virtual_time.run(story())


def test_a_release_that_fails_is_told_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        one = contender(Line(Server(), [CALM, CALM, Luck(fate="refused")]), "one")
        await one.acquire()
        await one.release()
        assert not one.leading

    virtual_time.run(story())
    assert "Lease system/operator was not released: ApiError: 503 ServiceUnavailable: not now" in caplog.text


# --- what people do to the Lease ---


def test_a_deleted_lease_is_made_again_by_its_leader_and_left_alone_by_who_followed() -> None:
    async def story() -> None:
        server = Server()
        one, two = contender(Line(server), "one"), contender(Line(server), "two")
        await one.acquire()
        holding, waiting = asyncio.create_task(one.hold()), asyncio.create_task(two.acquire())
        await asyncio.sleep(7)
        server.lease = None
        await asyncio.sleep(60)
        assert (one.leading, two.leading) == (True, False)
        assert server.holder == "one"
        holding.cancel()
        server.lease = None
        gone = now()
        await waiting
        assert gone + TIMING.duration < now() < gone + TIMING.duration + 2 * TIMING.retry

    virtual_time.run(story())


def test_a_lease_that_cannot_be_had_is_asked_for_again_and_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    class Forbidden(Line):
        async def write_lease(self, lease: Any, *, seconds: float) -> Document:
            raise ApiError(403, "Forbidden", "may not create leases")

    async def story() -> None:
        waiting = asyncio.create_task(contender(Forbidden(Server()), "one").acquire())
        await asyncio.sleep(300)
        assert not waiting.done()
        waiting.cancel()

    virtual_time.run(story())
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in told if "403 Forbidden: may not create leases" in record.getMessage()]
    assert len(told) < 25


def test_without_an_election_it_leads_until_it_is_cancelled() -> None:
    async def story() -> None:
        alone = Alone()
        await alone.acquire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await alone.hold()
        await alone.release()
        assert alone.leading

    virtual_time.run(story())


# --- never two at once ---

SECONDS = st.one_of(st.just(0.01), st.just(0.01), st.floats(0, 1), st.floats(1, 25))
STOPS = st.one_of(st.just(0.0), st.just(0.0), st.floats(0, 40))
FATES: list[Fate] = ["answered"] * 6 + ["unheard", "lost", "refused", "killed", "terminated"]  # type: ignore[list-item]
LUCK = st.builds(Luck, there=SECONDS, back=SECONDS, fate=st.sampled_from(FATES), stopped=STOPS)


@dataclass(frozen=True)
class Fortune:
    """What one pod goes through: its requests, stops while it sleeps, and a clock that is wrong and goes wrong."""

    requests: list[Luck]
    stops: list[float]
    offset: float
    speed: float


FORTUNES = st.builds(
    Fortune,
    requests=st.lists(LUCK, min_size=5, max_size=15),
    stops=st.lists(STOPS, max_size=10),
    offset=st.floats(-1e6, 1e6),
    speed=st.floats(0.9, 1.1),
)


class World:
    """Pods whose process is started again, as another contender, when it has ended."""

    def __init__(self, fortunes: list[Fortune]) -> None:
        self.server = Server()
        self.alive: dict[int, Elector] = {}
        self.most = 0
        self.trouble: list[list[Any]] = []
        self.pods = [asyncio.create_task(self._pod(number, fortune)) for number, fortune in enumerate(fortunes)]

    def leading(self) -> list[Elector]:
        return [elector for elector in self.alive.values() if elector.leading]

    def look(self) -> None:
        self.most = max(self.most, len(self.leading()))

    async def _pod(self, number: int, fortune: Fortune) -> None:
        line = Line(self.server, list(fortune.requests), self.look)
        stops = list(fortune.stops)
        self.trouble += [line.luck, stops]

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds / fortune.speed + (stops.pop(0) if stops else 0.0))

        for start in range(1000):
            elector = contender(
                line,
                f"pod-{number}_{start}",
                clock=lambda: fortune.offset + fortune.speed * now(),
                sleep=sleep,
            )
            self.alive[number] = elector
            await self._process(elector)
            del self.alive[number]
            await asyncio.sleep(1.0)

    async def _process(self, elector: Elector) -> None:
        try:
            await elector.acquire()
            await elector.hold()
        except (LeadershipLost, Killed):
            return
        except Terminated:
            try:
                await elector.release()
            except (Killed, Terminated):
                return


@settings(max_examples=60, deadline=None)
@given(fortunes=st.lists(FORTUNES, min_size=2, max_size=3))
def test_never_do_two_lead_and_when_the_trouble_is_over_one_does(fortunes: list[Fortune]) -> None:
    async def story() -> None:
        world = World(fortunes)
        await asyncio.sleep(1)
        while any(world.trouble):  # noqa: ASYNC110
            await asyncio.sleep(5)
        # What was on its way arrives, who was stopped wakes, and the last Lease expires.
        await asyncio.sleep(150)
        assert world.most == 1
        (leader,) = world.leading()
        await asyncio.sleep(60)
        assert world.leading() == [leader]
        assert world.most == 1
        for pod in world.pods:
            pod.cancel()

    virtual_time.run(story())


def test_the_property_finds_leaders_that_trust_their_lease_too_long() -> None:
    """The same with a leader that gives up only after others have taken over: the test above would notice."""

    async def story() -> None:
        server = Server()
        slack = Timing(deadline=30.0)
        silent = [CALM, CALM, *[Luck(fate="lost")] * 100]
        one, two = contender(Line(server, silent), "one", timing=slack), contender(Line(server), "two")
        await one.acquire()
        holding = asyncio.create_task(one.hold())
        await two.acquire()
        assert one.leading
        assert two.leading
        holding.cancel()

    virtual_time.run(story())
