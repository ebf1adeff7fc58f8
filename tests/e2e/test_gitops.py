"""What kubectl wait, kstatus, Argo CD and Flux make of FineTuneJobs: by their own code, and by the very files of
examples/gitops that users get. hack/health is that code in one program; no cluster is asked.

UPDATE_GOLDEN=1 writes the table of docs/gitops.md anew.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.documents import LIVES, Document, resource_of, status_of
from tests.unit.test_decide import NOW
from tests.unit.test_decide_table import CELLS, Cell

from finetune_operator.decide import decide
from finetune_operator.verdict import reason_of

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "gitops.md"
GOLDEN = ROOT / "tests" / "unit" / "golden" / "finetunejobs"
ARGOCD = ROOT / "examples" / "gitops" / "argocd-cm.yaml"
FLUX = ROOT / "examples" / "gitops" / "flux-kustomization.yaml"
WAITS = ("Succeeded", "Succeeded=false", "Suspended", "Reconciling=false")
RECORDED: dict[str, Document] = {name: yaml.safe_load((GOLDEN / f"{name}.yaml").read_text()) for name in LIVES}
NEVER_SERVED = "no-status"
"""The definition gives every stored document a status."""
Answer = dict[str, Any]

COLUMNS = (
    "Recorded as",
    "What has happened",
    "Phase, reason",
    "`kubectl wait` ends for",
    "kstatus: Flux, Helm 4",
    "Argo CD",
    "Flux, with expressions",
)
HEAD = f"|{'|'.join(COLUMNS)}|\n|{'-|' * len(COLUMNS)}\n"


class Program:
    def __init__(self, path: str) -> None:
        self.path = path

    def run(
        self, documents: list[Document], *, argocd: Path = ARGOCD, flux: Path = FLUX
    ) -> subprocess.CompletedProcess[str]:
        waits = [f"-for=condition={wait}" for wait in WAITS]
        return subprocess.run(
            [self.path, f"-argocd={argocd}", f"-flux={FLUX}", *waits],
            input="\n".join(json.dumps(document) for document in documents),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def answers(self, documents: list[Document]) -> list[Answer]:
        done = self.run(documents)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == len(documents)
        return found


@pytest.fixture(scope="module")
def health() -> Program:
    built = subprocess.run([ROOT / "hack/health/build"], capture_output=True, text=True, timeout=1800)
    assert built.returncode == 0, built.stderr
    return Program(built.stdout.strip())


@pytest.fixture(scope="module")
def said(health: Program) -> dict[str, Answer]:
    return dict(zip(RECORDED, health.answers(list(RECORDED.values())), strict=True))


# --- the recorded documents ---


def row(name: str, answer: Answer) -> str:
    status = status_of(RECORDED[name])
    place = f"{status.phase}, {reason_of(status)}" if status.phase else "none"
    waits = ", ".join(f"`{wait}`" for wait in WAITS if answer["kubectl"][f"condition={wait}"]) or "-"
    said = (answer["kstatus"], answer["argocd"]["status"], answer["fluxExprs"])
    return "|".join(["", f"`{name}`", LIVES[name].fact, place, waits, *said, ""])


def test_the_table_for_users_is_what_the_tools_say(said: dict[str, Answer]) -> None:
    table = HEAD + "".join(row(name, answer) + "\n" for name, answer in said.items())
    text = DOCS.read_text()
    (old,) = re.findall(r"^\|Recorded as\|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    if os.environ.get("UPDATE_GOLDEN"):
        DOCS.write_text(text.replace(old, table))
        return
    assert old == table


def test_flux_and_the_library_it_has_forked_read_the_same(said: dict[str, Answer]) -> None:
    assert {name: answer["flux"] for name, answer in said.items()} == {
        name: answer["kstatus"] for name, answer in said.items()
    }


@pytest.mark.parametrize("name", [name for name in RECORDED if name != NEVER_SERVED])
def test_every_expression_of_flux_can_be_evaluated(said: dict[str, Answer], name: str) -> None:
    assert said[name]["fluxExprs"] in ("InProgress", "Failed", "Current")


def test_without_the_default_of_observed_generation_kstatus_would_take_the_new_for_done(
    said: dict[str, Answer],
) -> None:
    assert said[NEVER_SERVED]["kstatus"] == "Current"
    assert said["new"]["kstatus"] == "InProgress"


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in ("deleting", NEVER_SERVED)])
def test_argo_cd_shows_the_message_of_a_status_that_is_up_to_date(said: dict[str, Answer], name: str) -> None:
    status, generation = status_of(RECORDED[name]), RECORDED[name]["metadata"]["generation"]
    expected = status.message if status.observed_generation == generation else "waiting for the operator to look"
    assert said[name]["argocd"]["message"] == expected


# --- every cell of the table of decisions ---

ON_ITS_WAY = ("InProgress", "Progressing", "InProgress", ())
NEEDS_SOMEBODY = ("Failed", "Degraded", "Failed", ("Reconciling=false",))
READINGS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    # kstatus, Argo CD, Flux with expressions, what kubectl wait ends for
    "looks": ON_ITS_WAY,
    "waits": ON_ITS_WAY,
    "queues": ON_ITS_WAY,
    "starts": ON_ITS_WAY,
    "trains": ON_ITS_WAY,
    "rates": ON_ITS_WAY,
    "ends": ON_ITS_WAY,
    "mends": NEEDS_SOMEBODY,
    "stuck": NEEDS_SOMEBODY,
    "rests": ("Current", "Suspended", "InProgress", ("Suspended", "Reconciling=false")),
    "done": ("Current", "Healthy", "Current", ("Succeeded", "Reconciling=false")),
    "fails": ("Failed", "Degraded", "Failed", ("Succeeded=false", "Reconciling=false")),
}


def document_of(cell: Cell) -> Document:
    """After the look that the cell is about."""
    given = cell.given
    status = decide(given, now=NOW).status or given.subject.status
    return {**resource_of(given.subject), "status": status.document()}


def test_the_tools_read_every_cell_of_the_table_of_decisions_as_it_is_meant(health: Program) -> None:
    answers = health.answers([document_of(cell) for cell in CELLS])
    wrong = []
    for cell, answer in zip(CELLS, answers, strict=True):
        left_alone = {"Succeeded": "done", "Failed": "fails"}.get(cell.before, "")
        waits = tuple(wait for wait in WAITS if answer["kubectl"][f"condition={wait}"])
        reading = (answer["kstatus"], answer["argocd"]["status"], answer["fluxExprs"], waits)
        if reading != READINGS[left_alone if cell.word == "-" else cell.word]:
            wrong.append((cell, reading))
    assert wrong == []


# --- the program itself ---


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('return { status = "Fine" }', 'returns status "Fine", which Argo CD does not know'),
        ("return 1", "the health check returns no table"),
        ("return { status = string.upper(obj.kind) }", "attempt to index a non-table object(nil) with key 'upper'"),
    ],
)
def test_a_health_check_that_argo_cd_would_not_take_is_refused(
    health: Program, tmp_path: Path, script: str, words: str
) -> None:
    """Argo CD opens no library for strings, for instance."""
    config = yaml.safe_load(ARGOCD.read_text())
    config["data"] = dict.fromkeys(config["data"], script)
    path = tmp_path / "argocd-cm.yaml"
    path.write_text(yaml.safe_dump(config))
    done = health.run([RECORDED["training"]], argocd=path)
    assert done.returncode != 0
    assert words in done.stderr
