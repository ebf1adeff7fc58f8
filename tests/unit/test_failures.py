"""docs/failures.md says what the operator does."""

import re
import subprocess
import sys
from pathlib import Path

from hack import failures

from finetune_operator.policies.restarts import DELAYS, FREE_WITHOUT_PROGRESS
from finetune_operator.policies.waiting import CAUSES, Cause
from finetune_operator.policies.ways import RULES, WAYS, Kind

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_fresh() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "hack/failures.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr


def test_every_way_of_ending_has_one_row() -> None:
    rows = [line.split("|") for line in failures.text().splitlines() if line.startswith("|")]
    for way in WAYS:
        (row,) = (cells for cells in rows if f"`{way.reason}`" in cells and way.happened in cells)
        assert row[3] == way.kind.value
        assert all(cell.strip() for cell in row[1:-1]), row
        assert len(row) == 7, f"a cell of {way.reason} holds a bar"


def test_every_cause_of_waiting_has_a_row() -> None:
    from finetune_operator.policies import waiting

    made = [value for value in vars(waiting).values() if isinstance(value, Cause)]
    assert len(made) > 5
    assert [cause.reason for cause in made if cause not in CAUSES] == []
    assert all(f"|`{cause.reason}`|{cause.happened}|" in failures.text() for cause in CAUSES)


def test_every_kind_has_a_rule_and_is_used() -> None:
    assert set(RULES) == set(Kind) == {way.kind for way in WAYS}


def test_what_is_tried_again_waits_longer_each_time_and_never_more_than_ten_minutes() -> None:
    for kind, delay in DELAYS.items():
        waits = [delay(number).total_seconds() for number in range(40)]
        assert waits == sorted(waits), kind
        assert waits[-1] == 600


def test_delays_are_told_as_they_are() -> None:
    assert failures.delays(DELAYS[Kind.CRASH]) == "5 s, 10 s, 20 s, 40 s, ... at most 10 min"
    assert f"{FREE_WITHOUT_PROGRESS} interruptions in a row" in " ".join(failures.text().split())


def test_reasons_are_words_that_conditions_may_have() -> None:
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", way.reason) for way in WAYS)
