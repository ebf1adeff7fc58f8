"""Rows for chats and pairs: none of the test rows' packages or questions is in training."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "hack"))  # where its neighbour is when it runs as a script
from hack import prose


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> list[prose.Package]:
    """Packages of every section, several to a source."""
    found = [
        prose.Package(f"{section}-{number}", f"what {section} {number} does", section, f"{section}-{number // 2}")
        for section in prose.SECTIONS
        for number in range(60)
    ]
    monkeypatch.setattr(prose, "packages", lambda: found)
    return found


def test_a_family_is_on_one_side(known: list[prose.Package]) -> None:
    train, test = (prose.instructions(tests=tests, rows=200) for tests in (False, True))
    sources = {package.name: package.source for package in known}
    sides = [{sources[row["package"]] for row in rows} for rows in (train, test)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_test_rows_ask_as_no_training_row_does() -> None:
    assert not set(prose.ASKED) & set(prose.ASKED_IN_TESTS)
    for tests, asked in ((False, prose.ASKED), (True, prose.ASKED_IN_TESTS)):
        for row in prose.instructions(tests=tests, rows=50):
            *_, user, answer = row["messages"]
            section, number = row["package"].rsplit("-", 1)
            ways = {way.format(name=row["package"], description=f"what {section} {number} does") for way in asked}
            assert user["content"] in ways
            assert answer == {"role": "assistant", "content": section}


def test_a_pair_prefers_a_packages_own_description() -> None:
    rows = prose.preferences(tests=False, rows=100)
    assert len(rows) == 100
    for row in rows:
        section, number = row["prompt"].removeprefix("What is ").removesuffix("?").rsplit("-", 1)
        assert row["chosen"] == f"what {section} {number} does"
        assert f"what {section} " not in row["rejected"]


def test_the_same_packages_give_the_same_rows() -> None:
    assert prose.instructions(tests=False, rows=80) == prose.instructions(tests=False, rows=80)
    assert prose.preferences(tests=True, rows=30) == prose.preferences(tests=True, rows=30)
