"""What crosses between operator and trainer: RunConfig in, Progress meanwhile, LastMessage at the end, exit codes.

RunConfig lies in an immutable ConfigMap and is mounted into the pods; Progress is served as JSON by the pod's
supervisor; LastMessage is the container's termination message.
"""

from enum import IntEnum
from typing import Literal

from pydantic import Field, field_validator

from finetune_api.base import Model
from finetune_api.pods import PodSpec, PodTemplate
from finetune_api.scalars import AuditMode, Leakage, LossType, OptimizerType, Overlong, RunId, ScheduleType, Strategy
from finetune_api.status import (
    BestCheckpoint,
    CheckpointStatus,
    EvaluationStatus,
    ModelStatus,
    PreflightStatus,
    ProgressStatus,
    Time,
)
from finetune_api.tasks import MethodType, PartType, TaskType

RECIPE_VERSION = 1
"""Raised only when the trainer's numerics change on purpose; part of a run's identity, unlike any package version."""

CONFIG_PATH = "/etc/finetune/config.json"
"""Where the ConfigMap's key `config.json` is mounted."""
CREDENTIALS_PATH = "/etc/finetune/credentials"
"""Where the credentials Secret is mounted."""
CA_PATH = "/etc/finetune/ca/ca.crt"
"""Where ca.crt of the ConfigMap of the storage's authority is mounted."""
WORK_PATH = "/work"
"""The emptyDir for downloads and scratch files; /tmp is one too, all else is read-only."""
CACHE_PATH = "/cache"
"""Where the profile's claim for downloads that pods share is mounted."""
PROGRESS_PORT = 9090
"""Serves /progress (JSON), /metrics (Prometheus) and /healthz."""
RENDEZVOUS_PORT = 29400
MESSAGE_LIMIT = 3500
"""Bytes of a termination message; Kubernetes cuts at 4096."""


class ExitCode(IntEnum):
    DONE = 0
    INVALID = 42
    """The document or the data is wrong: final until they change."""
    DAMAGED = 43
    """Stored data does not match its digest."""
    FENCED = 44
    """A newer attempt holds the run."""
    STOPPED = 45
    """Stopped on request after a committed checkpoint."""
    HUNG = 46
    DIVERGED = 47
    """The loss became NaN or infinite."""
    GATE = 48
    """A gate of the evaluation was not met."""
    STORAGE = 49
    """Storage or credentials unavailable: recovers by itself once mended."""
    MEMORY = 50
    """Out of memory: the next attempt halves the micro-batch."""


class PartConfig(Model):
    """One of several tasks that share an encoder, or a whole encoder-decoder."""

    name: str
    type: PartType
    columns: dict[str, str]
    labels: list[str] | None
    loss_weight: float
    # As in TaskConfig.
    source_language: str | None = None
    target_language: str | None = None
    prefix: str | None = None


class TaskConfig(Model):
    type: TaskType
    columns: dict[str, str]
    """Names in the data by role, for every role the task reads."""
    labels: list[str] | None
    """None: preflight finds them and fixes them in run.json."""
    # What came later is None, and absent from a run's identity, in the tasks that have no such field.
    source_language: str | None = None
    target_language: str | None = None
    chat_template: str | None = None
    """None: the base's own, or a plain one where it has none."""
    train_on: Literal["assistant", "all"] | None = None
    beta: float | None = None
    loss: Literal["sigmoid", "ipo", "hinge"] | None = None
    prefix: str | None = None
    """None: what the base's config.json says."""
    stride: int | None = None
    """Question answering: tokens that neighbouring windows share."""
    unanswerable: bool | None = None
    """Question answering. None: as the training rows have it."""
    image_size: int | None = None
    """Image classification. None: as the base's preprocessor_config.json has it."""
    augment_flip: bool | None = None
    augment_crop: float | None = None
    augment_color: float | None = None
    augment_mixup: float | None = None
    """Image classification, as the others of augment. None: not at all."""
    tasks: list[PartConfig] | None = None


class PartSource(Model):
    """Rows of one of several tasks."""

    task: str
    uri: str


