"""FineTuneJob: what a user asks for, and what the operator says of it."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from finetune_api.base import Model, Rule, at, items, lasts_a_minute, never_beside, only_beside, spec_field
from finetune_api.evaluation import Evaluation
from finetune_api.method import Method
from finetune_api.pods import Budget, Checkpoint, Output, PodTemplate, Queue, Resources, Retries, Storage
from finetune_api.rows import Data
from finetune_api.scalars import Duration, Name
from finetune_api.status import FineTuneJobStatus
from finetune_api.task import ModelSource, Task
from finetune_api.tasks import (
    CLASSIFYING,
    GENERATING,
    PACKING,
    SPLITTING,
    TASKS,
    WITH_TARGETS,
    WRITING_PARTS,
    MethodType,
    PartType,
    TaskKind,
)
from finetune_api.training import Generation, Training


def _known(named: list[Any], metrics: Sequence[str]) -> bool:
    """Whether metrics are among these; what is no text has another problem."""
    return all(metric in metrics for metric in named if isinstance(metric, str))


def _gated(spec: Any) -> list[Any]:
    return [at(gate, "metric") for gate in items(at(spec, "evaluation.gates"))]


def _primary(name: str, kind: TaskKind) -> Rule:
    """The primary metric is one of the task's."""
    options = ", ".join(f"'{metric}'" for metric in kind.metrics)
    return Rule(
        f"self.task.type != '{name}' || self.evaluation.primary in [{options}]",
        f"evaluation.primary for {name} is one of {', '.join(kind.metrics)}",
        lambda spec: at(spec, "task.type") != name or _known([at(spec, "evaluation.primary")], kind.metrics),
        on="evaluation.primary",
    )


def _metrics(name: str, kind: TaskKind) -> Rule:
    """So are those that are shown."""
    known = (*kind.metrics, *kind.later)
    options = ", ".join(f"'{metric}'" for metric in known)
    return Rule(
        f"self.task.type != '{name}' || self.evaluation.metrics.all(metric, metric in [{options}])",
        f"evaluation.metrics for {name} are among {', '.join(known)}",
        lambda spec: at(spec, "task.type") != name or _known(items(at(spec, "evaluation.metrics")), known),
        on="evaluation.metrics",
    )


def _gates(name: str, kind: TaskKind) -> Rule:
    """And those that are judged."""
    known = (*kind.metrics, *kind.later)
    options = ", ".join(f"'{metric}'" for metric in known)
    return Rule(
        f"self.task.type != '{name}' || self.evaluation.gates.all(gate, gate.metric in [{options}, 'slice-gap'])",
        f"evaluation.gates for {name} judge {', '.join(known)} or slice-gap",
        lambda spec: at(spec, "task.type") != name or _known(_gated(spec), (*known, "slice-gap")),
        on="evaluation.gates",
    )


def _method(name: str, kind: TaskKind, method: MethodType) -> Rule:
    """Some methods make no sense with a task."""
    return Rule(
        f"self.task.type != '{name}' || self.method.type != '{method}'",
        f"method {method} does not go with {name}: {kind.refused[method]}",
        lambda spec: at(spec, "task.type") != name or at(spec, "method.type") != method,
        on="method",
    )


def _named(metric: str) -> str:
    """CEL that says whether a string is a metric of one of task.tasks, such as intent.f1."""
    kinds = " || ".join(
        f"(part.type == '{name}' && {list(TASKS[name].metrics)}.exists(name, {metric} == part.name + '.' + name))"
        for name in get_args(PartType)
    )
    return f"self.task.tasks.exists(part, {kinds})"


def _metrics_of_parts(spec: Any) -> list[str]:
    parts = [(at(part, "name"), str(at(part, "type"))) for part in items(at(spec, "task.tasks"))]
    return [
        f"{name}.{metric}"
        for name, kind in parts
        for other in TASKS
        if other == kind
        for metric in TASKS[other].metrics
    ]


def _sourced(path: str) -> Rule:
    """Rows of several tasks come from files that name theirs, and every task has some."""
    names = path.split(".")
    there = " && ".join(f"has(self.{'.'.join(names[:end])})" for end in range(2, len(names) + 1))
    return Rule(
        f"self.task.type != 'multi-task' || !({there}) || "
        f"(self.task.tasks.all(part, self.{path}.exists(source, has(source.task) && source.task == part.name)) && "
        f"self.{path}.all(source, has(source.task) && self.task.tasks.exists(part, part.name == source.task)))",
        f"with multi-task each source in {path} names one of task.tasks as its task, and each of these has a source",
        lambda spec: (
            at(spec, "task.type") != "multi-task"
            or not items(at(spec, "task.tasks"))
            or not items(at(spec, path))
            or {str(at(source, "task")) for source in at(spec, path)}
            == {str(at(part, "name")) for part in at(spec, "task.tasks")}
        ),
        on="task.tasks",
    )


