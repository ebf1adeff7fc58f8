"""What the API knows of each task: the columns it reads, the metrics it has, and the methods it goes with.

One entry a task; cross-field rules, defaults and the documentation are made from it. The trainer's half lives in
finetune_trainer/tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

TaskType = Literal[
    "text-classification",
    "token-classification",
    "regression",
    "summarization",
    "translation",
    "causal-lm",
    "question-answering",
    "instruction",
    "preference",
    "image-classification",
    "multi-task",
]
PartType = Literal["text-classification", "token-classification", "summarization", "translation"]
"""What may be one of several tasks on one model: all of them have heads, or all of them write texts."""
RetentionType = Literal["causal-lm", "summarization", "translation", "text-classification", "image-classification"]
"""Of which tasks the rows of a retention set may be."""
MethodType = Literal["full", "head", "lora", "qlora", "dora", "adapter", "ia3", "prompt", "prefix"]
Metric = Literal[
    "accuracy",
    "precision",
    "recall",
    "f1",
    "f1-micro",
    "f1-weighted",
    "mcc",
    "roc-auc",
    "pr-auc",
    "log-loss",
    "ece",
    "mse",
    "rmse",
    "mae",
    "r2",
    "pearson",
    "spearman",
    "loss",
    "perplexity",
    "token-accuracy",
    "rouge-1",
    "rouge-2",
    "rouge-l",
    "bleu",
    "chrf",
    "mean",
    "slice-gap",
    "exact-match",
    "has-answer-accuracy",
    "no-answer-accuracy",
    "reward-accuracy",
    "reward-margin",
    "probe-accuracy",
    "memorisation",
]


@dataclass(frozen=True)
class TaskKind:
    """One task."""

    columns: Mapping[str, str]
    """Roles of the columns it reads, and their names in the data where the document names no others."""
    optional: tuple[str, ...] = field(default=(), kw_only=True)
    """Further roles, whose columns are read only where the document names them."""
    metrics: tuple[Metric, ...]
    """Names of its metrics."""
    primary: Metric
    """The metric that chooses the best checkpoint unless the document names another."""
    pipeline_tag: str
    """What the Hugging Face Hub calls it."""
    refused: Mapping[MethodType, str] = field(default_factory=dict)
    """Methods that make no sense with it, each with the reason."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Other fields that make no sense with it, such as training.neftune for images, each with the reason."""
    generates: bool = False
    """Whether the model writes text, so that `generation` says how."""
    classifies: bool = False
    """Whether its loss is one over labels, which may be focal, smoothed and weighted by class."""
    targets: bool = False
    """Whether what is to be written has a limit of its own, data.maxTargetLength."""
    packs: bool = False
    """Whether several rows may share one sequence."""
    splits: bool = False
    """Whether an overlong row may become several; then it does so unless the document says otherwise."""
    later: tuple[Metric, ...] = ()
    """Further metrics that are measured after training alone, and so choose no checkpoint."""
    kept: tuple[Metric, ...] = ()
    """Metrics of a retention set whose rows are of this task, the first where the document names none."""
    retains: tuple[RetentionType, ...] = ()
    """Of which tasks the retention sets of a model of this task may be."""
    retains_by: str = ""
    """How it is found out what such a model has kept."""


_REUSED_OUTPUT = "the decoder writes with the output layer of the base, no new layer could learn alone; use lora"
_LANGUAGE_HEAD = "a language model has no new output layer, and its own one is mostly its input embedding; use lora"
_NO_LABELS = "whose answers are texts"
_IMAGES = "learned tokens go before text, and an image has none"
_NO_TOKENS = "whose rows are images, not tokens"
_NO_TEXT = "whose rows have no text to compare or to search"
_FORETELLS: Mapping[str, Any] = {
    "retains": ("causal-lm",),
    "retains_by": "how well a language model foretells the next token of a text",
}
_REWRITES: Mapping[str, Any] = {
    "retains": ("summarization", "translation"),
    "retains_by": "how well a model of encoder and decoder foretells what is to be written for a text",
}
_TEXT_FEATURES: Mapping[str, Any] = {
    "retains": ("text-classification",),
    "retains_by": "what a linear probe finds in the features of its trunk, which reads text",
}
_IMAGE_FEATURES: Mapping[str, Any] = {
    "retains": ("image-classification",),
    "retains_by": "what a linear probe finds in the features of its trunk, which sees images",
}
_OF_CLASSES: tuple[Metric, ...] = (
    *("accuracy", "precision", "recall", "f1", "f1-micro", "f1-weighted", "mcc", "roc-auc", "pr-auc"),
    *("log-loss", "ece", "loss"),
)


