import math
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of

from finetune_trainer import tasks
from finetune_trainer.tasks.base import RowError, Sample
from finetune_trainer.tasks.text_classification import ONE, SEVERAL

TASK = tasks.get(config_of(task={"columns": {"text": "body", "label": "intent"}}))


def read(label: object) -> Sample:
    return TASK.read_row({"body": "a text", "intent": label})


@pytest.mark.parametrize(
    ("label", "normal"),
    [
        ("billing", ("billing",)),
        ("yes", ("yes",)),
        ("1.0", ("1.0",)),
        (3, ("3",)),
        (3.0, ("3",)),
        (-2.0, ("-2",)),
        (Decimal("4"), ("4",)),
        (True, ("true",)),
        (False, ("false",)),
        (["a", "b", "a"], ("a", "b")),
        ([], ()),
        (np.array(["a", "b"]), ("a", "b")),
        (np.int64(7), ("7",)),
        ((1, True), ("1", "true")),
    ],
)
def test_labels_become_strings(label: object, normal: tuple[str, ...]) -> None:
    sample = read(label)
    assert sample.labels == normal
    assert sample.form == (SEVERAL if isinstance(label, list | tuple | np.ndarray) else ONE)


@pytest.mark.parametrize("label", [None, 2.5, math.nan, math.inf, {}, "", "x" * 257, [None], [["a"]], b"a", "\ud800"])
def test_what_is_no_label_is_refused(label: object) -> None:
    with pytest.raises(RowError, match="the column 'intent'"):
        read(label)


def test_a_missing_column_is_named_with_the_columns_found() -> None:
    with pytest.raises(RowError, match="the column 'body' is missing; columns found: text, intent"):
        TASK.read_row({"text": "a", "intent": "b"})


@pytest.mark.parametrize("text", [None, 3, ["a"], True])
def test_text_must_be_text(text: object) -> None:
    with pytest.raises(RowError, match="the column 'body' must hold text"):
        TASK.read_row({"body": text, "intent": "b"})


def test_labels_are_ordered_by_the_document_then_the_base_then_code_point() -> None:
    assert TASK.order_labels({"b", "a"}, wanted=["b", "c", "a"], base=["a", "b"]) == ["b", "c", "a"]
    assert TASK.order_labels({"b", "a"}, wanted=None, base=["z", "b", "a"]) == ["z", "b", "a"]
    assert TASK.order_labels({"b", "a", "Z"}, wanted=None, base=["a", "b"]) == ["Z", "a", "b"]


def test_a_micro_batch_is_padded_to_its_own_longest_row() -> None:
    store = Memory(input_ids=[[5, 6, 7], [8], [4, 4]], labels=[[1], [0], [1]])
    learner = learner_of(labels=["a", "b"], form=ONE, pad_token_id=9)
    batch = learner.collate(store, np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert learner.count(store, np.array([0, 1])) == 2


def test_several_labels_become_a_multi_hot_row() -> None:
    store = Memory(input_ids=[[5], [6], [7]], labels=[[2, 0], [], [1]])
    learner = learner_of(labels=["a", "b", "c"], form=SEVERAL)
    assert learner.collate(store, np.arange(3))["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert learner.count(store, np.arange(3)) == 9


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.integers(0, 3)), min_size=1, max_size=8)
)
def test_collating_keeps_every_token_and_label(rows: list[tuple[list[int], int]]) -> None:
    store = Memory(input_ids=[text for text, _ in rows], labels=[[label] for _, label in rows])
    batch = learner_of(labels=list("abcd"), form=ONE).collate(store, np.arange(len(rows)))
    kept = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert kept == [text for text, _ in rows]
    assert batch["labels"].tolist() == [label for _, label in rows]


class Fixed(torch.nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def test_losses_and_gradients_equal_torch() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (8,))
    hot = (torch.rand(8, 5) > 0.5).double()
    functional = torch.nn.functional
    for form, wanted, theirs in (
        (ONE, labels, functional.cross_entropy(logits, labels, reduction="sum")),
        (SEVERAL, hot, functional.binary_cross_entropy_with_logits(logits, hot, reduction="sum")),
    ):
        ours = learner_of(labels=list("abcde"), form=form).loss(Fixed(logits), {"labels": wanted})
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(ours, logits, retain_graph=True)[0],
            torch.autograd.grad(theirs, logits)[0],
            rtol=1e-12,
            atol=1e-14,
        )


def test_a_loss_in_half_precision_is_summed_in_single() -> None:
    model = Fixed(torch.randn(4, 3, dtype=torch.bfloat16))
    assert learner_of(form=ONE).loss(model, {"labels": torch.tensor([0, 1, 2, 0])}).dtype == torch.float32


def test_metrics_equal_a_count_by_hand() -> None:
    outcomes = {
        "label": np.array([0, 0, 0, 1, 1, 2]),
        "predicted": np.array([0, 0, 1, 1, 0, 0]),
        "loss": np.array([0.5] * 6),
        "count": np.ones(6, int),
    }
    metrics = learner_of(labels=list("abc"), form=ONE).metrics(outcomes)
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert metrics["precision"] == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert metrics["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert metrics["f1-micro"] == pytest.approx(0.5)
    assert metrics["loss"] == 0.5


def test_multi_label_accuracy_counts_whole_rows() -> None:
    labels, predictions = np.array([[1, 0], [1, 1]], np.uint8), np.array([[1, 0], [1, 0]], np.uint8)
    metrics = learner_of(labels=["a", "b"], form=SEVERAL).metrics({"label": labels, "predicted": predictions})
    assert metrics["accuracy"] == 0.5
    assert metrics["f1"] == pytest.approx(0.5)
    assert metrics["f1-micro"] == pytest.approx(0.8)
    assert "loss" not in metrics


def test_the_trivial_answer_is_what_is_most_frequent_in_training() -> None:
    def metrics(form: str, labels: list[list[int]], train: int, count: int) -> dict[str, float]:
        learner = learner_of(labels=list("abc")[:count], form=form)
        store = Memory(input_ids=[[1]] * len(labels), labels=labels)
        rows = np.arange(train, len(labels))
        found = learner.trivial(store, np.arange(train), rows)
        assert found is not None
        return learner.metrics({**learner.gold(store, rows), **found})

    one = metrics(ONE, [[1], [1], [0], [1], [0], [0], [0]], 3, 3)
    assert one["accuracy"] == 0.25
    assert one["loss"] == pytest.approx(-(math.log(3 / 6) + 3 * math.log(2 / 6)) / 4)
    assert metrics(SEVERAL, [[0], [0], [0, 1], [0], []], 3, 2)["accuracy"] == 0.5
