"""The operator as the chart installs it: its CRDs, its rights, its arguments; run on this machine as if in a pod."""

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import cache

import yaml

from bench.operator.api import Document
from bench.operator.plane import HOST, ROOT, Plane, built, wait_for

SYSTEM = "finetune-system"
CHART = ROOT / "charts/finetune-operator"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
ENTER = f"""
mount -t tmpfs tmpfs /var/run
mkdir -p {ACCOUNT}
cp "$1"/account/* {ACCOUNT}
mount --bind "$1"/hosts /etc/hosts
shift
exec "$@"
"""
"""In a mount namespace of its own: a pod's service account, and the name under which it knows the API server."""


@cache
def metrics_port() -> int:
    """One that is free."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        return int(listener.getsockname()[1])


def install(plane: Plane) -> None:
    """Everything but the process itself."""
    plane.namespace(SYSTEM)
    plane.kubectl("apply", "--server-side", "-f", str(CHART / "crds"))
    plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    plane.apply(*(document for document in rendered() if document["kind"] not in ("Deployment", "Service")))


def rendered() -> list[Document]:
    """The chart's objects."""
    arguments = [
        "template",
        "finetune-operator",
        str(CHART),
        "--namespace",
        SYSTEM,
        "--set",
        f"metrics.port={metrics_port()}",
    ]
    done = subprocess.run([str(built("hack/helm")), *arguments], capture_output=True, text=True, check=True)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def start(plane: Plane) -> float:
    """The moment at which the process was started."""
    deployment = next(document for document in rendered() if document["kind"] == "Deployment")
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    account = plane.directory / "account"
    account.mkdir(exist_ok=True)
    token = plane.kubectl("create", "token", "finetune-operator", "--namespace", SYSTEM, "--duration=24h")
    (account / "token").write_text(token)
    (account / "namespace").write_text(SYSTEM)
    (account / "ca.crt").write_bytes(plane.certificate.read_bytes())
    (plane.directory / "hosts").write_text(f"127.0.0.1 localhost\n{HOST} kubernetes.default.svc\n")
    command = [sys.executable, "-m", "finetune_operator", *arguments]
    environment = {"KUBERNETES_SERVICE_HOST": HOST, "KUBERNETES_SERVICE_PORT": "443"}
    now = time.time()
    enter = ["unshare", "--mount", "sh", "-e", "-c", ENTER, "enter", plane.directory]
    plane.start("operator", [*enter, *command], environment=environment)
    return now


def await_start(plane: Plane) -> None:
    wait_for("the operator serves its metrics", lambda: metric(plane, "finetune_queue_length") is not None)


def metric(plane: Plane, name: str) -> float | None:
    """The sum of a metric over its labels; None while nothing answers."""
    plane.check()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port()}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))
