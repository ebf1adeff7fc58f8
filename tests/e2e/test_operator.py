"""The operator on a real control plane of its own (etcd, API server, controllers), with this test as the kubelet.

No node exists there: the test binds pods, lets them run and ends them with the exit codes and messages that a case
asks for. So everything that a trainer could do is shown in seconds, and the operator can be killed at any moment.
"""

import http.client
import json
import os
import random
import re
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from math import inf
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e import forked
from tests.e2e.api import Api
from tests.e2e.goldens import becomes, masked_text, same
from tests.ports import free_port
from tests.unit.documents import LIVES

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "admin-of-a-throw-away-control-plane"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
CONTROLLERS = (
    "job-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "resourcequota-controller",
    "ttl-after-finished-controller",
)
OPERATORS = ("one", "two")
JOBS = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
Document = dict[str, Any]


@cache
def binaries() -> Path:
    """Where etcd and Kubernetes are: in the cache, after what it lacks came from envtest or was built (minutes)."""
    command = [ROOT / "hack/cluster/build", "etcd", "kube-apiserver", "kube-controller-manager"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def eventually(what: str, check: Callable[[], Any], *, seconds: float = 40) -> Any:
    """The first true answer of `check`."""
    until = time.monotonic() + seconds
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.1)


# --- the control plane ---


class Plane:
    """etcd, kube-apiserver and kube-controller-manager on the loopback. AlwaysAllow: rights are test_rights.py's."""

    def __init__(
        self,
        directory: Path,
        *,
        audit: Sequence[Document] = (),
        server: Sequence[str] = (),
        users: Sequence[str] = (),
        authorization: str = "AlwaysAllow",
    ) -> None:
        """`audit`: more rules of the audit policy; `server`: more arguments of the API server; `users`: operators that
        are no masters, which API priority and fairness lets pass whatever there is."""
        self.directory = directory
        self._audit = audit
        self._server = server
        self._users = users
        self._authorization = authorization
        self.port = free_port()
        self.kubeconfig = directory / "kubeconfig"
        self._commands: dict[str, list[str]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_files()
        self._api = Api(self.kubeconfig)
        self._start_all()

    def _write_files(self) -> None:
        users = [(TOKEN, "admin"), *((f"{TOKEN}-{name}", f"operator-{name}") for name in OPERATORS)]
        lines = (f"{token},{user},{user},system:masters\n" for token, user in users)
        others = (f"{TOKEN}-{name},operator-{name},operator-{name}\n" for name in self._users)
        (self.directory / "tokens.csv").write_text("".join((*lines, *others)))
        rule = {"level": "Metadata", "users": [user for _, user in users[1:]], "verbs": ["create", "update", "delete"]}
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [*self._audit, rule, {"level": "None"}]}
        (self.directory / "audit.yaml").write_text(yaml.safe_dump({**policy, "omitStages": ["RequestReceived"]}))
        key = str(self.directory / "sa.key")
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        self._write_kubeconfig(self.kubeconfig, TOKEN)
        for name in (*OPERATORS, *self._users):
            self._write_kubeconfig(self.kubeconfig_of(name), f"{TOKEN}-{name}")

    def kubeconfig_of(self, operator: str) -> Path:
        """Of a user of its own: the audit log tells who has written what."""
        return self.directory / f"kubeconfig-{operator}"

    def _write_kubeconfig(self, path: Path, token: str) -> None:
        server = {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "plane", "cluster": server}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "plane", "context": {"cluster": "plane", "user": "user"}}],
            "current-context": "plane",
        }
        path.write_text(yaml.safe_dump(document))

    def _start_all(self) -> None:
        etcd = f"http://127.0.0.1:{free_port()}"
        peer = f"http://127.0.0.1:{free_port()}"
        self._start(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--log-level=warn",
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--cert-dir={self.directory / 'certs'}",
            "--service-cluster-ip-range=10.96.0.0/24",
            f"--authorization-mode={self._authorization}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            f"--audit-policy-file={self.directory / 'audit.yaml'}",
            f"--audit-log-path={self.directory / 'audit.log'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.directory / 'sa.key'}",
            f"--service-account-signing-key-file={self.directory / 'sa.key'}",
            "--disable-admission-plugins=ServiceAccount",
            *self._server,
        )
        eventually("the API server is ready", self.ready, seconds=90)
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--controllers={','.join(CONTROLLERS)}",
            "--leader-elect=false",
            "--kube-api-qps=500",
            "--kube-api-burst=500",
            f"--secure-port={free_port()}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={self.directory / 'kcm'}",
        )

    def _start(self, name: str, *arguments: str) -> None:
        self._commands[name] = [str(binaries() / name), *arguments]
        self.start(name)

    def start(self, name: str) -> None:
        """A part of the control plane, by the name of its program, as it was started first."""
        with open(self.directory / f"{name}.log", "ab") as log:
            command = self._commands[name]
            self._processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def ready(self) -> bool:
        try:
            self.text("/readyz")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def stop(self) -> None:
        for name in reversed(self._processes):
            self.kill(name)

    def writes(self, operator: str) -> list[Document]:
        """What this operator has changed, oldest first, without what was refused and without the Lease."""
        entries = [json.loads(line) for line in (self.directory / "audit.log").read_text().splitlines()]
        mine = [entry for entry in entries if entry["user"]["username"] == f"operator-{operator}"]
        done = [entry for entry in mine if entry["responseStatus"]["code"] < 300]
        done = [entry for entry in done if entry["objectRef"]["resource"] != "leases"]
        return sorted(done, key=lambda entry: str(entry["requestReceivedTimestamp"]))

    def text(self, path: str, *, method: str = "GET", body: Any = None, kind: str = "application/json") -> str:
        return self._api.text(path, method=method, body=body, kind=kind)

    def get(self, path: str) -> Document:
        return self._api.get(path)

    def items(self, path: str) -> list[Document]:
        return list(self.get(path)["items"])

    def create(self, path: str, document: Document) -> Document:
        return dict(json.loads(self.text(path, method="POST", body=document)))

    def patch(self, path: str, document: Document) -> Document:
        return dict(json.loads(self.text(path, method="PATCH", body=document, kind="application/merge-patch+json")))

    def delete(self, path: str, *, grace: int | None = None) -> None:
        options: Document = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        try:
            self.text(path, method="DELETE", body=options)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise


@contextmanager
def a_plane(directory: Path) -> Iterator[Plane]:
    """With our resources."""
    binaries()
    running = Plane(directory)
    try:
        install(running)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with a_plane(tmp_path_factory.mktemp("plane")) as running:
        yield running


def install(plane: Plane) -> None:
    """Our resources, and a profile without a word."""
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        plane.create(CRDS, yaml.safe_load(path.read_text()))
    eventually("the resources are served", lambda: _served(plane))
    add_profile(plane, "default")


def add_profile(plane: Plane, name: str, **spec: Any) -> None:
    meta = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneProfile", "metadata": {"name": name}}
    plane.create("/apis/finetune.dev/v1alpha1/finetuneprofiles", {**meta, "spec": spec})


def _served(plane: Plane) -> bool:
    try:
        plane.items("/apis/finetune.dev/v1alpha1/finetuneprofiles")
        plane.items(JOBS.format("default"))
    except urllib.error.HTTPError:
        return False
    return True


# --- the kubelet: this test ---

RESULT = {
    "finalStep": 100,
    "totalSteps": 100,
    "finalLoss": 0.25,
    "evaluation": {"on": "test", "rows": 9, "trivial": {"f1": 0.1}, "probe": {"f1": 0.7}, "tuned": {"f1": 0.9}},
    "model": {"uri": "s3://models/out/model", "digest": "sha256:1", "sizeBytes": 7},
}


@dataclass(frozen=True)
class Ends:
    """How a pod ends: exit code, last message, and after how many seconds."""

    code: int
    message: Document | None = None
    after: float = 0.3


def passes(state: str = "Fresh", run: str = "a" * 16, *, inputs: str | None = None, **fields: Any) -> Ends:
    outcome = {"state": state, "runId": run, "inputs": inputs, "step": None, "summary": {"labels": 2}}
    result = {"result": RESULT} if state == "Reused" else {}
    return Ends(0, {"code": 0, "reason": state, "message": "fine", "preflight": outcome, **result}, **fields)


