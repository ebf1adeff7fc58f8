"""What the status says of each phase and each wait, on a real control plane, compared with whole documents.

All jobs of the first table live in one namespace at the same time; this test is the kubelet and the scheduler of their
pods, with the troubles that these have. goldens.py says how the files are written.
"""

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.e2e.goldens import becomes, masked_text, same
from tests.e2e.test_operator import (
    RESULT,
    Document,
    Ends,
    Kubelet,
    Operator,
    Place,
    Plane,
    Script,
    StandIn,
    _number,
    a_plane,
    eventually,
    ordinary,
    passes,
    trained,
)

from finetune_api.contract import PROGRESS_PORT
from finetune_api.status import Phase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

Trouble = Callable[[Document], Document | None]
"""From a pod to the status that it has instead of running; an empty one: nothing happens to it; None: all is well."""
GPU = {"perNode": {"gpus": 1}}
SHUTDOWN = "Pod was terminated in response to imminent node shutdown."
NO_GPU = (
    "Allocate failed due to requested number of devices unavailable for nvidia.com/gpu. Requested: 1, Available: 0, "
    "which is unexpected"
)
PULL = 'failed to pull and unpack image "registry.example.com/trainer:1": failed to resolve reference: not found'
OTHER, ANOTHER = "b" * 16, "c" * 16
"""Runs whose trainers answer."""


# --- nodes with troubles ---


class Node(Kubelet):
    """Kubelet and scheduler of one namespace."""

    def __init__(self, plane: Plane, namespace: str) -> None:
        self.troubles: dict[str, Trouble] = {}
        """Of pods, by the FineTuneJob."""
        self.lingering: set[str] = set()
        """FineTuneJobs whose pods do not end though they are asked to."""
        self.last_words: dict[str, Ends] = {}
        """Of pods that are asked to end, by the FineTuneJob."""
        self._told: dict[str, str] = {}
        super().__init__(plane, namespace)

    def _tend(self, path: str, pod: Document) -> None:
        meta = pod["metadata"]
        owner = meta["ownerReferences"][0]["name"].rpartition("-")[0].rpartition("-")[0]
        trouble = self.troubles.get(owner)
        asked = "deletionTimestamp" in meta
        if asked and owner in self.lingering:
            return
        if asked and owner in self.last_words and pod["status"].get("phase") == "Running":
            self._end(path, pod, self.last_words[owner])
            return
        status = trouble(pod) if trouble is not None and not asked else None
        if status is None:
            super()._tend(path, pod)
        elif status and self._told.get(meta["uid"]) != json.dumps(status):
            self.plane.patch(f"{path}/status", {"status": status})
            self._told[meta["uid"]] = json.dumps(status)


def of_train(trouble: Trouble) -> Trouble:
    """Pods of preflight have none."""
    return lambda pod: trouble(pod) if pod["metadata"]["labels"]["finetune.dev/role"] == "train" else None


def of_first_attempt(trouble: Trouble) -> Trouble:
    """Pods of others have none."""
    return lambda pod: trouble(pod) if "-t1-" in pod["metadata"]["name"] else None


def placed(pod: Document) -> bool:
    return "nodeName" in pod["spec"]


def container_of(pod: Document, **state: Document) -> Document:
    """What a kubelet says of a container that does not run."""
    name = pod["spec"]["containers"][0]["name"]
    return {"name": name, "image": "i", "imageID": "", "restartCount": 0, "ready": False, "state": state}


def waits(reason: str, message: str = "") -> Trouble:
    """On its node, where the container does not start."""

    def trouble(pod: Document) -> Document | None:
        if not placed(pod):
            return None
        waiting = {"reason": reason, **({"message": message} if message else {})}
        taken = {"startTime": pod["metadata"]["creationTimestamp"]}
        return {**taken, "containerStatuses": [container_of(pod, waiting=waiting)]}

    return trouble


def refused(reason: str, message: str) -> Trouble:
    """By its node, before a container runs."""

    def trouble(pod: Document) -> Document | None:
        said = {"phase": "Failed", "reason": reason, "message": f"Pod was rejected: {message}"}
        return {**said, "startTime": pod["metadata"]["creationTimestamp"]} if placed(pod) else None

    return trouble


def injected_container_fails(pod: Document) -> Document | None:
    """One that something has put before ours, which then never begins."""
    if not placed(pod):
        return None
    waiting = container_of(pod, waiting={"reason": "PodInitializing"})
    return {"phase": "Failed", "startTime": pod["metadata"]["creationTimestamp"], "containerStatuses": [waiting]}


def unschedulable(message: str) -> Trouble:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return lambda pod: None if placed(pod) else {"conditions": [condition]}


def forgotten(pod: Document) -> Document | None:
    """No scheduler looks at it."""
    return None if placed(pod) else {}


# --- the jobs ---


