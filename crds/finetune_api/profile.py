"""FineTuneProfile: the platform team's defaults and limits, cluster-scoped."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import Model, Rule, lasts_a_minute, spec_field
from finetune_api.pods import PodTemplate, Queue, Resources, Storage
from finetune_api.scalars import Duration, License, Name, NamePattern, Quantity

Image = Annotated[str, StringConstraints(pattern=r"^[^ \t\r\n]+$", max_length=512)]
EndpointPattern = Annotated[str, StringConstraints(pattern=r"^https?://[^ \t\r\n]+$", max_length=512)]


class Images(Model):
    trainer: Image | None = spec_field("attempt", "Image of train pods. Default: the operator's flag.")
    preflight: Image | None = spec_field("attempt", "Image of preflight pods. Default: the operator's flag.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = spec_field(
        "attempt", "When the kubelet pulls the images. Default: IfNotPresent."
    )


class Gpu(Model):
    resource_name: Annotated[str, StringConstraints(max_length=317)] | None = spec_field(
        "attempt", "Resource that stands for one GPU. Default: nvidia.com/gpu."
    )
    memory: Quantity | None = spec_field(
        "attempt", "Memory of one GPU, such as 80Gi: preflight warns of runs that will not fit. Default: unknown."
    )
    hour_price: float | None = spec_field(
        "live",
        "What one GPU costs an hour, in whatever currency: status.usage.cost then tells what a job has cost. Default: not told.",
        ge=0,
        le=1_000_000,
    )
    watts: float | None = spec_field(
        "live",
        "Power of one GPU with its share of the machine: status.usage.kilowattHours then tells what a job has used. Default: not told.",
        ge=0,
        le=1_000_000,
    )


class Cache(Model):
    claim_name: Name = spec_field(
        "attempt",
        "PersistentVolumeClaim of the job's namespace, which train pods share to download a base model once. All files are compared "
        "with their digests before use. A pod whose claim is missing does not start.",
        required=True,
    )
    size: Quantity | None = spec_field(
        "attempt",
        "Most that is kept, such as 500Gi; models used longest ago go first. Default: as much as the volume holds.",
    )


class Limits(Model):
    rules: ClassVar[tuple[Rule, ...]] = (lasts_a_minute("deadline"),)

    gpus: int | None = spec_field(
        "attempt", "Most GPUs of a job: nodes times perNode.gpus. Default: no bound.", ge=0, le=32_768
    )
    nodes: int | None = spec_field(
        "attempt", "Most pods of a job that train together. Default: no bound.", ge=1, le=512
    )
    cpu: Quantity | None = spec_field("attempt", 'Most CPU that a pod may ask for, such as "16". Default: no bound.')
    memory: Quantity | None = spec_field(
        "attempt", "Most memory that a pod may ask for, such as 256Gi. Default: no bound."
    )
    gpu_hours: float | None = spec_field(
        "live",
        "Most budget.gpuHours of a job, and what one without a budget gets. Default: no bound.",
        gt=0,
        le=10_000_000,
    )
    deadline: Duration | None = spec_field(
        "live", "Longest deadline of a job, such as 24h, and what one without a deadline gets. Default: no bound."
    )


class ProfileQueue(Queue):
    preflight: bool | None = spec_field(
        "attempt",
        "Whether preflight Jobs go through the queue, too: for clusters whose Kueue holds every Job "
        "(manageJobsWithoutQueueName). Default: false.",
    )


class Allowed(Model):
    """The profile's own words are always allowed; so is a job that names nothing."""

    namespaces: list[NamePattern] | None = spec_field(
        "attempt",
        "Namespaces whose jobs may use this profile, * standing for any characters. Default: all.",
        max_length=64,
    )
    secrets: list[NamePattern] | None = spec_field(
        "attempt",
        "Secrets of its namespace that a job may name, as storage.credentialsSecret or to pull images, * standing for any "
        "characters. Default: all.",
        max_length=64,
    )
    config_maps: list[NamePattern] | None = spec_field(
        "attempt",
        "ConfigMaps of its namespace that a job may name as storage.caConfigMap, and so whom its pods trust, * standing for any "
        "characters. Default: all.",
        max_length=64,
    )
    service_accounts: list[NamePattern] | None = spec_field(
        "attempt",
        "Service accounts of its namespace that a job may name, * standing for any characters. Default: all.",
        max_length=64,
    )
    runtime_classes: list[NamePattern] | None = spec_field(
        "attempt", "Runtime classes a job may name, * standing for any characters. Default: all.", max_length=64
    )


Requirable = Literal[
    "budget",
    "data.test",
    "data.validation",
    "deadline",
    "evaluation.gates",
    "model.license",
    "podTemplate.metadata.labels",
    "podTemplate.spec.priorityClassName",
    "podTemplate.spec.serviceAccountName",
    "queue",
    "resources.perNode.gpus",
    "resources.perNode.memory",
    "storage.credentialsSecret",
]
"""Optional fields of a job that a platform team may insist on."""


class FineTuneProfileSpec(Model):
    images: Images | None = spec_field(None, "Images of the pods.")
    storage: Storage | None = spec_field(None, "How object storage is reached when a job does not say it.")
    allowed_endpoints: list[EndpointPattern] | None = spec_field(
        "attempt",
        "Endpoints a job may name, also as HF_ENDPOINT or a proxy in its env, * standing for any characters but a slash. "
        "Default: only the profile's own.",
        max_length=64,
    )
    allowed_licenses: list[License] | None = spec_field(
        "attempt",
        "Licenses that base models may have, by their names on the Hub; unknown ones are refused. Default: any, and none known.",
        min_length=1,
        max_length=64,
    )
    allowed: Allowed | None = spec_field(
        None,
        "Names that jobs may use, beside those of the profile. A list that is left out allows all, an empty one none.",
    )
    limits: Limits | None = spec_field(None, "The most that one job may ask for.")
    required: list[Requirable] | None = spec_field(
        "attempt",
        "Fields that a job must set itself, whatever the defaults. Default: none.",
        max_length=16,
    )
    resources: Resources | None = spec_field(None, "What the pods get when a job does not say it.")
    gpu: Gpu | None = spec_field(None, "How GPUs are asked for.")
    cache: Cache | None = spec_field(None, "Where base models stay between pods. Default: every pod downloads its own.")
    start_timeout: Duration | None = spec_field(
        "live",
        "How long the pods of a job on several nodes, without a queue, may wait until each has a node; then all are given back and "
        "tried again later. Default: 10m.",
    )
    queue: ProfileQueue | None = spec_field(None, "Kueue's queue for jobs that name none. Default: no queue.")
    pod_template: PodTemplate | None = spec_field(
        None, "Merged under the job's: maps merge, lists append, the job wins."
    )


class FineTuneProfile(Model):
    """The platform team's defaults and limits for FineTuneJobs; the one named default serves jobs that name none."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneProfile"]
    metadata: dict[str, Any]
    spec: FineTuneProfileSpec = Field(description="Defaults and limits.")
