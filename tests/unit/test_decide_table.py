"""What a FineTuneJob says of itself, as a table: whatever it said before, and whatever is seen of it now.

Columns are phases it was in, rows what is seen. A cell is what the next look says:

    looks   Preflight     something is on its way
    mends   Pending       nothing moves until somebody mends something
    stuck   Starting      the same of an attempt that has its node
    queues  Queued        on its way
    starts  Starting      on its way
    trains  Training      on its way
    rates   Evaluating    on its way
    ends    Suspended     on its way: what runs still commits a checkpoint
    rests   Suspended     nothing is on its way, and nothing is wrong
    done    Succeeded     over
    fails   Failed        over, and somebody has to do something
    -       left alone, as it was

kstatus, and all that waits by it, reads the same from the conditions: InProgress, Failed or Current.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.unit.test_decide import (
    NOW,
    PREFLIGHT,
    REFUSED,
    SPEC,
    TRAINED,
    UNMET,
    ago,
    ended,
    message,
    outcome,
    p,
    pinned,
    pod,
    progress,
    rival,
    said,
    subject,
    t,
    unmet,
    world,
)
from tests.unit.test_status import kstatus, truths

from finetune_api.status import CheckpointStatus, FineTuneJobStatus, ProgressStatus, Usage
from finetune_operator.decide import decide
from finetune_operator.verdict import CreatePreflight, CreateTrain, Observed
from finetune_operator.views import Child, Counters, Pod


@dataclass(frozen=True)
class Word:
    """What a cell stands for."""

    phase: str
    reconciling: bool
    stalled: bool
    kstatus: str
    suspended: bool = False
    succeeded: str = "Unknown"


WORDS = {
    "looks": Word("Preflight", True, False, "InProgress"),
    "mends": Word("Pending", False, True, "Failed"),
    "stuck": Word("Starting", False, True, "Failed"),
    "waits": Word("Pending", True, False, "InProgress"),
    "queues": Word("Queued", True, False, "InProgress"),
    "starts": Word("Starting", True, False, "InProgress"),
    "trains": Word("Training", True, False, "InProgress"),
    "rates": Word("Evaluating", True, False, "InProgress"),
    "ends": Word("Suspended", True, False, "InProgress"),
    "rests": Word("Suspended", False, False, "Current", suspended=True),
    "done": Word("Succeeded", False, False, "Current", succeeded="True"),
    "fails": Word("Failed", False, True, "Failed", succeeded="False"),
}

RUNS: dict[str, Any] = {
    "passed": "True",
    "usage": Usage(attempts=1),
    "progress": ProgressStatus(step=40, total_steps=100, percent=40),
    "checkpoint": CheckpointStatus(step=30),
}
BEFORE: dict[str, FineTuneJobStatus] = {
    "new": FineTuneJobStatus(),
    "Pending": said("Pending", "BucketNotFound", run=None),
    "Preflight": PREFLIGHT,
    "Queued": said("Queued", "PreflightPassed", passed="True"),
    "Starting": said("Starting", "Loading", **RUNS),
    "Training": said("Training", "Training", **RUNS),
    "Evaluating": said("Evaluating", "Evaluating", **RUNS),
    "Suspended": said("Suspended", "Suspended", usage=Usage(attempts=1), checkpoint=CheckpointStatus(step=30)),
    "Succeeded": said("Succeeded", "Trained", passed="True"),
    "Failed": said("Failed", "ColumnMissing", passed="False", run=None),
}
GONE_SOON = ago(-100)
SEEN: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "a preflight pod works": (p(), pod(p())),
    "preflight waits for a node": (p(), pod(p(), node=None, running=False, unschedulable="no room")),
    "preflight gets no image": (p(), pod(p(), running=False, waiting=("ErrImagePull", "no such tag"))),
    "preflight has passed": (p(), ended(p(), 0, outcome("Fresh"))),
    "preflight finds a checkpoint": (p(), ended(p(), 0, outcome("Resume", 30))),
    "preflight finds the very model": (p(), ended(p(), 0, outcome("Reused"))),
    "preflight finds it too bad": (p(), ended(p(), 48, unmet())),
    "preflight has refused the data": (p(), ended(p(), 42, message(42, "ColumnMissing"))),
    "preflight misses the bucket": (p(), ended(p(), 49, message(49, "BucketNotFound"), at=2)),
    "preflight has crashed": (p(), ended(p(), 1, at=1)),
    "a twin trains": (rival(holding=True),),
    "a train pod waits for a node": (t(), pod(t(), node=None, running=False)),
    "a train Job is in a queue": (t(suspended=True),),
    "a train pod pulls its image": (t(), pod(t(), running=False, waiting=("ContainerCreating", ""))),
    "a train pod gets no image": (t(), pod(t(), running=False, waiting=("ErrImagePull", "no such tag"))),
    "a node refuses the train pod": (t(), pod(t(), **REFUSED)),
    "the trainer loads": (t(), pod(t()), progress("Loading", 0)),
    "the trainer trains": (t(), pod(t()), progress()),
    "the trainer evaluates": (t(), pod(t()), progress("Evaluating", 100)),
    "the trainer publishes": (t(), pod(t()), progress("Publishing", 100)),
    "the trainer says nothing": (t(), pod(t())),
    "the model is there": (t(), ended(t(), 0, TRAINED)),
    "a gate is not met": (t(), ended(t(), 48, UNMET)),
    "the message is lost": (t(ended="Complete", ended_at=ago(1)),),
    "the trainer has crashed": (t(), ended(t(), 1, at=1)),
    "it has crashed too often": (t(4, counters=Counters(failures=3)), ended(t(4), 1)),
    "it has diverged": (t(), ended(t(), 47, message(47, "Diverged"))),
    "its memory is used up": (t(), ended(t(), 50, message(50, "GpuOutOfMemory"))),
    "it was evicted": (t(), ended(t(), 137, disrupted="EvictionByEvictionAPI")),
    "storage went away": (t(), ended(t(), 49, message(49, "Unreachable"), at=3)),
    "it is fenced": (t(), ended(t(), 44, message(44, "Fenced"), at=3)),
    "a pod that was drained commits": (
        t(ended="Failed", ended_at=ago(0)),
        pod(t(), gone_by=GONE_SOON, was_asked_to_go=True),
    ),
    "a pod without a Job commits": (pod(t(), gone_by=GONE_SOON, was_asked_to_go=True),),
    "a pod without a Job is over": (ended(t(), 45, message(45, "Stopped", run_id="a" * 16, step=35)),),
}

# fmt: off
UNCHANGED = """
                               | new    Pending Preflight Queued Starting Training Evaluating Suspended Succeeded Failed
