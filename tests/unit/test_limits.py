"""spec.deadline and spec.budget: what counts, what follows, and which clocks are believed."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given as given_
from hypothesis import strategies as st
from tests.unit.test_decide import (
    CHANGED,
    FASTER_KEY,
    GO,
    NOW,
    OTHER_RUN,
    RUN,
    SPEC,
    TRAINED,
    TRAINING,
    TWO_NODES,
    Row,
    ago,
    ended,
    message,
    outcome,
    p,
    pinned,
    pod,
    progress,
    said,
    settled,
    short,
    subject,
    t,
    truth,
    world,
)

from finetune_api.contract import LimitsConfig
from finetune_api.status import CheckpointStatus, FineTuneJobStatus, Ongoing, Restart, RunStatus, Usage
from finetune_operator.decide import decide
from finetune_operator.policies.ledger import UNHEARD, Cost
from finetune_operator.policies.limits import spoken
from finetune_operator.verdict import CreateTrain, Observed, reason_of
from finetune_operator.views import Counters, format_time

DEADLINE = {**SPEC, "deadline": "1h"}
BUDGET = {**SPEC, "budget": {"gpuHours": 1}}
STRICT = {**SPEC, "budget": {"gpuHours": 1, "onExhausted": "Fail"}}
BOTH = {**SPEC, "deadline": "1h", "budget": {"gpuHours": 1}}
FOUR_GPUS = {**BUDGET, "resources": {"nodes": 2, "perNode": {"gpus": 2}}}
BIG = {"budget": {"gpuHours": 9}}


def under(spec: dict[str, Any], *, generation: int = 1) -> dict[str, Any]:
    return {
        "subject": subject(spec, generation=generation),
        "pinned": {generation: pinned(spec, generation=generation)},
    }


def spent(seconds: int, *, attempts: int = 1, **facts: Any) -> FineTuneJobStatus:
    """What trains, after earlier attempts have taken so many seconds of one GPU."""
    usage = Usage(gpu_seconds=seconds, running_seconds=seconds, counted=attempts - 1, attempts=attempts)
    return TRAINING.model_copy(update={"usage": usage, **facts})


def stopped(reason: str, *, step: int | None = 40, **facts: Any) -> FineTuneJobStatus:
    """The first attempt was stopped for a limit, and its Job is gone."""
    at = format_time(ago(100))
    cost = Restart(attempt=1, reason=reason, at=at, resumed_from_step=step or 0, lost_steps=0)
    usage = Usage(gpu_seconds=3600, running_seconds=3600, counted=1, attempts=1)
    return said("Training", reason, passed="True", usage=usage, restarts=[cost], **facts)


def running(seconds: float, number: int = 1, **changes: Any) -> tuple[Any, ...]:
    """An attempt whose pod has had its node for so long, and which trains."""
    job = t(number, created=ago(seconds + 5), **changes)
    return job, pod(job, started=ago(seconds)), telling(NOW)


def telling(at: Any, stage: Any = "Training", **fields: Any) -> Any:
    return progress(stage, **fields).model_copy(update={"updated_at": format_time(at)})


def given(**limits: Any) -> dict[str, Any]:
    """Bounds that the profile gives, because the document has none."""
    made = pinned()
    config = made.config.model_copy(update={"limits": LimitsConfig(of_profile=["deadline", "gpuHours"], **limits)})
    return {"subject": subject(), "pinned": {1: replace(made, config=config)}}


GOING = pod(t(), gone_by=NOW + timedelta(seconds=100), was_asked_to_go=True)
PARTIAL = TRAINED.model_copy(
    update={"result": TRAINED.result and TRAINED.result.model_copy(update={"partial": True, "final_step": 40})}
)
FINISHING = t(2, created=ago(65), counters=Counters(finish=True))
OVER = Usage(gpu_seconds=3600, running_seconds=3600, counted=1, attempts=2)
STOPPED_AT_BEST = said("Succeeded", "StoppedAtBest", passed="True", usage=OVER, checkpoint=CheckpointStatus(step=40))

ROWS = [
    Row(
        "below the deadline it goes on",
        world(spent(3000), *running(599), **under(DEADLINE)),
        "Training",
        "Training",
    ),
    Row(
        "at the deadline the attempt commits a checkpoint and ends",
        world(spent(3000), *running(600), **under(DEADLINE)),
        "Training",
        "DeadlineExceeded",
        "delete t1",
        says="the attempts ran 1h, spec.deadline is 1h; the attempt commits a checkpoint and ends",
        again=2.0,
    ),
    Row(
        "what waits for a node takes no time",
        world(spent(3000), t(created=ago(9999)), pod(t(), node=None, running=False), **under(DEADLINE)),
        "Queued",
        "PodsPending",
    ),
    Row(
        "nor does what waits for the Job controller",
        world(spent(3000), t(created=ago(9999)), **under(DEADLINE)),
        "Queued",
        "PodsPending",
    ),
    Row(
        "what waits for the environment takes none, however long",
        world(
            said("Pending", "BucketNotFound", run=None),
            p(created=ago(99999)),
            ended(p(), 49, message(49, "BucketNotFound"), at=2),
            **under(DEADLINE),
        ),
        "Pending",
        "BucketNotFound",
        stalled=True,
    ),
    Row(
        "its pods are waited for",
        world(stopped("DeadlineExceeded"), GOING, **under(DEADLINE)),
        "Queued",
        "DeadlineExceeded",
        again=2.0,
    ),
    Row(
        "also before the garbage collector has noticed that their Job is gone",
        world(stopped("DeadlineExceeded"), pod(t()), **under(DEADLINE)),
        "Queued",
        "DeadlineExceeded",
    ),
    Row(
        "then the job has failed",
        world(stopped("DeadlineExceeded"), **under(DEADLINE)),
        "Failed",
        "DeadlineExceeded",
        says="spec.deadline is 1h; raise it to go on from step 40",
        passed="True",
    ),
    Row(
        "a bound of the profile is named as such",
        world(stopped("DeadlineExceeded"), **given(deadline_seconds=3600)),
        "Failed",
        "DeadlineExceeded",
        says="the profile's limits.deadline is 1h; have it raised, then set spec.deadline, to go on from step 40",
        passed="True",
    ),
    Row(
        "so is one of GPU hours",
        world(stopped("BudgetExhausted"), **given(gpu_seconds=3600, stop_at_best=False)),
        "Failed",
        "BudgetExhausted",
        says="the profile's limits.gpuHours is 1; have it raised, then set spec.budget.gpuHours, to go on from step 40",
        passed="True",
    ),
    Row(
        "and knows from its pods which step is committed",
        world(
            stopped("DeadlineExceeded"),
            ended(t(), 45, message(45, "Stopped", run_id=RUN, step=44)),
            **under(DEADLINE),
        ),
        "Failed",
        "DeadlineExceeded",
        says="from step 44",
    ),
    Row(
        "or that nothing was, after what it had known before",
        world(stopped("DeadlineExceeded", checkpoint=CheckpointStatus(step=30)), ended(t(), 137), **under(DEADLINE)),
        "Failed",
        "DeadlineExceeded",
        says="from step 30",
    ),
    Row(
        "where nothing was committed it says so",
        world(stopped("DeadlineExceeded", step=None), **under(DEADLINE)),
        "Failed",
        "DeadlineExceeded",
        says="from the beginning: no checkpoint was committed",
    ),
    Row(
        "a deadline that is raised looks where the run is",
        world(
            said("Failed", "DeadlineExceeded", passed="True", usage=OVER),
            subject=subject({**SPEC, "deadline": "2h"}, generation=2),
            pinned={1: pinned(DEADLINE), 2: pinned({**SPEC, "deadline": "2h"}, generation=2)},
        ),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "and goes on from there",
        world(
            said("Queued", "PreflightPassed", passed="True", usage=OVER, checkpoint=CheckpointStatus(step=40)),
            **under({**SPEC, "deadline": "2h"}),
        ),
        "Queued",
        "PodsPending",
        "begin t3",
    ),
    Row(
        "one that is not raised begins nothing, whatever brought the job back",
        world(
            said("Queued", "PreflightPassed", passed="True", usage=OVER, checkpoint=CheckpointStatus(step=40)),
            **under(DEADLINE),
        ),
        "Failed",
        "DeadlineExceeded",
    ),
    Row(
        "a crash past the deadline is not tried again",
        world(spent(3000), *running(700)[:1], ended(t(), 1, at=1, started=ago(700)), **under(DEADLINE)),
        "Failed",
        "DeadlineExceeded",
    ),
    Row(
        "a model that is there counts, however long it took",
        world(spent(3000), *running(700)[:1], ended(t(), 0, TRAINED, started=ago(700)), **under(DEADLINE)),
        "Succeeded",
        "Trained",
    ),
    Row(
        "a budget counts every GPU of every pod since it got its node",
        world(
            spent(0),
            t(created=ago(1000), key=pinned(FOUR_GPUS).key),
            pod(t(), started=ago(950)),
            pod(t(), name="second", index=1, started=ago(850)),
            telling(NOW),
            **under(FOUR_GPUS),
        ),
        "Training",
        "BudgetExhausted",
        "delete t1",
        says="1 GPU hours are used, spec.budget.gpuHours is 1",
    ),
    Row(
        "and not a second more",
        world(
            spent(0),
            t(created=ago(1000), key=pinned(FOUR_GPUS).key),
            pod(t(), started=ago(950)),
            pod(t(), name="second", index=1, started=ago(849)),
            telling(NOW),
            **under(FOUR_GPUS),
        ),
        "Training",
        "Training",
    ),
    Row(
        "a budget that is used up fails where that is asked for",
        world(stopped("BudgetExhausted"), **under(STRICT)),
        "Failed",
        "BudgetExhausted",
        says="raise it to go on from step 40",
    ),
    Row(
        "else the next attempt only finishes",
        world(stopped("BudgetExhausted"), **under(BUDGET)),
        "Queued",
        "PodsPending",
        "begin t2",
    ),
    Row(
        "once the one before has committed",
        world(stopped("BudgetExhausted"), GOING, **under(BUDGET)),
        "Queued",
        "BudgetExhausted",
    ),
    Row(
        "also where only its pods have told of a checkpoint",
        world(
            stopped("BudgetExhausted", step=None),
            ended(t(), 45, message(45, "Stopped", run_id=RUN, step=6)),
            **under(BUDGET),
        ),
        "Queued",
        "PodsPending",
        "begin t2",
    ),
    Row(
        "where its pods were killed before they committed one, storage is asked",
        world(stopped("BudgetExhausted"), ended(t(), 137), **under(BUDGET)),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "where nobody has told of one, storage is asked",
        world(stopped("BudgetExhausted", step=None), **under(BUDGET)),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "by a preflight that begins then: one before it knows of no checkpoint",
        world(
            stopped("BudgetExhausted", step=None),
            p(created=ago(500)),
            ended(p(), 0, outcome("Fresh"), at=400),
            **under(BUDGET),
        ),
        "Preflight",
        "Checking",
        "begin p2, delete p1",
    ),
    Row(
        "and what it knows is published",
        world(said("Preflight", "Checking", usage=OVER), p(), ended(p(), 0, outcome("Resume", 6)), **under(BUDGET)),
        "Queued",
        "PreflightPassed",
        says="goes on from step 6",
    ),
    Row(
        "also of an attempt that was taken away before it could tell",
        world(
            spent(3000, checkpoint=None),
            *running(700)[:1],
            ended(t(), 143, at=1, started=ago(700), disrupted="x"),
            **under(BUDGET),
        ),
        "Preflight",
        "Checking",
        "begin p1, delete t1",
    ),
    Row(
        "one that has told of a checkpoint nobody knew of is followed by one that publishes it",
        world(
            spent(3000, checkpoint=None),
            *running(700)[:1],
            ended(t(), 45, message(45, "Stopped", run_id=RUN, step=6), at=1, started=ago(700)),
            **under(BUDGET),
        ),
        "Starting",
        "Stopped",
        "begin t2, delete t1",
    ),
    Row(
        "a model in storage is there, though the status was wiped",
        world(
            said("Preflight", "Checking", usage=OVER),
            p(),
            ended(p(), 0, outcome("Resume", 40).model_copy(update={"result": PARTIAL.result})),
            **under({**BUDGET, "retries": {"max": 1}}),
        ),
        "Succeeded",
        "StoppedAtBest",
    ),
    Row(
        "without a checkpoint there is nothing to publish",
        world(said("Queued", "PreflightPassed", passed="True", usage=OVER), **under(BUDGET)),
        "Failed",
        "BudgetExhausted",
        says="no checkpoint was committed",
    ),
    Row(
        "what only finishes is not stopped, whatever it costs",
        world(spent(5000, attempts=2), FINISHING, pod(FINISHING, started=ago(60)), telling(NOW), **under(BUDGET)),
        "Training",
        "Training",
    ),
    Row(
        "but for the deadline",
        world(
            spent(5000, attempts=2),
            FINISHING,
            pod(FINISHING, started=ago(60)),
            telling(NOW, "Evaluating"),
            **under(BOTH),
        ),
        "Training",
        "DeadlineExceeded",
        "delete t2",
    ),
    Row(
        "an attempt that evaluates already is not stopped either",
        world(spent(3000), *running(700)[:2], telling(NOW, "Evaluating"), **under(BUDGET)),
        "Evaluating",
        "Evaluating",
    ),
    Row(
        "unless it is to fail",
        world(spent(3000), *running(700)[:2], telling(NOW, "Evaluating"), **under(STRICT)),
        "Training",
        "BudgetExhausted",
        "delete t1",
    ),
    Row(
        "the best checkpoint, published, is a success that says how far it came",
        world(spent(3600, attempts=2), FINISHING, ended(FINISHING, 0, PARTIAL, started=ago(60)), **under(BUDGET)),
        "Succeeded",
        "StoppedAtBest",
        says="stopped at step 40 of 100 because spec.budget is used up; the best checkpoint is published: f1 0.900",
    ),
    Row(
        "unless the budget was raised meanwhile",
        world(
            spent(3600, attempts=2),
            FINISHING,
            ended(FINISHING, 0, PARTIAL, started=ago(60)),
            **under({**SPEC, "budget": {"gpuHours": 2}}),
        ),
        "Preflight",
        "Checking",
        "begin p1, delete t2",
    ),
    Row(
        "raised afterwards, preflight looks",
        world(
            STOPPED_AT_BEST,
            subject=subject({**SPEC, "budget": {"gpuHours": 2}}, generation=2),
            pinned={1: pinned(BUDGET), 2: pinned({**SPEC, "budget": {"gpuHours": 2}}, generation=2)},
        ),
        "Preflight",
        "Checking",
        "begin p1",
    ),
    Row(
        "a partial result is no result where there is budget left",
        world(
            said("Preflight", "Checking", usage=OVER),
            p(),
            ended(p(), 0, outcome("Resume", 40).model_copy(update={"result": PARTIAL.result})),
            **under({**SPEC, "budget": {"gpuHours": 2}}),
        ),
        "Queued",
        "PreflightPassed",
        says="goes on from step 40",
    ),
    Row(
        "and is one where there is none",
        world(
            said("Preflight", "Checking", usage=OVER, checkpoint=CheckpointStatus(step=40)),
            p(),
            ended(p(), 0, outcome("Resume", 40).model_copy(update={"result": PARTIAL.result})),
            **under({**BUDGET, "retries": {"max": 1}}),
        ),
        "Succeeded",
        "StoppedAtBest",
    ),
    Row(
        "an attempt that was told to end when the deadline was raised ends and goes on in the next one",
        world(stopped("DeadlineExceeded"), *running(3700), **under({**SPEC, "deadline": "2h"})),
        "Training",
        "StoppingPreviousRun",
        "delete t1",
    ),
    Row(
        "what waits in a queue for the second time takes no time",
        world(
            spent(3000, run=RunStatus(id=RUN, generation=1, placed_at=format_time(ago(9000)))),
            t(created=ago(9999), suspended=True),
            **under(DEADLINE),
        ),
        "Queued",
        "JobSuspended",
    ),
    Row(
        "an attempt that only finishes and is interrupted is begun again as such",
        world(
            spent(3600, attempts=2, checkpoint=CheckpointStatus(step=40)),
            FINISHING,
            ended(FINISHING, 45, started=ago(60)),
            **under(BUDGET),
        ),
        "Starting",
        "Stopped",
        "begin t3, delete t2",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_fact(row: Row) -> None:
    decision = settled(row.given)
    assert short(decision) == row.does
    if row.again is not None:
        assert decision.again_after == pytest.approx(row.again)
    status = decision.status
    assert status is not None
    assert (status.phase, reason_of(status)) == (row.phase, row.reason), status.message
    assert row.says in (status.message or "")
    assert truth(status, "Stalled") == str(row.stalled or row.phase == "Failed")
    if row.passed is not None:
        assert truth(status, "PreflightPassed") == row.passed


def begun(given: Observed) -> CreateTrain:
    return next(action for action in settled(given).actions if isinstance(action, CreateTrain))


def test_the_next_attempt_is_told_to_finish_only_while_the_budget_is_used_up() -> None:
    assert begun(world(stopped("BudgetExhausted"), **under(BUDGET))).counters.finish
    assert not begun(world(stopped("BudgetExhausted"), **under({**SPEC, "budget": {"gpuHours": 2}}))).counters.finish
    again = world(
        spent(3600, attempts=2, checkpoint=CheckpointStatus(step=40)),
        FINISHING,
        ended(FINISHING, 45, started=ago(60)),
        **under(BUDGET),
    )
    assert begun(again).counters.finish


def test_an_attempt_that_is_stopped_for_a_limit_is_paid_once() -> None:
    given = world(spent(3000), *running(600), **under(DEADLINE))
    first = decide(given, now=NOW)
    assert (short(first), first.again_after) == ("", 0.0)
    assert first.status is not None
    assert first.status.usage == Usage(gpu_seconds=3600, running_seconds=3600, counted=1, attempts=1, lost_steps=0)
    second = decide(replace(given, subject=replace(given.subject, status=first.status)), now=NOW)
    assert short(second) == "delete t1"
    assert second.status is None or second.status.usage == first.status.usage


def test_a_result_that_is_looked_at_again_is_paid_once() -> None:
    """Its Job stays for a while, so that a raised budget sees it once more."""
    done = world(spent(3600, attempts=2), FINISHING, ended(FINISHING, 0, PARTIAL, started=ago(60)), **under(BUDGET))
    status = settled(done).status
    assert status is not None
    assert status.usage is not None
    assert (status.usage.gpu_seconds, status.usage.counted) == (3660, 2)
    raised = under({**SPEC, "budget": {"gpuHours": 2}}, generation=2)
    again = settled(
        world(replace(done.subject, status=status).status, FINISHING, ended(FINISHING, 0, PARTIAL), **raised)
    ).status
    assert again is not None
    assert again.usage is not None
    assert again.usage.gpu_seconds == 3660


def test_a_raised_budget_is_why_the_run_goes_on_also_where_pods_are_others_by_then() -> None:
    """The profile has more than one node, or a newer operator another image: such Jobs have another key."""
    raised = {**TWO_NODES, "budget": {"gpuHours": 2}}
    pins = {1: pinned(BUDGET), 2: pinned(raised, generation=2)}
    passed = said("Queued", "PreflightPassed", generation=2, passed="True", usage=OVER)
    job, pods = FINISHING, ended(FINISHING, 0, PARTIAL)
    status = settled(world(passed, job, pods, subject=subject(raised, generation=2), pinned=pins)).status
    assert status is not None
    assert [restart.reason for restart in status.restarts or []] == ["BudgetRaised"]


def test_a_partial_success_shows_how_much_is_done() -> None:
    given = world(spent(3600, attempts=2), FINISHING, ended(FINISHING, 0, PARTIAL, started=ago(60)), **under(BUDGET))
    status = settled(given).status
    assert status is not None
    assert status.progress is not None
    assert (status.progress.step, status.progress.total_steps, status.progress.percent) == (40, 100, 40)


def test_what_is_stopped_when_it_is_first_seen_on_its_node_says_since_when_it_was_there() -> None:
    job = t(created=ago(40))
    brief = {**SPEC, "budget": {"gpuHours": 0.01, "onExhausted": "Fail"}}
    told = decide(world(GO, job, pod(job, started=ago(37)), **under(brief)), now=NOW).status
    assert told is not None
    assert told.run is not None
    assert (reason_of(told), told.run.placed_at) == ("BudgetExhausted", format_time(ago(37)))


def test_what_goes_on_beside_a_changed_document_is_stopped_by_the_limits_of_its_own() -> None:
    changed = {**CHANGED, "pinned": {**CHANGED["pinned"], 1: pinned(DEADLINE)}}
    looks = p(2, generation=2, key=FASTER_KEY)
    given = world(spent(3000), *running(700), looks, pod(looks), **changed)
    assert short(settled(given)) == "delete t1"


# --- clocks ---

YEAR = timedelta(days=365)


def looked(given: Observed, *, operator: timedelta) -> str:
    """The reason that is given when the operator's clock is wrong by so much."""
    first = decide(given, now=NOW + operator)
    return reason_of(first.status or given.subject.status)


