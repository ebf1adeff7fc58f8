"""What does a pod without a GPU find out: may the run begin, go on, or is it done already?"""

import re
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api.contract import LastMessage, PreflightOutcome, TrainOutcome
from finetune_api.status import CheckpointStatus, FineTuneJobStatus, Phase, PreflightJobStatus, RunStatus
from finetune_operator.policies import restarts
from finetune_operator.policies.accept import Target
from finetune_operator.policies.endings import End, ending
from finetune_operator.policies.limits import reached
from finetune_operator.policies.restarts import (
    FREE_WITHOUT_PROGRESS,
    LONGEST,
    NO_PROGRESS,
    checkpoint_at,
    corrected,
    crash_delay,
    due_at,
    environment_delay,
    jitter,
    nothing_lost,
)
from finetune_operator.policies.success import last_checkpoint, not_good_enough, succeeded
from finetune_operator.policies.waiting import HELD, ORDINARY, SILENT, STARTING, Wait, queue_of, silence, wait_of
from finetune_operator.policies.ways import PREFLIGHT_LOST, Kind
from finetune_operator.verdict import (
    PASSED,
    CreatePreflight,
    DeleteJob,
    Mark,
    Observed,
    Verdict,
    condition,
    mark_of,
    reason_of,
)
from finetune_operator.views import Child, Counters, format_time, told_time

RUN_ID = re.compile(r"[0-9a-f]{16}")
LOOKING_AGAIN = "; looking again now"
NEXT_TRY = re.compile(rf"; next try at \S+$|{LOOKING_AGAIN}$")


def preflight(o: Observed, target: Target, *, now: datetime, carried: Counters | None = None) -> Verdict:
    """Run a preflight Job, wait for it, or act on what it said. Jobs of other documents are deleted."""
    jobs = o.jobs("preflight")
    mine = [job for job in jobs if job.key == target.key]
    if mine:
        newest = mine[-1]
        verdict = _look(o, target, newest, now=now)
        return verdict.doing(*(DeleteJob.of(job) for job in jobs if job is not newest))
    failed = _failed_before(o)
    if failed is not None:
        return failed
    verdict = _without(o, target, carried or restarts.carried(o, target), now=now)
    return verdict.doing(*(DeleteJob.of(job) for job in o.remaining("preflight")))


def _failed_before(o: Observed) -> Verdict | None:
    """A Job that is gone does not make a refused generation worth another look."""
    mark = mark_of(o.subject, "PreflightPassed")
    return _failure(mark.reason, mark.message) if mark is not None and mark.status == "False" else None


def _without(o: Observed, target: Target, carried: Counters, *, now: datetime) -> Verdict:
    """No Job is there: none was begun, somebody has deleted it, or the next one is not due.

    What its annotations counted stands in the status as well, or whoever deletes it would have another one at once.
    """
    last = o.subject.status.preflight_job
    if last is None or last.generation != o.subject.generation:
        return _begin(o, target, counters=carried)
    counters = Counters(last.failures or 0, last.tries or 0, last.interruptions or 0, halve=carried.halve)
    if last.next_at is None:
        return _deleted(o, target, counters, now=now)
    due = told_time(last.next_at)
    if due is None or not now < due <= now + LONGEST:
        return _begin(o, target, counters=counters)
    mark = mark_of(o.subject, "PreflightPassed") or Mark("Unknown", PREFLIGHT_LOST.reason, PREFLIGHT_LOST.happened)
    stalled = condition(o.subject.status, "Stalled")
    waits = stalled is not None and stalled.status == "True"
    return _resting(mark, stalled=waits, again_after=(due - now).total_seconds())


def _deleted(o: Observed, target: Target, before: Counters, *, now: datetime) -> Verdict:
    """Many that one program has deleted at one moment do not come back at one moment."""
    end = End(PREFLIGHT_LOST, PREFLIGHT_LOST.reason, PREFLIGHT_LOST.happened, now)
    given_up = _given_up(target, before, end)
    if given_up is not None:
        return given_up
    counters, delay = _next(before, end)
    due = now + min(delay * jitter(f"{o.subject.uid}/{counters.tries}"), LONGEST)
    said = f"{end.message} (interruption {counters.interruptions} of {FREE_WITHOUT_PROGRESS} in a row)"
    return _rest(o, replace(end, message=said), counters, due, now=now)


def _begin(o: Observed, target: Target, *, counters: Counters) -> Verdict:
    queue = target.config.pods.queue
    missing = queue_of(o, queue.name) if queue is not None and queue.preflight else None
    if missing is not None:
        unknown = Mark("Unknown", missing.reason, missing.message)
        return missing.verdict(again_after=30.0).marking(PreflightPassed=unknown)
    return _checking(o, counters).doing(_another(o, target, counters))


def _another(o: Observed, target: Target, counters: Counters) -> CreatePreflight:
    ordinal = o.next_ordinal("preflight")
    run = _begun(o, target)
    known = (run.id, run.inputs) if run is not None else (None, None)
    return CreatePreflight(target.config, target.key, ordinal, counters, o.attempts, *known)


