"""A job that is told when to run and for how long."""

from typing import Any

import pytest
from tests.e2e.real import becomes

from finetune_trainer.storage.commit import RecordKind

pytestmark = [pytest.mark.e2e, pytest.mark.together, pytest.mark.timeout(900)]
LONG: dict[str, Any] = {"epochs": 5, "batchSize": 8, "microBatch": 4, "learningRate": 1e-3}


def patch(world: Any, namespace: str, name: str, spec: str) -> None:
    body = f'{{"spec": {spec}}}'
    world.kubectl("patch", "finetunejob", name, "-n", namespace, "--type=merge", "-p", body)


def kinds(world: Any, uid: str) -> set[str]:
    return {child.partition("/")[0] for child in world.children(uid)}


def test_a_suspended_job_frees_its_node_and_goes_on_from_its_checkpoint(world: Any) -> None:
    namespace, name = world.namespace("suspended"), "suspended"
    document = world.small_job(name, training=LONG)
    output = document["spec"]["output"]["uri"]
    with world.trainings:
        world.apply(document, namespace)
        run = world.wait_for_checkpoint(namespace, name)
        uid = world.job(namespace, name)["metadata"]["uid"]
        patch(world, namespace, name, '{"suspend": true}')
        told = ["checkpoint", "progress"]  # by the trainer, as it was asked last
        job = becomes(world, namespace, name, "suspended", "Suspended", "Suspended", without=told, seconds=120)
        world.until(lambda: kinds(world, uid) == {"ConfigMap"}, what="Jobs and pods to be gone", seconds=30)
        committed = world.records(output, run, RecordKind.CHECKPOINT)[-1].body["step"]
        assert job["status"]["checkpoint"]["step"] <= committed
        patch(world, namespace, name, '{"suspend": false}')
        status = world.succeeded(namespace, name)
    assert [restart["resumedFromStep"] for restart in status["restarts"]] == [committed]
    becomes(world, namespace, name, "suspended-and-resumed", "Succeeded", "Trained")
    first, second = world.records(output, run, RecordKind.CLAIM)
    steps = [r.body["step"] for r in world.records(output, run, RecordKind.CHECKPOINT) if r.attempt == second.number]
    assert first.number < second.number
    assert min(steps) >= committed, "no step is trained twice"


def test_a_job_that_is_applied_suspended_starts_no_pod(world: Any) -> None:
    namespace, name = world.namespace("born-suspended"), "born-suspended"
    world.apply(world.small_job(name, suspend=True), namespace)
    becomes(world, namespace, name, "applied-suspended", "Suspended", "Suspended")
    uid = world.job(namespace, name)["metadata"]["uid"]
    assert world.pods.of(uid, "preflight") == world.pods.of(uid, "train") == []
    assert kinds(world, uid) == {"ConfigMap"}


def test_a_used_up_budget_publishes_the_best_checkpoint_and_a_raised_one_trains_on(world: Any) -> None:
    namespace, name = world.namespace("budget"), "budget"
    document = world.small_job(name, training=LONG)
    output = document["spec"]["output"]["uri"]
    with world.trainings:
        world.apply(document, namespace)
        run = world.wait_for_checkpoint(namespace, name)
        patch(world, namespace, name, '{"budget": {"gpuHours": 0.0001}}')
        part = world.succeeded(namespace, name)
        told = ["best", "resumedFromStep"]  # as far as it was evaluated before; as the trainer was asked last
        becomes(world, namespace, name, "stopped-at-best", "Succeeded", "StoppedAtBest", without=told)
        assert part["progress"]["step"] < part["progress"]["totalSteps"]
        assert part["usage"]["gpuSeconds"] > 0
        patch(world, namespace, name, '{"budget": {"gpuHours": 10}}')
        whole = world.wait(
            namespace,
            name,
            lambda s: s.get("observedGeneration") == 3 and s.get("phase") in ("Succeeded", "Failed"),
            what="the whole run",
            seconds=400,
        )
    becomes(world, namespace, name, "budget-raised", "Succeeded", "Trained", without=["resumedFromStep"])
    assert whole["run"]["id"] == run
    assert whole["progress"]["step"] == whole["progress"]["totalSteps"]
    assert whole["model"]["digest"] != part["model"]["digest"]
    ends = [record.body["end"] for record in world.records(output, run, RecordKind.TRAINED)]
    assert ends == ["stopped", "complete"]
    first, _, third = world.records(output, run, RecordKind.CLAIM)
    committed = {
        attempt.number: [
            r.body["step"] for r in world.records(output, run, RecordKind.CHECKPOINT) if r.attempt == attempt.number
        ]
        for attempt in (first, third)
    }
    assert min(committed[third.number]) >= max(committed[first.number]), "no step is trained twice"
