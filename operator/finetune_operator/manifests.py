"""Pure: from a RunConfig to the objects that the cluster runs.

Every child carries the labels that the watches select by, the FineTuneJob as its controller, and annotations that the
next decision reads. blockOwnerDeletion is false: true would need the right to update finalizers.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from finetune_api import GROUP, VERSION
from finetune_api.contract import (
    CA_PATH,
    CACHE_PATH,
    CONFIG_PATH,
    CREDENTIALS_PATH,
    PROGRESS_PORT,
    WORK_PATH,
    QueueConfig,
    RunConfig,
)
from finetune_api.pods import PodMetadata, PodSpec
from finetune_operator.views import (
    ASKED,
    ATTEMPTS,
    CONTAINERS,
    FAILURES,
    FIGURES,
    FINISH,
    GENERATION,
    HALVE,
    INPUTS,
    INTERRUPTIONS,
    JOB_UID,
    MANAGED_BY,
    MANAGER,
    ORDINAL,
    QUEUE,
    QUEUE_PRIORITY,
    RESTART_KEY,
    RETRY,
    ROLE,
    RUN,
    TRIES,
    Counters,
    Role,
    Subject,
)

Manifest = dict[str, Any]

USER = 65532
"""The images' own user; a platform may run them as another, so only the group of the files is set."""
NVIDIA_DEVICES = "NVIDIA_VISIBLE_DEVICES"
MOUNT = "/etc/finetune"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")


def base_name(subject: Subject) -> str:
    """At most 46 characters: with `-t<ordinal>` and a pod's index it still is a host name.

    Names that a program makes are often alike in all that is kept of them, and there may be a thousand.
    """
    name = subject.name
    if len(name) > 40:
        name = f"{name[:33]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"{name.replace('.', '-').strip('-')}-{subject.uid[:5]}"


def config_name(subject: Subject, generation: int) -> str:
    return f"{base_name(subject)}-g{generation}"


def child_name(subject: Subject, role: Role, ordinal: int) -> str:
    return f"{base_name(subject)}-{role[0]}{ordinal}"


def service_name(subject: Subject) -> str:
    """Unlike other names, a Service's must begin with a letter."""
    name = base_name(subject)
    return name if name[0].isalpha() else f"n{name}"


def config_map(subject: Subject, config: RunConfig, *, key: str) -> Manifest:
    """The pinned run of one generation. Immutable: what a pod reads is what was decided."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_name(subject, config.generation),
            "namespace": subject.namespace,
            "labels": _labels(subject, role="config", generation=config.generation),
            "annotations": {RESTART_KEY: key, ASKED: subject.asked},
            "ownerReferences": [owner_reference(subject)],
        },
        "immutable": True,
        "data": {"config.json": config.text()},
    }


def service(subject: Subject) -> Manifest:
    """Names for the pods of a run on several nodes, published before they are ready: they meet while starting."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(subject),
            "namespace": subject.namespace,
            "labels": {MANAGED_BY: MANAGER, JOB_UID: subject.uid, ROLE: "service"},
            "ownerReferences": [owner_reference(subject)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_UID: subject.uid, ROLE: "train"},
        },
    }


def preflight_job(
    subject: Subject,
    config: RunConfig,
    *,
    key: str,
    ordinal: int,
    counters: Counters,
    attempts: int,
    run: str | None,
    inputs: str | None = None,
    pinned_in: str = "",
) -> Manifest:
    """One pod without a GPU that looks at the document, the data and what storage already holds.

    `pinned_in`: the ConfigMap of the run, where another version named it.
    `attempts`: train Jobs before it; once there is another one, what it said is acted upon. `run`: the one that was
    begun for this document, and `inputs` what it reads.
    """
    container: Manifest = {
        "name": CONTAINERS["preflight"],
        "image": config.pods.preflight_image,
        "args": _arguments("preflight", config),
        "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
    }
    name = child_name(subject, "preflight", ordinal)
    source = pinned_in or config_name(subject, config.generation)
    pod = _pod(config, container, job=name, gpus=0, source=source)
    pod.pop("runtimeClassName", None)  # a GPU's runtime is of no use here
    if run is not None:  # no argument: an image that was pinned before there was one would refuse it
        container["env"].append({"name": "FINETUNE_RUN", "value": run})
        container["env"] += _inputs(inputs)
    labels = _labels(subject, role="preflight", generation=config.generation)
    spec = {"template": _template(config, pod, labels, key)}
    if config.pods.queue is not None and config.pods.queue.preflight:
        labels, spec = _queued(config.pods.queue, labels, spec)
    notes = {**_notes(subject, key, ordinal, counters), ATTEMPTS: str(attempts)}
    return _job(subject, config, name, labels, spec, annotations=notes)