@pytest.mark.parametrize("wrong", [YEAR, -YEAR, timedelta(hours=2), timedelta()])
def test_while_it_trains_the_operators_clock_does_not_matter(wrong: timedelta) -> None:
    assert looked(world(spent(3000), *running(60), **under(DEADLINE)), operator=wrong) == "Training"


@pytest.mark.parametrize("wrong", [YEAR, -YEAR])
@pytest.mark.parametrize("stage", ["Loading", "Evaluating", None])
def test_one_that_says_nothing_new_is_charged_ten_minutes_at_most(wrong: timedelta, stage: str | None) -> None:
    job, its_pod, _ = running(60)
    told = [] if stage is None else [telling(NOW, stage)]
    calm = world(spent(3600 - 60 - int(UNHEARD.total_seconds()) - 1), job, its_pod, *told, **under(DEADLINE))
    assert looked(calm, operator=wrong) != "DeadlineExceeded"


def test_a_silence_that_this_process_has_watched_counts_in_full() -> None:
    """A network that keeps the operator from the pods must not make a job endless."""
    began = ago(7300)
    job = t(created=began)
    given = world(spent(0), job, pod(job, started=began), **under(DEADLINE))
    assert short(settled(given)) == "", "ten minutes, of which nobody knows more"
    assert short(settled(replace(given, silent=timedelta(hours=2)))) == "delete t1"


