"""Token classification: a tag for each word, such as the names of people and places in a text (NER).

Rows are written in one of two ways: words with a tag each, taken as they are, or a text with spans (start, end, label),
which become BIO tags of its words. Either way a word's first token carries its tag and its other tokens carry none, as
in the paper on BERT: so a word counts once, however many tokens it has. What is cut off takes its tags along.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from functools import cache, cached_property
from itertools import pairwise, takewhile
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.data.read import DataError
from finetune_trainer.tasks import losses, probe
from finetune_trainer.tasks.base import (
    IGNORED,
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
    encodable,
    kind_of,
    label_of,
    mask_of,
    mean_loss,
    objects,
    padded,
    text_cell,
)
from finetune_trainer.tasks.losses import ClassLoss, balanced
from finetune_trainer.tasks.ranking import confusion_matrix

WORDS, SPANS = "words with tags", "text with spans"
OUTSIDE = "O"
_OF_ENTITIES = re.compile(r"O|[BIESLU](-.*)?", re.DOTALL)
"""Tags of BIO and IOB2, of BIOES, and of BILOU."""
_AS_BIOES = str.maketrans("LU", "ES")
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fff\u3001-\u303f\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # CJK
)
"""Letters of scripts that put no space between words: each counts as a word."""


class Span(NamedTuple):
    """Part of a text, in characters from `start` to before `end`."""

    start: int
    end: int
    label: str


class Unit(NamedTuple):
    """What carries one tag: a word, or several that the tokenizer does not tell apart."""

    token: int
    """The place of its first token."""
    start: int
    end: int
    """Its characters in the text, from `start` to before `end`."""


# --- reading rows ---


class TokenClassification(Task):
    """Rows of words and tags, or of a text and spans."""

    labelled = True
    store: ClassVar[Mapping[str, Column]] = {
        "input_ids": Column("I32", ragged=True),
        "labels": Column("I32", ragged=True, labels=True),
    }

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        if self.columns["tokens"] not in row and self.columns["text"] in row:
            text = text_cell(row, self.columns, "text")
            spans = _spans(cell(row, self.columns, "spans"), self.columns["spans"], text)
            labels = (OUTSIDE, *(f"{mark}-{span.label}" for span in spans for mark in "BI"))
            answer = "\n".join(f"{span.start} {span.end} {span.label}" for span in spans)
            return Sample(text, answer, tuple(dict.fromkeys(labels)), SPANS, (text, spans))
        words = _words(cell(row, self.columns, "tokens"), self.columns["tokens"])
        found, name = cell(row, self.columns, "tags"), self.columns["tags"]
        if not isinstance(found, list | tuple):
            raise RowError(f"the column {name!r} must hold a list of tags, one a word, found {kind_of(found)}")
        if len(found) != len(words):
            raise RowError(f"the column {name!r} holds {len(found)} tags for {len(words)} words")
        tags = [label_of(tag, name) for tag in found]
        return Sample(" ".join(words), "\n".join(tags), tuple(dict.fromkeys(tags)), WORDS, (words, tags))

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        text = tools.text
        assert text is not None
        if samples[0].form == WORDS:  # all rows are of one form
            found = text.cut_words([sample.payload[0] for sample in samples])
        else:
            found = text.cut_with_offsets([sample.content for sample in samples])
        pieces: list[Sequence[Piece] | RowError] = []
        for sample, (encoding, tokens) in zip(samples, found, strict=True):
            aligned = tags_of_tokens if sample.form == WORDS else tags_of_spans
            tags = aligned(encoding, *sample.payload)
            if not any(tags):
                pieces.append(RowError("no word of the row gives a token, so there is nothing to tag"))
                continue
            labels = [IGNORED if tag is None else tools.number(tag) for tag in tags]
            columns = {"input_ids": encoding.ids, "labels": labels}
            pieces.append([Piece(columns, tokens=tokens, length=len(labels), cut=tokens > len(labels))])
        return pieces

    def order_labels(
        self, found: Collection[str], *, wanted: Sequence[str] | None, base: Sequence[str] | None
    ) -> list[str]:
        """Raises DataError when only some of the tags are of entities: the others could not be counted with them."""
        labels = super().order_labels(found, wanted=wanted, base=base)
        others = [label for label in labels if not _OF_ENTITIES.fullmatch(label)]
        prefixed = [label for label in labels if _OF_ENTITIES.fullmatch(label) and "-" in label]
        if others and prefixed:
            raise DataError(
                "MixedTags",
                f"The tag {prefixed[0][:64]!r} is of an entity (B-x, I-x, E-x, S-x or O) and {others[0][:64]!r} is "
                "not; write all tags in one way.",
            )
        return labels

    def measure(self, store: Encoded, train: Rows, facts: Facts) -> dict[str, Any]:
        if self.config.training.class_weights is None:
            return {}
        labels = np.concatenate(store.each("labels", train))
        return {losses.WEIGHTS: balanced(np.bincount(labels[labels != IGNORED], minlength=len(facts.labels)))}

    def learner(self, facts: Facts) -> Learner:
        return TokenClassifier(self.config, facts)


def _words(value: Any, name: str) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else kind_of(value)
        raise RowError(f"the column {name!r} must hold a list of words, found {found}")
    for number, word in enumerate(value, start=1):
        if not isinstance(word, str) or not word or word.isspace():
            what = "an empty one" if isinstance(word, str) else kind_of(word)
            raise RowError(
                f"the column {name!r} must hold words, found {what} as number {number}; remove it and its tag"
            )
        if not encodable(word):
            raise RowError(f"word {number} of the column {name!r} holds half a surrogate pair, which is no character")
    return list(value)


def _spans(value: Any, name: str, text: str) -> list[Span]:
    """The spans in their order in the text. Raises RowError where they are no spans of it, or overlap."""
    if not isinstance(value, list | tuple):
        raise RowError(f"the column {name!r} must hold a list of spans (start, end, label), found {kind_of(value)}")
    spans = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping) or not {"start", "end", "label"} <= item.keys():
            raise RowError(f"span {number} of the column {name!r} is no object with start, end and label")
        start, end = (_place(item[key], f"{key} of span {number} of the column {name!r}") for key in ("start", "end"))
        label = label_of(item["label"], name)
        label_of(f"B-{label}", name)
        if not start < end <= len(text):
            raise RowError(
                f"span {number} of the column {name!r} goes from {start} to {end}, which is no part of a text of "
                f"{len(text)} characters; count characters, not bytes, and let end be the place behind the last one"
            )
        if text[start:end].isspace():
            raise RowError(f"span {number} of the column {name!r}, from {start} to {end}, holds nothing but spaces")
        spans.append(Span(start, end, label))
    spans.sort()
    for one, other in pairwise(spans):
        if other.start < one.end:
            raise RowError(
                f"two spans of the column {name!r} overlap, {one.start} to {one.end} and {other.start} to {other.end}; "
                "keep one of them"
            )
    return spans


def _place(value: Any, what: str) -> int:
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool) and isfinite(value)
    if not number or value < 0 or value != int(value):
        raise RowError(f"the {what} must be a whole number from 0, found {kind_of(value)}")
    return int(value)


# --- alignment: which token carries which tag ---


def tags_of_tokens(encoding: Any, words: Sequence[str], tags: Sequence[str]) -> list[str | None]:
    """The tag of each token of encoded words: the first of a word has the word's, the others none."""
    found: list[str | None] = []
    before = None
    for word in encoding.word_ids:
        found.append(None if word is None or word == before else tags[word])
        before = word
    return found


