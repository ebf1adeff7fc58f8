"""spec.queue with the real Kueue (hack/kueue) on a control plane of its own; this test is the kubelet.

Kueue runs with its own CRDs, webhooks and certificates, only for batch/v1 Jobs, and without its visibility server.
"""

import base64
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.goldens import becomes
from tests.e2e.test_operator import (
    CRDS,
    ROOT,
    Document,
    Ends,
    Place,
    Plane,
    Script,
    a_place,
    add_profile,
    binaries,
    condition,
    eventually,
    install,
    ordinary,
    passes,
    trained,
)
from tests.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
WEBHOOKS = "/apis/admissionregistration.k8s.io/v1"
NAMESPACE, SERVICE, SECRET = "kueue-system", "kueue-webhook-service", "kueue-webhook-server-cert"
CONVERTED = ("clusterqueues", "cohorts", "localqueues", "multikueueclusters", "workloads")
"""Whose older version only Kueue can read, as its own installation has it."""
GPU = {"perNode": {"gpus": 1}}
TEAM = {"name": "team-a"}
AUDIT = {
    "level": "Request",
    "verbs": ["create", "update", "patch", "delete", "deletecollection"],
    "resources": [{"group": "batch", "resources": ["jobs", "jobs/*"]}],
}


@cache
def files() -> Path:
    """Kueue, its CRDs and its webhooks: in the cache, after they were built (minutes)."""
    done = subprocess.run([ROOT / "hack/kueue"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def documents(path: Path) -> Iterator[Document]:
    yield from yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)  # one of them has 19,000 lines


class Kueue:
    """Its manager as a process on the loopback. It makes its certificates itself; this test mounts them."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._directory = plane.directory / "kueue"
        self._certificates = self._directory / "certificates"
        self._certificates.mkdir(parents=True)
        self._webhooks, self._health = free_port(), free_port()
        self._install()
        self._process = self._start()
        eventually("its certificate is made and mounted", self._mounted, seconds=60)
        eventually("Kueue is ready", self._ready, seconds=60)

    def _install(self) -> None:
        self._plane.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        self._plane.create(f"/api/v1/namespaces/{NAMESPACE}/secrets", {"metadata": {"name": SECRET}})
        loopback = {"type": "ExternalName", "externalName": "localhost"}
        self._plane.create(
            f"/api/v1/namespaces/{NAMESPACE}/services", {"metadata": {"name": SERVICE}, "spec": loopback}
        )
        for path in sorted((files() / "crds").glob("*.yaml")):
            for crd in documents(path):
                if crd["spec"]["names"]["plural"] in CONVERTED:
                    client = {"service": self._service("/convert")}
                    webhook = {"clientConfig": client, "conversionReviewVersions": ["v1"]}
                    crd["spec"]["conversion"] = {"strategy": "Webhook", "webhook": webhook}
                self._plane.create(CRDS, crd)
        for document in documents(files() / "webhooks.yaml"):
            kind = document["kind"].removesuffix("WebhookConfiguration").lower()
            document["metadata"]["name"] = f"kueue-{kind}-webhook-configuration"
            document["webhooks"] = [hook for hook in document["webhooks"] if _concerns_jobs(hook)]
            for hook in document["webhooks"]:
                hook["clientConfig"] = {"service": self._service(hook["clientConfig"]["service"]["path"])}
            self._plane.create(f"{WEBHOOKS}/{kind}webhookconfigurations", document)

    def _service(self, path: str) -> Document:
        """The API server goes to localhost, and still expects the Service's name in the certificate."""
        return {"namespace": NAMESPACE, "name": SERVICE, "path": path, "port": self._webhooks}

    def _start(self) -> "subprocess.Popen[bytes]":
        config = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self._health}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": "127.0.0.1", "port": self._webhooks, "certDir": str(self._certificates)},
            "leaderElection": {"leaderElect": False},
            "clientConnection": {"qps": 200, "burst": 400},
            "integrations": {"frameworks": ["batch/job"]},
            "featureGates": {"VisibilityOnDemand": False},
        }
        path = self._directory / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(files() / "kueue"), f"--config={path}", f"--kubeconfig={self._plane.kubeconfig}"]
        with open(self._directory / "kueue.log", "wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _mounted(self) -> bool:
        self._lives()
        data = self._plane.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}").get("data", {})
        if "tls.crt" not in data:
            return False
        for name in ("tls.key", "tls.crt"):  # Kueue looks for the certificate alone
            (self._certificates / f".{name}").write_bytes(base64.b64decode(data[name]))
            (self._certificates / f".{name}").rename(self._certificates / name)
        return True

    def _ready(self) -> bool:
        self._lives()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _lives(self) -> None:
        assert self._process.poll() is None, (self._directory / "kueue.log").read_text()[-3000:]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _concerns_jobs(hook: Document) -> bool:
    return all(group in ("batch", "kueue.x-k8s.io") for rule in hook["rules"] for group in rule["apiGroups"])


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """Without Kueue yet."""
    binaries()
    running = Plane(tmp_path_factory.mktemp("plane"), audit=[AUDIT])
    try:
        install(running)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def kueue(plane: Plane) -> Iterator[Kueue]:
    running = Kueue(plane)
    try:
        plane.create(f"{KUEUE}/resourceflavors", {**_named("ResourceFlavor", "default"), "spec": {}})
        for name, value in (("low", 10), ("high", 1000)):
            priority = {**_named("WorkloadPriorityClass", name), "value": value, "description": name}
            plane.create(f"{KUEUE}/workloadpriorityclasses", priority)
        yield running
    finally:
        running.stop()


