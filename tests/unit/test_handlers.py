"""An operator that follows has a full picture of the cluster, and a fresh one when its turn comes."""

import asyncio
from typing import Any, cast

from tests import virtual_time
from tests.virtual_time import now

from finetune_operator import handlers
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube, Listing

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


class Cluster:
    """What can be asked of an API server, and when it was."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.down = False
        self.listed: list[float] = []

    def answers(self) -> None:
        if self.down:
            raise ApiError(503, "ServiceUnavailable", "not now")

    async def list(self, kind: str, namespace: str | None) -> Listing:
        self.answers()
        self.listed.append(now())
        return Listing(self.jobs if kind == "finetunejobs" else [], 10)


def as_kube(cluster: Cluster) -> Kube:
    return cast("Kube", cluster)


def test_an_empty_cluster_is_known_at_once() -> None:
    async def story() -> None:
        full = asyncio.Event()
        await handlers.fill(Cache(), as_kube(Cluster()), full, namespaces=[])
        assert full.is_set()
        assert now() == 0

    virtual_time.run(story())


def test_what_there_is_is_known_before_anything_is_watched() -> None:
    async def story() -> None:
        cluster, cache, full = Cluster(), Cache(), asyncio.Event()
        cluster.jobs = [JOB]
        await handlers.fill(cache, as_kube(cluster), full, namespaces=["team-a"])
        assert full.is_set()
        assert [subject.name for subject in cache.subjects()] == ["one"]

    virtual_time.run(story())


def test_an_api_server_that_does_not_answer_is_no_empty_cluster() -> None:
    async def story() -> None:
        cluster, full = Cluster(), asyncio.Event()
        cluster.down = True
        waiting = asyncio.create_task(handlers.fill(Cache(), as_kube(cluster), full, namespaces=[]))
        await asyncio.sleep(60)
        assert not full.is_set()
        cluster.down = False
        await waiting
        assert full.is_set()

    virtual_time.run(story())


def test_a_follower_finds_every_minute_what_watches_have_missed_and_once_more_when_its_turn_comes() -> None:
    async def story() -> None:
        cluster, cache, turn = Cluster(), Cache(), asyncio.Event()
        following = asyncio.create_task(handlers.follow(cache, as_kube(cluster), turn, namespaces=[]))
        await asyncio.sleep(130)
        assert sorted(set(cluster.listed)) == [60, 120]
        assert list(cache.subjects()) == []
        cluster.jobs = [JOB]
        turn.set()
        await following
        assert set(cluster.listed) == {60, 120, 130}
        assert [subject.name for subject in cache.subjects()] == ["one"]

    virtual_time.run(story())


def test_an_operator_whose_turn_comes_when_it_has_just_started_lists_nothing_twice() -> None:
    async def story() -> None:
        cluster, turn = Cluster(), asyncio.Event()
        turn.set()
        await handlers.follow(Cache(), as_kube(cluster), turn, namespaces=[])
        assert cluster.listed == []

    virtual_time.run(story())
