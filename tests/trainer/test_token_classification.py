"""Tags of words and spans of texts: how rows read, where tags go, what is counted."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.tokenizers_of import FAMILIES, tokenizer_json

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text
from finetune_trainer.tasks.base import IGNORED, Piece, RowError, Tools, objects
from finetune_trainer.tasks.token_classification import SPANS, WORDS, Span, bio, tags_of_spans, units_of

TASK = tasks.get(config_of("token-classification"))
TEXT = "Anna Meyer lives in Berlin."
ANNA = {"start": 0, "end": 10, "label": "person"}
BERLIN = {"start": 20, "end": 26, "label": "place"}


def text_of(family: str, max_length: int = 512) -> Text:
    return Text(tokenizer_json(family), max_length, 0, None)


TEXTS = {family: text_of(family) for family in FAMILIES}
families = pytest.mark.parametrize("family", FAMILIES)


# --- rows ---


def test_words_and_tags_are_kept_as_they_are() -> None:
    sample = TASK.read_row({"tokens": ["Anna", "went", "to", "New", "York"], "tags": ["S-PER", "O", "O", "B-L", "E-L"]})
    assert (sample.form, sample.content) == (WORDS, "Anna went to New York")
    assert sample.labels == ("S-PER", "O", "B-L", "E-L")


def test_tags_may_be_numbers() -> None:
    assert TASK.read_row({"tokens": ["a", "b"], "tags": np.array([0, 3])}).labels == ("0", "3")


def test_a_text_with_spans_names_the_tags_that_its_words_may_have() -> None:
    sample = TASK.read_row({"text": TEXT, "spans": [BERLIN, {**ANNA, "score": 0.5}]})
    assert (sample.form, sample.content) == (SPANS, TEXT)
    assert sample.labels == ("O", "B-person", "I-person", "B-place", "I-place")
    assert sample.answer == TASK.read_row({"text": TEXT, "spans": [ANNA, BERLIN]}).answer


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "the column 'tokens' is missing"),
        ({"tokens": ["a"]}, "the column 'tags' is missing"),
        ({"text": "a"}, "the column 'spans' is missing"),
        ({"tokens": "a b", "tags": ["O"]}, "the column 'tokens' must hold a list of words, found text"),
        ({"tokens": [], "tags": []}, "must hold a list of words, found an empty list"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "found the number 3 as number 2; remove it and its tag"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "found an empty one as number 2"),
        ({"tokens": ["a", "\ud800"], "tags": ["O", "O"]}, "word 2 of the column 'tokens' holds half a surrogate pair"),
        ({"tokens": ["a"], "tags": "O"}, "the column 'tags' must hold a list of tags, one a word, found text"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "the column 'tags' holds 2 tags for 1 words"),
        ({"tokens": ["a"], "tags": [None]}, "the column 'tags' must hold a label"),
        ({"text": 3, "spans": []}, "the column 'text' must hold text"),
        ({"text": TEXT, "spans": {}}, "must hold a list of spans (start, end, label), found an object"),
        ({"text": TEXT, "spans": [[0, 4, "x"]]}, "span 1 of the column 'spans' is no object with start, end and label"),
        ({"text": TEXT, "spans": [{"start": 0, "end": 4}]}, "is no object with start, end and label"),
        ({"text": TEXT, "spans": [{**ANNA, "start": -1}]}, "the start of span 1 of the column 'spans' must be a whole"),
        ({"text": TEXT, "spans": [{**ANNA, "end": 4.5}]}, "the end of span 1 of the column 'spans' must be a whole"),
        ({"text": TEXT, "spans": [{**ANNA, "end": math.nan}]}, "must be a whole number from 0, found the number nan"),
        ({"text": TEXT, "spans": [{**ANNA, "end": True}]}, "must be a whole number from 0, found true or false"),
        ({"text": TEXT, "spans": [{**ANNA, "end": 28}]}, "goes from 0 to 28, which is no part of a text of 27 char"),
        ({"text": TEXT, "spans": [{**ANNA, "end": 0}]}, "goes from 0 to 0"),
        ({"text": TEXT, "spans": [{**ANNA, "start": 4, "end": 5}]}, "from 4 to 5, holds nothing but spaces"),
        ({"text": TEXT, "spans": [{**ANNA, "label": None}]}, "must hold a label"),
        ({"text": TEXT, "spans": [{**ANNA, "label": "x" * 255}]}, "holds a label of 257 characters"),
        (
            {"text": TEXT, "spans": [BERLIN, {**BERLIN, "start": 25}]},
            "overlap, 20 to 26 and 25 to 26; keep one of them",
        ),
    ],
)
def test_what_cannot_be_tagged_is_refused_with_the_reason(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.read_row(row)
    assert said in str(caught.value)


def test_tags_of_entities_and_others_are_not_mixed() -> None:
    for good in (["O", "B-x", "I-x"], ["NOUN", "VERB", "X"], ["O", "B", "I"], ["O", "NOUN"]):
        assert TASK.order_labels(good, wanted=None, base=None) == sorted(good)
    with pytest.raises(DataError, match=r"'B-x' is of an entity .* and 'NOUN' is not"):
        TASK.order_labels(["B-x", "NOUN"], wanted=None, base=None)


# --- alignment ---


def encoded(row: dict[str, Any], text: Text) -> tuple[Piece, list[str | None]]:
    """The piece of a row, and the tag of each of its tokens."""
    tools = Tools(text, "Truncate")
    ((piece,),) = TASK.encode([TASK.read_row(row)], tools)
    assert isinstance(piece, Piece)
    names = list(tools.numbers)
    return piece, [None if label == IGNORED else names[label] for label in piece.columns["labels"]]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
    lambda word: not any(c.isspace() for c in word)
)


@families
@given(st.lists(words, min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_first_token_of_each_word_carries_its_tag(family: str, row: list[str]) -> None:
    text = TEXTS[family]
    tags = [f"tag {number}" for number in range(len(row))]
    tools = Tools(text, "Truncate")
    (found,) = TASK.encode([TASK.read_row({"tokens": row, "tags": tags})], tools)
    prefix = text.word_prefix
    each = [text.tokenizer.encode([f"{prefix}{word}"], is_pretokenized=True, add_special_tokens=False) for word in row]
    if not any(len(encoding) for encoding in each):  # such as a word of nothing but accents for BERT
        assert isinstance(found, RowError)
        return
    assert not isinstance(found, RowError)
    names = list(tools.numbers)
    labels = [names[label] if label >= 0 else None for label in found[0].columns["labels"]]
    assert [label for label in labels if label] == [t for t, encoding in zip(tags, each, strict=True) if len(encoding)]
    first = next(place for place, label in enumerate(labels) if label)
    expected = [tag if n == 0 else None for tag, e in zip(tags, each, strict=True) for n in range(len(e))]
    assert labels[first : first + len(expected)] == expected
    assert set(labels[:first] + labels[first + len(expected) :]) <= {None}


@families
def test_words_are_the_tokens_that_they_are_within_a_text(family: str) -> None:
    text = TEXTS[family]
    row = ["the", "time", "in", "Ber", "the", "lin", "in", "the", "end"]
    ((alone, _),) = text.cut_words([row])
    inside = text.ids([f"the {' '.join(row)}"], special=False)[0]
    assert [token for token, word in zip(alone.ids, alone.word_ids, strict=True) if word is not None] == (
        inside[len(text.ids(["the"], special=False)[0]) :]
    )


def test_a_tokenizer_of_bytes_is_given_words_as_transformers_gives_them(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json("bytes with a space before"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<pad>")
    row = ["the", "time", ",", "Ber", "lin", "äß", "🙂", "(", "12", ")"]
    wanted = theirs(row, is_split_into_words=True)
    for family in ("bytes", "bytes with a space before"):
        ((ours, _),) = TEXTS[family].cut_words([row])
        assert ours.ids == wanted["input_ids"]
        assert ours.word_ids == wanted.word_ids()


def test_a_tokenizer_that_knows_no_words_is_refused_for_words() -> None:
    document = json.loads(tokenizer_json("wordpiece"))
    document["pre_tokenizer"] = None  # a whole text is one word then
    text = Text(json.dumps(document), 64, 0, None)
    assert text.word_prefix is None
    with pytest.raises(DataError, match="give texts with spans"):
        text.cut_words([["a", "b"]])


def spans_of(tags: list[str], units: list[Any]) -> list[Span]:
    """BIO read back."""
    found: list[Span] = []
    for tag, unit in zip(tags, units, strict=True):
        if tag.startswith("B-"):
            found.append(Span(unit.start, unit.end, tag[2:]))
        elif tag.startswith("I-"):
            found[-1] = found[-1]._replace(end=unit.end)
    return found


texts = st.text(
    st.one_of(st.sampled_from("the tin Ber. ,()\n12_"), st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    min_size=1,
    max_size=40,
)


@families
@given(texts, st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=5))
@settings(max_examples=100, deadline=None)
def test_spans_become_tags_and_tags_the_same_spans(family: str, text: str, drawn: list[tuple[int, int]]) -> None:
    encoding = TEXTS[family].tokenizer.encode(text)
    units = units_of(text, encoding)
    assert [unit.token for unit in units] == sorted({unit.token for unit in units})
    assert all(one.end <= other.start for one, other in pairwise(units))
    spans: list[Span] = []
    for first, count in sorted(drawn):  # some units one behind the other, none of them twice
        chosen = [unit for unit in units[first : first + count] if not spans or unit.start >= spans[-1].end]
        if chosen:
            spans.append(Span(chosen[0].start, chosen[-1].end, f"label {len(spans)}"))
    assert spans_of(bio(spans, units), units) == spans
    tags = tags_of_spans(encoding, text, spans)
    assert [tag for tag in tags if tag] == bio(spans, units)


@families
@given(texts)
@settings(max_examples=60, deadline=None)
def test_a_span_anywhere_takes_the_words_that_it_touches(family: str, text: str) -> None:
    units = units_of(text, TEXTS[family].tokenizer.encode(text))
    for start in range(0, len(text), 3):
        span = Span(start, min(len(text), start + 4), "x")
        touched = [unit for unit in units if unit.start < span.end and unit.end > span.start]
        wanted = [Span(touched[0].start, touched[-1].end, "x")] if touched else []
        assert spans_of(bio([span], units), units) == wanted


@pytest.mark.parametrize("family", ["wordpiece", "bytes", "pieces, the first with a space"])
def test_spans_are_exact_where_words_end(family: str) -> None:
    tags = encoded({"text": TEXT, "spans": [ANNA, BERLIN]}, TEXTS[family])[1]
    assert [tag for tag in tags if tag] == ["B-person", "I-person", "O", "O", "B-place", "O"]


def test_scripts_without_spaces_are_tagged_letter_by_letter() -> None:
    text = "東京に行く, हिन्दी ok"
    units = units_of(text, TEXTS["bytes"].tokenizer.encode(text))
    assert [text[unit.start : unit.end] for unit in units] == ["東", "京", "に", "行", "く", ",", "हिन्दी", "ok"]


def test_words_that_share_a_token_share_a_tag() -> None:
    row = {"text": "(Ber).", "spans": [{"start": 4, "end": 5, "label": "x"}]}
    tags = encoded(row, TEXTS["pieces"])[1]
    assert [tag for tag in tags if tag] == ["O", "O", "B-x"]


@pytest.mark.parametrize("form", [WORDS, SPANS])
def test_what_is_cut_off_takes_its_tags_along(form: str) -> None:
    names = [f"B-{number}" for number in range(30)]
    row: dict[str, Any] = {"tokens": ["zz"] * 30, "tags": names}
    if form == SPANS:
        spans = [{"start": 3 * number, "end": 3 * number + 2, "label": str(number)} for number in range(30)]
        row = {"text": "zz " * 30, "spans": spans}
    piece, tags = encoded(row, text_of("wordpiece", max_length=9))
    assert (piece.tokens, piece.length, piece.cut) == (62, 9, True)
    assert [tag for tag in tags if tag] == names[:4]
    assert len(piece.columns["input_ids"]) == len(piece.columns["labels"]) == 9


def test_a_row_without_a_tagged_token_is_refused() -> None:
    for row in ({"tokens": ["\u0301"], "tags": ["O"]}, {"text": "\u0301", "spans": []}):
        (found,) = TASK.encode([TASK.read_row(row)], Tools(TEXTS["wordpiece"], "Truncate"))
        assert isinstance(found, RowError)


def test_of_a_huge_text_only_the_beginning_is_aligned() -> None:
    text = text_of("wordpiece", max_length=8)
    piece, tags = encoded({"text": "zz " * 500_000, "spans": [{"start": 0, "end": 2, "label": "x"}]}, text)
    assert piece.cut
    assert [tag for tag in tags if tag] == ["B-x", "O", "O"]


# --- learning ---

LABELS = ["B-x", "B-y", "I-x", "I-y", "O"]


def learner(labels: list[str] = LABELS) -> Any:
    return learner_of("token-classification", labels=labels)


def store_of(labels: list[list[int]]) -> Memory:
    return Memory(input_ids=[[7] * len(row) for row in labels], labels=labels)


rows_of_labels = st.lists(
    st.lists(st.one_of(st.integers(0, 4), st.just(IGNORED)), min_size=1, max_size=8).filter(lambda row: max(row) >= 0),
    min_size=1,
    max_size=7,
)


@given(rows_of_labels)
def test_collating_keeps_every_token_and_tag(rows: list[list[int]]) -> None:
    store, ours = store_of(rows), learner()
    batch = ours.collate(store, np.arange(len(rows)))
    assert [
        labels[mask == 1].tolist() for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True)
    ] == rows
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert ours.count(store, np.arange(len(rows))) == (batch["labels"] != IGNORED).sum()


class Fixed(torch.nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def test_losses_and_gradients_equal_torch() -> None:
    logits = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED, 0, 4, IGNORED]] * 3)
    ours = learner().loss(Fixed(logits), {"labels": labels})
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_predictions_are_of_the_tagged_tokens() -> None:
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED], [IGNORED, 0, IGNORED, IGNORED]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 1, 4, 0], [2, 3, 0, 0]]), 5).double()
    found = learner().predict(Fixed(logits), {"labels": labels}, generate=False)
    assert found["predicted"].tolist() == [[1, 4], [3]]
    assert found["count"].tolist() == [2, 1]
    alike = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert found["loss"].sum() == pytest.approx(alike.item())


tag_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8), min_size=1, max_size=7
)
SCHEMES = (LABELS, ["B-a-b", "I-a-b", "E-a-b", "S-a-b", "O"], ["B", "I", "O", "E", "S"])


@given(tag_rows, st.sampled_from(SCHEMES))
@settings(deadline=None)
def test_metrics_equal_seqeval(rows: list[list[tuple[int, int]]], labels: list[str]) -> None:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    gold, found = ([[pair[side] for pair in row] for row in rows] for side in (0, 1))
    ours = learner(labels)
    metrics = ours.metrics(ours.settle({"label": objects(gold), "predicted": objects(found)}))
    names = [[[labels[tag] for tag in row] for row in side] for side in (gold, found)]
    assert metrics == pytest.approx(
        {
            "accuracy": accuracy_score(*names),
            "precision": precision_score(*names, zero_division=0),
            "recall": recall_score(*names, zero_division=0),
            "f1": f1_score(*names, zero_division=0),
        },
        abs=1e-12,
    )


def test_bilou_is_counted_as_bioes() -> None:
    labels = ["B-x", "I-x", "L-x", "U-x", "O"]
    ours = learner(labels)
    gold, found = objects([[0, 1, 2, 3, 4]]), objects([[0, 1, 2, 4, 3]])
    metrics = ours.metrics(ours.settle({"label": gold, "predicted": found}))
    assert (metrics["precision"], metrics["recall"], metrics["accuracy"]) == (0.5, 0.5, 0.6)


def test_tags_of_words_alone_are_averaged_over_tags() -> None:
    from sklearn.metrics import f1_score

    ours = learner(["NOUN", "VERB", "X"])
    gold, found = objects([[0, 1, 2], [0]]), objects([[0, 1, 1], [2]])
    metrics = ours.metrics(ours.settle({"label": gold, "predicted": found}))
    assert metrics["f1"] == pytest.approx(f1_score([0, 1, 2, 0], [0, 1, 1, 2], average="macro"))
    assert metrics["accuracy"] == 0.5


def test_the_trivial_answer_is_the_most_frequent_tag() -> None:
    store, ours = store_of([[4, 4, IGNORED, 0], [4], [0, 4], [IGNORED, 2]]), learner()
    rows = np.array([2, 3])
    found = ours.trivial(store, np.array([0, 1]), rows)
    assert found["predicted"].tolist() == [[4, 4], [4]]
    metrics = ours.metrics(ours.settle({**ours.gold(store, rows), **found}))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["f1"] == 0.0
    assert metrics["loss"] == pytest.approx(-(math.log(2 / 9) + math.log(4 / 9) + math.log(1 / 9)) / 3)


def test_the_probe_learns_what_a_linear_model_can() -> None:
    draw = np.random.default_rng(0)
    labels = [draw.integers(0, 5, size).tolist() for size in draw.integers(1, 9, 80)]
    store, ours = store_of(labels), learner()
    train, rows = np.arange(60), np.arange(60, 80)

    def features(chosen: Any) -> Any:
        flat = np.concatenate([labels[row] for row in chosen])
        return (np.eye(5)[flat] + draw.normal(0, 0.1, (len(flat), 5))).astype(np.float32)

    found = ours.fit_probe(features(train), features(rows), store=store, train=train, rows=rows, seed=1)
    metrics = ours.metrics(ours.settle({**ours.gold(store, rows), **found}))
    assert metrics["accuracy"] > 0.95
