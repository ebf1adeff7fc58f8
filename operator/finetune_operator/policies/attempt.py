"""A train Job of the run that is wanted: follow it, and when it has ended decide what comes next."""

from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api.contract import ExitCode, Progress
from finetune_api.status import Phase, RunStatus, Usage
from finetune_operator.policies import restarts
from finetune_operator.policies.accept import Target, target_of
from finetune_operator.policies.endings import End, ending, stopping
from finetune_operator.policies.groups import missing
from finetune_operator.policies.ledger import cost_of, placed, set_aside, so_far, with_attempt, with_cost
from finetune_operator.policies.limits import Limit, reached
from finetune_operator.policies.preflight import preflight, told
from finetune_operator.policies.restarts import (
    DELAYS,
    FREE_WITHOUT_PROGRESS,
    INTERRUPTED,
    after,
    checkpoint_at,
    committed_step,
    corrected,
    counted,
    crash_delay,
    due_at,
    free_delay,
    no_progress,
    recorded,
    rewound,
    run_of,
)
from finetune_operator.policies.rivals import ahead, wait_for
from finetune_operator.policies.success import last_checkpoint, not_good_enough, succeeded
from finetune_operator.policies.waiting import (
    HELD,
    NEVER_BEGAN,
    PENDING,
    SILENT,
    STARTING,
    STOPPING,
    answered,
    pods_left,
    silence,
    wait_of,
)
from finetune_operator.policies.ways import BUDGET_EXHAUSTED, BUDGET_RAISED, GATES_CHANGED, GROUP_INCOMPLETE, Kind, Way
from finetune_operator.verdict import (
    IDENTICAL,
    CreateTrain,
    DeleteJob,
    Mark,
    Observed,
    Verdict,
    condition,
    mark_of,
    reason_of,
)
from finetune_operator.verdict import STOPPING as STOPPING_PREVIOUS
from finetune_operator.views import Child, format_time, told_time

POLL = 5.0
POLL_STARTING = 2.0
"""Seconds between two questions to a trainer."""
BRIEF = timedelta(seconds=3)
BRIEFLY = {STARTING: BRIEF, NEVER_BEGAN: timedelta(seconds=30)}
"""How long after a pod got its node this is over, as a rule. Where the image is there, a container starts within a
second or two; of a pod that its node refuses the Job says soon that it has failed, where the cluster is not busy."""
QUESTIONS, QUESTIONS_STARTING = 8.0, 20.0
"""A second, to all trainers together: where many train, each is asked less often. More often than progress is written
at most; more often to those that start or end, as they are few at a time. Attempts that wait for pods are looked at as
often, all together, and keep no trainer from being asked."""
POLL_QUEUE = 60.0
"""Seconds between two questions why a queue lets a Job wait. That it waits no more is an event of the Job itself."""
BESIDE = "; generation "
"""What is said of the document as it is by now follows what is said of an attempt of the one before."""
STARTED = ("Queued", "Starting", "Training", "Evaluating")
"""Phases of a job that has a train Job."""
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
        verdict = _going_on(o, target, job, now=now, superseded=superseded)
    else:
        verdict = _ended(o, target, job, end, now=now, superseded=superseded)
    if o.subject.status.preflight is None and "preflight" not in verdict.facts and job.preflight is not None:
        verdict = verdict.stating(preflight=job.preflight)  # the status was wiped
    known = mark_of(o.subject, "PreflightPassed")
    if superseded or "PreflightPassed" in verdict.marks or (known is not None and known.status == "True"):
        return verdict
    return verdict.marking(PreflightPassed=Mark("True", "Passed", "the run was allowed to begin"))


# --- while it runs ---


def _poll(o: Observed, *, training: bool = False) -> float:
    """Seconds until the next question."""
    return max(POLL, o.trainings / QUESTIONS) if training else max(POLL_STARTING, o.trainings / QUESTIONS_STARTING)