@pytest.fixture
def place(plane: Plane, tmp_path: Path) -> Iterator[Place]:
    with a_place(plane, tmp_path) as made:
        yield made


@pytest.fixture
def team(kueue: Kueue, place: Place) -> Place:
    """A place whose queue team-a has one GPU."""
    open_queue(place, gpus=1)
    return place


# --- what a platform team does ---


def _named(kind: str, name: str) -> Document:
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}}


def open_queue(place: Place, *, gpus: int, **more: Any) -> None:
    """A ClusterQueue named as the place, and its LocalQueue team-a."""
    quota = {"cpu": "1000", "memory": "1000Gi", "nvidia.com/gpu": str(gpus)}
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
    group = {"coveredResources": list(quota), "flavors": [{"name": "default", "resources": resources}]}
    spec = {
        "namespaceSelector": {},
        "resourceGroups": [group],
        "preemption": {"withinClusterQueue": "LowerPriority"},
        **more,
    }
    place.plane.create(f"{KUEUE}/clusterqueues", {**_named("ClusterQueue", place.name), "spec": spec})
    open_local(place, "team-a")


def open_local(place: Place, name: str) -> None:
    document = {**_named("LocalQueue", name), "spec": {"clusterQueue": place.name}}
    place.plane.create(f"{KUEUE}/namespaces/{place.name}/localqueues", document)


# --- what can be seen ---


def waits(place: Place, job: str, reason: str, *words: str, seconds: float = 30) -> Document:
    """The status once the job is queued and says these words. Kueue is asked every 5 seconds until it says any."""

    def there() -> Document | None:
        status = place.status(job)
        fits = status.get("phase") == "Queued" and condition(status, "Succeeded").get("reason") == reason
        return status if fits and all(part in status["message"] for part in words) else None

    try:
        return dict(eventually(f"{job} waits: {reason} {words}", there, seconds=seconds))
    except AssertionError as error:
        raise AssertionError(f"{error}; it is {json.dumps(place.status(job))}") from None


def train(place: Place, job: str) -> Document:
    """Its only train Job."""
    jobs = place.plane.items(f"/apis/batch/v1/namespaces/{place.name}/jobs")
    uid = place.get(job)["metadata"]["uid"]
    (found,) = (j for j in jobs if _owner(j) == uid and j["metadata"]["labels"]["finetune.dev/role"] == "train")
    return dict(found)


