"""Client and API server agree on every document of the corpus, and speak the rules in the same words.

Each document goes through `kubectl apply --dry-run=server --validate=strict`, and as the YAML that it is to the API
server itself, whose parser is strict where kubectl's is not: of two equal keys kubectl silently keeps the last. One
kubectl takes all of them: it goes on after each that is refused, and says at the end why it was.
"""

import copy
import json
import os
import subprocess
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.crd.test_rules import SENSELESS, broken, encoded
from tests.e2e.api import Api

from finetune_api import crd
from finetune_api.document import plain, read
from finetune_api.validate import check

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
CORPUS = sorted((ROOT / "tests" / "crd" / "corpus").glob("*.yaml"))
STATE = Path(os.environ.get("STATE", Path.home() / ".local/state/finetune-operator/cluster"))
KUBECONFIG = os.environ.get("KUBECONFIG", str(STATE / "kubeconfig"))
DRY = ("--dry-run=server", "--validate=strict", "--namespace=default")
PLURALS = {"FineTuneJob": "namespaces/default/finetunejobs", "FineTuneProfile": "finetuneprofiles"}

Send = Callable[[bytes], tuple[int, str]]


@dataclass(frozen=True)
class Case:
    file: Path
    valid: bool
    lenient_kubectl: bool
    as_body: bool

    @classmethod
    def read(cls, file: Path) -> "Case":
        lines = file.read_text().split("\n")
        head = [line for line in lines[:4] if line.startswith("# ")]
        return cls(
            file,
            valid=head[0] == "# expect: valid",
            lenient_kubectl=any(line.startswith("# kubectl: accepts") for line in head),
            as_body=not any(line.startswith("# body: not sent") for line in head),
        )


def plain_document(file: Path) -> dict[str, Any]:
    (document,) = read(file.read_bytes())
    assert document.root is not None
    found: dict[str, Any] = plain(document.root)
    return found


CASES = [Case.read(file) for file in CORPUS]


def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", f"--kubeconfig={KUBECONFIG}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def the_definitions() -> None:
    """The committed CRDs, as the chart installs them."""
    applied = kubectl(
        "apply",
        "--server-side",
        "--force-conflicts",
        *(f"--filename={ROOT / 'crds' / name}" for name in crd.definitions()),
    )
    assert applied.returncode == 0, applied.stderr
    names = [f"crd/{definition['metadata']['name']}" for definition in crd.definitions().values()]
    waited = kubectl("wait", "--for=condition=Established", "--timeout=30s", *names)
    assert waited.returncode == 0, waited.stderr


@pytest.fixture(scope="module")
def send() -> Send:
    """Creates a document, dry, by a request whose body is the file as it is."""
    api = Api(Path(KUBECONFIG))

    def post(body: bytes) -> tuple[int, str]:
        kind = "FineTuneProfile" if b"kind: FineTuneProfile" in body else "FineTuneJob"
        path = f"/apis/finetune.dev/v1alpha1/{PLURALS[kind]}?dryRun=All&fieldValidation=Strict"
        try:
            api.text(path, method="POST", body=body, kind="application/yaml")
        except urllib.error.HTTPError as error:
            return error.code, json.load(error).get("message", "")
        return 201, ""

    return post


@dataclass(frozen=True)
class Applied:
    """What kubectl complained of many files, applied without being stored."""

    complaints: str

    @classmethod
    def of(cls, files: Sequence[Path]) -> "Applied":
        """Raises AssertionError when kubectl has left out a file that it did not complain of."""
        done = kubectl("apply", *DRY, *(f"--filename={file}" for file in files))
        found = cls(done.stderr)
        wanted = Counter(name for file in files if not found.refusal(file) for name in names(file))
        assert not wanted - Counter(line.partition(" ")[0] for line in done.stdout.splitlines()), done.stderr
        return found

    def refusal(self, file: Path) -> str:
        """The lines that name a file; nothing where it was taken."""
        return "\n".join(line for line in self.complaints.splitlines() if str(file) in line)


def names(file: Path) -> Iterator[str]:
    """Of the documents in a file, as kubectl prints them."""
    for document in (plain(found.root) for found in read(file.read_bytes()) if found.root is not None):
        group = document["apiVersion"].rpartition("/")[0].partition("/")[0]
        kind = f"{document['kind'].lower()}.{group}".rstrip(".")
        yield f"{kind}/{document['metadata']['name']}"


@pytest.fixture(scope="module")
def applied(the_definitions: None) -> Applied:
    return Applied.of(CORPUS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file.stem)
