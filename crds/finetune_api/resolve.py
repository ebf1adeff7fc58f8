"""Pure: job + profile -> RunConfig with every default filled in, and the identities of a run.

The defaults of the API live here and nowhere else.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import rfc8785

from finetune_api.contract import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GateConfig,
    GenerationConfig,
    LimitsConfig,
    MethodConfig,
    OutputConfig,
    PartConfig,
    PartSource,
    PodsConfig,
    QueueConfig,
    RetentionConfig,
    RunConfig,
    StorageConfig,
    TaskConfig,
    TrainingConfig,
)
from finetune_api.evaluation import Evaluation, Retention, RetentionTask
from finetune_api.fence import Refusal, endpoint_matches, refusals, shown
from finetune_api.job import FineTuneJobSpec
from finetune_api.method import Method
from finetune_api.pods import Checkpoint, PerNode, PodMetadata, PodSpec, PodTemplate, Resources, Retries, Storage
from finetune_api.profile import FineTuneProfileSpec, Gpu, Images, Limits
from finetune_api.rows import Deduplicate, PartTestSource, Validation, ValidationSource
from finetune_api.scalars import seconds
from finetune_api.task import Augment, Part, Task
from finetune_api.tasks import TASKS, TaskKind
from finetune_api.training import Every, Generation, Loss, Optimizer, Schedule, Training, Warmup

T = TypeVar("T")

LEARNING_RATES = {
    "full": 2e-5,
    "head": 1e-3,
    "lora": 2e-4,
    "qlora": 2e-4,
    "dora": 2e-4,
    "adapter": 1e-3,
    "ia3": 3e-3,
    "prompt": 3e-2,
    "prefix": 1e-2,
}
SGD_LEARNING_RATE = 1e-2
"""The steps of sgd are as large as the gradients, those of the others about one."""


class ResolveError(Exception):
    """The document asks for what the profile does not allow, or what does not fit together."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Defaults:
    """What the operator's command line supplies."""

    trainer_image: str
    preflight_image: str
    in_cluster: bool = True


def first(*values: T | None, default: T) -> T:
    """The first value that is set."""
    return next((value for value in values if value is not None), default)


def resolve(
    spec: FineTuneJobSpec,
    profile: FineTuneProfileSpec,
    *,
    job: str,
    job_uid: str,
    generation: int,
    defaults: Defaults,
    before: RunConfig | None = None,
) -> RunConfig:
    """The run a document asks for; `job` is namespace/name; where a document names no namespace, none is judged.

    `before`: the run of a document that differs in nothing but live fields. It goes on, but is judged anew.

    Raises ResolveError when the profile forbids what the document names.
    """
    config = RunConfig(
        generation=generation,
        job=job,
        job_uid=job_uid,
        task=_task(spec),
        model=spec.model.uri.rstrip("/"),
        model_license=spec.model.license,
        allowed_licenses=profile.allowed_licenses,
        data=_data(spec),
        method=_method(spec),
        training=_training(spec),
        primary=first((spec.evaluation or Evaluation()).primary, default=TASKS[spec.task.type].primary),
        evaluation=_evaluation(spec.evaluation or Evaluation()),
        decoding=_decoding(spec),
        checkpoint=_checkpoint(spec),
        output=OutputConfig(
            uri=spec.output.uri.rstrip("/"),
            merge=first(spec.output.merge, default=False),
            weights=first(spec.output.weights, default="Best"),
        ),
        storage=_storage(spec.storage or Storage(), profile),
        pods=_pods(spec, profile, defaults),
        max_retries=first((spec.retries or Retries()).max, default=3),
        limits=_limits(spec, profile),
    )
    if before is not None:
        config = before.continued(config)
    if defaults.in_cluster:
        _refuse_files(config.addresses)
        _refuse(refusals(spec, profile, namespace=job.partition("/")[0] or None, pods=config.pods))
    return config


def _refuse_files(uris: Mapping[str, str]) -> None:
    for path, uri in uris.items():
        if uri.startswith("file:"):
            raise ResolveError("FileUriInCluster", f"{path}: {uri} names a file of one machine; in a cluster use s3://")


def _refuse(found: Sequence[Refusal]) -> None:
    if found:
        raise ResolveError(found[0].reason, "; ".join(one.message for one in found))