def tags_of_spans(encoding: Any, text: str, spans: Sequence[Span]) -> list[str | None]:
    """The BIO tag of each token of an encoded text: the first of a unit has one, the others none."""
    units = units_of(text, encoding)
    found: list[str | None] = [None] * len(encoding.ids)
    for unit, tag in zip(units, bio(spans, units), strict=True):
        found[unit.token] = tag
    return found


def units_of(text: str, encoding: Any) -> list[Unit]:
    """Words that have a token of their own, and what comes with them: a token may hold several words."""
    reach = max((end for _, end in encoding.offsets), default=0)
    words = [match.span() for match in takewhile(lambda match: match.start() < reach, _word().finditer(text))]
    starts = [start for start, _ in words]
    units: list[Unit] = []
    reached = -1
    for token, ((start, end), special) in enumerate(zip(encoding.offsets, encoding.special_tokens_mask, strict=True)):
        while start < end and text[start].isspace():
            start += 1
        if special or start >= end:
            continue
        first, last = bisect_right(starts, start) - 1, bisect_right(starts, end - 1) - 1
        if first > reached:
            units.append(Unit(token, words[first][0], words[last][1]))
        elif last > reached:
            units[-1] = units[-1]._replace(end=words[last][1])
        reached = max(reached, last)
    return units


