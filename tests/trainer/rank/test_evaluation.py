"""What is measured after training, and what follows from it: intervals, baselines, gates."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import Ranks, made, write

from finetune_trainer.storage.commit import CURRENT, RecordKind

FAST = {"epochs": 4.0, "batchSize": 16, "learningRate": 3e-3, "microBatch": 8}


def bodies(made: Any, kind: RecordKind) -> list[dict[str, Any]]:
    return [dict(record.body) for record in made.records if record.kind is kind]


def test_a_model_below_its_gate_is_published_but_consumers_keep_what_they_have(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    gates = [{"metric": "accuracy", "atLeast": 0.1}, {"metric": "f1", "improvesBaselineBy": 0.9}]
    spec = {"training": FAST, "evaluation": {"gates": gates, "metrics": ["accuracy"], "baseline": "Trivial"}}
    made = make_run(rows(300), test=rows(120, seed=1), **spec)
    code, log = made.run(tmp_path / "work")
    assert code == 48, log
    message = made.message(tmp_path / "work")
    assert (message.code, message.reason) == (48, "GateNotMet")
    assert message.message.startswith("Not good enough on test rows: f1 is ")
    assert message.message.endswith("wanted better than the baseline by 0.9.")
    assert message.result is not None
    found = message.result.evaluation
    assert [(gate.metric, gate.passed) for gate in found.gates or []] == [("accuracy", True), ("f1", False)]
    assert (made.model() / "model.safetensors").is_file()
    assert not made.store.head(CURRENT)

    assert set(found.tuned or {}) == {"accuracy", "f1"}, "what was asked for, and the primary metric"
    assert set(found.intervals or {}) == {"accuracy", "f1"}
    for name, ends in (found.intervals or {}).items():
        assert ends.low <= found.tuned[name] <= ends.high
        assert ends.high - ends.low < 0.3
    assert found.gain is not None
    assert found.gain.low is not None
    assert found.gain.low < found.gain.value < found.gain.high
    assert found.gain.value == pytest.approx(found.tuned["f1"] - getattr(found, found.gain.over)["f1"], abs=1e-4)
    assert set(found.train or {}) == {"accuracy", "f1"}

    (evaluated,) = bodies(made, RecordKind.EVALUATED)
    assert set(evaluated["intervals"]) == set(evaluated["metrics"]) >= {"loss", "f1-micro"}
    assert 250 < evaluated["fit"]["rows"] <= 270, "all training rows but repeated ones"
    assert evaluated["fit"]["gap"]["metric"] == "f1"
    code, log = made.run(tmp_path / "again")
    assert code == 48, "judged again, not done again"
    assert made.kinds()[-2:] == ["published", "claim"]


def test_an_evaluation_killed_halfway_ends_in_the_same_figures(make_run: Any, rows: Any, tmp_path: Path) -> None:
    """The outcomes of the baselines are read back, so that both models are still compared row by row."""
    spec = {"training": {**FAST, "epochs": 1.0}}
    calm = make_run(rows(100), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(100), name="killed", **spec)
    stop = ("finetune_trainer.evaluate", "Evaluator", "outcomes", 2, 9)  # 1 is the evaluation while training
    assert made.run(tmp_path / "first", stop=stop)[0] == -9
    assert made.kinds()[-1] == "baseline"
    code, log = made.run(tmp_path / "second")
    assert code == 0, log
    ours, theirs = (run.published()["outcome"]["evaluation"] for run in (made, calm))
    assert ours == theirs
    assert ours["gain"]["low"] is not None
    assert json.loads(made.store.read(CURRENT))["runId"] == made.record.run_id


CHUNKS = "MEASURED_EVERY"
"""Seconds between pieces of a measurement, for a rank of the tests."""


def pieces(made: Any) -> dict[str, list[int]]:
    """Which chunks of rows have been committed of each measurement, in order."""
    found: dict[str, list[int]] = {}
    for body in bodies(made, RecordKind.MEASURED):
        found.setdefault(body["of"], []).extend(body["chunks"])
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_goes_on_from_its_last_chunk_and_no_chunk_is_measured_twice(
    make_run: Any, rows: Any, tmp_path: Path, number: signal.Signals
) -> None:
    """The training has 90 validation rows, which are two chunks; the end has 300 test rows, five chunks."""
    spec = {"training": {**FAST, "maxSteps": 6, "epochs": None}, "test": rows(300, seed=1)}
    calm = make_run(rows(900), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    assert not pieces(calm), "what takes less than a minute is one record"
    made = make_run(rows(900), name="ended", **spec)
    # A kill costs what was found since the last piece, here nothing but its own chunk; a stop costs nothing.
    environment = {CHUNKS: "0"} if number == signal.SIGKILL else {}
    codes, seen = [], 0
    for attempt in range(1, 20):
        stop = ("finetune_trainer.evaluate", "Evaluator", "_predictions", 6 if attempt == 1 else 4, number.value)
        codes.append(made.run(tmp_path / f"work-{attempt}", stop=stop, **environment)[0])
        if codes[-1] == 0:
            break
        before, seen = seen, sum(map(len, pieces(made).values()))
        assert seen > before or attempt == 1
    assert codes[-1] == 0
    assert len(codes) > 4
    assert set(codes[:-1]) == {-9 if number == signal.SIGKILL else 45}
    found = pieces(made)
    assert len(found) == 3, "test, training and validation rows by the tuned model"
    assert all(chunks == sorted(set(chunks)) for chunks in found.values()), found
    ours, theirs = (run.published()["outcome"]["evaluation"] for run in (made, calm))
    assert ours == theirs
    (one,), (two,) = (bodies(run, RecordKind.EVALUATED) for run in (made, calm))
    assert {**one, "objects": [], "evaluationId": ""} == {**two, "objects": [], "evaluationId": ""}
    assert [entry["digest"] for entry in one["objects"]] == [entry["digest"] for entry in two["objects"]]
    assert not [info.key for info in made.store.list() if "/measured/" in info.key], "none is needed any more"


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
@pytest.mark.parametrize("part", ["evaluation/", "measured/"])
def test_damaged_outcomes_are_named_and_measured_again(
    make_run: Any, rows: Any, tmp_path: Path, part: str, damage: str
) -> None:
    spec = {"training": {**FAST, "maxSteps": 6, "epochs": None}, "test": rows(300, seed=1)}
    calm = make_run(rows(100), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(100), name="killed", **spec)
    stop = ("finetune_trainer.evaluate", "Evaluator", "_predictions", 5, 9)  # 1 is the evaluation while training
    assert made.run(tmp_path / "first", stop=stop, **{CHUNKS: "0"})[0] == -9
    key = next(info.key for info in made.store.list() if part in info.key)
    path = Path(made.store.uri.removeprefix("file://")) / key
    if damage == "deleted":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    code, log = made.run(tmp_path / "second")
    assert code == 0, log
    word = "missing" if damage == "deleted" else "damaged"
    assert f"{key} is {word}; what it held is measured again" in log
    ours, theirs = (run.published()["outcome"]["evaluation"] for run in (made, calm))
    assert ours == theirs


def test_pieces_that_a_publication_has_made_needless_are_not_looked_for(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    spec = {"training": {**FAST, "maxSteps": 6, "epochs": None}, "test": rows(100, seed=1)}
    for weights in ("Best", "Last"):  # which are the same ones here
        made = make_run(rows(100), output={"weights": weights}, **spec)
        code, log = made.run(tmp_path / f"work-{weights}", **{CHUNKS: "0"})
        assert code == 0, log
        assert "is missing" not in log
    assert any(chunks.count(0) == 2 for chunks in pieces(made).values()), "the same measurement was asked for twice"


@pytest.mark.parametrize(("baseline", "left"), [("None", set()), ("Probe", {"probe"})])
def test_only_the_baselines_asked_for_are_measured(
    make_run: Any, rows: Any, tmp_path: Path, baseline: str, left: set[str]
) -> None:
    made = make_run(rows(60), training={**FAST, "epochs": 1.0}, evaluation={"baseline": baseline})
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    (measured,) = bodies(made, RecordKind.BASELINE)
    assert {name for name in ("trivial", "base", "probe") if measured[name] is not None} == left
    result = made.message(tmp_path / "work").result
    assert result is not None
    assert (result.evaluation.gain is None) == (not left)
    assert any("6 rows were measured" in said for said in result.evaluation.warnings or [])


def test_slices_show_who_is_served_worse_and_can_be_a_gate(make_run: Any, rows: Any, tmp_path: Path) -> None:
    """Rows of the south are all labelled alike, whatever they say, so no model is any good there."""
    texts, labels = rows(300)
    north = [{"text": text, "label": label, "region": "north"} for text, label in zip(texts, labels, strict=True)]
    texts, labels = rows(120, seed=5)
    test = [{"text": texts[n], "label": labels[n], "region": "north", "new": False} for n in range(60)]
    test += [{"text": texts[n], "label": "blue", "region": "south", "new": True} for n in range(60, 120)]
    evaluation = {
        "slices": ["region", "new"],
        "baseline": "Trivial",
        "primary": "accuracy",
        "gates": [{"metric": "slice-gap", "atMost": 0.05}],
    }
    made = make_run(north, test=test, training=FAST, evaluation=evaluation)
    assert made.record.slices == {"region": ["north", "south"], "new": ["false", "true"]}
    code, log = made.run(tmp_path / "work")
    assert code == 48, log
    message = made.message(tmp_path / "work")
    assert message.message.startswith("Not good enough on test rows: slice-gap is 0.")
    assert message.result is not None
    region, new = message.result.evaluation.slices or []
    assert (region.column, region.best, region.worst) == ("region", "north", "south")
    assert region.gap is not None
    assert (new.best, new.worst, new.gap) == ("false", "true", region.gap)
    assert region.low < region.gap < region.high
    assert 0 < region.equalized_odds <= 1
    assert any(said.startswith("region: accuracy is better by") for said in message.result.evaluation.warnings or [])


def test_slices_in_another_order_are_measured_alike(tiny_base: Path, ranks: Ranks, rows: Any, tmp_path: Path) -> None:
    """The same run on the same files: its weights are there, and are measured for columns in another order."""
    named = [
        {"text": text, "label": label, "region": "north" if number % 3 else "south", "age": str(number % 4)}
        for number, (text, label) in enumerate(zip(*rows(300), strict=True))
    ]
    write(tmp_path / "train.jsonl", named[:150])
    write(tmp_path / "held.jsonl", named[150:])
    held = {"uri": (tmp_path / "held.jsonl").as_uri()}
    document = {
        "model": {"uri": tiny_base.as_uri()},
        "resources": {"perNode": {"gpus": 0}},
        "task": {"type": "text-classification"},
        "data": {"train": [{"uri": (tmp_path / "train.jsonl").as_uri()}], "validation": held},
        "training": {**FAST, "epochs": 1.0},
        "output": {"uri": (tmp_path / "output").as_uri()},
    }
    found, runs = [], set()
    for number, slices in enumerate((["region", "age"], ["age", "region"])):
        run = made(tmp_path, {**document, "evaluation": {"slices": slices, "baseline": "Trivial"}}, ranks)
        code, log = run.run(tmp_path / f"work-{number}")
        assert code == 0, log
        runs.add(run.record.run_id)
        measured = bodies(run, RecordKind.EVALUATED)[-1]["slices"]
        assert [one["column"] for one in measured] == slices
        assert all(len(one["values"]) > 1 for one in measured)
        found.append({one["column"]: one for one in measured})
    assert len(runs) == 1
    assert found[0] == found[1]
