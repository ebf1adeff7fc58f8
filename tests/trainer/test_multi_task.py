"""Several tasks in one store: whose a row is, how batches mix, and what is kept of whom."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.tasks import TASKS
from finetune_trainer import tasks
from finetune_trainer.data.order import Order, micro_batches
from finetune_trainer.data.read import DataError
from finetune_trainer.preflight import preflight
from finetune_trainer.tasks import Facts, Learner
from finetune_trainer.tasks.base import Column, form_of, joined_forms
from finetune_trainer.tasks.multi_task import SHOWN, cells_of, columns_of, names_in_store

from .memory import Memory, config_of

PARTS = [
    {"name": "topic", "type": "text-classification"},
    {"name": "mood", "type": "text-classification", "lossWeight": 3.0},
]
TRAIN = {"train": [{"uri": "file:///a", "task": "topic"}, {"uri": "file:///b", "task": "mood"}]}
LABELS = ["topic/a", "topic/b", "topic/c", "mood/bad", "mood/good"]


def learner(**spec: Any) -> Learner:
    config = config_of("multi-task", task={"tasks": PARTS}, data=TRAIN, **spec)
    return tasks.get(config).learner(Facts(LABELS, "topic: one label; mood: one label"))


def store_of(numbers: list[int], lengths: list[int]) -> Memory:
    """Rows of these tasks, labelled by their place."""
    labels = [[row % 3 if number == 0 else 3 + row % 2] for row, number in enumerate(numbers)]
    return Memory(input_ids=[[7] * length for length in lengths], labels=labels, task=np.array(numbers, np.uint8))


mixed = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 30)), min_size=2, max_size=80).filter(
    lambda rows: len({number for number, _ in rows}) == 2
)


@settings(deadline=None)
@given(mixed, st.integers(1, 12), st.integers(1, 7), st.integers(0, 99))
def test_a_micro_batch_holds_one_task_and_every_row_is_seen_once_an_epoch(
    rows: list[tuple[int, int]], batch_size: int, micro: int, seed: int
) -> None:
    numbers, lengths = [number for number, _ in rows], [length for _, length in rows]
    store, both = store_of(numbers, lengths), learner()
    order = Order(len(rows), batch_size, seed, both.costs(store, np.arange(len(rows))))
    seen = []
    for step in range(order.steps_per_epoch):
        batch = order.batch(step)
        assert batch.tolist() == Order(len(rows), batch_size, seed, order.lengths).batch(step).tolist()
        for _, piece, _ in micro_batches(both.shares(store, batch), size=micro):
            assert len({numbers[row] for row in piece}) == 1
            seen += piece.tolist()
    assert sorted(seen) == list(range(len(rows)))


def test_every_batch_is_a_mixture_although_one_tasks_texts_are_longer() -> None:
    draw = np.random.default_rng(0)
    numbers = (draw.random(4000) < 0.25).astype(int).tolist()
    lengths = [int(draw.integers(30, 60) if number else draw.integers(3, 20)) for number in numbers]
    store, both = store_of(numbers, lengths), learner()
    order = Order(4000, 40, 1, both.costs(store, np.arange(4000)))
    shares = [np.mean([numbers[row] for row in order.batch(step)]) for step in range(order.steps_per_epoch)]
    assert min(shares) > 0.05
    assert max(shares) < 0.45
    spans = [np.ptp([lengths[row] for row in order.batch(step) if numbers[row]]) for step in range(100)]
    assert np.median(spans) < 6  # of 30: within a task lengths are alike


@settings(deadline=None)
@given(mixed)
def test_shares_make_a_mean_weighted_by_rows_and_loss_weight(rows: list[tuple[int, int]]) -> None:
    store, both = store_of(*map(list, zip(*rows, strict=True))), learner()
    count = len(rows)
    for own, divisor in both.shares(store, np.arange(count)):
        weight = (1.0, 3.0)[rows[own[0]][0]]
        assert 1 / divisor == pytest.approx(weight / count)  # one label a row


def test_a_task_sees_its_own_columns_and_labels_alone() -> None:
    store, both = store_of([0, 1, 1, 0], [3, 2, 4, 1]), learner()
    inputs = both.collate(store, np.array([1, 2]))
    assert inputs.keys() == {"mood/input_ids", "mood/attention_mask", "mood/labels"}
    assert inputs["mood/labels"].tolist() == [1, 0]  # places among the labels of mood
    part, own = both.part_of(inputs)
    assert list(part.facts.labels) == ["bad", "good"]
    assert own.keys() == {"input_ids", "attention_mask", "labels"}
    assert both.model_inputs(inputs).keys() == {"mood/input_ids", "mood/attention_mask"}


def test_columns_that_mean_different_things_are_kept_apart() -> None:
    ids, labels, number = Column("I32", ragged=True), Column("I32", ragged=True, labels=True), Column("F64")
    one, two = {"input_ids": ids, "labels": labels}, {"input_ids": ids, "labels": number}
    assert names_in_store([one, two]) == [
        {"input_ids": "input_ids", "labels": "0.labels"},
        {"input_ids": "input_ids", "labels": "1.labels"},
    ]
    assert names_in_store([one, one])[1] == {"input_ids": "input_ids", "labels": "labels"}


def test_metrics_of_each_task_are_those_of_the_task_alone() -> None:
    store, both = store_of([0, 1] * 40, [3] * 80), learner()
    rows = np.arange(80)
    found = both.metrics(both.settle({**both.gold(store, rows), **(both.trivial(store, rows, rows) or {})}))
    alone = tasks.get(config_of()).learner(Facts(["a", "b", "c"], "one label"))
    mine = Memory(input_ids=[[7] * 3] * 40, labels=[[row % 3] for row in range(0, 80, 2)])
    wanted = alone.metrics({**alone.gold(mine, rows[:40]), **(alone.trivial(mine, rows[:40], rows[:40]) or {})})
    assert {name: found[f"topic.{name}"] for name in wanted} == pytest.approx(wanted)
    assert found["mean"] == pytest.approx((found["topic.f1"] + found["mood.f1"]) / 2)
    assert found["loss"] == pytest.approx((found["topic.loss"] + 3 * found["mood.loss"]) / 2)


def test_a_selection_without_one_task_has_the_other_ones_metrics() -> None:
    store, both = store_of([0, 1] * 10, [3] * 20), learner()
    rows = np.arange(20)
    outcomes = both.settle({**both.gold(store, rows), **(both.trivial(store, rows, rows) or {})})
    kept = outcomes["task"] == 1
    found = both.metrics({name: values[kept] for name, values in outcomes.items()})
    assert "mood.f1" in found
    assert not {"mean", "loss", "topic.f1"} & found.keys()


def test_there_are_no_more_metrics_than_a_status_holds_and_the_primary_one_is_among_them() -> None:
    names = [f"task-{number}" for number in range(8)]
    config = config_of(
        "multi-task",
        task={"tasks": [{"name": name, "type": "text-classification"} for name in names]},
        data={"train": [{"uri": "file:///a", "task": name} for name in names]},
        evaluation={"primary": "task-7.f1-weighted"},
    )
    labels = [f"{name}/{label}" for name in names for label in "ab"]
    many = tasks.get(config).learner(Facts(labels, joined_forms(dict.fromkeys(names, "one label"))))
    numbers = np.repeat(np.arange(8, dtype=np.uint8), 4)
    store = Memory(
        input_ids=[[7]] * 32, labels=[[2 * int(number) + row % 2] for row, number in enumerate(numbers)], task=numbers
    )
    rows = np.arange(32)
    found = many.metrics(many.settle({**many.gold(store, rows), **(many.trivial(store, rows, rows) or {})}))
    assert len(found) == SHOWN
    assert {"task-7.f1-weighted", "mean", "loss", *(f"{name}.f1" for name in names)} <= found.keys()


def test_directions_are_those_of_the_tasks_metrics() -> None:
    both = learner()
    assert both.higher_is_better("topic.f1")
    assert both.higher_is_better("mean")
    assert not both.higher_is_better("mood.loss")
    assert TASKS["multi-task"].primary == "mean"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.floats(-1, 1), st.lists(st.integers(0, 3), max_size=3)), min_size=1))
def test_outcomes_survive_as_objects(rows: list[tuple[int, float, list[int]]]) -> None:
    lists = np.empty(len(rows), dtype=object)
    for place, row in enumerate(rows):
        lists[place] = row[2]
    outcomes = {
        "label": np.array([row[0] for row in rows], np.int32),
        "loss": np.array([row[1] for row in rows]),
        "hot": np.array([[row[0] > 0, row[1] > 0] for row in rows], np.uint8),
        "tags": lists,
    }
    found = columns_of(cells_of(outcomes))
    assert found.keys() == outcomes.keys()
    for name, values in outcomes.items():
        assert found[name].dtype == values.dtype
        assert found[name].tolist() == values.tolist()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["topic", "mood", "mood-2"]), st.sampled_from(["one label", "words", ""])))
def test_forms_of_tasks_are_found_again(forms: dict[str, str]) -> None:
    assert {part: form_of(part, joined_forms(forms)) for part in forms} == forms


# --- preflight ---


def tried(tmp_path: Path, base: Path, topic: list[str], mood: list[str], **more: Any) -> DataError:
    """What preflight says of these lines."""
    for name, lines in (("topic", topic), ("mood", mood)):
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    config = config_of(
        "multi-task",
        model={"uri": base.as_uri()},
        task={"tasks": PARTS, **more},
        data={
            "train": [{"uri": (tmp_path / f"{name}.jsonl").as_uri(), "task": name} for name in ("topic", "mood")],
            "validation": {"fraction": 0.3},
        },
        output={"uri": (tmp_path / "output").as_uri()},
    )
    with pytest.raises(DataError) as caught:
        preflight(config, credentials=None, work=tmp_path / "work")
    return caught.value


GOOD = [f'{{"text": "alpha {row}", "label": "{"ab"[row % 2]}"}}' for row in range(30)]
MOOD = [f'{{"text": "beta {row}", "label": "{("good", "bad")[row % 2]}"}}' for row in range(30)]


def test_a_problem_names_the_task_it_is_of(tmp_path: Path, minilm_dir: Path) -> None:
    error = tried(tmp_path, minilm_dir, GOOD, [line.replace('"text"', '"body"') for line in MOOD])
    assert error.reason == "ColumnMissing"
    assert "spec.task.tasks[mood].columns.text" in str(error)


def test_a_task_with_one_class_only_is_refused(tmp_path: Path, minilm_dir: Path) -> None:
    error = tried(tmp_path, minilm_dir, GOOD, [line.replace("bad", "good") for line in MOOD])
    assert error.reason == "OneClassOnly"
    assert "of task mood have the label 'good' alone" in str(error)


def test_each_task_has_a_form_of_its_own_and_keeps_to_it(tmp_path: Path, minilm_dir: Path) -> None:
    lists = [line.replace('"good"', '["good"]').replace('"bad"', '["bad"]') for line in MOOD]
    error = tried(tmp_path, minilm_dir, GOOD, [*lists, MOOD[0]])
    assert error.reason == "InvalidRow"
    assert "mood.jsonl:31: the row has one label where the first row has a list of labels" in str(error)
