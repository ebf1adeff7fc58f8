"""What does a pod without a GPU find out: may the run begin, go on, or is it done already?"""

from dataclasses import replace
from datetime import datetime

from finetune_api.contract import LastMessage, PreflightOutcome, TrainOutcome
from finetune_api.status import CheckpointStatus, FineTuneJobStatus, Phase, RunStatus
from finetune_operator.policies.accept import Target
from finetune_operator.policies.endings import End, ending
from finetune_operator.policies.limits import reached
from finetune_operator.policies.restarts import (
    FREE_WITHOUT_PROGRESS,
    NO_PROGRESS,
    checkpoint_at,
    corrected,
    crash_delay,
    environment_delay,
    nothing_lost,
)
from finetune_operator.policies.success import last_checkpoint, not_good_enough, succeeded
from finetune_operator.policies.waiting import HELD, ORDINARY, queue_of, wait_of
from finetune_operator.policies.ways import Kind
from finetune_operator.verdict import PASSED, CreatePreflight, DeleteJob, Mark, Observed, Verdict, mark_of
from finetune_operator.views import Child, Counters, format_time


def preflight(o: Observed, target: Target, *, now: datetime, carried: Counters | None = None) -> Verdict:
    """Run a preflight Job, wait for it, or act on what it said. Jobs of other documents are deleted."""
    jobs = o.jobs("preflight")
    mine = [job for job in jobs if job.key == target.key]
    if not mine:
        failed = _failed_before(o)
        if failed is not None:
            return failed
        begun = _begin(o, target, counters=carried or Counters())
        return begun.doing(*(DeleteJob.of(job) for job in o.remaining("preflight")))
    newest = mine[-1]
    verdict = _look(o, target, newest, now=now)
    return verdict.doing(*(DeleteJob.of(job) for job in jobs if job is not newest))


def _failed_before(o: Observed) -> Verdict | None:
    """A Job that is gone does not make a refused generation worth another look."""
    mark = mark_of(o.subject, "PreflightPassed")
    return _failure(mark.reason, mark.message) if mark is not None and mark.status == "False" else None


def _begin(o: Observed, target: Target, *, counters: Counters) -> Verdict:
    queue = target.config.pods.queue
    missing = queue_of(o, queue.name) if queue is not None and queue.preflight else None
    if missing is not None:
        unknown = Mark("Unknown", missing.reason, missing.message)
        return missing.verdict(again_after=30.0).marking(PreflightPassed=unknown)
    return _checking("Checking", "checking storage, data and labels").doing(_another(o, target, counters))


def _another(o: Observed, target: Target, counters: Counters) -> CreatePreflight:
    return CreatePreflight(target.config, target.key, o.next_ordinal("preflight"), counters, o.attempts)


def _checking(reason: str, message: str) -> Verdict:
    return Verdict("Preflight", reason, message).marking(PreflightPassed=Mark("Unknown", reason, message))


def _look(o: Observed, target: Target, job: Child, *, now: datetime) -> Verdict:
    pods = o.pods_of(job)
    end = ending(job, pods, nodes=1, now=now)
    if end is not None:
        return _ended(o, target, job, end, now=now)
    wait = wait_of(o, job, nodes=1, now=now)
    if wait is None or wait.reason in ORDINARY:
        again = 5.0 if not pods else None
        return replace(_checking("Checking", "checking storage, data and labels"), again_after=again)
    phase: Phase = "Pending" if wait.stalled else "Queued" if wait.cause in HELD else "Preflight"
    unknown = Mark("Unknown", wait.reason, wait.message)
    verdict = Verdict(phase, wait.reason, wait.message, stalled=wait.stalled, again_after=30.0)
    return verdict.marking(PreflightPassed=unknown)


