"""From `kubectl apply` to `Succeeded`, and the same end whatever dies on the way."""

import json
import random
import time
from collections import Counter
from contextlib import ExitStack
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.real import becomes

from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS
from finetune_trainer.storage.commit import RecordKind

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/text-classification.yaml"
ORDER = ["Pending", "Preflight", "Queued", "Starting", "Training", "Evaluating", "Succeeded"]

pytestmark = [pytest.mark.e2e, pytest.mark.together, pytest.mark.timeout(1200)]


# --- the happy path ---


def test_the_example_succeeds_and_its_model_is_good(world: Any) -> None:
    namespace, name = world.once("the example, applied", lambda: run_example(world))
    status = becomes(world, namespace, name, "example", "Succeeded", "Trained")["status"]
    rows = [json.loads(line) for line in (world.scratch / "docstrings/test.jsonl").read_text().splitlines()]
    with world.timed("the example's model, loaded and asked"):
        right = accuracy(download(world, status["model"]["uri"]), rows)
    majority = Counter(row["label"] for row in rows).most_common(1)[0][1] / len(rows)
    evaluation = status["evaluation"]
    assert evaluation["on"] == "test"
    assert evaluation["rows"] == len(rows)
    assert right == pytest.approx(evaluation["tuned"]["accuracy"], abs=0.004)  # padding moves a logit in the last digit
    assert right >= majority + 0.20
    assert right >= evaluation["probe"]["accuracy"]
    assert evaluation["trivial"]["accuracy"] <= majority + 0.001


def run_example(world: Any) -> tuple[str, str]:
    """Applies the example as it is, watches it with kubectl alone, and returns its namespace and name."""
    namespace, name = world.namespace("example"), yaml.safe_load(EXAMPLE.read_text())["metadata"]["name"]
    with world.trainings:
        world.kubectl("apply", "-n", namespace, "-f", str(EXAMPLE))
        watch = world.phases(namespace, name)
        world.kubectl(
            "wait", "finetunejob", name, "-n", namespace, "--for=condition=Succeeded", "--timeout=900s", timeout=920
        )
    world.until(lambda: "Succeeded" in watch.lines, what="kubectl get -w to show Succeeded", seconds=30)
    watch.close()
    seen = [phase for phase in watch.distinct() if phase != "<none>"]
    assert seen == sorted(seen, key=ORDER.index), seen
    assert {"Preflight", "Training", "Evaluating", "Succeeded"} <= set(seen), seen
    (pod,) = world.train_pods(namespace, name)
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert not [volume for volume in pod["spec"]["volumes"] if "kube-api-access" in volume["name"]]
    return namespace, name


def download(world: Any, uri: str) -> Path:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    target = world.scratch / "model"
    target.mkdir()
    for entry in world.s3.list_objects_v2(Bucket=bucket, Prefix=prefix.rstrip("/") + "/")["Contents"]:
        world.s3.download_file(bucket, entry["Key"], str(target / entry["Key"].rsplit("/", 1)[1]))
    return Path(target)