@dataclass(frozen=True)
class Case:
    """What befalls a FineTuneJob, and what it comes to."""

    phase: str
    reason: str
    script: Script = ordinary
    trouble: Trouble | None = None
    spec: Document = field(default_factory=dict)
    then: Callable[[Place, str], None] | None = None
    """What somebody does once it is applied."""


def only_train(*ends: Ends | None) -> Script:
    """Preflight passes; then how attempts end, the last of them for ever."""
    return lambda role, ordinal: passes() if role == "preflight" else ends[min(ordinal, len(ends)) - 1]


def train_of(run: str) -> Script:
    return lambda role, ordinal: passes(run=run) if role == "preflight" else None


def preflight(ends: Ends | None) -> Script:
    return lambda role, ordinal: ends if role == "preflight" else None


def storage_that_goes_away() -> Script:
    """While it trains; the preflight after that looks for it for ever."""
    gone = threading.Event()

    def script(role: str, ordinal: int) -> Ends | None:
        if role == "train":
            gone.set()
            return said(49, "StorageUnavailable")
        return None if gone.is_set() else passes()

    return script


IN_USE = 'Multi-Attach error for volume "cache" Volume is already exclusively attached to one node'
SEEN = 1.0
"""Seconds after which the operator has surely seen a pod run: that it did is told."""


def said(code: int, reason: str, **fields: Any) -> Ends:
    return Ends(code, {"code": code, "reason": reason, "message": f"{reason}, says the pod", **fields}, after=SEEN)


GATE = {"metric": "f1", "passed": False, "value": 0.9, "wanted": ">= 0.95"}
GATED = {**RESULT, "evaluation": {"on": "test", "rows": 9, "tuned": {"f1": 0.9}, "gates": [GATE]}}
UNMET = said(48, "GateNotMet", runId="a" * 16, result=GATED)
CRASH = Ends(1, after=SEEN)
LOST = ("again-node-lost", "again-node-gone", "lost-in-queue")
"""Of what happens to its pods on a node that is lost nobody hears."""
LINGERING = ("suspending", "changed-suspending", "again-pod-deleted", *LOST)
"""Their pods do not end though they are asked to."""
RESUMES = said(0, "Resume", preflight={"state": "Resume", "runId": "a" * 16, "step": 30, "summary": {"labels": 2}})
COMPLETED = said(0, "Completed", runId="a" * 16, result={**RESULT, "finalStep": 30, "partial": True})


def pods_of(place: Place, job: str, tail: str) -> list[str]:
    return [pod for pod in place.children("pods") if pod.startswith(f"{job}-") and f"-{tail}-" in pod]


def pod_path(place: Place, job: str, tail: str) -> str:
    (pod,) = pods_of(place, job, tail)
    return f"/api/v1/namespaces/{place.name}/pods/{pod}"


def job_path(place: Place, job: str, tail: str) -> str:
    uid = place.get(job)["metadata"]["uid"]
    return f"/apis/batch/v1/namespaces/{place.name}/jobs/{job}-{uid[:5]}-{tail}"


def suspend(place: Place, job: str) -> None:
    place.reaches(job, "Starting", "Loading")
    place.plane.patch(place.path(job), {"spec": {"suspend": True}})


def suspend_and_change(place: Place, job: str) -> None:
    suspend(place, job)
    place.reaches(job, "Suspended", "Suspending")
    change(place, job, place.kubelet.scripts[job])


def change(place: Place, job: str, script: Script, *, rate: float = 1e-3) -> None:
    """Another learning rate is another run, of which the script tells."""
    place.kubelet.scripts[job] = script
    place.plane.patch(place.path(job), {"spec": {"training": {"learningRate": rate}}})


def suspend_the_job_itself(place: Place, job: str) -> None:
    place.reaches(job, "Starting", "Loading")
    place.plane.patch(job_path(place, job, "t1"), {"spec": {"suspend": True}})


def taken_away(reason: str, message: str) -> Callable[[Place, str], None]:
    """As the scheduler, the eviction API and the taint manager do: the condition first, then the deletion."""

    def act(place: Place, job: str) -> None:
        place.reaches(job, "Starting", "Loading")
        path = pod_path(place, job, "t1")
        conditions = [disruption(reason, message), {"type": "Ready", "status": str(job not in LOST)}]
        place.plane.patch(f"{path}/status", {"status": {"conditions": conditions}})
        place.plane.delete(path)

    return act


def disruption(reason: str, message: str) -> Document:
    return {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}


def its_node_is_gone(place: Place, job: str) -> None:
    """As the pod garbage collector does it, which waits for nobody."""
    place.reaches(job, "Starting", "Loading")
    path = pod_path(place, job, "t1")
    target = disruption("DeletionByPodGC", "PodGC: node no longer exists")
    place.plane.patch(f"{path}/status", {"status": {"phase": "Failed", "conditions": [target]}})
    place.plane.delete(path, grace=0)


