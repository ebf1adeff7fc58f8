"""spec.evaluation: what is measured, and what must be reached."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from finetune_api.base import Model, Rule, at, at_most_one_of, exactly_one_of, items, only_with, spec_field
from finetune_api.scalars import Column, Language, MetricName, PartName, Prefix, SourceUri
from finetune_api.tasks import TASKS, RetentionType, TaskKind, retention_types, tasks_with

Bound = Annotated[float, Field(ge=-1e12, le=1e12)]


class Gate(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one_of("atLeast", "atMost", "improvesBaselineBy"),
        Rule(
            "self.metric != 'slice-gap' || has(self.atMost)",
            "a gate on slice-gap goes with atMost: the smaller the gap, the better",
            lambda model: model.metric != "slice-gap" or model.at_most is not None,
        ),
    )

    metric: MetricName = spec_field(
        "judge",
        "What is judged: one of the task's metrics; memorisation, the share of training rows that a model which writes text goes on "
        "with word for word; or slice-gap, the widest gap of evaluation.primary between two values of a column of evaluation.slices.",
        required=True,
    )
    at_least: Bound | None = spec_field("judge", "The metric must not be lower.")
    at_most: Bound | None = spec_field("judge", "The metric must not be higher.")
    improves_baseline_by: Bound | None = spec_field(
        "judge",
        "The metric must be better than the best baseline by so much; with a metric of which less is better, lower by so much.",
    )


def _retained_role(role: str) -> Rule:
    """A column may be named only for a retention set that reads it."""
    allowed = tuple(name for name in get_args(RetentionType) if name in tasks_with(role))
    return Rule(
        f"self.type in {list(allowed)}",
        f"columns.{role} of a retention set goes only with type: {' or '.join(allowed)}",
        lambda task: task.type in allowed or at(task, f"columns.{role}") is None,
        on=f"columns.{role}",
    )


class RetentionColumns(Model):
    text: Column | None = spec_field("evaluate", "Column that holds the text. Default: text.")
    label: Column | None = spec_field("evaluate", "Column that holds the label. Default: label.")
    pair: Column | None = spec_field("evaluate", "Column that holds a second text. Default: none.")
    summary: Column | None = spec_field("evaluate", "Column that holds the summary of a text. Default: summary.")
    source: Column | None = spec_field("evaluate", "Column that holds the text to translate. Default: source.")
    target: Column | None = spec_field("evaluate", "Column that holds its translation. Default: target.")
    image: Column | None = spec_field("evaluate", "Column that holds the image. Default: image.")


class RetentionTask(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        *(_retained_role(role) for role in RetentionColumns.model_fields),
        only_with("type", values=("translation",), fields=("sourceLanguage", "targetLanguage")),
        only_with("type", values=("summarization", "translation"), fields=("prefix",)),
    )

    type: RetentionType = spec_field("evaluate", "What the rows are of.", required=True)
    columns: RetentionColumns | None = spec_field(None, "Names of the columns in the set's files.")
    source_language: Language | None = spec_field("evaluate", "As task.sourceLanguage.")
    target_language: Language | None = spec_field("evaluate", "As task.targetLanguage.")
    prefix: Prefix | None = spec_field("evaluate", "As task.prefix.")


class RetentionData(Model):
    uri: SourceUri = spec_field("evaluate", "The set's rows, as in data.train.", required=True)


def _kept(name: str, kind: TaskKind) -> Rule:
    """The metric of a retention set is one of its task's."""
    return Rule(
        f"self.task.type != '{name}' || self.metric in {list(kind.kept)}",
        f"the metric of a retention set of {name} is {' or '.join(kind.kept)}",
        lambda model: at(model, "task.type") != name or model.metric is None or model.metric in kind.kept,
        on="metric",
    )