def _begun(o: Observed, target: Target) -> RunStatus | None:
    """The run that was begun for this very document: it goes on with the rows it began with, whatever lies there now.

    Two documents are the same where they differ in nothing but when, for how long and how well; also where a profile or
    a newer operator makes other pods of them. Preflight believes none of it before it has seen the run's record.
    """
    run = o.subject.status.run
    before = o.pinned.get(run.generation) if run is not None else None
    if run is None or before is None or not RUN_ID.fullmatch(run.id):
        return None
    audited = before.config.data.audit == target.config.data.audit
    same = before.asked == o.subject.asked or (before.key == target.key and audited)
    return run if same else None


def _checking(o: Observed, counters: Counters) -> Verdict:
    missing = _still_missing(o, counters)
    if missing is not None:
        return _resting(missing, stalled=True, again_after=None).stating(preflight_job=told(o, counters))
    reason, message = "Checking", "checking storage, data and labels"
    verdict = Verdict("Preflight", reason, message).marking(PreflightPassed=Mark("Unknown", reason, message))
    return verdict.stating(preflight_job=told(o, counters))


def _still_missing(o: Observed, counters: Counters) -> Mark | None:
    """What the environment lacked the last time, as the status says: it does until somebody has looked.

    Or who waits for the job, or is told by its Events, would hear of work and of failure again with every try.
    """
    mark, status = mark_of(o.subject, "PreflightPassed"), o.subject.status
    waited = status.phase != "Preflight" and counters.tries > 0 and not counters.interruptions
    if mark is None or not waited or reason_of(status) != mark.reason:
        return None
    found = NEXT_TRY.search(mark.message)
    return replace(mark, message=mark.message[: found.start()] + LOOKING_AGAIN) if found else None


def told(o: Observed, counters: Counters, due: datetime | None = None) -> PreflightJobStatus:
    return PreflightJobStatus(
        generation=o.subject.generation,
        next_at=format_time(due) if due is not None else None,
        failures=counters.failures or None,
        tries=counters.tries or None,
        interruptions=counters.interruptions or None,
    )


def _look(o: Observed, target: Target, job: Child, *, now: datetime) -> Verdict:
    pods = o.pods_of(job)
    end = ending(job, pods, nodes=1, now=now)
    if end is not None:
        return _ended(o, target, job, end, now=now)
    wait = wait_of(o, job, nodes=1, now=now)
    lost = next((pod for pod in pods if pod.unreachable), None)
    if lost is not None:
        wait = Wait(SILENT, SILENT.reason, silence(lost), placed=True)
    if wait is None or wait.reason in ORDINARY:
        again = 5.0 if not pods else 30.0 if wait is not None and wait.cause is STARTING else None
        return replace(_checking(o, job.counters), again_after=again)
    phase: Phase = "Pending" if wait.stalled else "Queued" if wait.cause in HELD else "Preflight"
    unknown = Mark("Unknown", wait.reason, wait.message)
    verdict = Verdict(phase, wait.reason, wait.message, stalled=wait.stalled, again_after=30.0)
    return verdict.marking(PreflightPassed=unknown).stating(preflight_job=told(o, job.counters))


