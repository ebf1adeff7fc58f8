"""Pods that train together start all or none, or two groups might each hold half of the nodes for ever.

With a queue that is Kueue's business. Without one only one group of a profile and namespace starts at a time, and one
that stays incomplete gives its nodes back for a while.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_operator.policies.accept import Target
from finetune_operator.policies.limits import spoken
from finetune_operator.policies.restarts import jitter
from finetune_operator.policies.waiting import ANOTHER_GROUP
from finetune_operator.policies.ways import GROUP_INCOMPLETE
from finetune_operator.verdict import Group, Observed, Verdict
from finetune_operator.views import Child, format_time, told_time

SHORTEST, LONGEST = 30.0, 600.0
"""Seconds that a group rests after it stayed incomplete: doubled each time, up or down by half at most."""
POLL = 5.0
EXACT = 4
"""From so many on those that are first are told roughly."""


def starts_together(target: Target) -> bool:
    """Several pods, and nobody else sees to it that they start at once."""
    return target.config.pods.nodes > 1 and target.config.pods.queue is None


def missing(o: Observed, target: Target, job: Child, *, now: datetime) -> str | None:
    """What to say of a group that has waited too long for nodes; None of one that has them, or may still wait.

    Pulling an image takes as long as it takes: a pod that has its node is there. A group that has trained has met:
    pods that are taken away from it then are another matter.
    """
    met = o.subject.status.phase in ("Training", "Evaluating") or (o.progress and o.progress.stage != "Loading")
    if met or job.ended is not None:
        return None
    nodes, patience = target.config.pods.nodes, target.config.limits.start_seconds
    placed = sum(pod.node is not None for pod in o.pods_of(job))
    held = job.suspended or bool(job.queue)
    if not starts_together(target) or held or placed >= nodes or now - job.released < timedelta(seconds=patience):
        return None
    return f"{placed} of {nodes} pods got a node within {spoken(patience)}; all give their nodes back for a while"


def turn(o: Observed, target: Target, *, now: datetime) -> Verdict | None:
    """Why this group does not start now; None when it may."""
    if not starts_together(target):
        return None
    due = _rested(o)
    if due is not None and now < due:
        message = f"the last group stayed incomplete and gave its nodes back; next try at {format_time(due)}"
        return Verdict("Queued", GROUP_INCOMPLETE.reason, message, again_after=(due - now).total_seconds())
    mine = (True, o.subject.created, o.subject.uid)
    before = [group for group in o.groups if (not group.starts, group.created, group.uid) < mine]
    if not before:
        return None
    message = f"{_first(before)}; groups of a namespace start one after the other"
    return Verdict("Queued", ANOTHER_GROUP.reason, message, again_after=POLL)


def _first(before: Sequence[Group]) -> str:
    """How many there are: exactly while they are few, else as far as the next power of two.

    When one of 500 leaves, a dozen of those that wait say something new, and not each of them.
    """
    number = len(before)
    if number == 1:
        return f"{before[0].name} needs several nodes, too, and is first"
    least = 2 ** (number.bit_length() - 1)
    told = str(number) if number < EXACT else f"{least} to {2 * least - 1}"
    return f"{told} others need several nodes, too, and are first"


def _rested(o: Observed) -> datetime | None:
    """Until when a group rests that stayed incomplete; None when the last attempt ended otherwise."""
    status = o.subject.status
    attempts = (status.usage.attempts if status.usage else None) or 0
    times = 0
    for restart in reversed(status.restarts or []):
        if restart.reason != GROUP_INCOMPLETE.reason or restart.attempt != attempts - times:
            break
        times += 1
    ended = told_time((status.restarts or [])[-1].at) if times and status.restarts else None
    if ended is None:
        return None
    seconds = min(SHORTEST * 2 ** (times - 1), LONGEST) * jitter(f"{o.subject.uid}/{attempts}")
    return ended + timedelta(seconds=seconds)
