"""Every way an attempt can end, and which rule each falls under. docs/failures.md is generated from this table."""

from dataclasses import dataclass
from enum import Enum

from finetune_api.contract import ExitCode


class Kind(Enum):
    """What follows from an ending. restarts.py has the delays and bounds of each."""

    DONE = "done"
    ASKED = "asked for"
    FREE = "free"
    LOST = "looked up"
    MEMORY = "halved"
    CRASH = "counted"
    ENVIRONMENT = "waits"
    FENCED = "steps back"
    FINAL = "never"


@dataclass(frozen=True)
class Rule:
    """What a kind means for people."""

    train: str
    """Of a train pod."""
    preflight: str
    ends: str


_NO_PROGRESS = "10 in a row without one more committed step: `Failed`, `NoProgress`"
RULES = {
    Kind.FREE: Rule("the next attempt goes on from the last committed step; not counted", "again", _NO_PROGRESS),
    Kind.MEMORY: Rule(
        "the next attempt goes on from the last committed step, with half the micro-batch; not counted",
        "counted: there is no micro-batch to halve",
        _NO_PROGRESS,
    ),
    Kind.LOST: Rule("preflight asks storage what there is; not counted", "again", _NO_PROGRESS),
    Kind.ASKED: Rule("preflight, or the next attempt, at once; not counted", "the same", "never"),
    Kind.CRASH: Rule(
        "the next attempt goes on from the last committed step; counted",
        "again; counted together with the train pods'",
        "more than `retries.max`: `Failed` with the reason of the last one",
    ),
    Kind.ENVIRONMENT: Rule(
        "`Pending`, `Stalled`; preflight looks until what is missing is there; not counted", "the same", "never"
    ),
    Kind.FENCED: Rule("preflight looks whether the other one is done; not counted", "again", "never"),
    Kind.FINAL: Rule(
        "`Failed`, until the document or the annotation `finetune.dev/retry` changes", "the same", "at once"
    ),
    Kind.DONE: Rule("`Succeeded`", "the train pod begins, or `Succeeded`, `Reused`", "at once"),
}


@dataclass(frozen=True)
class Way:
    """One way of ending."""

    reason: str
    """What the status says, unless the pod's last message has a more exact word."""
    kind: Kind
    happened: str
    sign: str
    """How it is recognised."""
    remedy: str
    """What the user should do."""


NOTHING = "nothing"
_CODE = "exit code {0:d}"

CODES: dict[ExitCode, Way] = {
    ExitCode.INVALID: Way(
        "InvalidConfiguration",
        Kind.FINAL,
        "the document or the data are wrong",
        _CODE.format(ExitCode.INVALID),
        "mend what the message names: file, row, column or field",
    ),
    ExitCode.GATE: Way(
        "GateNotMet",
        Kind.FINAL,
        "the model is published and a gate of the evaluation is not met",
        _CODE.format(ExitCode.GATE),
        "look at `status.evaluation`; change the gate (no pod is started) or the training",
    ),
    ExitCode.DAMAGED: Way(
        "StoredDataDamaged",
        Kind.CRASH,
        "stored data does not match its digest, and no older copy is whole",
        _CODE.format(ExitCode.DAMAGED),
        "restore the object that the message names",
    ),
    ExitCode.DIVERGED: Way(
        "Diverged",
        Kind.FINAL,
        "the loss became NaN or infinite, and again after a second try from the last checkpoint",
        _CODE.format(ExitCode.DIVERGED),
        "lower `training.learningRate` or `training.maxGradNorm`, or train in fp32",
    ),
    ExitCode.FENCED: Way(
        "Fenced",
        Kind.FENCED,
        "a newer attempt holds the run in storage, of another FineTuneJob or another cluster",
        _CODE.format(ExitCode.FENCED),
        "nothing, or delete one of the two FineTuneJobs",
    ),
    ExitCode.MEMORY: Way(
        "OutOfMemory",
        Kind.MEMORY,
        "memory was used up and the trainer could say so: `GpuOutOfMemory` or `HostOutOfMemory`",
        _CODE.format(ExitCode.MEMORY),
        "nothing at first; else a larger GPU or `resources.perNode.memory`, or a lower `data.maxLength`",
    ),
    ExitCode.STORAGE: Way(
        "StorageUnavailable",
        Kind.ENVIRONMENT,
        "storage, credentials or scratch space are missing or do not answer",
        _CODE.format(ExitCode.STORAGE),
        "mend what the message names; the run goes on by itself",
    ),
    ExitCode.HUNG: Way(
        "Hung",
        Kind.CRASH,
        "no sign of life for many times the length of a step",
        f"{_CODE.format(ExitCode.HUNG)}, while no node of the run is lost",
        "look at the stacks in the pod's log",
    ),
    ExitCode.STOPPED: Way(
        "Stopped",
        Kind.FREE,
        "stopped on request after a committed checkpoint: a deleted or drained pod, as a rule",
        f"{_CODE.format(ExitCode.STOPPED)}, and no other pod of the attempt crashed by itself",
        NOTHING,
    ),
    ExitCode.DONE: Way(
        "Completed",
        Kind.DONE,
        "the model is published",
        f"{_CODE.format(ExitCode.DONE)} with a result in the last message of the first pod",
        NOTHING,
    ),
}
"""The most telling first: a rank that only saw another one die ends with a later one."""

