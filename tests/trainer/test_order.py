import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.order import (
    Mixture,
    Order,
    Part,
    evaluation_interval,
    micro_batches,
    parts_of,
    permute,
    total_steps,
)

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**31 - 1)


def order(rows: int, batch_size: int, seed: int, *, lengths: int = 50) -> Order:
    return Order(rows, batch_size, seed, np.random.default_rng(rows).integers(1, lengths, rows))


@given(SIZES, SEEDS)
def test_the_keyed_permutation_is_one(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size=size, key=key)) == list(range(size))


@given(SIZES, SEEDS, st.data())
def test_a_position_is_permuted_alone_as_among_others(size: int, key: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, size - 1))
    whole = permute(np.arange(size), size=size, key=key)
    assert permute(np.array([position]), size=size, key=key)[0] == whole[position]


def test_a_permutation_of_a_billion_rows_needs_no_memory() -> None:
    assert len(set(permute(np.arange(10**9 - 50, 10**9), size=10**9, key=1))) == 50


@settings(deadline=None)
@given(SIZES, st.integers(1, 40), SEEDS, st.integers(0, 3))
def test_each_row_comes_exactly_once_an_epoch(rows: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = order(rows, batch_size, seed)
    first = epoch * batches.steps_per_epoch
    seen = [batches.batch(step) for step in range(first, first + batches.steps_per_epoch)]
    assert sorted(np.concatenate(seen)) == list(range(rows))
    assert sorted(map(len, seen))[1:] == [batch_size] * (len(seen) - 1)


@settings(deadline=None)
@given(SIZES, st.integers(1, 40), SEEDS, st.integers(0, 500))
def test_resuming_at_any_step_yields_the_identical_next_batch(rows: int, batch_size: int, seed: int, step: int) -> None:
    through = order(rows, batch_size, seed)
    for earlier in range(max(0, step - 3), step):
        through.batch(earlier)
    assert through.batch(step).tolist() == order(rows, batch_size, seed).batch(step).tolist()


def test_epochs_and_seeds_differ() -> None:
    batches = order(1000, 10, 1)
    assert batches.batch(0).tolist() != batches.batch(100).tolist()
    assert batches.batch(0).tolist() != order(1000, 10, 2).batch(0).tolist()


def test_the_order_is_the_same_in_another_process() -> None:
    program = (
        "import numpy as np; from finetune_trainer.data.order import Order;"
        "print(Order(997, 8, 17, np.arange(997) % 61).batch(200).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(Order(997, 8, 17, np.arange(997) % 61).batch(200).tolist())


def test_batches_hold_rows_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 20000)
    batches = Order(20000, 32, 3, lengths)
    padded = sum(lengths[batches.batch(step)].max() * 32 for step in range(batches.steps_per_epoch))
    assert padded < 1.1 * lengths.sum()


def test_long_and_short_batches_are_mixed_within_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 6400)
    batches = Order(6400, 32, 3, lengths)
    means = np.array([lengths[batches.batch(step)].mean() for step in range(200)])
    assert abs(np.corrcoef(means, np.arange(200))[0, 1]) < 0.2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 9))
