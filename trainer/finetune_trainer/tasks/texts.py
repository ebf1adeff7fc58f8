"""What the model reads where an answer is about one text, or about two: how rows read, are encoded and put together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text
from finetune_trainer.tasks.base import Column, Facts, Piece, Sample, Tools, mask_of, padded, text_cell

ONE_TEXT: Mapping[str, Column] = {"input_ids": Column("I32", ragged=True)}
TWO_TEXTS: Mapping[str, Column] = {**ONE_TEXT, "token_type_ids": Column("U8", ragged=True)}
"""Columns of the encoded store."""
TYPES = "tokenTypes"
"""Name among a run's facts: whether the model tells two texts apart by token_type_ids."""


def texts_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """The text of a row, or both. Raises RowError, MissingColumn."""
    roles = ("text", "pair") if "pair" in columns else ("text",)
    return tuple(text_cell(row, columns, role) for role in roles)


def pieces_of(samples: Sequence[Sample], text: Text, columns: Mapping[str, str]) -> list[Piece]:
    """What a model reads of samples whose payload, where there are two texts, begins with these."""
    if "pair" not in columns:
        found = text.cut([sample.content for sample in samples])
        return [Piece({"input_ids": ids}, tokens, len(ids), cut=tokens > len(ids)) for ids, tokens in found]
    pairs = text.cut_pairs([(sample.payload[0], sample.payload[1]) for sample in samples])
    return [
        Piece({"input_ids": e.ids, "token_type_ids": e.type_ids}, tokens, len(e), cut=tokens > len(e))
        for e, tokens in pairs
    ]


def check_texts(tools: Tools, columns: Mapping[str, str]) -> dict[str, Any]:
    """Facts about two texts. Raises DataError where the model could not tell where the first one ends."""
    text = tools.text
    if text is None or "pair" not in columns:
        return {}
    if not text.parts_pairs and not text.token_types:
        raise DataError(
            "ModelUnsuitable",
            "spec.task.columns.pair: the base model's tokenizer puts nothing between two texts; choose an encoder such "
            "as BERT, or write both texts into one column in words of your own.",
        )
    return {TYPES: text.token_types}


def collate_texts(store: Encoded, rows: Rows, facts: Facts) -> dict[str, NDArray[np.int64]]:
    """What the model's forward takes, [rows, longest]."""
    texts = store.each("input_ids", rows)
    found = {"input_ids": padded(texts, facts.pad_token_id), "attention_mask": mask_of(texts)}
    if facts.more.get(TYPES):
        found["token_type_ids"] = padded(store.each("token_type_ids", rows), 0)
    return found
