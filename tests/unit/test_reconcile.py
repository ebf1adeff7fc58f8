"""One look, with an API server that only knows what is put into it."""

from typing import Any, cast

import pytest

from finetune_api.resolve import Defaults
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.observe import Observer
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import LONGEST_BEHIND, Reconciler

JOB = {
    "metadata": {
        "name": "one",
        "namespace": "ns",
        "uid": "uid-one",
        "resourceVersion": "1",
        "generation": 1,
        "creationTimestamp": "2026-03-01T00:00:00Z",
    },
    "spec": {
        "task": {"type": "text-classification"},
        "model": {"uri": "s3://models/base"},
        "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "output": {"uri": "s3://models/one"},
    },
}


class Api:
    """Whatever is created is there already, as an object of the FineTuneJob which the watches never bring."""

    outside = False

    def __init__(self) -> None:
        self.asked = 0

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        raise ApiError(409, "AlreadyExists", "it is there")

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        meta = {"name": name, "namespace": namespace, "uid": "gone", "resourceVersion": "5"}
        return {"metadata": {**meta, "ownerReferences": [{"uid": "uid-one", "controller": True}]}}


async def test_an_object_that_never_comes_by_a_watch_is_looked_for_less_and_less_often() -> None:
    """Somebody took its labels away: the watches cannot see it, and its name is taken."""
    cache, api = Cache(), Api()
    cache.apply("finetunejobs", JOB)
    cache.apply("finetuneprofiles", {"metadata": {"name": "default", "uid": "p", "resourceVersion": "1"}, "spec": {}})
    cache.forget("gone")
    kube = cast("Kube", api)
    defaults = Defaults(trainer_image="t", preflight_image="p")
    look = Reconciler(cache, kube, Observer(cache, kube, ProgressReader(kube), defaults=defaults))
    waits = [await look("uid-one") for _ in range(10)]
    assert api.asked == 10
    assert waits == pytest.approx([0, 1, 2, 4, 8, 16, 32, LONGEST_BEHIND, LONGEST_BEHIND, LONGEST_BEHIND])
