"""Why do an attempt's pods not run yet, and does somebody have to mend something?"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_operator.policies.endings import disruption
from finetune_operator.policies.ways import NOT_STARTED
from finetune_operator.verdict import Observed, Verdict
from finetune_operator.views import Child, Pod

NORMAL = ("", "ContainerCreating", "PodInitializing")
PULLING = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "SignatureValidationFailed")
"""The kubelet goes back and forth between these words for one and the same trouble."""
BACK_OFF = re.compile(rf'^Back-off pulling image "[^"]*": (?:(?:{"|".join(PULLING)}): )?')
"""What it puts before the registry's words meanwhile."""


SANDBOX = re.compile(r'"?\b[0-9a-f]{64}\b"?')
"""A number that is made up for each try would be a change of the status each time."""


@dataclass(frozen=True)
class Cause:
    """One thing that pods wait for. docs/failures.md is generated from these."""

    reason: str
    happened: str
    remedy: str
    stalled: bool
    """Nothing moves until somebody mends something."""


SUSPENDED = Cause("JobSuspended", "the Job is suspended, by a queue or by hand", "resume it", stalled=False)
QUEUED = Cause(
    "WaitingForQueue", "Kueue has not admitted the Job yet, or has taken its place away", "nothing", stalled=False
)
INADMISSIBLE = Cause(
    "Inadmissible",
    "Kueue cannot admit the Job: no such queue, or one that is stopped; a Workload that was deactivated or has failed, "
    "or none at all",
    "what the message names; if the Workload has failed, delete the Job, and it is made anew",
    stalled=True,
)
KUEUE_MISSING = Cause(
    "KueueNotInstalled", "a queue is named, and the cluster has no Kueue", "install it, or name no queue", stalled=True
)
ANOTHER_GROUP = Cause(
    "AnotherGroupStarts",
    "another job of the namespace and profile, on several nodes like this one, is about to start, and has not all of "
    "its nodes yet",
    "nothing",
    stalled=False,
)
REFUSED = Cause("PodsRefused", "a quota, or an admission rule of the cluster", "what the message names", stalled=True)
FEWER = Cause(
    "FewerPodsWanted",
    "somebody has set the Job's `parallelism` to fewer pods than the attempt needs",
    "set it back, or delete the Job: the next one is made as it should be",
    stalled=True,
)
UNSCHEDULABLE = Cause(
    "Unschedulable", "no node has room, or fits", "nodes, or other `resources` or `podTemplate.spec`", stalled=False
)
PENDING = Cause("PodsPending", "the scheduler looks for a node", "nothing", stalled=False)
STARTING = Cause("PodsStarting", "the node pulls the image and starts the container", "nothing", stalled=False)
UNPREPARED = Cause(
    "FailedMount and others",
    "the node cannot prepare the pod, in the cluster's own word: a volume is attached to another node or cannot be "
    "mounted, or there is no network; told after half a minute",
    "what the message names; the node tries again by itself",
    stalled=True,
)
SECRET = Cause("SecretNotFound", "a Secret is missing", "create it", stalled=True)
CONFIG_MAP = Cause("ConfigMapNotFound", "a ConfigMap is missing", "create it", stalled=True)
IMAGE = Cause(
    "ImagePullBackOff",
    "the image cannot be pulled: no such tag, no permission, registry not reachable",
    "mend the registry or `imagePullSecrets`; the kubelet tries again by itself; for another image change "
    "the profile, and then the document, with an annotation in `podTemplate.metadata` for instance",
    stalled=True,
)
CONTAINER = Cause(
    "InvalidImageName and others",
    "the kubelet cannot start the container, in its own word",
    "what the message names",
    stalled=True,
)
NEVER_BEGAN = Cause(
    "UnexpectedAdmissionError and others",
    "a pod was refused, or taken away before the trainer began, in the cluster's own word; its Job has not ended yet",
    "nothing; what follows is below",
    stalled=False,
)
STOPPING = Cause(
    "Stopping",
    "a pod is taken away; a checkpoint is committed before the next attempt begins",
    "nothing",
    stalled=False,
)
SILENT = Cause(
    "NodeSilent",
    "the node does not answer, and may be lost; the trainer may go on",
    "nothing; what follows is below",
    stalled=False,
)
CAUSES = (
    QUEUED,
    INADMISSIBLE,
    KUEUE_MISSING,
    SUSPENDED,
    ANOTHER_GROUP,
    REFUSED,
    FEWER,
    UNSCHEDULABLE,
    PENDING,
    STARTING,
    UNPREPARED,
    SECRET,
    CONFIG_MAP,
    IMAGE,
    CONTAINER,
    NEVER_BEGAN,
    STOPPING,
    SILENT,
)
OVERDUE = timedelta(seconds=60)
"""How long Kueue may take to say something of a new Job. As a rule it takes a second."""
HELD = (QUEUED, INADMISSIBLE, SUSPENDED)
"""The Job itself is suspended: none of its pods is there."""
TOLD = (QUEUED.reason, INADMISSIBLE.reason)
"""Reasons whose words are asked for so seldom that each change of them is worth a write."""
ORDINARY = (PENDING.reason, STARTING.reason)
"""Reasons that pass within seconds, as a rule."""