def _judged(field: str, cel: str, metric: str, named: Callable[[Any], list[Any]], more: tuple[str, ...] = ()) -> Rule:
    """Metrics of several tasks are `mean`, `loss`, or those of one task; `cel` says it with a place for "is one"."""
    own = (*TASKS["multi-task"].metrics, *more)
    return Rule(
        "self.task.type != 'multi-task' || !has(self.task.tasks) || "
        + cel.format(f"({metric} in {list(own)} || {_named(metric)})"),
        f"evaluation.{field} for multi-task: {', '.join(own)}, or NAME.METRIC with the name of one of task.tasks and a metric "
        "of its type",
        lambda spec: (
            at(spec, "task.type") != "multi-task"
            or not items(at(spec, "task.tasks"))
            or _known(named(spec), [*own, *_metrics_of_parts(spec)])
        ),
        on=f"evaluation.{field}",
    )


_OF_PARTS: tuple[Rule, ...] = (
    *(_sourced(path) for path in ("data.train", "data.validation.sources", "data.test.sources")),
    Rule(
        "self.task.type == 'multi-task' || self.data.train.all(source, !has(source.task))",
        "data.train[].task goes only with task.type: multi-task",
        lambda spec: (
            at(spec, "task.type") == "multi-task"
            or all(at(source, "task") is None for source in items(at(spec, "data.train")))
        ),
    ),
    *(
        only_beside(path, "task.type", values=("multi-task",), default="")
        for path in ("data.validation.sources", "data.test.sources")
    ),
    _judged(
        "primary",
        "{0}",
        "self.evaluation.primary",
        lambda spec: [at(spec, "evaluation.primary")],
    ),
    _judged(
        "metrics",
        "self.evaluation.metrics.all(metric, {0})",
        "metric",
        lambda spec: items(at(spec, "evaluation.metrics")),
    ),
    _judged(
        "gates",
        "self.evaluation.gates.all(gate, {0})",
        "gate.metric",
        _gated,
        more=("slice-gap",),
    ),
)
_WRITE_TEXTS = f"part.type in {list(WRITING_PARTS)}"


def _write_texts(spec: Any) -> list[bool]:
    """Which of several tasks do; all of them or none, or another rule is broken."""
    return [at(part, "type") in WRITING_PARTS for part in items(at(spec, "task.tasks"))]


def _of_texts(field: str, *, values: tuple[str, ...]) -> Rule:
    """What says how texts are written goes with tasks that write some, and with several of them."""
    return Rule(
        f"self.task.type in {list(values)} || (self.task.type == 'multi-task' && "
        f"(!has(self.task.tasks) || self.task.tasks.exists(part, {_WRITE_TEXTS})))",
        f"{field} goes only with task.type: {', '.join(values[:-1])} or {values[-1]}, or multi-task of tasks that "
        "write texts",
        lambda spec: (
            at(spec, field) is None
            or at(spec, "task.type") in values
            or (at(spec, "task.type") == "multi-task" and any(_write_texts(spec) or [True]))
        ),
        on=field,
    )


_HEADLESS = Rule(
    "self.task.type != 'multi-task' || !has(self.task.tasks) || self.method.type != 'head' || "
    f"!self.task.tasks.exists(part, {_WRITE_TEXTS})",
    f"method head does not go with tasks that write texts: {TASKS['summarization'].refused['head']}",
    lambda spec: (
        at(spec, "task.type") != "multi-task" or at(spec, "method.type") != "head" or not any(_write_texts(spec))
    ),
    on="method",
)


def _retention(name: str, kind: TaskKind, *, writes: bool | None = None) -> Rule:
    """What a model has kept is measured on rows that its like can be asked about. `writes`: which of the two kinds of
    several tasks is meant."""
    parts = f"self.task.tasks.exists(part, {_WRITE_TEXTS})"
    meant = "" if writes is None else f"!has(self.task.tasks) || {'!' if writes else ''}{parts} || "
    what = name if writes is None else f"{name} of tasks that {'write texts' if writes else 'have heads'}"
    return Rule(
        f"self.task.type != '{name}' || {meant}self.evaluation.retention.all(one, one.task.type in {list(kind.retains)})",
        f"evaluation.retention for {what} goes only with sets of {' or '.join(kind.retains)}: what counts there is {kind.retains_by}",
        lambda spec: (
            at(spec, "task.type") != name
            or (writes is not None and any(_write_texts(spec)) != writes)
            or _known([at(one, "task.type") for one in items(at(spec, "evaluation.retention"))], kind.retains)
        ),
        on="evaluation.retention",
    )


_UNMERGED = ("adapter", "prompt", "prefix")
"""Methods without weights that could be folded into the base."""