def _owner(document: Document) -> str:
    return str(document["metadata"]["ownerReferences"][0]["uid"])


def workloads(place: Place) -> list[Document]:
    return place.plane.items(f"{KUEUE}/namespaces/{place.name}/workloads")


def workload_of(place: Place, job: Document) -> Document:
    return next(found for found in workloads(place) if _owner(found) == job["metadata"]["uid"])


def writes(place: Place) -> list[Document]:
    """What the API server's audit log tells of writes to Jobs."""
    lines = (place.plane.directory / "audit.log").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["objectRef"]["namespace"] == place.name]


def until(done: threading.Event, **fields: Any) -> Script:
    """Passes preflight, and trains until then."""
    return lambda role, ordinal: passes() if role == "preflight" else trained(**fields) if done.is_set() else None


# --- facts ---


def test_without_kueue_a_job_waits_and_begins_by_itself_once_it_is_there(
    place: Place, request: pytest.FixtureRequest
) -> None:
    """The first in the file: after it Kueue is there."""
    place.apply("one", queue=TEAM, resources=GPU)
    becomes(place, "one", "pending-kueue", "Pending", "KueueNotInstalled")
    assert place.kubelet.jobs_of("one") == ["p1"]
    request.getfixturevalue("kueue")
    open_queue(place, gpus=1)
    becomes(place, "one", "succeeded-kueue", "Succeeded", "Trained", seconds=120)
    assert place.kubelet.jobs_of("one") == ["p1", "t1"]


def test_a_job_is_made_suspended_and_only_kueue_and_the_job_controller_write_it(team: Place) -> None:
    team.apply("one", queue={**TEAM, "workloadPriorityClass": "low"}, resources=GPU)
    team.reaches("one", "Succeeded", "Trained")
    assert team.kubelet.jobs_of("one") == ["p1", "t1"]
    made = {
        event["requestObject"]["metadata"]["name"][-2:]: event for event in writes(team) if event["verb"] == "create"
    }
    assert sorted(made) == ["p1", "t1"]
    job = made["t1"]["requestObject"]
    labels = {name: value for name, value in job["metadata"]["labels"].items() if name.startswith("kueue")}
    assert labels == {"kueue.x-k8s.io/queue-name": "team-a", "kueue.x-k8s.io/priority-class": "low"}
    assert job["spec"]["suspend"] is True
    preflight = made["p1"]["requestObject"]
    assert preflight["spec"]["suspend"] is False
    assert not [name for name in preflight["metadata"]["labels"] if name.startswith("kueue")]
    verbs: dict[str, set[str]] = {}
    for event in writes(team):
        verbs.setdefault(event["userAgent"].split("/")[0], set()).add(event["verb"])
    ours = made["t1"]["userAgent"].split("/")[0]
    assert verbs[ours] <= {"create", "delete"}, verbs
    assert "patch" in verbs["kueue"], verbs


def test_without_quota_a_job_waits_in_kueues_words_and_starts_by_itself_when_some_is_free(team: Place) -> None:
    done = threading.Event()
    team.apply("first", until(done), queue=TEAM, resources=GPU)
    team.reaches("first", "Starting", "Loading")
    team.apply("second", queue=TEAM, resources=GPU)
    words = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor default"
    waits(team, "second", "WaitingForQueue", f"queue team-a: {words}")
    status = becomes(team, "second", "kueue-no-quota", "Queued", "WaitingForQueue")["status"]
    assert team.kubelet.jobs_of("second") == ["p1"]
    time.sleep(3)
    assert team.get("second")["status"] == status, "nothing is written while nothing changes"
    done.set()
    team.reaches("first", "Succeeded", "Trained")
    becomes(team, "second", "succeeded-kueue", "Succeeded", "Trained")