def trained(run: str = "a" * 16, **fields: Any) -> Ends:
    return Ends(0, {"code": 0, "reason": "Trained", "message": "done", "runId": run, "result": RESULT}, **fields)


def fails(code: int, reason: str) -> Ends:
    return Ends(code, {"code": code, "reason": reason, "message": f"{reason}, says the pod"})


Script = Callable[[str, int], Ends | None]
"""From role and ordinal of the Job to how its pod ends; None: it runs on."""


def ordinary(role: str, ordinal: int) -> Ends | None:
    return passes() if role == "preflight" else trained()


class Kubelet(threading.Thread):
    """Binds, runs and ends the pods of one namespace as the script says; remembers every Job it saw a pod of."""

    def __init__(self, plane: Plane, namespace: str) -> None:
        super().__init__(daemon=True)
        self.plane = plane
        self.namespace = namespace
        self.scripts: dict[str, Script] = {}
        self.seen: dict[str, tuple[str, str]] = {}
        """By Job UID: name of the Job and of the FineTuneJob."""
        self.begun: dict[str, str | None] = {}
        """By UID of a preflight Job, the oldest first: the run that its pod is told of."""
        self.reads: dict[str, str | None] = {}
        """By FineTuneJob and Job, such as one-t1: what its pod is told to read."""
        self.room: int | None = None
        """Pods that have a node at a time, if not all may."""
        self.commits = False
        """Whether pods that are asked to end still commit a checkpoint, and go on for so long."""
        self.address = "127.0.0.9"
        """Of every pod. An API server passes nothing on to the loopback: nobody answers there."""
        self._since: dict[str, float] = {}
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        while not self._over.wait(0.1):
            try:
                pods = self.plane.items(path)
                placed = sum("nodeName" in pod["spec"] and not _is_over(pod) for pod in pods)
                for pod in pods:
                    waits = "nodeName" not in pod["spec"] and "deletionTimestamp" not in pod["metadata"]
                    if waits and self.room is not None and placed >= self.room:
                        continue
                    placed += waits
                    self._tend(f"{path}/{pod['metadata']['name']}", pod)
            except urllib.error.HTTPError as error:
                if error.code not in (404, 409, 429) and error.code < 500:  # the next round sees what has changed
                    raise
            except (OSError, http.client.HTTPException):
                continue  # the API server is away

    def close(self) -> None:
        self._over.set()
        self.join()

    def jobs_of(self, name: str) -> list[str]:
        """Names of all Jobs that ever had a pod, without the prefix, one for each UID."""
        return sorted(job.rsplit("-", 1)[1] for job, owner in list(self.seen.values()) if owner == name)

    def _tend(self, path: str, pod: Document) -> None:
        meta, labels = pod["metadata"], pod["metadata"]["labels"]
        job = meta["ownerReferences"][0]
        name, _, tail = job["name"].rpartition("-")
        owner = name.rpartition("-")[0]
        self.seen[job["uid"]] = (job["name"], owner)
        environment = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        self.reads[f"{owner}-{tail}"] = environment.get("FINETUNE_INPUTS")
        if labels["finetune.dev/role"] == "preflight":
            self.begun[job["uid"]] = environment.get("FINETUNE_RUN")
        phase = pod["status"].get("phase")
        if "deletionTimestamp" in meta:
            if phase == "Running" and self.commits:
                return None
            if phase == "Running":
                self._end(path, pod, Ends(45))
            return self.plane.delete(path, grace=0)
        if phase in ("Succeeded", "Failed"):
            return None
        if "nodeName" not in pod["spec"]:
            target = {"apiVersion": "v1", "kind": "Node", "name": "node0"}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": meta["name"]}, "target": target}
            self.plane.create(f"{path}/binding", binding)
            return None
        if phase == "Pending":
            self._since[meta["uid"]] = time.monotonic()
            return self._status(path, pod, "Running", {"running": {}})
        ends = self.scripts.get(owner, ordinary)(labels["finetune.dev/role"], int(tail[1:]))
        if ends is not None and time.monotonic() - self._since.get(meta["uid"], 0) >= ends.after:
            self._end(path, pod, ends)
        return None

    def _end(self, path: str, pod: Document, ends: Ends) -> None:
        terminated = {"exitCode": ends.code, "reason": "Completed" if ends.code == 0 else "Error"}
        terminated["finishedAt"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if ends.message is not None:
            terminated["message"] = json.dumps(ends.message)
        self._status(path, pod, "Succeeded" if ends.code == 0 else "Failed", {"terminated": terminated})

    def _status(self, path: str, pod: Document, phase: str, state: Document) -> None:
        runs = "running" in state
        name = pod["spec"]["containers"][0]["name"]
        container = {"name": name, "image": "i", "imageID": "", "restartCount": 0, "ready": runs, "state": state}
        ready = {"type": "Ready", "status": str(runs)}
        others = [c for c in pod["status"].get("conditions", []) if c["type"] == "DisruptionTarget"]
        conditions = [*others, ready]
        status = {"phase": phase, "containerStatuses": [container], "conditions": conditions, "podIP": self.address}
        if runs:
            status["startTime"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.plane.patch(f"{path}/status", {"status": status})


def _is_over(pod: Document) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


# --- the operator: a process ---


@dataclass
class Operator:
    """finetune-operator --kubeconfig ... as a process that may be killed and started again."""

    plane: Plane
    namespaces: list[str]
    log: Path
    kubeconfig: Path | None = None
    lease: str | None = None
    cold: bool = False
    port: int = field(default_factory=free_port)
    process: BaseProcess | None = None
    version: str = "1"
    """Of the images that it gives to pods."""
    program: Sequence[str] = ("-m", "finetune_operator")
    """What Python runs, where it starts cold."""
    more: Sequence[str] = ()
    """Further arguments."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further variables."""

    def start(self) -> None:
        kubeconfig = self.kubeconfig or self.plane.kubeconfig
        arguments = ["--kubeconfig", str(kubeconfig), "--metrics-port", str(self.port)]
        arguments += ["--lease", self.lease] if self.lease else []
        arguments += ["--trainer-image", f"trainer:{self.version}", "--preflight-image", f"preflight:{self.version}"]
        arguments += self.more
        for namespace in self.namespaces:
            arguments += ["--namespace", namespace]
        cold = self.program if self.cold else None
        self.process = forked.operator(arguments, self.log, cold=cold, environment=self.environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self, *, seconds: float = 15) -> int:
        """The exit code."""
        assert self.process is not None
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it runs after {seconds} s"
        return self.process.exitcode

    def leads(self) -> bool:
        return "finetune_operator_leader 1.0" in (self.page("/metrics") or "")

    def follows(self) -> bool:
        """It is ready, with all it has to know, and does not lead."""
        return self.page("/readyz") == "ok\n" and "finetune_operator_leader 0.0" in (self.page("/metrics") or "")

    def counted(self, metric: str, **labels: str) -> float:
        """The sum of a counter's samples that have these labels."""
        lines = [line for line in (self.page("/metrics") or "").splitlines() if line.startswith(metric)]
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(text in line for text in wanted))

    def page(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:
            return None


@dataclass
class Place:
    """A namespace of its own with a kubelet and an operator."""

    plane: Plane
    name: str
    kubelet: Kubelet
    operator: Operator

    def path(self, job: str) -> str:
        return f"{JOBS.format(self.name)}/{job}"

    def apply(self, name: str, script: Script = ordinary, **spec: Any) -> Document:
        self.kubelet.scripts[name] = script
        document = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": {
                "task": {"type": "text-classification"},
                "model": {"uri": "s3://models/base"},
                "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
                "output": {"uri": f"s3://models/{name}"},
                **spec,
            },
        }
        return self.plane.create(JOBS.format(self.name), document)

    def get(self, job: str) -> Document:
        return self.plane.get(self.path(job))

    def status(self, job: str) -> Document:
        return dict(self.get(job).get("status", {}))

    def reaches(self, job: str, phase: str, reason: str | None = None, *, seconds: float = 40) -> Document:
        """The status once phase and reason are there."""

        def there() -> Document | None:
            status = self.status(job)
            fits = status.get("phase") == phase and reason in (None, condition(status, "Succeeded").get("reason"))
            return status if fits else None

        try:
            return dict(eventually(f"{job}: {phase} {reason}", there, seconds=seconds))
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {json.dumps(self.status(job))}\n{self.log()}") from None

    def log(self) -> str:
        return self.operator.log.read_text()[-3000:]

    def children(self, kind: str) -> list[str]:
        prefix = {"jobs": "/apis/batch/v1", "pods": "/api/v1", "configmaps": "/api/v1", "services": "/api/v1"}[kind]
        found = self.plane.items(f"{prefix}/namespaces/{self.name}/{kind}")
        return sorted(item["metadata"]["name"] for item in found if item["metadata"]["name"] != "kube-root-ca.crt")