def test_kubectl_apply_agrees_with_the_client(case: Case, applied: Applied) -> None:
    said = applied.refusal(case.file)
    assert (not said) == (case.valid or case.lenient_kubectl), said
    for message in broken(case.file.read_bytes()):
        assert message in said


def test_kubectl_says_every_mistake_of_a_document_in_a_line_of_its_own(tmp_path: Path) -> None:
    """As people see it, who apply one file."""
    file = tmp_path / "two-mistakes.json"
    document = plain_document(ROOT / "tests" / "crd" / "corpus" / "validation-uri.yaml")
    document["spec"]["training"] = {"seed": -1, "epochs": 1, "maxSteps": 1}
    file.write_bytes(encoded(document))
    done = kubectl("apply", *DRY, f"--filename={file}")
    assert done.returncode == 1
    first, *lines = done.stderr.splitlines()
    assert first == f'The FineTuneJob "{document["metadata"]["name"]}" is invalid: '
    seed, both = sorted(lines)
    assert seed.startswith("* spec.training.seed: Invalid value: -1: ")
    assert both.startswith("* spec.training: Invalid value: ")
    assert "give epochs and maxSteps not together: at most one of them" in both


@pytest.mark.parametrize("case", [case for case in CASES if case.as_body], ids=lambda case: case.file.stem)
def test_the_api_server_agrees_with_the_client(case: Case, send: Send) -> None:
    code, message = send(case.file.read_bytes())
    assert (code == 201) == case.valid, (code, message)
    assert code == 201 or 400 <= code < 500
    for sentence in broken(case.file.read_bytes()):
        assert sentence in message


EVERYTHING = plain_document(ROOT / "tests" / "crd" / "corpus" / "everything.yaml")
ODD_VALUES = [
    None, True, False, 0, -1, 1, 3.0, 2.5, 2e-5, 1e-9, 1e20, 1e300, 2**31, 2**63, "", "a", "yes", "2e-5", "10m", "16Gi",
    "4", "s3://bucket/key", "s3://bucket/\u00a0", "http://host:1", "line\n", "\u0130", "A" * 2000, "full", "lora",
    "cosine", "NoSchedule", "f1", [], ["a"], [None], ["a", "a"], {}, {"a": "b"}, {"a": None}, {"a": {}},
]  # fmt: skip


def places(value: object, path: tuple[str | int, ...] = ("spec",)) -> Iterator[tuple[str | int, ...]]:
    if path[1:]:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The document with every field, some of it replaced, taken away, put elsewhere or misspelt."""
    document: dict[str, Any] = copy.deepcopy(EVERYTHING)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(list(places(document["spec"]))))
        owner: Any = document
        for key in parents:
            owner = owner[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        odd = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        if action == "replace":
            owner[last] = odd
        elif action == "remove":
            del owner[last]
        elif isinstance(owner, dict):
            owner[draw(st.sampled_from(["uri", "steps", "epochs", "type", "seed", "x", "Type"]))] = odd
        else:
            owner.append(odd)
    return document


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(document=mutated())
def test_the_api_server_agrees_with_the_client_on_mutations(document: dict[str, Any], send: Send) -> None:
    text = json.dumps(document)
    code, message = send(text.encode())
    problems = [str(problem) for checked in check(text, name="") for problem in checked.problems]
    errors = [problem for problem in problems if ": note: " not in problem]
    assert (code == 201) == (not errors), (code, message, errors)


@pytest.fixture(scope="module")
def senseless(the_definitions: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Applied]:
    folder = tmp_path_factory.mktemp("senseless")
    for name, document in SENSELESS.items():
        (folder / f"{name}.json").write_bytes(encoded(document))
    return folder, Applied.of(sorted(folder.iterdir()))


@pytest.mark.parametrize("name", SENSELESS)
def test_kubectl_apply_refuses_what_a_task_does_not_have(name: str, senseless: tuple[Path, Applied]) -> None:
    folder, applied = senseless
    said = applied.refusal(folder / f"{name}.json")
    assert said
    for message in broken(encoded(SENSELESS[name])):
        assert message in said


@pytest.mark.parametrize("field", ["spec.training", "spec.podTemplate.spec", "status.progress"])
def test_kubectl_explain_describes_every_field(field: str) -> None:
    explained = kubectl("explain", f"finetunejob.{field}")
    assert explained.returncode == 0, explained.stderr
    assert "<no description>" not in explained.stdout
