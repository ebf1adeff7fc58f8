"""docs/reliability.md: what is promised, and what the runs have shown."""

import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.chaos.job import EVERY, STEPS
from tests.chaos.judge import Judged
from tests.chaos.proxy import MEANING

_PROMISE = """\
## What is promised

Whatever dies, whenever: the next attempt goes on from the last committed checkpoint, with the same rows in the same
order, and ends in the same weights as if nothing had happened, byte for byte. That holds for equal hardware, thread
counts and library versions; where they differ, the log of the trainer says so (`NumericsChanged`).

- A checkpoint exists when its record does, and a record is created by one conditional write. A torn upload is garbage
  that no record names. The next attempt deletes it when it commits a checkpoint or has published, and so it does with
  checkpoints that are no longer kept. What it could not delete, since storage failed, is told in its log.
- A kill costs the steps since the last committed checkpoint, and never more than `checkpoint.every`. Uploads go on
  beside training; each is begun early enough to be committed in time, and where that was not early enough, training
  waits.
- What storage answers is not believed once its digest is known: bytes are compared with the digests in the log. Bytes
  that were damaged on their way are asked for again. Preflight is the first to read the user's rows and computes
  their digests: what is changed on that one way, which https rules out on the network, is taken for what the user has.
- A kill in evaluation or publication never trains a step again. What an evaluation has measured is committed every
  minute, and when it is asked to stop; the next attempt goes on from there.
"""
_SHOWN = f"""\
## How it was shown

A small real job: a BERT of 30,000 weights with dropout, {STEPS} steps, a checkpoint every {EVERY} steps and an
evaluation every 20, then evaluation on test rows, report, publication. Base, rows and output lie in SeaweedFS, a real
S3 server. Each attempt is a real process with a new work directory. It is ended by SIGKILL: half of the kills fall at a
random instant of the attempt, half at a drawn call of the code that uploads, commits, downloads, evaluates or
publishes. A third of the runs are killed twice. The next attempt is started as the operator would, until one ends with
0. Between the attempts and the server stands a proxy that does harm. The runs that are killed at each step have no
proxy.

Each run is compared with one that nothing has disturbed:

- each published file, the weights of the last checkpoint, the loss of each step, and the evaluation are the same;
- each step of each attempt, also of those that were killed, has seen the same rows and has the same loss, bit for bit;
- each attempt goes on from the last committed step;
- since the last committed checkpoint no more than {EVERY} steps were done, and each one was committed before the next
  was handed to the uploader;
- when the last attempt has ended, storage holds what the log names, whole, and nothing else but documented keys, unless
  that attempt says in its log that storage kept it from deleting;
- no attempt ended with a traceback, nor with a code other than 0, 9 (killed) or 49 (storage gave no answer in time).
"""

_NOTE = """\
Steps lost are counted in forked attempts. A step of this job takes a few hundredths of a second, and an upload takes
many steps. So training waits for most checkpoints here, and kills fall into uploads far more often than in a real run.
"""

_PODS = """\
## As pods

`make chaos` needs no cluster. On a real node, with the operator, its Jobs and the containers of the release, these die
or are taken away, and the status says so; each run ends in the weights and the losses of an undisturbed one.
`make e2e` runs them, `make e2e-slow` those marked *slow*.

|What happens|Shown by (`tests/e2e/test_job.py`)|
|-|-|
"""
_DEATHS = {
    "a container killed": ["test_a_killed_trainer_goes_on_from_its_last_checkpoint"],
    "three times, at drawn instants: the container killed, or its pod forced out while it runs on (slow)": [
        "test_three_deaths_at_drawn_instants_change_nothing"
    ],
    "one of two pods killed, either one (slow)": ["test_a_killed_pod_of_two_takes_the_group_back_to_one_record"],
    "a pod evicted, as `kubectl drain` does: no step is lost": ["test_an_evicted_run_loses_no_step"],
    "a node that falls silent, and wakes when the next attempt has begun": [
        "test_a_node_that_falls_silent_holds_no_run_and_its_zombie_commits_nothing"
    ],
    "the operator killed, alone or as one of two replicas": [
        "test_the_operator_killed_in_mid_training_changes_nothing",
        "test_a_killed_leader_is_replaced_by_the_other_replica_and_changes_nothing",
    ],
    "the operator away, and the Job deleted that was done meanwhile": [
        "test_a_result_made_while_the_operator_was_down_and_its_job_deleted_is_found"
    ],
    "the API server started again": ["test_a_restart_of_the_api_server_changes_nothing"],
}