def condition(status: Document, kind: str) -> Document:
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


_number = iter(range(1000))


@pytest.fixture
def place(plane: Plane, tmp_path: Path) -> Iterator[Place]:
    with a_place(plane, tmp_path) as made:
        yield made


@contextmanager
def a_place(
    plane: Plane,
    directory: Path,
    *,
    kubeconfig: Path | None = None,
    node: type[Kubelet] = Kubelet,
    more: tuple[str, ...] = (),
    **fields: Any,
) -> Iterator[Place]:
    """Its operator logs to `directory`; the rest is Operator's."""
    name = f"place-{next(_number)}"
    plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    kubelet = node(plane, name)
    operator = Operator(plane, [name], directory / "operator.log", kubeconfig, more=more, **fields)
    operator.start()
    try:
        yield Place(plane, name, kubelet, operator)
    finally:
        operator.kill()
        kubelet.close()


@pytest.fixture
def pair(plane: Plane, tmp_path: Path) -> Iterator[tuple[Place, Operator]]:
    """A place whose operator leads, and a second one that follows it."""
    name = f"place-{next(_number)}"
    plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    one, two = (
        Operator(plane, [name], tmp_path / f"{who}.log", plane.kubeconfig_of(who), lease=f"{name}/operator", cold=True)
        for who in OPERATORS
    )
    kubelet = Kubelet(plane, name)
    try:
        one.start()
        eventually("the first one leads", one.leads)
        two.start()
        eventually("the second one follows", two.follows)
        yield Place(plane, name, kubelet, one), two
    finally:
        one.kill()
        two.kill()
        kubelet.close()


Fact = Callable[[Place], None]


class Beside:
    """Facts that take most of a minute to wait for: they begin with the module's first test, each in a place of its
    own."""

    def __init__(self, plane: Plane, directory: Path, facts: Sequence[Fact]) -> None:
        self._plane, self._directory = plane, directory
        self._threads = ThreadPoolExecutor(max(1, len(facts)))
        self._futures = {fact: self._threads.submit(self._run, fact) for fact in facts}

    def _run(self, fact: Fact) -> None:
        directory = self._directory / fact.__name__
        directory.mkdir()
        with a_place(self._plane, directory) as place:
            fact(place)

    def shows(self, fact: Fact) -> None:
        """Waits for it. Raises what it raises."""
        self._futures[fact].result()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


@pytest.fixture(scope="module", autouse=True)
def beside(request: pytest.FixtureRequest, plane: Plane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    facts = [fact for fact in LONG_WAITS if {"fact": fact} in asked]
    running = Beside(plane, tmp_path_factory.mktemp("beside"), facts)
    yield running
    running.close()


# --- facts ---


def test_a_job_goes_by_preflight_and_training_to_success(place: Place) -> None:
    made = place.apply("one")
    status = place.reaches("one", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Accepted": "True",
        "PreflightPassed": "True",
        "Evaluated": "True",
        "Succeeded": "True",
        "Suspended": "False",
        "Reconciling": "False",
        "Stalled": "False",
    }
    assert status["model"] == RESULT["model"]
    assert status["message"] == "f1 0.900 on test (trivial 0.100, probe 0.700)"
    assert status["run"]["id"] == "a" * 16
    assert status["usage"]["attempts"] == 1
    meta = place.get("one")["metadata"]
    assert meta["uid"] == made["metadata"]["uid"]
    assert not meta.get("annotations")
    assert not meta.get("finalizers")


def test_children_belong_to_the_job_and_the_pinned_run_cannot_be_changed(place: Place) -> None:
    uid = place.apply("one", lambda role, ordinal: passes() if role == "preflight" else None)["metadata"]["uid"]
    place.reaches("one", "Starting")
    jobs = place.plane.items(f"/apis/batch/v1/namespaces/{place.name}/jobs")
    configs = place.plane.items(f"/api/v1/namespaces/{place.name}/configmaps")
    for child in (*jobs, *(c for c in configs if "finetune.dev/job-uid" in c["metadata"].get("labels", {}))):
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, False)
    pinned = next(c for c in configs if c["metadata"]["name"] == f"one-{uid[:5]}-g1")
    assert pinned["immutable"] is True
    assert json.loads(pinned["data"]["config.json"])["generation"] == 1


def test_what_somebody_makes_in_another_namespace_decides_nothing(place: Place) -> None:
    """The API server takes any owner and any label from who may create objects there."""
    plane, other = place.plane, f"{place.name}-other"
    plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    place.operator.kill()
    place.operator.namespaces.append(other)
    place.operator.start()
    script: Script = lambda role, ordinal: passes() if role == "preflight" else None  # noqa: E731
    uid = place.apply("one", script, suspend=True)["metadata"]["uid"]
    configs, jobs, pods = (
        "/api/v1/namespaces/{}/configmaps",
        "/apis/batch/v1/namespaces/{}/jobs",
        "/api/v1/namespaces/{}/pods",
    )
    first = eventually("it is pinned", lambda: _named(plane.items(configs.format(place.name)), f"one-{uid[:5]}-g1"))
    config = json.loads(first["data"]["config.json"]) | {"generation": 2}
    config["pods"] |= {"trainerImage": "evil", "preflightImage": "evil"}
    container = {"containers": [{"name": "trainer", "image": "evil"}], "restartPolicy": "Never"}
    # Of a kind that nobody serves, or held by the finalizer, they are not collected.
    for owner in ({"apiVersion": "x/v1", "kind": "Nope"}, {}):
        forged = _forged(first, **owner)
        forged["metadata"]["labels"]["finetune.dev/generation"] = "2"
        plane.create(configs.format(other), {**forged, "data": {"config.json": json.dumps(config)}})
        forged["metadata"]["labels"] |= {"finetune.dev/role": "train", "finetune.dev/run": "a" * 16}
        forged["metadata"]["annotations"] |= {"finetune.dev/ordinal": "99"}
        job = {"suspend": True, "template": {"spec": container}}
        plane.create(jobs.format(other), {**forged, "apiVersion": "batch/v1", "kind": "Job", "spec": job})
    plane.patch(place.path("one"), {"spec": {"suspend": False}})
    place.reaches("one", "Starting")
    forged = _forged(plane.items(pods.format(place.name))[-1])
    plane.create(pods.format(other), {**forged, "apiVersion": "v1", "kind": "Pod", "spec": container})
    ended = {"exitCode": 0, "message": json.dumps(trained().message)}
    state = {"name": "trainer", "image": "evil", "imageID": "", "restartCount": 0, "ready": False}
    status = {"phase": "Succeeded", "containerStatuses": [{**state, "state": {"terminated": ended}}]}
    plane.patch(f"{pods.format(other)}/{forged['metadata']['name']}/status", {"status": status})
    time.sleep(3)
    assert (place.status("one")["phase"], place.status("one")["usage"]["attempts"]) == ("Starting", 1)
    assert place.children("jobs") == [f"one-{uid[:5]}-p1", f"one-{uid[:5]}-t1"]
    templates = [job["spec"]["template"]["spec"] for job in plane.items(jobs.format(place.name))]
    assert {one["image"] for template in templates for one in template["containers"]} == {"preflight:1", "trainer:1"}


