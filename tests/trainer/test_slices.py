"""Slices: what is counted, what is measured, and how wide the gap is."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.memory import learner_of

from finetune_trainer.slices import LEAST_ROWS, by_values, widest_gap
from finetune_trainer.tasks import Outcomes
from finetune_trainer.tasks.text_classification import ONE, SEVERAL

VALUES = ("north", "south", "east")


def rows(*groups: tuple[int, int, float]) -> tuple[Outcomes, np.ndarray[Any, Any]]:
    """Rows of a yes-no task: (value, count, share answered well) each."""
    labels, answers, codes = [], [], []
    for value, count, right in groups:
        truth = np.arange(count) % 2
        labels.append(truth)
        answers.append(np.where(np.arange(count) < right * count, truth, 1 - truth))
        codes.append(np.full(count, value))
    label, predicted = np.concatenate(labels), np.concatenate(answers)
    ones = np.ones(len(label))
    return {"label": label, "predicted": predicted, "loss": ones, "count": ones}, np.concatenate(codes)


def measured(*groups: tuple[int, int, float]) -> dict[str, Any]:
    outcomes, codes = rows(*groups)
    learner = learner_of(labels=("no", "yes"), form=ONE)
    return by_values(learner, outcomes, codes, column="region", values=VALUES, metric="accuracy", seed=1)


def test_the_gap_is_between_the_best_and_the_worst_value_with_enough_rows() -> None:
    found = measured((0, 100, 0.9), (1, 100, 0.6), (2, LEAST_ROWS - 1, 0.0), (-1, 7, 0.0))
    assert [value["value"] for value in found["values"]] == ["north", "south"]
    assert (found["tooFew"], found["unknown"]) == (LEAST_ROWS - 1, 7)
    gap = found["gap"]
    assert (gap["best"], gap["worst"]) == ("north", "south")
    assert gap["value"] == pytest.approx(0.3)
    assert 0.15 < gap["interval"][0] < 0.3 < gap["interval"][1] < 0.45
    assert widest_gap([found]) == pytest.approx(0.3)


def test_the_interval_of_a_gap_that_is_chance_holds_zero() -> None:
    low, high = measured((0, 60, 0.8), (1, 60, 0.75))["gap"]["interval"]
    assert low < 0 < high


def test_what_has_no_two_values_has_no_gap_and_meets_no_gate() -> None:
    found = measured((0, 100, 0.9), (1, 3, 0.0))
    assert found["gap"] is None
    assert widest_gap([found, measured((0, 30, 1.0), (1, 30, 1.0))]) is None
    assert widest_gap([]) is None


def test_equalised_odds_are_those_of_the_definition() -> None:
    """True positives 0.9 against 0.5, false positives 0.1 against 0.3: the difference is 0.4."""

    def group(positives: float, negatives: float) -> tuple[list[int], list[int]]:
        answers = [int(n < positives * 20) for n in range(20)] + [int(n < negatives * 20) for n in range(20)]
        return [1] * 20 + [0] * 20, answers

    one, two = group(0.9, 0.1), group(0.5, 0.3)
    label, predicted = (np.array(one[i] + two[i]) for i in (0, 1))
    outcomes = {"label": label, "predicted": predicted, "loss": np.ones(80), "count": np.ones(80)}
    codes = np.repeat([0, 1], 40)
    for form in (ONE, SEVERAL):
        if form == SEVERAL:
            outcomes |= {name: np.eye(2, dtype=np.uint8)[outcomes[name]] for name in ("label", "predicted")}
        learner = learner_of(labels=("no", "yes"), form=form)
        found = by_values(learner, outcomes, codes, column="c", values=VALUES, metric="accuracy", seed=1)
        assert found["equalizedOdds"] == pytest.approx(0.4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=80), st.randoms())
def test_every_row_is_counted_once(codes: list[int], random: Any) -> None:
    label = np.array([random.randint(0, 1) for _ in codes])
    ones = np.ones(len(codes))
    outcomes = {"label": label, "predicted": label[::-1], "loss": ones, "count": ones}
    learner = learner_of(labels=("no", "yes"), form=ONE)
    found = by_values(learner, outcomes, np.array(codes), column="c", values=VALUES, metric="f1", seed=1)
    assert sum(value["rows"] for value in found["values"]) + found["tooFew"] + found["unknown"] == len(codes)