@dataclass
class Results:
    """Everything that the page tells."""

    seed: int
    asked: int
    """Runs that were to be killed at random; a time limit may have ended them before."""
    killed: list[Judged] = field(default_factory=list)
    swept: list[Judged] = field(default_factory=list)
    calm: list[Judged] = field(default_factory=list)
    """Runs with faults and without kills."""
    seconds: float = 0.0

    @property
    def bad(self) -> list[Judged]:
        return [one for one in (*self.calm, *self.killed, *self.swept) if one.wrong]


def document(results: Results) -> str:
    """The whole page, from what was really done."""
    everything = [*results.calm, *results.killed, *results.swept]
    parts = [
        f"# Reliability\n\nWritten by `make chaos` on {datetime.now(UTC):%Y-%m-%d}: {_machine()}.\n",
        _PROMISE,
        _SHOWN,
        "## What came out\n",
        _table(("", "killed at random", "killed at every step"), _summary(results)),
        _NOTE,
        "### Kills\n",
        _table(("place", "kills"), _counted(kill for one in everything for kill in one.run.kills)),
        "### Faults of storage\n",
        _table(("fault", "meaning", "times"), _faults(everything)),
    ]
    parts.append(_PODS + "".join(f"|{what}|{_code(tests)}|\n" for what, tests in _DEATHS.items()))
    if results.bad:
        parts.append("### Runs that broke a promise\n")
        parts += [f"- run {one.run.plan.number}: {'; '.join(one.wrong)}\n" for one in results.bad]
    parts.append(
        f"Again: `make chaos` ({STEPS} runs, one for each step, then 200); the seed was {results.seed}. Of a run that\n"
        "breaks a promise the command keeps the log and prints how to repeat it alone.\n"
    )
    return "\n".join(parts)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _summary(results: Results) -> list[tuple[str, ...]]:
    columns = (results.killed, results.swept)
    minutes = f"{results.seconds / 60:.0f}"
    rows: list[tuple[str, ...]] = [
        ("runs, of those asked for", f"{len(results.killed)} of {results.asked}", str(len(results.swept))),
        ("of these, processes of their own (the others are forked)", *(_count(runs, cold=True) for runs in columns)),
        ("runs that were killed at least once", *(str(sum(bool(one.run.kills) for one in runs)) for runs in columns)),
        ("kills", *(str(len(_killed(runs))) for runs in columns)),
        ("attempts", *(str(sum(len(one.run.attempts) for one in runs)) for runs in columns)),
        ("attempts that gave up on storage (49)", *(str(_gave_up(runs)) for runs in columns)),
        ("faults of storage", *(str(sum(sum(one.run.faults.values()) for one in runs)) for runs in columns)),
        ("steps lost a kill: mean, most", *(_lost(runs) for runs in columns)),
        ("seconds of a run: median, most", *(_seconds(runs) for runs in columns)),
        (
            "**ended like the undisturbed run**",
            *(f"**{sum(not one.wrong for one in runs)} of {len(runs)}**" for runs in columns),
        ),
    ]
    calm = sum(not one.wrong for one in results.calm)
    rows.append(("runs with faults alone that ended like it", f"{calm} of {len(results.calm)}", ""))
    rows.append(("minutes in all", minutes, ""))
    return rows


def _killed(runs: Iterable[Judged]) -> list[int]:
    """Steps lost by each kill of a forked attempt, and 0 by those of cold ones, which keep no trace."""
    return [attempt.lost for one in runs for attempt in one.run.attempts if attempt.killed]


def _traced(runs: Iterable[Judged]) -> list[int]:
    return _killed([one for one in runs if not one.run.plan.cold])


def _lost(runs: Iterable[Judged]) -> str:
    lost = _traced(runs)
    return f"{statistics.mean(lost):.1f}, {max(lost)}" if lost else "none"


def _count(runs: Iterable[Judged], *, cold: bool) -> str:
    return str(sum(one.run.plan.cold is cold for one in runs))


def _gave_up(runs: Iterable[Judged]) -> int:
    return sum(attempt.code == 49 for one in runs for attempt in one.run.attempts)


def _seconds(runs: Iterable[Judged]) -> str:
    found = [one.run.seconds for one in runs]
    return f"{statistics.median(found):.1f}, {max(found):.1f}" if found else "none"


def _faults(runs: Iterable[Judged]) -> list[tuple[str, ...]]:
    done: Counter[str] = Counter()
    for one in runs:
        done.update(one.run.faults)
    return [(kind, meaning, str(done[kind])) for kind, meaning in MEANING.items()]


def _counted(names: Iterable[str]) -> list[tuple[str, ...]]:
    found: Mapping[str, int] = Counter(names)
    return [(name, str(found[name])) for name in sorted(found, key=lambda name: (-found[name], name))]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("-",) + ("-" if len(head) > 2 and head[1] == "meaning" else "-:",) * (len(head) - 1), *rows]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines) + "\n"


def _machine() -> str:
    from importlib.metadata import version
    from os import cpu_count

    return f"{cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
