"""Kubeflow Trainer with JobSet, with their webhooks, run on this machine.

The API server finds the webhooks through Services of type ExternalName that lead to localhost. Each manager makes its
own certificate, stores it in a Secret and reads it from a fixed folder, into which a kubelet would copy it. Here that
is done in a mount namespace for each.
"""

import base64
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.operator.api import Document
from bench.operator.plane import Plane, built, wait_for

FOLDER = "/tmp/k8s-webhook-server/serving-certs"
ENTER = f"""
mkdir -p {FOLDER}
mount --bind "$1" {FOLDER}
shift
exec "$@"
"""
FILES = ("tls.key", "ca.crt", "tls.crt")


@dataclass(frozen=True)
class Manager:
    name: str
    namespace: str
    service: str
    secret: str
    webhook: int
    health: int


TRAINER = Manager(
    "trainer", "kubeflow-system", "kubeflow-trainer-controller-manager", "kubeflow-trainer-webhook-cert", 29443, 28081
)
JOBSET = Manager("jobset", "jobset-system", "jobset-webhook-service", "jobset-webhook-server-cert", 29444, 28082)


def start(plane: Plane) -> None:
    """Both, ready."""
    folder = built("bench/operator/build", "peer")
    _install(plane, folder)
    config = plane.directory / "jobset.yaml"
    kind = {"apiVersion": "config.jobset.x-k8s.io/v1alpha1", "kind": "Configuration"}
    config.write_text(yaml.safe_dump({**kind, "webhook": {"port": JOBSET.webhook}}))
    own = ["--leader-elect=false", "--metrics-bind-address=127.0.0.1:28443"]
    _run(plane, JOBSET, folder, ["--config", str(config), *own])
    _run(plane, TRAINER, folder, [f"--webhook-server-port={TRAINER.webhook}"])
    for manager in (TRAINER, JOBSET):
        _copy_certificate(plane, manager)
    for manager in (TRAINER, JOBSET):
        wait_for(f"{manager.name} is ready", lambda manager=manager: _ready(plane, manager))
    plane.apply(*_documents(folder / "trainer-source/manifests/base/runtimes/torch_distributed.yaml"))


def _install(plane: Plane, folder: Path) -> None:
    crds = [*(folder / "trainer-source/manifests/base/crds").glob("trainer*.yaml")]
    crds += (folder / "jobset-source/config/components/crd/bases").glob("*.yaml")
    plane.apply(*(document for path in sorted(crds) for document in _documents(path)))
    plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    for manager in (TRAINER, JOBSET):
        plane.namespace(manager.namespace)
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": manager.secret}}
        port = {"port": manager.webhook, "protocol": "TCP"}
        spec = {"type": "ExternalName", "externalName": "localhost", "ports": [port]}
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": manager.service}, "spec": spec}
        for document in (secret, service):
            document["metadata"]["namespace"] = manager.namespace  # type: ignore[index]
            plane.apply(document)
    hooks = plane.kubectl("kustomize", str(folder / "trainer-source/manifests/base/webhook"))
    plane.apply(*(_leading_to(hook, TRAINER, "") for hook in yaml.safe_load_all(hooks) if "webhooks" in (hook or ())))
    for hook in _documents(folder / "jobset-source/config/components/webhook/manifests.yaml"):
        plane.apply(_leading_to(hook, JOBSET, "jobset-"))


def _documents(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _leading_to(hook: Document, manager: Manager, prefix: str) -> Document:
    """The webhooks of a configuration asked at the manager's Service; its name begins with the prefix."""
    hook["metadata"]["name"] = prefix + hook["metadata"]["name"]
    for one in hook["webhooks"]:
        one["clientConfig"]["service"] |= {
            "name": manager.service,
            "namespace": manager.namespace,
            "port": manager.webhook,
        }
    return hook


def _run(plane: Plane, manager: Manager, folder: Path, arguments: list[str]) -> None:
    certificates = plane.directory / f"{manager.name}-certificates"
    certificates.mkdir()
    health = f"--health-probe-bind-address=127.0.0.1:{manager.health}"
    enter = ["unshare", "--mount", "sh", "-e", "-c", ENTER, "enter", certificates]
    environment = {"KUBECONFIG": str(plane.kubeconfig(manager.name))}
    plane.start(manager.name, [*enter, folder / manager.name, *arguments, health], environment=environment)


def _copy_certificate(plane: Plane, manager: Manager) -> None:
    """As soon as the manager has made it."""
    api = plane.connect()
    path = f"/api/v1/namespaces/{manager.namespace}/secrets/{manager.secret}"

    def made() -> bool:
        plane.check()
        return set(FILES) <= set(api.call("GET", path).get("data") or ())

    wait_for(f"the certificate of {manager.name}", made)
    data = api.call("GET", path)["data"]
    for name in FILES:
        (plane.directory / f"{manager.name}-certificates" / name).write_bytes(base64.b64decode(data[name]))


def _ready(plane: Plane, manager: Manager) -> bool:
    plane.check()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{manager.health}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