class DataConfig(Model):
    train: list[str]
    validation_fraction: float | None
    """None exactly when validation_uri or validation_sources are given."""
    validation_group_by: str | None
    validation_uri: str | None
    test_uri: str | None
    max_length: int
    overlong: Overlong
    max_target_length: int | None = None
    """None in tasks without targets."""
    train_weights: list[float] | None = None
    """One for each of `train`; None where all are 1."""
    deduplicate: Literal["exact", "near"] | None = None
    """near includes exact."""
    leakage: Leakage = "Drop"
    audit: AuditMode = "Sample"
    train_tasks: list[str] | None = None
    """Of several tasks that of each of `train`; None, as the two below, where there is one task."""
    validation_sources: list[PartSource] | None = None
    test_sources: list[PartSource] | None = None

    @property
    def tested(self) -> bool:
        """Whether there are rows for the final metrics."""
        return self.test_uri is not None or self.test_sources is not None

    @property
    def addresses(self) -> dict[str, str]:
        """Every URI of rows, by its path in the document."""
        found = {f"spec.data.train[{number}].uri": uri for number, uri in enumerate(self.train)}
        for side, uri, sources in (
            ("validation", self.validation_uri, self.validation_sources),
            ("test", self.test_uri, self.test_sources),
        ):
            found |= {f"spec.data.{side}.uri": uri} if uri is not None else {}
            found |= {f"spec.data.{side}.sources[{n}].uri": source.uri for n, source in enumerate(sources or ())}
        return found


class GenerationConfig(Model):
    """How text is written."""

    strategy: Strategy
    beams: int
    """1 exactly when the strategy is greedy."""
    max_new_tokens: int
    length_penalty: float | None
    """None: the base's own."""


class MethodConfig(Model):
    """None, or absent, where the method has no such field."""

    type: MethodType
    freeze_embeddings: bool | None = None
    freeze_layers: int | None = None
    freeze_patterns: list[str] | None = None
    unfreeze_every_steps: int | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rank_stabilized: bool | None = None
    quantization: Literal["nf4", "fp4"] | None = None
    double_quant: bool | None = None
    reduction: int | None = None
    variant: Literal["houlsby", "pfeiffer"] | None = None
    virtual_tokens: int | None = None
    targets: list[str] | None = None
    """None: every linear layer of the trunk."""


class TrainingConfig(Model):
    epochs: float | None
    """None exactly when max_steps is given."""
    max_steps: int | None
    batch_size: int
    learning_rate: float
    schedule: ScheduleType
    warmup_percent: float | None
    """None exactly when warmup_steps is given."""
    warmup_steps: int | None
    optimizer: OptimizerType
    weight_decay: float
    max_grad_norm: float
    precision: Literal["auto", "fp32", "bf16"]
    micro_batch: int | None
    """None: chosen by the first attempt, recorded, kept."""
    seed: int
    evaluate_steps: int | None
    """None exactly when evaluate_epochs is given."""
    evaluate_epochs: float | None
    patience: int | None
    """None: no early stopping."""
    min_delta: float
    # What came later has a default, which is what held before: an older ConfigMap stays readable, and a run that does
    # not use the field keeps its identity (see resolve.train_identity).
    schedule_minimum: float = 0.0
    schedule_power: float = 1.0
    betas: list[float] = Field([0.9, 0.999])
    epsilon: float = 1e-8
    momentum: float = 0.0
    layerwise_decay: float = 1.0
    dropout: float | None = None
    """None: the model's own."""
    ema_decay: float | None = None
    l2sp_alpha: float | None = None
    neftune_alpha: float | None = None
    gradient_checkpointing: bool = False
    packing: bool | None = None
    """None: where it is proven to change nothing."""
    loss: LossType = "cross-entropy"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: Literal["balanced"] | None = None


class GateConfig(Model):
    """Exactly one of the three is set."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    improves_baseline_by: float | None = None


class RetentionConfig(Model):
    """At most one of the bounds is set."""

    name: str
    task: TaskConfig
    uri: str
    metric: str
    max_drop: float | None = None
    max_rise_percent: float | None = None


class EvaluationConfig(Model):
    """Defaults are what held before there was the field."""

    metrics: list[str] | None = None
    """None: all of the task's are shown."""
    baseline: Literal["auto", "Base", "Probe", "Trivial", "None"] = "auto"
    slices: list[str] = Field([])
    gates: list[GateConfig] = Field([])
    retention: list[RetentionConfig] = Field([])

    @field_validator("slices")
    @classmethod
    def _each_once(cls, columns: list[str]) -> list[str]:
        """A document may name a column twice."""
        return list(dict.fromkeys(columns))

    @property
    def judged(self) -> tuple[list[GateConfig], dict[str, tuple[float | None, float | None]]]:
        """What is asked of the figures: gates, and bounds of retention sets by their names."""
        bounds = {one.name: (one.max_drop, one.max_rise_percent) for one in self.retention}
        return self.gates, {name: found for name, found in bounds.items() if found != (None, None)}


