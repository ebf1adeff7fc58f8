"""How did an attempt end? From the codes of all its pods, the most specific one."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from finetune_api.contract import ExitCode, LastMessage
from finetune_operator.views import Child, Exit, Pod


class Kind(Enum):
    DONE = "the work is done and its message is here"
    LOST = "the work may be done, but nobody says so: look into storage"
    FINAL = "wrong until the document or the data change"
    ENVIRONMENT = "something outside is missing: it may come"
    FENCED = "a newer attempt holds the run"
    CRASH = "counted against retries.max"
    FREE = "the cluster's doing: not counted"


@dataclass(frozen=True)
class End:
    kind: Kind
    reason: str
    message: str
    at: datetime
    last: LastMessage | None = None


KINDS = {
    ExitCode.INVALID: Kind.FINAL,
    ExitCode.GATE: Kind.FINAL,
    ExitCode.DAMAGED: Kind.CRASH,
    ExitCode.DIVERGED: Kind.FINAL,
    ExitCode.FENCED: Kind.FENCED,
    ExitCode.MEMORY: Kind.CRASH,
    ExitCode.STORAGE: Kind.ENVIRONMENT,
    ExitCode.HUNG: Kind.CRASH,
}
"""The codes that say something, the most telling first: a rank that only saw another die ends with a later one."""

WORDS = {
    ExitCode.INVALID: "InvalidConfiguration",
    ExitCode.GATE: "GateNotMet",
    ExitCode.DAMAGED: "StoredDataDamaged",
    ExitCode.DIVERGED: "Diverged",
    ExitCode.FENCED: "Fenced",
    ExitCode.MEMORY: "OutOfMemory",
    ExitCode.STORAGE: "StorageUnavailable",
    ExitCode.HUNG: "Hung",
    ExitCode.STOPPED: "Stopped",
}


def ending(child: Child, pods: Sequence[Pod], *, nodes: int, now: datetime) -> End | None:
    """None while the attempt goes on. `pods` are those of `child`, by index."""
    exits = [pod.exit for pod in pods if pod.exit is not None]
    if child.ended == "Complete" or (len(exits) == nodes and all(e.code == 0 for e in exits)):
        return _done(child, pods, now=now)
    failed = child.ended == "Failed" or (nodes == 1 and any(e.code != 0 for e in exits))
    return _failed(child, pods, now=now) if failed else None


def _done(child: Child, pods: Sequence[Pod], *, now: datetime) -> End:
    first = next((pod.exit for pod in pods if pod.index == 0 and pod.exit is not None), None)
    last = first.last if first else None
    at = (first.at if first else None) or child.ended_at or now
    if last is not None and (last.result is not None or last.preflight is not None):
        return End(Kind.DONE, last.reason, last.message, at, last)
    return End(Kind.LOST, "MessageLost", f"Job {child.name} is complete, but its last message is lost", at)


def _failed(child: Child, pods: Sequence[Pod], *, now: datetime) -> End:
    failed = [(pod, pod.exit) for pod in pods if pod.exit is not None and pod.exit.code != 0]
    for code, kind in KINDS.items():
        telling = next((e for _, e in failed if e.code == code), None)
        if telling is not None:
            return _end(kind, telling, WORDS[code], child=child, now=now)
    own = [e for pod, e in failed if not (pod.disrupted or pod.gone_by or e.code == ExitCode.STOPPED)]
    if own:
        return _crash(own[0], child=child, now=now)
    stopped = next((e for _, e in failed if e.code == ExitCode.STOPPED), None)
    why = next((pod.disrupted for pod in pods if pod.disrupted), "")
    if stopped is not None:
        return _end(Kind.FREE, stopped, why or WORDS[ExitCode.STOPPED], child=child, now=now)
    message = f"a pod of Job {child.name} was taken away by the cluster" + (f" ({why})" if why else "")
    at = next((e.at for _, e in failed if e.at), None) or child.ended_at or now
    return End(Kind.FREE, why or "PodDeleted", message, at)


def _crash(end: Exit, *, child: Child, now: datetime) -> End:
    word = "OutOfMemory" if end.reason == "OOMKilled" else {137: "Killed", 139: "Crashed"}.get(end.code, "Crashed")
    return _end(Kind.CRASH, end, word, child=child, now=now)


def _end(kind: Kind, end: Exit, word: str, *, child: Child, now: datetime) -> End:
    at = end.at or child.ended_at or now
    if end.last is not None and end.last.code == end.code:
        # The trainer speaks in whole sentences; here they are joined with others.
        return End(kind, end.last.reason, end.last.message.removesuffix("."), at, end.last)
    words = f"{end.reason}, " if end.reason not in ("", "Error") else ""
    message = f"a pod of Job {child.name} ended with exit code {end.code} ({words}no last message); see its log"
    return End(kind, word, message, at)
