"""The base model's tokenizer, and what the model says about its input. Torch-free."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeGuard

import tokenizers

from finetune_trainer.data.read import DataError

_UNLIMITED = 1_000_000_000
_BEGINNING, _CHARACTERS, _UNSURE = 256, 8, 16
"""A text of more characters than 256, and than 8 a token of the limit, is first tokenised up to there, and taken for
overlong if that gives 16 tokens more than the limit."""
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
    own_limit: int | None = None
    """Tokens that the model can read; None where nothing says it."""

    def limited(self, asked: int) -> "Text":
        """The same for texts that have a limit of their own: what was asked for, or the model's if that is lower."""
        return replace(self, max_length=asked if self.own_limit is None else min(asked, self.own_limit))

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

    def special(self, name: Literal["bos", "eos", "pad", "unk"]) -> int | None:
        """The id of a special token: as tokenizer_config.json names it, else as config.json does."""
        token = self.tokenizer_config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found: Any = self.tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            found = self.config.get(f"{name}_token_id")
            found = found[0] if isinstance(found, list) and found else found
        return found if _whole(found) else None

    def cut(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """Token ids with special tokens, at most max_length of them, and how many the whole text has (of a text far
        beyond the limit, about how many: only its beginning is tokenised)."""
        found = self._read(texts, self.tokenizer.encode_batch_fast)
        return [(encoding.ids, tokens) for encoding, tokens in self._cut(found)]

    def cut_with_offsets(self, texts: Sequence[str]) -> list[tuple[Any, int]]:
        """As `cut`, but whole encodings of the tokenizers library, which know the characters of each token."""
        return self._cut(self._read(texts, self.tokenizer.encode_batch))

    def cut_words(self, rows: Sequence[Sequence[str]]) -> list[tuple[Any, int]]:
        """Encodings of rows of words, which know the word of each token, and how many tokens the whole row has.

        Raises DataError ModelUnsuitable where words cannot be encoded one by one.
        """
        prefix = self.word_prefix
        if prefix is None:
            raise DataError(
                "ModelUnsuitable",
                "The base model's tokenizer encodes a word given alone as in no running text; give texts with spans "
                "instead of words with tags, or choose another base model.",
            )
        given = [[prefix + word for word in row] for row in rows]
        found = self.tokenizer.encode_batch(given, is_pretokenized=True, add_special_tokens=False)
        return self._cut([(encoding, len(encoding)) for encoding in found])

    def cut_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, int]]:
        """Encodings of two texts together, the longer one cut first, and how many tokens they have uncut."""
        special = self.tokenizer.num_special_tokens_to_add(True)
        sides = [self._read(side, self.tokenizer.encode_batch) for side in zip(*pairs, strict=True)]
        return [
            (self._cutting.post_process(one, other), tokens + others + special)
            for (one, tokens), (other, others) in zip(*sides, strict=True)
        ]

    @property
    def parts_pairs(self) -> bool:
        """Whether the tokenizer puts something between two texts."""
        ids = self.tokenizer.encode("a", "b").sequence_ids
        return None in ids[ids.index(0) : ids.index(1)] if 0 in ids and 1 in ids else False

    @property
    def token_types(self) -> bool:
        """Whether the model tells two texts apart by token_type_ids."""
        kinds = self.config.get("type_vocab_size")
        return _whole(kinds) and kinds > 1

    def _read(self, texts: Sequence[str], encode: Callable[..., list[Any]]) -> list[tuple[Any, int]]:
        """Encodings without special tokens, and how many tokens the whole texts have.

        Of a long text only the beginning is encoded, if that alone is beyond the limit; the number is estimated then.
        """
        begun = max(_BEGINNING, _CHARACTERS * self.max_length)
        found = encode([text[:begun] for text in texts], add_special_tokens=False)
        long = [number for number, text in enumerate(texts) if len(text) > begun]
        # The last tokens of a beginning may be others than in the whole text.
        wanted = [number for number in long if len(found[number]) <= self.max_length + _UNSURE]
        for number, encoding in zip(
            wanted, encode([texts[number] for number in wanted], add_special_tokens=False), strict=True
        ):
            found[number] = encoding
        counts = [len(encoding) for encoding in found]
        for number in set(long) - set(wanted):
            counts[number] = round(counts[number] * len(texts[number]) / begun)
        return list(zip(found, counts, strict=True))

    def _cut(self, found: Sequence[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Encodings cut to max_length with special tokens, and how many tokens they had before."""
        special = self.tokenizer.num_special_tokens_to_add(False)
        # Truncation and special tokens come after the text is tokenised: no need to do that twice.
        return [(self._cutting.post_process(encoding), tokens + special) for encoding, tokens in found]

    @cached_property
    def word_prefix(self) -> str | None:
        """What makes a word given alone the tokens that it is within a text: nothing, or a space before it, by which
        byte-level BPE and SentencePiece know that a word begins; None where neither does."""
        for first, second in (("the", "time"), ("a", "b"), ("1", "2")):
            start, text = self.ids([first, f"{first} {second}"], special=False)
            for prefix in ("", " "):
                pair = [prefix + first, prefix + second]
                alone = self.tokenizer.encode(pair, is_pretokenized=True, add_special_tokens=False)
                tokens = [token for token, word in zip(alone.ids, alone.word_ids, strict=True) if word == 1]
                if tokens and start + tokens == text:
                    return prefix
        return None


_FEWEST = 8
"""Tokens that a row must at least be able to have."""


def read_text(
    config: Mapping[str, Any],
    tokenizer_json: str,
    tokenizer_config: Mapping[str, Any],
    *,
    asked: int,
    uri: str,
    taken: int = 0,
) -> Text:
    """Read config.json, tokenizer.json and tokenizer_config.json. So many positions are `taken` by learned tokens.
    Raises DataError ModelIncomplete, ModelUnsuitable."""
    tokenizer = _tokenizer(tokenizer_json, uri)
    pad = _pad_token_id(config, tokenizer, tokenizer_config)
    if pad is None:
        raise DataError(
            "ModelIncomplete",
            f"{uri}: neither config.json nor the tokenizer names a padding or end token; "
            "add pad_token_id to config.json.",
        )
    vocabulary = config.get("vocab_size")
    positions = _positions(config, pad)
    if taken and positions is not None and positions - taken < _FEWEST:
        raise DataError(
            "ModelUnsuitable",
            f"method.virtualTokens: {taken} learned tokens leave no room for rows in the {positions} positions of "
            f"{uri}; set it to {max(1, positions // 2)} or less.",
        )
    limits = [positions - taken if positions is not None else None, _tokenizer_limit(tokenizer_config)]
    own = min((limit for limit in limits if limit is not None), default=None)
    known = vocabulary if _whole(vocabulary) else None
    return Text(tokenizer_json, asked, pad, known, config, tokenizer_config, own).limited(asked)


def _positions(config: Mapping[str, Any], pad: int) -> int | None:
    """How many tokens the model can tell apart by their places."""
    offset = pad + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0
    named = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    found = [int(value) - offset for value in named if _whole(value)]
    return min((limit for limit in found if limit > 0), default=None)


def _tokenizer_limit(tokenizer_config: Mapping[str, Any]) -> int | None:
    limit = tokenizer_config.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _UNLIMITED and int(limit) > 0 else None


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
