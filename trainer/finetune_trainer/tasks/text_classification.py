"""Text classification: one label a row, or a list of labels a row, about one text or about two."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_api.contract import RunConfig
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.tasks import losses, probe
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
    label_of,
    mean_loss,
)
from finetune_trainer.tasks.drawn import Drawn, blocks, joined, mean
from finetune_trainer.tasks.losses import ClassLoss, balanced, balanced_presence
from finetune_trainer.tasks.ranking import (
    MANY_LABELS,
    areas,
    calibration_error,
    confusion_matrix,
    trust,
)
from finetune_trainer.tasks.texts import ONE_TEXT, TWO_TEXTS, check_texts, collate_texts, pieces_of, texts_of

ONE, SEVERAL = "one label", "a list of labels"
LABELS = {"labels": Column("I32", ragged=True, labels=True)}


class TextClassification(Task):
    """Rows with a text and a label, or a list of labels."""

    labelled = True
    store: ClassVar[Mapping[str, Column]] = {**ONE_TEXT, **LABELS}

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        texts = texts_of(row, self.columns)
        value, name = cell(row, self.columns, "label"), self.columns["label"]
        several = isinstance(value, list | tuple)
        labels = tuple(dict.fromkeys(label_of(item, name) for item in (value if several else [value])))
        return Sample("\n".join(texts), "\n".join(sorted(labels)), labels, SEVERAL if several else ONE, texts)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        assert tools.text is not None
        pieces = zip(samples, pieces_of(samples, tools.text, self.columns), strict=True)
        return [
            [replace(piece, columns={**piece.columns, "labels": [tools.number(label) for label in sample.labels]})]
            for sample, piece in pieces
        ]

    def facts(self, tools: Tools) -> dict[str, Any]:
        return check_texts(tools, self.columns)

    def measure(self, store: Encoded, train: Rows, facts: Facts) -> dict[str, Any]:
        if self.config.training.class_weights is None:
            return {}
        counts = np.bincount(np.concatenate(store.each("labels", train)), minlength=len(facts.labels))
        several = facts.form == SEVERAL
        return {losses.WEIGHTS: balanced_presence(counts, rows=len(train)) if several else balanced(counts)}

    def learner(self, facts: Facts) -> Learner:
        return TextClassifier(self.config, facts)


class PairClassification(TextClassification):
    """Rows with two texts and a label about both."""

    store: ClassVar[Mapping[str, Column]] = {**TWO_TEXTS, **LABELS}


def of(config: RunConfig) -> TextClassification:
    """The task of a document, with one text a row or two."""
    return (PairClassification if "pair" in config.task.columns else TextClassification)(config)


class TextClassifier(Learner):
    """Cross entropy for rows of one label, binary cross entropy for rows of several."""

    draws = 1000

    auto_class = "AutoModelForSequenceClassification"
    probe = "rows"

    @property
    def several(self) -> bool:
        return self.facts.form == SEVERAL

    def model_settings(self) -> dict[str, Any]:
        labels = self.facts.labels
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "multi_label_classification" if self.several else "single_label_classification",
        }

    def labels(self, store: Encoded, rows: Rows) -> NDArray[Any]:
        """int32 [rows], or multi-hot uint8 [rows, labels]."""
        found = store.each("labels", rows)
        if not self.several:
            return np.concatenate(found) if len(rows) else np.zeros(0, np.int32)
        hot = np.zeros((len(rows), len(self.facts.labels)), dtype=np.uint8)
        for number, labels in enumerate(found):
            hot[number, labels] = 1
        return hot

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        labels = self.labels(store, rows).astype(np.float32 if self.several else np.int64)
        return {**collate_texts(store, rows, self.facts), "labels": labels}

    def count(self, store: Encoded, rows: Rows) -> float:
        return float(self._counts(self.labels(store, rows)).sum())

    def _counts(self, labels: NDArray[Any]) -> NDArray[np.float64]:
        """What each row counts in a mean loss, [rows]."""
        return np.full(len(labels), float(labels.shape[1])) if self.several else self._loss.shares(labels)

    @cached_property
    def _loss(self) -> ClassLoss:
        return ClassLoss.of(self.config.training, self.facts)

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(self._loss, model(**self.model_inputs(inputs)).logits, inputs["labels"]).sum()

    def _losses(self, loss: ClassLoss, logits: Any, labels: Any) -> Any:
        """[rows], or [rows, labels]."""
        return (loss.several if self.several else loss.one)(logits, labels)

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"label": self.labels(store, rows)}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        logits, labels = model(**self.model_inputs(inputs)).logits, inputs["labels"]
        chosen = (logits > 0) if self.several else logits.argmax(-1)
        shares = logits.float().sigmoid() if self.several else logits.float().softmax(-1)
        known = labels.cpu().numpy()
        return {
            "predicted": chosen.cpu().numpy().astype(np.uint8 if self.several else np.int32),
            **self._probabilities(shares.cpu().numpy()),
            "log-loss": self._by_row(ClassLoss(), logits, labels),
            "loss": self._by_row(self._loss, logits, labels),
            "count": self._counts(known),
        }

    def _by_row(self, loss: ClassLoss, logits: Any, labels: Any) -> NDArray[np.float64]:
        found = self._losses(loss, logits, labels).double()
        rows: NDArray[np.float64] = (found.sum(-1) if self.several else found).cpu().numpy()
        return rows

    def _probabilities(self, shares: NDArray[Any]) -> Outcomes:
        """Probabilities [rows, labels], unless there are too many labels to keep them."""
        return {} if shares.shape[1] > MANY_LABELS else {"probability": shares.astype(np.float32)}

    def metrics(self, outcomes: Outcomes) -> Metrics:
        from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

        labels, predictions = outcomes["label"], outcomes["predicted"]

        def averaged(average: str) -> tuple[float, float, float]:
            precision, recall, f1, _ = precision_recall_fscore_support(
                labels, predictions, average=average, zero_division=0
            )
            return float(precision), float(recall), float(f1)

        precision, recall, f1 = averaged("macro")
        columns = zip(labels.T, predictions.T, strict=True) if self.several else [(labels, predictions)]
        found = {
            "accuracy": float(accuracy_score(labels, predictions)),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1-micro": averaged("micro")[2],
            "f1-weighted": averaged("weighted")[2],
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where all rows have one label, which makes it 0
            found["mcc"] = float(np.mean([matthews_corrcoef(*pair) for pair in columns]))
        if "probability" in outcomes:
            shares = outcomes["probability"]
            found |= areas(_hot(labels, shares.shape[1]), shares)
            found["ece"] = calibration_error(*trust(labels, shares))
        return {**found, **self._mean_losses(outcomes)}

    def _mean_losses(self, outcomes: Outcomes) -> Metrics:
        """`loss` is what training makes small; `log-loss` is that of the labels alone, whatever training does."""
        if "log-loss" not in outcomes:
            return mean_loss(outcomes)
        values = outcomes["log-loss"]
        return {
            "log-loss": float(values.sum() / max(1, values.size * (len(self.facts.labels) if self.several else 1))),
            **mean_loss(outcomes),
        }

    def resampled(self, outcomes: Outcomes, draws: Iterable[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
        """From how often each row is drawn: some hundred times as fast as `metrics`, and equal to it."""
        labels, shares = outcomes["label"], outcomes.get("probability")
        hot = None if shares is None else _hot(labels, shares.shape[1])
        rows = Drawn(labels, outcomes["predicted"], hot, shares)
        found: list[dict[str, NDArray[np.float64]]] = []
        for drawn in blocks(draws, len(labels)):
            found.append(rows.metrics(drawn))
            if "log-loss" in outcomes:
                decisions = np.full(len(labels), len(self.facts.labels) if self.several else 1)
                found[-1]["log-loss"] = mean(drawn, outcomes["log-loss"], decisions)
            if "loss" in outcomes:
                found[-1]["loss"] = mean(drawn, outcomes["loss"], outcomes["count"])
        return joined(found)

    def rates(self, outcomes: Outcomes) -> NDArray[np.float64]:
        count = len(self.facts.labels)
        truth, answer = (_hot(outcomes[name], count) for name in ("label", "predicted"))
        with np.errstate(invalid="ignore"):
            return np.stack([(truth & answer).sum(0) / truth.sum(0), (~truth & answer).sum(0) / (~truth).sum(0)])

    def confusion(self, outcomes: Outcomes) -> NDArray[np.int64] | None:
        if self.several:
            return None
        return confusion_matrix(outcomes["label"], outcomes["predicted"], len(self.facts.labels))

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]]:
        names = self.facts.labels

        def named(labels: NDArray[Any]) -> list[str]:
            if not self.several:
                return [names[label] for label in labels.tolist()]
            return [", ".join(names[label] for label in np.flatnonzero(row).tolist()) or "none" for row in labels]

        return named(outcomes["label"]), named(outcomes["predicted"])

    def label_quality(
        self, features: NDArray[np.float32], *, store: Encoded, rows: Rows, seed: int
    ) -> tuple[NDArray[np.float64], list[str], list[str]] | None:
        if self.several:
            return None
        known, names = self.labels(store, rows), self.facts.labels
        found = probe.label_quality(features, known, count=len(names), seed=seed)
        if found is None:
            return None
        return found[0], [names[label] for label in known], [names[label] for label in found[1]]

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        """Always what is most frequent in training, with the loss of answering with the shares of the labels there."""
        known, count = self.labels(store, train), len(self.facts.labels)
        # plus one: a label that is new in `rows` costs, but not infinitely
        if self.several:
            share = (known.sum(0, dtype=np.int64) + 1) / (len(known) + 2)
        else:
            seen = np.bincount(known, minlength=count) + 1
            share = seen / seen.sum()
        return self._outcomes(np.broadcast_to(share, (len(rows), count)), self.labels(store, rows))

    def _outcomes(self, shares: NDArray[np.float64], labels: NDArray[Any]) -> Outcomes:
        """Predictions out of probabilities [rows, labels]."""
        predicted = (shares > 0.5).astype(np.uint8) if self.several else shares.argmax(1).astype(np.int32)
        found = self._loss.of_chances(shares, labels).sum(1) if self.several else self._loss.of_shares(shares, labels)
        return {
            "predicted": predicted,
            **self._probabilities(shares),
            "log-loss": probe.log_loss(shares, labels),
            "loss": found,
            "count": self._counts(labels),
        }

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
        known = self.labels(store, train)
        if not self.several and known.min() == known.max():
            return None
        shares = probe.classify(features, known, answers, count=len(self.facts.labels), seed=seed)
        return self._outcomes(shares, self.labels(store, rows))


def _hot(labels: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """[rows, labels], of numbers of labels [rows] or of what is multi-hot already."""
    return np.asarray(labels[:, None] == np.arange(count) if labels.ndim == 1 else labels > 0)
