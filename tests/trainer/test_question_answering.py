import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of

from finetune_trainer import tasks
from finetune_trainer.data.text import Text
from finetune_trainer.tasks import Learner
from finetune_trainer.tasks.base import Piece, RowError, Sample, Tools
from finetune_trainer.tasks.question_answering import best_spans, guesses, normal, score, scores, windows

CONTEXT = "The Nile flows north. The Rhine flows north, too."
KIND = "question-answering"


def task(**options: Any) -> tasks.Task:
    return tasks.get(config_of(KIND, task=options))


def read(answers: object, *, context: object = CONTEXT, **options: Any) -> Sample:
    return task(**options).read_row({"question": " Where to? ", "context": context, "answers": answers})


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"text": ["Nile"], "answer_start": [4]}, [("Nile", 4)]),
        ({"text": ["north", "Rhine"], "answer_start": [38, 26]}, [("north", 38), ("Rhine", 26)]),
        ({"text": "Nile", "answer_start": 4}, [("Nile", 4)]),
        ({"text": np.array(["Nile"]), "answer_start": np.array([4])}, [("Nile", 4)]),
        ({"text": ["Nile"]}, [("Nile", 4)]),
        ([{"text": "Nile", "start": 4}, {"text": "north", "answer_start": 15.0}], [("Nile", 4), ("north", 15)]),
        ([{"text": " Nile ", "start": 3}], [("Nile", 4)]),
        ("Rhine", [("Rhine", 26)]),
        (["Nile", "Rhine"], [("Nile", 4), ("Rhine", 26)]),
        ({"text": [], "answer_start": []}, []),
        ([], []),
        ("", []),
        (None, []),
    ],
)
def test_answers_are_read_in_each_way_of_writing(answers: object, found: list[tuple[str, int]]) -> None:
    sample = read(answers)
    assert [tuple(answer) for answer in sample.payload.answers] == found
    assert sample.payload.question == "Where to?"
    assert all(CONTEXT[start : start + len(text)] == text for text, start in found)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"text": "Nile", "start": 5}], "'answers', of 4 characters, is not what the column 'context' has at its"),
        ([{"text": "Nile", "start": 5}], "answer_start 5 (it is there at 4;"),
        ([{"text": "Elbe", "start": 4}], "it is nowhere in it"),
        ([{"text": "Nile", "start": 400}], "is not what the column 'context' has"),
        ([{"text": "Nile", "start": -1}], "must begin at a whole number of characters, found the number -1"),
        ([{"text": "Nile", "start": True}], "found true or false"),
        ([{"text": "Nile", "start": "4"}], "found text"),
        ("Elbe", "answer 1 in the column 'answers' is not in the column 'context'"),
        ("north", "more than once in the column 'context'; say which by answer_start"),
        ("  ", "blank"),
        ([7], "answer 1 is the number 7"),
        (7, "answer 1 is the number 7"),
        ({"text": ["Nile"], "answer_start": [4, 5]}, "1 texts and 2 values of answer_start"),
        ([{"start": 4}], "answer 1 is nothing (null)"),
    ],
)
def test_answers_that_are_none_are_refused_without_their_text(answers: object, said: str) -> None:
    with pytest.raises(RowError) as error:
        read(answers)
    assert said in str(error.value)
    assert "Nile" not in str(error.value)


def test_rows_without_an_answer_are_refused_where_the_document_says_so() -> None:
    with pytest.raises(RowError, match=r"holds no answer, and task\.unanswerable is false"):
        read([], unanswerable=False)
    assert read([], unanswerable=True).payload.answers == ()


def test_a_context_is_bounded() -> None:
    with pytest.raises(RowError, match="the column 'context' has 1048577 characters, 1048576 are allowed"):
        read([], context="x" * (1024 * 1024 + 1))


