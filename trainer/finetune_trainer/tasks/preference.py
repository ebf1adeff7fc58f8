"""Preferences: of two answers to a prompt, the model learns to favour the chosen one (DPO, Rafailov et al. 2023).

An answer's reward is beta times how much likelier the tuned model finds it than the untouched base does. What the base
finds is computed once, before training, so there is never a second model.
"""

import json
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
    MissingColumn,
    Outcomes,
    Piece,
    RowError,
    Sample,
    Task,
    Tools,
    mask_of,
    mean_loss,
    padded,
)
from finetune_trainer.tasks.chat import ends_with_assistant, messages_of
from finetune_trainer.tasks.instruction import ChatReader, last_turn, turns
from finetune_trainer.tasks.language import LanguageLearner

SIDES = ("chosen", "rejected")
_TIE = 1e-4
"""Rewards this close are equal: the base and itself differ in the last digits, by how rows are batched."""


class Preference(Task):
    """Rows with a prompt, a chosen and a rejected answer."""

    store: ClassVar[Mapping[str, Column]] = {
        "input_ids": Column("I32", ragged=True),
        "chosen": Column("I32"),
        "chosen_turn": Column("I32"),
        "rejected_turn": Column("I32"),
    }
    """Both chats one behind the other, the length of the first, and where the answer begins in each."""

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        chats = [chat_of(row, self.columns, side) for side in SIDES]
        (*prompt, chosen), (*other, rejected) = chats
        if prompt != other:
            raise RowError(
                f"the messages before the last one differ between the columns {self.columns['chosen']!r} and "
                f"{self.columns['rejected']!r}"
            )
        if chosen == rejected:
            raise RowError("the chosen answer and the rejected one are the same")
        asked, answers = (
            json.dumps(part, ensure_ascii=False, sort_keys=True, default=str) for part in (prompt, [chosen, rejected])
        )
        return Sample(asked, answers, payload=chats)

    def facts(self, tools: Tools) -> dict[str, Any]:
        return self._reader.facts(tools)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        found = [self._reader.read([(sample.payload[side], None) for sample in samples], tools) for side in (0, 1)]
        return [_piece(chosen, rejected, tools) for chosen, rejected in zip(*found, strict=True)]

    @property
    def _reader(self) -> ChatReader:
        if self._made is None:
            self._made = ChatReader(self.config.task.chat_template)
        return self._made

    _made: ChatReader | None = None

    def learner(self, facts: Facts) -> Learner:
        return Preferrer(self.config, facts)


Read = tuple[list[int], NDArray[np.bool_]] | RowError


def _piece(chosen: Read, rejected: Read, tools: Tools) -> Sequence[Piece] | RowError:
    assert tools.text is not None
    limit, ids, starts, tokens = tools.text.max_length, list[list[int]](), list[int](), 0
    for side, read in zip(SIDES, (chosen, rejected), strict=True):
        if isinstance(read, RowError):
            return read
        start = last_turn(read[1])
        if start >= limit and tools.overlong == "Truncate":
            return RowError(
                f"the {side} answer begins at token {start}, behind the {limit} that data.maxLength allows; raise it, "
                "or choose Drop"
            )
        ids.append(read[0][:limit])
        starts.append(max(1, start))
        tokens = max(tokens, len(read[0]))
    columns = {
        "input_ids": ids[0] + ids[1],
        "chosen": len(ids[0]),
        "chosen_turn": starts[0],
        "rejected_turn": starts[1],
    }
    return [Piece(columns, tokens=tokens, length=len(ids[0]) + len(ids[1]), cut=tokens > limit)]


def chat_of(row: Mapping[str, Any], columns: Mapping[str, str], side: str) -> list[dict[str, Any]]:
    """The messages of one side, the prompt's in front; where there is no prompt, it is in the messages themselves.
    Raises RowError."""
    name = columns[side]
    if name not in row:
        raise MissingColumn(side, name, row)
    answer = turns(row, columns, side, "assistant")
    if columns["prompt"] in row and row[columns["prompt"]] is not None:
        answer = [*turns(row, columns, "prompt", "user"), *answer]
    elif isinstance(row[name], str):
        raise MissingColumn("prompt", columns["prompt"], row)
    ends_with_assistant(answer, name)
    return messages_of(answer, name)


