"""Pure: from everything observed to what is said and done next.

Every decision is made from the whole state, so a missed event, a restarted operator or a second one changes nothing.
The steps of a run are separated by status writes where an order matters: the run's name is written before its train
Job is made (so that twins see each other), and what an attempt has cost is written before its Job goes (so that it is
counted once, whoever dies when). A generation is
pinned before anything of it is begun, and after what has to end: ending needs nothing that may be refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from finetune_api.status import FineTuneJobStatus
from finetune_operator.policies.accept import Refusal, Target, accept, target_of
from finetune_operator.policies.attempt import BESIDE, POLL, STARTED, attempt, stopped
from finetune_operator.policies.groups import turn
from finetune_operator.policies.ledger import with_attempt
from finetune_operator.policies.limits import REASONS, reached
from finetune_operator.policies.preflight import preflight
from finetune_operator.policies.restarts import carried, forgotten, lost
from finetune_operator.policies.rivals import ahead, wait_for
from finetune_operator.policies.suspend import SUSPENDING, last_words, still_there, suspend, unasked, unseen_job
from finetune_operator.policies.vanished import gone, vanished
from finetune_operator.policies.waiting import ANOTHER_GROUP, HELD, KUEUE_MISSING, queue_of
from finetune_operator.policies.ways import DOCUMENT_CHANGED, GROUP_INCOMPLETE
from finetune_operator.status import compose, mere_progress, notes, worth_writing
from finetune_operator.verdict import (
    IDENTICAL,
    PASSED,
    STOPPING,
    CreateConfig,
    CreatePreflight,
    CreateTrain,
    Decision,
    DeleteJob,
    Mark,
    Observed,
    Verdict,
    mark_of,
    reason_of,
)
from finetune_operator.views import SELECTOR, Child, Pod, told_time

REFUSED_AGAIN = 60.0
SPARE_AGAIN = 5.0
"""Seconds until the next look at least, where a Job that nothing waits for could not be deleted."""
KUEUE_AGAIN = 30.0
"""Seconds between two looks whether Kueue is there."""


def decide(o: Observed, *, now: datetime) -> Decision:
    """The one entry: nothing for a FineTuneJob that goes away or is done."""
    if o.subject.at_rest:
        return Decision()
    verdict = _verdict(o, now=now)
    after = compose(o.subject, verdict, now=now)
    return replace(
        _told(o, after, now=now, brief=verdict.brief), actions=verdict.actions, again_after=verdict.again_after
    )


def _verdict(o: Observed, *, now: datetime) -> Verdict:
    subject = o.subject
    if subject.suspended:
        verdict = _suspended(o, now=now)
    else:
        verdict = _afresh(o, now=now) if subject.status.phase == "Failed" else _pursue(o, now=now)
    return verdict if subject.retry is None else verdict.stating(last_handled_retry=subject.retry)


def _told(o: Observed, after: FineTuneJobStatus, *, now: datetime, brief: bool = False) -> Decision:
    before = o.subject.status
    if not worth_writing(before, after, now=now, last_write=o.last_write, trainings=o.trainings, brief=brief):
        return Decision()
    routine = mere_progress(before, after)
    if routine and not o.room:
        return Decision(routine=True)
    return Decision(status=after, routine=routine, events=notes(before, after))


def refused(o: Observed, *, reason: str, message: str, now: datetime) -> Decision:
    """The API server did not create what was wanted. Nothing is forgotten: the same is decided again after a while.

    Without a train Job nothing was begun, and the phase must not claim it: the next look would take the Job for lost.
    What is suspended and has nothing to end lacks its ConfigMap only, and needs none to stay as it is.
    """
    if o.subject.suspended:
        halted = _suspended(o, now=now)
        unpinned = Mark("Unknown", reason, f"the document is resolved; the API server refuses to pin it: {message}")
        return _unable(o, replace(halted.marking(Accepted=unpinned), again_after=REFUSED_AGAIN), now=now)
    phase = o.subject.status.phase
    going_on = phase in STARTED and bool(o.jobs("train"))
    # Not "next try at ...": words that change with every try would be a status write, an Event and a look with each.
    said = f"the API server refuses what the job needs: {message}; tried again every {REFUSED_AGAIN:.0f} s"
    verdict = Verdict(phase if going_on and phase else "Pending", reason, said, stalled=True, again_after=REFUSED_AGAIN)
    return _unable(o, verdict, now=now)


def undeleted(o: Observed, words: Mapping[str, str], *, reason: str, now: datetime) -> Decision:
    """The API server did not delete these Jobs, with such words; all else of the decision is done. What the decision
    says holds all the same, and that a Job of which it waits for the end is not deleted is said beside it.

    A Job that nothing waits for is tried again when something is looked at the next time, and goes after its time.
    """
    verdict = _verdict(o, now=now)
    stay = [child for name in words for child in o.children if child.name == name]
    seen = {child.name for child in stay}
    unseen = [name for name in words if name not in seen]  # without its label no Job is, and its pods go on
    needed = next(iter((*(child.name for child in stay if _is_waited_for(o, verdict, child)), *unseen)), None)
    if verdict.final:
        going = next((child for child in stay if child.ended is None), None)
        why = (
            f"; Job {going.name} goes on, as the API server refuses to delete it: {words[going.name]}" if going else ""
        )
        verdict = replace(verdict, message=f"{verdict.message}{why}")
    elif needed is not None:
        why = f"the API server refuses to delete Job {needed}: {words[needed]}"
        said = f"{verdict.message}; {why}; tried again every {REFUSED_AGAIN:.0f} s"
        verdict = replace(verdict, message=said, stalled=True, stalled_by=reason, again_after=REFUSED_AGAIN)
    elif verdict.again_after is not None:
        verdict = replace(verdict, again_after=max(verdict.again_after, SPARE_AGAIN))
    after = compose(o.subject, verdict, now=now)
    return replace(_told(o, after, now=now, brief=verdict.brief), again_after=verdict.again_after)


def _is_waited_for(o: Observed, verdict: Verdict, child: Child) -> bool:
    """Whether nothing goes on before this Job is gone: no attempt follows it, nor is another one there."""
    if child.role == "preflight":
        return verdict.phase == "Suspended" and (verdict.reason == SUSPENDING or child.ended is None)
    deleted = {action.uid for action in verdict.actions if isinstance(action, DeleteJob)}
    others = any(job.ended is None and job.uid not in deleted for job in o.jobs("train"))
    return not others and not any(isinstance(action, CreateTrain) for action in verdict.actions)


def _unable(o: Observed, verdict: Verdict, *, now: datetime) -> Decision:
    return replace(_told(o, compose(o.subject, verdict, now=now), now=now), again_after=verdict.again_after)


# --- a terminal failure that is to be tried again: by the annotation, or because the document has changed ---


def _afresh(o: Observed, *, now: datetime) -> Verdict:
    """As if the document were new: what was said before stays, what Jobs of before ended with counts no more."""
    subject = o.subject
    status = subject.status
    anew = forgotten(status)
    blank = subject.status.model_copy(update={"phase": None, "message": None, "conditions": None, **anew})
    asked = subject.retry_asked
    old = [c for c in o.children if c.generation < subject.generation or (asked and c.retry != (subject.retry or ""))]
    fresh = replace(
        o,
        subject=replace(o.subject, status=blank),
        children=tuple(replace(child, deleting=child.deleting or child in old) for child in o.children),
    )
    verdict = _pursue(fresh, now=now)
    reset = {kind: Mark("Unknown", "NotYet", "asked to try again") for kind in ("PreflightPassed", "Evaluated")}
    verdict = replace(verdict, marks={**reset, **verdict.marks}, facts={**anew, **verdict.facts})
    return verdict.doing(*(DeleteJob.of(c) for c in old if not c.deleting))


def _suspended(o: Observed, *, now: datetime) -> Verdict:
    """Also what cannot be resolved is suspended, and says why it cannot."""
    target = accept(o)
    verdict = suspend(o, target, now=now).stating(preflight_job=None)  # none is to be there
    if isinstance(target, Refusal):
        return verdict.marking(Accepted=Mark("False", target.reason, target.message))
    return _pinning(target, verdict)


# --- the ordinary way ---


def _pursue(o: Observed, *, now: datetime) -> Verdict:
    target = accept(o)
    job = next(reversed(o.jobs("train")), None)
    if isinstance(target, Refusal):
        return _beside(o, _refused(target), job, now=now) if job else _refused(target)
    return _pinning(target, _run(o, target, job, now=now))


def _pinning(target: Target, verdict: Verdict) -> Verdict:
    verdict = verdict.marking(Accepted=Mark("True", "Resolved", "the document is resolved and pinned"))
    if target.is_pinned:
        return verdict
    generation, actions = target.config.generation, verdict.actions
    config = CreateConfig(target.config, target.key)
    for i, action in enumerate(actions):
        if isinstance(action, CreatePreflight | CreateTrain) and action.config.generation == generation:
            return replace(verdict, actions=(*actions[:i], config, *actions[i:]))
    return verdict if _ends_something(verdict) else verdict.doing(config)


def _ends_something(verdict: Verdict) -> bool:
    """It goes before the ConfigMap, or a ConfigMap that is refused would keep for ever what has to end.

    At once means that something is told first, for instance what an attempt has cost: the next look does the rest.
    """
    ends = any(isinstance(action, DeleteJob) for action in verdict.actions)
    return not verdict.final and (ends or verdict.again_after == 0.0 or verdict.reason == SUSPENDING)


def _refused(refusal: Refusal) -> Verdict:
    refused = Mark("False", refusal.reason, refusal.message)
    if refusal.final:
        return Verdict("Failed", refusal.reason, refusal.message).marking(Accepted=refused)
    return Verdict("Pending", refusal.reason, refusal.message, stalled=True, again_after=300.0).marking(
        Accepted=refused
    )


def _run(o: Observed, target: Target, job: Child | None, *, now: datetime) -> Verdict:
    if job is not None and job.key == target.key:
        verdict = attempt(o, target, job, now=now)
        return verdict.doing(*_leftovers(o, job, verdict))
    unseen = o.begun >= o.next_ordinal("train")
    if unseen:  # it was begun, and is gone before the status could tell of it
        o = o.knowing({"usage": with_attempt(o.subject.status.usage, o.begun)})
    elif _passed(o):
        return _start(o, target, now=now)
    if job is not None:
        return _beside(o, preflight(o, target, now=now), job, now=now)
    cost = lost(o, now=now) if unseen or _lost(o) else {}
    if cost:  # what a preflight has said before is out of date
        return gone(o, cost, now=now).doing(*(DeleteJob.of(child) for child in o.jobs("preflight")))
    return vanished(o, target, now=now) or preflight(o, target, now=now)


def _leftovers(o: Observed, job: Child, verdict: Verdict) -> list[DeleteJob]:
    """With a train Job there, what preflight said is known; unless the verdict itself looks again."""
    mark = verdict.marks.get("PreflightPassed")
    spare = [] if mark is not None and mark.status == "Unknown" else o.jobs("preflight")
    return [DeleteJob.of(child) for child in (*spare, *(other for other in o.jobs("train") if other is not job))]


def _passed(o: Observed) -> bool:
    """Preflight's word for this generation still holds: nobody else took the run over meanwhile, no Job was lost."""
    mark, run = mark_of(o.subject, "PreflightPassed"), o.subject.status.run
    if mark is None or mark.status != "True" or run is None:
        return False
    reason = reason_of(o.subject.status)
    if reason == IDENTICAL:
        return ahead(o, run.id, holding=False) is not None
    return not _lost(o)