def train_job(
    subject: Subject,
    config: RunConfig,
    *,
    key: str,
    run_id: str,
    ordinal: int,
    counters: Counters,
    inputs: str | None = None,
    pinned_in: str = "",
) -> Manifest:
    """An attempt: one pod a node, each with its GPUs. A new attempt is a new Job, so nothing is retried in place."""
    pods, name = config.pods, child_name(subject, "train", ordinal)
    amounts = {"memory": pods.memory, **({pods.gpu_resource: str(pods.gpus)} if pods.gpus else {})}
    container: Manifest = {
        "name": CONTAINERS["train"],
        "image": pods.trainer_image,
        "args": [*_arguments("train", config), "--run-id", run_id],
        "ports": [{"name": "metrics", "containerPort": PROGRESS_PORT}],
        "resources": {"requests": {"cpu": pods.cpu, **amounts}, "limits": amounts},
    }
    source = pinned_in or config_name(subject, config.generation)
    pod = _pod(config, container, job=name, gpus=pods.gpus, source=source)
    container["env"] += _inputs(inputs)
    pod["terminationGracePeriodSeconds"] = pods.grace_seconds
    container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 (what torch shares tensors by)
    pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    if counters.halve:
        container["args"].append("--halve-micro-batch")
    if counters.finish:
        container["args"].append("--finish-now")
    if pods.cache is not None:
        container["args"] += ["--cache", CACHE_PATH]
        container["volumeMounts"].append({"name": "cache", "mountPath": CACHE_PATH})
        pod["volumes"].append({"name": "cache", "persistentVolumeClaim": {"claimName": pods.cache.claim}})
    if pods.nodes > 1:
        pod["subdomain"] = service_name(subject)
        master = {"name": "FINETUNE_MASTER", "value": f"{name}-0.{service_name(subject)}"}
        container["env"].append(master)
        pod |= _together(pods.template.spec or PodSpec(), job=name)
    labels = {**_labels(subject, role="train", generation=config.generation), RUN: run_id}
    spec = {
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "template": _template(config, pod, labels, key),
    }
    if pods.queue is not None:
        labels, spec = _queued(pods.queue, labels, spec)
        spec["podReplacementPolicy"] = "Failed"  # with its place back it waits for what the old pods still commit
    notes, found = _notes(subject, key, ordinal, counters), subject.status.preflight
    if found is not None:
        notes[FIGURES] = found.model_dump_json(by_alias=True, exclude_none=True)
    if inputs is not None:
        notes[INPUTS] = inputs
    return _job(subject, config, name, labels, spec, annotations=notes)


def _inputs(name: str | None) -> list[Manifest]:
    """What a pod reads, where preflight has told its name: no argument either."""
    return [] if name is None else [{"name": "FINETUNE_INPUTS", "value": name}]


def _queued(queue: QueueConfig, labels: dict[str, str], spec: Manifest) -> tuple[dict[str, str], Manifest]:
    """Labels of the Job alone; it begins suspended, and from then on Kueue decides whether it is."""
    priority = {QUEUE_PRIORITY: queue.priority} if queue.priority is not None else {}
    return {**labels, QUEUE: queue.name, **priority}, {"suspend": True, **spec}


def event(subject: Subject, *, kind: str, reason: str, message: str, now: str) -> Manifest:
    """An Event about the FineTuneJob; `kind` is Normal or Warning.

    It tells what was decided on one version of the document, and has a name of that: it is told once, whoever tells it.
    """
    told = "\n".join((subject.uid, subject.resource_version, kind, reason, message))
    name = f"{subject.name[:200].rstrip('.-')}.{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": subject.namespace},
        "involvedObject": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "FineTuneJob",
            "namespace": subject.namespace,
            "name": subject.name,
            "uid": subject.uid,
        },
        "type": kind,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def owner_reference(subject: Subject) -> Manifest:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "FineTuneJob",
        "name": subject.name,
        "uid": subject.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _labels(subject: Subject, *, role: str, generation: int) -> dict[str, str]:
    return {MANAGED_BY: MANAGER, JOB_UID: subject.uid, ROLE: role, GENERATION: str(generation)}


def _notes(subject: Subject, key: str, ordinal: int, counters: Counters) -> dict[str, str]:
    notes = {
        RESTART_KEY: key,
        ORDINAL: str(ordinal),
        FAILURES: str(counters.failures),
        TRIES: str(counters.tries),
        INTERRUPTIONS: str(counters.interruptions),
    }
    if counters.halve:
        notes[HALVE] = "true"
    if counters.finish:
        notes[FINISH] = "true"
    return {**notes, RETRY: subject.retry} if subject.retry else notes