OOM_KILLED = Way(
    "HostOutOfMemory",
    Kind.MEMORY,
    "the kernel killed the whole container for its memory limit, so that the trainer could say nothing",
    "the container's reason OOMKilled with another exit code than 50",
    "raise `resources.perNode.memory`; of a preflight pod: split the files of rows",
)
KILLED = Way(
    "Killed",
    Kind.CRASH,
    "a process was killed from outside",
    "exit code 137 without a message, of a pod that nobody deleted",
    "look at the node's log",
)
CRASHED = Way(
    "Crashed",
    Kind.CRASH,
    "an error of the trainer's own, or a container that could not start",
    "any other exit code, of a pod that was neither deleted nor disrupted, while no node of the run is lost",
    "look at the pod's log",
)
NODE_LOST = Way(
    "NodeLost",
    Kind.FREE,
    "a node died or started anew; other pods of the attempt may have crashed or hung for it",
    "a running pod that is not Ready without a reason; a container with ContainerStatusUnknown, or 255 Unknown",
    NOTHING,
)
NOT_STARTED = Way(
    "PodNotStarted",
    Kind.FREE,
    "the node refused the pod, or something injected into it failed, before the trainer began",
    "a Failed pod none of whose containers ended; the status says the kubelet's word, such as UnexpectedAdmissionError",
    "look at `kubectl describe pod` while it is there, and at the node's device plugin",
)
DELETED = Way(
    "PodDeleted",
    Kind.FREE,
    "a pod was deleted, by hand or with its node",
    "the Job is at FailureTarget and no pod of it says why",
    NOTHING,
)
DISRUPTED = {
    reason: Way(reason, Kind.FREE, happened, f"the pod's condition DisruptionTarget, reason {reason}", remedy)
    for reason, happened, remedy in (
        ("PreemptionByScheduler", "a pod of a higher priority took its place", "a higher `priorityClassName`"),
        ("EvictionByEvictionAPI", "its node was drained, or the pod evicted by another program", NOTHING),
        ("DeletionByTaintManager", "its node does not answer, or was tainted NoExecute", NOTHING),
        ("DeletionByPodGC", "its node is gone", NOTHING),
        (
            "TerminationByKubelet",
            "its node shuts down, or is short of memory or disk",
            "where the message names a limit of storage or memory: raise it",
        ),
    )
}
DISRUPTED_OTHERWISE = Way(
    "Disrupted",
    Kind.FREE,
    "the cluster took the pod away for another reason",
    "another reason of DisruptionTarget, or the kubelet's word for the pod, such as Evicted or Preempting",
    NOTHING,
)
MESSAGE_LOST = Way(
    "MessageLost",
    Kind.LOST,
    "the attempt ended well, but its last message is lost",
    "exit code 0, or a complete Job, without a result",
    NOTHING,
)
JOB_LOST = Way(
    "JobLost",
    Kind.LOST,
    "the train Job is gone: deleted by hand or by another program",
    "the status tells of an attempt and no Job is there",
    "leave the Jobs of a FineTuneJob alone; delete the FineTuneJob to stop it",
)
PREFLIGHT_LOST = Way(
    "PreflightJobLost",
    Kind.LOST,
    "the preflight Job is gone: deleted by hand or by another program",
    "the status tells of a preflight Job (`status.preflightJob`) and none is there",
    "look what deletes it (the API server's audit log says who), and leave the Jobs of a FineTuneJob alone",
)
GATES_CHANGED = Way(
    "GatesChanged",
    Kind.ASKED,
    "the attempt ended with a model, and its gates were changed meanwhile",
    "a result that was judged by other gates than the document's",
    NOTHING,
)
DOCUMENT_CHANGED = Way(
    "DocumentChanged",
    Kind.ASKED,
    "the document was changed, so that the attempt was stopped with a checkpoint",
    "a new generation that has passed preflight",
    NOTHING,
)
GROUP_INCOMPLETE = Way(
    "GroupIncomplete",
    Kind.ASKED,
    "not all pods of a run on several nodes got a node in time, so that all were given back",
    "a pod without a node after the profile's `startTimeout` (without a queue)",
    "nothing: it tries again, later each time; ask for fewer nodes, or add some",
)
SUSPENDED = Way(
    "Suspended",
    Kind.ASKED,
    "`spec.suspend` was set, so that the attempt was stopped with a checkpoint",
    "`spec.suspend: true` while an attempt goes on",
    "set `spec.suspend` to false: preflight looks, then the next attempt goes on from the checkpoint",
)
DEADLINE_EXCEEDED = Way(
    "DeadlineExceeded",
    Kind.FINAL,
    "the attempts ran as long as `spec.deadline` allows; a checkpoint is committed",
    "`status.usage.runningSeconds`, with the attempt that goes on",
    "raise `spec.deadline` to go on",
)
BUDGET_EXHAUSTED = Way(
    "BudgetExhausted",
    Kind.FINAL,
    "the attempts have used `spec.budget`; a checkpoint is committed. With `StopAtBest` the best one is published: "
    "`Succeeded`, `StoppedAtBest`",
    "`status.usage.gpuSeconds`, with the attempt that goes on",
    "raise `spec.budget.gpuHours` to go on",
)
BUDGET_RAISED = Way(
    "BudgetRaised",
    Kind.ASKED,
    "the best checkpoint of a run that was not done is published, and `spec.budget` was raised meanwhile",
    "a partial result, and a budget that is not used up",
    NOTHING,
)

OTHERS = (OOM_KILLED, KILLED, CRASHED, NODE_LOST, NOT_STARTED, DELETED, *DISRUPTED.values(), DISRUPTED_OTHERWISE)
LOOKED_UP = (
    MESSAGE_LOST,
    JOB_LOST,
    PREFLIGHT_LOST,
    GATES_CHANGED,
    DOCUMENT_CHANGED,
    GROUP_INCOMPLETE,
    SUSPENDED,
    BUDGET_RAISED,
)
LIMITS = (DEADLINE_EXCEEDED, BUDGET_EXHAUSTED)
WAYS = (*CODES.values(), *OTHERS, *LOOKED_UP, *LIMITS)
"""All of them: a Way that is not here fails a test."""
