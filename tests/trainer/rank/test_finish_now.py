"""A run that is ended before its time: its best checkpoint is published, and with more budget it goes on as ever."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import STEP, STOPPABLE

from finetune_trainer import local
from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS
from finetune_trainer.preflight import preflight
from finetune_trainer.storage.commit import CURRENT, RecordKind, find

FINISH = ("--finish-now",)


def stop_at(step: int) -> Any:
    """The rank sends itself SIGTERM in that step of the attempt."""
    return (*STEP, step, signal.SIGTERM.value)


def bodies(made: Any, kind: RecordKind) -> list[dict[str, Any]]:
    return [dict(record.body) for record in find(made.records, kind)]


def looked(made: Any, tmp_path: Path) -> Any:
    """What preflight says."""
    return preflight(made.config, credentials=None, work=tmp_path / "look")


def test_the_best_checkpoint_is_published_and_more_budget_goes_on_to_the_very_same_model(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    calm = make_run(rows(300), name="calm", test=rows(60, seed=1), **STOPPABLE)
    assert calm.run(tmp_path / "calm")[0] == 0
    made = make_run(rows(300), name="stopped", test=rows(60, seed=1), **STOPPABLE)
    code, log = made.run(tmp_path / "one", stop=stop_at(9))
    assert code == 45, log

    code, log = made.run(tmp_path / "two", options=FINISH)
    assert code == 0, log
    result = made.message(tmp_path / "two").result
    assert (result.partial, result.final_step, result.total_steps) == (True, 9, 18)
    assert made.message(tmp_path / "two").message.startswith("Trained 9 of 18 steps and published")
    (trained,) = bodies(made, RecordKind.TRAINED)
    assert trained["end"] == "stopped"
    best = next(r for r in made.records if r.number == trained["weights"]["Best"])
    assert best.body["step"] == result.best.step == 6
    assert json.loads(made.store.read(CURRENT))["digest"] == result.model.digest
    assert "9 of 18" in (Path(result.model.report_uri.removeprefix("file://"))).read_text()

    said = looked(made, tmp_path)
    assert (said.code, said.preflight.state, said.preflight.step) == (0, "Resume", 9), "there is more to train"
    assert said.result == result

    code, log = made.run(tmp_path / "again", options=FINISH)
    assert code == 0, log
    assert made.message(tmp_path / "again").result == result, "nothing is measured or published twice"
    assert len(bodies(made, RecordKind.PUBLISHED)) == 1

    code, log = made.run(tmp_path / "three")
    assert code == 0, log
    assert "going on from the checkpoint of step 9" in log
    whole, expected = made.message(tmp_path / "three").result, calm.message(tmp_path / "calm").result
    assert not whole.partial
    assert (whole.model.digest, whole.final_step, whole.best) == (expected.model.digest, 18, expected.best)
    assert whole.evaluation == expected.evaluation, "what was measured of the part is not taken for the whole"
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()
    assert json.loads(made.store.read(CURRENT))["digest"] == whole.model.digest
    assert looked(made, tmp_path).preflight.state == "Reused"


def test_ended_twice_the_newer_checkpoint_counts(make_run: Any, rows: Any, tmp_path: Path) -> None:
    made = make_run(rows(300), output={"weights": "Last"}, **STOPPABLE)
    for number, (step, total) in enumerate(((5, 5), (3, 8))):
        assert made.run(tmp_path / f"train-{number}", stop=stop_at(step))[0] == 45
        code, log = made.run(tmp_path / f"finish-{number}", options=FINISH)
        assert code == 0, log
        assert made.message(tmp_path / f"finish-{number}").result.final_step == total
    first, second = bodies(made, RecordKind.PUBLISHED)
    assert first["outcome"]["model"]["digest"] != second["outcome"]["model"]["digest"]
    assert first["publicationId"] != second["publicationId"]


def test_ended_twice_at_one_step_the_weights_that_are_the_best_by_then_are_measured_and_published(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    """The first time an evaluation was due there, which the attempt in between has done before it was killed."""
    training = {**STOPPABLE["training"], "evaluateEvery": {"steps": 3}}
    made = make_run(rows(300), **{**STOPPABLE, "training": training, "evaluation": {"primary": "loss"}})
    assert made.run(tmp_path / "one", stop=stop_at(6))[0] == 45
    code, log = made.run(tmp_path / "two", options=FINISH)
    assert code == 0, log
    second_commit = ("finetune_trainer.storage.commit", "Claim", "append", 2, signal.SIGKILL.value)
    assert made.run(tmp_path / "three", stop=second_commit)[0] == -signal.SIGKILL
    code, log = made.run(tmp_path / "four", options=FINISH)
    assert code == 0, log
    results = [made.message(tmp_path / work).result for work in ("two", "four")]
    assert [(result.final_step, result.best.step) for result in results] == [(6, 3), (6, 6)]
    assert results[0].model.digest != results[1].model.digest
    assert results[0].evaluation.tuned["loss"] > results[1].evaluation.tuned["loss"]
    assert looked(made, tmp_path).result == results[1]


def test_without_a_checkpoint_nothing_is_published_and_the_message_says_what_to_do(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(rows(60), **STOPPABLE)
    code, log = made.run(tmp_path / "work", options=FINISH)
    assert code == 42, log
    last = made.message(tmp_path / "work")
    assert (last.reason, last.step) == ("NothingCommitted", None)
    assert "raise spec.budget.gpuHours" in last.message
    assert made.kinds() == ["claim"]


@pytest.mark.parametrize("finish", [True, False], ids=["finish now", "as ever"])
def test_a_run_that_has_trained_all_its_steps_is_no_part(
    make_run: Any, rows: Any, tmp_path: Path, finish: bool
) -> None:
    """Stopped in its last evaluation, it is evaluated and whole."""
    made = make_run(rows(300), **STOPPABLE)
    assert made.run(tmp_path / "one", stop=stop_at(18))[0] == 45
    code, log = made.run(tmp_path / "two", options=FINISH if finish else ())
    assert code == 0, log
    assert not made.message(tmp_path / "two").result.partial
    (trained,) = bodies(made, RecordKind.TRAINED)
    assert (trained["end"], trained["best"]["step"] % 6) == ("complete", 0)
    assert len(trained["curve"]["evaluations"]) == 3


def test_gates_of_a_part_are_judged_and_said(make_run: Any, rows: Any, tmp_path: Path) -> None:
    gates = {"gates": [{"metric": "f1", "atLeast": 1.0}]}
    spec = {**STOPPABLE, "training": {**STOPPABLE["training"], "learningRate": 1e-6}}
    made = make_run(rows(300), test=rows(60, seed=1), evaluation=gates, **spec)
    assert made.run(tmp_path / "one", stop=stop_at(5))[0] == 45
    code, log = made.run(tmp_path / "two", options=FINISH)
    assert code == 48, log
    said = looked(made, tmp_path)
    assert (said.code, said.preflight.state, said.result) == (0, "Resume", None), "the whole may be good enough"


def test_several_ranks_finish_together(make_run: Any, rows: Any, tmp_path: Path, free_port: int) -> None:
    made = make_run(rows(300), **STOPPABLE)
    assert made.run(tmp_path / "one", stop=stop_at(5))[0] == 45
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    work = tmp_path / "two"
    both = [made.start(work, options=FINISH, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in (0, 1)]
    assert [one.wait() for one in both] == [0, 0], both[0].log
    result = made.message(work).result
    assert (result.partial, result.final_step) == (True, 5)
    assert [body["step"] for body in bodies(made, RecordKind.CHECKPOINT)] == [4, 5], "nothing is trained"


def test_on_a_laptop_the_run_goes_on(make_run: Any, rows: Any, tmp_path: Path) -> None:
    """There is no budget, and what was published of a part is no reason to be done."""
    made = make_run(rows(300), **STOPPABLE)
    assert made.run(tmp_path / "one", stop=stop_at(5))[0] == 45
    assert made.run(tmp_path / "two", options=FINISH)[0] == 0
    (tmp_path / "local").mkdir()
    assert local._Run(made.config, tmp_path / "local", credentials=None).main() == 0
    assert [body["end"] for body in bodies(made, RecordKind.TRAINED)] == ["stopped", "complete"]
    assert [body["end"] for body in bodies(made, RecordKind.PUBLISHED)] == ["stopped", "complete"]
