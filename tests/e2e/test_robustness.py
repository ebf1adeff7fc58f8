"""What befalls the control plane, the network and our objects, and that every job ends as if nothing had happened.

Real processes are killed, stopped and started again; a proxy stands between operator and API server where the network
is what fails. Whatever happens, the status of a job that succeeds is at the end that of golden/status/succeeded.yaml,
which tests/e2e/test_truth.py has recorded of one that nothing disturbed, and each of its Jobs was made once.
"""

import contextlib
import http.client
import json
import select
import signal
import socket
import ssl
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from tests.e2e.goldens import becomes
from tests.e2e.test_operator import (
    TOKEN,
    Document,
    Ends,
    Operator,
    Place,
    Plane,
    Script,
    a_place,
    binaries,
    eventually,
    fails,
    install,
    ordinary,
    passes,
    trained,
)
from tests.e2e.test_truth import Node, of_train, unschedulable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

POOR = "poor"
"""The user of an operator that is no master: API priority and fairness lets masters pass whatever there is."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """etcd forgets old versions every two seconds."""
    binaries()
    running = Plane(tmp_path_factory.mktemp("plane"), server=["--etcd-compaction-interval=2s"], users=[POOR])
    try:
        install(running)
        yield running
    finally:
        running.stop()


@pytest.fixture
def place(plane: Plane, tmp_path: Path) -> Iterator[Place]:
    with a_place(plane, tmp_path) as made:
        yield made


def while_not(done: threading.Event, ends: Ends | None = None) -> Script:
    """Preflight passes; what is trained goes on until then."""
    return lambda role, ordinal: passes() if role == "preflight" else (ends or trained()) if done.is_set() else None


def undisturbed(place: Place, *jobs: str, seconds: float = 60) -> None:
    """They end, or have ended, like one that nothing has disturbed."""
    for job in jobs:
        becomes(place, job, "succeeded", "Succeeded", "Trained", seconds=seconds)
        assert place.kubelet.jobs_of(job) == ["p1", "t1"]


# --- the API server and etcd ---


def away(plane: Plane, seconds: float, *, stopped: bool) -> None:
    """The API server, killed and started again, or stopped in the midst of whatever it does."""
    if stopped:
        plane.signal("kube-apiserver", signal.SIGSTOP)
    else:
        plane.kill("kube-apiserver")
    time.sleep(seconds)
    if stopped:
        plane.signal("kube-apiserver", signal.SIGCONT)
    else:
        plane.start("kube-apiserver")
    eventually("the API server is ready", plane.ready, seconds=90)
    plane.kill("kube-controller-manager")  # it waits longer and longer, too, and is not what is tested
    plane.start("kube-controller-manager")


def outage(plane: Plane, directory: Path, seconds: float, *, stopped: bool, level: str = "info") -> str:
    """One job trains meanwhile, one is new, one has failed, and one comes right after it. Returns the log."""
    with a_place(plane, directory, more=("--log-level", level)) as place:
        done = threading.Event()
        place.apply("failed", lambda role, ordinal: fails(42, "ColumnMissing"))
        place.apply("trains", while_not(done))
        place.reaches("failed", "Failed")
        place.reaches("trains", "Starting", "Loading")
        before = place.get("failed")["metadata"]["resourceVersion"]
        place.apply("new")
        away(plane, seconds, stopped=stopped)
        done.set()
        place.apply("later")
        undisturbed(place, "trains", "new", "later", seconds=90)
        assert place.get("failed")["metadata"]["resourceVersion"] == before
        assert place.operator.process is not None
        assert place.operator.process.is_alive(), "the process lived through it"
        return place.operator.log.read_text()


@pytest.mark.slow
def test_an_api_server_that_is_killed_and_away_for_20_seconds_changes_nothing(plane: Plane, tmp_path: Path) -> None:
    """Its new process knows no old version: watches that ask to go on get 410 Gone, and list anew."""
    log = outage(plane, tmp_path, 20, stopped=False, level="debug")
    assert "Restarting the watch-stream for finetunejobs" in log


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "stopped"])
def test_an_api_server_that_is_away_for_a_minute_changes_nothing(plane: Plane, tmp_path: Path, stopped: bool) -> None:
    assert "Traceback" not in outage(plane, tmp_path, 60, stopped=stopped)


@pytest.mark.slow
def test_an_api_server_that_is_stopped_for_20_seconds_changes_nothing(plane: Plane, tmp_path: Path) -> None:
    assert "Traceback" not in outage(plane, tmp_path, 20, stopped=True)


@pytest.mark.slow
def test_a_leader_whose_api_server_is_away_ends_and_its_next_process_goes_on(plane: Plane, tmp_path: Path) -> None:
    """As Kubernetes starts its container again."""
    with a_place(plane, tmp_path, lease="default/finetune-operator") as place:
        done = threading.Event()
        place.apply("trains", while_not(done))
        place.reaches("trains", "Starting", "Loading")
        away(plane, 15, stopped=False)
        assert place.operator.ended(seconds=30) == 1
        assert "leadership ended: LeadershipLost" in place.operator.log.read_text()
        done.set()
        place.operator.start()
        undisturbed(place, "trains")


def test_an_etcd_that_is_killed_and_starts_again_changes_nothing(place: Place) -> None:
    done = threading.Event()
    place.apply("trains", while_not(done))
    place.reaches("trains", "Starting", "Loading")
    place.plane.kill("etcd")
    done.set()
    time.sleep(4)
    place.plane.start("etcd")
    eventually("the API server is ready", place.plane.ready, seconds=60)
    place.apply("later")
    undisturbed(place, "trains", "later", seconds=90)
    assert place.operator.process is not None
    assert place.operator.process.is_alive()


# --- answers that nobody likes ---

FLOW = "/apis/flowcontrol.apiserver.k8s.io/v1"


@contextlib.contextmanager
def crowded(plane: Plane) -> Iterator[None]:
    """API priority and fairness, with one seat for all requests of a user, who always asks for something large."""
    level = {
        "metadata": {"name": "crowd"},
        "spec": {
            "type": "Limited",
            "limited": {
                "nominalConcurrencyShares": 0,
                "lendablePercent": 0,
                "borrowingLimitPercent": 0,
                "limitResponse": {"type": "Reject"},
            },
        },
    }
    everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
    rule = {
        "subjects": [{"kind": "User", "user": {"name": f"operator-{POOR}"}}],
        "resourceRules": [everything],
        "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
    }
    flow = {
        "metadata": {"name": "crowd"},
        "spec": {"priorityLevelConfiguration": {"name": "crowd"}, "matchingPrecedence": 10, "rules": [rule]},
    }
    plane.create(f"{FLOW}/prioritylevelconfigurations", level)
    plane.create(f"{FLOW}/flowschemas", flow)
    done = threading.Event()

    def ask() -> None:
        connection = api(plane)
        while not done.is_set():
            connection.request("GET", "/openapi/v2", headers={"Authorization": f"Bearer {TOKEN}-{POOR}"})
            connection.getresponse().read()
        connection.close()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        plane.delete(f"{FLOW}/flowschemas/crowd")
        plane.delete(f"{FLOW}/prioritylevelconfigurations/crowd")


def api(plane: Plane) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("127.0.0.1", plane.port, context=ssl._create_unverified_context())


@pytest.mark.slow
def test_429_is_waited_out_and_not_answered_with_more_requests(plane: Plane, tmp_path: Path) -> None:
    with a_place(plane, tmp_path, kubeconfig=plane.kubeconfig_of(POOR)) as place:
        done = threading.Event()
        place.apply("trains", while_not(done))
        place.reaches("trains", "Starting", "Loading")
        refused = lambda: place.operator.counted("finetune_api_requests_total", code="429")  # noqa: E731
        with crowded(plane):
            place.apply("new")
            eventually("it is refused", refused)
            time.sleep(5)
            assert refused() <= 60
        done.set()
        undisturbed(place, "trains", "new", seconds=90)


def test_409_is_answered_with_another_look(place: Place) -> None:
    """Somebody writes the document all the time."""
    done = threading.Event()

    def write(name: str) -> None:
        number = 0
        while not done.wait(0.02):
            number += 1
            place.plane.patch(place.path(name), {"metadata": {"annotations": {"somebody.example.com/n": str(number)}}})

    jobs = [f"job-{number}" for number in range(2)]
    for name in jobs:
        place.apply(name)
    threads = [threading.Thread(target=write, args=(name,), daemon=True) for name in jobs]
    for thread in threads:
        thread.start()
    try:
        conflict = lambda: place.operator.counted("finetune_status_writes_total", outcome="conflict")  # noqa: E731
        eventually("two writers meet", conflict)
        for name in jobs:
            place.reaches(name, "Succeeded", "Trained")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    undisturbed(place, *jobs)


# --- the network ---


class Wire(threading.Thread):
    """Passes bytes between operator and API server; can be late, and can stop without closing anything."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay = 0.0
        """Seconds by which answers are late."""
        self._silent: set[int] = set()
        self._open: set[int] = set()
        self.start()

    def run(self) -> None:
        number = 0
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                number += 1
                self._open.add(number)
                threading.Thread(target=self._pass, args=(number, client), daemon=True).start()

    def silence(self) -> None:
        """Whatever is connected now hears nothing more; new connections do."""
        self._silent |= self._open

    def _pass(self, number: int, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            while True:
                ready, _, _ = select.select([client, server], [], [], 1.0)
                for end in ready:
                    data = end.recv(65536)
                    if number in self._silent:
                        continue
                    if not data:
                        return
                    if end is server and self.delay:
                        time.sleep(self.delay)
                    (client if end is server else server).sendall(data)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def wired(plane: Plane, directory: Path) -> Iterator[tuple[Place, Wire]]:
    wire = Wire(plane.port)
    document = yaml.safe_load(plane.kubeconfig.read_text())
    document["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{wire.port}"
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    with a_place(plane, directory, kubeconfig=path) as place:
        yield place, wire
    wire.close()


@pytest.mark.slow
def test_a_watch_that_silently_stops_is_made_good_within_two_minutes(plane: Plane, tmp_path: Path) -> None:
    """No connection is closed, and not a byte comes any more: nobody tells the operator."""
    with wired(plane, tmp_path) as (place, wire):
        done = threading.Event()
        place.apply("trains", while_not(done))
        place.apply("deleted", while_not(threading.Event()))
        place.reaches("trains", "Starting", "Loading")
        place.reaches("deleted", "Starting", "Loading")
        wire.silence()
        done.set()
        place.plane.delete(place.path("deleted"))
        place.apply("new")
        for job in ("trains", "new"):  # a Job may be known to be done before its pods are: then preflight looks again
            becomes(place, job, "succeeded", "Succeeded", "Trained", seconds=120)
            assert [made for made in place.kubelet.jobs_of(job) if made[0] == "t"] == ["t1"]
        gone = 'finetune_jobs{phase="Starting"'
        eventually("what is gone is known", lambda: gone not in (place.operator.page("/metrics") or ""), seconds=90)


@pytest.mark.slow
def test_slow_watches_double_nothing(plane: Plane, tmp_path: Path) -> None:
    """Each answer, and each event of a watch, comes half a second late."""
    with wired(plane, tmp_path) as (place, wire):
        place.apply("first")
        undisturbed(place, "first")
        wire.delay = 0.5
        jobs = [f"job-{number}" for number in range(3)]
        for name in jobs:
            place.apply(name)
        undisturbed(place, *jobs, seconds=90)


# --- operators ---


@pytest.mark.slow
def test_two_operators_without_an_election_double_nothing(place: Place, tmp_path: Path) -> None:
    """Nobody should, but somebody may."""
    other = Operator(place.plane, [place.name], tmp_path / "other.log", place.plane.kubeconfig_of("two"))
    other.start()
    try:
        eventually("both work", lambda: place.operator.leads() and other.leads())
        jobs = [f"job-{number}" for number in range(6)]
        for name in jobs:
            place.apply(name)
        undisturbed(place, *jobs)
        assert all("Traceback" not in log.read_text() for log in (place.operator.log, other.log))
    finally:
        other.kill()


def test_whoever_leads_says_the_same_and_who_follows_writes_nothing(plane: Plane, tmp_path: Path) -> None:
    lease, done = "default/whoever", threading.Event()
    with a_place(plane, tmp_path, kubeconfig=plane.kubeconfig_of("one"), lease=lease) as place:
        eventually("the first one leads", place.operator.leads)
        other = Operator(plane, [place.name], tmp_path / "other.log", plane.kubeconfig_of("two"), lease=lease)
        other.start()
        try:
            eventually("the second one follows", other.follows)
            before = len(plane.writes("two"))
            place.apply("trains", while_not(done))
            place.apply("fails", lambda role, ordinal: fails(42, "ColumnMissing"))
            place.apply("first")
            undisturbed(place, "first")
            going = becomes(place, "trains", "starting", "Starting", "Loading")
            failed = becomes(place, "fails", "failed-data", "Failed", "ColumnMissing")
            assert len(plane.writes("two")) == before
            place.operator.signal(signal.SIGTERM)
            assert place.operator.ended() == 0
            eventually("the second one leads", other.leads)
            wrote = len(plane.writes("one"))
            place.apply("second")
            undisturbed(place, "second")
            for name, seen in (("trains", going), ("fails", failed)):
                version = place.get(name)["metadata"]["resourceVersion"]
                assert version == seen["metadata"]["resourceVersion"], f"{name}: nothing has changed but who leads"
            place.operator.start()
            eventually("the first one follows", place.operator.follows)
            done.set()
            undisturbed(place, "trains")
            assert len(plane.writes("one")) == wrote
        finally:
            other.kill()


@pytest.mark.slow
def test_a_newer_operator_takes_over_what_runs(place: Place) -> None:
    done = threading.Event()
    place.apply("trains", while_not(done))
    place.reaches("trains", "Starting", "Loading")
    place.operator.kill()
    place.operator.version = "2"
    place.operator.start()
    place.apply("new")
    done.set()
    undisturbed(place, "trains", "new")
    images = {job["metadata"]["name"][:3]: image_of(job) for job in train_jobs(place)}
    assert images == {"tra": "trainer:1", "new": "trainer:2"}


def train_jobs(place: Place) -> list[Document]:
    jobs = place.plane.items(f"/apis/batch/v1/namespaces/{place.name}/jobs")
    return [job for job in jobs if job["metadata"]["labels"]["finetune.dev/role"] == "train"]


def image_of(job: Document) -> str:
    return str(job["spec"]["template"]["spec"]["containers"][0]["image"])


@pytest.mark.slow
def test_a_clock_that_jumps_by_a_year_ends_no_job_and_costs_nothing(plane: Plane, tmp_path: Path) -> None:
    """The operator's own, forwards, then as far back."""
    offset = tmp_path / "offset"
    offset.write_text("0")
    program = tmp_path / "shifted.py"
    program.write_text(SHIFTED.format(path=str(offset)))
    with a_place(plane, tmp_path, cold=True, program=(str(program),)) as place:
        done = threading.Event()
        bounds = {"deadline": "1h", "budget": {"gpuHours": 1}, "resources": {"perNode": {"gpus": 1}}}
        place.apply("trains", while_not(done), **bounds)
        place.apply("waits", lambda role, ordinal: fails(49, "BucketNotFound"))
        place.reaches("trains", "Starting", "Loading")
        place.reaches("waits", "Pending", "BucketNotFound")
        for seconds in (365 * 86400, -365 * 86400):
            offset.write_text(str(seconds))
            looked = looks(place.operator)
            eventually("it looks again", lambda looked=looked: looks(place.operator) > looked)
            time.sleep(3)
            becomes(place, "trains", "starting", "Starting", "Loading")
            becomes(place, "waits", "pending-bucket", "Pending", "BucketNotFound")
        done.set()
        undisturbed(place, "trains")
        usage = place.status("trains")["usage"]
        assert usage["runningSeconds"] < 60
        assert usage["gpuSeconds"] < 60


def looks(operator: Operator) -> float:
    return operator.counted("finetune_reconciles_total")


SHIFTED = """\
import datetime, pathlib, sys
from finetune_operator import reconcile
from finetune_operator.__main__ import main

class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        shift = datetime.timedelta(seconds=float(pathlib.Path("{path}").read_text() or 0))
        return datetime.datetime.now(tz) + shift

reconcile.datetime = Shifted
sys.exit(main())
"""


# --- people ---


NO_GPU = "0/8 nodes are available: 8 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize("by", ["null", pytest.param("lies", marks=pytest.mark.slow)])
def test_a_status_that_somebody_wiped_is_found_out_again(plane: Plane, tmp_path: Path, by: str) -> None:
    """From the Jobs that are there: the train Job carries what preflight had counted."""
    done = threading.Event()
    with a_place(plane, tmp_path, node=Node) as place:
        assert isinstance(place.kubelet, Node)
        place.kubelet.troubles["queued"] = of_train(unschedulable(NO_GPU))
        for name in ("trains", "queued", "suspended"):
            place.apply(name, while_not(done))
        place.apply("done")
        place.apply("failed", lambda role, ordinal: fails(42, "ColumnMissing"))
        place.reaches("suspended", "Starting", "Loading")
        place.plane.patch(place.path("suspended"), {"spec": {"suspend": True}})
        place.reaches("suspended", "Suspended", "Suspended")
        place.reaches("trains", "Starting", "Loading")
        place.reaches("queued", "Queued", "Unschedulable")
        place.reaches("done", "Succeeded")
        place.reaches("failed", "Failed")
        for name in ("trains", "queued", "suspended", "done", "failed"):
            place.plane.patch(f"{place.path(name)}/status", {"status": None if by == "null" else LIES})
        becomes(place, "failed", "failed-data", "Failed", "ColumnMissing")
        becomes(place, "suspended", "suspended-wiped", "Suspended", "Suspended")
        becomes(place, "queued", "queued-unschedulable-wiped", "Queued", "Unschedulable")
        becomes(place, "trains", "starting-wiped", "Starting", "Loading")
        done.set()
        del place.kubelet.troubles["queued"]
        for name in ("trains", "queued", "done"):
            becomes(place, name, "succeeded-wiped", "Succeeded", "Trained")
            assert place.kubelet.jobs_of(name) == ["p1", "t1"]
        assert place.kubelet.jobs_of("failed") == ["p1"]
        place.plane.patch(place.path("suspended"), {"spec": {"suspend": False}})
        becomes(place, "suspended", "succeeded-wiped-resumed", "Succeeded", "Trained")


LIES = {
    "phase": "Training",
    "message": "一切都好",
    "conditions": [],
    "preflight": None,
    "restarts": None,
    "run": None,
    "usage": None,
}


def test_what_was_wiped_and_has_no_jobs_any_more_is_asked_of_storage(place: Place) -> None:
    place.apply("one")
    place.reaches("one", "Succeeded")
    place.kubelet.scripts["one"] = lambda role, ordinal: passes("Reused") if role == "preflight" else None
    for job in place.children("jobs"):
        place.plane.delete(f"/apis/batch/v1/namespaces/{place.name}/jobs/{job}")
    eventually("they are gone", lambda: not place.children("jobs") and not place.children("pods"))
    place.plane.patch(f"{place.path('one')}/status", {"status": None})
    becomes(place, "one", "reused", "Succeeded", "Reused")


def config_path(place: Place, job: str) -> str:
    uid = place.get(job)["metadata"]["uid"]
    return f"/api/v1/namespaces/{place.name}/configmaps/{job}-{uid[:5]}-g1"


def test_a_pinned_config_map_can_be_deleted_but_not_changed(place: Place) -> None:
    done = threading.Event()
    place.apply("one", while_not(done))
    place.reaches("one", "Starting", "Loading")
    path = config_path(place, "one")
    with pytest.raises(urllib.error.HTTPError) as caught:
        place.plane.patch(path, {"data": {"config.json": "{}"}})
    assert "field is immutable when `immutable` is set" in caught.value.read().decode()
    before = place.plane.get(path)
    place.plane.delete(path)
    after = eventually("it is made again", lambda: _there(place, path, but=before["metadata"]["uid"]))
    assert after["data"] == before["data"]
    done.set()
    undisturbed(place, "one")


def _there(place: Place, path: str, *, but: str) -> Document | None:
    with contextlib.suppress(urllib.error.HTTPError):
        found = place.plane.get(path)
        return found if found["metadata"]["uid"] != but else None
    return None


def test_a_config_map_without_its_label_is_told_until_it_has_it_again(place: Place) -> None:
    done = threading.Event()
    place.apply("one", while_not(done))
    place.reaches("one", "Starting", "Loading")
    path, label = config_path(place, "one"), "app.kubernetes.io/managed-by"
    place.plane.patch(path, {"metadata": {"labels": {label: None}}})
    becomes(place, "one", "starting-label-lost", "Starting", "LabelLost")
    place.plane.patch(path, {"metadata": {"labels": {label: "finetune-operator"}}})
    place.reaches("one", "Starting", "Loading")
    done.set()
    undisturbed(place, "one")


def test_a_train_job_without_its_label_ends_when_its_document_is_suspended(place: Place) -> None:
    """No watch shows it any more, but its pods."""
    place.apply("one", lambda role, ordinal: passes() if role == "preflight" else None)
    place.reaches("one", "Starting", "Loading")
    (job,) = train_jobs(place)
    path = f"/apis/batch/v1/namespaces/{place.name}/jobs/{job['metadata']['name']}"
    place.plane.patch(path, {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}})
    status = place.reaches("one", "Queued", "StoppingPreviousRun")
    assert f"of this run goes on, and its Job {job['metadata']['name']} is not found" in status["message"]
    place.plane.patch(place.path("one"), {"spec": {"suspend": True}})
    place.reaches("one", "Suspended", "Suspended")
    eventually("the GPU is free", lambda: not [pod for pod in place.children("pods") if "-t1-" in pod])


def test_a_train_job_that_somebody_deletes_is_made_again_after_a_look_at_storage(place: Place) -> None:
    place.apply("one", lambda role, ordinal: None if (role, ordinal) == ("train", 1) else ordinary(role, ordinal))
    place.reaches("one", "Starting", "Loading")
    (job,) = train_jobs(place)
    place.plane.delete(f"/apis/batch/v1/namespaces/{place.name}/jobs/{job['metadata']['name']}")
    becomes(place, "one", "succeeded-job-deleted", "Succeeded", "Trained")
    assert [job for job in place.kubelet.jobs_of("one") if job[0] == "t"] == ["t1", "t2"]


def test_names_may_be_as_long_as_kubernetes_allows(place: Place) -> None:
    """253 characters, with dots and hyphens where names of children are cut; and one more is refused."""
    longest = f"{'a' * 39}-.{'b.c-d' * 42}"
    longest = f"{longest[:252].rstrip('-.')}".ljust(253, "z").replace("-.", "-x")
    assert len(longest) == 253
    place.apply(longest, resources={"nodes": 2, "perNode": {"gpus": 0}})
    job = becomes(place, longest, "succeeded-several", "Succeeded", "Trained")
    assert place.children("services")
    events = place.plane.items(f"/api/v1/namespaces/{place.name}/events?limit=500")
    told = [event["reason"] for event in events if event["involvedObject"]["name"] == job["metadata"]["name"]]
    assert "Trained" in told
    with pytest.raises(urllib.error.HTTPError) as caught:
        place.apply(f"{longest}z")
    assert "must be no more than 253" in caught.value.read().decode()


UNICODE = {
    "task": {
        "type": "text-classification",
        "columns": {"text": "текст", "label": "étiquette ✓"},
        "labels": ["возврат", "請求書", "🦊 fox", "مرحبا", "e\u0301 and \u00e9", "tab\tand\nline"],
    },
    "model": {"uri": "s3://models/modèle-基"},
    "data": {"train": [{"uri": "s3://data/данные/日本語.jsonl"}], "validation": {"fraction": 0.1, "groupBy": "客户"}},
    "evaluation": {"slices": ["регион", "🌍"]},
    "output": {"uri": "s3://models/ünïcode/🦊"},
    "podTemplate": {"spec": {"env": [{"name": "MOTTO", "value": "żółw \u202e ∑"}]}},
}


def test_unicode_comes_through_whole_wherever_text_is_free(place: Place) -> None:
    words = "s3://data/данные/日本語.jsonl: line 7: no label 🦊 \u202e e\u0301 \u0007" + "長" * 300
    place.apply("good", **UNICODE)
    place.apply("bad", lambda role, ordinal: Ends(42, {"code": 42, "reason": "ColumnMissing", "message": words}))
    place.plane.patch(place.path("good"), {"metadata": {"annotations": {"finetune.dev/retry": "снова 🦊"}}})
    becomes(place, "good", "succeeded-unicode", "Succeeded", "Trained")
    becomes(place, "bad", "failed-unicode", "Failed", "ColumnMissing")
    config = json.loads(place.plane.get(config_path(place, "good"))["data"]["config.json"])
    text = json.dumps(config, ensure_ascii=False)
    for part in (*UNICODE["task"]["labels"][:4], "étiquette ✓", "日本語.jsonl", "客户", "🌍", "ünïcode/🦊"):  # type: ignore[index]
        assert part in text
    versions = [place.get(name)["metadata"]["resourceVersion"] for name in ("good", "bad")]
    time.sleep(2)
    assert [place.get(name)["metadata"]["resourceVersion"] for name in ("good", "bad")] == versions


# --- many others ---

OTHERS = 10_000


def create_others(plane: Plane, namespace: str, numbers: range) -> None:
    """Jobs that nobody runs, over one connection."""
    connection = api(plane)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    container = {"name": "other", "image": "other"}
    for number in numbers:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"other-{number}", "labels": {"app": "other"}},
            "spec": {
                "managedBy": "example.com/nobody",
                "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
            },
        }
        connection.request("POST", f"/apis/batch/v1/namespaces/{namespace}/jobs", json.dumps(job), headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 201, answer.status
    connection.close()


def resident(operator: Operator) -> float:
    """MiB of memory that the process has."""
    assert operator.process is not None
    status = Path(f"/proc/{operator.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def requests_in(operator: Operator, seconds: float) -> float:
    before = operator.counted("finetune_api_requests_total")
    time.sleep(seconds)
    return operator.counted("finetune_api_requests_total") - before


@pytest.mark.slow
def test_ten_thousand_jobs_of_others_cost_neither_memory_nor_requests(place: Place) -> None:
    """In the very namespace that it watches. Half a minute holds one comparison of all five kinds, or none."""
    place.apply("before", while_not(threading.Event()))
    place.reaches("before", "Starting", "Loading")
    requests, memory = requests_in(place.operator, 30), resident(place.operator)
    with ThreadPoolExecutor(8) as pool:
        parts = [range(start, OTHERS, 8) for start in range(8)]
        list(pool.map(lambda part: create_others(place.plane, place.name, part), parts))
    assert abs(requests_in(place.operator, 30) - requests) <= 5 + 3
    assert resident(place.operator) - memory < 8
    place.apply("after")
    undisturbed(place, "after", seconds=30)
    place.operator.kill()
    place.operator.start()
    eventually("it knows the cluster", lambda: place.operator.page("/readyz") == "ok\n")
    place.apply("anew")
    undisturbed(place, "anew", seconds=30)
    assert resident(place.operator) - memory < 8