def _forged(like: Document, **owner: str) -> Document:
    """The metadata of an object that somebody makes like one of ours."""
    meta = like["metadata"]
    references = [{**reference, **owner} for reference in meta["ownerReferences"]]
    name, labels, notes = f"forged-{next(_number)}", dict(meta["labels"]), dict(meta["annotations"])
    kept = {"ownerReferences": references, "finalizers": ["example.com/stays"]}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels, "annotations": notes, **kept},
    }


def _named(items: Sequence[Document], name: str) -> Document:
    """The one of that name, or an empty one."""
    return next((item for item in items if item["metadata"]["name"] == name), {})


def test_a_job_that_goes_as_it_should_has_one_event_its_end(place: Place) -> None:
    place.apply("one")
    place.reaches("one", "Succeeded")

    def reasons() -> list[str]:
        events = place.plane.items(f"/api/v1/namespaces/{place.name}/events")
        return [e["reason"] for e in events if e["involvedObject"]["kind"] == "FineTuneJob"]

    eventually("the last event is there", lambda: "Trained" in reasons())
    assert reasons() == ["Trained"]


def test_wrong_data_is_final_and_no_train_pod_is_made(place: Place) -> None:
    place.apply("one", lambda role, ordinal: fails(42, "ColumnMissing"))
    status = place.reaches("one", "Failed", "ColumnMissing")
    assert condition(status, "PreflightPassed")["status"] == "False"
    assert condition(status, "Succeeded")["status"] == "False"
    assert status["message"] == "ColumnMissing, says the pod"
    assert place.kubelet.jobs_of("one") == ["p1"]


def test_a_retry_annotation_brings_a_failure_back_once(place: Place) -> None:
    mended = threading.Event()
    place.apply("one", lambda role, ordinal: ordinary(role, ordinal) if mended.is_set() else fails(42, "ColumnMissing"))
    place.reaches("one", "Failed")
    mended.set()
    place.plane.patch(place.path("one"), {"metadata": {"annotations": {"finetune.dev/retry": "now"}}})
    job = becomes(place, "one", "succeeded-retried", "Succeeded", "Trained")
    assert job["status"]["lastHandledRetry"] == "now"
    assert [*place.kubelet.begun.values()] == [None, None], "what was refused is no run: its rows are read again"


def test_storage_that_is_not_there_is_waited_for_and_the_job_recovers(place: Place) -> None:
    place.apply(
        "one",
        lambda role, ordinal: fails(49, "BucketNotFound") if (role, ordinal) == ("preflight", 1) else ordinary(role, 0),
    )
    becomes(place, "one", "pending-bucket", "Pending", "BucketNotFound")
    becomes(place, "one", "succeeded", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("one") == ["p1", "p2", "t1"]


@contextmanager
def a_program_that_deletes(place: Place, role: str, *, failed: bool = False) -> Iterator[set[str]]:
    """Every Job of this role as soon as it is there, or a second after it has `failed`. Yields what it has deleted."""
    jobs = f"/apis/batch/v1/namespaces/{place.name}/jobs"
    deleted: set[str] = set()
    since: dict[str, float] = {}
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.05):
            for job in place.plane.items(jobs):
                uid, conditions = job["metadata"]["uid"], (job.get("status") or {}).get("conditions") or []
                if job["metadata"]["labels"]["finetune.dev/role"] != role:
                    continue
                if failed and any(one["type"] == "Failed" for one in conditions):
                    since.setdefault(uid, time.monotonic())
                if not failed or time.monotonic() - since.get(uid, inf) > 1:
                    deleted.add(uid)
                    place.plane.delete(f"{jobs}/{job['metadata']['name']}")

    program = threading.Thread(target=run, daemon=True)
    program.start()
    try:
        yield deleted
    finally:
        ended.set()
        program.join()


def test_a_program_that_deletes_every_preflight_job_is_told_and_not_raced_with(place: Place) -> None:
    with a_program_that_deletes(place, "preflight") as deleted:
        place.apply("one", lambda role, ordinal: None)
        eventually("it has deleted one", lambda: deleted)
        began = time.monotonic()
        # The operator has just started: a watch that begins only now has missed it, and the list of each minute finds
        # it.
        job = becomes(place, "one", "preflight-job-lost", "Preflight", "PreflightJobLost", seconds=75)
        time.sleep(max(0.0, began + 4 - time.monotonic()))
        assert len(deleted) == 1, "the first delay is 5 s at least"
    assert job["status"]["preflightJob"]["nextAt"] in job["status"]["message"]
    place.kubelet.scripts["one"] = ordinary
    becomes(place, "one", "succeeded", "Succeeded", "Trained")


def test_a_program_that_deletes_every_train_job_is_told_and_not_raced_with(place: Place) -> None:
    with a_program_that_deletes(place, "train") as deleted:
        place.apply("one", lambda role, ordinal: passes() if role == "preflight" else None)
        time.sleep(20)
    assert 1 <= len(deleted) <= 4, "the third rests for 5 s, the next for 10 s"
    eventually("it is told", lambda: len(place.status("one").get("restarts") or []) == len(deleted))
    assert {restart["reason"] for restart in place.status("one")["restarts"]} == {"JobLost"}
    place.kubelet.scripts["one"] = ordinary
    place.reaches("one", "Succeeded", seconds=75)


def test_a_program_that_deletes_every_failed_train_job_makes_no_crash_forgotten(place: Place) -> None:
    with a_program_that_deletes(place, "train", failed=True) as deleted:
        script = {"preflight": passes(), "train": Ends(1)}
        place.apply("one", lambda role, ordinal: script[role], retries={"max": 1})
        eventually("it has deleted one", lambda: deleted)
        status = place.reaches("one", "Starting", "Crashed")
        assert status["message"].endswith(f"at {status['run']['nextAt']}")
        status = place.reaches("one", "Failed", "Crashed")
    assert place.kubelet.jobs_of("one") == ["p1", "p2", "t1", "t2"]
    assert (status["run"]["failures"], len(status["restarts"])) == (2, 2)


def test_a_train_job_that_is_deleted_a_second_time_is_asked_of_storage_after_a_rest(place: Place) -> None:
    place.apply("one", lambda role, ordinal: ordinary(role, ordinal) if role == "preflight" or ordinal == 3 else None)
    for attempt in ("t1", "t2"):
        eventually(f"{attempt} has a pod", lambda attempt=attempt: attempt in place.kubelet.jobs_of("one"))
        place.reaches("one", "Starting", "Loading")
        (job,) = [job for job in place.children("jobs") if job.endswith(attempt)]
        place.plane.delete(f"/apis/batch/v1/namespaces/{place.name}/jobs/{job}")
    becomes(place, "one", "again-job-deleted-waits", "Preflight", "JobLost")
    becomes(place, "one", "succeeded-job-deleted-twice", "Succeeded", "Trained")


def test_a_missing_profile_is_waited_for(place: Place) -> None:
    name = f"later-{place.name}"
    place.apply("one", profile=name)
    place.reaches("one", "Pending", "ProfileNotFound")
    add_profile(place.plane, name, resources={"perNode": {"gpus": 0}})
    becomes(place, "one", "succeeded", "Succeeded", "Trained")