# --- windows ---


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 80))
def test_windows_cover_every_token_and_share_what_was_asked(count: int, room: int, stride: int) -> None:
    found = list(windows(count, room=room, stride=stride))
    assert {token for first, end in found for token in range(first, end)} == set(range(count))
    assert all(0 < end - first <= room for first, end in found)
    shared = {end - first for (_, end), (first, _) in itertools.pairwise(found)}
    assert shared <= {min(stride, room // 2)}


def bytes_tokenizer() -> str:
    """Each byte is a token, so that characters have several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number + 3 for number, letter in enumerate(alphabet)} | {"<s>": 0, "</s>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return str(tokenizer.to_str())


MakeText = Callable[..., Text]


@pytest.fixture(scope="module")
def text_of(minilm_dir: Path) -> MakeText:
    """Makes a tokenizer with a limit: that of MiniLM, or one of bytes."""
    found = [(minilm_dir / "tokenizer.json").read_text(), bytes_tokenizer()]
    whole = [Text(one, 0, 0, None) for one in found]  # made once: reading takes long

    def make(limit: int, *, which: int = 0) -> Text:
        made = dataclasses.replace(whole[which], max_length=limit)
        made.__dict__["tokenizer"] = whole[which].tokenizer
        return made

    return make


def encoded(sample: Sample, text: Text, **options: Any) -> list[Piece]:
    (pieces,) = task(**options).encode([sample], Tools(text, "Truncate", {"type_vocab_size": 2}))
    if isinstance(pieces, RowError):
        raise pieces
    return list(pieces)


def store_of(pieces: list[Piece], **more: Any) -> Memory:
    columns = {name: [piece.columns[name] for piece in pieces] for name in pieces[0].columns}
    kinds = {"I32": np.int32, "U8": np.uint8}
    arrays = {
        name: [np.array(list(value), kinds[column.kind]) for value in columns[name]] if column.ragged else columns[name]
        for name, column in task().store.items()
    }
    return Memory(**{**arrays, **more})


WORDS = st.text(alphabet="abcdeÄößé日語🙂", min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=40), st.data(), st.integers(0, 1), st.integers(16, 40), st.integers(0, 30))
def test_answers_are_found_back_character_by_character_and_no_token_is_lost(
    text_of: MakeText, words: list[str], data: st.DataObject, which: int, limit: int, stride: int
) -> None:
    context, first = " ".join(words), data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(len(words) - 1, first + 2)))
    begin = len(" ".join(words[:first])) + (1 if first else 0)
    answer = " ".join(words[first : last + 1])
    row = {"question": "b e", "context": context, "answers": [{"text": answer, "start": begin}]}
    text = text_of(limit, which=which)
    pieces = encoded(task(stride=stride).read_row(row), text, stride=stride)
    store = store_of(pieces)
    whole = text.tokenizer.encode(context, add_special_tokens=False).ids
    rows = np.arange(len(pieces))
    found = text.tokenizer.encode("b e", context)
    seen: list[int] = []
    for number, window in zip(rows, windows(len(whole), room=limit - (len(found.ids) - len(whole)), stride=stride),
                              strict=True):  # fmt: skip
        ids = store.each("input_ids", rows)[number]
        at = pieces[number].columns["context_at"]
        part = ids[at : at + window[1] - window[0]].tolist()
        assert part == whole[slice(*window)]
        assert len(ids) <= limit
        seen += part[max(0, len(seen) - window[0]) :]
    assert seen == whole
    held = [piece.columns["end"] > 0 for piece in pieces]
    assert any(held) or all(piece.cut for piece in pieces)
    learner = learner_of(KIND)
    gold = learner.gold(store, rows)
    ends = {name: np.array([piece.columns[name] for piece in pieces]) for name in ("start", "end", "context_at")}
    guess = {"first": ends["start"] - ends["context_at"], "last": ends["end"] - ends["context_at"]}
    for number in np.flatnonzero(held):
        one = {name: values[number : number + 1] for name, values in {**gold, **guess}.items()}
        settled = learner.settle({**one, "score": np.ones(1), "null": np.zeros(1)})
        assert settled["predicted"].tolist() == [answer]
    assert sum(piece.tokens for piece in pieces) == len(found.ids)


def test_a_long_question_is_refused(text_of: MakeText) -> None:
    row = {"question": "why " * 9, "context": CONTEXT, "answers": "Nile"}
    with pytest.raises(RowError, match=r"the question in the column 'question' has 9 tokens, more than half of the 16"):
        encoded(task().read_row(row), text_of(16))


def test_an_answer_that_fits_no_window_counts_as_cut(text_of: MakeText) -> None:
    row = {"question": "why", "context": "north " * 40, "answers": [{"text": "north " * 20, "start": 0}]}
    pieces = encoded(task().read_row(row), text_of(16))
    assert len(pieces) > 4
    assert all(piece.cut and piece.columns["start"] == piece.columns["end"] == 0 for piece in pieces)


def test_one_bad_row_spoils_no_other(text_of: MakeText) -> None:
    good = read("Nile")
    found = task().encode([good, read([], context="\u200b"), good], Tools(text_of(32), "Truncate"))
    assert [isinstance(pieces, RowError) for pieces in found] == [False, True, False]
    assert "gives no token" in str(found[1])


# --- learning ---


class Fixed(torch.nn.Module):
    """A model that answers with given scores."""

    def __init__(self, start: torch.Tensor, end: torch.Tensor) -> None:
        super().__init__()
        self.found = SimpleNamespace(start_logits=start, end_logits=end)

    def forward(self, **inputs: Any) -> Any:
        assert set(inputs) <= {"input_ids", "attention_mask", "token_type_ids"}
        return self.found


def two_rows(**facts: Any) -> tuple[Learner, Memory]:
    pieces = [
        Piece(
            {
                "input_ids": list(range(2, 2 + length)),
                "token_type_ids": [0] * 2 + [1] * (length - 2),
                "start": start,
                "end": end,
                "context_at": 2,
                "spans": [place for number in range(length - 2) for place in (2 * number, 2 * number + 1)],
                "context": " ".join("abcdefg"[: length - 2]).encode(),
                "question": b"a",
                "answers": json.dumps(answers).encode(),
                "answerable": int(bool(answers)),
            },
            tokens=length,
            length=length,
        )
        for length, start, end, answers in ((9, 3, 4, ["b c"]), (6, 0, 0, []))
    ]
    return learner_of(KIND, more=facts), store_of(pieces, row=[1, 2])


def test_a_micro_batch_holds_types_only_for_models_that_take_them() -> None:
    learner, store = two_rows(token_types=True)
    batch = learner.collate(store, np.arange(2))
    assert batch["labels"].tolist() == [[3, 4], [0, 0]]
    assert batch["context"].tolist() == [[2, 7, 30], [2, 4, 30]]
    assert batch["token_type_ids"].tolist() == [[0, 0] + [1] * 7, [0, 0, 1, 1, 1, 1, 0, 0, 0]]
    assert "token_type_ids" not in two_rows(token_types=False)[0].collate(store, np.arange(2))


def test_the_loss_is_the_mean_of_two_cross_entropies_and_knows_no_padding() -> None:
    learner, store = two_rows()
    start, end = torch.randn(2, 9, dtype=torch.float64), torch.randn(2, 9, dtype=torch.float64)
    batch = {name: torch.from_numpy(array) for name, array in learner.collate(store, np.arange(2)).items()}
    cross_entropy = torch.nn.functional.cross_entropy
    wanted = [
        (cross_entropy(start[i : i + 1, :n], labels[:1]) + cross_entropy(end[i : i + 1, :n], labels[1:])) / 2
        for i, (n, labels) in enumerate(zip((9, 6), batch["labels"], strict=True))
    ]
    torch.testing.assert_close(learner.loss(Fixed(start, end), batch), sum(wanted), rtol=1e-12, atol=0)
    assert learner.count(store, np.arange(2)) == 2
    half = Fixed(start.bfloat16(), end.bfloat16())
    assert learner.loss(half, batch).dtype == torch.float32


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 9))
def test_the_best_span_is_that_of_a_search_over_all(seed: int, longest: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    start, end = torch.randn(1, 12, generator=draw), torch.randn(1, 12, generator=draw)
    value, first, last = best_spans(start, end, torch.tensor([[3, count, longest]]))
    spans = {
        (i - 3, j - 3): float(start[0, i] + end[0, j])
        for i in range(3, 3 + count)
        for j in range(i, min(3 + count, i + longest))
    }
    assert (int(first), int(last)) == max(spans, key=lambda span: spans[span])
    assert float(value) == pytest.approx(max(spans.values()))


def settled(*, null: list[float], unanswerable: bool | None = None) -> list[str]:
    """Three windows, the first and the last of one row, in which the answers b, c and d score 1, 5 and 3."""
    learner = learner_of(KIND, {"task": {"unanswerable": unanswerable}} if unanswerable is not None else None)
    _, store = two_rows()
    gold = learner.gold(store, np.array([0, 1, 0]))
    guess = {"first": np.array([1, 2, 3]), "last": np.array([1, 2, 3]), "score": np.array([1.0, 5.0, 3.0])}
    more = {"place": np.arange(3), "null": np.array(null), "loss": np.array([0.5, 1.0, 0.25]), "count": np.ones(3, int)}
    found = learner.settle({**gold, **guess, **more})
    assert found["loss"].tolist() == [0.75, 1.0]
    assert found["count"].tolist() == [2, 1]
    assert found["place"].tolist() == [0, 1]
    return [str(text) for text in found["predicted"]]


def test_a_row_is_answered_by_its_best_window() -> None:
    assert settled(null=[0, 0, 0]) == ["d", "c"]


def test_no_answer_is_given_only_where_all_windows_prefer_it_and_some_training_row_has_none() -> None:
    assert settled(null=[9, 9, 2]) == ["d", ""]
    assert settled(null=[9, 2, 4]) == ["", "c"]
    assert settled(null=[9, 9, 9], unanswerable=False) == ["d", "c"]
    assert settled(null=[9, 9, 9], unanswerable=True) == ["", ""]


# --- metrics ---


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "f1"),
    [
        ("the Nile", ["Nile"], 1, 1.0),
        ("Nile.", ["A nile!"], 1, 1.0),
        ("flows north", ["north"], 0, 2 / 3),
        ("north north", ["north"], 0, 2 / 3),
        ("east", ["north"], 0, 0.0),
        ("Rhine", ["Nile", "the Rhine"], 1, 1.0),
        ("river Rhine", ["Nile", "the Rhine river bank"], 0, 0.8),
        ("", [], 1, 1.0),
        ("", ["Nile"], 0, 0.0),
        ("Nile", [], 0, 0.0),
        ("it's", ["its"], 1, 1.0),
        ("the", ["the"], 1, 1.0),
        ("An  Ant", ["ant"], 1, 1.0),
    ],
)
def test_scores_equal_those_by_hand(predicted: str, answers: list[str], exact: int, f1: float) -> None:
    assert score(predicted, answers) == (exact, pytest.approx(f1))


def test_normal_text_has_no_articles_punctuation_or_capitals() -> None:
    assert normal("The  Cat's, an (old) theatre; A.") == "cats old theatre"


def test_metrics_tell_how_often_it_was_right_to_answer() -> None:
    outcomes = {
        **scores(["b", "", "x", "y"], [["b"], ["c"], ["x y"], []]),
        "abstains": np.ones(4, bool),
        "loss": np.array([1.0, 1.0, 1.0, 5.0]),
        "count": np.array([1, 1, 1, 1]),
    }
    metrics = learner_of(KIND).metrics(outcomes)
    assert metrics == {
        "exact-match": 0.25,
        "f1": pytest.approx((1 + 0 + 2 / 3 + 0) / 4),
        "loss": 2.0,
        "has-answer-accuracy": pytest.approx(2 / 3),
        "no-answer-accuracy": 0.0,
    }
    outcomes["abstains"] = np.zeros(4, bool)
    assert set(learner_of(KIND).metrics(outcomes)) == {"exact-match", "f1", "loss"}


# --- answers without a model ---


@pytest.mark.parametrize(
    ("place", "question", "context", "guess"),
    [
        (1, "Where does the Rhine flow?", CONTEXT, "The Rhine flows north, too"),
        (2, "Where?", CONTEXT, "The Nile flows"),
        (4, "type of alpha?", "beta: int, alpha: float", "float"),
        (5, "type of alpha?", "beta: int, alpha: float or none", "float or"),
        (7, "type?", "one word", "one word"),
    ],
)
def test_guesses_look_for_the_words_of_the_question(place: int, question: str, context: str, guess: str) -> None:
    _, start, end = guesses()[place](question, context)
    assert context[start:end].strip() == guess


def test_the_trivial_answer_is_the_guess_that_suits_the_training_rows(text_of: MakeText) -> None:
    learner, text = learner_of(KIND), text_of(32)
    rows = [
        {"question": f"type of {name}?", "context": f"beta: int, {name}: {kind}, gamma: text", "answers": kind}
        for name, kind in (("alpha", "float"), ("delta", "list"), ("iota", "bool"), ("eta", "tuple"))
    ]
    rows += [{**rows[0], "answers": []}] * 2
    pieces = [encoded(task().read_row(row), text)[0] for row in rows]
    store = store_of(pieces, row=list(range(6)))
    found = learner.trivial(store, np.arange(6), np.array([3, 1, 4]))
    assert found is not None
    outcomes = learner.settle({**learner.gold(store, np.array([3, 1, 4])), **found})
    assert outcomes["predicted"].tolist() == ["tuple", "list", "float"]
    without = learner.trivial(store, np.array([4, 5]), np.array([3, 4]))
    assert without is not None
    outcomes = learner.settle({**learner.gold(store, np.array([3, 4])), **without})
    assert outcomes["predicted"].tolist() == ["", ""]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=20), st.text(min_size=1, max_size=60))
def test_every_guess_lies_within_the_context(question: str, context: str) -> None:
    for guess in guesses():
        _, start, end = guess(question, context)
        assert 0 <= start <= end <= len(context)