def _going_on(o: Observed, target: Target, job: Child, *, now: datetime, superseded: bool) -> Verdict:
    rival = ahead(o, job.run or "", holding=True)
    if rival is not None and not superseded:
        waits = wait_for(rival)
        if reason_of(o.subject.status) != IDENTICAL:  # what it cost is told before it goes
            return replace(waits.stating(**stopped(o, job, reason=IDENTICAL, now=now)), again_after=0.0)
        return waits.doing(DeleteJob.of(job))
    facts = _run_facts(o, target, job, superseded=superseded)
    usage = facts["usage"]
    assert isinstance(usage, Usage)
    aside = set_aside(o, target, job, usage, now=now)
    facts |= aside or {"usage": so_far(o, target, job, usage, now=now)}
    limit = _limit(o, target, job, now=now)
    if limit is not None:
        message = f"{limit.message}; the attempt commits a checkpoint and ends"
        return _stop(o, job, _going(o), limit.way, message, facts, now=now)
    incomplete = missing(o, target, job, now=now)
    if incomplete is not None:
        stop = _stop(o, job, "Queued", GROUP_INCOMPLETE, incomplete, facts, now=now)
        if superseded or not stop.actions:
            return stop
        # Only a preflight carries what was counted to the next attempt.
        return preflight(o, target, now=now, carried=job.counters).stating(**stop.facts).doing(*stop.actions)
    if (o.subject.status.usage or Usage()).counted == job.ordinal:
        # The document was changed back just now. What is paid for has to end, or nobody would count the rest.
        message = "the attempt before commits a checkpoint and ends"
        verdict = Verdict(_going(o), STOPPING_PREVIOUS, message, facts=facts, again_after=POLL_STARTING)
        return verdict.doing(DeleteJob.of(job))
    if stopping(job, o.pods_of(job), now=now) or _have_stopped(o, job):
        verdict = _running(o, job, facts)
        return replace(verdict, reason=STOPPING.reason, message=STOPPING.happened, again_after=POLL_STARTING)
    wait = wait_of(o, job, nodes=target.config.pods.nodes, now=now)
    if wait is not None and wait.cause is PENDING and _is_gone(o, job, nodes=target.config.pods.nodes):
        return _as_before(o, facts)
    if wait is not None:
        phase: Phase = "Starting" if wait.placed else "Queued"
        told = wait.cause in HELD and answered(o, job, now=now)
        again = POLL_QUEUE if told else max(POLL, o.underway / QUESTIONS_STARTING)
        said = Verdict(phase, wait.reason, wait.message, stalled=wait.stalled, facts=facts, again_after=again)
        return _brief(o, job, said, within=BRIEFLY[wait.cause], now=now) if wait.cause in BRIEFLY else said
    return _running(o, job, facts)


def _have_stopped(o: Observed, job: Child) -> bool:
    """Whether its pods were asked to go and have ended in order, and the Job does not say so yet."""
    codes = [pod.exit.code if pod.exit is not None and pod.was_asked_to_go else None for pod in o.pods_of(job)]
    return bool(codes) and not job.suspended and all(code in (ExitCode.DONE, ExitCode.STOPPED) for code in codes)


def _is_gone(o: Observed, job: Child, *, nodes: int) -> bool:
    """Whether it had all its pods, and one is gone: its Job makes no other, but does not say yet that it has failed."""
    status, pods = o.subject.status, pods_left(o, job)
    began = told_time(status.run.placed_at) if status.run is not None and status.run.id == job.run else None
    had_all = status.phase in ("Starting", "Training", "Evaluating") and began is not None and began >= job.released
    return had_all and len(pods) < nodes and all(pod.node is not None for pod in pods)


def _as_before(o: Observed, facts: dict[str, object]) -> Verdict:
    """Of a trainer that has said nothing yet, nothing else is said: its container may never have been started."""
    verdict, status = _silent(o, facts), o.subject.status
    reason, stalled = reason_of(status), condition(status, "Stalled")
    if reason not in (STOPPING.reason, SILENT.reason) and not (reason and status.phase == "Starting"):
        return verdict
    message = (status.message or "").partition(BESIDE)[0]
    return replace(verdict, reason=reason, message=message, stalled=stalled is not None and stalled.status == "True")


def _brief(o: Observed, job: Child, verdict: Verdict, *, within: timedelta, now: datetime) -> Verdict:
    """Told with what follows, or after a moment.

    That the trainer loads is told at once: from then on an attempt counts, and whoever deletes its Job again and again
    must not get another one at once each time.
    """
    if not all(pod.placed is not None and now - pod.placed < within for pod in o.pods_of(job)):
        return verdict
    return replace(verdict, brief=True, again_after=BRIEF.total_seconds())