def test_a_crash_is_tried_again_and_told(place: Place) -> None:
    place.apply("one", lambda role, ordinal: Ends(137) if (role, ordinal) == ("train", 1) else ordinary(role, ordinal))
    becomes(place, "one", "succeeded-killed", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("one") == ["p1", "t1", "t2"]


def test_a_deleted_pod_is_free(place: Place) -> None:
    place.apply(
        "one",
        lambda role, ordinal: None if (role, ordinal) == ("train", 1) else ordinary(role, ordinal),
        retries={"max": 0},
    )
    place.reaches("one", "Starting", "Loading")
    pod = next(pod for pod in place.children("pods") if "-t1-" in pod)
    place.plane.delete(f"/api/v1/namespaces/{place.name}/pods/{pod}")
    becomes(place, "one", "succeeded-pod-deleted", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("one") == ["p1", "t1", "t2"]


def test_a_result_whose_job_was_deleted_while_the_operator_was_down_is_found(place: Place) -> None:
    gone = threading.Event()
    place.apply(
        "one",
        lambda role, ordinal: (passes("Reused") if gone.is_set() else passes()) if role == "preflight" else None,
    )
    place.reaches("one", "Starting", "Loading")
    place.operator.kill()
    gone.set()
    (job,) = (job for job in place.children("jobs") if job.endswith("-t1"))
    place.plane.delete(f"/apis/batch/v1/namespaces/{place.name}/jobs/{job}")
    place.operator.start()
    becomes(place, "one", "reused-job-deleted", "Succeeded", "Reused")
    assert place.kubelet.jobs_of("one") == ["p1", "p2", "t1"]


def test_of_twins_one_trains_and_the_other_reuses(place: Place) -> None:
    done = threading.Event()

    def script(role: str, ordinal: int) -> Ends | None:
        if role == "preflight":
            return passes("Reused") if done.is_set() else passes()
        return trained() if done.is_set() else None

    same = {"uri": "s3://models/same"}
    place.apply("one", script, output=same)
    place.reaches("one", "Starting", "Loading")
    place.apply("two", script, output=same)
    waiting = place.reaches("two", "Pending", "IdenticalRunInProgress")
    assert f"{place.name}/one" in waiting["message"]
    done.set()
    becomes(place, "one", "succeeded", "Succeeded", "Trained")
    becomes(place, "two", "reused", "Succeeded", "Reused")
    assert place.kubelet.jobs_of("two") == ["p1", "p1"]


def test_when_the_owner_of_a_run_goes_its_twin_takes_over(place: Place) -> None:
    gone = threading.Event()

    def script(role: str, ordinal: int) -> Ends | None:
        return passes() if role == "preflight" else (trained() if gone.is_set() else None)

    same = {"uri": "s3://models/same"}
    place.apply("one", script, output=same)
    place.reaches("one", "Starting", "Loading")
    place.apply("two", script, output=same)
    place.reaches("two", "Pending", "IdenticalRunInProgress")
    gone.set()
    place.plane.delete(place.path("one"))
    becomes(place, "two", "succeeded", "Succeeded", "Trained")


def test_one_that_is_deleted_and_applied_again_goes_on_from_the_last_checkpoint_of_the_one_before(place: Place) -> None:
    gone = threading.Event()

    def script(role: str, ordinal: int) -> Ends | None:
        return passes() if role == "preflight" else (trained() if gone.is_set() else None)

    place.kubelet.commits = True
    first = place.apply("one", script)["metadata"]["uid"]
    place.reaches("one", "Starting", "Loading")
    place.plane.delete(place.path("one"))
    second = place.apply("one", script)["metadata"]["uid"]
    becomes(place, "one", "pending-deleted", "Pending", "IdenticalRunInProgress")
    assert [job for job in place.children("jobs") if "-t" in job] in ([], [f"one-{first[:5]}-t1"])
    gone.set()
    place.kubelet.commits = False
    becomes(place, "one", "succeeded", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("one") == ["p1", "p1", "p1", "t1", "t1"]
    assert f"one-{second[:5]}-t1" in place.children("jobs")


def test_a_changed_document_waits_for_preflight_before_the_old_run_is_stopped(place: Place) -> None:
    verdict: dict[int, Ends] = {1: passes(), 2: fails(42, "ColumnMissing"), 3: passes(run="b" * 16)}
    now = [1]

    def script(role: str, ordinal: int) -> Ends | None:
        if role == "preflight":
            return verdict[now[0]]
        return trained("b" * 16) if ordinal == 2 else None

    def change(rate: float) -> None:
        now[0] += 1
        place.plane.patch(place.path("one"), {"spec": {"training": {"learningRate": rate}}})

    place.apply("one", script)
    place.reaches("one", "Starting", "Loading")
    change(1e-3)
    becomes(place, "one", "changed-refused", "Starting", "ColumnMissing")
    assert [job[-2:] for job in place.children("jobs") if job[-2] == "t"] == ["t1"]
    change(1e-4)
    becomes(place, "one", "succeeded-changed", "Succeeded", "Trained")
    assert [job for job in place.kubelet.jobs_of("one") if job[0] == "t"] == ["t1", "t2"]
    assert [*place.kubelet.begun.values()] == [None, None, None], "another document has its rows read"


def test_a_live_change_restarts_nothing(place: Place) -> None:
    place.apply("one", lambda role, ordinal: passes() if role == "preflight" else None)
    place.reaches("one", "Starting", "Loading")
    place.plane.patch(place.path("one"), {"spec": {"retries": {"max": 7}}})
    eventually("generation 2 is observed", lambda: place.status("one")["observedGeneration"] == 2)
    becomes(place, "one", "starting-changed-live", "Starting", "Loading")
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]


def test_a_live_change_restarts_nothing_after_the_profile_and_the_operator_have_changed(place: Place) -> None:
    plane, name = place.plane, place.name
    add_profile(plane, name, images={"preflight": "theirs:1"})
    script: Script = lambda role, ordinal: passes() if role == "preflight" else None  # noqa: E731
    uid = place.apply("one", script, profile=name)["metadata"]["uid"]
    place.reaches("one", "Starting", "Loading")
    changed = {"images": {"preflight": "theirs:2"}, "gpu": {"memory": "80Gi"}, "allowedLicenses": ["mit"]}
    plane.patch(f"/apis/finetune.dev/v1alpha1/finetuneprofiles/{name}", {"spec": changed})
    place.operator.kill()
    place.operator.version = "2"
    place.operator.start()
    plane.patch(place.path("one"), {"spec": {"deadline": "2h"}})
    configs = f"/api/v1/namespaces/{name}/configmaps"
    pinned = eventually("generation 2 is pinned", lambda: _named(plane.items(configs), f"one-{uid[:5]}-g2"))
    pods = json.loads(pinned["data"]["config.json"])["pods"]
    assert (pods["trainerImage"], pods["preflightImage"]) == ("trainer:1", "theirs:1")
    eventually("generation 2 is observed", lambda: place.status("one")["observedGeneration"] == 2)
    becomes(place, "one", "starting-changed-live", "Starting", "Loading")
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]
    plane.patch(place.path("one"), {"spec": {"podTemplate": {"metadata": {"annotations": {"images": "of today"}}}}})
    eventually("another attempt begins", lambda: "t2" in place.kubelet.jobs_of("one"))
    attempt = _named(plane.items(f"/apis/batch/v1/namespaces/{name}/jobs"), f"one-{uid[:5]}-t2")
    assert attempt["spec"]["template"]["spec"]["containers"][0]["image"] == "trainer:2"


def test_a_suspended_job_has_no_pods_and_goes_on_when_it_is_resumed(place: Place) -> None:
    place.apply("one", lambda role, ordinal: trained() if ordinal == 2 else passes() if role == "preflight" else None)
    place.reaches("one", "Starting", "Loading")
    place.plane.patch(place.path("one"), {"spec": {"suspend": True}})
    becomes(place, "one", "suspended", "Suspended", "Suspended")
    eventually("Jobs and pods are gone", lambda: not place.children("jobs") and not place.children("pods"))
    version = place.get("one")["metadata"]["resourceVersion"]
    time.sleep(3)
    assert place.get("one")["metadata"]["resourceVersion"] == version, "nothing is written"
    place.kubelet.scripts["one"] = ordinary
    place.plane.patch(place.path("one"), {"spec": {"suspend": False}})
    becomes(place, "one", "succeeded-resumed", "Succeeded", "Trained")
    assert [job for job in place.kubelet.jobs_of("one") if job[0] == "t"] == ["t1", "t2"]
    assert [*place.kubelet.begun.values()] == [None, "a" * 16], "the second preflight is told of the run that was begun"


def test_a_job_that_is_born_suspended_has_no_pods(place: Place) -> None:
    place.apply("one", suspend=True)
    becomes(place, "one", "applied-suspended", "Suspended", "Suspended")
    time.sleep(2)
    assert place.children("jobs") == []
    place.plane.patch(place.path("one"), {"spec": {"suspend": None}})
    becomes(place, "one", "succeeded-applied-suspended", "Succeeded", "Trained")


def test_the_twin_of_a_suspended_job_takes_its_run_over(place: Place) -> None:
    same = {"uri": "s3://models/same"}
    place.apply("one", lambda role, ordinal: passes() if role == "preflight" else None, output=same)
    place.reaches("one", "Starting", "Loading")
    place.apply("two", output=same)
    place.reaches("two", "Pending", "IdenticalRunInProgress")
    place.plane.patch(place.path("one"), {"spec": {"suspend": True}})
    place.reaches("one", "Suspended", "Suspended")
    becomes(place, "two", "succeeded", "Succeeded", "Trained")
    becomes(place, "one", "suspended", "Suspended", "Suspended")


def test_of_two_documents_of_one_run_each_has_its_attempts_read_what_was_pinned_for_it(place: Place) -> None:
    """They differ in their test rows. The second one is looked at while the first one is between two attempts."""
    same, data = {"uri": "s3://models/same"}, {"train": [{"uri": "s3://data/train.jsonl"}]}
    crashed = threading.Event()

    def first(role: str, ordinal: int) -> Ends | None:
        if role == "preflight":
            return passes(inputs="1" * 32)
        return (fails(1, "Crashed") if crashed.is_set() else None) if ordinal == 1 else trained()

    place.apply("one", first, output=same)
    place.reaches("one", "Starting", "Loading")
    test = {"test": {"uri": "s3://data/test.jsonl"}}
    place.apply(
        "two",
        lambda role, ordinal: passes(inputs="2" * 32) if role == "preflight" else trained(),
        output=same,
        data={**data, **test},
    )
    waiting = place.reaches("two", "Pending", "IdenticalRunInProgress")
    assert waiting["run"]["inputs"] == "2" * 32
    crashed.set()
    assert place.reaches("one", "Succeeded", "Trained")["run"]["inputs"] == "1" * 32
    place.reaches("two", "Succeeded", "Trained", seconds=120)
    assert place.kubelet.jobs_of("two") == ["p1", "p1", "t1"]
    assert place.kubelet.reads == {  # the newest of each name
        **{"one-p1": None, "one-t1": "1" * 32, "one-t2": "1" * 32},
        **{"two-p1": "2" * 32, "two-t1": "2" * 32},
    }


def test_a_used_up_budget_is_finished_by_an_attempt_of_its_own_and_a_raised_one_goes_on(place: Place) -> None:
    part = {**RESULT, "finalStep": 30, "partial": True}
    stopped = Ends(0, {"code": 0, "reason": "Completed", "message": "m", "runId": "a" * 16, "result": part})
    found = {"state": "Resume", "runId": "a" * 16, "step": 30, "summary": {"labels": 2}}
    resumes = Ends(0, {"code": 0, "reason": "PreflightPassed", "message": "fine", "preflight": found})
    place.apply(
        "one",
        lambda role, ordinal: resumes if role == "preflight" else (None, stopped, trained())[ordinal - 1],
        budget={"gpuHours": 0.001},
        resources={"perNode": {"gpus": 1}},
    )
    becomes(place, "one", "stopped-at-best", "Succeeded", "StoppedAtBest")
    jobs = place.plane.items(f"/apis/batch/v1/namespaces/{place.name}/jobs")
    (last,) = [job for job in jobs if job["metadata"]["name"].endswith("-t2")]
    assert "--finish-now" in last["spec"]["template"]["spec"]["containers"][0]["args"]
    place.plane.patch(place.path("one"), {"spec": {"budget": {"gpuHours": 10}}})
    becomes(place, "one", "succeeded-budget-raised", "Succeeded", "Trained")
    assert [job for job in place.kubelet.jobs_of("one") if job[0] == "t"] == ["t1", "t2", "t3"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"deadline": "59s"}, "deadline is at least 1m"),
        ({"ttlAfterFinished": "0s"}, "ttlAfterFinished is at least 1m"),
        ({"budget": {"gpuHours": 0}}, "spec.budget.gpuHours"),
        ({"budget": {"onExhausted": "Fail"}}, "spec.budget.gpuHours"),
    ],
)
def test_the_api_server_refuses_limits_that_are_none(plane: Plane, spec: Document, words: str) -> None:
    document = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "limits"},
        "spec": {
            "task": {"type": "text-classification"},
            "model": {"uri": "s3://models/base"},
            "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "output": {"uri": "s3://models/limits"},
            "deadline": "1h30m",
            **spec,
        },
    }
    with pytest.raises(urllib.error.HTTPError) as caught:
        plane.create(JOBS.format("default"), document)
    assert words in caught.value.read().decode()