class CheckpointConfig(Model):
    every_seconds: float | None
    every_steps: int | None
    """None, both: by what a checkpoint costs. Never are both given."""
    keep_last: int


class OutputConfig(Model):
    uri: str
    merge: bool
    weights: Literal["Best", "Last"]


class StorageConfig(Model):
    endpoint: str | None
    region: str
    credentials_secret: str | None
    addressing: Literal["Path", "VirtualHost"] | None = None
    """None: path style where there is an endpoint."""
    ca_config_map: str | None = None
    """Its ca.crt is at CA_PATH; None: the usual authorities."""


class CacheConfig(Model):
    claim: str
    """PersistentVolumeClaim of the job's namespace."""
    size: str | None
    """None: all of the volume."""


class QueueConfig(Model):
    """Kueue decides when Jobs may run."""

    name: str
    priority: str | None = None
    preflight: bool = False
    """Whether preflight Jobs wait there, too."""


class PodsConfig(Model):
    """Everything that shapes pods and nothing that shapes the model."""

    nodes: int
    gpus: int
    cpu: str
    memory: str
    gpu_resource: str
    gpu_memory: str | None = None
    """Of one GPU; None: unknown."""
    cache: CacheConfig | None = None
    queue: QueueConfig | None = None
    trainer_image: str
    preflight_image: str
    pull_policy: Literal["Always", "IfNotPresent", "Never"]
    template: PodTemplate

    @property
    def grace_seconds(self) -> int:
        """What a train pod gets to commit a checkpoint when it is asked to stop."""
        return (self.template.spec or PodSpec()).termination_grace_period_seconds or 120


class LimitsConfig(Model):
    """When a job ends before it is done, and for how long its pods are kept. Only the operator reads it."""

    deadline_seconds: float | None = None
    """Of running, over all attempts."""
    gpu_seconds: float | None = None
    """Over all attempts."""
    stop_at_best: bool = True
    """What follows when the GPU seconds are used up: the best checkpoint is published; else the job fails."""
    of_profile: list[Literal["deadline", "gpuHours"]] | None = None
    """Which of these bounds the document leaves to the profile."""
    gpu_hour_price: float | None = None
    gpu_watts: float | None = None
    start_seconds: float = 600
    """How long pods that train together, without a queue, may wait until each has its node."""
    keep_seconds: int = 3600
    """How long a Job that has ended stays, with its pods and their logs."""


class RunConfig(Model):
    """One resolved FineTuneJob: every default filled in, nothing left to decide but what the data says."""

    schema_version: Literal[1] = 1
    recipe_version: int = RECIPE_VERSION
    generation: int
    job: str = Field(description="namespace/name, for messages only")
    job_uid: str = Field(description="UID of the FineTuneJob, or of the local document")
    task: TaskConfig
    model: str = Field(description="URI of the base model")
    model_license: str | None = None
    """None: what the base model's card says."""
    allowed_licenses: list[str] | None = None
    """The profile's; None: any."""
    data: DataConfig
    method: MethodConfig
    training: TrainingConfig
    primary: str
    """A metric, of several tasks NAME.METRIC or mean."""
    evaluation: EvaluationConfig = EvaluationConfig()
    decoding: GenerationConfig | None = None
    """spec.generation; None in tasks that write no text."""
    checkpoint: CheckpointConfig
    output: OutputConfig
    storage: StorageConfig
    pods: PodsConfig
    max_retries: int
    limits: LimitsConfig = LimitsConfig()

    def continued(self, live: "RunConfig") -> "RunConfig":
        """For a document of which only live fields have changed: nothing that a profile, or a newer version, would make
        of the others by now. What the version that made this one did not know yet is left out."""
        limits, checkpoint = (
            mine.model_copy(update={name: getattr(theirs, name) for name in mine.model_fields_set})
            for mine, theirs in ((self.limits, live.limits), (self.checkpoint, live.checkpoint))
        )
        update = {"generation": live.generation, "max_retries": live.max_retries}
        return self.model_copy(update={**update, "limits": limits, "checkpoint": checkpoint})

    def text(self) -> str:
        """What pods read. Of one that was read itself no more than stood there: its images may be as old as it is, and
        refuse a field that they do not know."""
        was_read = "schema_version" in self.model_fields_set
        return self.model_dump_json(by_alias=True, indent=2, exclude_unset=was_read) + "\n"

    @property
    def addresses(self) -> dict[str, str]:
        """Every URI that the document names, by its path there."""
        kept = enumerate(self.evaluation.retention)
        return {
            "spec.model.uri": self.model,
            "spec.output.uri": self.output.uri,
            **self.data.addresses,
            **{f"spec.evaluation.retention[{number}].data.uri": one.uri for number, one in kept},
        }