def _lost(o: Observed) -> bool:
    """Whether the status speaks of a train Job, of which there is none any more."""
    held = (cause.reason for cause in (*HELD, KUEUE_MISSING, ANOTHER_GROUP))
    nothing_ran = (PASSED, STOPPING, GROUP_INCOMPLETE.reason, *REASONS, *held)
    return o.subject.status.phase in STARTED and reason_of(o.subject.status) not in nothing_ran


def _start(o: Observed, target: Target, *, now: datetime) -> Verdict:
    """Preflight has passed and no train Job of this document is there: make room, then make it."""
    run = o.subject.status.run
    assert run is not None
    former = [job for job in o.jobs("train") if job.key != target.key]
    said = reason_of(o.subject.status)
    running = [pod for pod in o.pods if _still_runs(o, pod, target, now=now)]
    if former or running:
        message = "the attempt before commits a checkpoint and ends"
        unseen = [pod for pod in unasked(o, now=now) if pod in running]
        mine = next((pod for pod in unseen if pod.key == target.key), None)
        if mine is not None:  # its Job may be seen the next moment, and is the one that is wanted
            why = f"its Job {unseen_job(mine).name} is not found: put its label {SELECTOR} back, or delete it"
            message = f"pod {mine.name} of this run goes on, and {why}"
        verdict = Verdict("Queued", said if said in REASONS else STOPPING, message, again_after=2.0)
        if former and said != STOPPING:  # what it cost is told before it goes
            cost = stopped(o, former[-1], reason=DOCUMENT_CHANGED.reason, now=now)
            return replace(verdict, facts=cost, again_after=0.0)
        others = (unseen_job(pod) for pod in unseen if pod.key != target.key)
        return verdict.doing(*(DeleteJob.of(job) for job in former), *others)
    rival = ahead(o, run.id, holding=False)
    if rival is not None:
        return wait_for(rival).doing(*(DeleteJob.of(job) for job in o.jobs("preflight")))
    words = last_words(o)
    known = o.knowing(words)
    limit = reached(known, target)
    if limit is not None and not limit.publish:
        if limit.unheard and said != PASSED:
            return _asked_anew(o, target, now=now)
        return limit.failed(known).stating(**words)
    queue = target.config.pods.queue
    missing = queue_of(o, queue.name) if queue is not None else None
    if missing is not None:
        return missing.verdict(again_after=KUEUE_AGAIN)
    later = turn(o, target, now=now)
    if later is not None:
        return later
    looked = next(reversed(o.jobs("preflight")), None)
    counters = looked.counters if looked else carried(o, target)
    counters = replace(counters, interruptions=0, finish=limit is not None)
    ordinal = o.next_ordinal("train")
    action = CreateTrain(target.config, target.key, run.id, ordinal, counters, run.inputs)
    usage = with_attempt(o.subject.status.usage, ordinal)
    verdict = Verdict("Queued", "PodsPending", "waiting for a node", again_after=POLL, facts={"usage": usage})
    return verdict.doing(action)


