"""Text classification: one label a row, or a list of labels a row."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
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
    label_of,
    mask_of,
    mean_loss,
    padded,
    text_cell,
)

ONE, SEVERAL = "one label", "a list of labels"


class TextClassification(Task):
    """Rows with a text and a label, or a list of labels."""

    labelled = True
    store: ClassVar[Mapping[str, Column]] = {
        "input_ids": Column("I32", ragged=True),
        "labels": Column("I32", ragged=True, labels=True),
    }

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        text = text_cell(row, self.columns, "text")
        value, name = cell(row, self.columns, "label"), self.columns["label"]
        several = isinstance(value, list | tuple)
        labels = tuple(dict.fromkeys(label_of(item, name) for item in (value if several else [value])))
        return Sample(text, "\n".join(sorted(labels)), labels, SEVERAL if several else ONE)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        assert tools.text is not None
        pieces = []
        for sample, (ids, tokens) in zip(samples, tools.text.cut([s.content for s in samples]), strict=True):
            labels = [tools.number(label) for label in sample.labels]
            columns = {"input_ids": ids, "labels": labels}
            pieces.append([Piece(columns, tokens=tokens, length=len(ids), cut=tokens > len(ids))])
        return pieces

    def learner(self, facts: Facts) -> Learner:
        return TextClassifier(self.config, facts)


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
        texts = store.each("input_ids", rows)
        return {
            "input_ids": padded(texts, self.facts.pad_token_id),
            "attention_mask": mask_of(texts),
            "labels": self.labels(store, rows).astype(np.float32 if self.several else np.int64),
        }

    def count(self, store: Encoded, rows: Rows) -> int:
        return len(rows) * (len(self.facts.labels) if self.several else 1)

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(model(**self.model_inputs(inputs)).logits, inputs["labels"]).sum()

    def _losses(self, logits: Any, labels: Any) -> Any:
        """[rows, 1] or [rows, labels]."""
        if logits.element_size() < 4:
            logits = logits.float()
        if labels.ndim == 1:
            return -logits.log_softmax(-1).gather(-1, labels[:, None])
        return logits.logaddexp(logits.new_zeros(())) - logits * labels  # softplus(x) - x y

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"label": self.labels(store, rows)}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        logits = model(**self.model_inputs(inputs)).logits
        losses = self._losses(logits, inputs["labels"])
        chosen = (logits > 0) if self.several else logits.argmax(-1)
        return {
            "predicted": chosen.cpu().numpy().astype(np.uint8 if self.several else np.int32),
            "loss": losses.double().sum(-1).cpu().numpy(),
            "count": np.full(len(losses), losses.shape[-1]),
        }

    def metrics(self, outcomes: Outcomes) -> Metrics:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        labels, predictions = outcomes["label"], outcomes["predicted"]

        def averaged(average: str) -> tuple[float, float, float]:
            precision, recall, f1, _ = precision_recall_fscore_support(
                labels, predictions, average=average, zero_division=0
            )
            return float(precision), float(recall), float(f1)

        precision, recall, f1 = averaged("macro")
        return {
            "accuracy": float(accuracy_score(labels, predictions)),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1-micro": averaged("micro")[2],
            "f1-weighted": averaged("weighted")[2],
            **mean_loss(outcomes),
        }

    def resampled(self, outcomes: Outcomes, draws: Iterable[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
        """From counts a label instead of rows: a hundred times as fast as `metrics`, and equal to it."""
        labels, predictions = outcomes["label"], outcomes["predicted"]
        count = max(len(self.facts.labels), int(labels.max(initial=0)) + 1, int(predictions.max(initial=0)) + 1)
        found: list[Metrics] = []
        for draw in draws:
            rows: Outcomes = {name: outcomes[name][draw] for name in ("loss", "count") if name in outcomes}
            truth, answer = labels[draw], predictions[draw]
            right = (truth == answer).all(1) if self.several else truth == answer
            if self.several:
                true, given, hits = truth.sum(0), answer.sum(0), (truth & answer).sum(0)
            else:
                true, given, hits = (np.bincount(x, minlength=count) for x in (truth, answer, truth[right]))
            counted = from_counts(true, given, hits, self.several)
            found.append({"accuracy": float(right.mean()), **counted, **mean_loss(rows)})
        return {name: np.array([metrics[name] for metrics in found]) for name in found[0]}

    def rates(self, outcomes: Outcomes) -> NDArray[np.float64]:
        count = len(self.facts.labels)
        truth, answer = (_hot(outcomes[name], count) for name in ("label", "predicted"))
        with np.errstate(invalid="ignore"):
            return np.stack([(truth & answer).sum(0) / truth.sum(0), (~truth & answer).sum(0) / (~truth).sum(0)])

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
        count = np.full(len(labels), shares.shape[1] if self.several else 1)
        return {"predicted": predicted, "loss": probe.log_loss(shares, labels), "count": count}

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


def from_counts(true: NDArray[Any], given: NDArray[Any], hits: NDArray[Any], several: bool) -> Metrics:
    """Precision, recall and F1 from how often each label is true, is predicted, and is both; 0 where nothing is.

    As scikit-learn has it, averages are over the labels that occur, or over all where a row may have several.
    """
    occur = np.full(len(true), True) if several else (true + given) > 0
    true, given, hits = (counts[occur].astype(np.float64) for counts in (true, given, hits))

    def share(part: Any, whole: Any) -> Any:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    f1 = share(2 * hits, true + given)
    total = np.array([true.sum() + given.sum()])
    return {
        "precision": float(share(hits, given).mean()),
        "recall": float(share(hits, true).mean()),
        "f1": float(f1.mean()),
        "f1-micro": float(share(np.array([2 * hits.sum()]), total)[0]),
        "f1-weighted": float((f1 * true).sum() / true.sum()) if true.sum() else 0.0,
    }