class Checkpointed(Model):
    """The last committed checkpoint."""

    step: int = Field(ge=0)
    uri: str = Field(max_length=2048)
    committed_at: Time
    best: BestCheckpoint | None = None


class Progress(Model):
    """What GET /progress answers. Times are RFC 3339 in UTC, the loss a mean over labels."""

    schema_version: Literal[1] = 1
    run_id: RunId
    attempt: int | None = Field(None, description="number of the claim, once it is made")
    stage: Literal["Loading", "Training", "Evaluating", "Publishing"]
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    resumed_from_step: int | None = Field(None, ge=0)
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    samples_per_second: float | None = None
    estimated_completion_time: Time | None = None
    checkpoint: Checkpointed | None = None
    started_at: Time
    first_step_at: Time | None = Field(None, description="when the attempt had done its first step")
    updated_at: Time

    @property
    def percent(self) -> int:
        return min(100, 100 * self.step // self.total_steps) if self.total_steps else 0

    def status(self) -> ProgressStatus:
        """The same as a FineTuneJob's status tells it."""
        return ProgressStatus(
            step=self.step,
            total_steps=self.total_steps,
            epoch=self.epoch,
            percent=self.percent,
            loss=self.loss,
            learning_rate=self.learning_rate,
            samples_per_second=self.samples_per_second,
            estimated_completion_time=self.estimated_completion_time,
            first_step_at=self.first_step_at,
            updated_at=self.updated_at,
        )

    def checkpoint_status(self) -> CheckpointStatus | None:
        """The last committed checkpoint as a FineTuneJob's status tells it."""
        last = self.checkpoint
        if last is None:
            return None
        return CheckpointStatus(step=last.step, uri=last.uri, committed_at=last.committed_at, best=last.best)


class PreflightOutcome(Model):
    """What a preflight Job found out. Exactly one state, from the run's log in storage.

    Fresh: no checkpoint yet. Resume: something is committed, a train pod goes on from there (perhaps only to evaluate
    or publish). Reused: the very model that is asked for is published; LastMessage.result describes it. With Resume it
    describes what was published when training was ended before its time, if nothing has gone on since.
    """

    state: Literal["Fresh", "Resume", "Reused"]
    run_id: RunId
    inputs: RunId | None = None
    """Names what was pinned for this document, for its train pods. None: by a version that wrote only run.json."""
    step: int | None = Field(None, ge=0, description="Resume: step of the last committed checkpoint")
    summary: PreflightStatus


class TrainOutcome(Model):
    """What a finished run leaves behind; also inside a preflight's message when the run is Reused."""

    final_step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    final_loss: float | None = None
    best: BestCheckpoint | None = None
    partial: bool = False
    """Training was ended before its last step, for spec.budget."""
    evaluation: EvaluationStatus
    model: ModelStatus


class LastMessage(Model):
    """The termination message: one JSON object of at most MESSAGE_LIMIT bytes, free of secrets and of rows."""

    schema_version: Literal[1] = 1
    code: int
    reason: str = Field(max_length=64)
    """PascalCase; becomes the reason of conditions and events."""
    message: str = Field(max_length=512)
    run_id: RunId | None = None
    attempt: int | None = None
    step: int | None = Field(None, ge=0, description="last committed step")
    reached_step: int | None = Field(None, ge=0, description="last step that was done, committed or not")
    resumed_from_step: int | None = Field(None, ge=0)
    preflight: PreflightOutcome | None = None
    result: TrainOutcome | None = None
