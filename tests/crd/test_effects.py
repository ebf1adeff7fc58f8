"""What each field declares as its effect is what the identities and the restart key make of a change of it."""

from typing import Any

import pytest

from finetune_api.contract import RunConfig
from finetune_api.crd import open_api_schema
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, evaluation_id, publication_id, resolve, restart_key, train_identity
from finetune_api.table import fields
from finetune_api.tasks import ROLES, WRITING_PARTS, tasks_with

SPEC = open_api_schema(FineTuneJob)["properties"]["spec"]
PROFILE = FineTuneProfileSpec.model_validate({"allowedEndpoints": ["http://*"]})
TEXTS = {
    "^(s3|": ("s3://bucket/one", "s3://bucket/two"),
    "^([0-9]+h)": ("10m", "20m"),
    "^[0-9]+": ("3", "5"),
    "^(0*[1-9]": ("3", "5"),
    "^https?": ("http://one", "http://two"),
}
BESIDE: dict[str, dict[str, Any]] = {
    "spec.method.rank": {"type": "lora"},
    "spec.method.alpha": {"type": "lora"},
    "spec.method.quantization": {"type": "qlora"},
    "spec.method.doubleQuant": {"type": "qlora"},
    "spec.method.reduction": {"type": "adapter"},
    "spec.method.variant": {"type": "adapter"},
    "spec.method.virtualTokens": {"type": "prompt"},
    "spec.method.rankStabilized": {"type": "lora"},
    "spec.method.dropout": {"type": "lora"},
    "spec.method.targets": {"type": "lora"},
    "spec.data.validation.groupBy": {"fraction": 0.1},
    "spec.evaluation.gates[].metric": {"atLeast": 0.5},
    "spec.training.loss.gamma": {"type": "focal"},
    "spec.training.optimizer.momentum": {"type": "sgd"},
    "spec.training.schedule.minimum": {"type": "cosine"},
    "spec.training.schedule.power": {"type": "polynomial"},
    "spec.evaluation.gates[].atLeast": {"metric": "f1"},
    "spec.evaluation.gates[].atMost": {"metric": "f1"},
    "spec.evaluation.gates[].improvesBaselineBy": {"metric": "f1"},
    "spec.generation.beams": {"strategy": "beam"},
    "spec.generation.lengthPenalty": {"strategy": "beam"},
    "spec.evaluation.retention[].maxDrop": {"task": {"type": "text-classification"}},
    **{
        f"spec.evaluation.retention[].task.{field}": {"type": "translation"}
        for field in ("sourceLanguage", "targetLanguage", "prefix")
    },
}
"""What a rule wants beside a field."""
VALUES: dict[str, tuple[Any, Any]] = {
    "spec.evaluation.primary": ("f1", "loss"),
    "spec.evaluation.metrics": (["f1"], ["loss"]),
    "spec.evaluation.gates[].metric": ("f1", "loss"),
    "spec.task.tasks[].type": ("text-classification", "token-classification"),
    "spec.evaluation.retention[].metric": ("perplexity", "loss"),
    "spec.evaluation.retention[].task.type": ("summarization", "translation"),
}
"""Two values, where the first and the last of a list would not do."""
TASK: dict[str, str] = {
    "spec.task.sourceLanguage": "translation",
    "spec.task.targetLanguage": "translation",
    "spec.task.prefix": "translation",
    "spec.data.maxTargetLength": "translation",
    "spec.generation": "translation",
    "spec.training.packing": "causal-lm",
    "spec.task.imageSize": "image-classification",
    "spec.task.augment": "image-classification",
    "spec.task.stride": "question-answering",
    "spec.task.unanswerable": "question-answering",
    "spec.task.chatTemplate": "instruction",
    "spec.task.trainOn": "instruction",
    "spec.task.beta": "preference",
    "spec.task.loss": "preference",
    **{f"spec.task.columns.{role}": tasks_with(role)[0] for role in ROLES},
    "spec.evaluation.retention[].name": "causal-lm",
    "spec.evaluation.retention[].data": "causal-lm",
    "spec.evaluation.retention[].metric": "causal-lm",
    "spec.evaluation.retention[].maxRisePercent": "causal-lm",
    **{
        f"spec.evaluation.retention[].task.{field}": "translation"
        for field in ("type", "sourceLanguage", "targetLanguage", "prefix")
    },
    **{f"spec.evaluation.retention[].task.columns.{role}": tasks_with(role)[0] for role in ROLES},
}
"""The task that a field, or one below it, goes with."""
BY_CONTENT = {
    "spec.model.uri",
    "spec.data.train[].uri",
    "spec.data.validation.uri",
    "spec.data.validation.sources[].uri",
    "spec.data.test.uri",
    "spec.data.test.sources[].uri",
    "spec.evaluation.retention[].data.uri",
}
"""Inputs: their digest decides, not their name."""
ELSEWHERE = {"spec.profile", "spec.output.uri"}
"""The profile's content decides, not its name; a run is looked for under output.uri, so another one has none."""


