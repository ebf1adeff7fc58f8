"""Pure: what a profile keeps a job from. The operator asks before it pins a run, so what runs already goes on.

A name that the job gives must match a pattern as a whole. What the profile itself names is allowed.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune_api.base import at
from finetune_api.contract import PodsConfig
from finetune_api.job import FineTuneJobSpec
from finetune_api.pods import EnvVar, PodMetadata, PodSpec, PodTemplate, PullSecret
from finetune_api.profile import Allowed, FineTuneProfileSpec, Limits
from finetune_api.scalars import amount, seconds

DIVERTING = {"HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
"""Environment variables with the address of a server, in capitals; libraries read proxies in small letters, too."""
RESERVED = {
    "decides whose credentials are used and where they are sent": ("AWS_*",),
    "decides which servers are trusted": ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
    "decides which devices a pod gets": ("NVIDIA_*", "ASCEND_*", "*_VISIBLE_DEVICES"),
    "decides which code runs": (
        *("LD_*", "PYTHON*", "PATH", "BASH_ENV", "BROWSER", "CC", "CXX", "GCONV_PATH", "GLIBC_TUNABLES"),
        *("OPENSSL_CONF", "OPENSSL_ENGINES", "OPENSSL_MODULES", "OMP_TOOL_LIBRARIES", "CUDA_INJECTION64_PATH"),
        *("NCCL_CONF_FILE", "NCCL_*PLUGIN", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_*_PATH"),
    ),
}
"""Patterns of environment variables that only a profile may set, by the reason. Code may lie in a shared cache."""
HARMLESS = {
    *("AWS_REGION", "AWS_DEFAULT_REGION", "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONUNBUFFERED"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE"),
}
"""The devices among them are some of those that the pod has."""
_DNS = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
KEY = re.compile(rf"(?:(?=[^/]{{1,253}}/){_DNS}(?:\.{_DNS})*/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
"""What Kubernetes takes as the name of a label or an annotation. No schema can say it of the keys of a map."""


@dataclass(frozen=True)
class Refusal:
    """One thing the profile does not allow: the field, what was found, what is allowed."""

    reason: str
    message: str


def refusals(
    spec: FineTuneJobSpec, profile: FineTuneProfileSpec, *, namespace: str | None, pods: PodsConfig
) -> list[Refusal]:
    """All that stands against a job; `pods` is what it would get."""
    allowed = profile.allowed or Allowed()
    return [
        *_names("NamespaceNotAllowed", "metadata.namespace", namespace, allowed.namespaces, own=()),
        *_missing(spec, profile),
        *_above(spec, profile.limits or Limits(), pods),
        *_named(spec, profile, allowed),
        *_diverted(spec, profile),
        *_reserved(spec, profile),
        *_misnamed(spec),
    ]


def _missing(spec: FineTuneJobSpec, profile: FineTuneProfileSpec) -> Iterator[Refusal]:
    for path in profile.required or []:
        if at(spec, path) in (None, {}):
            yield Refusal("FieldRequired", f"spec.{path}: is missing; the profile requires it: set it")


def _above(spec: FineTuneJobSpec, limits: Limits, pods: PodsConfig) -> Iterator[Refusal]:
    if limits.nodes is not None and pods.nodes > limits.nodes:
        yield _limited("resources.nodes", str(pods.nodes), "nodes", str(limits.nodes))
    if limits.gpus is not None and pods.nodes * pods.gpus > limits.gpus:
        yield _limited("resources", f"{pods.nodes} x {pods.gpus} GPUs", "gpus", str(limits.gpus))
    for name, found, most in (("cpu", pods.cpu, limits.cpu), ("memory", pods.memory, limits.memory)):
        # What was pinned before an amount had to be more than 0 may be 0: that is no limit.
        if most is not None and not 0 < amount(found) <= amount(most):
            yield _limited(f"resources.perNode.{name}", found, name, most)
    if spec.deadline and limits.deadline and seconds(spec.deadline) > seconds(limits.deadline):
        yield _limited("deadline", spec.deadline, "deadline", limits.deadline)
    if spec.budget and limits.gpu_hours is not None and spec.budget.gpu_hours > limits.gpu_hours:
        yield _limited("budget.gpuHours", f"{spec.budget.gpu_hours:g}", "gpuHours", f"{limits.gpu_hours:g}")


def _limited(path: str, found: str, name: str, most: str) -> Refusal:
    return Refusal("LimitExceeded", f"spec.{path}: {found} is more than the profile allows; limits.{name}: {most}")


def _named(spec: FineTuneJobSpec, profile: FineTuneProfileSpec, allowed: Allowed) -> Iterator[Refusal]:
    """Of what the job itself names; what the profile brings is its own affair."""
    ours, theirs = _pod(spec.pod_template), _pod(profile.pod_template)
    secrets = [at(profile, "storage.credentialsSecret"), *(pull.name for pull in _pulls(theirs))]
    accounts, classes = allowed.service_accounts, allowed.runtime_classes
    pod = "spec.podTemplate.spec"
    yield from _names(
        "SecretNotAllowed",
        "spec.storage.credentialsSecret",
        at(spec, "storage.credentialsSecret"),
        allowed.secrets,
        own=secrets,
    )
    for index, pull in enumerate(_pulls(ours)):
        where = f"{pod}.imagePullSecrets[{index}].name"
        yield from _names("SecretNotAllowed", where, pull.name, allowed.secrets, own=secrets)
    authority = "storage.caConfigMap"
    yield from _names(
        "ConfigMapNotAllowed",
        f"spec.{authority}",
        at(spec, authority),
        allowed.config_maps,
        own=[at(profile, authority)],
    )
    yield from _names(
        "ServiceAccountNotAllowed",
        f"{pod}.serviceAccountName",
        ours.service_account_name,
        accounts,
        own=[theirs.service_account_name],
    )
    yield from _names(
        "RuntimeClassNotAllowed",
        f"{pod}.runtimeClassName",
        ours.runtime_class_name,
        classes,
        own=[theirs.runtime_class_name],
    )


def _diverted(spec: FineTuneJobSpec, profile: FineTuneProfileSpec) -> Iterator[Refusal]:
    """Variables that send requests, and the tokens in them, somewhere else are endpoints like storage.endpoint."""
    patterns = profile.allowed_endpoints or []
    for index, variable, own in _variables(spec, profile):
        if variable.name.upper() not in DIVERTING:
            continue
        if not any(endpoint_matches(variable.value, pattern) for pattern in patterns):
            # Neither value is told: they may hold passwords, and whatever else.
            listed = ", ".join([*(["the profile's own"] if own is not None else []), *patterns]) or "none"
            yield Refusal(
                "EndpointNotAllowed",
                f"spec.podTemplate.spec.env[{index}]: {variable.name} names a server that the profile does not allow; "
                f"allowed: {listed}",
            )


def _reserved(spec: FineTuneJobSpec, profile: FineTuneProfileSpec) -> Iterator[Refusal]:
    """The pods may have credentials that who wrote the job may not read: the profile's Secret, a workload identity."""
    for index, variable, _ in _variables(spec, profile):
        if variable.name in HARMLESS:
            continue
        for why, patterns in RESERVED.items():
            if any(fnmatch.fnmatchcase(variable.name, pattern) for pattern in patterns):
                yield Refusal(
                    "VariableNotAllowed",
                    f"spec.podTemplate.spec.env[{index}]: {variable.name} {why}, so only a profile's podTemplate may "
                    "set it: remove it from the job",
                )


