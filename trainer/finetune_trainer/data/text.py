"""The base model's tokenizer, and what the model says about its input. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import tokenizers

from finetune_trainer.data.read import DataError

_UNLIMITED = 1_000_000_000
# Positions start behind the padding token's id there.
_OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
}


@dataclass(frozen=True)
class Text:
    """The tokenizer of a base model. Its own truncation and padding are off, whatever its file says."""

    tokenizer_json: str
    max_length: int
    """Tokens: what was asked for, or the model's limit if that is lower."""
    pad_token_id: int
    vocabulary: int | None
    """Rows of the embedding; None where config.json does not say it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json"""
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json"""

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Neither cuts nor pads."""
        return _bare(self.tokenizer_json)

    @cached_property
    def unknown_id(self) -> int | None:
        """The token for what the tokenizer does not know; None where it knows everything (bytes)."""
        named = self.tokenizer_config.get("unk_token")
        name = named.get("content") if isinstance(named, dict) else named
        model: Any = self.tokenizer.model
        name = name if isinstance(name, str) else getattr(model, "unk_token", None)
        return self.tokenizer.token_to_id(name) if isinstance(name, str) else None

    @cached_property
    def _cutting(self) -> tokenizers.Tokenizer:
        tokenizer = _bare(self.tokenizer_json)
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def ids(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of whole texts, perhaps with the tokenizer's special tokens around them."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)]

    def cut(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """Token ids with special tokens, at most max_length of them, and how many the whole text has. Of a text far
        beyond the limit only the beginning is looked at, if that is overlong already."""
        # More characters than that can hardly fit: enough to tell that a row is overlong.
        enough = max(1024 * 1024, 64 * self.max_length)
        found = self.ids([text[:enough] for text in texts])
        for number, text in enumerate(texts):
            if len(text) > enough and len(found[number]) <= self.max_length:
                found[number] = self.tokenizer.encode(text).ids
        return [
            (ids if len(ids) <= self.max_length else self._cutting.encode(text).ids, len(ids))
            for text, ids in zip(texts, found, strict=True)
        ]


def read_text(
    config: Mapping[str, Any], tokenizer_json: str, tokenizer_config: Mapping[str, Any], *, asked: int, uri: str
) -> Text:
    """Read config.json, tokenizer.json and tokenizer_config.json. Raises DataError ModelIncomplete."""
    tokenizer = _tokenizer(tokenizer_json, uri)
    pad = _pad_token_id(config, tokenizer, tokenizer_config)
    if pad is None:
        raise DataError(
            "ModelIncomplete",
            f"{uri}: neither config.json nor the tokenizer names a padding or end token; "
            "add pad_token_id to config.json.",
        )
    vocabulary = config.get("vocab_size")
    limits = [asked, *_limits(config, tokenizer_config, pad)]
    known = vocabulary if _whole(vocabulary) else None
    return Text(tokenizer_json, min(limits), pad, known, config, tokenizer_config)


def _limits(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], pad: int) -> list[int]:
    found = []
    for name in ("max_position_embeddings", "n_positions"):
        if _whole(config.get(name)):
            offset = pad + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0
            found.append(int(config[name]) - offset)
    limit = tokenizer_config.get("model_max_length")
    if isinstance(limit, int | float) and 0 < limit < _UNLIMITED:
        found.append(int(limit))
    return [limit for limit in found if limit > 0]


def _pad_token_id(
    config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]
) -> int | None:
    if _whole(config.get("pad_token_id")):
        return int(config["pad_token_id"])
    token = tokenizer_config.get("pad_token")
    name = token.get("content") if isinstance(token, dict) else token
    found: Any = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if found is None and tokenizer.padding:
        found = tokenizer.padding["pad_id"]
    if found is None:
        end = config.get("eos_token_id")
        found = end[0] if isinstance(end, list) and end else end
    return found if _whole(found) else None


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tokenizer(tokenizer_json: str, uri: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            "ModelIncomplete",
            f"{uri}/tokenizer.json: not a tokenizer of the tokenizers library ({str(error)[:120]}); save it again with "
            "AutoTokenizer.save_pretrained.",
        ) from error


def _bare(tokenizer_json: str) -> tokenizers.Tokenizer:
    """A tokenizer that neither cuts nor pads, whatever its file says."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
