"""Several documents of one run, which differ in what is measured: each attempt measures the rows of its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import STOPPABLE, Made, dictionaries, tiny_rows, write
from tests.trainer.test_run_local import running

from finetune_trainer.storage.commit import CURRENT, RecordKind, find

Document = Callable[..., Made]
TRAINED = tiny_rows(200)


@pytest.fixture
def document(make_run: Any, tmp_path: Path) -> Document:
    """Makes documents that have training rows and output in common. The run's newest preflight is that of the last."""

    def make(name: str, **spec: Any) -> Made:
        found: Made = make_run(TRAINED, name=name, output={"uri": (tmp_path / "output").as_uri()}, **STOPPABLE, **spec)
        return found

    return make


def held_out(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows that are no training rows: those would be left out, which is another run."""
    found = zip(*tiny_rows(4 * count, seed=seed), strict=True)
    return [{"text": text, "label": label} for text, label in found if text not in TRAINED[0]][:count]


def test_an_attempt_measures_the_test_rows_of_its_own_document(document: Document, tmp_path: Path) -> None:
    one = document("one", test=held_out(40, seed=1))
    two = document("two", test=held_out(60, seed=2))
    assert one.record.run_id == two.record.run_id
    for made, count in ((one, 40), (two, 60)):
        code, log = made.run(tmp_path / f"work-{count}")
        assert code == 0, log
        result = made.message(tmp_path / f"work-{count}").result
        assert result is not None
        assert result.evaluation.rows == count
        assert find(made.records, RecordKind.EVALUATED)[-1].body["rows"] == count
        assert json.loads(made.store.read(CURRENT))["model"] == result.model.uri


def test_an_attempt_that_was_not_told_what_to_read_measures_no_rows_of_another_document(
    document: Document, tmp_path: Path
) -> None:
    """Of an operator that does not tell it. Storage is asked anew, as after other ends with 49."""
    one = document("one", evaluation={"slices": ["label", "text"]})
    others = {"test": {"test": held_out(40, seed=1)}, "slices": {"evaluation": {"slices": ["text", "label"]}}}
    for name, spec in others.items():
        document(name, **spec)
        code, log = replace(one, inputs=None).run(tmp_path / f"work-{name}")
        assert code == 49, log
        message = one.message(tmp_path / f"work-{name}")
        assert message.reason == "InputsOfAnotherDocument"
        assert one.kinds() == [], "no attempt has claimed the run"


def test_a_document_that_is_run_again_measures_its_rows_as_they_are(tiny_base: Path, tmp_path: Path) -> None:
    """`finetune run` keeps its scratch directory where a gate is not met."""
    write(tmp_path / "train.jsonl", dictionaries(TRAINED))
    gates = [{"metric": "f1", "atLeast": 0.999}]
    spec: dict[str, Any] = {
        "task": {"type": "text-classification"},
        "model": {"uri": tiny_base.as_uri()},
        "data": {
            "train": [{"uri": (tmp_path / "train.jsonl").as_uri()}],
            "validation": {"fraction": 0.1},
            "test": {"uri": (tmp_path / "test.jsonl").as_uri()},
        },
        "training": {"maxSteps": 2, "batchSize": 16},
        "resources": {"perNode": {"gpus": 0}},
        "output": {"uri": (tmp_path / "output").as_uri()},
    }
    document = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "colours"}}
    runs = set()
    for count, slices in ((40, []), (60, ["kind"])):
        write(tmp_path / "test.jsonl", [{**row, "kind": n % 2} for n, row in enumerate(held_out(count, seed=count))])
        asked = {**spec, "evaluation": {"gates": gates, "baseline": "None", **({"slices": slices} if slices else {})}}
        with running(tmp_path, {**document, "spec": asked}) as run:
            code, status = run.end()
            assert code == 48, run.errors()
        assert status.run is not None
        assert status.evaluation is not None
        assert status.evaluation.rows == count
        assert [one.column for one in status.evaluation.slices or []] == slices
        runs.add(status.run.id)
    assert len(runs) == 1
