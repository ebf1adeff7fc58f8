"""What pods get and where a run keeps its results: spec.checkpoint, output, storage, resources, podTemplate, retries, budget."""

from typing import Annotated, ClassVar, Literal

from pydantic import StringConstraints

from finetune_api.base import Model, Rule, exactly_one_of, spec_field
from finetune_api.scalars import (
    Duration,
    Key,
    LabelValue,
    Name,
    PositiveQuantity,
    QueueName,
    S3OrFile,
    Text,
    TopologyKey,
    Uri,
)


class CheckpointEvery(Model):
    rules: ClassVar[tuple[Rule, ...]] = (exactly_one_of("duration", "steps"),)

    duration: Duration | None = spec_field(
        "live",
        "Training time that a kill may cost at most, such as 10m: so long from one committed checkpoint to the next. A "
        "change holds from the next attempt on.",
    )
    steps: int | None = spec_field(
        "live",
        "Optimizer steps that a kill may cost at most: so many from one committed checkpoint to the next. A change holds "
        "from the next attempt on.",
        ge=1,
        le=10_000_000,
    )


class Checkpoint(Model):
    every: CheckpointEvery | None = spec_field(
        None,
        "Time or steps between two checkpoints. Default: a minute, or longer where checkpoints would cost more than 1 % of the time.",
    )
    keep_last: int | None = spec_field(
        "live", "Checkpoints that are kept beside the best one. Default: 2.", ge=2, le=100
    )


class Output(Model):
    uri: Uri = spec_field("train", f"Where checkpoints, reports and the model go: {S3OrFile}.", required=True)
    merge: bool | None = spec_field(
        "publish",
        "Write a LoRA result as a plain model with the base merged in. Default: false, an adapter in PEFT's format.",
    )
    weights: Literal["Best", "Last"] | None = spec_field("publish", "Which weights are published. Default: Best.")


class Storage(Model):
    endpoint: Annotated[str, StringConstraints(pattern=r"^https?://[^ \t\r\n/]+/?$", max_length=512)] | None = (
        spec_field(
            "attempt", "Address of the S3 server. Default: the profile's, else AWS. Only what the profile allows."
        )
    )
    region: Annotated[str, StringConstraints(max_length=64)] | None = spec_field(
        "attempt", "Region of the S3 server. Default: the profile's, else us-east-1."
    )
    credentials_secret: Name | None = spec_field(
        "attempt",
        "Secret of the job's namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and perhaps AWS_SESSION_TOKEN and HF_TOKEN, mounted "
        "as files. Default: the profile's, else the SDK's own chain (workload identity).",
    )
    addressing: Literal["Auto", "Path", "VirtualHost"] | None = spec_field(
        "attempt",
        "Where requests name the bucket: Path, behind the server's name; VirtualHost, before it; Auto, the former where there is "
        "an endpoint. Default: the profile's for its own endpoint, else Auto.",
    )
    ca_config_map: Name | None = spec_field(
        "attempt",
        "ConfigMap of the job's namespace with ca.crt: certificates, in PEM, of the authorities that the S3 server's is trusted by, "
        "instead of the usual ones. Outside a cluster it is not read; AWS_CA_BUNDLE names a file there. Default: the profile's for "
        "its own endpoint, else the usual ones.",
    )


class PerNode(Model):
    gpus: int | None = spec_field("attempt", "GPUs a pod; 0 trains on CPUs. Default: 1.", ge=0, le=64)
    cpu: PositiveQuantity | None = spec_field("attempt", 'CPU request a pod, such as "4". Default: "2".')
    memory: PositiveQuantity | None = spec_field("attempt", "Memory request and limit a pod. Default: 8Gi.")


class Resources(Model):
    nodes: int | None = spec_field("attempt", "Pods that train together, one a node. Default: 1.", ge=1, le=512)
    per_node: PerNode | None = spec_field(None, "What each pod gets.")


_OURS = ("HOME", "JOB_COMPLETION_INDEX")