def _asked_anew(o: Observed, target: Target, *, now: datetime) -> Verdict:
    """By a preflight that begins after the last attempt: what one before it said does not know of its checkpoint."""
    last = next(reversed(o.subject.status.restarts or []), None)
    ended = told_time(last.at) if last is not None else None
    old = [job for job in o.jobs("preflight") if ended is not None and job.created <= ended]
    known = tuple(replace(child, deleting=True) if child in old else child for child in o.children)
    return preflight(replace(o, children=known), target, now=now).doing(*(DeleteJob.of(job) for job in old))


def _still_runs(o: Observed, pod: Pod, target: Target, *, now: datetime) -> bool:
    """A former train Job's pod that may still commit a checkpoint; one that a dead node never ends does not count."""
    if pod.role != "train" or not still_there(pod, now=now):
        return False
    return pod.gone_by is not None or pod.key != target.key or pod.owner not in {job.uid for job in o.jobs("train")}


# --- a changed document while the run before it goes on ---


def _beside(o: Observed, verdict: Verdict, job: Child, *, now: datetime) -> Verdict:
    """Join what is said of the new generation with the old run, which goes on until the new one may begin."""
    pinned = o.pinned.get(job.generation)
    if verdict.phase == "Succeeded" or _just_passed(verdict) or pinned is None:
        # Final though it has passed: the model is there already, whether it is good enough or not. A run whose
        # configuration somebody deleted cannot be followed: it ends where nothing is to come after it soon.
        deleted = pinned is None and job.generation not in o.unreadable
        if not verdict.final and not (deleted and verdict.stalled):
            return verdict
        cost = stopped(o, job, reason=DOCUMENT_CHANGED.reason, now=now)
        return replace(verdict, facts={**cost, **verdict.facts}).doing(DeleteJob.of(job))
    old = attempt(o, target_of(pinned), job, now=now, superseded=True)
    generation = o.subject.generation
    if old.final:  # its model counts, its failure does not: the document asks for something else by now
        if verdict.final and "Evaluated" in old.marks:
            verdict = replace(verdict, message=f"{verdict.message}; the model is that of generation {job.generation}")
        return verdict.stating(**old.facts)
    if old.again_after == 0.0:  # told before anything else, which may be refused
        return old
    trouble = verdict.final or verdict.stalled
    said = " was refused" if verdict.final else ""
    message = f"{old.message}{BESIDE}{generation}{said}: {verdict.message}"
    again = [seconds for seconds in (verdict.again_after, old.again_after) if seconds is not None]
    return Verdict(
        old.phase,
        verdict.reason if trouble else old.reason,
        message,
        marks=verdict.marks,
        facts={**verdict.facts, **old.facts},
        actions=(*old.actions, *verdict.actions),
        again_after=min(again, default=None),
    )


def _just_passed(verdict: Verdict) -> bool:
    mark = verdict.marks.get("PreflightPassed")
    return mark is not None and mark.status == "True"