def _arguments(command: str, config: RunConfig) -> list[str]:
    credentials = ["--credentials", CREDENTIALS_PATH] if config.storage.credentials_secret else []
    return [command, "--config", CONFIG_PATH, *credentials, "--message", "/dev/termination-log", "--work", WORK_PATH]


def _job(
    subject: Subject, config: RunConfig, name: str, labels: dict[str, str], spec: Manifest, *, annotations: Manifest
) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": subject.namespace,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [owner_reference(subject)],
        },
        "spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": config.limits.keep_seconds, **spec},
    }


def _template(config: RunConfig, pod: Manifest, labels: dict[str, str], key: str) -> Manifest:
    theirs = config.pods.template.metadata or PodMetadata()
    return {
        "metadata": {
            "labels": {**(theirs.labels or {}), **labels},
            "annotations": {**(theirs.annotations or {}), RESTART_KEY: key},
        },
        "spec": pod,
    }


def _pod(config: RunConfig, container: Manifest, *, job: str, gpus: int, source: str) -> Manifest:
    """What both kinds of pods share; satisfies the Pod Security Standard `restricted`."""
    theirs = config.pods.template.spec or PodSpec()
    container |= {
        "imagePullPolicy": config.pods.pull_policy,
        "env": _environment(config, theirs, job=job, gpus=gpus),
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        },
        "volumeMounts": [
            {"name": "config", "mountPath": MOUNT, "readOnly": True},
            {"name": "work", "mountPath": WORK_PATH},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (the only other writable place)
        ],
    }
    return {
        **_placement(theirs),
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [
            {"name": "config", "projected": {"defaultMode": 0o440, "sources": _sources(config, source)}},
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }


def _sources(config: RunConfig, source: str) -> list[Manifest]:
    """Config, credentials and authority as one volume: a mount inside a read-only mount cannot be made.

    Secret and authority are optional, so that a missing one is preflight's to name; a pod that cannot mount it would
    only hang.
    """
    storage, found = config.storage, [_file_of(source, "config.json", CONFIG_PATH)]
    if storage.credentials_secret is not None:
        items = [{"key": key, "path": f"credentials/{key}"} for key in CREDENTIALS]
        found.append({"secret": {"name": storage.credentials_secret, "optional": True, "items": items}})
    if storage.ca_config_map is not None:
        found.append(_file_of(storage.ca_config_map, "ca.crt", CA_PATH, optional=True))
    return found


def _file_of(config_map: str, key: str, path: str, **more: bool) -> Manifest:
    items = [{"key": key, "path": path.removeprefix(f"{MOUNT}/")}]
    return {"configMap": {"name": config_map, **more, "items": items}}


def _environment(config: RunConfig, theirs: PodSpec, *, job: str, gpus: int) -> list[Manifest]:
    named = theirs.env or []
    # Images of CUDA ask NVIDIA's runtime for all GPUs of the node; a profile may say what it shall do instead.
    none = not any(variable.name == NVIDIA_DEVICES for variable in named) and not gpus
    return [
        *({"name": variable.name, "value": _literal(variable.value)} for variable in named),
        *([{"name": NVIDIA_DEVICES, "value": "void"}] if none else []),
        {"name": "HOME", "value": "/tmp"},  # noqa: S108
        {"name": "FINETUNE_OWNER", "value": job},
        {"name": "FINETUNE_POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {"name": "FINETUNE_NODES", "value": str(config.pods.nodes)},
    ]


def _literal(value: str) -> str:
    """The kubelet would put other variables in place of $(NAME), after the profile has judged the value."""
    return value.replace("$", "$$")


def _placement(theirs: PodSpec) -> Manifest:
    chosen: dict[str, Any] = {
        "nodeSelector": theirs.node_selector,
        "tolerations": _documents(theirs.tolerations),
        "runtimeClassName": theirs.runtime_class_name,
        "priorityClassName": theirs.priority_class_name,
        "serviceAccountName": theirs.service_account_name,
        "imagePullSecrets": _documents(theirs.image_pull_secrets),
    }
    return {name: value for name, value in chosen.items() if value}


def _together(theirs: PodSpec, *, job: str) -> Manifest:
    """Nodes with one value of a label for all pods of a Job; those of an earlier attempt do not count."""
    if theirs.topology_key is None:
        return {}
    selector = {"matchLabels": {"batch.kubernetes.io/job-name": job}}
    term = {"topologyKey": theirs.topology_key, "labelSelector": selector}
    return {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}


def _documents(models: Sequence[Any] | None) -> list[Manifest]:
    return [model.document() for model in models or []]