class Preferrer(LanguageLearner):
    """DPO, its variant IPO (Azar et al. 2023), or a hinge (SLiC, Zhao et al. 2023), each as TRL computes it."""

    packs = False
    compares = len(SIDES)
    targets: ClassVar[frozenset[str]] = frozenset({"labels", "base"})

    def files(self) -> dict[str, str]:
        template = self.facts.more["template"]
        return {} if template is None else {"chat_template.jinja": template}

    def labels(self, store: Encoded, rows: Rows) -> list[NDArray[Any]]:
        """Of the chosen answers, then of the rejected ones."""
        found = []
        for side, texts in zip(SIDES, self._sides(store, rows), strict=True):
            starts = store.values(f"{side}_turn", rows)
            for ids, start in zip(texts, starts, strict=True):
                found.append(np.where(np.arange(len(ids)) >= start, ids, IGNORED).astype(np.int64))
        return found

    def _sides(self, store: Encoded, rows: Rows) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        both, first = store.each("input_ids", rows), store.values("chosen", rows)
        return (
            [ids[:count] for ids, count in zip(both, first, strict=True)],
            [ids[count:] for ids, count in zip(both, first, strict=True)],
        )

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        """The chosen chats, then the rejected ones: [2 * rows, tokens]."""
        texts = [ids for side in self._sides(store, rows) for ids in side]
        return {
            "input_ids": padded(texts, self.facts.pad_token_id),
            "attention_mask": mask_of(texts),
            "labels": padded(self.labels(store, rows), IGNORED),
        }

    def count(self, store: Encoded, rows: Rows) -> int:
        return len(rows)

    def of_base(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._likelihoods(model, inputs).T

    def _likelihoods(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """The log-probability of each answer, summed over its tokens: [2, rows]."""
        losses = self._next.row_losses(model, self.model_inputs(inputs), inputs["labels"])
        return -losses.reshape(2, -1)

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return self._losses(self._gains(model, inputs), inputs).sum()

    def _gains(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """How much likelier than for the base each answer is: log-ratios [2, rows]."""
        found = self._likelihoods(model, inputs)
        return found - inputs["base"].T.to(found.dtype)

    def _losses(self, gains: Any, inputs: Mapping[str, Any]) -> Any:
        """[rows]"""
        task = self.config.task
        assert task.beta is not None
        margins = task.beta * (gains[0] - gains[1])
        if task.loss == "hinge":
            return (1.0 - margins).clamp(min=0.0)
        if task.loss == "ipo":  # means over tokens, as its authors compute it
            counts = (inputs["labels"] != IGNORED).sum(-1).reshape(2, -1)
            means = gains / counts.clamp(min=1)
            return (means[0] - means[1] - 1.0 / (2.0 * task.beta)) ** 2
        return (-margins).logaddexp(margins.new_zeros(()))  # -log sigmoid

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        return {}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        gains = self._gains(model, inputs).double()
        assert self.config.task.beta is not None
        return {
            "loss": self._losses(gains, inputs).cpu().numpy(),
            "count": np.ones(gains.shape[1], dtype=np.int64),
            "margin": (self.config.task.beta * (gains[0] - gains[1])).cpu().numpy(),
        }

    def metrics(self, outcomes: Outcomes) -> Metrics:
        margins = outcomes["margin"]
        right = np.where(np.abs(margins) <= _TIE, 0.5, margins > 0)
        return {
            **mean_loss(outcomes),
            "reward-accuracy": float(right.mean()),
            "reward-margin": float(margins.mean()),
        }

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]]:
        """Which of the two was to be favoured, and which is."""
        favoured = [SIDES[0] if margin > 0 else SIDES[1] for margin in outcomes["margin"]]
        return [SIDES[0]] * len(favoured), favoured