class FineTuneJobSpec(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        *(
            rule(name, kind)
            for name, kind in TASKS.items()
            if name != "multi-task"
            for rule in (_primary, _metrics, _gates)
        ),
        *_OF_PARTS,
        *(_retention(name, kind) for name, kind in TASKS.items() if name != "multi-task"),
        _retention("multi-task", TASKS["multi-task"], writes=False),
        _retention("multi-task", TASKS["summarization"], writes=True),
        *(_method(name, kind, method) for name, kind in TASKS.items() for method in kind.refused),
        _HEADLESS,
        *(
            never_beside(field, "task.type", values=(name,), reason=reason)
            for name, kind in TASKS.items()
            for field, reason in kind.without.items()
        ),
        Rule(
            f"!self.output.merge || !has(self.method) || !(self.method.type in {list(_UNMERGED)})",
            "output.merge makes no sense with method adapter, prompt or prefix: what they learn cannot be folded into weights",
            lambda spec: at(spec, "output.merge") is not True or at(spec, "method.type") not in _UNMERGED,
            on="output.merge",
        ),
        _of_texts("generation", values=GENERATING),
        _of_texts("data.maxTargetLength", values=WITH_TARGETS),
        Rule(
            f"self.data.overlong != 'Split' || self.task.type in {list(SPLITTING)}",
            f"data.overlong Split goes only with task.type: {' or '.join(SPLITTING)}",
            lambda spec: at(spec, "data.overlong") != "Split" or at(spec, "task.type") in SPLITTING,
            on="data.overlong",
        ),
        *(lasts_a_minute(field) for field in ("deadline", "ttlAfterFinished")),
        only_beside("training.packing", "task.type", values=PACKING, default="text-classification"),
        only_beside("training.loss", "task.type", values=CLASSIFYING, default=""),
        only_beside("training.labelSmoothing", "task.type", values=CLASSIFYING, default=""),
        only_beside("training.classWeights", "task.type", values=CLASSIFYING, default=""),
        never_beside(
            "training.labelSmoothing",
            "training.loss.type",
            values=("focal",),
            reason="which weighs by the probability of one label alone",
        ),
        only_beside("training.l2sp", "method.type", values=("full",), default="full"),
        never_beside(
            "training.layerwiseDecay",
            "method.type",
            values=("head", "prompt", "prefix"),
            reason="in which no layer of the trunk has a learning rate",
        ),
        never_beside(
            "training.gradientCheckpointing",
            "method.type",
            values=("prefix",),
            reason="whose learned keys and values a second forward pass would not see",
        ),
        never_beside(
            "training.neftune", "method.type", values=("head",), reason="whose trunk, embeddings too, stays as it is"
        ),
    )

    profile: Name | None = spec_field(
        "attempt", "FineTuneProfile with the platform's defaults. Default: the one named default."
    )
    task: Task = spec_field(None, "What the model learns to do.", required=True)
    model: ModelSource = spec_field(None, "The base model.", required=True)
    data: Data = spec_field(None, "The rows.", required=True)
    method: Method | None = spec_field(None, "How the weights are tuned. Default: full.")
    training: Training | None = spec_field(None, "Hyperparameters.")
    generation: Generation | None = spec_field(None, "How text is written when the result is measured and used.")
    evaluation: Evaluation | None = spec_field(None, "How the result is measured.")
    checkpoint: Checkpoint | None = spec_field(None, "How often progress is committed to storage.")
    output: Output = spec_field(None, "Where the result goes.", required=True)
    storage: Storage | None = spec_field(None, "How object storage is reached.")
    resources: Resources | None = spec_field(None, "What the pods get.")
    pod_template: PodTemplate | None = spec_field(None, "What else the pods need.")
    queue: Queue | None = spec_field(
        None, "Kueue's queue, which decides when pods may start. Default: the profile's, else none."
    )
    retries: Retries | None = spec_field(None, "What happens after crashes.")
    deadline: Duration | None = spec_field(
        "live",
        "How long the attempts may run in all, such as 6h; what waits or is suspended does not count. Then a checkpoint "
        "is committed and the job fails. Raise it to go on. Default: no bound.",
    )
    budget: Budget | None = spec_field(None, "What the attempts may cost in all. Default: no bound.")
    suspend: bool | None = spec_field(
        "live",
        "true: nothing runs. An attempt commits a checkpoint and ends; false goes on from it. Default: false.",
    )
    ttl_after_finished: Duration | None = spec_field(
        "live",
        "How long Jobs and pods stay after their end, with their logs, such as 24h; the FineTuneJob and the model always "
        "stay. A change holds for Jobs that begin after it. Default: 1h.",
    )


class FineTuneJob(Model):
    """Asks for a model: this base, tuned on these rows in this way, evaluated, and published at this address."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: dict[str, Any]
    spec: FineTuneJobSpec = Field(description="What is asked for.")
    status: FineTuneJobStatus | None = Field(None, description="What the operator says of it.")
