"""Numbers for texts: how rows read, what the model is to say, what is measured."""

import math
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.tokenizers_of import tokenizer_json

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text
from finetune_trainer.intervals import Draws
from finetune_trainer.tasks import Learner
from finetune_trainer.tasks.base import Facts, RowError, Tools
from finetune_trainer.tasks.regression import DEVIATION, MEAN, PairRegression

TASK = tasks.get(config_of("regression", task={"columns": {"value": "score"}}))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (-2.5, -2.5),
        (Decimal("0.1"), 0.1),
        (np.float32(0.5), 0.5),
        ("3.5", 3.5),
        (" -1e3 ", -1000.0),
        (".5", 0.5),
        ("7.", 7.0),
        (0, 0.0),
    ],
)
def test_numbers_are_read_from_numbers_and_text(value: object, number: float) -> None:
    assert TASK.read_row({"text": "a", "score": value}).payload[-1] == number


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, "", "high", "1,5", "1_000", "nan", "inf", "0x10", [1.0], {}, math.nan, math.inf, -math.inf),
        *(1e31, Decimal("NaN"), Decimal("Infinity"), "1e400", 10**40, 10**400),
    ],
)
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(RowError, match="the column 'score' must hold a number"):
        TASK.read_row({"text": "a", "score": value})


def text() -> Text:
    return Text(tokenizer_json("wordpiece"), 16, 0, None, {"type_vocab_size": 2})


def test_the_store_keeps_the_number_beside_the_text() -> None:
    tools = Tools(text(), "Truncate")
    sample = TASK.read_row({"text": "the time", "score": 1.25})
    ((piece,),) = TASK.encode([sample], tools)
    assert piece.columns == {"input_ids": text().ids(["the time"])[0], "value": 1.25}
    assert piece.columns.keys() == TASK.store.keys()


def test_a_number_may_be_about_two_texts() -> None:
    task = tasks.get(config_of("regression", task={"columns": {"pair": "other"}}))
    assert isinstance(task, PairRegression)
    tools = Tools(text(), "Truncate")
    samples = [task.read_row({"text": "the", "other": "time in", "value": value}) for value in (1, 2)]
    ((piece,), _) = task.encode(samples, tools)
    assert piece.columns.keys() == task.store.keys()
    assert piece.columns["token_type_ids"] == [0, 0, 0, 1, 1, 1, 1]
    assert task.facts(tools) == {"tokenTypes": True}


def store_of(values: list[float]) -> Memory:
    return Memory(input_ids=[[5, 6]] * len(values), value=values)


def learner(mean: float = 3.0, deviation: float = 2.0) -> Any:
    return learner_of("regression", more={MEAN: mean, DEVIATION: deviation})


numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=2, max_size=20))
def test_targets_have_mean_0_and_deviation_1_and_predictions_are_turned_back(values: list[float]) -> None:
    store, rows = store_of(values), np.arange(len(values))
    if not np.std(values) > 0:
        with pytest.raises(DataError, match=r"have the value .* alone"):
            TASK.measure(store, rows, Facts())
        return
    ours = TASK.learner(Facts(more=TASK.measure(store, rows, Facts())))
    wanted = ours.collate(store, rows)["labels"]
    spread = max(values) - min(values)
    if spread > 1e-3 * max(map(abs, values)):  # else single precision tells them hardly apart
        assert wanted.mean() == pytest.approx(0, abs=1e-3)
        assert wanted.std() == pytest.approx(1, abs=1e-3)
    answered = ours.predict(Fixed(torch.tensor(wanted)[:, None]), {"labels": torch.tensor(wanted)}, generate=False)
    assert answered["predicted"] == pytest.approx(np.array(values), rel=1e-5, abs=1e-6 * spread)
    assert answered["loss"].sum() == 0.0