def test_a_nodes_clock_that_jumps_ahead_is_not_believed() -> None:
    job, its_pod, _ = running(60)
    given = world(spent(2000), job, its_pod, telling(NOW + YEAR), **under(DEADLINE))
    assert looked(given, operator=timedelta()) == "Training"
    over = world(spent(2000), job, ended(job, 45, at=-YEAR.total_seconds(), started=ago(60)), **under(DEADLINE))
    status = decide(over, now=NOW).status
    assert status is not None
    assert status.usage is not None
    assert status.usage.running_seconds == 2000 + 60 + 600


def test_a_nodes_clock_that_is_behind_counts_from_the_job() -> None:
    job, its_pod, _ = running(60)
    given = world(
        spent(3000), job, replace(its_pod, started=ago(YEAR.total_seconds())), telling(NOW), **under(DEADLINE)
    )
    assert looked(given, operator=timedelta()) == "Training"
    early = world(spent(3000), job, replace(its_pod, started=NOW + YEAR), telling(NOW - YEAR), **under(DEADLINE))
    assert looked(early, operator=timedelta()) == "Training"


def test_an_answer_that_is_no_time_is_no_news() -> None:
    job, its_pod, _ = running(60)
    assert looked(world(spent(3000), job, its_pod, progress(), **under(DEADLINE)), operator=timedelta()) == "Training"


