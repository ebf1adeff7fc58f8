"""Client and API server agree on every document of the corpus, and speak the rules in the same words.

Each document goes through `kubectl apply --dry-run=server --validate=strict`, and as the YAML that it is to the API
server itself, whose parser is strict where kubectl's is not: of two equal keys kubectl silently keeps the last.
"""

import base64
import copy
import json
import os
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.crd.test_rules import SENSELESS, broken, encoded

from finetune_api import crd
from finetune_api.document import plain, read
from finetune_api.validate import check

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
CORPUS = sorted((ROOT / "tests" / "crd" / "corpus").glob("*.yaml"))
STATE = Path(os.environ.get("STATE", Path.home() / ".local/state/finetune-operator/cluster"))
KUBECONFIG = os.environ.get("KUBECONFIG", str(STATE / "kubeconfig"))
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
    config = yaml.safe_load(Path(KUBECONFIG).read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context()
    if "certificate-authority-data" in cluster:
        context.load_verify_locations(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    headers = {"Content-Type": "application/yaml", "Accept": "application/json"}
    if "token" in user:
        headers["Authorization"] = f"Bearer {user['token']}"
    else:
        with tempfile.NamedTemporaryFile("wb", suffix=".pem") as pem:
            pem.write(base64.b64decode(user["client-certificate-data"]))
            pem.write(b"\n" + base64.b64decode(user["client-key-data"]))
            pem.flush()
            context.load_cert_chain(pem.name)

    def post(body: bytes) -> tuple[int, str]:
        kind = "FineTuneProfile" if b"kind: FineTuneProfile" in body else "FineTuneJob"
        url = f"{cluster['server']}/apis/finetune.dev/v1alpha1/{PLURALS[kind]}?dryRun=All&fieldValidation=Strict"
        request = urllib.request.Request(url, body, headers)
        try:
            with urllib.request.urlopen(request, context=context, timeout=30) as answer:
                return answer.status, ""
        except urllib.error.HTTPError as error:
            return error.code, json.load(error).get("message", "")

    return post


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file.stem)
def test_kubectl_apply_agrees_with_the_client(case: Case) -> None:
    applied = kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--namespace=default", f"--filename={case.file}"
    )
    assert (applied.returncode == 0) == (case.valid or case.lenient_kubectl), applied.stdout + applied.stderr
    for message in broken(case.file.read_bytes()):
        assert message in applied.stderr


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


@pytest.mark.parametrize("name", SENSELESS)
def test_kubectl_apply_refuses_what_a_task_does_not_have(name: str, tmp_path: Path) -> None:
    file = tmp_path / "senseless.json"
    file.write_bytes(encoded(SENSELESS[name]))
    applied = kubectl("apply", "--dry-run=server", "--namespace=default", f"--filename={file}")
    assert applied.returncode != 0
    for message in broken(file.read_bytes()):
        assert message in applied.stderr


@pytest.mark.parametrize("field", ["spec.training", "spec.podTemplate.spec", "status.progress"])
def test_kubectl_explain_describes_every_field(field: str) -> None:
    explained = kubectl("explain", f"finetunejob.{field}")
    assert explained.returncode == 0, explained.stderr
    assert "<no description>" not in explained.stdout
