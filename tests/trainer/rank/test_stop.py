"""A stop around a due evaluation: what is committed, what the next attempt commits, and that the end is the same.

Each rank is a real process that sends itself a signal at an exact place, so every case happens every time.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import STEP, STOPPABLE, Made, Ranks, runs_in, tiny_rows

from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS, file_name
from finetune_trainer.storage.commit import RecordKind, find

ROWS = 1400
"""140 of them are for validation: three chunks an evaluation."""
KEPT: dict[str, Any] = {**STOPPABLE, "checkpoint": {**STOPPABLE["checkpoint"], "keepLast": 100}}
"""All checkpoints stay, to be looked at in the end."""
CHUNK = ("finetune_trainer.evaluate", "Evaluator", "_predictions")
RECORD = ("finetune_trainer.storage.commit", "Claim", "append")
TERM, KILL = signal.SIGTERM.value, signal.SIGKILL.value

Commit = tuple[int, int, bool]
"""Attempt, step, and whether the weights of that step had been evaluated."""
CALM: list[Commit] = [(1, 4, False), (1, 6, True), (1, 8, False), (1, 12, True), (1, 16, False), (1, 18, True)]


def then(attempt: int, *, step: int) -> list[Commit]:
    """What the attempt commits that goes on to the end, from that step on."""
    return [(attempt, at, evaluated) for _, at, evaluated in CALM if at >= step]


FIRST: list[Commit] = [(1, 4, False), (1, 6, False), *then(2, step=6)]
LAST: list[Commit] = [*CALM[:-1], (1, 18, False), *then(2, step=18)]
CASES: dict[str, tuple[list[Any], list[Commit]]] = {
    "before the evaluation": ([(*STEP, 6, TERM)], FIRST),
    "at its first chunk": ([(*CHUNK, 1, TERM)], FIRST),
    "in its midst": ([(*CHUNK, 2, TERM)], FIRST),
    "in its last chunk, which lets it end": ([(*CHUNK, 3, TERM)], [*CALM[:2], (1, 7, False), *then(2, step=8)]),
    "killed after its commit": ([(*RECORD, 3, KILL)], [*CALM[:2], *then(2, step=8)]),
    "before the last evaluation": ([(*STEP, 18, TERM)], LAST),
    "in the midst of the last evaluation": ([(*CHUNK, 8, TERM)], LAST),
    "in its midst, and again when it is made up for": (
        [(*CHUNK, 2, TERM), (*CHUNK, 2, TERM)],
        [*FIRST[:2], *then(3, step=6)],
    ),
}


def committed(made: Any) -> list[Commit]:
    """All checkpoints, oldest first; attempts are counted from 1."""
    attempts = [record.number for record in find(made.records, RecordKind.CLAIM)]
    found = []
    for record in find(made.records, RecordKind.CHECKPOINT):
        state = json.loads(made.store.read(entry(record, STATE)["key"]))
        assert state["step"] == record.body["step"]
        evaluated = state["step"] in [evaluation["step"] for evaluation in state["evaluations"]]
        found.append((attempts.index(record.attempt) + 1, state["step"], evaluated))
    return found


def digests(made: Any, *, step: int, name: str) -> list[str]:
    """The digests of one file in all checkpoints of the step."""
    return [entry(r, name)["digest"] for r in find(made.records, RecordKind.CHECKPOINT) if r.body["step"] == step]


def entry(record: Any, name: str) -> dict[str, Any]:
    (found,) = [dict(entry) for entry in record.body["objects"] if entry["key"].endswith(f"/{name}")]
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, ranks: Ranks) -> Made:
    """A run that nothing stops."""
    root = tmp_path_factory.mktemp("calm")
    made = runs_in(root, tiny_base, ranks)(tiny_rows(ROWS), **KEPT)
    code, log = made.run(root / "work")
    assert code == 0, log
    assert committed(made) == CALM
    return made


@pytest.mark.parametrize("case", CASES)
def test_only_a_missed_evaluation_is_made_up_for_and_its_step_committed_again(
    make_run: Any, rows: Any, calm: Made, tmp_path: Path, case: str
) -> None:
    stops, commits = CASES[case]
    made = make_run(rows(ROWS), **KEPT)
    for number, stop in enumerate(stops):
        code, log = made.run(tmp_path / f"work-{number}", stop=stop)
        assert code == (45 if stop[-1] == TERM else -KILL), log
    code, log = made.run(tmp_path / "work-last")
    assert code == 0, log
    assert committed(made) == commits
    for step in {step for _, step, _ in commits}:  # what is committed again are the very same weights and moments
        for name in (WEIGHTS, OPTIMIZER):
            assert len(set(digests(made, step=step, name=name))) == 1
    assert made.losses() == calm.losses()
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()
    ours, theirs = (run.published()["outcome"] for run in (made, calm))
    assert (ours["model"]["digest"], ours["evaluation"], ours["best"]) == (
        theirs["model"]["digest"],
        theirs["evaluation"],
        theirs["best"],
    )


TOGETHER = {
    "rank 1 in a round that another follows": (1, (*CHUNK, 1, TERM), FIRST),
    "rank 0 in the last round, which lets it end": (
        0,
        (*CHUNK, 2, TERM),
        [*CALM[:2], (1, 7, False), *then(2, step=8)],
    ),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_a_stop_of_one_rank_cuts_the_evaluation_of_all_and_both_commit_its_step(
    make_run: Any, rows: Any, calm: Made, tmp_path: Path, free_port: int, case: str
) -> None:
    """Three chunks are two rounds of two ranks, the second of which is rank 0's alone."""
    stopped, stop, commits = TOGETHER[case]
    made = make_run(rows(ROWS), **KEPT)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    both = [
        made.start(
            tmp_path / "work-both",
            stop=stop if rank == stopped else None,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **group,
        )
        for rank in (0, 1)
    ]
    assert [started.wait() for started in both] == [45, 45], "\n".join(started.log for started in both)
    last = find(made.records, RecordKind.CHECKPOINT)[-1]
    assert {Path(entry["key"]).name for entry in last.body["objects"]} == {
        STATE,
        *(file_name(name, rank=rank, ranks=2) for name in (WEIGHTS, OPTIMIZER) for rank in (0, 1)),
    }
    code, log = made.run(tmp_path / "work-last")
    assert code == 0, log
    assert committed(made) == commits
    assert made.losses() == pytest.approx(calm.losses(), rel=1e-5)
