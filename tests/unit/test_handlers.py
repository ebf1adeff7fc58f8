"""An operator that follows has a full picture of the cluster, and a fresh one when its turn comes."""

import asyncio
import itertools
from typing import Any, cast

import pytest
from tests import virtual_time
from tests.virtual_time import now

from finetune_operator import handlers
from finetune_operator.cache import Cache, Kind
from finetune_operator.kube import ApiError, Kube, Listing, Outline

JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {
        "name": "one",
        "namespace": "team-a",
        "uid": "11111111-0000-0000-0000-000000000000",
        "resourceVersion": "5",
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    },
    "spec": {},
}


OUTLINE = Outline("team-a", "one", JOB["metadata"]["uid"], 5)


class Cluster:
    """What can be asked of an API server, and when it was."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.down = False
        self.listed: list[float] = []
        self.read_at: list[float] = []

    def answers(self) -> None:
        if self.down:
            raise ApiError(503, "ServiceUnavailable", "not now")

    async def list(self, kind: str, namespace: str | None, *, exact: bool) -> Listing:
        self.answers()
        self.listed.append(now())
        return Listing([OUTLINE for _ in self.jobs] if kind == "finetunejobs" else [], 10)

    async def read(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.answers()
        self.read_at.append(now())
        return self.jobs[0] if self.jobs else None


def as_kube(cluster: Cluster) -> Kube:
    return cast("Kube", cluster)


async def filled(cache: Cache, cluster: Cluster, full: asyncio.Event, *namespaces: str) -> None:
    there = await handlers.outline(as_kube(cluster), namespaces=namespaces)
    await handlers.fill(cache, as_kube(cluster), there, full, namespaces=namespaces)


def test_an_empty_cluster_is_known_at_once() -> None:
    async def story() -> None:
        full = asyncio.Event()
        await filled(Cache(), Cluster(), full)
        assert full.is_set()
        assert now() == 0

    virtual_time.run(story())


def test_the_picture_is_full_as_soon_as_all_has_come_that_was_there() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [JOB]
        filling = asyncio.create_task(filled(cache, cluster, full, "team-a"))
        await asyncio.sleep(2)
        assert not full.is_set()
        cache.apply("finetunejobs", JOB)
        await filling
        assert full.is_set()
        assert now() < 2.2
        assert cluster.read_at == []

    virtual_time.run(story())


def test_what_no_watch_brings_is_asked_for() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [JOB]
        await filled(cache, cluster, full)
        assert full.is_set()
        assert cache.subjects() == [JOB["metadata"]["uid"]]

    virtual_time.run(story())


def test_what_went_while_it_was_waited_for_is_waited_for_no_more() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [JOB]
        filling = asyncio.create_task(filled(cache, cluster, full))
        await asyncio.sleep(1)
        cluster.jobs = []
        await filling
        assert full.is_set()
        assert cache.subjects() == []

    virtual_time.run(story())


def test_what_was_asked_for_and_went_before_kopf_listed_it_is_gone() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [JOB]

        async def read(*_: str) -> dict[str, Any]:
            cluster.jobs = []
            return JOB

        cluster.read = read  # type: ignore[method-assign]
        await filled(cache, cluster, full)
        assert full.is_set()
        assert cache.subjects() == []

    virtual_time.run(story())


def test_a_namesake_is_not_taken_for_what_was_listed() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [{**JOB, "metadata": {**JOB["metadata"], "uid": "another"}}]
        there: list[tuple[Kind, Outline]] = [("finetunejobs", OUTLINE)]
        filling = asyncio.create_task(handlers.fill(cache, as_kube(cluster), there, full, namespaces=[]))
        await asyncio.sleep(handlers.OVERDUE_SECONDS + 0.2)
        assert cache.knows(OUTLINE.uid, OUTLINE.version)
        assert cache.subjects() == []
        await filling

    virtual_time.run(story())


def test_one_object_that_the_api_server_does_not_give_keeps_back_no_other() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [JOB]
        other = Outline("team-a", "other", "uid-other", 3)

        async def read(kind: str, namespace: str, name: str) -> dict[str, Any]:
            if name == "other" and now() < 30:
                raise ApiError(500, "InternalError", "not this one")
            return JOB

        cluster.read = read  # type: ignore[method-assign]
        there: list[tuple[Kind, Outline]] = [("finetunejobs", other), ("finetunejobs", OUTLINE)]
        filling = asyncio.create_task(handlers.fill(cache, as_kube(cluster), there, full, namespaces=[]))
        await asyncio.sleep(10)
        assert cache.subjects() == [OUTLINE.uid]
        assert not full.is_set()
        await filling
        assert now() < 40

    virtual_time.run(story())


def test_an_object_that_cannot_be_read_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [{"metadata": {**JOB["metadata"], "annotations": 7}}]
        await filled(cache, cluster, full)
        assert full.is_set()

    virtual_time.run(story())
    assert "finetunejobs team-a/one cannot be read: AttributeError" in caplog.text


def test_an_api_server_that_does_not_answer_is_no_empty_cluster() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs, cluster.down = [JOB], True
        waiting = asyncio.create_task(filled(cache, cluster, full))
        await asyncio.sleep(60)
        cluster.down = False
        await asyncio.sleep(1.5)
        cluster.down = True
        await asyncio.sleep(60)
        assert not full.is_set()
        cluster.down = False
        await waiting
        assert cache.subjects() == [JOB["metadata"]["uid"]]

    virtual_time.run(story())


def test_a_list_that_shows_what_is_known_asks_for_nothing() -> None:
    async def story() -> None:
        cluster, cache, told = Cluster(), Cache(), list[str]()
        cluster.jobs = [JOB]
        cache.apply("finetunejobs", JOB)
        await handlers.refresh(cache, as_kube(cluster), told.append, namespaces=[])
        assert (told, cluster.read_at, now()) == ([], [], 0)

    virtual_time.run(story())


def test_what_a_watch_is_about_to_bring_is_not_asked_for() -> None:
    async def story() -> None:
        cluster, cache = Cluster(), Cache()
        cluster.jobs = [JOB]
        refreshing = asyncio.create_task(handlers.refresh(cache, as_kube(cluster), lambda _: None, namespaces=[]))
        await asyncio.sleep(0.5)
        cache.apply("finetunejobs", JOB)
        await refreshing
        assert cluster.read_at == []

    virtual_time.run(story())


def test_what_watches_have_missed_is_told() -> None:
    async def story() -> None:
        cluster, cache, told = Cluster(), Cache(), list[str]()
        cluster.jobs = [JOB]
        await handlers.refresh(cache, as_kube(cluster), told.append, namespaces=[])
        cluster.jobs = []
        await handlers.refresh(cache, as_kube(cluster), told.append, namespaces=[])
        assert told == [JOB["metadata"]["uid"]] * 2
        assert cache.subjects() == []

    virtual_time.run(story())


def test_a_follower_finds_every_minute_what_watches_have_missed_and_once_more_when_its_turn_comes() -> None:
    async def story() -> None:
        cluster, cache, turn = Cluster(), Cache(), asyncio.Event()
        following = asyncio.create_task(handlers.follow(cache, as_kube(cluster), turn, namespaces=[]))
        await asyncio.sleep(130)
        assert sorted(set(cluster.listed)) == [60, 120]
        assert cache.subjects() == []
        cluster.jobs = [JOB]
        turn.set()
        await following
        assert set(cluster.listed) == {60, 120, 130}
        assert cache.subjects() == [JOB["metadata"]["uid"]]

    virtual_time.run(story())


def test_an_api_server_that_was_away_is_asked_again_in_a_minute() -> None:
    async def story() -> None:
        class Away(Cluster):
            async def list(self, kind: str, namespace: str | None, *, exact: bool) -> Listing:
                listed.append((kind, now()))
                await asyncio.sleep(6)
                raise TimeoutError

        listed: list[tuple[str, float]] = []
        comparing = asyncio.create_task(handlers.resync(Cache(), as_kube(Away()), lambda _: None, namespaces=[]))
        await asyncio.sleep(240)
        comparing.cancel()
        moments = [moment for kind, moment in listed if kind == "jobs"]
        assert len(moments) == 3
        assert all(later - earlier < 90 for earlier, later in itertools.pairwise(moments))

    virtual_time.run(story())


def test_what_takes_long_to_list_is_listed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.handlers.time.process_time", now)

    async def story() -> None:
        class Slow(Cluster):
            async def list(self, kind: str, namespace: str | None, *, exact: bool) -> Listing:
                if kind == "configmaps":
                    await asyncio.sleep(3)
                    listed.append(now())
                return await super().list(kind, namespace, exact=exact)

        listed: list[float] = []
        comparing = asyncio.create_task(handlers.resync(Cache(), as_kube(Slow()), lambda _: None, namespaces=[]))
        await asyncio.sleep(600)
        comparing.cancel()
        assert listed == [63, 366]

    virtual_time.run(story())


def test_an_operator_whose_turn_comes_when_it_has_just_started_lists_nothing_twice() -> None:
    async def story() -> None:
        cluster, turn = Cluster(), asyncio.Event()
        turn.set()
        await handlers.follow(Cache(), as_kube(cluster), turn, namespaces=[])
        assert cluster.listed == []

    virtual_time.run(story())