def two_values(schema: dict[str, Any]) -> tuple[Any, Any]:
    if "enum" in schema:
        return schema["enum"][0], schema["enum"][-1]
    kind = schema["type"]
    if kind == "array":
        one, two = two_values(schema["items"])
        return [one, one], [two, two]
    if kind == "object":
        return {"k": "a"}, {"k": "b"}
    if kind == "boolean":
        return True, False
    if kind in ("integer", "number"):
        low = schema.get("minimum", 0)
        top = schema.get("maximum", low + 100)
        step = 1 if kind == "integer" else min(1.0, (top - low) / 4)
        return low + step, low + 2 * step
    pattern = schema.get("pattern", "")
    return next((texts for start, texts in TEXTS.items() if pattern.startswith(start)), ("a", "b"))


def completed(schema: dict[str, Any], given: Any) -> Any:
    """`given` with what its objects require filled in."""
    if schema["type"] == "array" and isinstance(given, list):
        return [completed(schema["items"], item) for item in given]
    if "properties" not in schema:
        return given
    filled = {key: completed(schema["properties"][key], value) for key, value in given.items()}
    for name in schema.get("required", ()):
        if name not in filled:
            inner = schema["properties"][name]
            start: Any = {} if "properties" in inner else [{}] if inner["type"] == "array" else two_values(inner)[0]
            filled[name] = completed(inner, start)
    return filled


def of_parts(path: str, value: Any) -> dict[str, Any]:
    """A document of two tasks, a and b, with `value` at a path below the first task or the first source of rows."""
    names = ["a", "b"] if value not in ("a", "b") else [value, "ab".replace(value, "")]
    parts: list[dict[str, Any]] = [{"name": name, "type": "text-classification"} for name in names]
    sources = [[{"task": name, "uri": f"file:///{side}/{name}"} for name in "ab"] for side in range(3)]
    for number, side in enumerate(("data.train", "data.validation", "data.test")):
        if side in path and value in ("a", "b"):
            sources[number] = [{**source, "task": name} for source, name in zip(sources[number], names, strict=True)]
    if path.endswith("sources[].uri"):
        sources[1 if "validation" in path else 2][0]["uri"] = value
    if ".tasks[]." in path:
        *outer, name = path.partition(".tasks[].")[2].split(".")
        kind = TASK.get(f"spec.task.{path.partition('.tasks[].')[2]}")
        if kind in WRITING_PARTS:
            for number, part in enumerate(parts):
                part |= {"type": kind, "prefix": str(number)}
        for key in outer:
            parts[0]["type"] = kind  # a column
            value = {name: value}
            name = key
        parts[0][name] = value
    else:
        parts = [{"name": name, "type": "text-classification"} for name in "ab"]
    train, validation, test = sources
    return {
        "task": {"type": "multi-task", "tasks": parts},
        "data": {"train": train, "validation": {"sources": validation}, "test": {"sources": test}},
    }


def resolved(path: str, value: Any) -> RunConfig:
    document: Any = value
    parts = path.removeprefix("spec.").split(".")
    for index, part in enumerate(reversed(parts)):
        beside = BESIDE.get(path, {}) if index == 0 else {}
        document = {**beside, part.removesuffix("[]"): [document] if part.endswith("[]") else document}
    if ".retention[].task.columns." in path:
        (one,) = document["evaluation"]["retention"]
        one["task"]["type"] = TASK[path]
    for start, task in TASK.items():
        if path == start or path.startswith(f"{start}."):
            document = {**document, "task": {"type": task, **document.get("task", {})}}
    if ".tasks[]." in path or path.endswith("[].task") or ".sources[]" in path or value == "multi-task":
        document = of_parts(path, value)
    spec = FineTuneJobSpec.model_validate(completed(SPEC, document))
    defaults = Defaults(trainer_image="t", preflight_image="p", in_cluster=False)
    return resolve(spec, PROFILE, job="default/a", job_uid="u", generation=1, defaults=defaults)


def identity(config: RunConfig) -> dict[str, Any]:
    labels = config.task.labels or ["a", "b"]
    return train_identity(config, labels=labels, inputs={"model": "0", "train/0": "1"})


def leaves() -> list[tuple[str, dict[str, Any], str]]:
    """Fields without fields, with more than one value, but for those whose effect lies outside of the RunConfig."""
    found = []
    for path, schema, effect in fields(FineTuneJob, "spec"):
        flat = SPEC
        for part in path.removeprefix("spec.").split("."):
            flat = flat["properties"][part.removesuffix("[]")]
            flat = flat["items"] if part.endswith("[]") else flat
        if effect is not None and path not in ELSEWHERE and len(flat.get("enum", "ab")) > 1:
            found.append((path, flat, effect))
        assert schema
    return found


@pytest.mark.parametrize(
    ("path", "schema", "effect"), leaves(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_change_does_what_the_field_declares(path: str, schema: dict[str, Any], effect: str) -> None:
    before, after = (resolved(path, value) for value in VALUES.get(path) or two_values(schema))
    new_run = identity(before) != identity(after)
    assert new_run == (effect == "train" and path not in BY_CONTENT)
    assert (restart_key(before) != restart_key(after)) == (effect not in ("live", "judge"))
    assert (publication_id("e", before) != publication_id("e", after)) == (effect == "publish")
    if effect != "train":
        again = evaluation_id("r", before, test=None) != evaluation_id("r", after, test=None)
        assert again == (effect == "evaluate" and path not in BY_CONTENT)
    assert (before.evaluation.judged != after.evaluation.judged) == (effect == "judge")


def test_most_fields_are_tried() -> None:
    assert len(leaves()) >= 55