nothing                        | looks  looks   looks     queues looks    looks    looks      looks     -         -
a preflight pod works          | looks  looks   looks     queues looks    looks    looks      looks     -         -
preflight waits for a node     | looks  looks   looks     queues looks    looks    looks      looks     -         -
preflight gets no image        | mends  mends   mends     queues looks    looks    looks      mends     -         -
preflight has passed           | queues queues  queues    queues looks    looks    looks      queues    -         -
preflight finds a checkpoint   | queues queues  queues    queues looks    looks    looks      queues    -         -
preflight finds the very model | done   done    done      queues looks    looks    looks      done      -         -
preflight finds it too bad     | fails  fails   fails     queues looks    looks    looks      fails     -         -
preflight has refused the data | fails  fails   fails     queues looks    looks    looks      fails     -         -
preflight misses the bucket    | mends  mends   mends     queues looks    looks    looks      mends     -         -
preflight has crashed          | looks  looks   looks     queues looks    looks    looks      looks     -         -
a twin trains                  | looks  looks   looks     waits  looks    looks    looks      looks     -         -
a train pod waits for a node   | queues queues  queues    queues queues   queues   queues     queues    -         -
a train Job is in a queue      | queues queues  queues    queues queues   queues   queues     queues    -         -
a train pod pulls its image    | starts starts  starts    starts starts   starts   starts     starts    -         -
a train pod gets no image      | stuck  stuck   stuck     stuck  stuck    stuck    stuck      stuck     -         -
a node refuses the train pod   | starts starts  starts    starts starts   starts   starts     starts    -         -
the trainer loads              | starts starts  starts    starts starts   starts   starts     starts    -         -
the trainer trains             | trains trains  trains    trains trains   trains   trains     trains    -         -
the trainer evaluates          | rates  rates   rates     rates  rates    rates    rates      rates     -         -
the trainer publishes          | rates  rates   rates     rates  rates    rates    rates      rates     -         -
the trainer says nothing       | starts starts  starts    starts starts   trains   rates      starts    -         -
the model is there             | done   done    done      done   done     done     done       done      -         -
a gate is not met              | fails  fails   fails     fails  fails    fails    fails      fails     -         -
the message is lost            | looks  looks   looks     looks  looks    looks    looks      looks     -         -
the trainer has crashed        | starts starts  starts    starts starts   starts   starts     starts    -         -
it has crashed too often       | fails  fails   fails     fails  fails    fails    fails      fails     -         -
it has diverged                | fails  fails   fails     fails  fails    fails    fails      fails     -         -
its memory is used up          | starts starts  starts    starts starts   starts   starts     starts    -         -
it was evicted                 | starts starts  starts    starts starts   starts   starts     starts    -         -
storage went away              | mends  mends   mends     mends  mends    mends    mends      mends     -         -
it is fenced                   | looks  looks   looks     looks  looks    looks    looks      looks     -         -
a pod that was drained commits | starts starts  starts    starts starts   trains   rates      starts    -         -
a pod without a Job commits    | looks  looks   looks     queues looks    looks    looks      looks     -         -
a pod without a Job is over    | looks  looks   looks     queues looks    looks    looks      looks     -         -
"""

SUSPENDED = """
                               | new    Pending Preflight Queued Starting Training Evaluating Suspended Succeeded Failed