def test_pods_that_are_gone_before_the_attempt_ends_are_paid_from_when_they_got_their_node() -> None:
    """Not from when the Job was made: it may have waited for hours."""
    job, its_pod, told = running(60)
    job = replace(job, created=ago(9999))
    seen = decide(world(spent(0), job, its_pod, told, **under(DEADLINE)), now=NOW).status
    assert seen is not None
    assert seen.run is not None
    assert seen.run.placed_at == format_time(ago(60))
    gone = replace(job, ended="Failed", ended_at=ago(0))
    status = decide(world(seen, gone, **under(DEADLINE)), now=NOW).status
    assert status is not None
    assert status.usage is not None
    assert status.usage.running_seconds == 60


def test_the_time_of_an_earlier_attempt_is_not_taken_for_that_of_this_one() -> None:
    earlier = RunStatus(id=RUN, generation=1, placed_at=format_time(ago(5000)))
    gone = t(2, created=ago(100), ended="Failed", ended_at=ago(10))
    status = decide(world(spent(0, attempts=2, run=earlier), gone, **under(DEADLINE)), now=NOW).status
    assert status is not None
    assert status.usage is not None
    assert status.usage.running_seconds == 90


WAITED = said("Queued", "Unschedulable", passed="True", usage=Usage(attempts=1))


