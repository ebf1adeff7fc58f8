"""The recorded FineTuneJobs, as whole documents; tests/e2e/test_gitops.py shows what other tools make of them.

UPDATE_GOLDEN=1 writes them anew; the diff is then what is reviewed.
"""

import os
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from tests.unit.documents import LIVES, status_of
from tests.unit.test_status import kstatus

from finetune_api.status import Phase

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "finetunejobs"
UNSEEN = ("no-status", "new", "succeeded-changed", "failed-changed")
"""What the operator has not looked at."""


def recorded(name: str) -> dict[str, object]:
    document: dict[str, object] = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())
    return document


@pytest.mark.parametrize("name", LIVES)
def test_the_document_is_the_recorded_one(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    text = yaml.safe_dump(LIVES[name].document(), sort_keys=False, width=110)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


def test_no_recorded_document_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(LIVES)


def test_every_phase_is_recorded() -> None:
    assert {status_of(recorded(name)).phase for name in LIVES} == {*get_args(Phase), None}


@pytest.mark.parametrize("name", [name for name in LIVES if name not in UNSEEN])
def test_what_was_looked_at_says_so_in_every_condition(name: str) -> None:
    document = LIVES[name].document()
    status, generation = status_of(document), document["metadata"]["generation"]
    assert status.observed_generation == generation
    assert [c.observed_generation for c in status.conditions or []] == [generation] * 7


@pytest.mark.parametrize("name", UNSEEN)
def test_what_was_not_looked_at_is_another_generation(name: str) -> None:
    document = LIVES[name].document()
    assert status_of(document).observed_generation < document["metadata"]["generation"]


def test_the_table_for_users_has_every_recorded_document_once() -> None:
    """What it says of each needs other people's code: tests/e2e/test_gitops.py compares that."""
    rows = re.findall(r"^\|`([a-z-]+)`\|.*$", (ROOT / "docs" / "gitops.md").read_text(), re.MULTILINE)
    assert rows == list(LIVES)


@pytest.mark.parametrize("name", [name for name in LIVES if name not in ("no-status", "deleting")])
def test_the_rules_of_kstatus_that_other_tests_go_by_are_those_of_the_table(name: str) -> None:
    """Its own library wrote the table."""
    document = LIVES[name].document()
    (row,) = [line for line in (ROOT / "docs" / "gitops.md").read_text().splitlines() if line.startswith(f"|`{name}`|")]
    reading = kstatus(status_of(document), generation=document["metadata"]["generation"])
    assert row.split("|")[5] == reading
