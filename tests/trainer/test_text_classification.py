import math
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.memory import Memory, config_of, learner_of
from tests.trainer.tokenizers_of import tokenizer_json
from tokenizers import Tokenizer

from finetune_trainer import tasks
from finetune_trainer.data.read import DataError
from finetune_trainer.data.text import Text
from finetune_trainer.tasks.base import Facts, RowError, Sample, Tools
from finetune_trainer.tasks.losses import WEIGHTS
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


def learner_with(form: str = ONE, weights: list[float] | None = None, **training: Any) -> Any:
    more = {WEIGHTS: weights} if weights else {}
    return learner_of(spec={"training": training}, labels=list("abcde"), form=form, more=more)


def same(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor) -> None:
    """Losses and their gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


LOGITS = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
LABELS = torch.tensor([0, 4, 1, 1, 3, 2, 0, 4])
HOT = torch.eye(5, dtype=torch.float64)[LABELS] + torch.eye(5, dtype=torch.float64)[LABELS.flip(0)]
HOT = HOT.clamp(max=1)
CLASS_WEIGHTS = [0.5, 1.0, 2.0, 3.0, 0.1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_smoothed_and_weighted_losses_equal_torch(smoothing: float, weights: list[float] | None) -> None:
    tensor = torch.tensor(weights, dtype=torch.float64) if weights else None
    ours = learner_with(weights=weights, labelSmoothing=smoothing)
    store = Memory(input_ids=[[1]] * 8, labels=LABELS[:, None].tolist())
    mean = ours.loss(Fixed(LOGITS), {"labels": LABELS}) / ours.count(store, np.arange(8))
    functional = torch.nn.functional
    same(mean, functional.cross_entropy(LOGITS, LABELS, tensor, label_smoothing=smoothing), LOGITS)
    ours = learner_with(SEVERAL, weights=weights, labelSmoothing=smoothing)
    smooth = HOT * (1 - smoothing) + smoothing / 2
    theirs = functional.binary_cross_entropy_with_logits(LOGITS, smooth, pos_weight=tensor, reduction="sum")
    same(ours.loss(Fixed(LOGITS), {"labels": HOT}), theirs, LOGITS)


@pytest.mark.parametrize("gamma", [1.0, 2.5])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_focal_losses_are_what_their_paper_says(gamma: float, weights: list[float] | None) -> None:
    tensor = torch.tensor(weights or [1.0] * 5, dtype=torch.float64)
    loss = {"type": "focal", "gamma": gamma}
    shares = LOGITS.softmax(-1).gather(1, LABELS[:, None])[:, 0]
    theirs = (-((1 - shares) ** gamma) * shares.log() * tensor[LABELS]).sum()
    same(learner_with(weights=weights, loss=loss).loss(Fixed(LOGITS), {"labels": LABELS}), theirs, LOGITS)
    chances = torch.where(HOT == 1, LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    theirs = (-((1 - chances) ** gamma) * chances.log() * torch.where(HOT == 1, tensor, 1.0)).sum()
    same(learner_with(SEVERAL, weights=weights, loss=loss).loss(Fixed(LOGITS), {"labels": HOT}), theirs, LOGITS)


@pytest.mark.parametrize("training", [{}, {"labelSmoothing": 0.2}, {"loss": {"type": "focal"}}])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_answers_without_a_model_have_the_same_loss(training: dict[str, Any], weights: list[float] | None) -> None:
    loss = learner_with(weights=weights, **training)._loss
    logits = LOGITS.detach()
    found = loss.of_shares(logits.softmax(-1).numpy(), LABELS.numpy())
    assert found == pytest.approx(loss.one(logits, LABELS).numpy(), rel=1e-9)
    found = loss.of_chances(logits.sigmoid().numpy(), HOT.numpy())
    assert found == pytest.approx(loss.several(logits, HOT).numpy(), rel=1e-9)


def test_a_loss_of_certain_answers_has_a_gradient() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0, 0.0, 0.0]] * 2, requires_grad=True)
    for form, labels in ((ONE, torch.tensor([0, 1])), (SEVERAL, torch.eye(5)[:2])):
        for gamma in (1.0, 2.0):
            ours = learner_with(form, loss={"type": "focal", "gamma": gamma})
            (gradient,) = torch.autograd.grad(ours.loss(Fixed(logits), {"labels": labels}), logits)
            assert gradient.isfinite().all()


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 0, 0, 1, 3, 3]
    store = Memory(input_ids=[[1]] * 6, labels=[[label] for label in labels])
    task = tasks.get(config_of(training={"classWeights": "balanced"}))
    weights = task.measure(store, np.arange(6), Facts(labels=list("abcd"), form=ONE))[WEIGHTS]
    theirs = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=np.array(labels))
    assert [weights[0], weights[1], weights[3]] == pytest.approx(list(theirs))
    assert weights[2] == 1.0
    assert TASK.measure(store, np.arange(6), Facts(labels=list("abcd"), form=ONE)) == {}
    store = Memory(input_ids=[[1]] * 4, labels=[[0, 1], [0], [0], [0, 3]])
    weights = task.measure(store, np.arange(4), Facts(labels=list("abcd"), form=SEVERAL))[WEIGHTS]
    assert weights == [1.0, 3.0, 1.0, 3.0]


def predicted(logits: torch.Tensor, labels: torch.Tensor, form: str = ONE, **spec: Any) -> dict[str, float]:
    """The metrics of a model that answers so."""
    learner = learner_of(spec=spec, labels=list("abcde")[: logits.shape[1]], form=form)
    outcomes = learner.predict(Fixed(logits), {"labels": labels}, generate=False)
    gold = labels.numpy().astype(np.uint8 if form == SEVERAL else np.int32)
    return dict(learner.metrics(learner.settle({"label": gold, **outcomes})))


@pytest.mark.parametrize("count", [2, 5])
def test_metrics_of_probabilities_equal_scikit_learn(count: int) -> None:
    from sklearn import metrics

    draw = torch.Generator().manual_seed(count)
    labels = torch.randint(0, count, (60,), generator=draw)
    logits = torch.randn(60, count, generator=draw) + 2 * torch.nn.functional.one_hot(labels, count)
    found = predicted(logits, labels, training={"labelSmoothing": 0.3})
    shares, hot = logits.softmax(-1).numpy(), np.eye(count)[labels]
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(labels, shares.argmax(1)))
    single = shares[:, 1] if count == 2 else shares
    assert found["roc-auc"] == pytest.approx(metrics.roc_auc_score(labels, single, multi_class="ovr"))
    assert found["pr-auc"] == pytest.approx(metrics.average_precision_score(hot, shares))
    assert found["log-loss"] == pytest.approx(metrics.log_loss(labels, shares), rel=1e-6)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert found["loss"] == pytest.approx(smoothed.item(), rel=1e-6)


def test_metrics_of_several_labels_equal_scikit_learn() -> None:
    from sklearn import metrics

    draw = torch.Generator().manual_seed(3)
    labels = (torch.rand(50, 3, generator=draw) > 0.6).float()
    logits = torch.randn(50, 3, generator=draw) + labels
    found = predicted(logits, labels, SEVERAL)
    hot, shares = labels.numpy().astype(int), logits.sigmoid().numpy()
    assert found["roc-auc"] == pytest.approx(metrics.roc_auc_score(hot, shares))
    assert found["pr-auc"] == pytest.approx(metrics.average_precision_score(hot, shares))
    each = [metrics.matthews_corrcoef(hot[:, n], shares[:, n] > 0.5) for n in range(3)]
    assert found["mcc"] == pytest.approx(np.mean(each))
    each = [metrics.log_loss(hot[:, n], shares[:, n]) for n in range(3)]
    assert found["log-loss"] == pytest.approx(np.mean(each), rel=1e-6)
    assert found["loss"] == pytest.approx(found["log-loss"])


def test_calibration_is_that_of_scikit_learns_curve() -> None:
    from sklearn.calibration import calibration_curve

    draw = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 3, (200,), generator=draw)
    logits = torch.randn(200, 3, generator=draw) + torch.nn.functional.one_hot(labels, 3)
    shares = logits.softmax(-1).double()
    confidence, right = shares.max(-1).values.numpy(), (shares.argmax(-1) == labels).numpy()
    true, mean = calibration_curve(right, confidence, n_bins=15)
    sizes = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    theirs = (np.abs(true - mean) * sizes[sizes > 0]).sum() / 200
    assert predicted(logits, labels)["ece"] == pytest.approx(theirs, abs=1e-6)


def test_what_cannot_be_ranked_has_no_area() -> None:
    found = predicted(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    assert not {"roc-auc", "pr-auc"} & found.keys()
    assert found["mcc"] == 0.0


def test_probabilities_of_very_many_labels_are_not_kept() -> None:
    learner = learner_of(labels=[str(number) for number in range(1001)], form=ONE)
    found = learner.predict(Fixed(torch.randn(2, 1001)), {"labels": torch.tensor([1, 2])}, generate=False)
    assert "probability" not in found
    metrics = learner.metrics({"label": np.array([1, 2]), **found})
    assert not {"roc-auc", "pr-auc", "ece"} & metrics.keys()
    assert "log-loss" in metrics


# --- two texts a row ---

PAIRS = tasks.get(config_of(task={"columns": {"pair": "second"}}))


def text_of(family: str, max_length: int = 64, **config: Any) -> Text:
    return Text(tokenizer_json(family), max_length, 0, None, config)


def test_a_row_of_two_texts_needs_both() -> None:
    sample = PAIRS.read_row({"text": "one", "second": "two", "label": "same"})
    assert (sample.content, sample.payload, sample.labels) == ("one\ntwo", ("one", "two"), ("same",))
    with pytest.raises(RowError, match="the column 'second' is missing"):
        PAIRS.read_row({"text": "one", "label": "same"})
    with pytest.raises(RowError, match="the text in the column 'second' is empty"):
        PAIRS.read_row({"text": "one", "second": " ", "label": "same"})


@given(st.lists(st.tuples(*[st.text("the time Ber. ", min_size=1, max_size=30)] * 2), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_pairs_are_encoded_as_the_tokenizer_does_it_itself(pairs: list[tuple[str, str]]) -> None:
    for family in ("wordpiece", "bytes"):
        text = text_of(family, max_length=16)
        theirs = Tokenizer.from_str(tokenizer_json(family))
        whole = theirs.encode_batch(pairs)
        theirs.enable_truncation(16)
        for (ours, tokens), uncut, cut in zip(text.cut_pairs(pairs), whole, theirs.encode_batch(pairs), strict=True):
            assert (ours.ids, ours.type_ids, tokens) == (cut.ids, cut.type_ids, len(uncut))


def test_two_texts_are_told_apart_by_token_types_where_the_model_has_them() -> None:
    rows = [{"text": "the", "second": "time in", "label": label} for label in "ab"]
    for types in (1, 2):
        tools = Tools(text_of("wordpiece", type_vocab_size=types), "Truncate")
        more = PAIRS.facts(tools)
        pieces = [piece for row in rows for piece in PAIRS.encode([PAIRS.read_row(row)], tools)[0]]
        columns = {name: [piece.columns[name] for piece in pieces] for name in PAIRS.store}
        learner = PAIRS.learner(Facts(labels=["a", "b"], form=ONE, more=more))
        batch = learner.collate(Memory(**columns), np.arange(2))
        if types == 1:
            assert "token_type_ids" not in batch
        else:
            assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1, 1]
            assert batch["input_ids"].shape == batch["token_type_ids"].shape


def test_a_tokenizer_that_runs_two_texts_together_is_refused() -> None:
    with pytest.raises(DataError, match="puts nothing between two texts"):
        PAIRS.facts(Tools(text_of("cut, then bytes"), "Truncate"))
    assert PAIRS.facts(Tools(text_of("bytes"), "Truncate")) == {"tokenTypes": False}


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