def _limit(o: Observed, target: Target, job: Child, *, now: datetime) -> Limit | None:
    """One that ends the attempt. What is left to do after training is done, whatever it costs, unless it is to fail."""
    run, progress = o.subject.status.run, o.progress
    if run is None or run.id != job.run:  # nothing is known yet of what was used before
        return None
    limit = reached(o, target, cost_of(o, target, job, None, now=now))
    if limit is None or limit.way is not BUDGET_EXHAUSTED or not target.config.limits.stop_at_best:
        return limit
    stage = STAGES[progress.stage] if progress is not None else o.subject.status.phase
    return None if job.counters.finish or stage == "Evaluating" else limit


def _stop(
    o: Observed, job: Child, phase: Phase, way: Way, message: str, facts: dict[str, object], *, now: datetime
) -> Verdict:
    """What it has cost is told before its Job goes."""
    cost = stopped(o, job, reason=way.reason, now=now)
    verdict = Verdict(phase, way.reason, message, facts={**facts, **cost}, again_after=0.0)
    return verdict if cost else replace(verdict, again_after=POLL_STARTING).doing(DeleteJob.of(job))


def _going(o: Observed) -> Phase:
    """Of an attempt that is stopped."""
    phase = o.subject.status.phase
    return phase if phase in STARTED else "Starting"


def _running(o: Observed, job: Child, facts: dict[str, object]) -> Verdict:
    verdict = _silent(o, facts) if o.progress is None else _progressing(o, job, o.progress, facts)
    lost = next((pod for pod in o.pods_of(job) if pod.unreachable), None)
    if lost is None:
        return verdict
    said = silence(lost)
    # Without news the verdict's words are those of the status, which may be these.
    return replace(verdict, reason=SILENT.reason, message=f"{said}; {verdict.message}" if o.progress else said)


def _run_facts(o: Observed, target: Target, job: Child, *, superseded: bool) -> dict[str, object]:
    """The run as the Job's label names it: also after the status was wiped."""
    status = o.subject.status
    same = status.run is not None and status.run.id == job.run
    before = status.run if same and status.run is not None else run_of(job)
    if not superseded:
        before = counted(before, replace(job.counters, halve=False)).model_copy(
            update={"generation": target.config.generation, "inputs": job.inputs}
        )
    run = placed(o, job, before)
    return {"run": run, "usage": with_attempt(status.usage, job.ordinal)}


def _silent(o: Observed, facts: dict[str, object]) -> Verdict:
    """The pods run but say nothing: keep what is known, its time stamp tells its age.

    That it trains, only a trainer can have said: it is known since when. Else somebody has written into the status.
    """
    phase, run = o.subject.status.phase, facts["run"]
    assert isinstance(run, RunStatus)
    if phase in ("Training", "Evaluating") and run.started_at is not None:
        said = (o.subject.status.message or "running").partition(BESIDE)[0]
        return Verdict(phase, phase, said, facts=facts, again_after=_poll(o, training=True))
    return Verdict("Starting", "Loading", "the trainer starts", facts=facts, again_after=_poll(o))


def _progressing(o: Observed, job: Child, progress: Progress, facts: dict[str, object]) -> Verdict:
    phase = STAGES[progress.stage]
    status = o.subject.status
    run = facts["run"]
    assert isinstance(run, RunStatus)
    started = run.started_at or progress.started_at
    resumed = _resumed(progress)
    seen = status.checkpoint if resumed is None else checkpoint_at(status.checkpoint, resumed)
    facts |= {
        "run": run.model_copy(update={"attempt": progress.attempt or run.attempt, "started_at": started}),
        "progress": progress.status(),
        "checkpoint": progress.checkpoint_status() or seen,
    }
    if resumed is not None:
        known = status.model_copy(update={"usage": facts["usage"], "run": facts["run"]})
        facts |= corrected(known, resumed=resumed, attempt=job.ordinal)
    again = _poll(o, training=phase == "Training")
    return Verdict(phase, progress.stage, _sentence(progress), facts=facts, again_after=again)


