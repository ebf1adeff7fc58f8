"""Writes docs/failures.md: every way an attempt can end and what follows, out of the operator's own tables.

python hack/failures.py [--check]
"""

import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import count
from pathlib import Path

from finetune_operator.policies.restarts import (
    DELAYS,
    FREE_WITHOUT_PROGRESS,
    INTERRUPTED,
    KEPT,
    LONGEST,
    environment_delay,
)
from finetune_operator.policies.waiting import CAUSES
from finetune_operator.policies.ways import RULES, WAYS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs/failures.md"

TEXT = """\
# When something dies

An attempt is one train Job. Whatever ends it, the run goes on from its last committed step, or the status says why
not. The tables are the operator's own, written by `hack/failures.py`: it knows no other way of ending.

## Rules

Delays count from the end of the attempt before. A preflight pod that is taken away or lost is tried again after
{preflight}. So is a preflight Job that somebody deletes, up to a half
sooner or later, so that many that one program has deleted do not come back at one moment. What was counted, and when
the next try is due, stands in the status, too (`status.run`, `status.preflightJob`): neither goes with the Job that
has failed, which `ttlAfterFinished` or a program may delete. Where it is gone, the next attempt begins with a
preflight.

{rules}

`retries.max` bounds only what is counted, over the whole run. What is not counted is bounded by what it wins: an
attempt that commits one more step starts the count (`status.run.interruptions`) anew. Baselines, evaluation and
publication commit no step, so {interruptions} interruptions in a row end them as well, however much each attempt has
measured: what is to be done before the first step, or after the last, has to fit into {interruptions} attempts.
Finished measurements are kept, though, and of one that goes on what the model has answered, once a minute: the next
attempt goes on from there.
After `Failed`, change the annotation `finetune.dev/retry` (any other value) to go on from the last committed step, with
the rows the run began with ([when the rows change](data.md#when-the-rows-change)).

## Ways of ending

Of several pods the most telling code counts, in the order of this table; the pods that the Job controller deletes
because one has failed do not count at all. A crash or a hang beside a pod whose node is lost, or that the cluster
took away, is that pod's doing: one pod's end restarts the whole group, from the same record.

{ways}

A reason in the status may be more exact than the table: a pod's last message has the trainer's own word
(`ColumnMissing`, `BucketNotFound`).

## What pods wait for

None of these ends an attempt, and none is counted. `Stalled` means that nothing moves until somebody mends something;
then it goes on by itself.

{causes}

## What the API server refuses

Each is tried again every minute, and goes on by itself once it may. Meanwhile `Stalled` is true and has this reason.

{refusals}

## A node that dies

1. Kubernetes notices after about 50 seconds: the pod is no longer Ready, and the status says `NodeSilent`. Its peers
   may have crashed or hung by then, and are not blamed for it.
2. After 5 minutes more (a toleration of `node.kubernetes.io/unreachable` with a lower `tolerationSeconds` in
   `podTemplate.spec.tolerations` shortens that) the pod is deleted, but its object stays, Terminating, until the node
   answers or is removed.
3. The Job controller counts a pod that is Terminating as failed and puts the Job at `FailureTarget`. `Failed` would
   wait for the dead node, for ever. (A `podFailurePolicy` would make it wait here, too; therefore the Jobs have none,
   and `backoffLimit: 0`. The train Job of a queue waits, so that its old pods may commit a checkpoint before the next
   admission begins new ones; of such a Job the operator goes by the pod and its node.)
4. The operator acts on `FailureTarget`: it begins the next Job and deletes the old one in the background, waiting for
   neither Job nor pod. (Pods on nodes that answer get the time they were given to commit a checkpoint, first.)
5. Should the old node come back with a trainer that still runs, that one cannot commit anything: the new attempt's
   claim fences it (44).

## What the status counts

{counted}

A pod that ends in order says how far it was. One that is killed without a word cannot: then `lostSteps` knows what
the operator read last, which it does every 5 seconds.
"""