@pytest.mark.parametrize(
    "pods",
    [(), (pod(t(), node=None, running=False, phase="Failed"),)],
    ids=["its pods are gone", "its pod is there"],
)
def test_an_attempt_that_ends_before_it_got_a_node_takes_no_time(pods: tuple[Any, ...]) -> None:
    """A pod that no node fits, say, and that somebody deletes after a day and more."""
    gone = t(created=ago(108_000), ended="Failed", ended_at=ago(10))
    status = decide(world(WAITED, gone, *pods, **under(BOTH)), now=NOW).status
    assert status is not None
    assert status.usage is not None
    assert (status.usage.running_seconds, status.usage.gpu_seconds, status.usage.counted) == (0, 0, 1)
    assert reason_of(status) not in ("DeadlineExceeded", "BudgetExhausted")


@pytest.mark.parametrize(
    "told",
    [
        TRAINING,
        said("Queued", "Unschedulable", passed="True", run=OTHER_RUN, usage=Usage(attempts=1)),
        said("Queued", "PodsPending", passed="True", usage=Usage(attempts=2)),
        FineTuneJobStatus(),
    ],
    ids=["it was seen training", "another run waited", "another attempt waits", "nothing is known"],
)
def test_an_attempt_without_pods_is_paid_from_its_job_unless_it_was_seen_to_wait(told: FineTuneJobStatus) -> None:
    gone = t(created=ago(100), ended="Failed", ended_at=ago(10))
    status = decide(world(told, gone, **under(DEADLINE)), now=NOW).status
    assert status is not None
    assert status.usage is not None
    assert status.usage.running_seconds == 90


