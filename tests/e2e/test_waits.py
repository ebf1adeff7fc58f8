"""What a real cluster says of pods that cannot run: its own words are what the status has to tell."""

import json
from typing import Any

import pytest
from tests.e2e.real import becomes

pytestmark = [pytest.mark.e2e, pytest.mark.together, pytest.mark.timeout(300)]

ROWS = [
    {"text": f"the {what} number {n}", "label": label}
    for n in range(40)
    for what, label in (("sea", "a"), ("sky", "b"))
]


def test_what_keeps_pods_from_running_is_told_in_the_words_of_the_cluster(world: Any) -> None:
    """An image that is in no registry, by the kubelet; no such node, by the scheduler; no pod left, by the quota."""
    namespace, full = world.namespace("waits"), world.namespace("full")
    hold = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}, "spec": {"hard": {"pods": "0"}}}
    world.apply(hold, full)
    data = f"{namespace}/train.jsonl"
    world.s3.put_object(Bucket="data", Key=data, Body="".join(f"{json.dumps(row)}\n" for row in ROWS).encode())
    rows = {"train": [{"uri": f"s3://data/{data}"}], "maxLength": 32}
    nowhere = {"spec": {"nodeSelector": {"example.com/zone": "nowhere"}}}
    absent = f"{world.endpoint.removeprefix('http://')}/absent:dev"
    with world.profile(images={"trainer": absent}) as profile:
        world.apply(world.small_job("image", profile=profile, data=rows), namespace)
        world.apply(world.small_job("no-node", podTemplate=nowhere), namespace)
        world.until(lambda: counts(world, full), what="the quota to count", seconds=30)
        world.apply(world.small_job("full"), full)
        becomes(world, namespace, "no-node", "no-node", "Preflight", "Unschedulable")
        becomes(world, full, "full", "full", "Pending", "PodsRefused")
        becomes(world, namespace, "image", "image", "Starting", "ImagePullBackOff", own_rows=True, seconds=120)
        for where in (namespace, full):
            world.kubectl("delete", "finetunejobs", "--all", "-n", where, "--wait=false")


def counts(world: Any, namespace: str) -> bool:
    return "hard" in world.look(f"/api/v1/namespaces/{namespace}/resourcequotas/full").get("status", {})
