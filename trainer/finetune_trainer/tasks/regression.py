"""Regression: a number for each row, about one text or about two.

The model learns numbers with mean 0 and deviation 1: those of the training rows, moved and scaled. Metrics are in the
numbers' own units again. The two figures stand in the published config.json as target_mean and target_deviation:
a number is the model's logit times the deviation, plus the mean. A base that has learned one number already keeps its
output layer, and with it its figures.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from math import inf
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_api.contract import RunConfig
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.data.read import DataError
from finetune_trainer.tasks import probe
from finetune_trainer.tasks.base import (
    Column,
    Facts,
    Learner,
    Metrics,
    Outcomes,
    Piece,
    RowError,
    Sample,
    Task,
    Tools,
    cell,
    kind_of,
    mean_loss,
)
from finetune_trainer.tasks.drawn import DrawnNumbers, blocks, joined, mean
from finetune_trainer.tasks.texts import ONE_TEXT, TWO_TEXTS, check_texts, collate_texts, pieces_of, texts_of

MEAN, DEVIATION = "target_mean", "target_deviation"
"""Names among a run's facts, and in the published config.json."""
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_LARGEST = 1e30


class Regression(Task):
    """Rows with a text and a number."""

    store: ClassVar[Mapping[str, Column]] = {**ONE_TEXT, "value": Column("F64")}

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        texts = texts_of(row, self.columns)
        value = number_of(cell(row, self.columns, "value"), self.columns["value"])
        return Sample("\n".join(texts), repr(value), payload=(*texts, value))

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        assert tools.text is not None
        return [
            [replace(piece, columns={**piece.columns, "value": sample.payload[-1]})]
            for sample, piece in zip(samples, pieces_of(samples, tools.text, self.columns), strict=True)
        ]

    def facts(self, tools: Tools) -> dict[str, Any]:
        return {**check_texts(tools, self.columns), **_learned(tools.model)}

    def measure(self, store: Encoded, train: Rows, facts: Facts) -> dict[str, Any]:
        """Mean and deviation of the training rows. Raises DataError when there is nothing to learn."""
        values = store.values("value", train)
        deviation = float(values.std())
        if not deviation > 0:
            raise DataError(
                "OneValueOnly",
                f"The {len(train)} training rows have the value {values[0]:g} alone, so there is nothing to learn; add "
                "rows with other values or name another column.",
            )
        if MEAN in facts.more:
            return {}
        return {MEAN: float(values.mean()), DEVIATION: deviation}

    def learner(self, facts: Facts) -> Learner:
        return Regressor(self.config, facts)


class PairRegression(Regression):
    """Rows with two texts and a number about both."""

    store: ClassVar[Mapping[str, Column]] = {**TWO_TEXTS, "value": Column("F64")}


def of(config: RunConfig) -> Regression:
    """The task of a document, with one text a row or two."""
    return (PairRegression if "pair" in config.task.columns else Regression)(config)