class EnvVar(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(self.name in ['HOME', 'JOB_COMPLETION_INDEX']) && !self.name.startsWith('FINETUNE_')",
            "HOME, JOB_COMPLETION_INDEX and names that begin with FINETUNE_ are set by the operator",
            # str: the validator asks about documents whose types are still wrong
            lambda model: model.name not in _OURS and not str(model.name).startswith("FINETUNE_"),
        ),
    )

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = spec_field(
        "attempt", "Name of the environment variable.", required=True
    )
    value: Annotated[str, StringConstraints(max_length=4096)] = spec_field(
        "attempt", "Its value, to the letter: $(NAME) is not replaced.", required=True
    )


class Toleration(Model):
    key: Key | None = spec_field("attempt", "Taint key.")
    operator: Literal["Exists", "Equal"] | None = spec_field("attempt", "How the taint is compared. Default: Equal.")
    value: LabelValue | None = spec_field("attempt", "Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = spec_field(
        "attempt", "Effect of the taint. Default: every effect."
    )
    toleration_seconds: int | None = spec_field(
        "attempt", "Seconds for which a NoExecute taint is tolerated.", ge=0, le=2**31 - 1
    )


class PullSecret(Model):
    name: Name = spec_field("attempt", "Name of the Secret.", required=True)


class PodMetadata(Model):
    labels: dict[Key, LabelValue] | None = spec_field("attempt", "Added to the pods' labels.", max_length=32)
    annotations: dict[Key, Text] | None = spec_field("attempt", "Added to the pods' annotations.", max_length=32)


class PodSpec(Model):
    node_selector: dict[Key, LabelValue] | None = spec_field("attempt", "Labels the node must have.", max_length=32)
    topology_key: TopologyKey | None = spec_field(
        "attempt",
        "Label of nodes, such as topology.kubernetes.io/zone: all pods of a run on several nodes get nodes with one and the same value "
        "of it. Default: any nodes.",
    )
    tolerations: list[Toleration] | None = spec_field(None, "Taints the pods tolerate.", max_length=32)
    runtime_class_name: Name | None = spec_field("attempt", "RuntimeClass of the pods.")
    priority_class_name: Name | None = spec_field("attempt", "PriorityClass of the pods.")
    service_account_name: Name | None = spec_field(
        "attempt", "Service account of the pods, for workload identity. No API token is mounted. Default: default."
    )
    image_pull_secrets: list[PullSecret] | None = spec_field(None, "Secrets the images are pulled with.", max_length=8)
    termination_grace_period_seconds: int | None = spec_field(
        "attempt", "Time to commit a checkpoint when a pod is asked to stop. Default: 120.", ge=5, le=3600
    )
    env: list[EnvVar] | None = spec_field(None, "Environment variables of the trainer.", max_length=64)


class PodTemplate(Model):
    metadata: PodMetadata | None = spec_field(None, "Labels and annotations of the pods.")
    spec: PodSpec | None = spec_field(None, "The parts of a pod's spec that may be chosen.")


class Queue(Model):
    name: QueueName = spec_field(
        "attempt",
        "Kueue's LocalQueue in the job's namespace: train Jobs wait there until Kueue admits them.",
        required=True,
    )
    workload_priority_class: QueueName | None = spec_field(
        "attempt", "Kueue's WorkloadPriorityClass. Default: that of the queue, or the pods' PriorityClass."
    )


class Retries(Model):
    max: int | None = spec_field(
        "live", "Crashes after which the job fails; preemptions are free. Default: 3.", ge=0, le=100
    )


class Budget(Model):
    gpu_hours: float = spec_field(
        "live",
        "Hours times GPUs over all attempts of this FineTuneJob, each pod from when it got its node. Raise it to go on.",
        required=True,
        gt=0,
        le=10_000_000,
    )
    on_exhausted: Literal["StopAtBest", "Fail"] | None = spec_field(
        "live",
        "StopAtBest: training ends, and the best checkpoint is evaluated and published. Fail: the job fails after a "
        "committed checkpoint. Default: StopAtBest.",
    )
