"""Examples -> the encoded store: token ids in one safetensors file that trainers map into memory (format: run.py).

Equal input gives an equal file, byte by byte. Memory is bounded: every tensor grows in a scratch file, and the
safetensors file is put together from them in one pass that also takes its SHA-256.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import tokenizers
from numpy.typing import NDArray

from finetune_api.job import Overlong, TokenLengths
from finetune_trainer.data.check import Example
from finetune_trainer.data.read import DataError

FORMAT = "finetune-encoded-1"
_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 4 * 1024 * 1024
_BLOCK = 1024 * 1024
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
_CODES = {"I32": ("i", np.int32), "I64": ("q", np.int64), "U8": ("B", np.uint8)}


@dataclass(frozen=True)
class TextModel:
    """What the base model says about its input."""

    tokenizer_json: str
    max_length: int
    """Tokens: what was asked for, or the model's limit if that is lower."""
    pad_token_id: int
    vocabulary: int | None
    """Rows of the embedding; None where config.json does not say it."""


def text_model(
    config: Mapping[str, Any], tokenizer_json: str, tokenizer_config: Mapping[str, Any], *, asked: int, uri: str
) -> TextModel:
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
    return TextModel(tokenizer_json, min(limits), pad, vocabulary if _whole(vocabulary) else None)


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


@dataclass(frozen=True)
class Encoded:
    """A finished encoded store: where it lies, and what it holds."""

    path: Path
    sha256: str
    size: int
    rows: int
    rows_by_split: Mapping[int, int]
    truncated: int
    dropped: int
    lengths: TokenLengths
    """Tokens a row, before anything is cut."""