def test_an_old_attempt_is_paid_from_its_job_when_a_preflight_of_the_same_run_has_passed() -> None:
    """Other resources. That status is Queued as well, but not because the old attempt has waited."""
    more = {**FOUR_GPUS, "deadline": "1h"}
    changed = {"subject": subject(more, generation=2), "pinned": {1: pinned(), 2: pinned(more, generation=2)}}
    passed = said("Queued", "PreflightPassed", generation=2, passed="True", usage=Usage(attempts=1))
    gone = t(created=ago(100), ended="Failed", ended_at=ago(10))
    status = decide(world(passed, gone, **changed), now=NOW).status
    assert status is not None
    assert status.usage is not None
    assert status.usage.running_seconds == 90


def rated(given: Observed, **rates: float) -> Observed:
    """With a profile that says what a GPU costs and draws."""
    made = given.pinned[1]
    limits = made.config.limits.model_copy(update=rates)
    return replace(given, pinned={1: replace(made, config=made.config.model_copy(update={"limits": limits}))})


def test_what_the_gpus_cost_and_drew_is_told_at_the_rates_of_the_profile() -> None:
    """Two hours on one GPU; another hour was paid before."""
    before = spent(3600, attempts=2)
    assert before.usage is not None
    paid = before.model_copy(update={"usage": before.usage.model_copy(update={"cost": 2.0, "kilowatt_hours": 0.5})})
    job = t(2, created=ago(7300), ended="Failed", ended_at=ago(0))
    given = world(paid, job, ended(job, 1, at=0, started=ago(7200)), **under(SPEC))
    usage = _told(rated(given, gpu_hour_price=2.5, gpu_watts=700)).usage
    assert usage is not None
    assert (usage.gpu_seconds, usage.cost, usage.kilowatt_hours) == (10800, 7.0, 1.9)
    unrated = _told(given).usage
    assert unrated is not None
    assert (unrated.cost, unrated.kilowatt_hours) == (2.0, 0.5), "what was told stays, though no rate is known any more"


def preempted(*, until: float, again: float | None = None) -> Observed:
    """An attempt that got its node 600 s ago, was suspended `until` s ago, and got another one `again` s ago."""
    job = t(created=ago(650), released=ago(again or 650), key=pinned(FOUR_GPUS).key)
    seen = spent(0, run=RunStatus(id=RUN, generation=1, placed_at=format_time(ago(600))))
    gone = world(seen, replace(job, suspended=True, suspended_at=ago(until)), **under(FOUR_GPUS))
    if again is None:
        return gone
    told = _told(gone)
    return world(told, job, pod(job, started=ago(again)), telling(NOW), **under(FOUR_GPUS))


def _told(given: Observed, *, after: float = 0) -> FineTuneJobStatus:
    """The status that is written so many seconds later than NOW."""
    status = decide(given, now=NOW + timedelta(seconds=after)).status
    assert status is not None
    return status


def test_what_an_attempt_took_before_it_was_suspended_is_paid_once_its_pods_are_gone() -> None:
    status = _told(preempted(until=0))
    assert status.usage is not None
    assert (status.usage.running_seconds, status.usage.gpu_seconds, status.usage.counted) == (600, 2400, 0)
    assert status.run is not None
    assert status.run.placed_at is None
    assert (status.phase, reason_of(status)) == ("Queued", "JobSuspended")
    again = replace(preempted(until=0), subject=replace(preempted(until=0).subject, status=status))
    assert decide(again, now=NOW).status is None, "nothing is paid twice"


def test_it_is_paid_also_where_the_attempt_is_stopped_at_the_next_look() -> None:
    """The operator was away while a queue took the place away and somebody suspended the job."""
    given = preempted(until=0)
    halted = {**FOUR_GPUS, "suspend": True}
    subject_ = replace(given.subject, spec=halted, generation=2)
    status = _told(replace(given, subject=subject_, pinned={**given.pinned, 2: pinned(halted, generation=2)}))
    assert status.usage is not None
    assert (status.usage.running_seconds, status.usage.gpu_seconds, status.usage.counted) == (600, 2400, 1)
    assert status.run is not None
    assert status.run.placed_at is None


def test_its_pods_have_their_grace_period_to_end_and_are_paid_no_longer() -> None:
    grace = pinned().config.pods.grace_seconds
    status = _told(preempted(until=400))
    assert status.usage is not None
    assert status.usage.running_seconds == min(600, 200 + grace)


