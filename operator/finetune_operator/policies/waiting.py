"""Why do an attempt's pods not run yet, and does somebody have to mend something?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_operator.views import Child, Pod

NORMAL = ("", "ContainerCreating", "PodInitializing")
ORDINARY = ("PodsPending", "PodsStarting")
"""Reasons that pass within seconds, as a rule."""
PULLING = ("ErrImagePull", "ImagePullBackOff")


@dataclass(frozen=True)
class Wait:
    """`placed` is False before a node was found."""

    reason: str
    message: str
    placed: bool
    stalled: bool


def wait_of(child: Child, pods: Sequence[Pod], *, nodes: int, refusal: str | None) -> Wait | None:
    """None when all pods of the attempt run or have run."""
    if child.suspended:
        return Wait("JobSuspended", f"Job {child.name} is suspended by the cluster", placed=False, stalled=False)
    if refusal and len(pods) < nodes:
        return Wait("PodsRefused", f"the cluster refuses the pods: {refusal}", placed=False, stalled=True)
    for pod in pods:
        if pod.waiting is not None and pod.waiting[0] not in NORMAL:
            return _mend(pod.waiting[0], pod.waiting[1])
    for pod in pods:
        if pod.unschedulable and pod.node is None:
            return Wait(
                "Unschedulable", f"no node for pod {pod.name}: {pod.unschedulable}", placed=False, stalled=False
            )
    if any(pod.node is None for pod in pods) or len(pods) < nodes:
        return Wait("PodsPending", "waiting for a node", placed=False, stalled=False)
    if any(not pod.running and pod.exit is None for pod in pods):
        return Wait("PodsStarting", "the node pulls the image and starts the container", placed=True, stalled=False)
    return None


def _mend(reason: str, message: str) -> Wait:
    missing = re.search(r'(secret|configmap) "([^"]+)" not found', message)
    if missing:
        word = {"secret": "SecretNotFound", "configmap": "ConfigMapNotFound"}[missing[1]]
        return Wait(word, f"{message}; create it, the pod then starts by itself", placed=True, stalled=True)
    # The kubelet goes back and forth between the two words for one and the same trouble.
    word = "ImagePullBackOff" if reason in PULLING else reason
    return Wait(word, message or f"the container waits: {reason}", placed=True, stalled=True)