def a_group_that_finds_no_room_gives_its_nodes_back_and_starts_when_there_is_some(place: Place) -> None:
    """Two runs on two nodes each, and three nodes."""
    profile = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneProfile",
        "metadata": {"name": place.name},
        "spec": {"startTimeout": "2s"},
    }
    place.plane.create("/apis/finetune.dev/v1alpha1/finetuneprofiles", profile)
    place.kubelet.room = 3
    freed = threading.Event()
    several = {"profile": place.name, "resources": {"nodes": 2, "perNode": {"gpus": 1}}}

    def long(role: str, ordinal: int) -> Ends | None:
        return ordinary(role, ordinal) if role == "preflight" or freed.is_set() else None

    place.apply("one", long, **several)
    place.reaches("one", "Starting", "Loading")
    place.apply("two", long, **several)
    place.reaches("two", "Queued", "GroupIncomplete")
    eventually("storage was asked again", lambda: "next try at" in place.status("two")["message"])
    becomes(place, "two", "queued-group-incomplete", "Queued", "GroupIncomplete")
    of_two = lambda: [pod for pod in place.children("pods") if pod.startswith("two-") and "-t1-" in pod]  # noqa: E731
    eventually("its train pods are gone", lambda: not of_two())
    assert place.status("one")["phase"] == "Starting"
    freed.set()
    becomes(place, "one", "succeeded", "Succeeded", "Trained")
    becomes(place, "two", "succeeded-group-incomplete", "Succeeded", "Trained", seconds=90)


def test_deleting_leaves_nothing(place: Place) -> None:
    place.apply(
        "one",
        lambda role, ordinal: passes() if role == "preflight" else None,
        resources={"nodes": 2, "perNode": {"gpus": 0}},
    )
    place.reaches("one", "Starting", "Loading")
    assert place.children("services")
    place.plane.delete(place.path("one"))
    for kind in ("jobs", "pods", "configmaps", "services"):
        eventually(f"no {kind}", lambda kind=kind: not place.children(kind))


def test_a_quota_is_told_in_the_clusters_words(place: Place) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    path = f"/api/v1/namespaces/{place.name}/resourcequotas"
    place.plane.create(path, quota)
    eventually("the quota counts", lambda: "hard" in place.plane.get(f"{path}/none").get("status", {}))
    place.apply("one")
    status = place.reaches("one", "Pending", "PodsRefused")
    assert "exceeded quota" in status["message"]
    place.plane.delete(f"{path}/none")
    becomes(place, "one", "succeeded", "Succeeded", "Trained", seconds=60)


def a_refused_train_job_is_told_asked_for_again_and_goes_on_by_itself(place: Place) -> None:
    """The finished preflight Job still counts, so a quota of one Job lets no train Job through."""
    path = f"/api/v1/namespaces/{place.name}/resourcequotas"
    hard = {"count/jobs.batch": "1"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "one-job"}, "spec": {"hard": hard}}
    place.plane.create(path, quota)
    eventually("the quota counts", lambda: "hard" in place.plane.get(f"{path}/one-job").get("status", {}))
    before = refused_jobs(place.plane)
    place.apply("one")
    becomes(place, "one", "pending-create", "Pending", "CreateForbidden")
    # The status itself and what the Job controller still writes into the preflight Job call for a look.
    tries, seen = 1, 0
    while tries != seen:
        seen = refused_jobs(place.plane) - before
        assert 1 <= seen <= 10
        time.sleep(5)
        tries = refused_jobs(place.plane) - before
    version = place.get("one")["metadata"]["resourceVersion"]
    time.sleep(20)
    assert refused_jobs(place.plane) - before == tries
    assert place.get("one")["metadata"]["resourceVersion"] == version
    assert place.children("jobs") == [f"one-{place.get('one')['metadata']['uid'][:5]}-p1"]
    place.plane.patch(f"{path}/one-job", {"spec": {"hard": {"count/jobs.batch": "2"}}})
    becomes(place, "one", "succeeded", "Succeeded", "Trained", seconds=75)
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]
    assert refused_jobs(place.plane) - before == tries


