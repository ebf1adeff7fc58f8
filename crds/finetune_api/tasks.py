"""What the API knows of each task: the columns it reads, the metrics it has, and the methods it goes with.

One entry a task; cross-field rules, defaults and the documentation are made from it. The trainer's half lives in
finetune_trainer/tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TaskType = Literal["text-classification", "multi-task"]
PartType = Literal["text-classification"]
"""What may be one of several tasks on one encoder."""
MethodType = Literal["full", "head", "lora", "qlora", "dora", "adapter", "ia3", "prompt", "prefix"]
Metric = Literal["accuracy", "precision", "recall", "f1", "f1-micro", "f1-weighted", "loss", "mean"]


@dataclass(frozen=True)
class TaskKind:
    """One task."""

    columns: Mapping[str, str]
    """Roles of the columns it reads, and their names in the data where the document names no others."""
    metrics: tuple[Metric, ...]
    """Names of its metrics."""
    primary: Metric
    """The metric that chooses the best checkpoint unless the document names another."""
    refused: Mapping[MethodType, str] = field(default_factory=dict)
    """Methods that make no sense with it, each with the reason."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Other fields that make no sense with it, such as training.neftune for images, each with the reason."""


TASKS: Mapping[TaskType, TaskKind] = {
    "text-classification": TaskKind(
        columns={"text": "text", "label": "label"},
        metrics=("accuracy", "precision", "recall", "f1", "f1-micro", "f1-weighted", "loss"),
        primary="f1",
    ),
    "multi-task": TaskKind(
        columns={},
        metrics=("mean", "loss"),  # and those of each task, as NAME.METRIC
        primary="mean",
        without={
            "task.labels": "whose task.tasks have labels of their own",
            "data.validation.uri": "whose rows come from data.validation.sources, which name their tasks",
            "data.test.uri": "whose rows come from data.test.sources, which name their tasks",
        },
    ),
}

ROLES: tuple[str, ...] = tuple(dict.fromkeys(role for kind in TASKS.values() for role in kind.columns))
"""All roles of columns, in camelCase as the API has them."""

_LOWER_IS_BETTER: frozenset[str] = frozenset({"loss"})


def lower_is_better(metric: str) -> bool:
    """The direction of a metric, also of one of several tasks (NAME.METRIC)."""
    return metric.rpartition(".")[2] in _LOWER_IS_BETTER


def tasks_with(role: str) -> tuple[TaskType, ...]:
    """Tasks that read a column of that role."""
    return tuple(name for name, kind in TASKS.items() if role in kind.columns)
