"""spec.suspend: nothing is begun, and what runs commits a checkpoint and ends. False again, preflight looks first."""

import re
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from finetune_api.contract import ExitCode
from finetune_operator.policies.accept import Refusal, Target
from finetune_operator.policies.attempt import POLL_STARTING, attempt, stopped
from finetune_operator.policies.endings import ending
from finetune_operator.policies.restarts import checkpoint_at, corrected, expected_step, forgotten
from finetune_operator.policies.ways import SUSPENDED
from finetune_operator.verdict import DeleteJob, Mark, Observed, Verdict, reason_of
from finetune_operator.views import Pod

SUSPENDING = "Suspending"
POD_OF_JOB = re.compile(r"(.+-t\d+)-\d+-[a-z0-9]{5}")
"""The name of a train Job's pod."""
ZOMBIE = timedelta(seconds=60)
"""How long after its deadline a pod that should have ended is still waited for."""


def suspend(o: Observed, target: Target | Refusal, *, now: datetime) -> Verdict:
    """What was over before stays so; all else ends, and what it has cost is told before its Job goes."""
    over = _over_before(o, now=now)
    if over is None and isinstance(target, Target):
        over = _just_over(o, target, now=now)
    if over is not None:
        return over
    trains = o.jobs("train")
    told = reason_of(o.subject.status) in (SUSPENDING, SUSPENDED.reason)
    verdict = _stopping(o, now=now)
    if o.subject.status.phase == "Failed":
        verdict = verdict.stating(**{**forgotten(o.subject.status), **verdict.facts})
    if trains and not told:
        return replace(verdict.stating(**stopped(o, trains[-1], reason=SUSPENDED.reason, now=now)), again_after=0.0)
    mine = (DeleteJob.of(job) for job in (*trains, *o.remaining("preflight")))
    return verdict.doing(*mine, *(unseen_job(pod) for pod in unasked(o, now=now)))


def _over_before(o: Observed, *, now: datetime) -> Verdict | None:
    """A document of which only live fields differ from the one that is done, whatever a profile would say of it by now.

    What was begun since has to go.
    """
    status = o.subject.status
    before = o.pinned.get(status.observed_generation)
    if before is None and status.phase == "Succeeded" and status.run is not None:  # one since could not be pinned
        before = o.pinned.get(status.run.generation)
    if status.phase not in ("Succeeded", "Failed") or before is None:
        return None
    if before.asked != o.subject.asked:
        return None
    marks = {c.type: Mark(c.status, c.reason, c.message) for c in status.conditions or [] if c.type in _KEPT}
    verdict = Verdict(status.phase, reason_of(status), status.message or "", marks=marks)
    nodes = {"train": before.config.pods.nodes, "preflight": 1}
    jobs = (*o.jobs("train"), *o.jobs("preflight"))
    going = [job for job in jobs if ending(job, o.pods_of(job), nodes=nodes[job.role], now=now) is None]
    return verdict.doing(*(DeleteJob.of(job) for job in going))


_KEPT = ("PreflightPassed", "Evaluated")


def _just_over(o: Observed, target: Target, *, now: datetime) -> Verdict | None:
    """An attempt that has ended for good before it was stopped."""
    job = next(reversed(o.jobs("train")), None)
    verdict = attempt(o, target, job, now=now) if job is not None and job.key == target.key else None
    return verdict if verdict is not None and verdict.final else None


def _stopping(o: Observed, *, now: datetime) -> Verdict:
    """Until all pods are gone, and then the end of it."""
    running = [pod for pod in o.pods if still_there(pod, now=now)]
    facts = last_words(o)
    if running or o.jobs("train"):
        message = "what runs commits a checkpoint and ends"
        return Verdict("Suspended", SUSPENDING, message, facts=facts, again_after=POLL_STARTING)
    message = f"suspended{_where(o.knowing(facts))}; set spec.suspend to false to go on"
    return Verdict("Suspended", SUSPENDED.reason, message, facts=facts)


def _where(o: Observed) -> str:
    """Nothing where no run is known: the status may have been wiped, and only storage knows what there is."""
    status = o.subject.status
    step = expected_step(status)
    if not step and status.run is None:
        return ""
    return f" at step {step}" if step else " before a checkpoint was committed"


def unasked(o: Observed, *, now: datetime) -> list[Pod]:
    """Pods of attempts that nobody has asked to go, and whose Jobs are not seen: without its label no Job is.

    Whoever makes a pod may say what he likes of whose it is: a Job that is named otherwise than ours is not deleted.
    """
    seen, mine = {child.uid for child in o.children}, f"-{o.subject.uid[:5]}-t"
    trains = [pod for pod in o.pods if pod.role == "train" and mine in pod.name and POD_OF_JOB.fullmatch(pod.name)]
    return [pod for pod in trains if pod.owner not in seen and pod.gone_by is None and still_there(pod, now=now)]


def unseen_job(pod: Pod) -> DeleteJob:
    """The Job of such a pod, if it is there at all."""
    found = POD_OF_JOB.fullmatch(pod.name)
    assert found is not None
    return DeleteJob(name=found[1], uid=pod.owner)


def still_there(pod: Pod, *, now: datetime) -> bool:
    """A pod that may still do something; one that a dead node never ends does not count."""
    return not pod.over and (pod.gone_by is None or now <= pod.gone_by + ZOMBIE)


def last_words(o: Observed) -> dict[str, Any]:
    """The status fields that are known better since pods of the run have said which step they have committed, or have
    ended in a way in which they can have committed no more."""
    status = o.subject.status
    if status.run is None:
        return {}
    attempts = (status.usage.attempts if status.usage else None) or 0
    said = [pod.exit.last for pod in o.pods if pod.exit is not None and pod.exit.last is not None]
    # What an earlier attempt has said is in the status already, and its pods may be remembered.
    newest = [last for last in said if last.attempt is None or last.attempt >= (status.run.attempt or 0)]
    steps = [last.step for last in newest if last.run_id == status.run.id and last.step is not None]
    if not steps:
        known = status.checkpoint.step if status.checkpoint else 0
        return corrected(status, resumed=known, attempt=attempts + 1) if _cut_off(o, status.run.id) else {}
    committed = checkpoint_at(status.checkpoint, max(steps))
    return {"checkpoint": committed, **corrected(status, resumed=max(steps), attempt=attempts + 1)}


def _cut_off(o: Observed, run: str) -> bool:
    """Whether all its pods are at an end, and none of them in order."""
    pods = [pod for pod in o.pods if pod.role == "train" and pod.run == run]
    in_order = (ExitCode.DONE, ExitCode.STOPPED)
    return bool(pods) and all(pod.over and (pod.exit is None or pod.exit.code not in in_order) for pod in pods)