def accuracy(directory: Path, rows: list[dict[str, str]]) -> float:
    """Share of rows that the model, loaded as any user would, gets right."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    right, by_length = 0, sorted(rows, key=lambda row: len(row["text"]))  # so that little is padded
    for first in range(0, len(rows), 50):
        chunk = by_length[first : first + 50]
        texts = [row["text"] for row in chunk]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            answers = model(**batch).logits.argmax(-1).tolist()
        right += sum(model.config.id2label[a] == row["label"] for a, row in zip(answers, chunk, strict=True))
    return right / len(rows)


@pytest.mark.late
def test_the_example_under_another_name_is_reused_without_a_train_pod(world: Any) -> None:
    namespace, name = world.once("the example, applied", lambda: run_example(world))
    document = yaml.safe_load(EXAMPLE.read_text())
    document["metadata"]["name"] = "another-name"
    world.apply(document, namespace)
    status = world.succeeded(namespace, "another-name")
    becomes(world, namespace, "another-name", "example-reused", "Succeeded", "Reused")
    assert status["model"] == world.status(namespace, name)["model"]
    assert status["evaluation"] == world.status(namespace, name)["evaluation"]
    assert world.train_pods(namespace, "another-name") == []


# --- whatever dies: the same final loss, the same model ---


@pytest.mark.hurts
def test_the_operator_killed_in_mid_training_changes_nothing(world: Any) -> None:
    namespace, name = world.namespace("operator-killed"), "operator-killed"
    with world.trainings:
        world.apply(world.small_job(name), namespace)
        world.wait_for_checkpoint(namespace, name)
        kill_operator(world)
        world.succeeded(namespace, name)
    becomes(world, namespace, name, "undisturbed", "Succeeded", "Trained")
    assert_like_the_reference(world, namespace, name)
    assert len(world.train_pods(namespace, name)) == 1


def kill_operator(world: Any) -> None:
    (pod,) = world.operator_pods()
    restarts = pod["status"]["containerStatuses"][0]["restartCount"]
    world.kill(pod)

    def back() -> bool:
        (now,) = world.operator_pods()
        status = now["status"]["containerStatuses"][0]
        return bool(status["restartCount"] > restarts and status["ready"])

    world.until(back, what="the operator to be back")


@pytest.mark.hurts
def test_a_killed_leader_is_replaced_by_the_other_replica_and_changes_nothing(world: Any) -> None:
    namespace, name = world.namespace("leader-killed"), "leader-killed"
    with world.trainings:
        world.install("--set", "replicas=2")
        try:
            world.apply(world.small_job(name), namespace)
            world.wait_for_checkpoint(namespace, name)
            leader, follower = sorted(world.operator_pods(), key=lambda pod: not leads(world, pod))
            killed = time.monotonic()
            world.kill(leader)
            world.until(lambda: leads(world, follower), what="the other replica to lead", seconds=30)
            assert time.monotonic() - killed < 15 + 2 + 5  # the Lease, a look at it, and slack
            world.succeeded(namespace, name)
            names = [pod["metadata"]["name"] for pod in (leader, follower)]
            again, following = (world.kubectl("logs", "-n", "finetune-system", pod) for pod in names)
        finally:
            world.install()
    becomes(world, namespace, name, "undisturbed", "Succeeded", "Trained")
    assert len(world.train_pods(namespace, name)) == 1
    assert_like_the_reference(world, namespace, name)
    assert f"{namespace}/{name}: " not in again  # its container was started again, and follows
    assert 0 < following.index(": leading by the Lease ") < following.index(f"{namespace}/{name}: ")


def leads(world: Any, pod: dict[str, Any]) -> bool:
    lease = world.look("/apis/coordination.k8s.io/v1/namespaces/finetune-system/leases/finetune-operator")
    return str(lease["spec"]["holderIdentity"]).startswith(f"{pod['metadata']['name']}_")


def test_a_killed_trainer_goes_on_from_its_last_checkpoint(world: Any) -> None:
    namespace, name = world.namespace("trainer-killed"), "trainer-killed"
    with world.trainings:
        world.apply(world.small_job(name), namespace)
        run = world.wait_for_checkpoint(namespace, name, step=8)
        uid = world.job(namespace, name)["metadata"]["uid"]
        world.kill(world.running_pod(uid))
        status = world.succeeded(namespace, name)
    (restart,) = status["restarts"]
    becomes(world, namespace, name, "killed", "Succeeded", "Trained", without=["lostSteps"])
    assert restart["resumedFromStep"] >= 8
    assert len(world.train_pods(namespace, name)) == 2
    assert no_step_is_committed_twice(world, namespace, name, run)
    assert_like_the_reference(world, namespace, name)


def test_a_trainer_that_the_kernel_ends_for_its_memory_is_told_to_have_used_it_up(world: Any) -> None:
    """Once: the job is suspended while the next attempt loads, or that would come to the same end."""
    namespace, name = world.namespace("memory"), "memory"
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/{name}"
    suspend = {"body": {"spec": {"suspend": True}}, "kind": "application/merge-patch+json"}
    with world.trainings:
        world.apply(world.small_job(name, resources={"perNode": {"memory": "200Mi"}}), namespace)
        world.wait(namespace, name, lambda s: s.get("restarts"), what="the kernel to end the trainer", seconds=90)
        world.api.text(path, method="PATCH", **suspend)
        told = ["progress", "attempt"]  # by the trainer, if it was asked at all
        becomes(world, namespace, name, "out-of-memory", "Suspended", "Suspended", without=told)


@pytest.mark.hurts
def test_a_result_made_while_the_operator_was_down_and_its_job_deleted_is_found(world: Any) -> None:
    namespace, name = world.namespace("operator-down"), "operator-down"
    with world.trainings:
        world.apply(world.small_job(name), namespace)
        world.wait_for_checkpoint(namespace, name)
        uid = world.job(namespace, name)["metadata"]["uid"]
        world.scale_operator(0)
        try:
            finished = lambda: world.pods.of(uid, "train")[-1]["status"].get("phase") == "Succeeded"  # noqa: E731
            world.until(finished, what="the train pod to finish alone", seconds=180)
            selector = f"finetune.dev/job-uid={uid},finetune.dev/role=train"
            world.kubectl("delete", "jobs", "-n", namespace, "-l", selector)
            assert world.status(namespace, name)["phase"] != "Succeeded"
        finally:
            world.scale_operator(1)
        world.succeeded(namespace, name)
    becomes(world, namespace, name, "found-again", "Succeeded", "Reused")
    assert len(world.train_pods(namespace, name)) == 1
    assert_like_the_reference(world, namespace, name)


@pytest.mark.hurts  # an operator that is down just then finds the pod gone, and cannot know by whom
def test_an_evicted_run_loses_no_step(world: Any) -> None:
    """As `kubectl drain` evicts: the pod is given the time to commit a checkpoint."""
    namespace, name = world.namespace("evicted"), "evicted"
    with world.trainings:
        world.apply(world.small_job(name), namespace)
        run = world.wait_for_checkpoint(namespace, name, step=8)
        uid = world.job(namespace, name)["metadata"]["uid"]
        pod = world.running_pod(uid)
        world.evict(pod)
        world.wait(namespace, name, lambda s: s.get("restarts"), what="the next attempt", seconds=120)
        status = world.succeeded(namespace, name)
    becomes(world, namespace, name, "evicted", "Succeeded", "Trained")
    assert status["usage"]["lostSteps"] == 0
    assert exit_code(world, uid, pod) == 45
    assert len(world.train_pods(namespace, name)) == 2
    assert no_step_is_committed_twice(world, namespace, name, run)
    assert_like_the_reference(world, namespace, name)


@pytest.mark.alone
def test_a_node_that_falls_silent_holds_no_run_and_its_zombie_commits_nothing(world: Any) -> None:
    """The trainer freezes with its node, and wakes when the next attempt has claimed the run."""
    namespace, name = world.namespace("silent"), "silent"
    taint = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    template = {"spec": {"tolerations": [{**taint, "tolerationSeconds": 6}]}}
    document = world.small_job(name, podTemplate=template)
    with world.trainings:
        world.apply(document, namespace)
        run = world.wait_for_checkpoint(namespace, name, step=8)
        uid = world.job(namespace, name)["metadata"]["uid"]
        zombie = world.running_pod(uid)
        with world.frozen(zombie) as kubelet_returns:
            status = world.wait(namespace, name, lambda s: reason(s) == "NodeSilent", what="NodeSilent", seconds=90)
            assert f"{zombie['spec']['nodeName']} does not answer" in status["message"]
            status = world.wait(namespace, name, lambda s: s.get("restarts"), what="the next attempt", seconds=60)
            assert [r["reason"] for r in status["restarts"]] == ["DeletionByTaintManager"]
            status = world.wait(namespace, name, lambda s: reason(s) == "Unschedulable", what="no node", seconds=30)
            assert "no node for pod" in status["message"]
            first, second = world.train_pods(namespace, name)
            assert first["metadata"]["deletionTimestamp"]
            assert "running" in first["status"]["containerStatuses"][0]["state"]
            assert second["status"]["phase"] == "Pending"
            kubelet_returns()
            claims = lambda: world.records(document["spec"]["output"]["uri"], run, RecordKind.CLAIM)  # noqa: E731
            world.until(lambda: len(claims()) > 1, what="the next attempt to claim the run")
        world.succeeded(namespace, name)
        assert world.until(lambda: exit_code(world, uid, zombie), what="the zombie to end") == 44
    becomes(world, namespace, name, "node-lost", "Succeeded", "Trained", without=["lostSteps"])
    assert no_step_is_committed_twice(world, namespace, name, run)
    assert_like_the_reference(world, namespace, name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [20, 21, 22])
def test_three_deaths_at_drawn_instants_change_nothing(world: Any, seed: int) -> None:
    """Killed in its container, or its pod forced out of the API, so that it ends beside the next attempt."""
    namespace, name = world.namespace("deaths"), "deaths"
    chance, killed = random.Random(seed), set[str]()
    with world.trainings:
        world.apply(world.small_job(name), namespace)
        world.until(lambda: world.status(namespace, name).get("run"), what="the run's name")
        uid = world.job(namespace, name)["metadata"]["uid"]
        for forced in (False, True, chance.random() < 0.5):
            pod = world.until(lambda: running_but(world, uid, killed), what="the next attempt to run", seconds=60)
            time.sleep(chance.uniform(1, 12))
            if forced:
                world.kubectl("delete", "pod", pod["metadata"]["name"], "-n", namespace, "--grace-period=0", "--force")
            else:
                world.kill(pod)
            killed.add(pod["metadata"]["uid"])
        status = world.succeeded(namespace, name)
    assert len(status["restarts"]) == 3, status["restarts"]
    assert_like_the_reference(world, namespace, name)


def running_but(world: Any, uid: str, killed: set[str]) -> dict[str, Any] | None:
    """The job's train pod that runs, if it is none of those."""
    pods = world.pods.of(uid, "train")
    alive = [p for p in pods if p["status"].get("phase") == "Running" and p["metadata"]["uid"] not in killed]
    return alive[-1] if alive else None