def number_of(value: Any, name: str) -> float:
    """A number, or text that is one. Raises RowError."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = Decimal(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise RowError(f"the column {name!r} must hold a number such as 3.5, found {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not abs(number) <= _LARGEST:  # so is what is no number
        raise RowError(f"the column {name!r} must hold a number of ordinary size, found {kind_of(value)[:80]}")
    return number


def _learned(model: Mapping[str, Any]) -> dict[str, float]:
    """Mean and deviation of a base that gives one number, from its config.json; none of any other."""
    names = model.get("architectures") or [""]
    if not str(names[0]).endswith("ForSequenceClassification") or len(model.get("id2label") or ()) != 1:
        return {}
    mean, deviation = model.get(MEAN, 0.0), model.get(DEVIATION, 1.0)
    if not (isinstance(mean, int | float) and isinstance(deviation, int | float) and deviation > 0):
        raise DataError(
            "ModelIncomplete",
            f"config.json of the base model has {MEAN} {mean!r} and {DEVIATION} {deviation!r}, which must be numbers, "
            "the second above 0; take both out where its outputs are the numbers themselves.",
        )
    return {MEAN: float(mean), DEVIATION: float(deviation)}


class Regressor(Learner):
    """The squared error of one output."""

    auto_class = "AutoModelForSequenceClassification"
    probe = "rows"

    def model_settings(self) -> dict[str, Any]:
        return {
            "id2label": {0: "value"},
            "label2id": {"value": 0},
            "problem_type": "regression",
            MEAN: self._mean,
            DEVIATION: self._deviation,
        }

    @property
    def _mean(self) -> float:
        return float(self.facts.more[MEAN])

    @property
    def _deviation(self) -> float:
        return float(self.facts.more[DEVIATION])

    def _wanted(self, store: Encoded, rows: Rows) -> NDArray[np.float64]:
        """What the model is to say, [rows]."""
        return np.asarray((store.values("value", rows) - self._mean) / self._deviation)

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        wanted = self._wanted(store, rows).astype(np.float32)
        return {**collate_texts(store, rows, self.facts), "labels": wanted}

    def count(self, store: Encoded, rows: Rows) -> float:
        return len(rows)

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(self._outputs(model, inputs), inputs["labels"]).sum()

    def _outputs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        outputs = model(**self.model_inputs(inputs)).logits[:, 0]
        return outputs.float() if outputs.element_size() < 4 else outputs

    def _losses(self, outputs: Any, wanted: Any) -> Any:
        return (outputs - wanted) ** 2

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"value": store.values("value", rows)}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        outputs = self._outputs(model, inputs)
        losses = self._losses(outputs, inputs["labels"])
        return self._outcomes(outputs.double().cpu().numpy(), losses.double().cpu().numpy())

    def _outcomes(self, outputs: NDArray[np.float64], losses: NDArray[np.float64]) -> Outcomes:
        return {"predicted": outputs * self._deviation + self._mean, "loss": losses, "count": np.ones(len(outputs))}

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Those of scikit-learn and scipy; correlations with what is always the same are left out."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        pair = outcomes["value"], outcomes["predicted"]
        error = float(mean_squared_error(*pair))
        found = {"mse": error, "rmse": error**0.5, "mae": float(mean_absolute_error(*pair))}
        varied = len(pair[0]) > 1 and np.ptp(pair[0]) > 0
        if varied:
            found["r2"] = float(r2_score(*pair))
        if varied and np.ptp(pair[1]) > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where numbers are nearly the same
                found["pearson"] = float(pearsonr(*pair).statistic)
                found["spearman"] = float(spearmanr(*pair).statistic)
        return {**found, **mean_loss(outcomes)}

    def resampled(self, outcomes: Outcomes, draws: Iterable[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
        """From how often each row is drawn: many times as fast as `metrics`, and equal to it."""
        rows = DrawnNumbers(outcomes["value"], outcomes["predicted"])
        found: list[dict[str, NDArray[np.float64]]] = []
        for drawn in blocks(draws, len(outcomes["value"])):
            found.append(rows.metrics(drawn))
            if "loss" in outcomes:
                found[-1]["loss"] = mean(drawn, outcomes["loss"], outcomes["count"])
        return joined(found)

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]]:
        truth, answer = ([f"{value:.4g}" for value in outcomes[name].tolist()] for name in ("value", "predicted"))
        return truth, answer

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        """Always the mean of the training rows."""
        mean = self._wanted(store, train).mean()
        return self._answers(np.full(len(rows), mean), store, rows)

    def _answers(self, outputs: NDArray[np.float64], store: Encoded, rows: Rows) -> Outcomes:
        return self._outcomes(outputs, self._losses(outputs, self._wanted(store, rows)))

    def fit_probe(
        self,
        features: NDArray[np.float32],
        answers: NDArray[np.float32],
        *,
        store: Encoded,
        train: Rows,
        rows: Rows,
        seed: int,
    ) -> Outcomes | None:
        return self._answers(probe.regress(features, self._wanted(store, train), answers), store, rows)
