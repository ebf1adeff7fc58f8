"""Continued pre-training: the model learns to go on with a text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
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
    text_cell,
)
from finetune_trainer.tasks.continued import CONTEXT, Spans, spans
from finetune_trainer.tasks.language import LanguageLearner, check_causal, end_of, token_metrics


class CausalLm(Task):
    """Rows with a text."""

    store: ClassVar[Mapping[str, Column]] = {"input_ids": Column("I32", ragged=True)}

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        return Sample(text_cell(row, self.columns, "text"), "")

    def facts(self, tools: Tools) -> dict[str, Any]:
        text = check_causal(tools)
        return {"vocabulary": text.vocabulary or text.tokenizer.get_vocab_size(), "end": end_of(text)}

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        assert tools.text is not None
        begin, end = tools.text.special("bos"), end_of(tools.text)
        limit = tools.text.max_length
        found: list[Sequence[Piece] | RowError] = []
        for ids in tools.text.ids([sample.content for sample in samples]):
            whole = bounded(ids, begin=begin, end=end)
            if len(whole) < 2:
                found.append(RowError("the text gives no token that could be predicted"))
            elif len(whole) <= limit or tools.overlong != "Split":
                kept = whole[:limit]
                cut = len(whole) > limit
                found.append([Piece({"input_ids": kept}, tokens=len(whole), length=len(kept), cut=cut)])
            else:
                found.append(
                    [
                        Piece({"input_ids": part}, tokens=0 if number else len(whole), length=len(part))
                        for number, part in enumerate(split(whole, limit))
                    ]
                )
        return found

    def learner(self, facts: Facts) -> Learner:
        return CausalLearner(self.config, facts)


def bounded(ids: list[int], *, begin: int | None, end: int) -> list[int]:
    """A text's tokens with one token at its end that says so, and at most one at its beginning: a text may begin with
    that token itself, and the tokenizer adds another."""
    while begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    return ids if ids[-1:] == [end] else [*ids, end]


def split(ids: list[int], limit: int) -> list[list[int]]:
    """Pieces of at most `limit` tokens, each beginning with the token that the one before it ends with: so each token
    but the very first is predicted exactly once, the last one too."""
    return [ids[start : start + limit] for start in range(0, len(ids) - 1, limit - 1)]


class CausalLearner(LanguageLearner):
    """Every token but a row's first one is predicted."""

    def labels(self, store: Encoded, rows: Rows) -> list[NDArray[Any]]:
        found = [row.astype(np.int64) for row in store.each("input_ids", rows)]
        for row in found:
            row[0] = IGNORED
        return found

    def count(self, store: Encoded, rows: Rows) -> int:
        return int(store.sizes("input_ids", rows).sum()) - len(rows)

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {"source": store.values("source", rows), "row": store.values("row", rows)}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        return self.scores(model, inputs)

    def settle(self, outcomes: Outcomes) -> Outcomes:
        """The pieces of a text belong together."""
        places = np.stack([outcomes["source"].astype(np.int64), outcomes["row"].astype(np.int64)])
        texts, first, number = np.unique(places, axis=1, return_index=True, return_inverse=True)
        sums: Outcomes = {
            name: np.bincount(number.reshape(-1), weights=outcomes[name], minlength=texts.shape[1])
            for name in ("loss", "count", "correct")
            if name in outcomes
        }
        return {**{name: values[first] for name, values in outcomes.items()}, **sums}

    def metrics(self, outcomes: Outcomes) -> Metrics:
        return token_metrics(outcomes)

    def continuations(self, store: Encoded, rows: Rows) -> Spans:
        """What comes after CONTEXT tokens, or after half of a row that is shorter than twice that; without the last
        token, which mostly ends the text."""
        sizes = store.sizes("input_ids", rows)
        starts = np.maximum(1, np.minimum(CONTEXT, sizes // 2))
        return spans(starts.tolist(), (sizes - 1).tolist())

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        """Each token with its share among the tokens of training, whatever comes before it."""
        # plus one: a token that is new in `rows` costs, but not infinitely
        seen = np.ones(int(self.facts.more["vocabulary"]), dtype=np.int64)
        for start in range(0, len(train), 4096):
            known = np.concatenate(self.labels(store, train[start : start + 4096]))
            seen += np.bincount(known[known != IGNORED], minlength=len(seen))
        losses, usual = -np.log(seen / seen.sum()), int(seen.argmax())
        labels = [row[row != IGNORED] for row in self.labels(store, rows)]
        return {
            "loss": np.array([losses[row].sum() for row in labels]),
            "count": np.array([len(row) for row in labels]),
            "correct": np.array([(row == usual).sum() for row in labels]),
        }
