"""Bootstrap intervals: what they cover, and that fast paths measure the same."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.memory import learner_of

from finetune_trainer.evaluate import PLACE, packed, unpacked
from finetune_trainer.intervals import Draws, gains, interval, intervals
from finetune_trainer.tasks import Learner, Outcomes
from finetune_trainer.tasks.drawn import blocks
from finetune_trainer.tasks.text_classification import ONE, SEVERAL

LABELS = ("a", "b", "c", "d")


def answers(rows: int, *, right: float, seed: int) -> Outcomes:
    """Rows of one label, of which about the share `right` is answered well; the truth does not depend on `right`."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, len(LABELS), rows)
    hit = draw.random(rows) < right
    wrong = (label + 1) % len(LABELS)
    return {
        "label": label,
        "predicted": np.where(hit, label, wrong),
        "loss": np.where(hit, 0.1, 2.0),
        "count": np.ones(rows, np.int64),
        PLACE: np.arange(rows),
    }


def test_an_interval_covers_what_it_says() -> None:
    """Of 100 samples of rows, about 95 have an interval that holds the true accuracy; 88 would be bad luck indeed."""
    learner = learner_of(labels=LABELS, form=ONE)
    covered = 0
    for seed in range(100):
        outcomes = answers(150, right=0.8, seed=seed)
        low, high = intervals(Draws(150, seed, 200).measured(learner, outcomes))["accuracy"]
        covered += low <= 0.8 <= high
    assert covered >= 88


def test_the_same_seed_draws_the_same_rows() -> None:
    learner = learner_of(labels=LABELS, form=ONE)
    draws = Draws.of(learner, 40, seed=3)
    assert draws.count == 1000
    beats: list[int] = []
    each = draws.each(lambda: beats.append(1))
    one, two = list(each), list(each)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert len(beats) == 2 * 63, "a sign of life every 16 draws, each time they are gone through"
    assert not np.array_equal(one[0], one[1])
    assert Draws.of(learner, 10**6, seed=3).count == 50


def test_a_paired_gain_is_surer_than_two_intervals() -> None:
    """The same rows are hard for both models."""
    learner = learner_of(labels=LABELS, form=ONE)
    tuned, rival = answers(300, right=0.75, seed=1), answers(300, right=0.65, seed=1)
    draws = Draws(300, 5, 300)
    samples, rivals = draws.measured(learner, tuned), draws.measured(learner, rival)
    found = gains(samples, rivals, higher_is_better=learner.higher_is_better)
    low, high = found["accuracy"]
    apart = sum(end - start for start, end in (intervals(x)["accuracy"] for x in (samples, rivals)))
    assert 0 < low < high
    assert high - low < 0.6 * apart
    assert found["loss"][0] > 0, "a lower loss is a gain"


def test_a_metric_that_most_draws_leave_undefined_has_no_interval() -> None:
    assert interval(np.array([np.nan, np.nan, 1.0])) is None
    assert interval(np.array([1.0, np.inf, 1.0])) == (1.0, 1.0)
    assert interval(np.zeros(0)) is None


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from([ONE, SEVERAL]))
def test_counts_measure_what_rows_do(data: st.DataObject, form: str) -> None:
    learner = learner_of(labels=LABELS, form=form)
    rows = data.draw(st.integers(1, 12))
    shape, top = ((rows,), 3) if form == ONE else ((rows, 4), 1)
    seed = data.draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    outcomes = {
        "label": random.integers(0, top + 1, shape),
        "predicted": random.integers(0, top + 1, shape),
        "loss": random.random(rows),
        "log-loss": random.random(rows),
        "count": np.ones(rows, np.int64),
    }
    if data.draw(st.booleans()):  # few different ones, so that many are equal
        outcomes["probability"] = (random.integers(0, 5, (rows, 4)) / 4).astype(np.float32)
    draws = list(Draws(rows, seed, 3).each())
    fast, plain = learner.resampled(outcomes, draws), Learner.resampled(learner, outcomes, draws)
    assert fast.keys() == plain.keys()
    for name in plain:
        assert fast[name] == pytest.approx(plain[name], abs=1e-12, nan_ok=True), name


def test_neither_blocks_nor_selections_of_unequal_size_change_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(labels=LABELS, form=ONE)
    outcomes = answers(40, right=0.7, seed=1)
    draws = [draw[: 20 + number] for number, draw in enumerate(Draws(40, 2, 9).each())]
    whole = learner.resampled(outcomes, draws)
    monkeypatch.setattr("finetune_trainer.tasks.drawn._CELLS", 100)  # three selections
    assert [len(block) for block in blocks(draws, 40)] == [3, 3, 3]
    plain = Learner.resampled(learner, outcomes, draws)
    for name, values in learner.resampled(outcomes, draws).items():
        assert values == pytest.approx(whole[name], abs=1e-15)
        assert values == pytest.approx(plain[name], abs=1e-12)


def test_outcomes_are_the_same_after_a_journey_as_json() -> None:
    texts = np.empty(2, dtype=object)
    texts[:] = ["one", "two"]
    given = {"tuned": {**answers(2, right=1.0, seed=0), "text": texts}, "other": {"nan": np.array([math.nan, 1.0])}}
    found = unpacked(packed(given))
    assert found.keys() == given.keys()
    for name, outcomes in given.items():
        for column, values in outcomes.items():
            assert found[name][column].dtype == values.dtype
            assert np.array_equal(found[name][column], values, equal_nan=column == "nan")