def _ended(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    outcome = end.last.preflight if end.last else None
    if end.kind is Kind.DONE and end.last is not None and outcome is not None:
        return _passed(o, target, job, end.last, outcome, now=now)
    if end.kind is Kind.FINAL and end.last is not None and end.last.result is not None and outcome is not None:
        return _not_good_enough(o, target, job, end.last, outcome, now=now)
    if end.kind is Kind.FINAL:
        return _failure(end.reason, end.message)
    return _given_up(target, job.counters, end) or _again(o, target, job, end, now=now)


def _given_up(target: Target, before: Counters, end: End) -> Verdict | None:
    if end.kind in (Kind.CRASH, Kind.MEMORY) and before.failures + 1 > target.config.max_retries:
        allowed = target.config.max_retries
        tried = f" (crash {before.failures + 1}, {allowed} are forgiven)" if allowed else ""
        return _failure(end.reason, f"preflight crashed: {end.message}{tried}")
    if end.kind in (Kind.FREE, Kind.LOST) and before.interruptions + 1 >= FREE_WITHOUT_PROGRESS:
        said = f"preflight was interrupted {FREE_WITHOUT_PROGRESS} times in a row, the last time: {end.message}"
        advice = PREFLIGHT_LOST.remedy if end.way is PREFLIGHT_LOST else "ask for nodes that stay"
        return _failure(NO_PROGRESS, f"{said}; {advice}; then change the annotation finetune.dev/retry")
    return None


def _next(before: Counters, end: End) -> tuple[Counters, timedelta]:
    """What the next Job carries, and how long after this end it begins."""
    if end.kind in (Kind.CRASH, Kind.MEMORY):  # a preflight has no micro-batch to halve
        return Counters(failures=before.failures + 1, halve=before.halve), crash_delay(before.failures)
    # Also what is free or lost is spaced, or a cluster that takes every pod away would be hammered.
    interruptions = before.interruptions + 1 if end.kind in (Kind.FREE, Kind.LOST) else 0
    counters = replace(before, tries=before.tries + 1, interruptions=interruptions)
    return counters, environment_delay(before.tries)


def _again(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    counters, delay = _next(job.counters, end)
    due = due_at(o, job, end, delay, now=now)
    if now < due:
        return _rest(o, end, counters, due, now=now)
    mark = Mark("Unknown", end.reason, end.message + LOOKING_AGAIN)
    verdict = _resting(mark, stalled=end.kind is Kind.ENVIRONMENT, again_after=None)
    return verdict.stating(preflight_job=told(o, counters)).doing(_another(o, target, counters), DeleteJob.of(job))


def _rest(o: Observed, end: End, counters: Counters, due: datetime, *, now: datetime) -> Verdict:
    mark = Mark("Unknown", end.reason, f"{end.message}; next try at {format_time(due)}")
    verdict = _resting(mark, stalled=end.kind is Kind.ENVIRONMENT, again_after=(due - now).total_seconds())
    return verdict.stating(preflight_job=told(o, counters, due))


def _resting(mark: Mark, *, stalled: bool, again_after: float | None) -> Verdict:
    phase: Phase = "Pending" if stalled else "Preflight"
    verdict = Verdict(phase, mark.reason, mark.message, stalled=stalled, again_after=again_after)
    return verdict.marking(PreflightPassed=mark)


def _failure(reason: str, message: str) -> Verdict:
    verdict = Verdict("Failed", reason, message).marking(PreflightPassed=Mark("False", reason, message))
    return verdict.stating(preflight_job=None)


def _passed(
    o: Observed, target: Target, job: Child, last: LastMessage, outcome: PreflightOutcome, *, now: datetime
) -> Verdict:
    result = last.result
    if result is not None and result.partial:
        limit = reached(o.knowing({"checkpoint": last_checkpoint(None, result)}), target)
        if limit is None or not limit.publish:
            result = None  # there is budget left: the run goes on from where it was stopped
    facts = {"preflight": outcome.summary, "preflight_job": None, **_run_facts(o, target, job, outcome, result)}
    if result is not None:
        verdict = succeeded(result, reason="Reused", now=now, metric=target.config.primary)
        reused = verdict.marking(PreflightPassed=Mark("True", "Reused", "the very model is published already"))
        return reused.stating(**{**facts, **verdict.facts, "checkpoint": last_checkpoint(None, result)})
    message = f"goes on from step {outcome.step}" if outcome.state == "Resume" else "the run may begin"
    verdict = Verdict("Queued", PASSED, message, facts=facts, again_after=0.0)
    return verdict.marking(PreflightPassed=Mark("True", outcome.state, message))


def _not_good_enough(
    o: Observed, target: Target, job: Child, last: LastMessage, outcome: PreflightOutcome, *, now: datetime
) -> Verdict:
    """The very model is published, but does not meet the gates that are asked for now."""
    assert last.result is not None
    verdict = not_good_enough(last.result, reason=last.reason, message=last.message.removesuffix("."), now=now)
    verdict = verdict.marking(PreflightPassed=Mark("True", "Reused", "the very model is published already"))
    facts = {
        "preflight": outcome.summary,
        "preflight_job": None,
        **_run_facts(o, target, job, outcome, last.result),
        **verdict.facts,
    }
    return verdict.stating(**{**facts, "checkpoint": last_checkpoint(None, last.result)})


def _run_facts(
    o: Observed, target: Target, job: Child, outcome: PreflightOutcome, result: TrainOutcome | None
) -> dict[str, object]:
    """The run's name in the status; another run than before begins with a clean sheet, the model stays."""
    status = o.subject.status
    before = status.run
    if before is None or before.id != outcome.run_id:
        checkpoint = CheckpointStatus(step=outcome.step) if outcome.step is not None else None
        run = RunStatus(id=outcome.run_id, generation=target.config.generation, inputs=outcome.inputs)
        run = restarts.counted(run, job.counters)
        return {"run": run, "progress": None, "checkpoint": checkpoint, "restarts": None}
    run = before.model_copy(update={"generation": target.config.generation, "inputs": outcome.inputs})
    run = restarts.counted(run, job.counters)
    if o.jobs("train"):
        return {"run": run}
    return {"run": run, **_settled(status.model_copy(update={"run": run}), outcome, result)}


def _settled(status: FineTuneJobStatus, outcome: PreflightOutcome, result: TrainOutcome | None) -> dict[str, object]:
    """What the last attempt has left behind: storage knows, where nobody saw its end."""
    if result is not None:
        return nothing_lost(status, step=result.final_step)
    step = outcome.step or 0
    attempts = (status.usage.attempts if status.usage else None) or 0
    facts: dict[str, object] = {"checkpoint": checkpoint_at(status.checkpoint, step)}
    return {**facts, **corrected(status, resumed=step, attempt=attempts + 1)}