def _resumed(progress: Progress) -> int | None:
    """The step that the attempt began with, once it trains: none said means from the beginning."""
    return (progress.resumed_from_step or 0) if progress.stage == "Training" else progress.resumed_from_step


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
    o = _knowing_where_it_began(o, job, end)
    if end.kind in (Kind.DONE, Kind.FINAL) and end.last is not None and end.last.result is not None:
        way = None if superseded else _out_of_date(o, target, job, end, now=now)
        if way is None:
            return _done(o, target, job, end, now=now, superseded=superseded)
        # The model is there: a preflight judges it again, or finds from where to go on.
        end = End(way, way.reason, way.happened, end.at, committed=end.committed)
    facts = recorded(o, job, end, cost_of(o, target, job, end, now=now))
    run = facts.get("run") or o.subject.status.run
    interruptions = (run.interruptions if isinstance(run, RunStatus) else None) or 0
    o = o.knowing({"run": run})
    if end.kind is Kind.FINAL:
        verdict = Verdict("Failed", end.reason, end.message)
    elif end.kind in INTERRUPTED and interruptions >= FREE_WITHOUT_PROGRESS:
        verdict = no_progress(o, end.message)
    elif end.kind is Kind.CRASH:
        verdict = _after_crash(o, target, job, end, now=now, superseded=superseded)
    elif end.kind in (Kind.FREE, Kind.MEMORY):
        delay = free_delay(interruptions)
        verdict = _next(o, target, job, end, now=now, delay=delay, superseded=superseded)
    elif superseded:
        verdict = Verdict("Failed", end.reason, end.message)
    else:
        verdict = _through_preflight(o, target, job, end, now=now, interruptions=interruptions)
    if facts and verdict.actions:  # told before the Job goes, or an operator that dies in between forgets it
        return replace(verdict, facts=facts, actions=(), again_after=0.0)
    return replace(verdict, facts={**facts, **verdict.facts})


def _knowing_where_it_began(o: Observed, job: Child, end: End) -> Observed:
    """What the restart before it cost, from its last words: it may have ended before it was asked even once."""
    status, began = o.subject.status, end.began_at
    if began is None or status.run is None or status.run.id != job.run:
        return o
    facts = corrected(status, resumed=began, attempt=job.ordinal)
    if not facts:
        return o
    checkpoint = checkpoint_at(status.checkpoint, began)
    return o.knowing({**facts, "checkpoint": checkpoint, "progress": rewound(status.progress, began)})


def stopped(o: Observed, job: Child, *, reason: str, now: datetime) -> dict[str, object]:
    """The status fields that tell of an attempt which is stopped now, by us, unless it has ended by itself; empty when
    they do so already."""
    pinned, status = o.pinned.get(job.generation), o.subject.status
    if pinned is None:
        return {}
    target, same = target_of(pinned), status.run is not None and status.run.id == job.run
    end = ending(job, o.pods_of(job), nodes=target.config.pods.nodes, now=now)
    if end is not None:
        o = _knowing_where_it_began(o, job, end)
        if end.last is not None and end.last.result is not None and end.last.result.partial:
            end = End(BUDGET_RAISED, BUDGET_RAISED.reason, BUDGET_RAISED.happened, end.at, committed=end.committed)
        return recorded(o, job, end, cost_of(o, target, job, end, now=now)) if same else {}
    aside = set_aside(o, target, job, status.usage or Usage(), now=now)
    o = o.knowing(aside)
    cost = cost_of(o, target, job, end, now=now)
    run = o.subject.status.run
    if same and run is not None:  # its placement may not be in the status yet, nor may the last reading
        o = o.knowing({"run": placed(o, job, run)})
    if not same or o.progress is None:
        return {**aside, **restarts.stopped(o, job, cost, reason=reason, now=now)}
    known = _running(o, job, _run_facts(o, target, job, superseded=True)).facts
    facts = restarts.stopped(o.knowing(known), job, cost, reason=reason, now=now)
    return {**known, **facts} if facts else {}


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
    usage = with_attempt(with_cost(status, cost_of(o, target, job, end, now=now)), job.ordinal)
    run = facts["run"]
    assert isinstance(run, RunStatus)
    run = run.model_copy(update={"attempt": end.last.attempt or run.attempt})
    # It may have been told to end when it was done already.
    others = [restart for restart in status.restarts or [] if restart.attempt != job.ordinal] or None
    checkpoint = last_checkpoint(status.checkpoint, result)
    return verdict.stating(run=run, usage=usage, checkpoint=checkpoint, restarts=others)