class Fixed(torch.nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def test_a_base_that_gives_a_number_already_keeps_its_scale() -> None:
    def facts(**config: Any) -> dict[str, Any]:
        return TASK.facts(Tools(text(), "Truncate", config))

    kind = {"architectures": ["BertForSequenceClassification"]}
    assert facts() == facts(architectures=["BertModel"], id2label={"0": "x"}) == {}
    assert facts(**kind, id2label={"0": "a", "1": "b"}) == {}
    assert facts(**kind, id2label={"0": "x"}) == {MEAN: 0.0, DEVIATION: 1.0}
    known = facts(**kind, id2label={"0": "x"}, target_mean=5.0, target_deviation=0.5)
    assert known == {MEAN: 5.0, DEVIATION: 0.5}
    assert TASK.measure(store_of([1.0, 9.0]), np.arange(2), Facts(more=known)) == {}
    with pytest.raises(DataError, match="the second above 0"):
        facts(**kind, id2label={"0": "x"}, target_deviation=0.0)


def test_losses_and_gradients_equal_torch() -> None:
    logits = torch.randn(8, 1, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(8, dtype=torch.float64)
    ours = learner().loss(Fixed(logits), {"labels": labels})
    theirs = torch.nn.functional.mse_loss(logits[:, 0], labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_metrics_equal_scikit_learn_and_scipy() -> None:
    from scipy import stats
    from sklearn import metrics

    draw = np.random.default_rng(1)
    value = draw.normal(50, 9, 40)
    predicted = value + draw.normal(0, 5, 40)
    found = learner().metrics({"value": value, "predicted": predicted, "loss": np.ones(40), "count": np.ones(40)})
    assert found == pytest.approx(
        {
            "mse": metrics.mean_squared_error(value, predicted),
            "rmse": metrics.root_mean_squared_error(value, predicted),
            "mae": metrics.mean_absolute_error(value, predicted),
            "r2": metrics.r2_score(value, predicted),
            "pearson": stats.pearsonr(value, predicted).statistic,
            "spearman": stats.spearmanr(value, predicted).statistic,
            "loss": 1.0,
        }
    )


def test_what_is_undefined_is_left_out() -> None:
    same, other = np.array([2.0, 2.0]), np.array([1.0, 3.0])
    assert learner().metrics({"value": same, "predicted": other}).keys() == {"mse", "rmse", "mae"}
    assert learner().metrics({"value": other, "predicted": same}).keys() == {"mse", "rmse", "mae", "r2"}
    assert learner().metrics({"value": other[:1], "predicted": same[:1]}).keys() == {"mse", "rmse", "mae"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_all_draws_at_once_measure_what_each_does(data: st.DataObject) -> None:
    """Also where few different numbers make ties, and where a draw has one alone."""
    rows, few = data.draw(st.integers(1, 12)), data.draw(st.booleans())
    draw = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    values = [draw.integers(0, 4, rows) / 4 if few else draw.normal(1e3, 2, rows) for _ in range(2)]
    outcomes = {"value": values[0], "predicted": values[1], "loss": draw.random(rows), "count": np.ones(rows)}
    draws = [*Draws(rows, 3, 20).each(), np.zeros(1, np.int64)]
    fast, plain = learner().resampled(outcomes, draws), Learner.resampled(learner(), outcomes, draws)
    assert fast.keys() == plain.keys()
    for name in plain:
        assert fast[name] == pytest.approx(plain[name], rel=1e-9, abs=1e-9, nan_ok=True), name


def test_the_trivial_answer_is_the_mean_of_the_training_rows() -> None:
    store, ours = store_of([1.0, 3.0, 5.0, 9.0]), learner()
    rows = np.array([2, 3])
    found = ours.trivial(store, np.array([0, 1]), rows)
    assert found["predicted"].tolist() == [2.0, 2.0]
    metrics = ours.metrics({**ours.gold(store, rows), **found})
    assert metrics["mae"] == 5.0
    assert metrics["loss"] == pytest.approx(metrics["mse"] / 4)


def test_the_probe_learns_what_a_linear_model_can() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(80, 6)).astype(np.float32)
    values = 10 + features @ np.array([1.0, -2.0, 0, 0, 3.0, 0]) + draw.normal(0, 0.1, 80)
    store, train, rows = store_of(values.tolist()), np.arange(60), np.arange(60, 80)
    ours = learner(10.0, 4.0)
    found = ours.fit_probe(features[:60], features[60:], store=store, train=train, rows=rows, seed=1)
    assert ours.metrics({**ours.gold(store, rows), **found})["r2"] > 0.99