def _task(spec: FineTuneJobSpec) -> TaskConfig:
    task, augment = spec.task, spec.task.augment or Augment()
    return TaskConfig(
        type=task.type,
        columns=_columns(task),
        labels=task.labels,
        source_language=task.source_language,
        target_language=task.target_language,
        prefix=task.prefix,
        stride=first(task.stride, default=64) if task.type == "question-answering" else None,
        unanswerable=task.unanswerable,
        chat_template=None if task.chat_template == "auto" else task.chat_template,
        beta=first(task.beta, default=0.1) if task.type == "preference" else None,
        loss=first(task.loss, default="sigmoid") if task.type == "preference" else None,
        train_on=first(task.train_on, default="assistant") if task.type == "instruction" else None,
        image_size=task.image_size,
        augment_flip=augment.flip or None,
        augment_crop=augment.crop,
        augment_color=augment.color,
        augment_mixup=augment.mixup,
        tasks=None
        if task.tasks is None
        else [
            PartConfig(
                name=part.name,
                type=part.type,
                columns=_columns(part),
                labels=part.labels,
                loss_weight=first(part.loss_weight, default=1.0),
                source_language=part.source_language,
                target_language=part.target_language,
                prefix=part.prefix,
            )
            for part in task.tasks
        ],
    )


def _columns(task: Task | Part | RetentionTask) -> dict[str, str]:
    """Names of the columns by role."""
    named = task.columns.document() if task.columns else {}
    kind = TASKS[task.type]
    optional = {role: named[role] for role in kind.optional if role in named}
    return {role: named.get(role, name) for role, name in kind.columns.items()} | optional


def _data(spec: FineTuneJobSpec) -> DataConfig:
    validation = spec.data.validation or Validation(fraction=0.1)
    repeated = spec.data.deduplicate or Deduplicate()
    weights = [first(source.weight, default=1.0) for source in spec.data.train]
    tasks = [source.task for source in spec.data.train if source.task is not None]
    test = spec.data.test
    return DataConfig(
        train=[source.uri for source in spec.data.train],
        validation_fraction=validation.fraction,
        validation_group_by=validation.group_by,
        validation_uri=validation.uri,
        test_uri=test.uri if test else None,
        max_length=first(spec.data.max_length, default=256),
        overlong=first(spec.data.overlong, default="Split" if TASKS[spec.task.type].splits else "Truncate"),
        max_target_length=_target_length(spec),
        train_weights=weights if any(weight != 1.0 for weight in weights) else None,
        deduplicate="near" if repeated.near else "exact" if repeated.exact else None,
        leakage=first(spec.data.leakage, default="Drop"),
        audit=first(spec.data.audit, default="Sample"),
        train_tasks=tasks or None,
        validation_sources=_sources(validation.sources),
        test_sources=_sources(test.sources) if test else None,
    )


def _sources(asked: Sequence[ValidationSource] | Sequence[PartTestSource] | None) -> list[PartSource] | None:
    return None if asked is None else [PartSource(task=source.task, uri=source.uri) for source in asked]


def _kinds(task: Task) -> list[TaskKind]:
    """What is known of the task, or of each of several."""
    return [TASKS[part.type] for part in task.tasks] if task.tasks else [TASKS[task.type]]


def _target_length(spec: FineTuneJobSpec) -> int | None:
    limited = any(kind.targets for kind in _kinds(spec.task))
    return first(spec.data.max_target_length, default=128) if limited else None


def _decoding(spec: FineTuneJobSpec) -> GenerationConfig | None:
    if not any(kind.generates for kind in _kinds(spec.task)):
        return None
    asked = spec.generation or Generation()
    beam = asked.strategy == "beam"
    return GenerationConfig(
        strategy="beam" if beam else "greedy",
        beams=first(asked.beams, default=4) if beam else 1,
        max_new_tokens=first(asked.max_new_tokens, _target_length(spec), default=128),
        length_penalty=asked.length_penalty,
    )