def ended_by_its_node(ends: Ends, word: str, **status: Any) -> Callable[[Place, str], None]:
    """As a kubelet does it, which deletes no pod."""

    def act(place: Place, job: str) -> None:
        place.reaches(job, "Starting", "Loading")
        path = pod_path(place, job, "t1")
        last = {"message": json.dumps(ends.message)} if ends.message is not None else {}
        ended = container_of(place.plane.get(path), terminated={"exitCode": ends.code, "reason": word, **last})
        place.plane.patch(f"{path}/status", {"status": {"phase": "Failed", "containerStatuses": [ended], **status}})

    return act


def delete_its_pod(*, grace: int | None = None) -> Callable[[Place, str], None]:
    """By hand: nothing says why."""

    def act(place: Place, job: str) -> None:
        place.reaches(job, "Starting", "Loading")
        place.plane.delete(pod_path(place, job, "t1"), grace=grace)

    return act


def delete_the_train_job(place: Place, job: str) -> None:
    place.reaches(job, "Starting", "Loading")
    place.plane.delete(job_path(place, job, "t1"))


def a_change_that_is_refused(place: Place, job: str) -> None:
    place.reaches(job, "Starting", "Loading")
    change(place, job, preflight(said(42, "ColumnMissing")))


def a_volume_is_elsewhere(place: Place, job: str) -> None:
    """As the cluster tells it, which then says of the pod itself no more than that its container is being created."""
    place.reaches(job, "Starting", "PodsStarting")
    path = pod_path(place, job, "t1")
    meta = place.plane.get(path)["metadata"]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    of = {"apiVersion": "v1", "kind": "Pod", "namespace": place.name, "name": meta["name"], "uid": meta["uid"]}
    told = {"FailedAttachVolume": IN_USE, "FailedMount": "unmounted volumes=[cache]: timed out"}
    for reason, message in told.items():
        event: Document = {"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": "volume-"}}
        event |= {"involvedObject": of, "type": "Warning", "reason": reason, "message": message, "lastTimestamp": now}
        place.plane.create(f"/api/v1/namespaces/{place.name}/events", event)


