"""What summarization and translation make of rows, without a model."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.writers import (
    ALPHA,
    BEGIN,
    END,
    ENGLISH,
    GERMAN,
    PAD,
    WORDS,
    config,
    tokenizer,
)

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import read_text
from finetune_trainer.tasks.base import Piece, RowError, Tools

FACTS = {"prefix": "", "start": PAD, "end": END, "forced": None, "limit": None}
FACTS |= dict.fromkeys(("source", "target", "before"))
A, B, C = ALPHA, ALPHA + 1, ALPHA + 2


def tools(kind: str = "t5", *more: str, overlong: Any = "Truncate", max_length: int = 256, **changed: Any) -> Tools:
    tokenizer_config = changed.pop("tokenizer_config", {})
    said = config(kind, **changed)
    text = read_text(said, tokenizer(kind, *more).to_str(), tokenizer_config, asked=max_length, uri="s3://models/base")
    return Tools(text, overlong, said)


def encoded(
    given: Tools, source: str = "alpha beta", target: str = "gamma", *, kind: str = "translation", **spec: Any
) -> Piece:
    """The only piece of a row."""
    task = tasks.get(config_of(kind, **spec))
    names = ("source", "target") if kind == "translation" else ("text", "summary")
    sample = task.read_row(dict(zip(names, (source, target), strict=True)))
    (pieces,) = task.encode([sample], given)
    assert not isinstance(pieces, RowError), pieces
    (piece,) = pieces
    return piece


def ids(piece: Piece) -> tuple[list[int], list[int]]:
    return list(piece.columns["input_ids"]), list(piece.columns["target_ids"])


# --- rows ---


def test_a_row_is_a_text_to_read_and_a_text_to_write() -> None:
    task = tasks.get(config_of("summarization", task={"columns": {"text": "body", "summary": "abstract"}}))
    sample = task.read_row({"body": "a long text", "abstract": "short", "more": 1})
    assert (sample.content, sample.answer, sample.labels) == ("a long text", "short", ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a"}, "the column 'target' is missing; columns found: source"),
        ({"source": "a", "target": 3}, "the column 'target' must hold text, found the number 3"),
        ({"source": "a", "target": " "}, "the text in the column 'target' is empty"),
        ({"source": "", "target": "b"}, "the text in the column 'source' is empty"),
        ({"source": "a", "target": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_what_is_no_pair_of_texts_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        tasks.get(config_of("translation")).read_row(row)


@pytest.mark.parametrize(
    ("text", "lead"),
    [
        ("One sentence. And another.", "One sentence."),
        ("  Is it? Yes! ", "Is it?"),
        ("version 2.0 is out\n\nmore", "version 2.0 is out"),
        ("no end", "no end"),
        ("これは文です。次の文。", "これは文です。"),
    ],
)
def test_the_trivial_summary_is_the_first_sentence(text: str, lead: str) -> None:
    piece = encoded(tools(), text, "gamma", kind="summarization")
    assert piece.columns["trivial"].decode() == lead


def test_the_trivial_translation_is_the_source() -> None:
    piece = encoded(tools(), "größer als", "bigger than")
    assert piece.columns["trivial"].decode() == "größer als"
    assert piece.columns["reference"].decode() == "bigger than"


# --- what stands around texts ---


@pytest.mark.parametrize(
    ("kind", "source", "target", "start"),
    [
        ("t5", [A, B, END], [C, END], PAD),
        ("bart", [BEGIN, A, B, END], [BEGIN, C, END], END),
        ("marian", [A, B, END], [C, END], PAD),
    ],
)
def test_targets_end_and_decoders_begin_as_the_model_was_made(
    kind: str, source: list[int], target: list[int], start: int
) -> None:
    given = tools(kind)
    assert ids(encoded(given)) == (source, target)
    assert tasks.get(config_of("translation")).facts(given) == {**FACTS, "start": start}


def test_an_end_that_the_tokenizer_forgets_is_trained_all_the_same() -> None:
    given = tools("mbart", eos_token_id=BEGIN, decoder_start_token_id=PAD)
    spec = {"task": {"targetLanguage": "de_DE"}}
    assert ids(encoded(given, **spec))[1][-1] == BEGIN


def test_the_decoders_first_input_is_never_a_target() -> None:
    given = tools("bart", decoder_start_token_id=BEGIN)
    assert ids(encoded(given)) == ([BEGIN, A, B, END], [C, END])


def test_several_languages_are_marked_where_the_model_wants_it() -> None:
    spec = {"task": {"sourceLanguage": "de_DE", "targetLanguage": "en_XX"}}
    assert ids(encoded(tools("mbart"), **spec)) == ([A, B, END, GERMAN], [C, END, ENGLISH])
    assert ids(encoded(tools("mbart50"), **spec)) == ([GERMAN, A, B, END], [ENGLISH, C, END])
    for kind, facts in (("mbart", {"start": ENGLISH}), ("mbart50", {"start": END, "forced": ENGLISH})):
        languages = {"source": GERMAN, "target": ENGLISH}
        assert tasks.get(config_of("translation", **spec)).facts(tools(kind)) == {**FACTS, **languages, **facts}


def test_a_summary_is_in_the_language_of_the_tokenizer() -> None:
    assert ids(encoded(tools("mbart50"), kind="summarization")) == ([ENGLISH, A, B, END], [ENGLISH, C, END])


def test_a_target_language_may_be_a_token_before_the_source() -> None:
    given = tools("marian", ">>de<<")
    piece = encoded(given, task={"targetLanguage": "de"}, data={"maxLength": 8, "train": [{"uri": "file:///x"}]})
    token = given.text.tokenizer.token_to_id(">>de<<") if given.text else None
    assert ids(piece) == ([token, A, B, END], [C, END])


def test_a_prefix_is_the_documents_or_the_models() -> None:
    params = {
        "summarization": {"prefix": "mu "},
        "translation_en_to_de": {"prefix": "kappa "},
    }
    given, mu, kappa = tools(task_specific_params=params), ALPHA + WORDS.index("mu"), ALPHA + WORDS.index("kappa")
    languages = {"sourceLanguage": "en", "targetLanguage": "de"}
    assert ids(encoded(given, kind="summarization"))[0] == [mu, A, B, END]
    assert ids(encoded(given, kind="summarization", task={"prefix": ""}))[0] == [A, B, END]
    assert ids(encoded(given, task=languages))[0] == [kappa, A, B, END]
    assert ids(encoded(given, task={**languages, "prefix": "mu "}))[0] == [mu, A, B, END]


@pytest.mark.parametrize(
    ("given", "spec", "message"),
    [
        (
            tools(is_encoder_decoder=None, model_type="bert"),
            {},
            "such as T5, BART or mBART; config.json says model_type",
        ),
        (tools(decoder_start_token_id=None), {}, "names no decoder_start_token_id"),
        (tools(eos_token_id=None), {}, "names no eos_token_id"),
        (tools("marian", decoder_vocab_size=70), {}, "splits source and target by different files"),
        (tools("marian", tokenizer_config={"tokenizer_class": "MarianTokenizer"}), {}, "source.spm, target.spm"),
        (tools("mbart50"), {}, "name task.targetLanguage, such as de_DE, en_XX"),
        (tools("mbart50"), {"targetLanguage": "fr_XX"}, "task.targetLanguage: the base has no language fr_XX"),
        (tools("mbart"), {"targetLanguage": "de_DE", "sourceLanguage": "fr"}, "task.sourceLanguage: the base has no"),
        (tools(), {"targetLanguage": "de"}, "mean nothing to the base"),
    ],
)
def test_a_base_that_cannot_do_it_is_refused(given: Tools, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tasks.get(config_of("translation", task=spec)).facts(given)
    assert caught.value.reason == "ModelUnsuitable"


def test_both_texts_are_cut_and_the_end_is_kept() -> None:
    data = {"maxLength": 8, "maxTargetLength": 3, "train": [{"uri": "file:///x"}]}
    piece = encoded(tools(max_length=8), "alpha " * 20, "beta " * 9, data=data)
    assert ids(piece) == ([A] * 7 + [END], [B, B, END])
    assert (piece.cut, piece.tokens, piece.length) == (True, 21, 11)
    assert piece.columns["reference"].decode() == "beta " * 9


def test_an_overlong_target_fails_where_that_is_asked_for() -> None:
    data = {"maxTargetLength": 3, "train": [{"uri": "file:///x"}]}
    task = tasks.get(config_of("translation", data=data))
    rows = [task.read_row({"source": "alpha", "target": target}) for target in ("beta", "beta beta beta")]
    fine, long = task.encode(rows, tools(overlong="Fail"))
    assert not isinstance(fine, RowError)
    assert "'target' has 4 tokens, 3 are allowed and overlong is Fail; raise data.maxTargetLength" in str(long)


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="the files belong to different models"):
        encoded(tools(vocab_size=ALPHA + 2))


# --- micro-batches ---

PAIRS = st.lists(
    st.tuples(st.lists(st.integers(3, 50), min_size=1, max_size=9), st.lists(st.integers(3, 50), max_size=9)),
    min_size=1,
    max_size=6,
)


@given(PAIRS)
def test_a_decoder_reads_what_it_has_to_write_one_place_later(pairs: list[tuple[list[int], list[int]]]) -> None:
    targets = [[*target, END] for _, target in pairs]
    store, rows = Memory(input_ids=[source for source, _ in pairs], target_ids=targets), np.arange(len(pairs))
    learner = learner_of("translation", more=FACTS, pad_token_id=PAD)
    batch = learner.collate(store, rows)
    for number, (source, _) in enumerate(pairs):
        known = batch["labels"][number] != -100
        assert batch["input_ids"][number][batch["attention_mask"][number] == 1].tolist() == source
        assert batch["labels"][number][known].tolist() == targets[number]
        assert batch["decoder_input_ids"][number][known].tolist() == [PAD, *targets[number][:-1]]
        assert set(batch["decoder_input_ids"][number][~known].tolist()) <= {PAD}
    assert learner.count(store, rows) == (batch["labels"] != -100).sum()
    assert batch["labels"].shape == batch["decoder_input_ids"].shape


def test_only_what_is_written_needs_generation() -> None:
    learner = learner_of("summarization", more=FACTS)
    assert [learner.generates(name) for name in ("rouge-l", "bleu", "loss", "token-accuracy")] == [
        True,
        True,
        False,
        False,
    ]
    assert learner.higher_is_better("rouge-l")