def test_a_queue_that_does_not_exist_is_told_and_waited_for(team: Place) -> None:
    team.apply("one", queue={"name": "nowhere"}, resources=GPU)
    waits(team, "one", "Inadmissible", "queue nowhere: LocalQueue nowhere doesn't exist")
    becomes(team, "one", "kueue-no-queue", "Queued", "Inadmissible")
    assert team.kubelet.jobs_of("one") == ["p1"]
    open_local(team, "nowhere")
    becomes(team, "one", "succeeded-kueue", "Succeeded", "Trained")


def test_a_job_that_is_preempted_waits_and_goes_on_in_the_same_job(team: Place) -> None:
    done, urgent = threading.Event(), threading.Event()
    team.apply("low", until(done), queue={**TEAM, "workloadPriorityClass": "low"}, resources=GPU)
    team.reaches("low", "Starting", "Loading")
    job = train(team, "low")
    pods = [pod for pod in team.children("pods") if "-t1-" in pod]
    time.sleep(3)
    team.apply("high", until(urgent), queue={**TEAM, "workloadPriorityClass": "high"}, resources=GPU)
    waits(team, "low", "WaitingForQueue", "queue team-a: Preempted to accommodate a workload")
    team.reaches("high", "Starting", "Loading")
    assert not set(pods) & set(team.children("pods"))
    usage = eventually(
        "what it took is told", lambda: team.status("low")["usage"].get("gpuSeconds") and team.status("low")
    )
    assert 2 <= usage["usage"]["gpuSeconds"] < 60
    assert usage["usage"]["gpuSeconds"] == usage["usage"]["runningSeconds"]
    becomes(team, "low", "kueue-preempted", "Queued", "WaitingForQueue")
    done.set()
    time.sleep(2)
    assert team.status("low")["phase"] == "Queued"
    urgent.set()
    team.reaches("high", "Succeeded", "Trained")
    status = becomes(team, "low", "succeeded-kueue-preempted", "Succeeded", "Trained")["status"]
    assert train(team, "low")["metadata"]["uid"] == job["metadata"]["uid"]
    assert status["usage"]["gpuSeconds"] >= usage["usage"]["gpuSeconds"]
    assert team.kubelet.jobs_of("low") == ["p1", "t1"]


def test_a_place_that_comes_back_at_once_waits_for_the_old_pods(team: Place) -> None:
    """Kueue counts the pods that a Job wants, not those that still commit a checkpoint: new ones would fence it."""
    done, urgent, lingers = threading.Event(), threading.Event(), threading.Event()
    tend = team.kubelet._tend

    def patient(path: str, pod: Document) -> None:
        if not (lingers.is_set() and "deletionTimestamp" in pod["metadata"]):
            tend(path, pod)

    team.kubelet._tend = patient  # type: ignore[method-assign]
    team.apply("low", until(done), queue={**TEAM, "workloadPriorityClass": "low"}, resources=GPU)
    team.reaches("low", "Starting", "Loading")
    pods = lambda: [pod for pod in team.children("pods") if pod.startswith("low-") and "-t1-" in pod]  # noqa: E731
    old = pods()
    lingers.set()
    team.apply("high", until(urgent), queue={**TEAM, "workloadPriorityClass": "high"}, resources=GPU)
    eventually("its place is taken away", lambda: train(team, "low")["spec"]["suspend"])
    urgent.set()
    team.reaches("high", "Succeeded", "Trained")
    eventually("it has its place back", lambda: not train(team, "low")["spec"]["suspend"])
    time.sleep(3)
    assert pods() == old
    lingers.clear()
    eventually("a new pod is made", lambda: pods() and pods() != old)
    done.set()
    status = team.reaches("low", "Succeeded", "Trained")
    assert (status["usage"]["attempts"], status.get("restarts")) == (1, None)