def bio(spans: Sequence[Span], units: Sequence[Unit]) -> list[str]:
    """The tag of each unit. A span takes every unit that it touches and that no earlier one has."""
    tags = [OUTSIDE] * len(units)
    place = 0
    for span in spans:
        while place < len(units) and units[place].end <= span.start:
            place += 1
        mark = "B"
        while place < len(units) and units[place].start < span.end:
            tags[place] = f"{mark}-{span.label}"
            mark = "I"
            place += 1
    return tags


@cache
def _word() -> re.Pattern[str]:
    """What counts as a word of a text: letters with their marks, digits, or any other character but space alone."""
    marks = re.escape("".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M"))
    letter = rf"[^\W\d_{_ALONE}]"
    return re.compile(rf"{letter}(?:{letter}|[{marks}])*|[{_ALONE}][{marks}]*|\d+|_|[^\w\s]")


# --- learning ---


class TokenClassifier(Learner):
    """Cross entropy over the tagged tokens."""

    auto_class = "AutoModelForTokenClassification"
    probe = "positions"

    def model_settings(self) -> dict[str, Any]:
        labels = self.facts.labels
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    @property
    def of_entities(self) -> bool:
        """Whether tags begin and continue entities; else each tag is of one word (parts of speech)."""
        return all(_OF_ENTITIES.fullmatch(label) for label in self.facts.labels)

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        texts = store.each("input_ids", rows)
        return {
            "input_ids": padded(texts, self.facts.pad_token_id),
            "attention_mask": mask_of(texts),
            "labels": padded(store.each("labels", rows), IGNORED),
        }

    @cached_property
    def _loss(self) -> ClassLoss:
        return ClassLoss.of(self.config.training, self.facts)

    def count(self, store: Encoded, rows: Rows) -> float:
        return float(self._loss.shares(np.concatenate(self.tags(store, rows))).sum())

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(model(**self.model_inputs(inputs)).logits, inputs["labels"]).sum()

    def _losses(self, logits: Any, labels: Any) -> Any:
        """[rows, tokens]; 0 where there is no label."""
        return self._loss.one(logits, labels.clamp(min=0)) * (labels != IGNORED)

    def tags(self, store: Encoded, rows: Rows) -> list[NDArray[Any]]:
        """The labels of each row's words, int32."""
        return [labels[labels != IGNORED] for labels in store.each("labels", rows)]

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"label": objects([tags.tolist() for tags in self.tags(store, rows)])}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        logits, labels = model(**self.model_inputs(inputs)).logits, inputs["labels"]
        losses = self._losses(logits, labels)
        known = labels.cpu().numpy()
        tagged = known != IGNORED
        chosen = logits.argmax(-1).cpu().numpy()
        return {
            "predicted": objects([row[kept].tolist() for row, kept in zip(chosen, tagged, strict=True)]),
            "loss": losses.double().sum(-1).cpu().numpy(),
            "count": (self._loss.shares(np.maximum(known, 0)) * tagged).sum(-1),
        }

    def settle(self, outcomes: Outcomes) -> Outcomes:
        """Adds how many words and entities of each row are right: metrics are quotients of their sums."""
        wanted, found = outcomes["label"], outcomes["predicted"]
        pairs = list(zip(wanted, found, strict=True))
        counts = {
            "words": [len(tags) for tags in wanted],
            "words-right": [sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs],
        }
        if self.of_entities:
            entities = [tuple(self._entities(tags) for tags in pair) for pair in pairs]
            counts["entities"] = [len(there) for there, _ in entities]
            counts["entities-found"] = [len(seen) for _, seen in entities]
            counts["entities-right"] = [len(there & seen) for there, seen in entities]
        return {**outcomes, **{name: np.array(values, dtype=np.int64) for name, values in counts.items()}}

    def _entities(self, tags: Sequence[int]) -> set[tuple[str, int, int]]:
        """Kind, first and last word of each entity, as seqeval finds them; entities never cross rows."""
        from seqeval.metrics.sequence_labeling import get_entities

        names = [self.facts.labels[tag] for tag in tags]
        return set(get_entities([name[0].translate(_AS_BIOES) + name[1:] for name in names]))

    def metrics(self, outcomes: Outcomes) -> Metrics:
        return {
            "accuracy": _share(outcomes["words-right"], outcomes["words"]),
            **(self._of_entities(outcomes) if self.of_entities else self._of_words(outcomes)),
            **mean_loss(outcomes),
        }

    def _of_entities(self, outcomes: Outcomes) -> Metrics:
        """Micro averages over entities, those of seqeval."""
        right, found, wanted = (outcomes[f"entities{end}"] for end in ("-right", "-found", ""))
        return {
            "precision": _share(right, found),
            "recall": _share(right, wanted),
            "f1": 2 * _share(right, found + wanted),
        }

    def confusion(self, outcomes: Outcomes) -> NDArray[np.int64] | None:
        """Of words."""
        labels, predictions = (np.concatenate(outcomes[name]).astype(np.int64) for name in ("label", "predicted"))
        return confusion_matrix(labels, predictions, len(self.facts.labels))

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]]:
        """The words that are tagged wrong, counted from 1."""
        pairs = list(zip(outcomes["label"], outcomes["predicted"], strict=True))
        wrong = [[n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b] for pair in pairs]

        def named(side: int) -> list[str]:
            return [
                ", ".join(f"word {n + 1}: {self.facts.labels[pair[side][n]]}" for n in places)
                for pair, places in zip(pairs, wrong, strict=True)
            ]

        return named(0), named(1)

    def _of_words(self, outcomes: Outcomes) -> Metrics:
        """Macro averages over tags."""
        from sklearn.metrics import precision_recall_fscore_support

        labels, predictions = (np.concatenate(outcomes[name]) for name in ("label", "predicted"))
        averages = precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)
        return dict(zip(("precision", "recall", "f1"), map(float, averages[:3]), strict=True))

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        """Every word has the tag that is most frequent in training; the loss is that of the tags' shares there."""
        known = np.concatenate(self.tags(store, train))
        seen = np.bincount(known, minlength=len(self.facts.labels)) + 1
        words = sum(len(tags) for tags in self.tags(store, rows))
        shares = np.broadcast_to(seen / seen.sum(), (words, len(seen)))
        return self._outcomes(shares, self.tags(store, rows))

    def _outcomes(self, shares: NDArray[np.float64], tags: Sequence[NDArray[Any]]) -> Outcomes:
        """Predictions out of probabilities [words of all rows, labels]."""
        counts = np.array([len(row) for row in tags])
        starts = np.cumsum(counts) - counts
        known = np.concatenate(tags)
        found = self._loss.of_shares(shares, known)
        chosen = np.split(shares.argmax(1), starts[1:])
        return {
            "predicted": objects([row.tolist() for row in chosen]),
            "loss": np.add.reduceat(found, starts),
            "count": np.add.reduceat(self._loss.shares(known), starts),
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
        known = np.concatenate(self.tags(store, train))
        if known.min() == known.max():
            return None
        shares = probe.classify(features, known, answers, count=len(self.facts.labels), seed=seed)
        return self._outcomes(shares, self.tags(store, rows))


def _share(of: NDArray[Any], total: NDArray[Any]) -> float:
    """0 where there is nothing to divide by, as in seqeval."""
    return float(of.sum() / max(1, total.sum()))