CASES: dict[str, Case] = {
    # What lasts for a minute only comes first.
    "queued": Case("Queued", "PreflightPassed", trouble=of_train(forgotten)),
    "queued-first-group": Case(
        "Queued", "PreflightPassed", trouble=of_train(forgotten), spec={"resources": {"nodes": 2, **GPU}}
    ),
    "again-fenced": Case("Preflight", "Fenced", only_train(said(44, "Fenced"))),
    "pending-bucket": Case("Pending", "BucketNotFound", preflight(said(49, "BucketNotFound"))),
    "pending-profile": Case("Pending", "ProfileNotFound", spec={"profile": "nobody-made-it"}),
    "pending-kueue": Case("Pending", "KueueNotInstalled", spec={"queue": {"name": "team-a"}}),
    "pending-quota": Case(
        "Pending", "PodsRefused", spec={"podTemplate": {"spec": {"priorityClassName": "without-quota"}}}
    ),
    "preflight": Case("Preflight", "Checking", preflight(None)),
    "preflight-unschedulable": Case(
        "Preflight", "Unschedulable", trouble=unschedulable("0/3 nodes are available: 3 Insufficient cpu.")
    ),
    "preflight-image": Case("Pending", "ImagePullBackOff", trouble=waits("ErrImagePull", PULL)),
    "queued-unschedulable": Case(
        "Queued",
        "Unschedulable",
        trouble=of_train(unschedulable("0/8 nodes are available: 8 Insufficient nvidia.com/gpu.")),
    ),
    "queued-suspended": Case("Queued", "JobSuspended", only_train(None), then=suspend_the_job_itself),
    "starting": Case("Starting", "Loading", only_train(None)),
    "starting-container": Case("Starting", "PodsStarting", trouble=of_train(waits("ContainerCreating"))),
    "starting-image": Case("Starting", "ImagePullBackOff", trouble=of_train(waits("ErrImagePull", PULL))),
    "starting-image-name": Case(
        "Starting", "InvalidImageName", trouble=of_train(waits("InvalidImageName", 'couldn\'t parse image name "a b"'))
    ),
    "starting-secret": Case(
        "Starting",
        "SecretNotFound",
        trouble=of_train(waits("CreateContainerConfigError", 'secret "hub-token" not found')),
    ),
    "starting-config-map": Case(
        "Starting",
        "ConfigMapNotFound",
        trouble=of_train(waits("CreateContainerConfigError", 'configmap "proxies" not found')),
    ),
    "starting-mount": Case(
        "Starting", "FailedAttachVolume", trouble=of_train(waits("ContainerCreating")), then=a_volume_is_elsewhere
    ),
    "again-preempted": Case(
        "Starting",
        "Loading",
        only_train(None),
        then=taken_away("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"),
    ),
    "again-evicted": Case(
        "Starting",
        "Loading",
        only_train(None),
        then=taken_away("EvictionByEvictionAPI", "Eviction API: evicting"),
    ),
    "again-node-lost": Case(
        "Starting",
        "Loading",
        only_train(None),
        then=taken_away("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
    ),
    "again-node-gone": Case("Starting", "Loading", only_train(None), then=its_node_is_gone),
    "again-node-shuts-down": Case(
        "Starting",
        "Loading",
        only_train(None),
        then=ended_by_its_node(
            said(45, "Stopped"),
            "Error",
            reason="Terminated",
            message=SHUTDOWN,
            conditions=[disruption("TerminationByKubelet", SHUTDOWN)],
        ),
    ),
    "again-node-started-anew": Case(
        "Starting", "Loading", only_train(None), then=ended_by_its_node(Ends(137), "ContainerStatusUnknown")
    ),
    "again-pod-stopped": Case("Starting", "Loading", only_train(None), then=delete_its_pod()),
    "again-pod-deleted": Case("Starting", "Loading", only_train(None), then=delete_its_pod(grace=0)),
    "again-pod-refused": Case(
        "Starting", "Loading", only_train(None), trouble=of_first_attempt(refused("UnexpectedAdmissionError", NO_GPU))
    ),
    "again-pod-not-started": Case(
        "Starting", "Loading", only_train(None), trouble=of_first_attempt(injected_container_fails)
    ),
    "again-job-deleted": Case("Starting", "Loading", only_train(None), then=delete_the_train_job),
    "again-crashed": Case("Starting", "Loading", only_train(CRASH, None)),
    "again-memory": Case("Starting", "Loading", only_train(said(50, "OutOfMemory"), None)),
    "again-storage": Case("Pending", "StorageUnavailable", storage_that_goes_away()),
    "changed-refused": Case("Starting", "ColumnMissing", only_train(None), then=a_change_that_is_refused),
    "suspending": Case("Suspended", "Suspending", only_train(None), then=suspend),
    "changed-suspending": Case("Suspended", "Suspending", only_train(None), then=suspend_and_change),
    "suspended": Case("Suspended", "Suspended", only_train(None), then=suspend),
    "applied-suspended": Case("Suspended", "Suspended", spec={"suspend": True}),
    "failed-data": Case("Failed", "ColumnMissing", preflight(said(42, "ColumnMissing"))),
    "failed-profile": Case("Failed", "EndpointNotAllowed", spec={"storage": {"endpoint": "http://elsewhere:1"}}),
    "failed-diverged": Case("Failed", "Diverged", only_train(said(47, "Diverged"))),
    "failed-gate": Case("Failed", "GateNotMet", only_train(UNMET)),
    "failed-crash": Case("Failed", "Crashed", only_train(CRASH), spec={"retries": {"max": 0}}),
    "failed-preflight": Case("Failed", "Crashed", preflight(CRASH), spec={"retries": {"max": 0}}),
    "failed-budget": Case(
        "Failed",
        "BudgetExhausted",
        only_train(None),
        spec={"budget": {"gpuHours": 0.004, "onExhausted": "Fail"}, "resources": GPU},
    ),
    "succeeded": Case("Succeeded", "Trained"),
    "reused": Case("Succeeded", "Reused", preflight(passes("Reused"))),
    "stopped-at-best": Case(
        "Succeeded",
        "StoppedAtBest",
        lambda role, ordinal: RESUMES if role == "preflight" else None if ordinal == 1 else COMPLETED,
        spec={"budget": {"gpuHours": 0.004}, "resources": GPU},
    ),
}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with a_plane(tmp_path_factory.mktemp("plane")) as running:
        _priority_without_quota(running)
        yield running


def _priority_without_quota(plane: Plane) -> None:
    priority = {"metadata": {"name": "without-quota"}, "value": 1, "preemptionPolicy": "Never"}
    plane.create("/apis/scheduling.k8s.io/v1/priorityclasses", priority)


@pytest.fixture(scope="module")
def place(plane: Plane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """With a job for each case, and some more."""
    name = f"truth-{next(_number)}"
    plane.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    _quota(plane, name)
    kubelet = Node(plane, name)
    kubelet.address = address()
    operator = Operator(plane, [name], tmp_path_factory.mktemp("truth") / "operator.log", plane.kubeconfig_of("one"))
    operator.start()
    made = Place(plane, name, kubelet, operator)
    try:
        for job, case in CASES.items():
            _apply(made, job, case)
        with ThreadPoolExecutor(4) as people:
            list(people.map(lambda job: _befall(made, job), CASES))
        yield made
    finally:
        operator.kill()
        kubelet.close()


def _quota(plane: Plane, namespace: str) -> None:
    """For the pods of one priority class."""
    scope = {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["without-quota"]}]}
    spec = {"hard": {"pods": "0"}, "scopeSelector": scope}
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    plane.create(path, {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": spec})
    eventually("the quota counts", lambda: "hard" in plane.get(f"{path}/none").get("status", {}))


def _apply(place: Place, job: str, case: Case) -> None:
    assert isinstance(place.kubelet, Node)
    if case.trouble is not None:
        place.kubelet.troubles[job] = case.trouble
    if job in LINGERING:
        place.kubelet.lingering.add(job)
    place.apply(job, case.script, **case.spec)


def _befall(place: Place, job: str) -> None:
    then = CASES[job].then
    if then is not None:
        then(place, job)


def address() -> str:
    """Of this machine, on which an API server reaches what answers for pods: it does not ask the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only finds out which address would be used
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("name", CASES)
def test_the_status_is_the_golden_one(place: Place, name: str) -> None:
    case = CASES[name]
    becomes(place, name, name, case.phase, case.reason)


def test_what_is_tried_again_says_when(place: Place) -> None:
    """Five seconds after a crash, ten after storage was away."""
    place.apply("crashes", only_train(CRASH, None))
    place.apply("cannot-store", storage_that_goes_away())
    becomes(place, "crashes", "again-crashed-waits", "Starting", "Crashed")
    becomes(place, "cannot-store", "again-storage-waits", "Pending", "StorageUnavailable")


def test_what_waits_for_a_group_or_a_twin_names_it(place: Place) -> None:
    place.apply("group-two", only_train(None), resources={"nodes": 2, **GPU})
    place.apply("twin", output={"uri": "s3://models/starting"})
    becomes(place, "group-two", "queued-group", "Queued", "AnotherGroupStarts")
    becomes(place, "twin", "pending-twin", "Pending", "IdenticalRunInProgress")


# --- what a trainer says ---


class Trainer:
    """Answers GET /progress for all pods of a node."""

    def __init__(self, address: str) -> None:
        self.progress: Document = {}
        trainer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = json.dumps(trainer.progress).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer((address, PROGRESS_PORT), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def says(self, stage: str, step: int, *, saved: int | None = None, run: str = OTHER) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        progress = {
            "schemaVersion": 1,
            "runId": run,
            "attempt": 1,
            "stage": stage,
            "step": step,
            "totalSteps": 100,
            "epoch": step / 50,
            "loss": 0.31 if step else None,
            "learningRate": 1.6e-5,
            "samplesPerSecond": 212.0,
            "estimatedCompletionTime": now if stage == "Training" else None,
            "startedAt": now,
            "updatedAt": now,
        }
        best = {"step": 20, "metric": "f1", "value": 0.83}
        uri = f"s3://models/out/runs/{run}/attempts/1/checkpoints/{saved}"
        checkpoint = {"step": saved, "uri": uri, "committedAt": now, "best": best} if saved else None
        self.progress = {**progress, "checkpoint": checkpoint}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def trainer(place: Place) -> Iterator[Trainer]:
    answering = Trainer(place.kubelet.address)
    try:
        yield answering
    finally:
        answering.close()


def test_training_evaluation_a_silent_node_and_suspension_are_told_with_the_step(
    place: Place, trainer: Trainer
) -> None:
    assert isinstance(place.kubelet, Node)
    place.apply("trains", train_of(OTHER))
    trainer.says("Loading", 0)
    becomes(place, "trains", "starting-loading", "Starting", "Loading")
    trainer.says("Training", 40, saved=30)
    becomes(place, "trains", "training", "Training", "Training")
    place.kubelet.troubles["trains"] = of_train(
        lambda pod: {"conditions": [{"type": "Ready", "status": "False"}]} if placed(pod) else None
    )
    becomes(place, "trains", "training-node-silent", "Training", "NodeSilent")
    place.plane.patch(
        f"{pod_path(place, 'trains', 't1')}/status", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    )
    del place.kubelet.troubles["trains"]
    trainer.says("Evaluating", 100, saved=90)
    becomes(place, "trains", "evaluating", "Evaluating", "Evaluating")
    trainer.says("Training", 40, saved=40)
    place.reaches("trains", "Training")
    place.plane.patch(place.path("trains"), {"spec": {"suspend": True}})
    becomes(place, "trains", "suspended-training", "Suspended", "Suspended")


@pytest.mark.parametrize("said", [{"updatedAt": "soon"}, {"startedAt": "x" * 99}, {"step": 10**30}])
def test_a_trainer_that_says_what_no_status_can_hold_can_still_be_suspended(
    place: Place, trainer: Trainer, said: Document
) -> None:
    job = f"odd-{next(iter(said)).lower()}"
    place.apply(job, train_of(OTHER))
    trainer.says("Training", 40, saved=40)
    place.reaches(job, "Training")
    trainer.progress = {**trainer.progress, **said}
    time.sleep(6)  # it is asked every five seconds
    place.plane.patch(place.path(job), {"spec": {"suspend": True}})
    status = place.reaches(job, "Suspended", "Suspended")
    assert status["progress"]["step"] == 40


def test_what_goes_on_while_a_changed_document_is_looked_at_is_told_beside_it(place: Place, trainer: Trainer) -> None:
    """Only once preflight has passed does the new run take its place."""
    assert isinstance(place.kubelet, Node)
    job, refusal = "goes-on", preflight(said(42, "ColumnMissing"))
    place.apply(job, train_of(OTHER))
    trainer.says("Training", 40, saved=30)
    place.reaches(job, "Training", "Training")
    change(place, job, preflight(None))
    becomes(place, job, "changed-training", "Training", "Training")
    place.kubelet.scripts[job] = refusal
    becomes(place, job, "changed-training-refused", "Training", "ColumnMissing")
    trainer.says("Evaluating", 100, saved=90)
    place.reaches(job, "Evaluating", "ColumnMissing")
    change(place, job, preflight(None), rate=2e-3)
    becomes(place, job, "changed-evaluating", "Evaluating", "Evaluating")
    place.kubelet.scripts[job] = refusal
    becomes(place, job, "changed-evaluating-refused", "Evaluating", "ColumnMissing")
    place.kubelet.lingering.add(job)
    change(place, job, train_of(ANOTHER), rate=3e-3)
    becomes(place, job, "changed-stopping", "Queued", "StoppingPreviousRun")
    place.kubelet.lingering.discard(job)
    becomes(place, job, "changed-again", "Starting", "Loading")


def test_a_run_that_is_done_after_its_changed_document_was_refused_leaves_its_model(place: Place) -> None:
    place.apply("done-all-the-same", only_train(None))
    a_change_that_is_refused(place, "done-all-the-same")
    place.reaches("done-all-the-same", "Starting", "ColumnMissing")
    place.kubelet.scripts["done-all-the-same"] = lambda role, ordinal: trained()
    becomes(place, "done-all-the-same", "failed-changed", "Failed", "ColumnMissing")


def test_trainers_behind_a_network_that_swallows_questions_keep_no_other_job_waiting(place: Place) -> None:
    """A look that waited for an answer would hold one of the workers, of which there are fewer than such trainers."""
    with socket.create_server((place.kubelet.address, PROGRESS_PORT), backlog=1024):  # takes all and answers nothing
        names = [f"unheard-{number}" for number in range(48)]
        for name in names:
            place.apply(name, only_train(None))
        for name in names:
            place.reaches(name, "Starting", "Loading", seconds=60)
        place.apply("other")
        place.reaches("other", "Succeeded", "Trained", seconds=30)


@pytest.mark.slow
def test_progress_is_written_when_a_percent_is_won_and_never_within_ten_seconds(place: Place, trainer: Trainer) -> None:
    place.apply("tells", train_of(OTHER))
    trainer.says("Training", 1)
    place.reaches("tells", "Training", "Training")
    began = datetime.now(UTC)
    for step in [*range(2, 62), *([61] * 30)]:  # 36 seconds with a percent in each, then 18 without one
        trainer.says("Training", step)
        time.sleep(0.6)
    writes = [began, *(when for when in status_writes(place, "tells") if when > began)]
    apart = [(later - earlier).total_seconds() for earlier, later in pairwise(writes)]
    assert min(apart) >= 9.5, apart
    assert 3 <= len(apart) <= 5, apart
    assert place.status("tells")["progress"]["step"] == 61
    trainer.says("Training", 61, saved=60)
    eventually("a checkpoint is told before the minute is over", lambda: saved(place, "tells") == 60, seconds=15)
    becomes(place, "tells", "training-told", "Training", "Training")


def saved(place: Place, job: str) -> int | None:
    """The step of its last checkpoint."""
    found = place.status(job).get("checkpoint")
    return int(found["step"]) if found else None


def status_writes(place: Place, job: str) -> list[datetime]:
    """When, by the API server's audit log."""
    mine = {"name": job, "namespace": place.name, "subresource": "status"}
    found = [entry for entry in place.plane.writes("one") if mine.items() <= entry["objectRef"].items()]
    return [datetime.fromisoformat(entry["requestReceivedTimestamp"]) for entry in found]


@pytest.mark.slow
def test_a_deadline_ends_the_job_and_says_from_where_it_would_go_on(place: Place, trainer: Trainer) -> None:
    assert isinstance(place.kubelet, Node)
    place.kubelet.last_words["late-saved"] = said(45, "Stopped", runId=OTHER, step=40, reachedStep=40)
    place.apply("late", only_train(None), deadline="1m")
    place.apply("late-saved", train_of(OTHER), deadline="1m")
    trainer.says("Training", 40, saved=30)
    place.reaches("late", "Starting", "Loading")
    place.reaches("late-saved", "Training", "Training")
    eventually("it has trained for too long", lambda: trains_no_more(place, trainer, "late-saved"), seconds=90)
    becomes(place, "late", "failed-deadline", "Failed", "DeadlineExceeded")
    becomes(place, "late-saved", "failed-deadline-checkpoint", "Failed", "DeadlineExceeded")
    for name in ("late", "late-saved"):
        eventually(f"the pods of {name} are gone", lambda name=name: not pods_of(place, name, "t1"))


def trains_no_more(place: Place, trainer: Trainer, job: str) -> bool:
    """While it trains its trainer is heard: what an attempt has taken is counted by that."""
    trainer.says("Training", 40, saved=30)
    return bool(place.status(job)["phase"] != "Training")


@pytest.mark.slow
def test_what_has_ended_goes_after_its_time_and_the_document_stays(place: Place) -> None:
    place.apply("keeps", ttlAfterFinished="1m")
    job = becomes(place, "keeps", "succeeded", "Succeeded", "Trained")
    mine = lambda: [name for name in place.children("jobs") if name.startswith("keeps-")]  # noqa: E731
    assert mine()
    eventually("its Jobs are gone", lambda: not mine(), seconds=90)
    time.sleep(2)
    assert place.get("keeps")["metadata"]["resourceVersion"] == job["metadata"]["resourceVersion"]


# --- Events, and no write without a change ---


def events(place: Place, job: str) -> list[Document]:
    uid = place.get(job)["metadata"]["uid"]
    found = place.plane.items(f"/api/v1/namespaces/{place.name}/events?fieldSelector=involvedObject.uid={uid}")
    return sorted(found, key=lambda event: int(event["metadata"]["resourceVersion"]))


@pytest.mark.parametrize(
    "name",
    [
        "succeeded",
        "failed-data",
        "starting-image",
        "suspended",
        "queued-unschedulable",
        "stopped-at-best",
        "again-crashed",
        "again-node-gone",
        "again-node-shuts-down",
        "again-node-started-anew",
        "again-pod-deleted",
        "again-pod-refused",
        "again-pod-not-started",
    ],
)
def test_each_reason_is_one_event(place: Place, name: str) -> None:
    found = [told(event) for event in events(place, name)]
    assert len({event["reason"] for event in events(place, name)}) == len(found) > 0
    same(f"events-{name}", masked_text("\n".join(found) + "\n", place.get(name)))


def told(event: Document) -> str:
    """Which step of an attempt is seen first after trouble is chance."""
    if event["reason"] in ("PodsPending", "PodsStarting", "Loading"):
        return f"{event['type']} STEP {event['count']}"
    return f"{event['type']} {event['reason']} {event['count']}: {event['message']}"


def test_a_status_that_says_the_truth_is_not_written_again(place: Place) -> None:
    """Also where the kubelet goes back and forth between two words for one trouble."""
    assert isinstance(place.kubelet, Node)
    quiet = ["preflight", "starting-image", "queued-unschedulable", "suspended", "failed-data", "succeeded", "reused"]
    versions = {name: place.get(name)["metadata"]["resourceVersion"] for name in quiet}
    told = len(events(place, "starting-image"))
    back_off = f'Back-off pulling image "trainer:1": ErrImagePull: {PULL}'
    pulls, backs = waits("ErrImagePull", PULL), waits("ImagePullBackOff", back_off)
    for _ in range(4):
        for trouble in (pulls, backs):
            place.kubelet.troubles["starting-image"] = of_train(trouble)
            time.sleep(0.6)
    assert {name: place.get(name)["metadata"]["resourceVersion"] for name in quiet} == versions
    assert len(events(place, "starting-image")) == told


# --- changed and deleted in every phase: after all that, for it spares nothing ---

CHANGED = {
    "pending-bucket": ("Pending", "BucketNotFound"),
    "preflight": ("Preflight", "Checking"),
    "preflight-image": ("Pending", "ImagePullBackOff"),
    "queued-unschedulable": ("Queued", "Unschedulable"),
    "starting": ("Starting", "Loading"),
    "starting-image": ("Starting", "ImagePullBackOff"),
    "suspended": ("Suspended", "Suspended"),
    "failed-data": ("Failed", "ColumnMissing"),
    "succeeded": ("Succeeded", "Trained"),
}


def test_a_document_that_changes_in_any_phase_is_followed(place: Place) -> None:
    """Equal documents but for the learning rate: another run, of which the same is to be told."""
    for name in CHANGED:
        script = place.kubelet.scripts[name]
        change(place, name, lambda role, ordinal, script=script: _of_another_run(script(role, ordinal)))
    for name, (phase, reason) in CHANGED.items():
        eventually(f"{name}: it is observed", lambda name=name: is_observed(place.get(name)))
        becomes(place, name, f"changed-{name}", phase, reason)


def is_observed(job: Document) -> bool:
    return bool(job["status"]["observedGeneration"] == job["metadata"]["generation"])


def _of_another_run(ends: Ends | None) -> Ends | None:
    if ends is None or ends.message is None:
        return ends
    message = json.loads(json.dumps(ends.message).replace("a" * 16, ANOTHER))
    return Ends(ends.code, message, ends.after)


def test_a_job_that_is_deleted_in_any_phase_leaves_nothing(place: Place, trainer: Trainer) -> None:
    assert isinstance(place.kubelet, Node)
    place.kubelet.lingering.clear()
    for stage, run in (("Training", OTHER), ("Evaluating", ANOTHER)):  # the first one is not heard of any more then
        place.apply(f"deleted-{stage.lower()}", train_of(run))
        trainer.says(stage, 40, run=run)
        place.reaches(f"deleted-{stage.lower()}", stage)
    jobs = place.plane.items(place.path("").rstrip("/"))
    assert {job["status"]["phase"] for job in jobs} == set(get_args(Phase))
    for job in jobs:
        place.plane.delete(place.path(job["metadata"]["name"]))
    for kind in ("jobs", "pods", "configmaps", "services"):
        eventually(f"no {kind}", lambda kind=kind: not place.children(kind))
    log = Path(place.operator.log).read_text()
    assert "Traceback" not in log


# --- a queue: last of all, for pending-kueue goes on once there is a Kueue ---

QUEUED: Document = {"queue": {"name": "team-a"}, "resources": GPU}


@pytest.fixture(scope="module")
def kueue(place: Place) -> Iterator[StandIn]:
    """This test is Kueue, as far as the operator sees it. tests/e2e/test_kueue.py has the real one."""
    with StandIn(place) as made:
        yield made


def test_what_a_queue_does_with_a_job_is_told_in_its_words(place: Place, kueue: StandIn, trainer: Trainer) -> None:
    for name in ("waits", "stuck", "queued-trains"):
        place.apply(name, train_of(OTHER), **QUEUED)
        becomes(place, name, "queued-kueue-unseen", "Queued", "WaitingForQueue", seconds=60)  # it asks now and then
    kueue.says("waits", QuotaReserved=("False", "insufficient unused quota for nvidia.com/gpu, 1 more needed"))
    kueue.says("stuck", "Inadmissible", QuotaReserved=("False", "LocalQueue team-a doesn't exist"))
    kueue.suspends(False, "queued-trains")
    trainer.says("Training", 40, saved=30)
    eventually("it says so", lambda: "1 more needed" in place.status("waits")["message"])
    becomes(place, "waits", "queued-kueue", "Queued", "WaitingForQueue")
    becomes(place, "stuck", "queued-kueue-inadmissible", "Queued", "Inadmissible")
    change(place, "waits", preflight(None))
    becomes(place, "waits", "changed-queued-kueue", "Queued", "WaitingForQueue")
    becomes(place, "queued-trains", "training", "Training", "Training")
    words = "Preempted to accommodate a workload of a higher priority"
    kueue.says("queued-trains", Evicted=("True", words), QuotaReserved=("False", words))
    kueue.suspends(True, "queued-trains")
    becomes(place, "queued-trains", "queued-kueue-evicted", "Queued", "WaitingForQueue")
    kueue.suspends(False, "queued-trains")
    becomes(place, "queued-trains", "training", "Training", "Training")


def test_with_its_place_back_a_job_waits_until_its_old_pods_have_ended(place: Place, kueue: StandIn) -> None:
    """New ones would claim the run, and fence the checkpoint that the old ones still commit."""
    assert isinstance(place.kubelet, Node)
    place.apply("back", only_train(None), **QUEUED)
    place.reaches("back", "Queued", "WaitingForQueue")
    kueue.suspends(False, "back")
    place.reaches("back", "Starting", "Loading")
    old = pods_of(place, "back", "t1")
    place.kubelet.lingering.add("back")
    kueue.suspends(True, "back")
    path = pod_path(place, "back", "t1")
    eventually("its pod is asked to go", lambda: "deletionTimestamp" in place.plane.get(path)["metadata"])
    # With its place back before that, the Job would count it as failed.
    eventually("its Job has let go of it", lambda: "finalizers" not in place.plane.get(path)["metadata"])
    kueue.suspends(False, "back")
    time.sleep(3)
    assert pods_of(place, "back", "t1") == old
    becomes(place, "back", "starting-stopping", "Starting", "Stopping")
    place.kubelet.lingering.discard("back")
    eventually("a new pod runs", lambda: pods_of(place, "back", "t1") and pods_of(place, "back", "t1") != old)
    becomes(place, "back", "starting", "Starting", "Loading")


def test_a_job_of_a_queue_whose_node_is_lost_is_queued_again(place: Place, kueue: StandIn) -> None:
    assert isinstance(place.kubelet, Node)
    place.apply("lost-in-queue", only_train(None), **QUEUED)
    place.reaches("lost-in-queue", "Queued", "WaitingForQueue")
    place.kubelet.lingering.add("lost-in-queue")
    kueue.suspends(False, "lost-in-queue")
    place.reaches("lost-in-queue", "Starting", "Loading")
    time.sleep(1.5)  # times have whole seconds: the next attempt is not to begin in the one in which this one did
    taken_away("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")(place, "lost-in-queue")
    becomes(place, "lost-in-queue", "queued-kueue-node-lost", "Queued", "WaitingForQueue")