def test_micro_batches_of_all_ranks_are_the_batch(counts: list[int], size: int, ranks: int) -> None:
    groups = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    shares = [(group, float(number)) for number, group in enumerate(groups)]
    pieces = [piece for rank in range(ranks) for piece in micro_batches(shares, size=size, rank=rank, ranks=ranks)]
    assert sorted(number for number, _, _ in pieces) == list(range(sum(-(-count // size) for count in counts)))
    assert sorted(row for _, piece, _ in pieces for row in piece) == list(range(sum(counts)))
    assert all(len(piece) <= size for _, piece, _ in pieces)
    assert all(set(piece) <= set(groups[int(share)]) for _, piece, share in pieces)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(3.0, None, 12), (0.5, None, 2), (0.01, None, 1), (None, 7, 7), (2.1, None, 9)]
)
def test_total_steps(epochs: float | None, max_steps: int | None, steps: int) -> None:
    assert total_steps(rows=100, batch_size=32, epochs=epochs, max_steps=max_steps) == steps


def test_the_evaluation_interval_is_at_least_one_step() -> None:
    assert evaluation_interval(steps_per_epoch=10, steps=None, epochs=0.5) == 5
    assert evaluation_interval(steps_per_epoch=10, steps=None, epochs=0.01) == 1
    assert evaluation_interval(steps_per_epoch=10, steps=3, epochs=None) == 3


WEIGHTS = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.floats(0.01, 5))
PARTS = st.lists(st.tuples(st.integers(1, 60), WEIGHTS), min_size=1, max_size=4)


def mixture(parts: list[tuple[int, float]], seed: int) -> Mixture:
    firsts = np.cumsum([0, *[rows for rows, _ in parts]])
    return Mixture([Part(int(first), *part) for first, part in zip(firsts, parts, strict=False)], seed=seed)


def counts(mixed: Mixture, epoch: int) -> list[int]:
    rows = sum(part.rows for part in mixed.parts)
    return np.bincount(mixed.resolve(epoch, np.arange(mixed.rows)), minlength=rows).tolist()


@given(PARTS, SEEDS, st.integers(0, 50))
def test_a_row_of_weight_w_comes_floor_or_ceil_of_w_times_an_epoch(
    parts: list[tuple[int, float]], seed: int, epoch: int
) -> None:
    mixed = mixture(parts, seed)
    seen = counts(mixed, epoch)
    for part in mixed.parts:
        mine = seen[part.first : part.first + part.rows]
        assert set(mine) <= {int(part.weight), int(part.weight) + 1}
        assert abs(sum(mine) - part.weight * part.rows) <= 0.5 or sum(mine) == 1


@given(PARTS, SEEDS, st.integers(1, 12))
def test_over_the_epochs_rows_of_a_source_are_seen_equally_often(
    parts: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    mixed = mixture(parts, seed)
    seen = np.sum([counts(mixed, epoch) for epoch in range(epochs)], axis=0)
    for part in mixed.parts:
        mine = seen[part.first : part.first + part.rows]
        assert mine.max() - mine.min() <= 1


@given(PARTS, SEEDS, st.integers(0, 9))
def test_an_epoch_has_the_same_number_of_rows_as_any_other(
    parts: list[tuple[int, float]], seed: int, epoch: int
) -> None:
    assert sum(counts(mixture(parts, seed), epoch)) == mixture(parts, seed).rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), SEEDS, st.integers(0, 9))
def test_weights_of_one_change_nothing(sizes: list[int], seed: int, epoch: int) -> None:
    mixed = mixture([(size, 1.0) for size in sizes], seed)
    assert mixed.resolve(epoch, np.arange(mixed.rows)).tolist() == list(range(sum(sizes)))


@settings(deadline=None)
@given(PARTS, st.integers(1, 12), SEEDS, st.integers(0, 3))
def test_the_batches_of_an_epoch_are_the_mixture(
    parts: list[tuple[int, float]], batch_size: int, seed: int, epoch: int
) -> None:
    mixed = mixture(parts, seed)
    lengths = np.arange(sum(rows for rows, _ in parts)) % 17
    batches = Order(mixed.rows, batch_size, seed, lengths, mixed)
    first = epoch * batches.steps_per_epoch
    seen = np.concatenate([batches.batch(step) for step in range(first, first + batches.steps_per_epoch)])
    assert sorted(seen) == sorted(mixed.resolve(epoch, np.arange(mixed.rows)))


def test_the_rows_of_half_a_source_alternate_between_epochs() -> None:
    mixed = mixture([(10, 1.0), (100, 0.5)], 3)
    one, two = (set(mixed.resolve(epoch, np.arange(10, 60)).tolist()) for epoch in (0, 1))
    assert one | two == set(range(10, 110))
    assert not one & two


def test_parts_are_the_runs_of_equal_sources() -> None:
    sources = np.array([4, 4, 5, 7, 7, 7], dtype=np.int32)
    assert parts_of(sources, {5: 0.5, 7: 2.0}) == [Part(0, 2), Part(2, 1, 0.5), Part(3, 3, 2.0)]
    assert parts_of(sources[:0], {}) == []