REFUSALS = (
    (
        "`CreateForbidden` and others",
        "a quota, a policy or a missing right refuses a Job, a ConfigMap or a Service",
        "what the message names",
    ),
    (
        "`CreateInternalError`",
        "an admission webhook for them does not answer, a queue's or a policy's; told after three looks in a row",
        "mend the webhook, or remove it",
    ),
    (
        "`DeleteForbidden`, `DeleteInternalError` and others",
        "the same of a Job that has to end first; phase and `Succeeded` say what waits for its end",
        "the same, or delete the Job",
    ),
    (
        "`NameTaken`",
        "an object of somebody else has the name",
        "delete it; if it is another FineTuneJob's, as the message says, make this one under another name",
    ),
    (
        "`LabelLost`",
        "an object of the job is there without the label by which it is found",
        "put the label back, or delete the object",
    ),
)
COUNTED = (
    ("usage.attempts", "train Jobs begun, over all runs of the FineTuneJob"),
    ("restarts", f"attempts of this run that ended before it was done, each once; the last {KEPT}"),
    ("restarts[].resumedFromStep", "the committed step that the next attempt began with, as that one says"),
    ("restarts[].lostSteps", "steps done after that one, which are done again"),
    ("usage.lostSteps", "their sum, over all attempts"),
    (
        "usage.gpuSeconds",
        "of all attempts: from when each pod got its node to the end, times its GPUs; of Jobs that vanished as far as "
        "the status had told",
    ),
    ("usage.runningSeconds", "the same from when the first pod got its node, whatever the GPUs"),
    ("usage.ongoing", "what of these sums is of the attempt that goes on, as of the last write of the status"),
    ("usage.counted", "the last attempt that has ended and is in these sums: each is added once"),
    ("run.interruptions", "endings in a row that were not counted and won no step"),
    ("run.failures", "crashes, which `retries.max` bounds; those of another document do not count"),
    ("run.halve", "the next attempt begins with half the micro-batch, after the kernel has killed the one before"),
    ("run.nextAt", "when the next attempt begins, while the run rests after the one before"),
    (
        "preflightJob",
        "what the next preflight Job carries, and when it begins, until one has said what it found: crashes "
        "(`failures`), other tries (`tries`), pods taken away and Jobs deleted in a row (`interruptions`)",
    ),
)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["-"] * len(lines[0]))
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def seconds(delay: timedelta) -> str:
    whole = int(delay.total_seconds())
    return f"{whole // 60} min" if whole >= 120 and whole % 60 == 0 else f"{whole} s"


def delays(of: Callable[[int], timedelta], *, first: int = 0) -> str:
    """For instance: 5 s, 10 s, 20 s, ... at most 10 min."""
    shown = [of(number) for number in range(first, first + 4)]
    assert of(next(number for number in count() if of(number) == of(number + 9))) == LONGEST
    return f"{', '.join(seconds(delay) for delay in shown)}, ... at most {seconds(LONGEST)}"


def rule_rows() -> Iterable[list[str]]:
    for kind, rule in RULES.items():
        own = 1 if kind in INTERRUPTED else 0  # those count the attempt that ended, the others those before it
        when = delays(DELAYS[kind], first=own) if kind in DELAYS else "none"
        yield [f"**{kind.value}**", rule.train, when, rule.preflight, rule.ends]


def text() -> str:
    """The whole page."""
    return TEXT.format(
        preflight=delays(environment_delay),
        interruptions=FREE_WITHOUT_PROGRESS,
        rules=table(["Rule", "A train pod", "Delays", "A preflight pod", "Given up"], rule_rows()),
        ways=table(
            ["What happened", "Recognised by", "Rule", "`status` says", "What to do"],
            ([way.happened, way.sign, way.kind.value, f"`{way.reason}`", way.remedy] for way in WAYS),
        ),
        refusals=table(["Reason", "What happened", "What to do"], REFUSALS),
        counted=table(["Field", "What"], ([f"`{field}`", what] for field, what in COUNTED)),
        causes=table(
            ["`status` says", "What happened", "`Stalled`", "What to do"],
            ([f"`{c.reason}`", c.happened, "yes" if c.stalled else "no", c.remedy] for c in CAUSES),
        ),
    )


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text():
            return 0
        print(f"{TARGET.relative_to(ROOT)} is stale: run python hack/failures.py", file=sys.stderr)
        return 1
    TARGET.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
