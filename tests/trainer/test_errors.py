"""Error analysis: which rows are named as mistakes, what of them is shown, which answers are mixed up."""

from typing import Any

import numpy as np
from tests.trainer.memory import learner_of

from finetune_trainer.errors import errors_of
from finetune_trainer.evaluate import PLACE
from finetune_trainer.tasks.base import Outcomes, objects


def found(kind: str, outcomes: Outcomes, **about: Any) -> dict[str, Any]:
    """The error analysis of rows whose losses fall."""
    rows = len(next(iter(outcomes.values())))
    losses = {"loss": np.arange(rows, 0, -1.0), "count": np.ones(rows), PLACE: np.arange(rows) + 100}
    return errors_of(learner_of(kind, **about), {**losses, **outcomes}, lambda: None)[""]


def pairs(errors: dict[str, Any]) -> list[tuple[int, str, str]]:
    return [(row["place"], row["truth"], row["answer"]) for row in errors["mistakes"]]


def test_the_surest_mistakes_come_first_and_right_answers_are_none() -> None:
    errors = found(
        "text-classification",
        {"label": np.array([0, 1, 1, 0]), "predicted": np.array([0, 0, 1, 1])},
        labels=("no", "yes"),
    )
    assert pairs(errors) == [(101, "yes", "no"), (103, "no", "yes")]
    assert errors["confusion"] == [[1, 1], [1, 1]]
    assert errors["labels"] == ["no", "yes"]


def test_words_with_a_wrong_tag_are_counted_from_one() -> None:
    errors = found(
        "token-classification",
        {
            "label": objects([[0, 1, 2], [0], [1]]),
            "predicted": objects([[0, 1, 0], [0], [0]]),
        },
        labels=("O", "B-city", "I-city"),
    )
    assert pairs(errors) == [(100, "word 3: I-city", "word 3: O"), (102, "word 1: B-city", "word 1: O")]
    assert errors["confusion"] == [[2, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_any_of_several_right_answers_is_right() -> None:
    errors = found(
        "question-answering",
        {
            "predicted": objects(["The sea", "a lake", "", "a pond"]),
            "answers": objects([["the sea", "a bay"], ["the sea", "a bay"], ["a hill"], []]),
            "exact-match": np.array([1.0, 0.0, 0.0, 0.0]),
        },
    )
    assert pairs(errors) == [
        (101, "the sea or a bay", "a lake"),
        (102, "a hill", "(no answer)"),
        (103, "(no answer)", "a pond"),
    ]


def test_written_texts_are_shown_beside_their_references() -> None:
    texts = {"reference": objects(["one", "two"]), "hypothesis": objects(["one", "too"])}
    assert pairs(found("summarization", texts)) == [(101, "two", "too")]


def test_rows_that_have_no_answer_of_a_line_are_named_by_their_loss_alone() -> None:
    for kind in ("causal-lm", "summarization"):
        assert pairs(found(kind, {"correct": np.array([1, 2])})) == [(100, None, None), (101, None, None)]


def test_numbers_are_shown_in_four_digits() -> None:
    numbers = {"value": np.array([1.0, 2.5]), "predicted": np.array([1.00001, 31.41592])}
    assert pairs(found("regression", numbers)) == [(101, "2.5", "31.42")]
