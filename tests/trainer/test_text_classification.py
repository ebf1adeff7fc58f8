import math
from decimal import Decimal

import numpy as np
import pytest
import torch

from finetune_trainer import tasks
from finetune_trainer.tasks import Columns, RowError

TASK = tasks.get("text-classification")
COLUMNS = Columns("body", "intent")


def read(label: object) -> object:
    return TASK.read_row({"body": "a text", "intent": label}, columns=COLUMNS)[1]


@pytest.mark.parametrize(
    ("label", "normal"),
    [
        ("billing", "billing"),
        ("yes", "yes"),
        ("1.0", "1.0"),
        (3, "3"),
        (3.0, "3"),
        (-2.0, "-2"),
        (Decimal("4"), "4"),
        (True, "true"),
        (False, "false"),
        (["a", "b", "a"], ["a", "b"]),
        ([], []),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.int64(7), "7"),
        ((1, True), ["1", "true"]),
    ],
)
def test_labels_become_strings(label: object, normal: object) -> None:
    assert read(label) == normal


@pytest.mark.parametrize("label", [None, 2.5, math.nan, math.inf, {}, "", "x" * 257, [None], [["a"]], b"a"])
def test_what_is_no_label_is_refused(label: object) -> None:
    with pytest.raises(RowError, match="the column 'intent'"):
        read(label)


def test_a_missing_column_is_named_with_the_columns_found() -> None:
    with pytest.raises(RowError, match="the column 'body' is missing; columns found: text, intent"):
        TASK.read_row({"text": "a", "intent": "b"}, columns=COLUMNS)


@pytest.mark.parametrize("text", [None, 3, ["a"], True])
def test_text_must_be_text(text: object) -> None:
    with pytest.raises(RowError, match="the column 'body' must hold text"):
        TASK.read_row({"body": text, "intent": "b"}, columns=COLUMNS)


def test_labels_are_ordered_by_the_document_then_the_base_then_code_point() -> None:
    assert TASK.order_labels({"b", "a"}, wanted=["b", "c", "a"], base=["a", "b"]) == ["b", "c", "a"]
    assert TASK.order_labels({"b", "a"}, wanted=None, base=["z", "b", "a"]) == ["z", "b", "a"]
    assert TASK.order_labels({"b", "a", "Z"}, wanted=None, base=["a", "b"]) == ["Z", "a", "b"]


def test_labels_are_encoded_as_the_store_holds_them() -> None:
    assert TASK.encode_labels(["b", "a"], labels=["a", "b"], multi_label=False).tolist() == [1, 0]
    assert TASK.encode_labels([["b"], [], ["a", "b"]], labels=["a", "b"], multi_label=True).tolist() == [
        [0, 1],
        [0, 0],
        [1, 1],
    ]


def test_unknown_labels_and_mixed_rows_are_refused() -> None:
    with pytest.raises(RowError, match="the label 'c' is not among the labels a, b"):
        TASK.encode_labels(["c"], labels=["a", "b"], multi_label=False)
    with pytest.raises(RowError, match="single label"):
        TASK.encode_labels([["a"]], labels=["a", "b"], multi_label=False)
    with pytest.raises(RowError, match="single label"):
        TASK.encode_labels(["a"], labels=["a", "b"], multi_label=True)


def test_a_micro_batch_is_padded_to_its_own_longest_row() -> None:
    batch = TASK.collate(
        [np.array([5, 6, 7], np.int32), np.array([8], np.int32)], np.array([1, 0], np.int32), pad_token_id=9
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_losses_and_gradients_equal_torch() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (8,))
    hot = (torch.rand(8, 5) > 0.5).double()
    for ours, theirs, count in (
        (TASK.loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), 8),
        (
            TASK.loss(logits, hot),
            torch.nn.functional.binary_cross_entropy_with_logits(logits, hot, reduction="sum"),
            40,
        ),
    ):
        assert ours[1] == count
        torch.testing.assert_close(ours[0], theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(ours[0], logits, retain_graph=True)[0],
            torch.autograd.grad(theirs, logits)[0],
            rtol=1e-12,
            atol=1e-14,
        )


def test_a_loss_in_half_precision_is_summed_in_single() -> None:
    assert TASK.loss(torch.randn(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 0]))[0].dtype == torch.float32


def test_metrics_equal_a_count_by_hand() -> None:
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    metrics = TASK.metrics(labels, predictions, loss=0.5)
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert metrics["precision"] == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert metrics["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert metrics["f1-micro"] == pytest.approx(0.5)
    assert metrics["loss"] == 0.5


def test_multi_label_accuracy_counts_whole_rows() -> None:
    labels, predictions = np.array([[1, 0], [1, 1]], np.uint8), np.array([[1, 0], [1, 0]], np.uint8)
    metrics = TASK.metrics(labels, predictions, loss=None)
    assert metrics["accuracy"] == 0.5
    assert metrics["f1"] == pytest.approx(0.5)
    assert metrics["f1-micro"] == pytest.approx(0.8)
    assert "loss" not in metrics


def test_the_majority_answers_what_is_most_frequent_in_training() -> None:
    metrics = TASK.majority(np.array([1, 1, 0]), np.array([1, 0, 0, 0]), count=3)
    assert metrics["accuracy"] == 0.25
    assert metrics["loss"] == pytest.approx(-(math.log(3 / 6) + 3 * math.log(2 / 6)) / 4)
    hot = TASK.majority(np.array([[1, 0], [1, 0], [1, 1]]), np.array([[1, 0], [0, 0]]), count=2)
    assert hot["accuracy"] == 0.5