@pytest.mark.alone
def test_a_restart_of_the_api_server_changes_nothing(world: Any) -> None:
    namespace, name = world.namespace("api-server"), "api-server"
    with world.trainings:
        world.apply(world.small_job(name), namespace)
        world.wait_for_checkpoint(namespace, name)
        world.restart("kube-apiserver")
        world.succeeded(namespace, name)
    becomes(world, namespace, name, "undisturbed", "Succeeded", "Trained")
    assert len(world.train_pods(namespace, name)) == 1
    assert_like_the_reference(world, namespace, name)


@pytest.mark.hurts
@pytest.mark.parametrize(("done", "going"), [(1, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_a_newer_operator_retrains_nothing(world: Any, done: int, going: int) -> None:
    """Neither runs that are done nor those that go on, although the default image of train pods is another by then.

    Of those that are done one has trained; the others are its document under other names, and ended as Reused.
    """
    world.reference()
    old = next(n for n in namespaces(world) if n.startswith("e2e-undisturbed"))
    output = world.job(old, "undisturbed")["spec"]["output"]["uri"]
    namespace, running = world.namespace("upgrade"), [f"going-{number}" for number in range(going)]
    ended = [(old, "undisturbed"), *((namespace, f"done-{number}") for number in range(1, done))]
    for where, name in ended[1:]:
        world.apply(world.small_job(name, output=output), where)
    for where, name in ended:
        world.succeeded(where, name)
    world.containerd("images", "tag", "--force", "localhost/finetune-trainer:dev", "localhost/finetune-trainer:newer")
    with ExitStack() as places:
        for name in running:
            places.enter_context(world.trainings)
            world.apply(world.small_job(name), namespace)
        for name in running:
            world.wait_for_checkpoint(namespace, name)
        before = [outcome(world, *one) for one in ended]
        world.install("--set", "images.trainer=localhost/finetune-trainer:newer", "--set", "log.format=json")
        try:
            for where, name in ended:
                world.kubectl("label", "finetunejob", name, "-n", where, "seen-by=the-newer")
            for name in running:
                world.succeeded(namespace, name)
            time.sleep(5)  # a mistake would take a moment to be made
        finally:
            world.install()
    assert [outcome(world, *one) for one in ended] == before
    assert sum(len(trained) for _, _, trained in before) == 1
    for name in running:
        becomes(world, namespace, name, "undisturbed", "Succeeded", "Trained")
        (pod,) = world.train_pods(namespace, name)
        assert pod["spec"]["containers"][0]["image"] == "localhost/finetune-trainer:dev"
        assert_like_the_reference(world, namespace, name)


def outcome(world: Any, namespace: str, name: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The job's status, and the UIDs of every preflight and train pod that it ever had."""
    job = world.job(namespace, name)
    preflight, train = (
        [pod["metadata"]["uid"] for pod in world.pods.of(job["metadata"]["uid"], role)]
        for role in ("preflight", "train")
    )
    return job["status"], preflight, train


def namespaces(world: Any) -> list[str]:
    items = world.items("/api/v1/namespaces", "finetune-e2e=true")
    return [item["metadata"]["name"] for item in items if item["status"]["phase"] == "Active"]


# --- a changed document ---


@pytest.mark.hurts  # the operator must be quick here
def test_a_changed_hyperparameter_waits_for_preflight_and_reverting_resumes(world: Any) -> None:
    namespace, name = world.namespace("changed"), "changed"
    document = world.small_job(name, training={**LONG})
    with world.trainings:
        world.apply(document, namespace)
        first = world.wait_for_checkpoint(namespace, name)
        uid = world.job(namespace, name)["metadata"]["uid"]
        world.apply({**document, "spec": {**document["spec"], "training": {**LONG, "learningRate": 2e-3}}}, namespace)
        world.wait(namespace, name, lambda s: s.get("observedGeneration") == 2, what="generation 2 to be looked at")
        old = world.running_pod(uid)
        assert world.status(namespace, name)["run"]["id"] == first
        second = world.wait(namespace, name, lambda s: s["run"]["id"] != first, what="the second run")["run"]["id"]
        ended = world.until(lambda: exit_code(world, uid, old), what="the old pod to end")
        assert ended == 45
        assert asked_to_stop(world, uid, old) >= finished(world.pods.of(uid, "preflight")[1])
        stopped_at = world.records(document["spec"]["output"]["uri"], first, RecordKind.CHECKPOINT)[-1].body["step"]
        world.apply(document, namespace)
        world.wait(namespace, name, lambda s: s["run"]["id"] == first, what="the first run again")
        status = world.succeeded(namespace, name)
    assert status["run"]["id"] == first != second
    # Whether the second run had an attempt before the document was changed back is a matter of who is faster.
    becomes(world, namespace, name, "changed-back", "Succeeded", "Trained", without=["usage"])
    assert a_step_is_committed_again_only_for_its_missed_evaluation(world, namespace, name, first)
    claims = world.records(document["spec"]["output"]["uri"], first, RecordKind.CLAIM)
    assert len(claims) == 2
    committed = checkpoints(world, namespace, name, first)
    assert min(r.body["step"] for r in committed if r.attempt == claims[1].number) >= stopped_at
    evaluated = [e["step"] for e in state_of(world, namespace, name, committed[-1])["evaluations"]]
    assert evaluated == [epoch * evaluated[0] for epoch in range(1, LONG["epochs"] + 1)]  # after each; none is missing


LONG: dict[str, Any] = {"epochs": 5, "batchSize": 8, "microBatch": 4, "learningRate": 1e-3}


def exit_code(world: Any, uid: str, pod: dict[str, Any]) -> int | None:
    now = next(p for p in world.pods.of(uid, "train") if p["metadata"]["uid"] == pod["metadata"]["uid"])
    state = now["status"]["containerStatuses"][0]["state"].get("terminated")
    return state["exitCode"] if state else None


def asked_to_stop(world: Any, uid: str, pod: dict[str, Any]) -> datetime:
    """When the pod was deleted: what the API server shows is the end of its grace period."""
    meta = next(p["metadata"] for p in world.pods.of(uid, "train") if p["metadata"]["uid"] == pod["metadata"]["uid"])
    return datetime.fromisoformat(meta["deletionTimestamp"]) - timedelta(seconds=meta["deletionGracePeriodSeconds"])


def finished(pod: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(pod["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"])


# --- several pods ---


def test_two_pods_give_the_loss_curve_of_one(world: Any) -> None:
    namespace, name = world.once("the undisturbed run of two pods", lambda: run_two_pods(world))
    becomes(world, namespace, name, "two-pods", "Succeeded", "Trained")
    pods = world.train_pods(namespace, name)
    assert [len(pod["spec"]["affinity"]["podAffinity"]) for pod in pods] == [1, 1]
    assert world.training(namespace, name).losses == pytest.approx(world.reference().losses, abs=1e-5)


def run_two_pods(world: Any) -> tuple[str, str]:
    """Its namespace and name. Never called while holding a training's place."""
    namespace, name = world.namespace("two-pods"), "two-pods"
    with world.trainings:
        world.apply(two_pods(world, name), namespace)
        world.succeeded(namespace, name)
    return namespace, name


def two_pods(world: Any, name: str) -> dict[str, Any]:
    near = {"spec": {"topologyKey": "kubernetes.io/hostname"}}  # the first pod finds no other to be near to
    document: dict[str, Any] = world.small_job(name, resources={"nodes": 2}, podTemplate=near)
    return document


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_pod_of_two_takes_the_group_back_to_one_record(world: Any, rank: int) -> None:
    """Nobody tells the other one: it finds its peer gone, or is asked to end, and commits nothing alone."""
    undisturbed = world.once("the undisturbed run of two pods", lambda: run_two_pods(world))
    namespace, name = world.namespace(f"rank-{rank}-killed"), f"rank-{rank}-killed"
    document = two_pods(world, name)
    with world.trainings:
        world.apply(document, namespace)
        run = world.wait_for_checkpoint(namespace, name)
        uid = world.job(namespace, name)["metadata"]["uid"]
        world.kill(pod_of_rank(world, uid, rank))
        status = world.succeeded(namespace, name)
    becomes(world, namespace, name, "killed", "Succeeded", "Trained", without=["lostSteps"])
    assert Counter(rank_of(pod) for pod in world.train_pods(namespace, name)) == {0: 2, 1: 2}
    first, second = world.records(document["spec"]["output"]["uri"], run, RecordKind.CLAIM)
    (restart,) = status["restarts"]
    committed = checkpoints(world, namespace, name, run)
    resumed = max(record.body["step"] for record in committed if record.attempt == first.number)
    assert restart["resumedFromStep"] == resumed
    assert restart.get("lostSteps", 0) <= document["spec"]["checkpoint"]["every"]["steps"]
    assert {record.attempt for record in committed} == {first.number, second.number}
    assert no_step_is_committed_twice(world, namespace, name, run)
    assert world.training(namespace, name) == world.training(*undisturbed)


def pod_of_rank(world: Any, uid: str, rank: int) -> dict[str, Any]:
    (pod,) = [pod for pod in world.pods.of(uid, "train") if rank_of(pod) == rank]
    assert pod["status"]["phase"] == "Running"
    return dict(pod)


def rank_of(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def test_delete_in_mid_run_leaves_nothing_but_the_checkpoints(world: Any) -> None:
    namespace, name = world.namespace("deleted"), "deleted"
    document = world.small_job(name, resources={"nodes": 2}, training=LONG)
    output = document["spec"]["output"]["uri"]
    with world.trainings:
        world.apply(document, namespace)
        run = world.wait_for_checkpoint(namespace, name)
        uid = world.job(namespace, name)["metadata"]["uid"]
        kinds = {child.partition("/")[0] for child in world.children(uid)}
        assert kinds == {"Job", "Pod", "ConfigMap", "Service"}
        world.kubectl("delete", "finetunejob", name, "-n", namespace, "--timeout=60s")
        world.until(lambda: not world.children(uid), what=lambda: f"all to go: {world.children(uid)}", seconds=150)
    store = world.store(output)
    last = world.records(output, run, RecordKind.CHECKPOINT)[-1]
    assert last.body["objects"]
    for entry in last.body["objects"]:
        info = store.head(entry["key"])
        assert info is not None
        assert info.size == entry["size"]


# --- the installed operator ---


@pytest.mark.hurts
def test_an_operator_of_one_namespace_needs_no_right_beyond_it(world: Any) -> None:
    """A second release, while the cluster-wide one rests: it works where it may, and touches nothing elsewhere."""
    world.reference()
    done = next(n for n in namespaces(world) if n.startswith("e2e-undisturbed"))
    output = world.job(done, "undisturbed")["spec"]["output"]["uri"]
    watched, other = world.namespace("watched"), world.namespace("other")
    world.scale_operator(0)
    try:
        world.install("--set", f"watchNamespaces={{{watched}}}", "--set", "profile.create=false", release="one")
        for namespace in (watched, other):
            world.apply(world.small_job("again", output=output), namespace)
        status = world.succeeded(watched, "again")
        assert condition(status, "Succeeded")["reason"] == "Reused"
        assert world.status(other, "again").get("phase") is None
        rights = {
            question: allowed(world, question)
            for question in (
                f"get secrets -n {watched}",
                f"list jobs.batch -n {other}",
                f"update finetunejobs.finetune.dev -n {watched}",
                f"create jobs.batch -n {watched}",
                "list finetuneprofiles.finetune.dev",
                "update finetuneprofiles.finetune.dev",
            )
        }
    finally:
        world.uninstall("one")
        world.scale_operator(1)
    assert list(rights.values()) == [False, False, False, True, True, False], rights
    world.succeeded(other, "again")


def allowed(world: Any, question: str) -> bool:
    user = "system:serviceaccount:finetune-system:one-finetune-operator"
    done = world.kubectl.run("auth", "can-i", *question.split(), f"--as={user}")
    assert done.stdout.strip() in ("yes", "no"), done.stderr
    return bool(done.stdout.strip() == "yes")


@pytest.mark.hurts
def test_the_operator_serves_metrics_and_health(world: Any) -> None:
    service = "/api/v1/namespaces/finetune-system/services/finetune-operator:metrics/proxy"
    assert "finetune" in world.kubectl("get", "--raw", f"{service}/metrics")
    world.kubectl("get", "--raw", f"{service}/healthz")


# --- what is asserted above ---


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions", ()) if c["type"] == kind), {})


def reason(status: dict[str, Any]) -> str:
    """Why the job is where it is."""
    return str(condition(status, "Reconciling").get("reason", ""))


def assert_like_the_reference(world: Any, namespace: str, name: str) -> None:
    """Losses of every step, final loss and model digest are those of the undisturbed run, bit by bit."""
    reference, mine = world.reference(), world.training(namespace, name)
    assert mine.losses == reference.losses
    assert mine.final_loss == reference.final_loss
    assert mine.digest == reference.digest


def no_step_is_committed_twice(world: Any, namespace: str, name: str, run: str) -> bool:
    committed = [record.body["step"] for record in checkpoints(world, namespace, name, run)]
    return len(committed) == len(set(committed))


def a_step_is_committed_again_only_for_its_missed_evaluation(world: Any, namespace: str, name: str, run: str) -> bool:
    """A stop may come before a due evaluation, or in its midst; the next attempt makes up for it, and for no other."""
    records = checkpoints(world, namespace, name, run)
    evaluated = {evaluation["step"] for evaluation in state_of(world, namespace, name, records[-1])["evaluations"]}
    for before, after in pairwise(records):
        if before.body["step"] > after.body["step"]:
            return False
        if before.body["step"] == after.body["step"] and not (
            after.body["step"] in evaluated and makes_up_for(before, after)
        ):
            return False
    return True


def makes_up_for(before: Any, after: Any) -> bool:
    """A later attempt commits the same weights. The first commit may be gone by now, and knew no figure of them."""
    return (
        before.attempt < after.attempt
        and not before.body["best"]
        and all(digest_of(before, file) == digest_of(after, file) for file in (WEIGHTS, OPTIMIZER))
    )


def checkpoints(world: Any, namespace: str, name: str, run: str) -> list[Any]:
    """Every checkpoint's record, oldest first."""
    found: list[Any] = world.records(world.job(namespace, name)["spec"]["output"]["uri"], run, RecordKind.CHECKPOINT)
    return found


def state_of(world: Any, namespace: str, name: str, record: Any) -> dict[str, Any]:
    """The state.json of a checkpoint that is kept, such as the last one."""
    store = world.store(world.job(namespace, name)["spec"]["output"]["uri"])
    state: dict[str, Any] = json.loads(store.read(file_of(record, STATE)["key"]))
    assert state["step"] == record.body["step"]
    return state


def digest_of(record: Any, file: str) -> str:
    return str(file_of(record, file)["digest"])


def file_of(record: Any, file: str) -> dict[str, Any]:
    return next(entry for entry in record.body["objects"] if entry["key"].endswith(f"/{file}"))
