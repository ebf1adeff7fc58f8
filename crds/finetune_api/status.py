"""The status of a FineTuneJob."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from finetune_api.base import Model
from finetune_api.scalars import Quantity, Text

Phase = Literal[
    "Pending", "Preflight", "Queued", "Starting", "Training", "Evaluating", "Succeeded", "Failed", "Suspended"
]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, max_length=40)]
Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.5g}"))]
"""A measured number, to five digits: more of them say nothing and fill the screen."""
Metrics = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], Figure], Field(max_length=32)]


class RunStatus(Model):
    id: str = Field(description="Hash of everything that determines the weights.", max_length=64)
    generation: int = Field(description="metadata.generation this run was resolved from.")
    inputs: str | None = Field(
        None,
        description="Names what the attempts of this document read, runs/ID/inputs/NAME.json under the output: another "
        "document of the same run may be measured on other rows.",
        max_length=64,
    )
    attempt: int | None = Field(None, description="Number of the attempt's claim in storage.")
    started_at: Time | None = Field(None, description="When the first attempt began.")
    placed_at: Time | None = Field(None, description="When the first pod of the last attempt got its node.")
    interruptions: int | None = Field(
        None,
        description="How often in a row an attempt ended through no fault of its own and without one more committed step; at "
        "10 the run is given up.",
    )
    failures: int | None = Field(
        None, description="Crashes so far, preflights' before an attempt's included, which retries.max bounds."
    )
    halve: bool | None = Field(None, description="The next attempt begins with half the micro-batch.")
    next_at: Time | None = Field(
        None, description="When the next attempt begins, after one that has ended; absent where none is waited for."
    )


class BestCheckpoint(Model):
    step: int = Field(description="Optimizer step of the best checkpoint.")
    metric: str = Field(description="The metric that chose it, evaluation.primary.", max_length=64)
    value: Figure = Field(description="Its value on the validation rows.")


class CheckpointStatus(Model):
    step: int = Field(description="Optimizer step of the last committed checkpoint.")
    uri: str | None = Field(None, description="Where it lies.", max_length=2048)
    committed_at: Time | None = Field(None, description="When it was committed.")
    best: BestCheckpoint | None = Field(None, description="The best one so far.")


class ProgressStatus(Model):
    step: int = Field(description="Optimizer steps done.")
    total_steps: int = Field(description="Optimizer steps to do.")
    epoch: Figure | None = Field(None, description="How often the training rows were seen so far.")
    percent: int = Field(description="Share of the steps done.")
    loss: Figure | None = Field(None, description="Training loss of the last steps, a mean over labels.")
    learning_rate: Figure | None = Field(None, description="Learning rate of the last step.")
    samples_per_second: Figure | None = Field(None, description="Training rows per second over the whole job.")
    estimated_completion_time: Time | None = Field(None, description="When the last step is expected to be done.")
    first_step_at: Time | None = Field(None, description="When the attempt had done its first step.")
    updated_at: Time | None = Field(None, description="When the trainer said this.")


class Restart(Model):
    attempt: int = Field(description="The attempt that ended.")
    reason: str = Field(description="Why it ended, in one word.", max_length=64)
    at: Time = Field(description="When it ended.")
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint the next attempt began with.")
    lost_steps: int | None = Field(None, description="Steps that had to be done again.")


class RowCounts(Model):
    train: int = Field(description="Rows trained on.")
    validation: int = Field(description="Rows that choose the best checkpoint.")
    test: int | None = Field(None, description="Rows of data.test.")


class TokenLengths(Model):
    p50: int = Field(description="Half of the rows have at most so many tokens.")
    p95: int | None = Field(None, description="95 of 100 rows have at most so many tokens.")
    p99: int = Field(description="99 of 100 rows have at most so many tokens.")
    max: int = Field(
        description="Tokens of the longest row; of one far longer than data.maxLength about how many, by its beginning."
    )


class DroppedRows(Model):
    duplicates: int = Field(description="Training rows that repeat an earlier one exactly.")
    near_duplicates: int = Field(description="Training rows that nearly repeat an earlier one.")
    leaked: int = Field(description="Training rows whose content is among the validation or test rows.")
    overlong: int = Field(description="Rows longer than data.maxLength.")


class AuditFigure(Model):
    name: Literal["near-duplicates", "card", "iban", "ip", "email", "phone", "unknown-tokens"] = Field(
        description="What was found: rows that nearly repeat another, rows with suspected personal data, or tokens that the "
        "tokenizer does not know."
    )
    percent: Figure = Field(description="Share of the rows, or of the tokens.")
    exact: bool = Field(description="Counted in all rows, or estimated from 20,000.")
    low: Figure | None = Field(None, description="Lower end of the 95 % interval of an estimate.")
    high: Figure | None = Field(None, description="Upper end.")


class PreflightJobStatus(Model):
    generation: int = Field(description="metadata.generation that it looks at.")
    next_at: Time | None = Field(None, description="When the next one begins; absent while one should be there.")
    failures: int | None = Field(None, description="Crashes so far, which retries.max bounds.")
    tries: int | None = Field(None, description="Tries in a row that ended without a crash: each doubles the delay.")
    interruptions: int | None = Field(
        None,
        description="How often in a row its pod was taken away, or the Job itself was deleted; at 10 the run is given up.",
    )


class PreflightStatus(Model):
    rows: RowCounts | None = Field(None, description="Rows found.")
    labels: int | None = Field(None, description="Number of labels.")
    form: str | None = Field(
        None, description="How the rows are written, such as one label or a list of labels.", max_length=640
    )
    tokens: TokenLengths | None = Field(None, description="Lengths of the rows, before any cut.")
    truncated_percent: Figure | None = Field(None, description="Share of rows longer than data.maxLength.")
    dropped: DroppedRows | None = Field(None, description="Rows that are left out.")
    audit: list[AuditFigure] | None = Field(
        None, description="What the search of data.audit has found; nothing where all is well.", max_length=8
    )
    warnings: list[Text] | None = Field(
        None, description="What looks wrong but stops nothing; the first ten.", max_length=10
    )
    steps: int | None = Field(None, description="Optimizer steps of the whole run, unless it is stopped early.")
    predicted_memory: Quantity | None = Field(
        None,
        description="What training is predicted to take at most of a GPU's memory, or without GPUs of a pod's; absent where "
        "the architecture of the base is not known.",
    )
    report_uri: str | None = Field(None, description="The full report.", max_length=2048)


class Interval(Model):
    low: Figure = Field(description="Lower end.")
    high: Figure = Field(description="Upper end.")


class Gain(Model):
    metric: str = Field(description="The metric, evaluation.primary.", max_length=64)
    over: str = Field(description="The best baseline: trivial, base or probe.", max_length=64)
    value: Figure = Field(description="By how much the tuned model is better on the same rows.")
    low: Figure | None = Field(None, description="Lower end of its 95 % interval.")
    high: Figure | None = Field(None, description="Upper end of its 95 % interval.")


class GateStatus(Model):
    metric: str = Field(description="What was judged.", max_length=64)
    passed: bool = Field(description="Whether the gate is met.")
    value: Figure | None = Field(None, description="What was measured; absent where it could not be.")
    wanted: str = Field(description="What was asked for, in a few signs such as >= 0.8.", max_length=128)


class SliceStatus(Model):
    column: str = Field(description="The column.", max_length=256)
    gap: Figure | None = Field(None, description="By how much evaluation.primary is better for the best value.")
    low: Figure | None = Field(None, description="Lower end of its 95 % interval.")
    high: Figure | None = Field(None, description="Upper end of its 95 % interval.")
    best: str | None = Field(None, description="The value with the best rows.", max_length=256)
    worst: str | None = Field(None, description="The value with the worst rows.", max_length=256)
    equalized_odds: Figure | None = Field(
        None, description="Largest difference of true or false positive rates of a label between two values."
    )


class RetentionStatus(Model):
    name: str = Field(description="The set of evaluation.retention.", max_length=40)
    metric: str = Field(description="What was measured on it.", max_length=64)
    rows: int = Field(description="Rows it was measured on.")
    base: Figure | None = Field(None, description="The metric of the untouched base.")
    tuned: Figure | None = Field(None, description="The metric of the published model.")
    difference: Figure | None = Field(None, description="By how much tuned is above base.")
    low: Figure | None = Field(None, description="Lower end of its 95 % interval.")
    high: Figure | None = Field(None, description="Upper end of its 95 % interval.")
    wanted: str | None = Field(
        None, description="The bound, such as a rise of at most 5 %; absent where there is none.", max_length=64
    )
    passed: bool | None = Field(None, description="Whether the bound is kept.")


class EvaluationStatus(Model):
    rows: int | None = Field(None, description="Rows the metrics were measured on.")
    on: Literal["test", "validation"] | None = Field(None, description="Which rows they were.")
    trivial: Metrics | None = Field(
        None, description="An answer that needs no model: the most frequent label; docs/tasks.md names each task's."
    )
    base: Metrics | None = Field(None, description="The untouched base model, where it can do the task.")
    probe: Metrics | None = Field(None, description="A linear model on the frozen features of the base.")
    tuned: Metrics | None = Field(None, description="The published model.")
    intervals: dict[Annotated[str, StringConstraints(max_length=64)], Interval] | None = Field(
        None,
        description="95 % bootstrap intervals of the published model: of evaluation.primary, and of the metrics asked for.",
        max_length=32,
    )
    gain: Gain | None = Field(None, description="The published model beside the best baseline.")
    train: Metrics | None = Field(
        None,
        description="The published model on training rows: far better values than those of tuned mean overfitting.",
    )
    slices: list[SliceStatus] | None = Field(None, description="What depends on the values of columns.", max_length=8)
    gates: list[GateStatus] | None = Field(None, description="Each gate, and whether it is met.", max_length=16)
    retention: list[RetentionStatus] | None = Field(
        None, description="What the model has kept of what the base knew, set by set.", max_length=8
    )
    warnings: list[Text] | None = Field(
        None, description="What should be known before the figures are trusted; the first ten.", max_length=10
    )


class ModelStatus(Model):
    uri: str = Field(description="Directory of the model, readable by from_pretrained.", max_length=2048)
    digest: str = Field(description="SHA-256 over its files.", max_length=80)
    size_bytes: int = Field(description="Size of its files in bytes.")
    report_uri: str | None = Field(
        None, description="report.html: what was measured, and where it errs; opens with no network.", max_length=2048
    )
    trainable_parameters: int | None = Field(None, description="Parameters that were trained.")
    parameters: int | None = Field(None, description="Parameters of the model, with what the method added.")


class Ongoing(Model):
    attempt: int = Field(description="The attempt.")
    gpu_seconds: int = Field(description="Its seconds times GPUs.")
    running_seconds: int = Field(description="Its seconds since its first pod got a node.")
    cost: float | None = Field(None, description="Of its GPU seconds, at the profile's gpu.hourPrice.")
    kilowatt_hours: float | None = Field(None, description="Of its GPU seconds, at the profile's gpu.watts.")


class Usage(Model):
    gpu_seconds: int | None = Field(None, description="Seconds times GPUs, over all attempts.")
    running_seconds: int | None = Field(
        None, description="Seconds from when the first pod got its node to the end, over all attempts."
    )
    cost: float | None = Field(None, description="Of these GPU seconds, at the profile's gpu.hourPrice.")
    kilowatt_hours: float | None = Field(None, description="Of these GPU seconds, at the profile's gpu.watts.")
    ongoing: Ongoing | None = Field(
        None,
        description="What of these sums is of the attempt that goes on, or whose end nobody saw, as of when the status was "
        "written.",
    )
    counted: int | None = Field(None, description="The last attempt of which these sums have all.")
    attempts: int | None = Field(None, description="Attempts so far.")
    lost_steps: int | None = Field(None, description="Steps done again, over all attempts.")

    @property
    def settled(self) -> "Usage":
        """The same without what goes on: what has ended, which changes no more."""
        going = self.ongoing
        if going is None:
            return self
        return self.model_copy(
            update={
                "gpu_seconds": _less(self.gpu_seconds, going.gpu_seconds),
                "running_seconds": _less(self.running_seconds, going.running_seconds),
                "cost": _less(self.cost, going.cost),
                "kilowatt_hours": _less(self.kilowatt_hours, going.kilowatt_hours),
                "ongoing": None,
            }
        )


def _less(total: float | None, part: float | None) -> float | None:
    """Money and energy have four decimals. Nothing that is left is the same as nothing that was told."""
    return total if total is None or part is None else round(total - part, 4) or None


class Condition(Model):
    type: str = Field(
        description="Accepted, PreflightPassed, Evaluated, Succeeded, Suspended, Reconciling or Stalled.", max_length=64
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, in one word.", max_length=128)
    message: str = Field(description="Why, in a sentence.", max_length=2048)
    last_transition_time: Time = Field(description="When status last changed.")
    observed_generation: int = Field(description="The generation it speaks of.")


class FineTuneJobStatus(Model):
    observed_generation: int = Field(-1, description="The generation this status speaks of.")
    phase: Phase | None = Field(None, description="Where the job is.")
    message: str | None = Field(None, description="The same in a sentence.", max_length=2048)
    run: RunStatus | None = Field(None, description="The run: what the document resolved to.")
    progress: ProgressStatus | None = Field(None, description="How far training is.")
    checkpoint: CheckpointStatus | None = Field(None, description="What is committed to storage.")
    restarts: list[Restart] | None = Field(None, description="The last ten.", max_length=10)
    preflight: PreflightStatus | None = Field(None, description="What was found out before training.")
    preflight_job: PreflightJobStatus | None = Field(
        None, description="The preflight Job that is waited for, or rested from; absent once it has said what it found."
    )
    evaluation: EvaluationStatus | None = Field(None, description="Metrics of the last evaluation.")
    model: ModelStatus | None = Field(None, description="The last published one, until another is committed.")
    usage: Usage | None = Field(None, description="What it has cost so far.")
    last_handled_retry: str | None = Field(
        None, description="The annotation finetune.dev/retry that was last acted upon.", max_length=256
    )
    conditions: list[Condition] | None = Field(None, description="The same for programs (kstatus).", max_length=16)
