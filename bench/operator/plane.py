"""A control plane of its own, without kubelets: etcd, API server, controller manager and scheduler, and kwok for nodes.

Everything listens on one address of the loopback, the API server on port 443 of it, so that an operator that runs on
this machine finds it where one in a cluster does. Nothing of it outlives the context.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bench.operator import stages
from bench.operator.api import Access, Api, ApiRefused, Document

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.65.0.1"
SERVER = f"https://{HOST}"
NODES = 4
NODE_ROOM = {"cpu": "8000", "memory": "64Ti", "pods": "8000", "nvidia.com/gpu": "2000"}
MASTERS = ("admin", "bench", "kwok", "controllers", "scheduler", "trainer", "jobset")
"""Users who may do anything. An operator of ours is none of them."""
SILENT = ("admin", "bench", "kwok", "system:apiserver")
"""Users whose requests are not counted."""
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "None", "users": list(SILENT)}, {"level": "Metadata"}],
}


def wait_for(what: str, check: Callable[[], bool], *, seconds: float = 90, every: float = 0.2) -> None:
    """Raises TimeoutError."""
    until = time.monotonic() + seconds
    while not check():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)


def built(script: str, *arguments: str) -> Path:
    """The last line that one of the scripts prints, which build what is not there: a path.

    Raises RuntimeError with what the script said last.
    """
    command = [str(ROOT / script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; {done.stdout[-2000:]}")
    return Path(done.stdout.strip().splitlines()[-1])


@cache
def kubectl() -> Path:
    return built("hack/kubectl")


@cache
def kubernetes() -> Path:
    return built("hack/cluster/build", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


@dataclass
class Plane:
    directory: Path
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    # --- who may talk to it ---

    @property
    def certificate(self) -> Path:
        return self.directory / "server.crt"

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    def access(self, user: str = "bench") -> Access:
        return Access(HOST, 443, self.certificate, f"token-of-{user}")

    def connect(self) -> Api:
        return self.access().connect()

    def kubeconfig(self, user: str) -> Path:
        path = self.directory / f"{user}.kubeconfig"
        cluster = {"server": SERVER, "certificate-authority": str(self.certificate)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "plane", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": self.access(user).token}}],
            "contexts": [{"name": "plane", "context": {"cluster": "plane", "user": user}}],
            "current-context": "plane",
        }
        path.write_text(yaml.safe_dump(document))
        return path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Raises RuntimeError with kubectl's words."""
        command = [str(kubectl()), "--kubeconfig", str(self.kubeconfig("admin")), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def apply(self, *documents: Document) -> None:
        self.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(documents))

    def namespace(self, name: str) -> None:
        """A new namespace, with its service account."""
        api = self.connect()
        api.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        wait_for(f"the service account of {name}", lambda: _there(api, account))

    # --- processes ---

    def start(self, name: str, command: Sequence[str | Path], *, environment: dict[str, str] | None = None) -> None:
        """In a process group of its own; its output goes into a log."""
        with open(self.directory / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def stop(self, *names: str) -> None:
        """SIGTERM to all of them, SIGKILL to what is left after 20 s."""
        for name in names:
            self.processes[name].terminate()
        until = time.monotonic() + 20
        for name in names:
            process = self.processes.pop(name)
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def check(self) -> None:
        """Raises RuntimeError when a process has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                end = (self.directory / f"{name}.log").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{end}")


def _there(api: Api, path: str) -> bool:
    try:
        api.call("GET", path)
    except ApiRefused as error:
        if error.code != 404:
            raise
        return False
    return True


@contextmanager
def plane(directory: Path) -> Iterator[Plane]:
    """A fresh control plane with nodes that are ready. Needs root, for port 443 and for what is mounted.

    Raises RuntimeError with the end of the log of what does not start.
    """
    if os.geteuid() != 0:
        raise SystemExit("the benchmark of the operator needs root, as make cluster-up does")
    directory.mkdir(parents=True)
    it = Plane(directory)
    try:
        _write_files(it)
        _start_server(it)
        _start_controllers(it)
        _start_kubelets(it)
        yield it
        it.check()
    finally:
        it.stop(*reversed(it.processes))


def _write_files(plane: Plane) -> None:
    key, here = plane.directory / "server.key", plane.directory
    names = f"subjectAltName=IP:{HOST},DNS:localhost,DNS:kubernetes.default.svc"
    self_signed = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]
    where = ["-keyout", str(key), "-out", str(plane.certificate), "-subj", "/CN=bench", "-addext", names]
    for command in ([*self_signed, *where], ["genrsa", "-out", str(here / "accounts.key"), "2048"]):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    tokens = [f'{plane.access(user).token},{user},{user},"system:masters"\n' for user in MASTERS]
    (here / "tokens.csv").write_text("".join(tokens))
    (here / "audit.json").write_text(json.dumps(AUDIT))
    (here / "kwok.yaml").write_text(stages.configuration())


def _start_server(plane: Plane) -> None:
    """etcd does not wait for the disk, which would measure the disk."""
    here, etcd, peer = plane.directory, f"http://{HOST}:2379", f"http://{HOST}:2380"
    store = ["--data-dir", here / "etcd", "--unsafe-no-fsync", "--log-level", "warn"]
    store += ["--listen-client-urls", etcd, "--advertise-client-urls", etcd]
    store += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    plane.start("etcd", [kubernetes() / "etcd", *store])
    flags = {
        "etcd-servers": etcd,
        "bind-address": HOST,
        "secure-port": "443",
        "advertise-address": "192.0.2.1",  # a loopback one is refused; nobody uses it
        "endpoint-reconciler-type": "none",
        "service-cluster-ip-range": "10.250.0.0/16",
        "tls-cert-file": plane.certificate,
        "tls-private-key-file": here / "server.key",
        "token-auth-file": here / "tokens.csv",
        "authorization-mode": "RBAC",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": here / "accounts.key",
        "service-account-signing-key-file": here / "accounts.key",
        "audit-policy-file": here / "audit.json",
        "audit-log-path": plane.audit_log,
        "audit-log-mode": "batch",
        "audit-log-batch-max-wait": "1s",
        "audit-log-maxsize": "100000",
    }
    plane.start("kube-apiserver", [kubernetes() / "kube-apiserver", *_flags(flags)])
    wait_for("the API server is ready", lambda: _ready(plane))


def _ready(plane: Plane) -> bool:
    plane.check()
    try:
        plane.kubectl("get", "--raw", "/readyz")
    except RuntimeError:
        return False
    return True


def _start_controllers(plane: Plane) -> None:
    """Their own 20 and 50 requests a second would hide the operator."""
    common = {"leader-elect": "false", "bind-address": HOST, "kube-api-qps": "1000", "kube-api-burst": "2000"}
    manager = {
        "kubeconfig": plane.kubeconfig("controllers"),
        "secure-port": "10257",
        "concurrent-job-syncs": "20",
        "service-account-private-key-file": plane.directory / "accounts.key",
        "root-ca-file": plane.certificate,
    }
    scheduler = {"kubeconfig": plane.kubeconfig("scheduler"), "secure-port": "10259"}
    certificates = {"cert-dir": plane.directory / "certs"}
    for name, flags in (("kube-controller-manager", manager), ("kube-scheduler", scheduler)):
        plane.start(name, [kubernetes() / name, *_flags({**common, **certificates, **flags})])


def _start_kubelets(plane: Plane) -> None:
    program = built("bench/operator/build", "kwok") / "kwok"
    config = plane.directory / "kwok.yaml"
    plane.start("kwok", [program, "--kubeconfig", plane.kubeconfig("kwok"), "--config", config])
    api = plane.connect()
    for number in range(NODES):
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"node-{number}"}}
        api.call("POST", "/api/v1/nodes", {**node, "status": {"capacity": NODE_ROOM, "allocatable": NODE_ROOM}})
    wait_for("the nodes are ready", lambda: _all_ready(plane, api))


def _all_ready(plane: Plane, api: Api) -> bool:
    plane.check()
    nodes = [node for node in api.call("GET", "/api/v1/nodes")["items"] if not node["spec"].get("taints")]
    conditions = [one for node in nodes for one in node["status"].get("conditions") or []]
    return sum(one["type"] == "Ready" and one["status"] == "True" for one in conditions) == NODES


def _flags(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


@contextmanager
def trainers(plane: Plane, seconds: float) -> Iterator[Callable[[], int]]:
    """All trainers; the call tells how many questions they have answered."""
    log = plane.directory / "trainers.log"
    log.unlink(missing_ok=True)
    plane.start("trainers", [sys.executable, "-m", "bench.operator.trainers", str(seconds)])

    def answers() -> int:
        plane.check()
        numbers = log.read_text().split()
        return int(numbers[-1]) if numbers else -1

    try:
        wait_for("the trainers listen", lambda: answers() >= 0)
        yield answers
    finally:
        plane.stop("trainers")