def _method(spec: FineTuneJobSpec) -> MethodConfig:
    method = spec.method or Method(type="full")
    values: dict[str, Any] = {}
    if method.freeze is not None:
        values |= {
            "freeze_embeddings": method.freeze.embeddings,
            "freeze_layers": method.freeze.layers,
            "freeze_patterns": method.freeze.patterns,
        }
    if method.unfreeze is not None:
        values["unfreeze_every_steps"] = method.unfreeze.every_steps
    if method.type in ("lora", "qlora", "dora"):
        rank = first(method.rank, default=16)
        values |= {
            "rank": rank,
            "alpha": first(method.alpha, default=2.0 * rank),
            "dropout": first(method.dropout, default=0.05),
            # None, not false: so that the identity of a run without it is what it was before there was this field
            "rank_stabilized": method.rank_stabilized or None,
        }
    if method.type == "qlora":
        values |= {
            "quantization": first(method.quantization, default="nf4"),
            "double_quant": first(method.double_quant, default=True),
        }
    if method.type == "adapter":
        values |= {
            "reduction": first(method.reduction, default=16),
            "variant": first(method.variant, default="pfeiffer"),
        }
    if method.type in ("prompt", "prefix"):
        values["virtual_tokens"] = first(method.virtual_tokens, default=20)
    return MethodConfig(type=method.type, targets=method.targets, **values)


def _training(spec: FineTuneJobSpec) -> TrainingConfig:
    training = spec.training or Training()
    method = spec.method.type if spec.method else "full"
    schedule = training.schedule or Schedule(type="linear")
    warmup = schedule.warmup or Warmup(percent=30.0 if schedule.type == "one-cycle" else 6.0)
    optimizer = training.optimizer or Optimizer(type="adamw")
    rate = SGD_LEARNING_RATE if optimizer.type == "sgd" else LEARNING_RATES[method]
    every = training.evaluate_every or Every(epochs=1.0)
    stopping = training.early_stopping
    loss = training.loss or Loss(type="cross-entropy")
    return TrainingConfig(
        epochs=None if training.max_steps else first(training.epochs, default=3.0),
        max_steps=training.max_steps,
        batch_size=first(training.batch_size, default=32),
        learning_rate=first(training.learning_rate, default=rate),
        schedule=schedule.type,
        warmup_percent=warmup.percent,
        warmup_steps=warmup.steps,
        schedule_minimum=first(schedule.minimum, default=0.0),
        schedule_power=first(schedule.power, default=1.0),
        optimizer=optimizer.type,
        weight_decay=first(optimizer.weight_decay, default=0.01),
        betas=first(optimizer.betas, default=[0.9, 0.999]),
        epsilon=first(optimizer.epsilon, default=1e-8),
        momentum=first(optimizer.momentum, default=0.0),
        layerwise_decay=first(training.layerwise_decay, default=1.0),
        dropout=training.dropout,
        ema_decay=training.ema.decay if training.ema else None,
        l2sp_alpha=training.l2sp.alpha if training.l2sp else None,
        neftune_alpha=training.neftune.alpha if training.neftune else None,
        gradient_checkpointing=first(training.gradient_checkpointing, default=False),
        packing=training.packing,
        loss=loss.type,
        focal_gamma=first(loss.gamma, default=2.0),
        label_smoothing=first(training.label_smoothing, default=0.0),
        class_weights=training.class_weights,
        max_grad_norm=first(training.max_grad_norm, default=1.0),
        precision=first(training.precision, default="auto"),
        micro_batch=training.micro_batch,
        seed=first(training.seed, default=17),
        evaluate_steps=every.steps,
        evaluate_epochs=every.epochs,
        patience=stopping.patience if stopping else None,
        min_delta=first(stopping.min_delta, default=0.0) if stopping else 0.0,
    )


def _evaluation(evaluation: Evaluation) -> EvaluationConfig:
    return EvaluationConfig(
        metrics=evaluation.metrics,
        baseline=first(evaluation.baseline, default="auto"),
        slices=evaluation.slices or [],
        gates=[GateConfig(**gate.model_dump()) for gate in evaluation.gates or []],
        retention=[_retention(one) for one in evaluation.retention or []],
    )


def _retention(one: Retention) -> RetentionConfig:
    return RetentionConfig(
        name=one.name,
        task=TaskConfig(
            type=one.task.type,
            columns=_columns(one.task),
            labels=None,
            source_language=one.task.source_language,
            target_language=one.task.target_language,
            prefix=one.task.prefix,
        ),
        uri=one.data.uri,
        metric=first(one.metric, default=TASKS[one.task.type].kept[0]),
        max_drop=one.max_drop,
        max_rise_percent=one.max_rise_percent,
    )


def _checkpoint(spec: FineTuneJobSpec) -> CheckpointConfig:
    checkpoint = spec.checkpoint or Checkpoint()
    every = checkpoint.every
    return CheckpointConfig(
        every_seconds=seconds(every.duration) if every and every.duration else None,
        every_steps=every.steps if every else None,
        keep_last=first(checkpoint.keep_last, default=2),
    )