def test_suspending_the_document_deletes_the_job_and_gives_the_quota_back(team: Place) -> None:
    team.apply("one", until(threading.Event()), queue=TEAM, resources=GPU)
    team.reaches("one", "Starting", "Loading")
    team.plane.patch(team.path("one"), {"spec": {"suspend": True}})
    becomes(team, "one", "kueue-suspended", "Suspended", "Suspended")
    eventually("Jobs and pods are gone", lambda: not team.children("jobs") and not team.children("pods"))
    team.apply("two", queue=TEAM, resources=GPU)
    team.reaches("two", "Succeeded", "Trained", seconds=90)  # the garbage collector learns of Workloads after a while
    team.kubelet.scripts["one"] = ordinary
    team.plane.patch(team.path("one"), {"spec": {"suspend": False}})
    becomes(team, "one", "succeeded-kueue-suspended", "Succeeded", "Trained")
    assert [job for job in team.kubelet.jobs_of("one") if job[0] == "t"] == ["t1", "t2"]


def test_suspending_a_job_that_waits_gives_its_place_up(team: Place) -> None:
    team.apply("first", until(threading.Event()), queue=TEAM, resources=GPU)
    team.reaches("first", "Starting", "Loading")
    team.apply("second", queue=TEAM, resources=GPU)
    waits(team, "second", "WaitingForQueue", "insufficient unused quota")
    team.plane.patch(team.path("second"), {"spec": {"suspend": True}})
    status = becomes(team, "second", "kueue-suspended-waiting", "Suspended", "Suspended")["status"]
    assert status["usage"].get("gpuSeconds") in (None, 0)
    eventually("its Job is gone", lambda: not [job for job in team.children("jobs") if job.startswith("second-")])


def test_preflight_is_queued_where_the_profile_says_so(team: Place) -> None:
    profile = f"all-{team.name}"
    add_profile(team.plane, profile, queue={"name": "team-a", "preflight": True})
    team.apply("one", profile=profile, resources=GPU)
    team.reaches("one", "Succeeded", "Trained")
    made = [event["requestObject"] for event in writes(team) if event["verb"] == "create"]
    assert [job["metadata"]["labels"]["finetune.dev/role"] for job in made] == ["preflight", "train"]
    for job in made:
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert job["spec"]["suspend"] is True


def test_a_local_queue_named_default_takes_in_jobs_that_name_none(kueue: Kueue, place: Place) -> None:
    open_queue(place, gpus=0)
    open_local(place, "default")
    place.apply("one", resources=GPU)
    waits(place, "one", "WaitingForQueue", "queue default: ", "insufficient quota for nvidia.com/gpu")
    becomes(place, "one", "kueue-default-no-quota", "Queued", "WaitingForQueue")
    assert place.kubelet.jobs_of("one") == ["p1"]
    (quota,) = place.plane.get(f"{KUEUE}/clusterqueues/{place.name}")["spec"]["resourceGroups"]
    for resource in quota["flavors"][0]["resources"]:
        resource["nominalQuota"] = "1000Gi"
    place.plane.patch(f"{KUEUE}/clusterqueues/{place.name}", {"spec": {"resourceGroups": [quota]}})
    place.reaches("one", "Succeeded", "Trained")


def test_a_priority_class_that_does_not_exist_is_named_as_a_cause(team: Place) -> None:
    """Kueue says it in its log alone."""
    team.apply("one", queue={**TEAM, "workloadPriorityClass": "nowhere"}, resources=GPU)
    waits(team, "one", "WaitingForQueue", "queue team-a: Kueue has not seen the Job yet")
    waits(team, "one", "Inadmissible", "Kueue makes no Workload of Job one-", "priority class", seconds=90)
    becomes(team, "one", "kueue-no-workload", "Queued", "Inadmissible")
    priority = {**_named("WorkloadPriorityClass", "nowhere"), "value": 1, "description": "now it is there"}
    team.plane.create(f"{KUEUE}/workloadpriorityclasses", priority)
    team.reaches("one", "Succeeded", "Trained", seconds=90)


