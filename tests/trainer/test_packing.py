import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.packing import joined, pack, positions_of


@given(st.lists(st.integers(1, 40), max_size=300), st.integers(40, 64))
def test_every_row_is_in_exactly_one_pack_and_no_pack_is_over_the_limit(lengths: list[int], limit: int) -> None:
    rows = np.arange(len(lengths)) * 3 + 1
    packs = pack(rows, np.array(lengths, dtype=np.int64), limit=limit)
    assert sorted(packs.rows.tolist()) == rows.tolist()
    sums = [sum(lengths[(row - 1) // 3] for row in packs[number]) for number in range(len(packs))]
    assert all(0 < total <= limit for total in sums)
    if lengths:
        of_rows = np.array([lengths[(row - 1) // 3] for row in packs.rows])
        assert packs.lengths(of_rows).tolist() == sums


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300))
def test_no_two_packs_are_half_empty(lengths: list[int]) -> None:
    packs = pack(np.arange(len(lengths)), np.array(lengths, dtype=np.int64), limit=40)
    sums = [sum(lengths[row] for row in packs[number]) for number in range(len(packs))]
    assert sum(total <= 20 for total in sums) <= 1


def test_packs_are_nearly_full_and_the_same_every_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 256, 20_000)
    packs = pack(np.arange(20_000), lengths, limit=256)
    assert lengths.sum() / (256 * len(packs)) > 0.99
    again = pack(np.arange(20_000), lengths, limit=256)
    assert np.array_equal(again.rows, packs.rows)
    assert np.array_equal(again.offsets, packs.offsets)


def test_packs_of_several_parts_follow_one_another() -> None:
    one = pack(np.array([7, 8, 9]), np.array([3, 3, 2]), limit=6)
    two = pack(np.array([4]), np.array([5]), limit=6)
    both = joined([one, two])
    assert [both[number].tolist() for number in range(len(both))] == [
        *(one[number].tolist() for number in range(len(one))),
        [4],
    ]


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 3 to 9 tokens do not fit into 8"):
        pack(np.arange(2), np.array([3, 9]), limit=8)


def test_positions_count_from_zero_in_each_row_and_in_the_padding() -> None:
    assert positions_of([3, 1, 2], width=8).tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
