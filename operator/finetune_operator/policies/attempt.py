"""A train Job of the run that is wanted: follow it, and when it has ended decide what comes next."""

from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api.contract import Progress
from finetune_api.job import Phase, Restart, RunStatus, Usage
from finetune_operator.policies.accept import Target
from finetune_operator.policies.endings import End, Kind, ending
from finetune_operator.policies.preflight import preflight
from finetune_operator.policies.restarts import (
    FREE_WITHOUT_PROGRESS,
    after,
    committed_step,
    crash_delay,
    environment_delay,
    fenced_delay,
    free_delay,
    in_vain,
    lost_delay,
    recorded,
    used,
)
from finetune_operator.policies.rivals import ahead, wait_for
from finetune_operator.policies.success import last_checkpoint, not_good_enough, succeeded
from finetune_operator.policies.waiting import wait_of
from finetune_operator.verdict import CreateTrain, DeleteJob, Mark, Observed, Verdict, mark_of
from finetune_operator.views import Child, format_time

POLL = 5.0
POLL_STARTING = 2.0
"""Seconds between two questions to a trainer."""
STAGES: dict[str, Phase] = {
    "Loading": "Starting",
    "Training": "Training",
    "Evaluating": "Evaluating",
    "Publishing": "Evaluating",
}


def attempt(o: Observed, target: Target, job: Child, *, now: datetime, superseded: bool = False) -> Verdict:
    """`superseded`: the document asks for another run meanwhile; this one goes on but never begins with preflight."""
    end = ending(job, o.pods_of(job), nodes=target.config.pods.nodes, now=now)
    if end is None:
        verdict = _going_on(o, target, job, superseded=superseded)
    else:
        verdict = _ended(o, target, job, end, now=now, superseded=superseded)
    known = mark_of(o.subject, "PreflightPassed")
    if superseded or "PreflightPassed" in verdict.marks or (known is not None and known.status == "True"):
        return verdict
    return verdict.marking(PreflightPassed=Mark("True", "Passed", "the run was allowed to begin"))


# --- while it runs ---


def _going_on(o: Observed, target: Target, job: Child, *, superseded: bool) -> Verdict:
    rival = ahead(o, job.run or "", holding=True)
    if rival is not None and not superseded:
        return wait_for(rival).doing(DeleteJob.of(job))
    facts = _run_facts(o, target, job, superseded=superseded)
    wait = wait_of(job, o.pods_of(job), nodes=target.config.pods.nodes, refusal=o.refusals.get(job.uid))
    if wait is not None:
        phase: Phase = "Starting" if wait.placed else "Queued"
        return Verdict(phase, wait.reason, wait.message, stalled=wait.stalled, facts=facts, again_after=POLL)
    if o.progress is None:
        return _silent(o, facts)
    return _progressing(o, o.progress, facts)


def _run_facts(o: Observed, target: Target, job: Child, *, superseded: bool) -> dict[str, object]:
    """The run as the Job's label names it: also after the status was wiped."""
    status = o.subject.status
    same = status.run is not None and status.run.id == job.run
    before = status.run if same and status.run is not None else RunStatus(id=job.run or "", generation=job.generation)
    generation = before.generation if superseded else target.config.generation
    usage = status.usage or Usage()
    usage = usage.model_copy(update={"attempts": max(usage.attempts or 0, job.ordinal)})
    return {"run": before.model_copy(update={"generation": generation}), "usage": usage}


def _silent(o: Observed, facts: dict[str, object]) -> Verdict:
    """The pods run but say nothing: keep what is known, its time stamp tells its age."""
    phase = o.subject.status.phase
    if phase in ("Training", "Evaluating"):
        return Verdict(phase, phase, o.subject.status.message or "running", facts=facts, again_after=POLL)
    return Verdict("Starting", "Loading", "the trainer starts", facts=facts, again_after=POLL_STARTING)


def _progressing(o: Observed, progress: Progress, facts: dict[str, object]) -> Verdict:
    phase = STAGES[progress.stage]
    status = o.subject.status
    run = facts["run"]
    assert isinstance(run, RunStatus)
    started = run.started_at or progress.started_at
    facts |= {
        "run": run.model_copy(update={"attempt": progress.attempt or run.attempt, "started_at": started}),
        "progress": progress.status(),
        "checkpoint": progress.checkpoint_status() or status.checkpoint,
        "restarts": _corrected(status.restarts, progress),
    }
    again = POLL if phase == "Training" else POLL_STARTING
    return Verdict(phase, progress.stage, _sentence(progress), facts=facts, again_after=again)


def _corrected(restarts: list[Restart] | None, progress: Progress) -> list[Restart] | None:
    """Where the run really went on is known only once the next attempt says so."""
    resumed = progress.resumed_from_step
    if not restarts or resumed is None or restarts[-1].resumed_from_step == resumed:
        return restarts
    last = restarts[-1]
    seen = (last.resumed_from_step or 0) + (last.lost_steps or 0)
    right = last.model_copy(update={"resumed_from_step": resumed, "lost_steps": max(0, seen - resumed)})
    return [*restarts[:-1], right]


def _sentence(progress: Progress) -> str:
    """For instance: step 410 of 1200, loss 0.31."""
    doing = {"Loading": "loading", "Evaluating": "evaluating", "Publishing": "publishing"}.get(progress.stage)
    if doing and not progress.total_steps:
        return doing
    steps = f"step {progress.step} of {progress.total_steps}"
    loss = f", loss {progress.loss:.4g}" if progress.loss is not None else ""
    eta = progress.estimated_completion_time
    rest = f", done at about {eta}" if eta and progress.stage == "Training" else ""
    return (f"{doing}, {steps}" if doing else steps) + loss + rest