class Encoder:
    """Tokenises examples in batches and grows the store in scratch files."""

    def __init__(
        self,
        model: TextModel,
        *,
        overlong: Overlong,
        scratch: Path,
        sources: Sequence[str],
        problem: Callable[[DataError], None],
        beat: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """`sources` are the URIs by position in the manifest; `problem` takes what is wrong with a row; `beat` is
        called with the number of rows done after every batch."""
        self._model = model
        self._overlong = overlong
        self._scratch = scratch
        self._sources = sources
        self._problem = problem
        self._beat = beat
        self._whole = _bare(model.tokenizer_json)
        self._cut = _bare(model.tokenizer_json)
        self._cut.enable_truncation(model.max_length)
        # More characters than that can hardly fit: enough to tell that a row is overlong.
        self._enough = max(1024 * 1024, 64 * model.max_length)
        self._pending: list[tuple[Example, int, int]] = []
        self._characters = 0
        self._names: dict[str, int] = {}
        self._lengths: Counter[int] = Counter()
        self._truncated = self._dropped = self._rows = self._tokens = 0
        self._rows_by_split: Counter[int] = Counter()
        names = {"input_ids": "I32", "offsets": "I64", "split": "U8", "source": "I32", "row": "I64"}
        self._columns = {name: _Column(scratch / f"{name}.bin", kind) for name, kind in names.items()}
        self._labels = _Column(scratch / "label-ids.bin", "I32")
        self._label_counts = _Column(scratch / "label-counts.bin", "I32")
        self._columns["offsets"].extend([0])

    def add(self, example: Example, *, split: int, source: int) -> None:
        """Take one example; `source` is the position of its file in the manifest."""
        self._pending.append((example, split, source))
        self._characters += len(example.text)
        if len(self._pending) >= _BATCH_ROWS or self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def finish(self, labels: Sequence[str], *, multi_label: bool, path: Path) -> Encoded:
        """Put the store together at `path`. `labels` in the order of the model's outputs must cover all examples."""
        self._flush()
        for column in (*self._columns.values(), self._labels, self._label_counts):
            column.close()
        self._write_labels(labels, multi_label)
        shapes: dict[str, list[int]] = {name: [self._rows] for name in ("labels", "split", "source", "row")}
        shapes |= {"input_ids": [self._tokens], "offsets": [self._rows + 1]}
        if multi_label:
            shapes["labels"].append(len(labels))
        sha256, size = _assemble(path, self._columns, shapes)
        for column in (*self._columns.values(), self._labels, self._label_counts):
            column.path.unlink()
        return Encoded(
            path=path,
            sha256=sha256,
            size=size,
            rows=self._rows,
            rows_by_split=self._rows_by_split,
            truncated=self._truncated,
            dropped=self._dropped,
            lengths=self._quantiles(),
        )

    def _flush(self) -> None:
        pending, self._pending, self._characters = self._pending, [], 0
        if not pending:
            return
        ids = self._encoded([example.text for example, _, _ in pending])
        limit = self._model.max_length
        for (example, split, source), tokens in zip(pending, ids, strict=True):
            length = len(tokens)
            self._lengths[length] += 1
            if length > limit:
                if self._overlong == "Fail":
                    self._problem(self._too_long(example, source, length))
                    continue
                if self._overlong == "Drop":
                    self._dropped += 1
                    continue
                self._truncated += 1
                tokens = self._cut.encode(example.text).ids
            self._check_tokens(tokens, example, source)
            self._append(example, split, source, tokens)
        self._beat(self._rows)

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Token ids with special tokens, uncut; of a text far beyond the limit only the beginning, if that is overlong
        already."""
        found = [encoding.ids for encoding in self._whole.encode_batch_fast([text[: self._enough] for text in texts])]
        for number, text in enumerate(texts):
            if len(text) > self._enough and len(found[number]) <= self._model.max_length:
                found[number] = self._whole.encode(text).ids
        return found

    def _check_tokens(self, tokens: list[int], example: Example, source: int) -> None:
        where = f"{self._sources[source]}:{example.row}"
        if not tokens:
            self._problem(DataError("InvalidRow", f"{where}: the text gives no token; mend or remove the row."))
        elif self._model.vocabulary is not None and max(tokens) >= self._model.vocabulary:
            raise DataError(
                "ModelIncomplete",
                f"tokenizer.json has the token {max(tokens)} where config.json says vocab_size "
                f"{self._model.vocabulary}: the files belong to different models; upload those of one.",
            )

    def _append(self, example: Example, split: int, source: int, tokens: list[int]) -> None:
        self._rows += 1
        self._rows_by_split[split] += 1
        self._tokens += len(tokens)
        each = [example.labels] if isinstance(example.labels, str) else example.labels
        columns = self._columns
        columns["input_ids"].extend(tokens)
        columns["offsets"].extend([self._tokens])
        columns["split"].extend([split])
        columns["source"].extend([source])
        columns["row"].extend([example.row])
        self._label_counts.extend([len(each)])
        self._labels.extend([self._names.setdefault(label, len(self._names)) for label in each])

    def _too_long(self, example: Example, source: int, length: int) -> DataError:
        return DataError(
            "RowTooLong",
            f"{self._sources[source]}:{example.row}: the row has {length} tokens, {self._model.max_length} are allowed "
            "and overlong is Fail; raise data.maxLength, shorten the row or choose Truncate.",
        )

    def _write_labels(self, labels: Sequence[str], multi_label: bool) -> None:
        """Labels were numbered as they came; now their order is known."""
        order = {label: number for number, label in enumerate(labels)}
        final = np.array([order[name] for name in self._names] or [0], dtype=np.int32)
        column = _Column(self._scratch / "labels.bin", "U8" if multi_label else "I32")
        counts, ids = self._label_counts.blocks(64 * 1024), self._labels
        with open(ids.path, "rb") as source:
            for block in counts:
                found = final[np.frombuffer(source.read(4 * int(block.sum())), dtype="<i4")]
                if multi_label:
                    for start in range(0, len(block), 1024):  # bounds the memory of 10,000 labels
                        part = block[start : start + 1024]
                        first = int(block[:start].sum())
                        hot = np.zeros((len(part), len(labels)), dtype=np.uint8)
                        hot[np.repeat(np.arange(len(part)), part), found[first : first + int(part.sum())]] = 1
                        column.write(hot.tobytes())
                else:
                    column.write(found.astype("<i4").tobytes())
        column.close()
        self._columns["labels"] = column

    def _quantiles(self) -> TokenLengths:
        total = sum(self._lengths.values())
        ordered = sorted(self._lengths.items())

        def quantile(share: float) -> int:
            seen = 0
            for length, count in ordered:
                seen += count
                if seen >= share * total:
                    return length
            return 0

        return TokenLengths(p50=quantile(0.5), p99=quantile(0.99), max=ordered[-1][0] if ordered else 0)


class _Column:
    """One tensor in the making: values of one kind in a file, little-endian."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        code, self.dtype = _CODES[kind]
        self._buffer = array(code)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - open as long as the column grows

    def extend(self, values: Sequence[int]) -> None:
        self._buffer.extend(values)
        if len(self._buffer) * self._buffer.itemsize >= _BLOCK:
            self._spill()

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def _spill(self) -> None:
        self.write(
            np.frombuffer(self._buffer, dtype=self.dtype).astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
        )
        self._buffer = array(self._buffer.typecode)

    def close(self) -> None:
        if self._buffer:
            self._spill()
        self._file.close()

    def blocks(self, length: int) -> "list[NDArray[Any]]":
        """The column in pieces of `length` values, mapped from the file."""
        if not self.path.stat().st_size:
            return []
        whole = np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")
        return [whole[start : start + length] for start in range(0, len(whole), length)]


def _assemble(path: Path, columns: Mapping[str, _Column], shapes: Mapping[str, list[int]]) -> tuple[str, int]:
    """Write the safetensors file; returns its SHA-256 and size in bytes. Wide types first, so that all are aligned."""
    width = {"I64": 0, "I32": 1, "U8": 2}
    names = sorted(columns, key=lambda name: (width[columns[name].kind], name))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    at = 0
    for name in names:
        size = columns[name].path.stat().st_size
        header[name] = {"dtype": columns[name].kind, "shape": shapes[name], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with open(path, "wb") as target:
        for data in (len(text).to_bytes(8, "little"), text):
            sha256.update(data)
            target.write(data)
        for name in names:
            with open(columns[name].path, "rb") as source:
                while block := source.read(_BLOCK):
                    sha256.update(block)
                    target.write(block)
    return sha256.hexdigest(), 8 + len(text) + at