def _limits(spec: FineTuneJobSpec, profile: FineTuneProfileSpec) -> LimitsConfig:
    most = profile.limits or Limits()
    deadline = first(spec.deadline, most.deadline, default=None)
    hours = first(spec.budget.gpu_hours if spec.budget else None, most.gpu_hours, default=None)
    return LimitsConfig(
        deadline_seconds=seconds(deadline) if deadline else None,
        gpu_seconds=3600 * hours if hours else None,
        of_profile=_left(spec, most) or None,
        stop_at_best=spec.budget is None or spec.budget.on_exhausted != "Fail",
        gpu_hour_price=(profile.gpu or Gpu()).hour_price,
        gpu_watts=(profile.gpu or Gpu()).watts,
        start_seconds=seconds(profile.start_timeout or "10m"),
        keep_seconds=min(int(seconds(spec.ttl_after_finished or "1h")), 2**31 - 1),
    )


def _left(spec: FineTuneJobSpec, most: Limits) -> list[Literal["deadline", "gpuHours"]]:
    """Bounds that are the profile's, for want of one of the job's."""
    left: list[Literal["deadline", "gpuHours"]] = []
    if spec.deadline is None and most.deadline is not None:
        left.append("deadline")
    if spec.budget is None and most.gpu_hours is not None:
        left.append("gpuHours")
    return left


def _storage(asked: Storage, profile: FineTuneProfileSpec) -> StorageConfig:
    """How the server is spoken to belongs to the endpoint beside which it is named; who asks does not."""
    theirs = profile.storage or Storage()
    own = (theirs.endpoint or "").rstrip("/")
    endpoint = first(asked.endpoint, default=own).rstrip("/")
    patterns = profile.allowed_endpoints or []
    if endpoint != own and not any(endpoint_matches(endpoint, pattern) for pattern in patterns):
        allowed = ", ".join([*([shown(own)] if own else []), *patterns]) or "none but AWS"
        raise ResolveError(
            "EndpointNotAllowed",
            f"spec.storage.endpoint: {shown(endpoint)} is not allowed by the profile; allowed: {allowed}",
        )
    server = theirs if endpoint == own else Storage()
    addressing = asked.addressing or server.addressing
    return StorageConfig(
        endpoint=endpoint or None,
        region=first(asked.region, theirs.region, default="us-east-1"),
        credentials_secret=asked.credentials_secret or theirs.credentials_secret,
        addressing=None if addressing == "Auto" else addressing,
        ca_config_map=asked.ca_config_map or server.ca_config_map,
    )


def _pods(spec: FineTuneJobSpec, profile: FineTuneProfileSpec, defaults: Defaults) -> PodsConfig:
    images = profile.images or Images()
    asked, theirs = spec.resources or Resources(), profile.resources or Resources()
    ours, low = asked.per_node or PerNode(), theirs.per_node or PerNode()
    gpu = profile.gpu or Gpu()
    return PodsConfig(
        nodes=first(asked.nodes, theirs.nodes, default=1),
        gpus=first(ours.gpus, low.gpus, default=1),
        cpu=first(ours.cpu, low.cpu, default="2"),
        memory=first(ours.memory, low.memory, default="8Gi"),
        gpu_resource=first(gpu.resource_name, default="nvidia.com/gpu"),
        gpu_memory=gpu.memory,
        queue=_queue(spec, profile),
        cache=CacheConfig(claim=profile.cache.claim_name, size=profile.cache.size) if profile.cache else None,
        trainer_image=first(images.trainer, default=defaults.trainer_image),
        preflight_image=first(images.preflight, default=defaults.preflight_image),
        pull_policy=first(images.pull_policy, default="IfNotPresent"),
        template=merge_templates(profile.pod_template, spec.pod_template),
    )


def _queue(spec: FineTuneJobSpec, profile: FineTuneProfileSpec) -> QueueConfig | None:
    """The job's own queue, else the profile's. A priority class belongs to the queue beside which it is named."""
    theirs = profile.queue
    chosen = spec.queue or theirs
    if chosen is None:
        return None
    return QueueConfig(
        name=chosen.name,
        priority=chosen.workload_priority_class,
        preflight=first(theirs.preflight if theirs else None, default=False),
    )


def merge_templates(base: PodTemplate | None, ours: PodTemplate | None) -> PodTemplate:
    """`ours` over `base`: maps merge, lists append (env by name), single values win."""
    low, high = base or PodTemplate(), ours or PodTemplate()
    return PodTemplate(
        metadata=_merge(PodMetadata, low.metadata, high.metadata), spec=_merge(PodSpec, low.spec, high.spec)
    )


