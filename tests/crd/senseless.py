"""Documents that ask for what a task does not have: one for each rule that is made from the table of tasks.

The corpus shows mistakes by hand; a column, metric, method or field that does not go with a task would be a file for
each pair. Here they follow from the table, and a rule without a document fails a test.
"""

from collections.abc import Iterator
from typing import Any, get_args

from finetune_api.evaluation import RetentionColumns
from finetune_api.tasks import ROLES, TASKS, Metric, RetentionType, TaskKind, tasks_with

VALUES: dict[str, Any] = {
    "task.labels": ["a", "b"],
    "training.neftune": {"alpha": 5.0},
    "training.packing": True,
    "training.labelSmoothing": 0.1,
    "training.loss": {"type": "focal"},
    "training.classWeights": "balanced",
    "data.overlong": "Drop",
    "data.maxLength": 64,
    "data.deduplicate.near": True,
    "data.audit": "Full",
    "generation": {"maxNewTokens": 8},
    "data.validation.uri": "s3://data/validation.jsonl",
    "data.test.uri": "s3://data/test.jsonl",
}
"""Something valid for each field that some task goes without."""


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and a document that breaks at least the one rule that the name says."""
    for role in ROLES:
        others = [name for name in TASKS if name not in tasks_with(role)]
        if others:
            yield f"column-{role}-of-another-task", document(others[0], task={"columns": {role: "x"}})
    for name, kind in TASKS.items():
        yield from _of(name, kind)
    yield from _retention()


def _retention() -> Iterator[tuple[str, dict[str, Any]]]:
    """Retention sets that say nothing of a model, and fields that go with other sets."""
    types = get_args(RetentionType)
    for name, kind in TASKS.items():
        other = next(one for one in types if one not in kind.retains)
        yield f"{name}-retention-of-{other}", retaining(name, task={"type": other})
    for name in types:
        yield f"retention-{name}-f1", retaining(name, task={"type": name}, metric="f1")
    for role in RetentionColumns.model_fields:
        other = next(one for one in types if one not in tasks_with(role))
        yield f"retention-column-{role}", retaining(other, task={"type": other, "columns": {role: "x"}})
    languages = {"type": "summarization", "targetLanguage": "de"}
    yield "retention-language", retaining("summarization", task=languages)
    yield "retention-prefix", retaining("causal-lm", task={"type": "causal-lm", "prefix": "x"})
    yield "retention-drop", retaining("causal-lm", task={"type": "causal-lm"}, maxDrop=0.1)
    image = {"type": "image-classification"}
    yield "retention-rise", retaining("image-classification", task=image, maxRisePercent=5)
    yield "retention-two-bounds", retaining("image-classification", task=image, maxRisePercent=5, maxDrop=0.1)


def retaining(kind: str, **one: Any) -> dict[str, Any]:
    """A document for a task, with one retention set."""
    return document(kind, evaluation={"retention": [{"name": "a", "data": {"uri": "s3://data/a.jsonl"}, **one}]})


def _of(name: str, kind: TaskKind) -> Iterator[tuple[str, dict[str, Any]]]:
    foreign = next((metric for metric in get_args(Metric) if metric not in kind.metrics), None)
    if foreign is not None:
        yield f"{name}-primary-{foreign}", document(name, evaluation={"primary": foreign})
        yield f"{name}-metrics-{foreign}", document(name, evaluation={"metrics": [foreign]})
        yield f"{name}-gate-{foreign}", document(name, evaluation={"gates": [{"metric": foreign, "atLeast": 0.5}]})
    for method in kind.refused:
        yield f"{name}-{method}", document(name, method={"type": method})
    for path in kind.without:
        spec: dict[str, Any] = {}
        *parents, last = path.split(".")
        place = spec
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = VALUES[path]
        yield f"{name}-{path}", document(name, **spec)


def document(kind: str, **spec: Any) -> dict[str, Any]:
    """A small good document for a task, with parts of its spec replaced."""
    task: dict[str, Any] = {"type": kind}
    train = [{"uri": "s3://data/train.jsonl"}]
    if kind == "multi-task":
        task["tasks"] = [{"name": name, "type": "text-classification"} for name in ("one", "two")]
        train = [{"uri": f"s3://data/{name}.jsonl", "task": name} for name in ("one", "two")]
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "senseless"},
        "spec": {
            "model": {"uri": "s3://models/base"},
            "output": {"uri": "s3://models/out"},
            **spec,
            "task": {**task, **spec.get("task", {})},
            "data": {"train": train, **spec.get("data", {})},
        },
    }