def _misnamed(spec: FineTuneJobSpec) -> Iterator[Refusal]:
    """Pods with such a name could never be created."""
    pod = spec.pod_template or PodTemplate()
    metadata, chosen = pod.metadata or PodMetadata(), _pod(pod)
    found = [
        *(("metadata.labels", key) for key in metadata.labels or {}),
        *(("metadata.annotations", key) for key in metadata.annotations or {}),
        *(("spec.nodeSelector", key) for key in chosen.node_selector or {}),
        *((f"spec.tolerations[{index}].key", one.key or "") for index, one in enumerate(chosen.tolerations or [])),
    ]
    for path, key in found:
        # Of annotations alone Kubernetes looks at the small letters.
        looked_at = key.lower() if path == "metadata.annotations" else key
        if not KEY.fullmatch(looked_at) and not (key == "" and path.startswith("spec.tolerations")):
            yield Refusal(
                "NameInvalid",
                f"spec.podTemplate.{path}: {key!r} is not what Kubernetes takes as a name, such as team or "
                "example.org/team: correct it",
            )


def _variables(spec: FineTuneJobSpec, profile: FineTuneProfileSpec) -> Iterator[tuple[int, EnvVar, str | None]]:
    """Those of the job that the profile does not set to the same, by their index; and what the profile sets."""
    theirs = {variable.name: variable.value for variable in _pod(profile.pod_template).env or []}
    for index, variable in enumerate(_pod(spec.pod_template).env or []):
        own = theirs.get(variable.name)
        if variable.value != own:
            yield index, variable, own


def _pod(template: PodTemplate | None) -> PodSpec:
    return (template and template.spec) or PodSpec()


def _pulls(pod: PodSpec) -> list[PullSecret]:
    return pod.image_pull_secrets or []


def _names(
    reason: str, path: str, name: str | None, patterns: Sequence[str] | None, *, own: Sequence[str | None]
) -> Iterator[Refusal]:
    if name is None or patterns is None or name in own:
        return
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
        listed = ", ".join(dict.fromkeys([*filter(None, own), *patterns])) or "none"
        yield Refusal(reason, f"{path}: {name} is not allowed by the profile; allowed: {listed}")


def shown(endpoint: str) -> str:
    """Scheme and host, on one line: what stands around the host may be a password or a signature."""
    scheme, _, rest = endpoint.partition("://")
    host = re.split(r"[/?#]", rest.rpartition("@")[2])[0]
    return repr(f"{scheme}://{host}")[1:-1]


def endpoint_matches(endpoint: str, pattern: str) -> bool:
    """Scheme, host and port must match as a whole; * never crosses a slash. What could move the end of the host's name,
    user information, a query, a fragment, or what another program reads as a slash, is never allowed."""
    if not endpoint.isascii() or not endpoint.isprintable() or any(sign in endpoint for sign in "@?#\\$% "):
        return False
    parts, wanted = endpoint.rstrip("/").split("/"), pattern.rstrip("/").split("/")
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(a, b) for a, b in zip(parts, wanted, strict=True))
