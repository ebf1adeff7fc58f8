"""The largest micro-batch of a store, quantities, and when preflight warns of memory."""

from dataclasses import replace

import pytest
from tests.trainer.memory import Memory, config_of, learner_of

from finetune_trainer.foresight import Foresight, bytes_of, largest, memory_warning, quantity
from finetune_trainer.predicted import Batch, Prediction

_GIB = 1 << 30
_FOUND = Foresight(10, Prediction(_GIB, 0, 0, 0, 0, 0, 0, parameters=1, trained=1), "")


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1Mi"), (512 << 20, "512Mi"), (_GIB, "1Gi"), (3 * _GIB + 1, "3.1Gi"), (80 * _GIB, "80Gi")]
)
def test_a_size_is_rounded_up_to_what_kubernetes_reads(size: int, text: str) -> None:
    assert quantity(size) == text
    assert bytes_of(text) >= size


@pytest.mark.parametrize(
    ("text", "size"),
    [("16Gi", 16 * _GIB), ("1.5G", 1.5e9), ("2000", 2000.0), ("500m", 0.5), ("4Ki", 4096), ("7k", 7e3)],
)
def test_quantities_are_read_as_kubernetes_reads_them(text: str, size: float) -> None:
    assert bytes_of(text) == size


def test_the_limit_is_a_pods_memory_without_gpus_and_a_gpus_with_them() -> None:
    pods = config_of().pods
    alone = pods.model_copy(update={"gpus": 0, "memory": "1Gi", "gpu_memory": "1Mi"})
    assert memory_warning(_FOUND, alone) is None
    assert "perNode.memory gives 1023Mi" in str(memory_warning(_FOUND, alone.model_copy(update={"memory": "1023Mi"})))
    assert "a GPU has 1Mi" in str(memory_warning(_FOUND, alone.model_copy(update={"gpus": 1})))
    assert memory_warning(_FOUND, alone.model_copy(update={"gpus": 1, "gpu_memory": None})) is None
    assert memory_warning(replace(_FOUND, memory=None), alone.model_copy(update={"memory": "1Mi"})) is None


def test_the_largest_micro_batch_holds_the_longest_rows() -> None:
    store = Memory(input_ids=[[1] * length for length in (3, 9, 5, 7)], labels=[[0]] * 4)
    learner = learner_of(labels=["a", "b"], form="one label")
    assert largest(learner, store, packs=None, rows=2, model={}) == [Batch(2, 9)]
    assert largest(learner, store, packs=None, rows=9, model={}) == [Batch(4, 9)]


def test_a_language_model_asks_for_the_vocabulary_at_labelled_positions() -> None:
    store = Memory(input_ids=[[1] * length for length in (3, 9)])
    found = largest(learner_of("causal-lm"), store, packs=None, rows=2, model={})
    assert found == [Batch(2, 9, labelled=2 + 8, chunked=True)]