# --- once it has ended ---


def _ended(o: Observed, target: Target, job: Child, end: End, *, now: datetime, superseded: bool) -> Verdict:
    gpus = target.config.pods.gpus * target.config.pods.nodes
    if end.kind in (Kind.DONE, Kind.FINAL) and end.last is not None and end.last.result is not None:
        if not superseded and _judged_by_other_gates(o, target, job):
            lost = replace(end, kind=Kind.LOST)  # the model is there: a preflight judges it again
            return _through_preflight(o, target, job, lost, now=now)
        return _done(o, target, job, end, now=now, superseded=superseded)
    facts = recorded(o, job, end, began=_began(o, job), gpus=gpus)
    if end.kind is Kind.FINAL:
        return Verdict("Failed", end.reason, end.message, facts=facts)
    if end.kind is Kind.CRASH:
        return _after_crash(o, target, job, end, now=now).stating(**facts)
    if end.kind is Kind.FREE:
        return _after_disruption(o, target, job, end, now=now).stating(**facts)
    if superseded:
        return Verdict("Failed", end.reason, end.message, facts=facts)
    looking = _through_preflight(o, target, job, end, now=now)
    return looking if end.kind is Kind.LOST else looking.stating(**facts)


def _done(o: Observed, target: Target, job: Child, end: End, *, now: datetime, superseded: bool) -> Verdict:
    assert end.last is not None
    assert end.last.result is not None
    result, status = end.last.result, o.subject.status
    if end.kind is Kind.DONE:
        verdict = succeeded(result, reason="Trained", now=now, metric=target.config.primary)
    else:
        verdict = not_good_enough(result, reason=end.reason, message=end.message, now=now)
    if superseded and status.model == result.model:
        return replace(verdict, facts={})  # told already
    facts = _run_facts(o, target, job, superseded=superseded)
    gpus = target.config.pods.gpus * target.config.pods.nodes
    attempts = max((status.usage or Usage()).attempts or 0, job.ordinal)
    usage = used(status, began=_began(o, job), ended=end.at, gpus=gpus).model_copy(update={"attempts": attempts})
    run = facts["run"]
    assert isinstance(run, RunStatus)
    run = run.model_copy(update={"attempt": end.last.attempt or run.attempt})
    return verdict.stating(run=run, usage=usage, checkpoint=last_checkpoint(status.checkpoint, result))


def _judged_by_other_gates(o: Observed, target: Target, job: Child) -> bool:
    """Gates and bounds may change while pods run: these have the ones of their own generation."""
    wanted, pinned = target.config.evaluation.judged, o.pinned.get(job.generation)
    return any(wanted) if pinned is None else pinned.config.evaluation.judged != wanted


def _began(o: Observed, job: Child) -> datetime:
    """When the first pod got its node, as far as that is known."""
    return min((pod.started for pod in o.pods_of(job) if pod.started is not None), default=job.created)


def _after_crash(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    allowed = target.config.max_retries
    if job.counters.failures + 1 > allowed:
        tried = f" (crash {job.counters.failures + 1}, {allowed} are forgiven)" if allowed else ""
        return Verdict("Failed", end.reason, f"{end.message}{tried}")
    return _next(o, target, job, end, now=now, delay=crash_delay(job.counters.failures))


def _after_disruption(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    committed = committed_step(o, end)
    vain = in_vain(o.subject.status, committed=committed)
    told = any(restart.attempt == job.ordinal for restart in o.subject.status.restarts or [])
    vain -= 1 if told and vain else 0
    if vain >= FREE_WITHOUT_PROGRESS - 1:
        message = f"interrupted {FREE_WITHOUT_PROGRESS} times without one more committed step, last: {end.message}"
        return Verdict("Failed", "NoProgress", message)
    return _next(o, target, job, end, now=now, delay=free_delay(vain))


def _next(o: Observed, target: Target, job: Child, end: End, *, now: datetime, delay: timedelta) -> Verdict:
    """Another Job for the same run; the old one goes only when the new one is there, so that nothing is forgotten."""
    due = end.at + delay
    where = f"going on from step {committed_step(o, end)}"
    if now < due:
        message = f"{end.message}; {where} at {format_time(due)}"
        return Verdict("Starting", end.reason, message, again_after=(due - now).total_seconds())
    ordinal = o.next_ordinal("train")
    action = CreateTrain(target.config, target.key, job.run or "", ordinal, after(job, end))
    return Verdict("Starting", end.reason, f"{end.message}; {where}", again_after=POLL).doing(action, DeleteJob.of(job))


def _through_preflight(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    """Storage knows more than we do: let a preflight Job look before anything is tried again."""
    delays = {Kind.FENCED: fenced_delay, Kind.ENVIRONMENT: environment_delay, Kind.LOST: lost_delay}
    due = end.at + delays[end.kind](job.counters.tries)
    unknown = Mark("Unknown", end.reason, end.message)
    if not o.jobs("preflight") and now < due:
        stalled = end.kind is Kind.ENVIRONMENT
        phase: Phase = "Pending" if stalled else "Preflight"
        message = f"{end.message}; next try at {format_time(due)}"
        verdict = Verdict(phase, end.reason, message, stalled=stalled, again_after=(due - now).total_seconds())
        return verdict.marking(PreflightPassed=unknown)
    looked = preflight(o, target, now=now, carried=after(job, end))
    return looked.doing(DeleteJob.of(job))
