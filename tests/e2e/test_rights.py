"""What a release of the chart that watches some namespaces may do, as an API server with RBAC says it.

tests/e2e/test_cluster.py asks the same of a release that watches all. UPDATE_GOLDEN=1 writes the files anew.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.e2e.test_operator import Document, Plane, binaries, install

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/e2e/golden"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ACCOUNT = "system:serviceaccount:finetune-system:one-finetune-operator"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    binaries()
    running = Plane(tmp_path_factory.mktemp("plane"), authorization="RBAC")
    try:
        install(running)
        for name in ("finetune-system", "watched"):
            running.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        for document in rendered():
            running.create(path_of(document), document)
        yield running
    finally:
        running.stop()


def rendered() -> list[Document]:
    """The roles and bindings of a release that watches one namespace."""
    command = [printed("hack/helm"), "template", "one", str(ROOT / "charts/finetune-operator")]
    text = printed(*command, "--namespace", "finetune-system", "--set", "watchNamespaces={watched}")
    documents = [document for document in yaml.safe_load_all(text) if document]
    return [document for document in documents if document["apiVersion"].startswith("rbac.")]


def path_of(document: Document) -> str:
    place = document["metadata"].get("namespace")
    return f"{RBAC}{f'/namespaces/{place}' if place else ''}/{document['kind'].lower()}s"


def printed(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("namespace", ["watched", "finetune-system", "kube-system"])
def test_an_operator_of_one_namespace_may_do_what_the_golden_file_says_and_nothing_else(
    plane: Plane, namespace: str
) -> None:
    """Where it watches, where it runs, and elsewhere."""
    kubectl = [printed("hack/kubectl"), f"--kubeconfig={plane.kubeconfig}"]
    words = printed(*kubectl, "auth", "can-i", "--list", "-n", namespace, f"--as={ACCOUNT}")
    heading, *rights = [" ".join(line.split()) for line in words.splitlines()]
    found = "\n".join([heading, *sorted(rights)]) + "\n"
    golden = GOLDEN / f"rights-operator-of-one-namespace-in-{namespace}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()