def test_a_group_on_two_nodes_starts_whole_or_not_at_all(kueue: Kueue, place: Place) -> None:
    open_queue(place, gpus=2)
    done = threading.Event()
    place.apply("one", until(done), queue=TEAM, resources=GPU)
    place.reaches("one", "Starting", "Loading")
    place.apply("group", queue=TEAM, resources={"nodes": 2, **GPU})
    waits(place, "group", "WaitingForQueue", "insufficient unused quota for nvidia.com/gpu", "1 more needed")
    becomes(place, "group", "kueue-group-no-quota", "Queued", "WaitingForQueue")
    job = train(place, "group")["spec"]
    assert (job["suspend"], job["parallelism"], job["completions"]) == (True, 2, 2)
    assert [pod for pod in place.children("pods") if pod.startswith("group-") and "-t1-" in pod] == []
    done.set()
    becomes(place, "group", "succeeded-kueue-group", "Succeeded", "Trained")
    assert [pod[:-6] for pod in place.children("pods") if pod.startswith("group-") and "-t1-" in pod] == [
        f"{train(place, 'group')['metadata']['name']}-{index}" for index in (0, 1)
    ]
    assert train(place, "group")["spec"]["parallelism"] == 2


def test_a_workload_that_somebody_deactivates_is_told(team: Place) -> None:
    done = threading.Event()
    team.apply("one", until(done), queue=TEAM, resources=GPU)
    team.reaches("one", "Starting", "Loading")
    name = workload_of(team, train(team, "one"))["metadata"]["name"]
    path = f"{KUEUE}/namespaces/{team.name}/workloads/{name}"
    team.plane.patch(path, {"spec": {"active": False}})
    waits(team, "one", "Inadmissible", "queue team-a: The workload is deactivated")
    becomes(team, "one", "kueue-deactivated", "Queued", "Inadmissible")
    done.set()
    team.plane.patch(path, {"spec": {"active": True}})
    team.reaches("one", "Succeeded", "Trained")
    assert team.kubelet.jobs_of("one") == ["p1", "t1"]


def test_an_admission_check_is_told_in_its_own_words(kueue: Kueue, place: Place) -> None:
    check = {**_named("AdmissionCheck", place.name), "spec": {"controllerName": "example.com/this-test"}}
    place.plane.create(f"{KUEUE}/admissionchecks", check)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    active = {"type": "Active", "status": "True", "reason": "Active", "message": "it is", "lastTransitionTime": now}
    place.plane.patch(f"{KUEUE}/admissionchecks/{place.name}/status", {"status": {"conditions": [active]}})
    open_queue(place, gpus=1, admissionChecksStrategy={"admissionChecks": [{"name": place.name}]})
    place.apply("one", queue=TEAM, resources=GPU)
    waits(place, "one", "WaitingForQueue", f"Quota reserved in ClusterQueue {place.name}; {place.name}: Pending")
    becomes(place, "one", "kueue-admission-check", "Queued", "WaitingForQueue")
    name = workload_of(place, train(place, "one"))["metadata"]["name"]
    ready = {"name": place.name, "state": "Ready", "message": "there is room", "lastTransitionTime": now}
    path = f"{KUEUE}/namespaces/{place.name}/workloads/{name}/status"
    place.plane.patch(path, {"status": {"admissionChecks": [ready]}})
    place.reaches("one", "Succeeded", "Trained")


def test_a_trainer_that_crashes_is_tried_again_through_the_queue(team: Place) -> None:
    team.apply(
        "one",
        lambda role, ordinal: Ends(137) if (role, ordinal) == ("train", 1) else ordinary(role, ordinal),
        queue=TEAM,
        resources=GPU,
    )
    becomes(team, "one", "succeeded-kueue-crashed", "Succeeded", "Trained", seconds=90)
    made = [event["requestObject"] for event in writes(team) if event["verb"] == "create"]
    assert [job["spec"]["suspend"] for job in made] == [False, True, True]