def test_once_it_goes_on_the_rest_of_the_attempt_is_added() -> None:
    resumed = preempted(until=300, again=100)
    before = resumed.subject.status.usage
    assert before is not None
    ended_now = replace(resumed, pods=(), children=(replace(resumed.children[0], ended="Failed", ended_at=ago(0)),))
    seen = _told(resumed)
    status = _told(replace(ended_now, subject=replace(resumed.subject, status=seen), progress=None))
    assert status.usage is not None
    assert before.running_seconds is not None
    assert status.usage.running_seconds == before.running_seconds + 100


# --- what goes on ---


def seen(given: Observed, status: FineTuneJobStatus, **changes: Any) -> Observed:
    """The same at another look, after this status was written."""
    return replace(given, subject=replace(given.subject, status=status), **changes)


def test_what_an_attempt_takes_is_told_while_it_goes_on() -> None:
    """Two nodes of two GPUs, the second of them for 50 seconds less; an hour was paid before."""
    job = t(2, created=ago(1000), key=pinned(FOUR_GPUS).key)
    pods = pod(job, started=ago(150)), pod(job, name="second", index=1, started=ago(100))
    before = Usage(gpu_seconds=3600, running_seconds=900, counted=1, attempts=2)
    given = world(spent(0, usage=before), job, *pods, telling(NOW), **under({**FOUR_GPUS, **BIG}))
    taken = Ongoing(attempt=2, gpu_seconds=2 * 150 + 2 * 100, running_seconds=150)
    wanted = Usage(gpu_seconds=4100, running_seconds=1050, ongoing=taken, counted=1, attempts=2)
    assert _told(given).usage == wanted
    assert wanted.settled == before


def test_that_it_takes_more_is_no_write_of_its_own() -> None:
    """A trainer that loads says nothing new; an hour later it has taken an hour more."""
    job, its_pod, _ = running(60)
    given = world(said("Queued", "PodsPending", passed="True", usage=Usage(attempts=1)), job, its_pod)
    status = _told(given)
    assert status.usage is not None
    assert status.usage.running_seconds == 60
    later = seen(given, status, silent=timedelta(hours=1))
    assert decide(later, now=NOW + timedelta(hours=1)).status is None
    news = replace(later, progress=telling(NOW + timedelta(hours=1)))
    usage = _told(news, after=3600).usage
    assert usage is not None
    assert usage.running_seconds == 3660


def test_a_budget_and_the_sums_have_an_attempt_once_that_was_told_while_it_went_on() -> None:
    job, its_pod, told = running(500)
    given = world(spent(3000), job, its_pod, told, **under(STRICT))
    status = _told(given)
    assert status.usage is not None
    assert (status.usage.gpu_seconds, status.usage.ongoing) == (
        3500,
        Ongoing(attempt=1, gpu_seconds=500, running_seconds=500),
    )
    almost = replace(given, progress=telling(NOW + timedelta(seconds=99)))
    assert short(settled(seen(almost, status))) == ""
    over = seen(replace(given, progress=telling(NOW + timedelta(seconds=100))), status)
    assert short(settled(over)) == "delete t1"
    paid = _told(over).usage
    assert paid is not None
    assert (paid.gpu_seconds, paid.running_seconds, paid.ongoing, paid.counted) == (3600, 3600, None, 1)
    crashed = world(status, replace(job, created=ago(605)), ended(job, 1, at=0, started=ago(510)), **under(STRICT))
    usage = _told(crashed).usage
    assert usage is not None
    assert (usage.gpu_seconds, usage.ongoing, usage.counted) == (3510, None, 1)


def test_money_and_energy_are_told_live_and_are_those_of_the_end_in_the_end() -> None:
    """Rates of which no multiple is a round number."""
    job, its_pod, told = running(1000)
    given = rated(world(spent(100), job, its_pod, told, **under(SPEC)), gpu_hour_price=2.497, gpu_watts=713)
    before = given.subject.status.usage
    assert before is not None
    given = seen(given, spent(100, usage=before.model_copy(update={"cost": 1.2346, "kilowatt_hours": 0.0555})))
    status = _told(given)
    assert status.usage is not None
    taken = Ongoing(attempt=1, gpu_seconds=1000, running_seconds=1000, cost=0.6936, kilowatt_hours=0.1981)
    assert status.usage.ongoing == taken
    assert (status.usage.cost, status.usage.kilowatt_hours) == (1.9282, 0.2536)
    done = world(status, job, ended(job, 1, at=0, started=ago(1000)), **under(SPEC))
    usage = _told(rated(done, gpu_hour_price=2.497, gpu_watts=713)).usage
    assert usage is not None
    assert (usage.cost, usage.kilowatt_hours, usage.ongoing) == (1.9282, 0.2536, None)


@given_(
    cost=st.none() | st.integers(0, 10**9).map(lambda units: units / 10_000),
    price=st.none() | st.floats(0, 10_000),
    seconds=st.integers(0, 10**7),
    before=st.integers(0, 10**8),
)
def test_what_was_added_is_taken_out_to_the_last_digit(
    cost: float | None, price: float | None, seconds: int, before: int
) -> None:
    usage = Usage(gpu_seconds=before, running_seconds=before, cost=cost)
    part = Cost(1, running=seconds, gpu=seconds, hour_price=price)
    both = usage.model_copy(update={**part.on(usage), "ongoing": Ongoing(attempt=1, **part.on(Usage()))}).settled
    assert (both.gpu_seconds or 0, both.running_seconds or 0, both.cost or 0) == (before, before, cost or 0)
    assert both.ongoing is None