nothing                        | rests  rests   rests     rests  rests    rests    rests      rests     done      fails
a preflight pod works          | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
preflight has passed           | rests  rests   rests     rests  rests    rests    rests      rests     done      fails
preflight finds the very model | rests  rests   rests     rests  rests    rests    rests      rests     done      fails
preflight misses the bucket    | rests  rests   rests     rests  rests    rests    rests      rests     done      fails
a twin trains                  | rests  rests   rests     rests  rests    rests    rests      rests     done      fails
a train pod waits for a node   | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
a train Job is in a queue      | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
a train pod gets no image      | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
the trainer loads              | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
the trainer trains             | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
the trainer evaluates          | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
the model is there             | done   done    done      done   done     done     done       done      done      fails
a gate is not met              | fails  fails   fails     fails  fails    fails    fails      fails     done      fails
the trainer has crashed        | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
it has crashed too often       | fails  fails   fails     fails  fails    fails    fails      fails     done      fails
it was evicted                 | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
storage went away              | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
a pod that was drained commits | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
a pod without a Job commits    | ends   ends    ends      ends   ends     ends     ends       ends      done      fails
a pod without a Job is over    | rests  rests   rests     rests  rests    rests    rests      rests     done      fails
"""
# fmt: on


@dataclass(frozen=True)
class Cell:
    seen: str
    before: str
    word: str
    suspended: bool

    @property
    def given(self) -> Observed:
        """The document is unchanged, but for spec.suspend, which moves its generation."""
        spec = {**SPEC, "suspend": True} if self.suspended else SPEC
        moved = self.suspended or self.before == "Suspended"
        generation = 2 if moved else 1
        document = subject(spec, generation=generation, status=BEFORE[self.before])
        both = {1: pinned(), generation: pinned(spec, generation=generation)}
        return world(None, *SEEN[self.seen], subject=document, pinned=both)


def cells(table: str, *, suspended: bool) -> list[Cell]:
    head, *lines = [line for line in table.splitlines() if line.strip()]
    phases = head.split("|")[1].split()
    found = []
    for line in lines:
        seen, _, words = line.partition("|")
        found += [Cell(seen.strip(), phase, word, suspended) for phase, word in zip(phases, words.split(), strict=True)]
    return found


CELLS = [*cells(UNCHANGED, suspended=False), *cells(SUSPENDED, suspended=True)]


def name(cell: Cell) -> str:
    return f"{'suspended: ' if cell.suspended else ''}{cell.before}: {cell.seen}"


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_the_next_look_says(cell: Cell) -> None:
    given = cell.given
    decision = decide(given, now=NOW)
    if cell.word == "-":
        assert (decision.status, decision.actions) == (None, ())
        return
    status, word = decision.status or given.subject.status, WORDS[cell.word]
    found = truths(status)
    assert status.phase == word.phase, status.message
    assert found["Reconciling"] == str(word.reconciling)
    assert found["Stalled"] == str(word.stalled)
    assert found["Suspended"] == str(word.suspended)
    assert found["Succeeded"] == word.succeeded
    assert kstatus(status, generation=given.subject.generation) == word.kstatus


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_whatever_is_said_it_says_why_and_of_which_generation(cell: Cell) -> None:
    status = decide(cell.given, now=NOW).status
    if status is None:
        return
    assert status.message
    assert status.observed_generation == cell.given.subject.generation
    for condition in status.conditions or []:
        assert condition.observed_generation == cell.given.subject.generation
        assert condition.reason
    assert len(status.conditions or []) == 7


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.suspended], ids=name)
def test_what_is_suspended_begins_nothing(cell: Cell) -> None:
    """Also in the looks that follow, while what runs goes away."""
    given = cell.given
    for _ in range(4):
        decision = decide(given, now=NOW)
        assert not [a for a in decision.actions if isinstance(a, CreatePreflight | CreateTrain)]
        gone = {getattr(action, "uid", None) for action in decision.actions}
        given = replace(
            given,
            subject=replace(given.subject, status=decision.status or given.subject.status),
            children=tuple(child for child in given.children if child.uid not in gone),
            pods=tuple(one for one in given.pods if one.owner not in gone and one.gone_by is None),
        )
    assert given.subject.status.phase in ("Suspended", "Succeeded", "Failed")
    assert truths(given.subject.status)["Reconciling"] == "False"
    assert not [child for child in given.children if child.ended is None and not _over(given, child)]


def _over(o: Observed, child: Child) -> bool:
    return any(one.owner == child.uid and one.over for one in o.pods if isinstance(one, Pod))


def test_every_phase_meets_everything_that_can_be_seen() -> None:
    assert {cell.seen for cell in CELLS if not cell.suspended} == set(SEEN)
    assert {cell.before for cell in CELLS} == set(BEFORE)
    assert {cell.word for cell in CELLS} == {*WORDS, "-"}
    assert len(CELLS) >= 200
