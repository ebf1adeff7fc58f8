"""How did an attempt end? From the most specific code of all its pods, and from what became of their nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.contract import ExitCode, LastMessage
from finetune_operator.policies.ways import (
    CODES,
    CRASHED,
    DELETED,
    DISRUPTED,
    DISRUPTED_OTHERWISE,
    KILLED,
    MESSAGE_LOST,
    NODE_LOST,
    NOT_STARTED,
    OOM_KILLED,
    Kind,
    Way,
)
from finetune_operator.views import SIGKILLED, Child, Exit, Pod

STOPPED, HUNG = CODES[ExitCode.STOPPED], CODES[ExitCode.HUNG]
TELLING = [code for code, way in CODES.items() if way.kind not in (Kind.DONE, Kind.FREE) and way is not HUNG]
"""Codes that say the same whatever else has happened, the most telling first."""
OVERDUE = timedelta(seconds=30)
"""How long after the end of its grace period a pod is still waited for."""
VANISHED = {("ContainerStatusUnknown", SIGKILLED), ("Unknown", 255)}
"""What kubelet and containerd report of a container that they cannot find after the node started anew."""


@dataclass(frozen=True)
class End:
    way: Way
    reason: str
    message: str
    at: datetime
    last: LastMessage | None = None
    committed: int | None = None
    """The last committed step, as far as any pod said."""
    reached: int | None = None
    """The last step that was done."""
    began_at: int | None = None
    """The step that the attempt began with."""

    @property
    def kind(self) -> Kind:
        return self.way.kind


def ending(child: Child, pods: Sequence[Pod], *, nodes: int, now: datetime) -> End | None:
    """None while the attempt goes on. `pods` are those of `child`, by index."""
    if child.ended is not None and _unseen(child, pods):
        return None
    exits = [pod.exit for pod in pods if pod.exit is not None]
    if child.ended == "Complete" or (len(exits) == nodes and all(e.code == 0 for e in exits)):
        return _Look(child, pods, now).done()
    # A lone pod that ends by itself need not wait for the Job controller. One that was asked to go must: a Job that is
    # suspended deletes its pods, too, and makes new ones later.
    alone = [pod for pod in pods if pod.exit is not None and pod.exit.code != 0 and not pod.was_asked_to_go]
    failed = child.ended == "Failed" or (nodes == 1 and bool(alone) and not child.suspended)
    failed = failed or _stuck(child, pods, now=now)
    return _Look(child, pods, now).failed() if failed and not stopping(child, pods, now=now) else None


def _unseen(child: Child, pods: Sequence[Pod]) -> bool:
    """Whether the Job has ended by what its pods did, and they are still seen to run: news of them is on its way.

    Watches and lists of Jobs and pods are not of one moment. A pod that is asked to go, or whose node is lost, may be
    seen to run for ever.
    """
    running = [pod for pod in pods if pod.running and not (pod.was_asked_to_go or pod.unreachable or pod.disrupted)]
    # Of a pod that is gone nothing more is to be heard.
    telling = [pod for pod in pods if not pod.over or pod.exit is not None or pod.disrupted or pod.never_began]
    return bool(running) and (child.ended == "Complete" or len(running) == len(telling))


def _stuck(child: Child, pods: Sequence[Pod], *, now: datetime) -> bool:
    """Whether a Job waits for a pod that will hardly end: of any other the Job controller would say by now that it has
    failed. One that is suspended wants no pods.
    """
    going = [pod for pod in pods if pod.gone_by is not None and pod.exit is None and not pod.over]
    late = any(pod.unreachable or (pod.gone_by is not None and now > pod.gone_by + OVERDUE) for pod in going)
    return child.patient and not child.suspended and late


def stopping(child: Child, pods: Sequence[Pod], *, now: datetime) -> bool:
    """Whether pods that were asked to go are still committing a checkpoint: the next attempt's claim would fence it.

    The Job controller counts a pod as failed as soon as its deletion is asked for. Nothing is waited for where a node
    is lost, or where a pod ended otherwise than in order: its peers will never reach the end of a step.
    """
    broken = any(
        pod.unreachable or (pod.exit is not None and pod.exit.code not in (ExitCode.DONE, ExitCode.STOPPED))
        for pod in pods
    )
    return (
        child.role == "train"
        and not broken
        and any(pod.running and pod.was_asked_to_go and pod.gone_by is not None and now < pod.gone_by for pod in pods)
    )


@dataclass(frozen=True)
class _Look:
    child: Child
    pods: Sequence[Pod]
    now: datetime

    def done(self) -> End:
        found = self._result()
        if found is not None:
            return self._told(CODES[ExitCode.DONE], found)
        first = next((pod.exit for pod in self.pods if pod.index == 0 and pod.exit is not None), None)
        message = f"Job {self.child.name} is complete, but its last message is lost"
        return self._end(MESSAGE_LOST, message, first)

    def failed(self) -> End:
        found = self._result()
        if found is not None:  # what it says is committed, whatever became of other pods afterwards
            return self._told(CODES[ExitCode.DONE], found)
        failed = [(pod, pod.exit) for pod in self.pods if pod.exit is not None and pod.exit.code != 0]
        for code in TELLING:
            telling = next((e for _, e in failed if e.code == code), None)
            if telling is not None:
                return self._told(CODES[code], telling)
        lost = next((pod for pod in self.pods if pod.disrupted or _node_lost(pod)), None)
        own = [e for pod, e in failed if e.code != ExitCode.STOPPED and not pod.was_asked_to_go]
        if lost is None and own:  # otherwise peers that hang or crash only saw that one go
            return self._own(min(own, key=_cause))
        return self._taken(lost, next((e for _, e in failed if e.code == ExitCode.STOPPED), None))

    def _result(self) -> Exit | None:
        """The end of the first pod, if it says what was achieved."""
        for pod in self.pods:
            last = pod.exit.last if pod.exit is not None and pod.exit.code == 0 and pod.index == 0 else None
            if last is not None and (last.result is not None or last.preflight is not None):
                return pod.exit
        return None

    def _own(self, exit_: Exit) -> End:
        if exit_.code == ExitCode.HUNG:
            return self._told(HUNG, exit_)
        if exit_.reason == "OOMKilled":
            remedy = "raise spec.resources.perNode.memory" if self.child.role == "train" else "split the files of rows"
            message = f"a pod of Job {self.child.name} used more memory than its limit and was killed for it; {remedy}"
            return self._end(OOM_KILLED, message, exit_)
        return self._told(KILLED if exit_.code == SIGKILLED else CRASHED, exit_)

    def _taken(self, lost: Pod | None, stopped: Exit | None) -> End:
        """By the cluster: the trainer may have had the time to commit a checkpoint and say so."""
        way, reason, befell = disruption(lost)
        if stopped is not None and lost is None:
            return self._told(STOPPED, stopped)
        taken = f"a pod of Job {self.child.name} {befell}"
        if stopped is None:
            ended = next((pod.exit for pod in self.pods if pod.exit is not None and pod.exit.at is not None), None)
            return self._end(way, taken, ended, reason=reason)
        said = f"{self._told(STOPPED, stopped).message}: " if stopped.last is not None else ""
        return self._end(way, f"{said}{taken}", stopped, reason=reason)

    def _told(self, way: Way, exit_: Exit) -> End:
        """In the pod's own words where it left some."""
        if exit_.last is not None and exit_.last.code == exit_.code:
            # The trainer speaks in whole sentences; here they are joined with others.
            words = exit_.last.message.removesuffix(".")
            return self._end(way, words, exit_, reason=exit_.last.reason, last=exit_.last)
        words = f"{exit_.reason}, " if exit_.reason not in ("", "Error") else ""
        ended = f"a pod of Job {self.child.name} ended with exit code {exit_.code}"
        return self._end(way, f"{ended} ({words}no last message); see its log", exit_)

    def _end(
        self, way: Way, message: str, exit_: Exit | None, *, reason: str = "", last: LastMessage | None = None
    ) -> End:
        at = (exit_.at if exit_ else None) or self.child.ended_at or self.now
        said = [pod.exit.last for pod in self.pods if pod.exit is not None and pod.exit.last is not None]
        return End(
            way,
            reason or way.reason,
            message,
            at,
            last,
            committed=max((m.step for m in said if m.step is not None), default=None),
            reached=max((m.reached_step for m in said if m.reached_step is not None), default=None),
            began_at=next((m.resumed_from_step for m in said if m.resumed_from_step is not None), None),
        )


def _cause(exit_: Exit) -> int:
    """The order of the table: ranks that lose one that was killed crash for it, and may be seen to before."""
    return [exit_.code == ExitCode.HUNG, exit_.reason == "OOMKilled", exit_.code == SIGKILLED, True].index(True)


def _node_lost(pod: Pod) -> bool:
    gone = pod.exit is not None and (pod.exit.reason, pod.exit.code) in VANISHED
    return gone or (pod.unreachable and pod.exit is None)


def disruption(pod: Pod | None) -> tuple[Way, str, str]:
    """The way, the reason for the status, and what befell the pod, with the cluster's words."""
    if pod is None:
        return DELETED, DELETED.reason, "was deleted"
    if not pod.disrupted:
        return NODE_LOST, NODE_LOST.reason, f"was lost with its node {pod.node}"
    reason, words = pod.disrupted, f" ({pod.disrupted}: {pod.words})" if pod.words else f" ({pod.disrupted})"
    way = DISRUPTED.get(reason, NOT_STARTED if pod.never_began else DISRUPTED_OTHERWISE)
    if way is not NOT_STARTED:
        return way, reason, f"was taken away by the cluster{words}"
    return way, reason, "did not start" if reason == NOT_STARTED.reason else f"did not start{words}"