def test_an_attempt_that_waits_for_its_node_has_taken_nothing_yet() -> None:
    given = world(spent(3000), t(created=ago(9999)), pod(t(), node=None, running=False), **under(DEADLINE))
    assert _told(given).usage == spent(3000).usage


def test_what_was_told_of_an_attempt_whose_job_vanished_is_paid() -> None:
    """Nobody knows when it ended. The next attempt is added to it."""
    job, its_pod, told = running(500)
    given = world(spent(3000), job, its_pod, told, **under(SPEC))
    status = _told(given)
    gone = world(status, **under(SPEC))
    lost = _told(gone)
    assert [restart.reason for restart in lost.restarts or []] == ["JobLost"]
    looked_at = world(lost, p(), ended(p(), 0, outcome("Resume", 30)), **under(SPEC))
    begun_again = settled(seen(gone, _told(looked_at))).status
    assert begun_again is not None
    assert begun_again.usage == Usage(gpu_seconds=3500, running_seconds=3500, counted=0, attempts=2, lost_steps=10)
    second = t(2, created=ago(50))
    usage = _told(world(begun_again, second, pod(second, started=ago(40)), telling(NOW), **under(SPEC))).usage
    assert usage is not None
    assert usage.ongoing == Ongoing(attempt=2, gpu_seconds=40, running_seconds=40)
    assert (usage.gpu_seconds, usage.running_seconds) == (3540, 3540)


def test_one_that_had_only_vanished_from_sight_is_not_paid_twice() -> None:
    """Somebody took its Job's label away, and put it back."""
    job, its_pod, told = running(500)
    given = world(spent(3000), job, its_pod, told, **under(SPEC))
    lost = _told(world(_told(given), **under(SPEC)))
    usage = _told(replace(seen(given, lost), progress=telling(NOW + timedelta(seconds=20)))).usage
    assert usage is not None
    assert (usage.gpu_seconds, usage.ongoing) == (3520, Ongoing(attempt=1, gpu_seconds=520, running_seconds=520))


def test_what_is_over_or_rests_has_nothing_that_goes_on() -> None:
    job, its_pod, told = running(500)
    status = _told(world(spent(3000), job, its_pod, told, **under(SPEC)))
    lost = _told(world(status, **under(SPEC)))
    reused = _told(world(lost, p(), ended(p(), 0, outcome("Reused")), **under(SPEC)))
    halted = {**SPEC, "suspend": True}
    rests = settled(world(status, subject=subject(halted, generation=2), pinned={1: pinned()})).status
    for after in (reused, rests):
        assert after is not None
        assert after.usage is not None
        assert (after.usage.gpu_seconds, after.usage.ongoing) == (3500, None)


def test_what_was_told_before_a_queue_took_the_place_away_is_paid_once() -> None:
    job = t(created=ago(650), key=pinned(FOUR_GPUS).key)
    going = world(spent(0), job, pod(job, started=ago(600)), telling(ago(10)), **under({**FOUR_GPUS, **BIG}))
    status = _told(going)
    assert status.usage is not None
    assert status.usage.ongoing is not None
    away = seen(going, status, pods=(), progress=None)
    taken = _told(replace(away, children=(replace(job, suspended=True, suspended_at=ago(0)),))).usage
    assert taken is not None
    assert (taken.running_seconds, taken.gpu_seconds, taken.ongoing) == (600, 2400, None)


def test_what_was_taken_before_a_place_that_came_back_at_once_is_paid_too() -> None:
    """The old pods end after the Job was resumed: nobody ever sees it suspended and without pods."""
    spec = {**FOUR_GPUS, **BIG}
    job = t(created=ago(650), released=ago(100), key=pinned(spec).key)
    old, new = pod(job, started=ago(600), gone_by=ago(-20), was_asked_to_go=True), pod(job, name="b", started=ago(90))
    seen = spent(0, run=RunStatus(id=RUN, generation=1, placed_at=format_time(ago(600))))
    both = _told(world(seen, job, old, telling(ago(110)), **under(spec))).usage
    assert both is not None
    assert both.counted == 0
    assert both.ongoing is not None
    status = _told(world(seen, job, new, **under(spec)))
    assert status.usage is not None
    assert (status.usage.running_seconds, status.usage.gpu_seconds, status.usage.ongoing) == (500, 2000, None)
    usage = _told(world(status, job, new, telling(NOW), **under(spec))).usage
    assert usage is not None
    assert (usage.running_seconds, usage.ongoing and usage.ongoing.running_seconds) == (590, 90)


def test_another_run_of_the_same_job_goes_on_with_what_was_used() -> None:
    told = said("Queued", "PreflightPassed", passed="True", run=OTHER_RUN, usage=OVER)
    assert reason_of(settled(world(told, **under(DEADLINE))).status or told) == "DeadlineExceeded"


@pytest.mark.parametrize(
    ("seconds", "words"), [(3600, "1h"), (5400.9, "1h30m"), (45, "45s"), (0, "0s"), (3601, "1h1s"), (600, "10m")]
)
def test_times_are_told_as_a_document_has_them(seconds: float, words: str) -> None:
    assert spoken(seconds) == words