def _out_of_date(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Way | None:
    """Why a result is not the one that the document asks for by now."""
    assert end.last is not None
    assert end.last.result is not None
    if end.last.result.partial and not _exhausted(o, target, job, end, now=now):
        return BUDGET_RAISED
    return GATES_CHANGED if _judged_by_other_gates(o, target, job) else None


def _exhausted(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> bool:
    limit = reached(o, target, cost_of(o, target, job, end, now=now))
    return limit is not None and limit.way is BUDGET_EXHAUSTED


def _judged_by_other_gates(o: Observed, target: Target, job: Child) -> bool:
    """Gates and bounds may change while pods run: these have the ones of their own generation."""
    wanted, pinned = target.config.evaluation.judged, o.pinned.get(job.generation)
    return any(wanted) if pinned is None else pinned.config.evaluation.judged != wanted


def _after_crash(o: Observed, target: Target, job: Child, end: End, *, now: datetime, superseded: bool) -> Verdict:
    allowed = target.config.max_retries
    if job.counters.failures + 1 > allowed:
        tried = f" (crash {job.counters.failures + 1}, {allowed} are forgiven)" if allowed else ""
        return Verdict("Failed", end.reason, f"{end.message}{tried}")
    delay = crash_delay(job.counters.failures)
    return _next(o, target, job, end, now=now, delay=delay, superseded=superseded)


def _next(
    o: Observed, target: Target, job: Child, end: End, *, now: datetime, delay: timedelta, superseded: bool
) -> Verdict:
    """Another Job for the same run; the old one goes only when the new one is there, so that nothing is forgotten."""
    due = due_at(o, job, end, delay, now=now)
    known = o.knowing({"checkpoint": checkpoint_at(o.subject.status.checkpoint, committed_step(o, end))})
    limit = reached(known, target, cost_of(o, target, job, end, now=now))
    if limit is not None and limit.unheard and end.committed is None and not superseded:
        return _through_preflight(o, target, job, end, now=now, interruptions=0)
    if limit is not None and not limit.publish:
        return limit.failed(known)
    where = f"going on from step {committed_step(o, end)}"
    if now < due:
        message = f"{end.message}; {where} at {format_time(due)}"
        verdict = Verdict("Starting", end.reason, message, again_after=(due - now).total_seconds())
        run = o.subject.status.run
        return verdict if run is None else verdict.stating(run=run.model_copy(update={"next_at": format_time(due)}))
    rival = ahead(o, job.run or "", holding=False)
    if rival is not None:  # it has taken over the run while this one rested
        waits = wait_for(rival)
        if superseded:
            return waits
        said = reason_of(o.subject.status) == IDENTICAL
        return waits.doing(DeleteJob.of(job)) if said else replace(waits, again_after=0.0)
    ordinal = o.next_ordinal("train")
    counters = replace(after(job, end), finish=limit is not None)
    action = CreateTrain(target.config, target.key, job.run or "", ordinal, counters, job.inputs)
    usage = with_attempt(o.subject.status.usage, ordinal)
    verdict = Verdict("Starting", end.reason, f"{end.message}; {where}", again_after=POLL, facts={"usage": usage})
    return verdict.doing(action, DeleteJob.of(job))


def _through_preflight(
    o: Observed, target: Target, job: Child, end: End, *, now: datetime, interruptions: int
) -> Verdict:
    """Storage knows more than we do: let a preflight Job look before anything is tried again."""
    times = interruptions if end.kind in INTERRUPTED else job.counters.tries
    due = due_at(o, job, end, DELAYS[end.kind](times) if end.kind in DELAYS else timedelta(0), now=now)
    if not o.jobs("preflight") and now < due:
        stalled = end.kind is Kind.ENVIRONMENT
        phase: Phase = "Pending" if stalled else "Preflight"
        message = f"{end.message}; next try at {format_time(due)}"
        verdict = Verdict(phase, end.reason, message, stalled=stalled, again_after=(due - now).total_seconds())
        return verdict.marking(PreflightPassed=Mark("Unknown", end.reason, message)).stating(
            preflight_job=told(o, after(job, end), due)
        )
    looked = preflight(o, target, now=now, carried=after(job, end))
    return looked.doing(DeleteJob.of(job))