def _bounded(field: str, *, falling: bool) -> Rule:
    """Which bound makes sense is a matter of the direction of the metric."""
    types, how = retention_types(falling=falling), "falls" if falling else "rises"
    return Rule(
        f"self.task.type in {list(types)}",
        f"{field} goes with task.type: {' or '.join(types)}, whose metric {how} when a model forgets",
        lambda model: at(model, field) is None or at(model, "task.type") in types,
        on=field,
    )


class Retention(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one_of("maxDrop", "maxRisePercent"),
        *(_kept(name, TASKS[name]) for name in get_args(RetentionType)),
        _bounded("maxDrop", falling=True),
        _bounded("maxRisePercent", falling=False),
    )

    name: PartName = spec_field("evaluate", "Names the set in status, report and model card.", required=True)
    task: RetentionTask = spec_field(None, "What the rows are of.", required=True)
    data: RetentionData = spec_field(None, "The rows, which should not be among the training rows.", required=True)
    metric: MetricName | None = spec_field(
        "evaluate",
        "What is measured: perplexity or loss of causal-lm, loss of summarization and translation, probe-accuracy of "
        "classification: the accuracy of a linear probe on frozen features of the trunk. Default: the first of these.",
    )
    max_drop: float | None = spec_field("judge", "The metric must not fall by more than this.", ge=0, le=1)
    max_rise_percent: float | None = spec_field(
        "judge", "The metric must not rise by more than this share of the base's.", ge=0, le=1e6
    )


class Evaluation(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.baseline) || self.baseline != 'None' || !self.gates.exists(gate, has(gate.improvesBaselineBy))",
            "a gate with improvesBaselineBy needs a baseline: leave out baseline: None",
            lambda model: (
                model.baseline != "None" or all(at(gate, "improvesBaselineBy") is None for gate in model.gates or ())
            ),
            on="gates",
        ),
        Rule(
            "has(self.slices) || !self.gates.exists(gate, gate.metric == 'slice-gap')",
            "a gate on slice-gap needs slices",
            lambda model: (
                model.slices is not None or all(at(gate, "metric") != "slice-gap" for gate in model.gates or ())
            ),
            on="gates",
        ),
        Rule(
            "self.retention.all(one, self.retention.exists_one(other, other.name == one.name))",
            "give each of retention a name of its own",
            lambda model: len({str(at(one, "name")) for one in items(model.retention)}) == len(items(model.retention)),
            on="retention",
        ),
    )

    primary: MetricName | None = spec_field(
        "train",
        "Metric that chooses the best checkpoint, one of the task's; f1, precision and recall are macro averages, for token-classification micro averages over entities. "
        "With multi-task mean, the mean of the tasks' own defaults, or that of one task, such as intent.f1. Default: by task, such as f1.",
    )
    metrics: list[MetricName] | None = spec_field(
        "evaluate",
        "Metrics that the status and the model card show beside evaluation.primary. Default: all of the task's.",
        min_length=1,
        max_length=32,
    )
    baseline: Literal["auto", "Base", "Probe", "Trivial", "None"] | None = spec_field(
        "evaluate",
        "What the tuned model is compared with: the untouched base, where it can do the task, a linear model on its frozen "
        "features, an answer that needs no model, or nothing. Default: auto, all that there are; gates take the best.",
    )
    slices: list[Column] | None = spec_field(
        "evaluate",
        "Columns whose values split the rows: metrics for each value with at least 20 rows, and the gap between the best and "
        "the worst, where bias shows. The first 100 values of a column count.",
        min_length=1,
        max_length=8,
    )
    gates: list[Gate] | None = spec_field(
        None,
        "What the model must reach, on data.test or, without it, on the validation rows; else the job fails and current.json "
        "stays as it is. Default: no gates.",
        min_length=1,
        max_length=16,
    )
    retention: list[Retention] | None = spec_field(
        None,
        "Sets of rows that the model must not forget: measured on the untouched base and on the published weights. Where a set "
        "has a bound that is broken, the job fails as with a gate. Default: none.",
        min_length=1,
        max_length=8,
    )
