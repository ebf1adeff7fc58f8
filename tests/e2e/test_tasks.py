"""Other tasks than text-classification, and gates, in a real cluster."""

import json
from typing import Any

import pytest
from tests.e2e.real import becomes

from finetune_trainer.storage.commit import RecordKind

pytestmark = [pytest.mark.e2e, pytest.mark.together, pytest.mark.timeout(900)]

_TINY = {"epochs": 1, "batchSize": 16, "learningRate": 1e-3}
JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "instruction": (
        {
            "task": {"type": "instruction", "columns": {"prompt": "text", "completion": "label"}},
            "model": {"uri": "s3://models/tiny-decoder"},
            "data": {
                "train": [{"uri": "s3://data/small/train.jsonl"}],
                "test": {"uri": "s3://data/small/test.jsonl"},
                "maxLength": 160,
                "overlong": "Drop",
            },
            "method": {"type": "lora", "rank": 4},
            "training": _TINY,
            "generation": {"maxNewTokens": 4},
        },
        "exact-match",
    ),
    "image-classification": (
        {
            "task": {"type": "image-classification"},
            "model": {"uri": "s3://models/tiny-vit"},
            "data": {"train": [{"uri": "s3://data/digits/train/"}], "test": {"uri": "s3://data/digits/test/"}},
            "method": {"type": "head"},
            "training": _TINY,
        },
        "f1",
    ),
}
"""Spec, and a metric that is measured for the tuned model and for one of its baselines."""


@pytest.mark.parametrize("task", list(JOBS))
def test_a_job_of_another_task_succeeds_and_says_what_it_measured(world: Any, task: str) -> None:
    spec, metric = JOBS[task]
    namespace = world.namespace(task)
    with world.trainings:
        world.apply(world.small_job(task, **spec), namespace)
        status = world.succeeded(namespace, task)
    becomes(world, namespace, task, task, "Succeeded", "Trained")
    evaluation = status["evaluation"]
    assert metric in evaluation["tuned"]
    assert any(metric in (evaluation.get(name) or {}) for name in ("base", "probe", "trivial"))
    bucket, _, prefix = status["model"]["uri"].removeprefix("s3://").partition("/")
    found = world.s3.list_objects_v2(Bucket=bucket, Prefix=prefix.rstrip("/") + "/")["Contents"]
    names = {entry["Key"].rsplit("/", 1)[1] for entry in found}
    assert "README.md" in names
    assert names & {"model.safetensors", "adapter_model.safetensors"}
    page = status["model"]["reportUri"].removeprefix("s3://").partition("/")
    assert task in world.s3.get_object(Bucket=page[0], Key=page[2])["Body"].read().decode()


def test_a_gate_that_is_not_met_fails_the_job_and_neither_a_lower_one_nor_a_slice_trains(world: Any) -> None:
    namespace, name = world.namespace("gate"), "gate"
    document = world.small_job(name, training={"epochs": 1, "batchSize": 8, "microBatch": 4, "learningRate": 1e-3})
    document["spec"]["evaluation"] = {"gates": [{"metric": "f1", "atLeast": 0.999}]}
    with world.trainings:
        world.apply(document, namespace)
        failed = world.wait_for_phase(namespace, name, "Failed", "Succeeded")
    becomes(world, namespace, name, "gate-not-met", "Failed", "GateNotMet")
    current = document["spec"]["output"]["uri"].removeprefix("s3://").partition("/")
    keys = world.s3.list_objects_v2(Bucket=current[0], Prefix=current[2] + "/")["Contents"]
    assert not [entry for entry in keys if entry["Key"].endswith("/current.json")]

    document["spec"]["evaluation"] = {"gates": [{"metric": "f1", "atLeast": 0.001}]}
    world.apply(document, namespace)
    status = world.succeeded(namespace, name)
    becomes(world, namespace, name, "gate-lowered", "Succeeded", "Reused")
    assert status["evaluation"]["tuned"] == failed["evaluation"]["tuned"]
    assert len(world.train_pods(namespace, name)) == 1
    body = world.s3.get_object(Bucket=current[0], Key=f"{current[2]}/current.json")["Body"].read()
    assert json.loads(body)["model"] == status["model"]["uri"]

    steps = committed(world, document, status["run"]["id"])
    document["spec"]["evaluation"] |= {"slices": ["label"]}
    with world.trainings:
        world.apply(document, namespace)
        sliced = world.succeeded(namespace, name)
    assert [found["column"] for found in sliced["evaluation"]["slices"]] == ["label"]
    assert sliced["evaluation"]["tuned"] == status["evaluation"]["tuned"]
    assert sliced["model"]["digest"] == status["model"]["digest"]
    assert len(world.train_pods(namespace, name)) == 2
    assert committed(world, document, sliced["run"]["id"]) == steps


def committed(world: Any, document: dict[str, Any], run: str) -> list[int]:
    """The step of every checkpoint that was ever committed."""
    return [r.body["step"] for r in world.records(document["spec"]["output"]["uri"], run, RecordKind.CHECKPOINT)]