def refused_jobs(plane: Plane) -> int:
    """How many Jobs the API server has refused to create with 403, by its own count."""
    lines = plane.text("/metrics").splitlines()
    wanted = ("apiserver_request_total{", 'code="403"', 'resource="jobs"', 'verb="POST"')
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if all(word in line for word in wanted))


def test_a_bucket_that_is_missing_is_one_event_however_often_it_is_looked_for(place: Place) -> None:
    """Who waits for the job does not see it work and fail in turn."""
    found: list[tuple[str, str, str]] = []

    def seen() -> bool:
        status = place.status("one")
        succeeded, stalled = (condition(status, kind).get("reason", "") for kind in ("Succeeded", "Stalled"))
        told = (status.get("phase", ""), succeeded, stalled)
        found.extend([told] if found[-1:] != [told] else [])
        return len(place.kubelet.jobs_of("one")) >= 3

    place.apply("one", lambda role, ordinal: fails(49, "BucketNotFound"))
    eventually("it is looked for a third time", seen, seconds=90)
    missing = ("Pending", "BucketNotFound", "BucketNotFound")
    assert found[found.index(missing) :] == [missing]
    job = place.get("one")
    path = f"/api/v1/namespaces/{place.name}/events?fieldSelector=involvedObject.uid={job['metadata']['uid']}"
    told = [f"{one['type']} {one['reason']}: {one['message']}" for one in place.plane.items(path)]
    same("events-pending-bucket", masked_text("\n".join(told) + "\n", job))


ADMISSION = "/apis/admissionregistration.k8s.io/v1"


def of_jobs(place: Place, operation: str) -> Document:
    """What an admission rule for the Jobs of a namespace says of them."""
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": [operation], "resources": ["jobs"]}
    return {"rule": rule, "where": {"matchLabels": {"kubernetes.io/metadata.name": place.name}}}


def is_refused(place: Place, method: str, path: str, body: Document) -> bool:
    try:
        place.plane.text(path, method=method, body=body)
    except urllib.error.HTTPError as error:
        return error.code in (403, 500)
    return False


def test_a_webhook_that_does_not_answer_is_told_and_what_it_holds_up_goes_on_once_it_is_gone(place: Place) -> None:
    """A queue's or a policy's, with failurePolicy Fail: the API server says that the error is its own."""
    what = of_jobs(place, "CREATE")
    hook = {
        "name": "jobs.policy.example.com",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "timeoutSeconds": 5,
        "failurePolicy": "Fail",
        "clientConfig": {"url": "https://127.0.0.1:1/validate"},
        "rules": [what["rule"]],
        "namespaceSelector": what["where"],
    }
    meta = {"name": f"closed-{place.name}"}
    document = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    path = f"{ADMISSION}/validatingwebhookconfigurations"
    place.plane.create(path, {**document, "metadata": meta, "webhooks": [hook]})
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {"template": {"spec": pod}}}
    jobs = f"/apis/batch/v1/namespaces/{place.name}/jobs?dryRun=All"
    eventually("the webhook is asked", lambda: is_refused(place, "POST", jobs, job))
    place.apply("one")
    becomes(place, "one", "pending-webhook", "Pending", "CreateInternalError")
    is_not_told_again(place, "one")
    place.plane.delete(f"{path}/{meta['name']}")
    becomes(place, "one", "succeeded", "Succeeded", "Trained", seconds=90)
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]


def is_not_told_again(place: Place, job: str) -> None:
    """However often it is looked at."""
    for number in range(4):
        changed = place.plane.patch(place.path(job), {"metadata": {"annotations": {"look": str(number)}}})
        time.sleep(2)
        assert place.get(job)["metadata"]["resourceVersion"] == changed["metadata"]["resourceVersion"]


def test_a_job_that_a_policy_keeps_is_told_and_ends_once_it_may(place: Place) -> None:
    what, name = of_jobs(place, "DELETE"), f"kept-{place.name}"
    group, kinds = "admissionregistration.k8s.io/v1", ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    refusal = {"expression": "false", "message": "Jobs are kept for the auditors", "reason": "Forbidden"}
    policy = {"matchConstraints": {"resourceRules": [what["rule"]]}, "validations": [refusal]}
    binding = {
        "policyName": name,
        "validationActions": ["Deny"],
        "matchResources": {"namespaceSelector": what["where"]},
    }
    paths = (f"{ADMISSION}/validatingadmissionpolicies", f"{ADMISSION}/validatingadmissionpolicybindings")
    place.apply("one", lambda role, ordinal: passes() if role == "preflight" else None)
    place.reaches("one", "Starting", "Loading")
    for kind, path, spec in zip(kinds, paths, (policy, binding), strict=True):
        place.plane.create(path, {"apiVersion": group, "kind": kind, "metadata": {"name": name}, "spec": spec})
    job = f"/apis/batch/v1/namespaces/{place.name}/jobs/one-{place.get('one')['metadata']['uid'][:5]}-t1"
    dry = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", "dryRun": ["All"]}
    eventually("the policy holds", lambda: is_refused(place, "DELETE", job, dry))
    place.plane.patch(place.path("one"), {"spec": {"suspend": True}})
    eventually("it is told", lambda: condition(place.status("one"), "Stalled").get("reason") == "DeleteForbidden")
    becomes(place, "one", "suspending-kept", "Suspended", "Suspending")
    is_not_told_again(place, "one")
    for path in reversed(paths):
        place.plane.delete(f"{path}/{name}")
    becomes(place, "one", "suspended", "Suspended", "Suspended", seconds=90)


def test_a_queue_without_kueue_is_told(place: Place) -> None:
    place.apply("one", queue={"name": "team-a"})
    becomes(place, "one", "pending-kueue", "Pending", "KueueNotInstalled")
    assert place.kubelet.jobs_of("one") == ["p1"]


def test_a_queue_alone_decides_when_a_job_runs(place: Place) -> None:
    """This test is Kueue: it says why the Job waits, and suspends it. The real one is in test_kueue.py."""
    done = threading.Event()
    with StandIn(place) as kueue:
        place.apply(
            "one",
            lambda role, ordinal: passes() if role == "preflight" else trained() if done.is_set() else None,
            queue={"name": "team-a"},
            resources={"perNode": {"gpus": 1}},
        )
        place.reaches("one", "Queued", "WaitingForQueue")
        kueue.says(QuotaReserved=("False", "insufficient unused quota"))
        eventually("the status says so", lambda: "insufficient unused quota" in place.status("one")["message"])
        assert place.kubelet.jobs_of("one") == ["p1"]
        kueue.suspends(False)
        place.reaches("one", "Starting", "Loading")
        time.sleep(2)
        kueue.says(Evicted=("True", "Preempted for another"), QuotaReserved=("False", "Preempted for another"))
        kueue.suspends(True)
        status = place.reaches("one", "Queued", "WaitingForQueue")
        assert status["message"] == "queue team-a: Preempted for another"
        eventually("what it took is told", lambda: place.status("one")["usage"].get("gpuSeconds", 0) >= 1)
        done.set()
        kueue.suspends(False)
        becomes(place, "one", "succeeded", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]