TASKS: Mapping[TaskType, TaskKind] = {
    "text-classification": TaskKind(
        columns={"text": "text", "label": "label"},
        optional=("pair",),
        metrics=_OF_CLASSES,
        primary="f1",
        pipeline_tag="text-classification",
        classifies=True,
        kept=("probe-accuracy",),
        **_TEXT_FEATURES,
    ),
    "token-classification": TaskKind(
        columns={"tokens": "tokens", "tags": "tags", "text": "text", "spans": "spans"},
        metrics=("accuracy", "precision", "recall", "f1", "loss"),
        primary="f1",
        pipeline_tag="token-classification",
        classifies=True,
        **_TEXT_FEATURES,
    ),
    "regression": TaskKind(
        columns={"text": "text", "value": "value"},
        optional=("pair",),
        metrics=("mse", "rmse", "mae", "r2", "pearson", "spearman", "loss"),
        primary="r2",
        pipeline_tag="text-classification",
        without={"task.labels": "whose answers are numbers"},
        **_TEXT_FEATURES,
    ),
    "summarization": TaskKind(
        columns={"text": "text", "summary": "summary"},
        metrics=("rouge-1", "rouge-2", "rouge-l", "token-accuracy", "loss"),
        later=("memorisation",),
        primary="rouge-l",
        pipeline_tag="summarization",
        refused={"head": _REUSED_OUTPUT},
        without={"task.labels": _NO_LABELS},
        generates=True,
        targets=True,
        kept=("loss",),
        **_REWRITES,
    ),
    "translation": TaskKind(
        columns={"source": "source", "target": "target"},
        metrics=("bleu", "chrf", "token-accuracy", "loss"),
        later=("memorisation",),
        primary="bleu",
        pipeline_tag="translation",
        refused={"head": _REUSED_OUTPUT},
        without={"task.labels": _NO_LABELS},
        generates=True,
        targets=True,
        kept=("loss",),
        **_REWRITES,
    ),
    "causal-lm": TaskKind(
        columns={"text": "text"},
        metrics=("loss", "perplexity", "token-accuracy"),
        later=("memorisation",),
        primary="perplexity",
        pipeline_tag="text-generation",
        refused={"head": _LANGUAGE_HEAD},
        without={"task.labels": "which learns from the text itself"},
        packs=True,
        splits=True,
        kept=("perplexity", "loss"),
        **_FORETELLS,
    ),
    "image-classification": TaskKind(
        columns={"image": "image", "label": "label"},
        metrics=_OF_CLASSES,
        primary="f1",
        pipeline_tag="image-classification",
        classifies=True,
        refused={"prompt": _IMAGES, "prefix": _IMAGES},
        without={
            "training.neftune": "whose images have no token embeddings for noise",
            "data.maxLength": _NO_TOKENS,
            "data.overlong": _NO_TOKENS,
            "data.deduplicate.near": _NO_TEXT,
            "data.audit": _NO_TEXT,
        },
        kept=("probe-accuracy",),
        **_IMAGE_FEATURES,
    ),
    "question-answering": TaskKind(
        columns={"question": "question", "context": "context", "answers": "answers"},
        metrics=("exact-match", "f1", "has-answer-accuracy", "no-answer-accuracy", "loss"),
        primary="f1",
        pipeline_tag="question-answering",
        without={"task.labels": _NO_LABELS},
        **_TEXT_FEATURES,
    ),
    "instruction": TaskKind(
        columns={"messages": "messages", "prompt": "prompt", "completion": "completion", "tools": "tools"},
        metrics=("loss", "token-accuracy", "exact-match", "rouge-l"),
        later=("memorisation",),
        primary="loss",
        pipeline_tag="text-generation",
        refused={"head": _LANGUAGE_HEAD},
        without={"task.labels": _NO_LABELS},
        generates=True,
        packs=True,
        **_FORETELLS,
    ),
    "preference": TaskKind(
        columns={"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        metrics=("loss", "reward-accuracy", "reward-margin"),
        primary="loss",
        pipeline_tag="text-generation",
        refused={"head": _LANGUAGE_HEAD},
        without={"task.labels": _NO_LABELS},
        **_FORETELLS,
    ),
    "multi-task": TaskKind(
        columns={},
        metrics=("mean", "loss"),  # and those of each task, as NAME.METRIC
        primary="mean",
        pipeline_tag="text-classification",
        without={
            "task.labels": "whose task.tasks have labels of their own",
            "data.validation.uri": "whose rows come from data.validation.sources, which name their tasks",
            "data.test.uri": "whose rows come from data.test.sources, which name their tasks",
        },
        **_TEXT_FEATURES,
    ),
}

ROLES: tuple[str, ...] = tuple(
    dict.fromkeys(role for kind in TASKS.values() for role in (*kind.columns, *kind.optional))
)
"""All roles of columns, in camelCase as the API has them."""

_LOWER_IS_BETTER: frozenset[str] = frozenset(
    {"loss", "log-loss", "ece", "mse", "rmse", "mae", "perplexity", "slice-gap", "memorisation"}
)


PERCENT: frozenset[str] = frozenset({"bleu", "chrf"})
"""Metrics between 0 and 100; a mean over tasks takes them as shares of 1, as the others are."""


def lower_is_better(metric: str) -> bool:
    """The direction of a metric, also of one of several tasks (NAME.METRIC)."""
    return metric.rpartition(".")[2] in _LOWER_IS_BETTER


PROBE = "probe-"
"""How the names of metrics begin that a linear probe on frozen features is measured by."""


def retention_types(*, falling: bool) -> tuple[RetentionType, ...]:
    """Tasks of retention sets whose metrics fall when a model forgets, or those whose metrics rise."""
    types: tuple[RetentionType, ...] = get_args(RetentionType)
    return tuple(name for name in types if all(lower_is_better(metric) != falling for metric in TASKS[name].kept))


def tasks_with(role: str) -> tuple[TaskType, ...]:
    """Tasks that read a column of that role."""
    return tuple(name for name, kind in TASKS.items() if role in (*kind.columns, *kind.optional))


GENERATING: tuple[TaskType, ...] = tuple(name for name, kind in TASKS.items() if kind.generates)
"""Tasks whose models write text."""
WITH_TARGETS: tuple[TaskType, ...] = tuple(name for name, kind in TASKS.items() if kind.targets)
"""Tasks that limit what is to be written on its own."""
WRITING_PARTS: tuple[TaskType, ...] = tuple(name for name in GENERATING if name in get_args(PartType))
"""What may be one of several tasks that write texts: they share the output layer, and have no head of their own."""
LABELLED_PARTS: tuple[TaskType, ...] = tuple(name for name in get_args(PartType) if name not in WRITING_PARTS)
"""What may be one of several tasks that have a head each."""
PACKING: tuple[TaskType, ...] = tuple(name for name, kind in TASKS.items() if kind.packs)
"""Tasks whose rows may share a sequence."""
SPLITTING: tuple[TaskType, ...] = tuple(name for name, kind in TASKS.items() if kind.splits)
"""Tasks whose overlong rows may become several."""
CLASSIFYING: tuple[TaskType, ...] = tuple(name for name, kind in TASKS.items() if kind.classifies)
"""Tasks whose loss is over labels."""