M = TypeVar("M", PodMetadata, PodSpec)


def _merge(kind: type[M], low: M | None, high: M | None) -> M | None:
    if low is None or high is None:
        return high or low
    merged: dict[str, Any] = {}
    for name in kind.model_fields:
        a, b = getattr(low, name), getattr(high, name)
        if isinstance(a, dict) and isinstance(b, dict):
            merged[name] = {**a, **b}
        elif isinstance(a, list) and isinstance(b, list):
            named = {item.name for item in b if hasattr(item, "name")}
            merged[name] = [item for item in a if getattr(item, "name", None) not in named] + b
        else:
            merged[name] = a if b is None else b
    return kind(**merged)


# --- identities ---


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, over RFC 8785 canonical JSON of typed values."""
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()


_LATER = {"train_weights", "deduplicate", "leakage", "max_target_length", "train_tasks"}


def train_identity(config: RunConfig, *, labels: list[str], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Everything that determines the weights. `inputs` maps a role ("model", "train/0", "validation") to a digest.

    URIs are left out on purpose: the same bytes under another name are the same run. So are the micro-batch, gradient
    checkpointing, resources, images and package versions, which decide bits but not the run; they are recorded with
    each attempt. Fields that came later than the recipe have a default in the contract and count only where they
    differ from it.
    """
    held = config.data.validation_sources
    training = config.training.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    for name in ("microBatch", "gradientCheckpointing"):
        training.pop(name, None)
    return {
        "recipeVersion": config.recipe_version,
        "task": {**config.task.document(), "labels": labels},
        "data": {
            "maxLength": config.data.max_length,
            "overlong": config.data.overlong,
            "validationFraction": config.data.validation_fraction,
            "groupBy": config.data.validation_group_by,
            **config.data.model_dump(mode="json", by_alias=True, exclude_defaults=True, include=_LATER),
            **({} if held is None else {"validationTasks": [source.task for source in held]}),
        },
        "inputs": dict(inputs),
        "method": config.method.document(),
        "training": training,
        "primary": config.primary,
    }


def run_id(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal characters that name a run under its output."""
    return digest(identity)[:16]


def evaluation_id(
    run: str,
    config: RunConfig,
    *,
    test: str | None,
    retention: Mapping[str, str] | None = None,
    part: Mapping[str, Any] | None = None,
) -> str:
    """Identity of an evaluation; `test` is the digest of the test rows, None for the validation rows, and `retention`
    that of the rows of each retention set, by its name. `part` names what there is of a training that was ended before
    its time: what is measured then says nothing of the whole run.

    Gates and bounds are not part of it: they are judged again from what was measured. What is at its default counts
    nothing.
    """
    decoding = {} if config.decoding is None else {"decoding": config.decoding.document()}
    sources = config.data.test_sources
    tasks = {} if sources is None else {"testTasks": [source.task for source in sources]}
    kept = {"retention": dict(retention)} if retention else {}
    ended = {} if part is None else {"part": dict(part)}
    return digest({"run": run, "test": test, **decoding, **tasks, **kept, **ended, **_measured(config, "uri")})[:16]


def _measured(config: RunConfig, *without: str) -> dict[str, Any]:
    """What decides the measurements, where it is not the default; of retention sets all but bounds and `without`."""
    asked = config.evaluation.model_dump(
        mode="json",
        by_alias=True,
        exclude={"gates": True, "retention": {"__all__": {"max_drop", "max_rise_percent", *without}}},
        exclude_none=True,
        exclude_defaults=True,
    )
    return {"evaluation": asked} if asked else {}


def publication_id(evaluation: str, config: RunConfig) -> str:
    """Identity of a publication."""
    asked: dict[str, Any] = {"merge": config.output.merge, "weights": config.output.weights}
    if config.model_license is not None:
        asked["license"] = config.model_license
    return digest({"evaluation": evaluation, **asked})[:16]


def restart_key(config: RunConfig) -> str:
    """Equal for two configs that can share running pods: everything but what is `live` or `judge`, or names the
    generation."""
    document = config.document()
    for live in ("generation", "maxRetries", "limits", "checkpoint", "evaluation"):
        document.pop(live)
    document["data"].pop("audit", None)
    return digest({**document, **_measured(config)})[:16]
