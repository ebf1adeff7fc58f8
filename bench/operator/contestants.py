"""Who runs: plain Jobs, FineTuneJobs, TrainJobs. What each is given, and how its pods and its ends are known."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.operator import stages
from bench.operator.api import Document

BATCH = "/apis/batch/v1/namespaces/{}/jobs"
FINETUNE = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
TRAINER = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{}/trainjobs"
RESOURCES = {"nvidia.com/gpu": "1"}


@dataclass(frozen=True)
class Contestant:
    """`path` has a place for the namespace."""

    title: str
    path: str
    document: Callable[[int], Document]
    """Of the object with this number; its name holds the number in five digits."""
    pod_label: str
    """A label of each of its pods: the object's name, or its UID."""
    ended: Callable[[Document], bool]
    """Raises RuntimeError for an object that has failed."""
    processes: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    """The ends of their names in the API server's audit log."""


def name(number: int) -> str:
    return f"job-{number:05d}"


def _condition(document: Document, *kinds: str) -> bool:
    conditions = (document.get("status") or {}).get("conditions") or []
    return any(one["type"] in kinds and one["status"] == "True" for one in conditions)


# --- plain Jobs ---


def _plain(number: int) -> Document:
    """Every other one as short as a preflight, the rest as long as a training."""
    seconds = stages.TRAIN_SECONDS if number % 2 else stages.PREFLIGHT_SECONDS
    container = {"name": "train", "image": "train:1", "resources": {"limits": RESOURCES}}
    pod = {"restartPolicy": "Never", "containers": [container]}
    template = {"metadata": {"annotations": {stages.DURATION: f"{seconds}s"}}, "spec": pod}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name(number)},
        "spec": {"backoffLimit": 0, "template": template},
    }


def _plain_ended(document: Document) -> bool:
    if _condition(document, "Failed"):
        raise RuntimeError(f"a Job has failed: {document['status']}")
    return _condition(document, "Complete")


PLAIN = Contestant(
    "plain Jobs", BATCH, _plain, pod_label="batch.kubernetes.io/job-name", ended=_plain_ended, users=("controllers",)
)

# --- ours ---


def finetune(number: int, *, lasting: str | None = None) -> Document:
    """The smallest useful document with a gate. `lasting`: its training goes on for so long, as Go writes durations."""
    spec: Document = {
        "task": {"type": "text-classification"},
        "model": {"uri": "s3://models/minilm"},
        "data": {"train": [{"uri": "s3://data/support/train.jsonl"}], "test": {"uri": "s3://data/support/test.jsonl"}},
        "evaluation": {"gates": [{"metric": "f1", "atLeast": 0.8}]},
        "output": {"uri": f"s3://models/{name(number)}"},
    }
    if lasting is not None:
        spec["podTemplate"] = {"metadata": {"annotations": {stages.DURATION: lasting}}}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name(number)},
        "spec": spec,
    }


def _finetune_ended(document: Document) -> bool:
    status = document.get("status") or {}
    if status.get("phase") == "Failed":
        raise RuntimeError(f"a FineTuneJob has failed: {status}")
    return status.get("phase") == "Succeeded"


OURS = Contestant(
    "finetune-operator",
    FINETUNE,
    finetune,
    pod_label="finetune.dev/job-uid",
    ended=_finetune_ended,
    processes=("operator",),
    users=(":finetune-operator",),
)

# --- the peer ---


def _trainjob(number: int) -> Document:
    trainer = {
        "image": "train:1",
        "command": ["train"],
        "numNodes": 1,
        "resourcesPerNode": {"limits": RESOURCES, "requests": RESOURCES},
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name(number)},
        "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer},
    }


def _trainjob_ended(document: Document) -> bool:
    if _condition(document, "Failed"):
        raise RuntimeError(f"a TrainJob has failed: {document['status']}")
    return _condition(document, "Complete")


PEER = Contestant(
    "Kubeflow Trainer",
    TRAINER,
    _trainjob,
    pod_label="jobset.sigs.k8s.io/jobset-name",
    ended=_trainjob_ended,
    processes=("trainer", "jobset"),
    users=("trainer", "jobset"),
)