@dataclass
class StandIn:
    """What of Kueue the operator sees: its resource, Workloads, and the Jobs' suspend."""

    place: Place

    def __enter__(self) -> "StandIn":
        version = {
            "name": "v1beta2",
            "served": True,
            "storage": True,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
        }
        names = {"kind": "Workload", "plural": "workloads", "singular": "workload", "listKind": "WorkloadList"}
        crd = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "workloads.kueue.x-k8s.io"},
            "spec": {"group": "kueue.x-k8s.io", "scope": "Namespaced", "names": names, "versions": [version]},
        }
        self.place.plane.create(CRDS, crd)
        eventually("Workloads are served", self._served)
        return self

    def __exit__(self, *error: object) -> None:
        self.place.plane.delete(f"{CRDS}/workloads.kueue.x-k8s.io")

    def _served(self) -> bool:
        try:
            self.place.plane.items(self._path)
        except urllib.error.HTTPError:
            return False
        return True

    @property
    def _path(self) -> str:
        return f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{self.place.name}/workloads"

    def _job(self, of: str) -> Document:
        """The train Job of this FineTuneJob."""
        owner = self.place.get(of)["metadata"]["uid"]
        jobs = self.place.plane.items(f"/apis/batch/v1/namespaces/{self.place.name}/jobs")
        wanted = {"finetune.dev/role": "train", "finetune.dev/job-uid": owner}
        return next(job for job in jobs if wanted.items() <= job["metadata"]["labels"].items())

    def says(self, of: str = "one", reason: str = "Pending", **conditions: tuple[str, str]) -> None:
        """By type: status and message."""
        found = [{"type": kind, "status": s, "message": m, "reason": reason} for kind, (s, m) in conditions.items()]
        labels = {"kueue.x-k8s.io/job-uid": self._job(of)["metadata"]["uid"]}
        document = {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "Workload",
            "metadata": {"name": of, "labels": labels},
            "status": {"conditions": found},
        }
        if of in [workload["metadata"]["name"] for workload in self.place.plane.items(self._path)]:
            self.place.plane.patch(f"{self._path}/{of}", {"status": document["status"]})
        else:
            self.place.plane.create(self._path, document)

    def suspends(self, suspend: bool, of: str = "one") -> None:
        job = self._job(of)["metadata"]["name"]
        self.place.plane.patch(
            f"/apis/batch/v1/namespaces/{self.place.name}/jobs/{job}", {"spec": {"suspend": suspend}}
        )


def test_killed_again_and_again_it_doubles_nothing(place: Place) -> None:
    names = [f"job-{number}" for number in range(6)]
    for name in names:
        place.apply(name)
    chance, kills = random.Random(7), 0
    while not all(place.status(name).get("phase") == "Succeeded" for name in names):
        eventually("it watches", lambda: place.operator.log.read_text().count(": watching") > kills)  # noqa: B023
        time.sleep(0.1 + chance.random())
        place.operator.kill()
        kills += 1
        assert kills < 60
        place.operator.start()
    assert kills > 2
    for name in names:
        becomes(place, name, "succeeded", "Succeeded", "Trained")
        assert place.kubelet.jobs_of(name) == ["p1", "t1"]


def test_a_restart_and_a_newer_version_touch_nothing_that_is_done(place: Place) -> None:
    place.apply("one")
    place.apply("two", lambda role, ordinal: fails(42, "ColumnMissing"))
    place.reaches("one", "Succeeded")
    place.reaches("two", "Failed")
    before = [place.get(name)["metadata"]["resourceVersion"] for name in ("one", "two")]
    place.operator.kill()
    place.operator.start()

    def looks() -> float:
        page = place.operator.page("/metrics") or ""
        return sum(map(float, re.findall(r'reconciles_total\{outcome="done"\} (\S+)', page)))

    eventually("it looked at both", lambda: looks() >= 2)
    assert [place.get(name)["metadata"]["resourceVersion"] for name in ("one", "two")] == before
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]


def test_a_stopped_leader_is_replaced_and_has_written_nothing_when_it_wakes(pair: tuple[Place, Operator]) -> None:
    """SIGSTOP, so that it cannot know how much time has passed; then a hand-over in good order.

    An Event that was being sent when it was stopped may come late: it says what was so then, and changes nothing.
    """
    place, two = pair
    one, names = place.operator, [f"job-{number}" for number in range(8)]
    for name in names:
        place.apply(name)
    eventually("it is in the midst of its work", lambda: place.children("jobs"))
    one.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    place.apply("later")
    eventually("the other one leads", two.leads, seconds=30)
    assert time.monotonic() - stopped < 15 + 2 + 3  # the Lease, a look at it, and slack
    for name in (*names, "later"):
        becomes(place, name, "succeeded", "Succeeded", "Trained")
    one.signal(signal.SIGCONT)
    assert one.ended() == 1
    assert "leadership ended: LeadershipLost: the Lease " in one.log.read_text()
    first, second = place.plane.writes("one"), place.plane.writes("two")
    changes = [write for write in first if write["objectRef"]["resource"] != "events"]
    assert changes[-1]["stageTimestamp"] < second[0]["requestReceivedTimestamp"]
    for name in (*names, "later"):
        assert place.kubelet.jobs_of(name) == ["p1", "t1"]

    one.start()
    eventually("it follows now", one.follows)
    place.apply("last", lambda role, ordinal: passes() if role == "preflight" else None)
    place.reaches("last", "Starting", "Loading")
    two.signal(signal.SIGTERM)
    assert two.ended() == 0
    eventually("it leads again", one.leads, seconds=2 + 3)
    place.kubelet.scripts["last"] = ordinary
    becomes(place, "last", "succeeded", "Succeeded", "Trained")
    assert place.kubelet.jobs_of("last") == ["p1", "t1"]
    later = place.plane.writes("one")[len(first) :]
    assert place.plane.writes("two")[-1]["stageTimestamp"] < later[0]["requestReceivedTimestamp"]


def test_other_namespaces_are_left_alone(place: Place, plane: Plane) -> None:
    name = f"other-{place.name}"
    plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    place.apply("one")
    document = place.get("one")
    plane.create(JOBS.format(name), {**document, "metadata": {"name": "one"}, "status": {}})
    place.reaches("one", "Succeeded")
    assert plane.get(f"{JOBS.format(name)}/one")["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize("name", [name for name in LIVES if name not in ("no-status", "deleting")])
def test_the_recorded_documents_are_what_an_api_server_holds(plane: Plane, name: str) -> None:
    """The ones that tests/e2e/test_gitops.py gives to other tools: no field is pruned, refused or filled in."""
    recorded = yaml.safe_load((ROOT / f"tests/unit/golden/finetunejobs/{name}.yaml").read_text())
    namespace = "recorded"
    with suppress(urllib.error.HTTPError):
        plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    path = JOBS.format(namespace)
    spec = recorded["spec"]
    first = {**spec, "retries": {"max": 9}} if recorded["metadata"]["generation"] == 2 else spec
    plane.create(path, {**recorded, "metadata": {"name": name}, "spec": first})
    if first != spec:
        plane.patch(f"{path}/{name}", {"spec": {**spec, "retries": None}})
    if name != "new":
        plane.patch(f"{path}/{name}/status", {"status": recorded["status"]})
    held = plane.get(f"{path}/{name}")
    assert held["metadata"]["generation"] == recorded["metadata"]["generation"]
    assert (held["spec"], held["status"]) == (spec, recorded["status"])


def test_the_health_check_for_argo_cd_is_added_as_the_docs_say(plane: Plane) -> None:
    text = (ROOT / "docs/gitops.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("kubectl patch configmap")]
    plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argocd"}})
    configs = "/api/v1/namespaces/argocd/configmaps"
    before = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "argocd-cm"}, "data": {"url": "https://cd"}}
    plane.create(configs, before)
    patched = [*shlex.split(command), f"--kubeconfig={plane.kubeconfig}"]
    done = subprocess.run(patched, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    ours = yaml.safe_load((ROOT / "examples/gitops/argocd-cm.yaml").read_text())["data"]
    assert plane.get(f"{configs}/argocd-cm")["data"] == {"url": "https://cd", **ours}


def test_it_ends_cleanly_when_asked(place: Place) -> None:
    eventually("it is healthy", lambda: place.operator.page("/healthz") == "ok\n")
    place.apply("one")
    place.reaches("one", "Succeeded")
    counted = 'finetune_jobs{phase="Succeeded",reason="Trained"} 1.0'
    eventually("it is counted", lambda: counted in (place.operator.page("/metrics") or ""))
    started = time.monotonic()
    place.operator.signal(signal.SIGTERM)
    assert place.operator.ended() == 0, place.operator.log.read_text()
    assert time.monotonic() - started < 10


# --- what has gone on meanwhile ---

LONG_WAITS = (
    a_refused_train_job_is_told_asked_for_again_and_goes_on_by_itself,
    a_group_that_finds_no_room_gives_its_nodes_back_and_starts_when_there_is_some,
)


@pytest.mark.parametrize("fact", LONG_WAITS, ids=lambda fact: fact.__name__)
def test_what_takes_long_to_wait_for(beside: Beside, fact: Fact) -> None:
    beside.shows(fact)