def _ended(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    outcome = end.last.preflight if end.last else None
    if end.kind is Kind.DONE and end.last is not None and outcome is not None:
        return _passed(o, target, end.last, outcome, now=now)
    if end.kind is Kind.FINAL and end.last is not None and end.last.result is not None and outcome is not None:
        return _not_good_enough(o, target, end.last, outcome, now=now)
    if end.kind is Kind.FINAL:
        return _failure(end.reason, end.message)
    if end.kind in (Kind.CRASH, Kind.MEMORY) and job.counters.failures + 1 > target.config.max_retries:
        message = f"preflight crashed {job.counters.failures + 1} times, the last time: {end.message}"
        return _failure(end.reason, message)
    if end.kind in (Kind.FREE, Kind.LOST) and job.counters.interruptions + 1 >= FREE_WITHOUT_PROGRESS:
        said = f"preflight was interrupted {FREE_WITHOUT_PROGRESS} times in a row, the last time: {end.message}"
        return _failure(NO_PROGRESS, f"{said}; ask for nodes that stay, then change the annotation finetune.dev/retry")
    return _again(o, target, job, end, now=now)


def _again(o: Observed, target: Target, job: Child, end: End, *, now: datetime) -> Verdict:
    before = job.counters
    if end.kind in (Kind.CRASH, Kind.MEMORY):  # a preflight has no micro-batch to halve
        counters = Counters(failures=before.failures + 1)
        delay = crash_delay(before.failures)
    else:  # also what is free or lost is spaced, or a cluster that takes every pod away would be hammered
        interruptions = before.interruptions + 1 if end.kind in (Kind.FREE, Kind.LOST) else 0
        counters = Counters(before.failures, tries=before.tries + 1, interruptions=interruptions)
        delay = environment_delay(before.tries)
    due = end.at + delay
    if now >= due:
        return _retrying(end, f"{end.message}; looking again now").doing(_another(o, target, counters))
    message = f"{end.message}; next try at {format_time(due)}"
    return replace(_retrying(end, message), again_after=(due - now).total_seconds())


def _retrying(end: End, message: str) -> Verdict:
    stalled = end.kind is Kind.ENVIRONMENT
    phase: Phase = "Pending" if stalled else "Preflight"
    return Verdict(phase, end.reason, message, stalled=stalled).marking(
        PreflightPassed=Mark("Unknown", end.reason, message)
    )


def _failure(reason: str, message: str) -> Verdict:
    return Verdict("Failed", reason, message).marking(PreflightPassed=Mark("False", reason, message))


def _passed(o: Observed, target: Target, last: LastMessage, outcome: PreflightOutcome, *, now: datetime) -> Verdict:
    result = last.result
    if result is not None and result.partial:
        limit = reached(o.knowing({"checkpoint": last_checkpoint(None, result)}), target)
        if limit is None or not limit.publish:
            result = None  # there is budget left: the run goes on from where it was stopped
    facts = {"preflight": outcome.summary, **_run_facts(o, target, outcome, result)}
    if result is not None:
        verdict = succeeded(result, reason="Reused", now=now, metric=target.config.primary)
        reused = verdict.marking(PreflightPassed=Mark("True", "Reused", "the very model is published already"))
        return reused.stating(**{**facts, **verdict.facts, "checkpoint": last_checkpoint(None, result)})
    message = f"goes on from step {outcome.step}" if outcome.state == "Resume" else "the run may begin"
    verdict = Verdict("Queued", PASSED, message, facts=facts, again_after=0.0)
    return verdict.marking(PreflightPassed=Mark("True", outcome.state, message))


def _not_good_enough(
    o: Observed, target: Target, last: LastMessage, outcome: PreflightOutcome, *, now: datetime
) -> Verdict:
    """The very model is published, but does not meet the gates that are asked for now."""
    assert last.result is not None
    verdict = not_good_enough(last.result, reason=last.reason, message=last.message.removesuffix("."), now=now)
    verdict = verdict.marking(PreflightPassed=Mark("True", "Reused", "the very model is published already"))
    facts = {"preflight": outcome.summary, **_run_facts(o, target, outcome, last.result), **verdict.facts}
    return verdict.stating(**{**facts, "checkpoint": last_checkpoint(None, last.result)})


def _run_facts(
    o: Observed, target: Target, outcome: PreflightOutcome, result: TrainOutcome | None
) -> dict[str, object]:
    """The run's name in the status; another run than before begins with a clean sheet, the model stays."""
    status = o.subject.status
    before = status.run
    if before is None or before.id != outcome.run_id:
        checkpoint = CheckpointStatus(step=outcome.step) if outcome.step is not None else None
        run = RunStatus(id=outcome.run_id, generation=target.config.generation)
        return {"run": run, "progress": None, "checkpoint": checkpoint, "restarts": None}
    run = before.model_copy(update={"generation": target.config.generation})
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
