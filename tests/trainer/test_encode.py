"""The encoded store, with the tokenizer of a real model."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tests.trainer.memory import config_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from finetune_api.scalars import Overlong
from finetune_trainer import tasks
from finetune_trainer.data.batch import Encoded as Store
from finetune_trainer.data.check import Example
from finetune_trainer.data.encode import Encoded, Encoder
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text, read_text
from finetune_trainer.run import TEST, TRAIN, VALIDATION
from finetune_trainer.tasks.base import Sample, Tools

CONFIG: dict[str, Any] = {"model_type": "bert", "max_position_embeddings": 512, "vocab_size": 30522, "pad_token_id": 0}


def model(minilm_dir: Path, asked: int = 16) -> Text:
    return read_text(CONFIG, (minilm_dir / "tokenizer.json").read_text(), {}, asked=asked, uri="file:///model")


def example(number: int, text: str, *labels: str) -> Example:
    return Example(number, Sample(text, "", labels), 0, 0)


def encode(
    text: Text,
    directory: Path,
    examples: list[Example],
    *,
    overlong: Overlong = "Truncate",
    labels: tuple[str, ...] = ("a", "b", "c"),
) -> tuple[Encoded, list[DataError]]:
    directory.mkdir(exist_ok=True)
    problems: list[DataError] = []
    encoder = Encoder(
        tasks.get(config_of()),
        Tools(text, overlong),
        scratch=directory,
        sources=["s3://b/model", "s3://b/rows"],
        problem=problems.append,
    )
    for number, item in enumerate(examples):
        encoder.add(item, split=(TRAIN, VALIDATION, TEST)[number % 3], source=1)
    return encoder.finish(labels, path=directory / "store.safetensors"), problems


TEXTS = ["A short one.", "Ein längerer Satz mit Umlauten: äöü ß €.", "x", "many words " * 30, "日本語 text", "🙂 done"]


def test_the_store_holds_what_the_tokenizer_says(minilm_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(16)
    examples = [example(number + 5, text, "cab"[number % 3]) for number, text in enumerate(TEXTS)]
    encoded, problems = encode(model(minilm_dir), tmp_path, examples)
    store = load_file(encoded.path)
    assert not problems
    assert {name: tensor.dtype.name for name, tensor in store.items()} == {
        "input_ids": "int32",
        "input_ids.offsets": "int64",
        "labels": "int32",
        "labels.offsets": "int64",
        "length": "int32",
        "split": "uint8",
        "source": "int32",
        "row": "int64",
    }
    for number, text in enumerate(TEXTS):
        start, end = store["input_ids.offsets"][number : number + 2]
        assert store["input_ids"][start:end].tolist() == tokenizer.encode(text).ids
    assert store["labels"].tolist() == [2, 0, 1, 2, 0, 1]
    assert store["split"].tolist() == [TRAIN, VALIDATION, TEST] * 2
    assert store["row"].tolist() == [5, 6, 7, 8, 9, 10]
    assert store["source"].tolist() == [1] * 6
    assert encoded.rows == 6
    assert encoded.examples_by_split == {TRAIN: 2, VALIDATION: 2, TEST: 2}
    assert encoded.size == encoded.path.stat().st_size
    with safe_open(encoded.path, "np") as file:
        assert file.metadata() == {"format": "finetune-encoded-2"}


def test_a_cut_row_keeps_its_special_tokens_and_lengths_are_those_before_the_cut(
    minilm_dir: Path, tmp_path: Path
) -> None:
    encoded, _ = encode(model(minilm_dir), tmp_path, [example(1, "word " * 40), example(2, "word")])
    store = load_file(encoded.path)
    assert store["input_ids.offsets"].tolist() == [0, 16, 19]
    assert [store["input_ids"][0], store["input_ids"][15]] == [101, 102]
    assert encoded.truncated == 1
    assert encoded.lengths.max == 42
    assert encoded.lengths.p50 == 3


def test_overlong_rows_are_dropped_or_fail_when_asked(minilm_dir: Path, tmp_path: Path) -> None:
    rows = [example(1, "word"), example(7, "word " * 40)]
    dropped, problems = encode(model(minilm_dir), tmp_path / "drop", rows, overlong="Drop")
    assert (dropped.rows, dropped.dropped, problems) == (1, 1, [])
    _, problems = encode(model(minilm_dir), tmp_path / "fail", rows, overlong="Fail")
    assert problems[0].reason == "RowTooLong"
    assert problems[0].message.startswith("s3://b/rows:7: the row has about 42 tokens, 16 are allowed")


def test_equal_input_gives_an_equal_file(minilm_dir: Path, tmp_path: Path) -> None:
    rows = [example(number, f"row number {number} " * (number % 7 + 1)) for number in range(3000)]
    one, _ = encode(model(minilm_dir), tmp_path / "one", rows)
    two, _ = encode(model(minilm_dir), tmp_path / "two", rows)
    assert one.digest == two.digest
    assert one.path.read_bytes() == two.path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["store.safetensors"]


def test_labels_are_numbered_in_the_order_of_the_outputs(minilm_dir: Path, tmp_path: Path) -> None:
    rows = [example(1, "one", "c", "a"), example(2, "two"), example(3, "three", "b")]
    encoded, _ = encode(model(minilm_dir), tmp_path, rows)
    store = load_file(encoded.path)
    assert store["labels"].tolist() == [2, 0, 1]
    assert store["labels.offsets"].tolist() == [0, 2, 2, 3]


def test_many_rows_of_several_labels_stay_in_order(minilm_dir: Path, tmp_path: Path) -> None:
    names = [f"label-{number:02}" for number in range(40)]
    rows = [example(i, "text", *[names[(i * 7 + k) % 40] for k in range(i % 4)]) for i in range(2500)]
    encoded, _ = encode(model(minilm_dir), tmp_path, rows, labels=tuple(names))
    store = Store(encoded.path)
    found = store.each("labels", np.arange(len(rows)))
    assert [tuple(names[label] for label in row) for row in found] == [row.sample.labels for row in rows]


def test_a_huge_text_is_cut_like_any_other(minilm_dir: Path, tmp_path: Path) -> None:
    huge, spaced = "word " * 300_000, " " * 2_000_000 + "the end"
    encoded, _ = encode(model(minilm_dir), tmp_path, [example(1, huge), example(2, spaced)])
    store = load_file(encoded.path)
    assert store["input_ids.offsets"].tolist() == [0, 16, 20]


def test_memory_does_not_grow_with_the_rows(minilm_dir: Path, tmp_path: Path) -> None:
    text = model(minilm_dir)
    encoder = Encoder(
        tasks.get(config_of()), Tools(text, "Truncate"), scratch=tmp_path, sources=["s3://b/rows"], problem=print
    )
    tracemalloc.start()
    for number in range(40_000):
        encoder.add(example(number, "some words of a row", "a"), split=TRAIN, source=0)
        if number == 10_000:
            tracemalloc.reset_peak()
    encoded = encoder.finish(["a"], path=tmp_path / "store")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoded.rows == 40_000
    assert peak < 16 * 1024 * 1024


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(["some text to merge some of"] * 9, trainers.BpeTrainer(vocab_size=280, **tokens))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -1.0), ("a", -2.0), ("ab", -2.5)], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=120), min_size=1, max_size=4), st.integers(4, 40), st.sampled_from(range(3)))
def test_a_cut_text_has_the_tokens_of_the_librarys_truncation(
    minilm_dir: Path, texts: list[str], limit: int, kind: int
) -> None:
    json_text = [lambda: (minilm_dir / "tokenizer.json").read_text(), lambda: BYTE_LEVEL, lambda: UNIGRAM][kind]()
    whole, cut = Tokenizer.from_str(json_text), Tokenizer.from_str(json_text)
    for tokenizer in (whole, cut):
        tokenizer.no_padding()
    whole.no_truncation()
    cut.enable_truncation(limit)
    expected = [(cut.encode(text).ids, len(whole.encode(text).ids)) for text in texts]
    assert Text(json_text, limit, 0, None).cut(texts) == expected


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(300, 5000),
    st.integers(4, 300),
    st.sampled_from(range(3)),
)
def test_of_a_long_text_a_beginning_gives_the_same_tokens(
    minilm_dir: Path, words: list[str], length: int, limit: int, kind: int
) -> None:
    json_text = [lambda: (minilm_dir / "tokenizer.json").read_text(), lambda: BYTE_LEVEL, lambda: UNIGRAM][kind]()
    text = (" ".join(words) * length)[:length]
    whole, cut = Tokenizer.from_str(json_text), Tokenizer.from_str(json_text)
    for tokenizer in (whole, cut):
        tokenizer.no_padding()
    whole.no_truncation()
    cut.enable_truncation(limit)
    ((ids, tokens),) = Text(json_text, limit, 0, None).cut([text])
    assert ids == cut.encode(text).ids
    truth = len(whole.encode(text).ids)
    assert (tokens > limit) == (truth > limit)
    # The repeated words are alike everywhere, but for the part that the beginning cuts off.
    assert abs(tokens - truth) <= 0.2 * truth + 2


BYTE_LEVEL, UNIGRAM = _byte_level().to_str(), _unigram().to_str()


def test_the_limit_of_the_model_wins_when_it_is_lower(minilm_dir: Path) -> None:
    text = (minilm_dir / "tokenizer.json").read_text()

    def limit(config: dict[str, Any], tokenizer_config: dict[str, Any], asked: int = 4096) -> int:
        return read_text(config, text, tokenizer_config, asked=asked, uri="file:///model").max_length

    assert limit(CONFIG, {}) == 512
    assert limit(CONFIG, {}, asked=128) == 128
    assert limit(CONFIG, {"model_max_length": 256}) == 256
    assert limit(CONFIG, {"model_max_length": 10**30}) == 512
    assert limit({**CONFIG, "model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}) == 512
    assert limit({"model_type": "gpt2", "n_positions": 1024, "eos_token_id": 50256}, {}) == 1024


def test_the_padding_token_is_the_models_or_the_tokenizers(minilm_dir: Path) -> None:
    text = (minilm_dir / "tokenizer.json").read_text()
    bare = json.dumps({**json.loads(text), "padding": None})

    def pad(config: dict[str, Any], tokenizer_config: dict[str, Any], tokenizer: str = bare) -> int:
        return read_text(config, tokenizer, tokenizer_config, asked=16, uri="file:///model").pad_token_id

    assert pad({"pad_token_id": 7}, {"pad_token": "[PAD]"}) == 7
    assert pad({}, {"pad_token": "[PAD]"}) == 0
    assert pad({}, {"pad_token": {"content": "[MASK]"}}) == 103
    assert pad({}, {}, text) == 0
    assert pad({"eos_token_id": [9, 10]}, {}) == 9
    with pytest.raises(DataError, match="names a padding or end token") as error:
        pad({}, {})
    assert error.value.reason == "ModelIncomplete"


def test_a_tokenizer_of_another_model_is_refused(minilm_dir: Path, tmp_path: Path) -> None:
    text = read_text(
        {**CONFIG, "vocab_size": 1000}, (minilm_dir / "tokenizer.json").read_text(), {}, asked=16, uri="file:///model"
    )
    with pytest.raises(DataError, match="belong to different models"):
        encode(text, tmp_path, [example(1, "some words")])


def test_a_file_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="not a tokenizer of the tokenizers library") as error:
        read_text(CONFIG, '{"version": "1.0"}', {}, asked=16, uri="s3://b/m")
    assert error.value.reason == "ModelIncomplete"