@dataclass(frozen=True)
class Wait:
    """`placed` is False before a node was found."""

    cause: Cause
    reason: str
    message: str
    placed: bool

    @property
    def stalled(self) -> bool:
        return self.cause.stalled

    def verdict(self, *, again_after: float) -> Verdict:
        """Of a job of which nothing is there that could wait."""
        return Verdict("Pending", self.reason, self.message, stalled=self.stalled, again_after=again_after)


def wait_of(o: Observed, child: Child, *, nodes: int, now: datetime) -> Wait | None:
    """None when all pods of the attempt run or have run."""
    pods, refusal = pods_left(o, child), o.refusals.get(child.uid)
    if child.suspended and child.queue:
        return queue_of(o, child.queue) or _admission(o, child, now=now)
    if child.suspended:
        return _wait(SUSPENDED, _held(o, child), placed=False)
    if child.nodes < nodes and len(pods) < nodes:
        words = f"the parallelism of Job {child.name} was set to {child.nodes} instead of {nodes}; {FEWER.remedy}"
        return _wait(FEWER, words, placed=False)
    if refusal and len(pods) < nodes:
        return _wait(REFUSED, f"the cluster refuses the pods: {_without_pod(refusal, child)}", placed=False)
    for pod in pods:
        if pod.never_began and not pod.running:
            _, reason, befell = disruption(pod)
            message = f"a pod of Job {child.name} {befell}; the Job ends"
            return Wait(NEVER_BEGAN, reason, message, placed=pod.node is not None)
    for pod in pods:
        if pod.waiting is not None and pod.waiting[0] not in NORMAL:
            return _mend(pod.waiting[0], pod.waiting[1])
    for pod in pods:
        told = o.unprepared.get(pod.uid) if pod.being_prepared else None
        if told is not None:
            reason, words = told
            return Wait(UNPREPARED, reason, SANDBOX.sub("...", words) or UNPREPARED.happened, placed=True)
    for pod in pods:
        if pod.unschedulable and pod.node is None:
            return _wait(UNSCHEDULABLE, f"no node for pod {pod.name}: {pod.unschedulable}", placed=False)
    if any(pod.node is None for pod in pods) or len(pods) < nodes:
        return _wait(PENDING, "waiting for a node", placed=False)
    if any(not pod.running and pod.exit is None for pod in pods):
        return _wait(STARTING, STARTING.happened, placed=True)
    return None


def pods_left(o: Observed, child: Child) -> list[Pod]:
    """Its pods, but those that were deleted before they began without a word of the cluster: such a pod may be what a
    queue has left of a Job that has its place again, and goes on with another."""
    return [
        pod
        for pod in o.pods_of(child)
        if not (pod.never_began and pod.gone_by is not None and pod.disrupted == NOT_STARTED.reason)
    ]


def silence(pod: Pod) -> str:
    """Of a pod that is unreachable."""
    return f"node {pod.node} does not answer, and may be lost"


def _held(o: Observed, child: Child) -> str:
    """A Kueue that manages every Job suspends those that name no queue, too, and says in a Workload what it lacks."""
    found = o.admissions.get(child.uid)
    if found is None:
        return f"Job {child.name} is suspended by the cluster"
    said = f" ({found.words})" if found.words else ""
    return f"Kueue holds Job {child.name}, which names no queue{said}; name one as spec.queue or in the profile"


def queue_of(o: Observed, queue: str) -> Wait | None:
    """None where there is a Kueue to decide."""
    if o.kueue:
        return None
    return _wait(KUEUE_MISSING, f"queue {queue}: Kueue is not installed; {KUEUE_MISSING.remedy}", placed=False)


def answered(o: Observed, child: Child, *, now: datetime) -> bool:
    """Whether Kueue has said why a Job waits, or will hardly say it soon."""
    found = o.admissions.get(child.uid)
    return bool(found and found.words) or now - child.created > OVERDUE


def _admission(o: Observed, child: Child, *, now: datetime) -> Wait:
    found = o.admissions.get(child.uid)
    if found is not None:
        words = f"queue {child.queue}: {found.words or 'Kueue has not decided yet'}"
        return _wait(INADMISSIBLE if found.stuck else QUEUED, words, placed=False)
    if now - child.created <= OVERDUE:
        return _wait(QUEUED, f"queue {child.queue}: Kueue has not seen the Job yet", placed=False)
    words = "it is down, or does not manage the namespace, or a priority class that the job names does not exist"
    return _wait(
        INADMISSIBLE, f"queue {child.queue}: Kueue makes no Workload of Job {child.name}: {words}", placed=False
    )


def _wait(cause: Cause, message: str, *, placed: bool) -> Wait:
    return Wait(cause, cause.reason, message, placed=placed)


def _without_pod(words: str, child: Child) -> str:
    """Of the Job instead of the pod: a name that is made up for each try would be a change of the status each time."""
    return re.sub(rf'"{re.escape(child.name)}(?:-\d+)?-[a-z0-9]{{5}}"', f'"{child.name}"', words)


def _mend(reason: str, message: str) -> Wait:
    missing = re.search(r'(secret|configmap) "([^"]+)" not found', message)
    if missing:
        cause = {"secret": SECRET, "configmap": CONFIG_MAP}[missing[1]]
        return _wait(cause, f"{message}; create it, the pod then starts by itself", placed=True)
    words = BACK_OFF.sub("", message) or message or f"the container waits: {reason}"
    return _wait(IMAGE, words, placed=True) if reason in PULLING else Wait(CONTAINER, reason, words, placed=True)
