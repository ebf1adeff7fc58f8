"""Several documents of one run, which differ in what is measured: each attempt measures the rows of its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import STOPPABLE, Made, tiny_rows

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
