"""Duplicates, conflicts and leaks over all rows, against a plain reading of the same definitions."""

import subprocess
import sys
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.data.duplicates import Contents, Mark, Repeated
from finetune_trainer.run import TEST, TRAIN, VALIDATION

ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 1), st.integers(0, 2), st.sampled_from([TRAIN, VALIDATION, TEST])),
    max_size=60,
)
"""Content, the other hash of the content, answer and split: contents with equal first hashes may differ."""


def spread(number: int) -> int:
    return number * 0x9E3779B97F4A7C15 % 2**64


def found(tmp_path: Path, rows: list[tuple[int, int, int, int]], *, part: int = 1 << 22) -> Repeated:
    contents = Contents(tmp_path)
    for number, (content, check, answer, split) in enumerate(rows):
        contents.add(content=spread(content), check=check, answer=answer, place=(0, number), split=split)
    repeated = contents.find(part=part)
    contents.close()
    return repeated


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from([1, 7, 1 << 22]))
def test_counts_are_those_of_a_plain_reading(tmp_path: Path, rows: list[tuple[int, int, int, int]], part: int) -> None:
    repeated = found(tmp_path, rows, part=part)
    contents = [row[:2] for row in rows]
    trained = {row[:2] for row in rows if row[3] == TRAIN}
    assert repeated.document() == {
        "duplicates": len(rows) - len(set(contents)),
        "conflicts": len({row[:3] for row in rows}) - len(set(contents)),
        "validationInTrain": sum(row[:2] in trained for row in rows if row[3] == VALIDATION),
        "testInTrain": sum(row[:2] in trained for row in rows if row[3] == TEST),
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from([1, 7, 1 << 22]))
def test_marks_leave_every_training_content_once_and_none_that_is_held_out(
    tmp_path: Path, rows: list[tuple[int, int, int, int]], part: int
) -> None:
    marks = found(tmp_path, rows, part=part).marks
    held = {side: {row[:2] for row in rows if row[3] == side} for side in (VALIDATION, TEST)}
    seen: set[tuple[int, ...]] = set()
    for mark, row in zip(marks, rows, strict=True):
        expected = Mark.KEPT
        if row[3] == TRAIN:
            if row[:2] in held[VALIDATION]:
                expected = Mark.VALIDATION
            elif row[:2] in held[TEST]:
                expected = Mark.TEST
            elif row[:3] in seen:
                expected = Mark.DUPLICATE
            seen.add(row[:3])
        assert mark == expected


def test_a_leak_is_shown_with_its_twin(tmp_path: Path) -> None:
    rows = [(1, 0, 0, TRAIN), (2, 0, 0, TRAIN), (3, 0, 0, VALIDATION), (2, 0, 1, VALIDATION), (1, 0, 0, TEST)]
    contents = Contents(tmp_path)
    for number, (content, check, answer, split) in enumerate(rows):
        contents.add(content=content, check=check, answer=answer, place=(number > 2, number + 1), split=split)
    repeated = contents.find()
    assert repeated.examples == ((0, 4), (1, 3))
    assert [contents.place(number, ["a", "b"]) for number in (0, 4)] == ["a:1", "b:5"]
    assert contents.leaked(repeated.marks) == [1]
    contents.close()
    assert list(tmp_path.iterdir()) == []


def test_a_chance_collision_of_one_hash_is_no_duplicate(tmp_path: Path) -> None:
    assert found(tmp_path, [(1, 0, 0, TRAIN), (1, 1, 0, TRAIN)]).duplicates == 0


def test_many_rows_are_compared_in_bounded_memory(tmp_path: Path) -> None:
    """600,000 rows, in parts of 60,000: in a process of its own, whose peak tells."""
    program = f"""
import random, resource
from pathlib import Path
from finetune_trainer.data.duplicates import Contents
contents = Contents(Path({str(tmp_path)!r}))
rows = 600_000
for number in range(rows):
    value = (number % (rows - 1000)) * 0x9E3779B97F4A7C15 % 2**64
    contents.add(content=value, check=value, answer=0, place=(0, number), split=number & 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
repeated = contents.find(part=60_000)
print(repeated.duplicates, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    duplicates, grown = map(int, done.stdout.split())
    assert duplicates == 1000
    assert grown < 40 * 1024  # KiB; all columns of all rows would take 22 MB, and their sorting three times that
