"""Which rule an ending falls under, from Jobs and pods as the API server shows them."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.contract import ExitCode, LastMessage
from finetune_operator.policies import ways
from finetune_operator.policies.endings import End, ending, stopping
from finetune_operator.policies.ways import CODES, DISRUPTED, WAYS, Kind, Way
from finetune_operator.views import ROLE, Child, Pod

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
Raw = dict[str, Any]


def at(second: int) -> str:
    return f"2026-03-01T11:59:{second:02}Z"


def job(*, ended: str | None = "FailureTarget", role: str = "train") -> Child:
    conditions = [{"type": ended, "status": "True", "lastTransitionTime": at(50)}] if ended else []
    meta = {"name": "one-t1", "uid": "j", "labels": {ROLE: role}, "creationTimestamp": at(0)}
    return Child.of({"metadata": meta, "status": {"conditions": conditions}})


def pod(index: int = 0, *, meta: Raw | None = None, **status: Any) -> Pod:
    notes = {"batch.kubernetes.io/job-completion-index": str(index)}
    found = {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}], **status}
    raw = {
        "metadata": {"name": f"x-{index}", "uid": f"u{index}", "annotations": notes, **(meta or {})},
        "spec": {"nodeName": f"node-{index}"},
        "status": found,
    }
    return Pod.of(raw)


def ended(
    code: int, index: int = 0, *, word: str = "", second: int = 40, last: LastMessage | None = None, **more: Any
) -> Pod:
    state: Raw = {"exitCode": code, "reason": word or ("Completed" if code == 0 else "Error"), "finishedAt": at(second)}
    if last is not None:
        state["message"] = last.model_dump_json(by_alias=True, exclude_none=True)
    phase = "Failed" if code else "Succeeded"
    return pod(index, phase=phase, containerStatuses=[{"name": "trainer", "state": {"terminated": state}}], **more)


def test_a_container_that_somebody_has_put_beside_ours_says_nothing() -> None:
    """The kubelet sorts them by name."""
    ours: Raw = {"name": "trainer", "state": {"terminated": {"exitCode": 45, "reason": "Error"}}}
    beside: list[Raw] = [
        {"name": "istio-proxy", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
        {"name": "logs", "state": {"waiting": {"reason": "ImagePullBackOff"}}},
    ]
    found = pod(containerStatuses=[*beside, ours])
    assert found.exit is not None
    assert (found.exit.code, found.waiting) == (45, None)
    assert pod(containerStatuses=beside).exit is None


def said(code: int, reason: str, **fields: Any) -> LastMessage:
    return LastMessage(code=code, reason=reason, message=f"{reason} it is.", **fields)


def target(reason: str, words: str = "in its words") -> list[Raw]:
    return [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": words}]


@pytest.mark.parametrize("run_id", ["a b", "../other", "-a", "ä", "a" * 64, "", "a\n"])
def test_a_message_whose_run_could_be_no_label_is_no_message(run_id: str) -> None:
    """It would name the next Job's run, and its place in storage."""
    odd = said(0, "PreflightPassed").model_copy(update={"run_id": run_id})
    assert (ended(0, last=odd).exit or pytest.fail("it has ended")).last is None
    good = said(0, "PreflightPassed", run_id="0123456789abcdef")
    assert (ended(0, last=good).exit or pytest.fail("it has ended")).last == good


NOT_READY = [{"type": "Ready", "status": "False"}]
"""As the node controller writes it when a node is silent: it changes nothing else, and gives no reason."""
SIDECAR = [{"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "[proxy]"}]
"""As the kubelet says it, of a container that something has injected; it always gives a reason."""
ASKED = {"deletionTimestamp": "2026-03-01T12:01:30Z", "deletionGracePeriodSeconds": 120}
"""At 11:59:30."""
STOPPED = said(45, "Stopped", step=40, reached_step=40)


@dataclass(frozen=True)
class Row:
    fact: str
    pods: list[Pod]
    kind: Kind
    reason: str
    says: str = ""
    """Part of the message."""
    tells: str = ""
    """All of it."""


ROWS = [
    *(
        Row(
            f"{reason} is free",
            [ended(137, conditions=target(reason))],
            Kind.FREE,
            reason,
            says=f"taken away by the cluster ({reason}: in its words)",
        )
        for reason in DISRUPTED
    ),
    Row("a reason that is new is free, too", [ended(1, conditions=target("Moved"))], Kind.FREE, "Moved"),
    Row(
        "a pod that was taken away and stopped well says both",
        [ended(45, last=STOPPED, conditions=target("PreemptionByScheduler"))],
        Kind.FREE,
        "PreemptionByScheduler",
        says="Stopped it is: a pod of Job one-t1 was taken away by the cluster (PreemptionByScheduler",
    ),
    Row(
        "the kubelet's own eviction says what the node was short of",
        [ended(137, reason="Evicted", message="The node was low on resource: memory.")],
        Kind.FREE,
        "Evicted",
        says="low on resource: memory",
    ),
    Row(
        "a pod that was taken away and stopped without a word says what took it",
        [ended(45, conditions=target("PreemptionByScheduler"))],
        Kind.FREE,
        "PreemptionByScheduler",
        tells="a pod of Job one-t1 was taken away by the cluster (PreemptionByScheduler: in its words)",
    ),
    Row("a pod that is gone was deleted", [], Kind.FREE, "PodDeleted", tells="a pod of Job one-t1 was deleted"),
    Row("a deleted pod that stopped well", [ended(45, last=STOPPED, meta=ASKED)], Kind.FREE, "Stopped"),
    Row("a deleted pod that did not", [ended(137, meta=ASKED)], Kind.FREE, "PodDeleted"),
    Row("a pod that crashed before it was deleted", [ended(1, second=20, meta=ASKED)], Kind.CRASH, "Crashed"),
    Row(
        "a pod that never ends on a dead node",
        [pod(meta=ASKED, conditions=[*NOT_READY, *target("DeletionByTaintManager")])],
        Kind.FREE,
        "DeletionByTaintManager",
    ),
    Row(
        "a peer that crashes because another node died",
        [pod(conditions=NOT_READY, meta=ASKED), ended(1, 1)],
        Kind.FREE,
        "NodeLost",
        tells="a pod of Job one-t1 was lost with its node node-0",
    ),
    Row("a peer that hangs for it", [pod(conditions=NOT_READY), ended(46, 1)], Kind.FREE, "NodeLost"),
    Row(
        "a peer that crashes because another pod was preempted",
        [ended(137, conditions=target("PreemptionByScheduler")), ended(1, 1)],
        Kind.FREE,
        "PreemptionByScheduler",
    ),
    Row(
        "wrong data is wrong on a dying node, too",
        [pod(conditions=NOT_READY), ended(42, 1, last=said(42, "ColumnMissing"))],
        Kind.FINAL,
        "ColumnMissing",
    ),
    Row(
        "a peer whose kubelet says that it is not Ready is no lost node",
        [pod(conditions=SIDECAR), ended(1, 1)],
        Kind.CRASH,
        "Crashed",
    ),
    Row(
        "a node that falls silent while its pod ends is one",
        [pod(meta=ASKED, conditions=NOT_READY), ended(46, 1)],
        Kind.FREE,
        "NodeLost",
    ),
    Row("a peer that the Job controller deletes says nothing", [pod(meta=ASKED), ended(1, 1)], Kind.CRASH, "Crashed"),
    Row("nor does one that it let finish", [ended(45, meta=ASKED), ended(139, 1)], Kind.CRASH, "Crashed"),
    Row("a rank that hangs tells more than one that crashes", [ended(1), ended(46, 1)], Kind.CRASH, "Hung"),
    Row(
        "a rank that was killed tells more than one that crashes for it",
        [ended(1), ended(137, 1)],
        Kind.CRASH,
        "Killed",
    ),
    Row(
        "so does one that the kernel killed for its memory",
        [ended(1), ended(137, 1, word="OOMKilled")],
        Kind.MEMORY,
        "HostOutOfMemory",
    ),
    Row(
        "a rank that was killed in the very second in which it was deleted for the crash of its peer",
        [ended(1, second=29), ended(137, 1, second=30, meta=ASKED)],
        Kind.CRASH,
        "Killed",
    ),
    Row(
        "one that crashed in that second, as stopping may end",
        [ended(1, second=30, meta=ASKED)],
        Kind.FREE,
        "PodDeleted",
    ),
    Row(
        "a pod that was forced out has had no grace",
        [ended(137, second=30, meta={"deletionTimestamp": at(30), "deletionGracePeriodSeconds": 0})],
        Kind.FREE,
        "PodDeleted",
    ),
    Row("a node that started anew", [ended(137, word="ContainerStatusUnknown")], Kind.FREE, "NodeLost"),
    Row("the same in containerd's words", [ended(255, word="Unknown")], Kind.FREE, "NodeLost"),
    Row("255 of the trainer's own", [ended(255)], Kind.CRASH, "Crashed"),
    Row(
        "a pod that the node refuses",
        [
            pod(
                phase="Failed",
                containerStatuses=[],
                reason="UnexpectedAdmissionError",
                message="Allocate failed: no GPU",
            )
        ],
        Kind.FREE,
        "UnexpectedAdmissionError",
        tells="a pod of Job one-t1 did not start (UnexpectedAdmissionError: Allocate failed: no GPU)",
    ),
    Row(
        "a pod whose injected container fails",
        [
            pod(
                phase="Failed",
                containerStatuses=[{"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}],
            )
        ],
        Kind.FREE,
        "PodNotStarted",
        tells="a pod of Job one-t1 did not start",
    ),
    Row("a command that is not there", [ended(128, word="StartError")], Kind.CRASH, "Crashed", says="StartError"),
    Row("a kill from outside", [ended(137)], Kind.CRASH, "Killed"),
    Row(
        "a container over its limit of memory",
        [ended(137, word="OOMKilled")],
        Kind.MEMORY,
        "HostOutOfMemory",
        says="raise spec.resources.perNode.memory",
    ),
    Row("memory of a GPU", [ended(50, last=said(50, "GpuOutOfMemory"))], Kind.MEMORY, "GpuOutOfMemory", says="it is"),
    Row("memory of the host, told", [ended(50, last=said(50, "HostOutOfMemory"))], Kind.MEMORY, "HostOutOfMemory"),
    Row("damaged data is counted", [ended(43)], Kind.CRASH, "StoredDataDamaged"),
    Row("a loss that is no number is final", [ended(47)], Kind.FINAL, "Diverged"),
    Row("a gate is final", [ended(48)], Kind.FINAL, "GateNotMet"),
    Row("storage is waited for", [ended(49)], Kind.ENVIRONMENT, "StorageUnavailable"),
    Row("a newer attempt is given way", [ended(44)], Kind.FENCED, "Fenced"),
    Row("a fenced rank tells more than one without storage", [ended(49), ended(44, 1)], Kind.FENCED, "Fenced"),
]


def look(pods: list[Pod], child: Child | None = None, *, nodes: int = 2) -> End:
    end = ending(child or job(), pods, nodes=nodes, now=NOW)
    assert end is not None
    return end


@pytest.mark.parametrize("row", ROWS, ids=[row.fact for row in ROWS])
def test_fact(row: Row) -> None:
    end = look(row.pods)
    assert (end.kind, end.reason) == (row.kind, row.reason), end.message
    assert row.says in end.message
    assert end.message == (row.tells or end.message)
    assert end.way in WAYS


ALONE = [row.pods[0] for row in ROWS if len(row.pods) == 1]


@settings(deadline=None)
@given(st.lists(st.sampled_from(ALONE), max_size=4), st.integers(0, 600))
def test_whatever_pods_there_are_a_failed_job_has_ended_in_a_way_of_the_table(found: list[Pod], later: int) -> None:
    pods = [replace(pod, index=index) for index, pod in enumerate(found)]
    now = NOW + timedelta(seconds=later)
    end = ending(job(), pods, nodes=4, now=now)
    if end is None:
        assert stopping(job(), pods, now=now)
        assert ending(job(), pods, nodes=4, now=NOW + timedelta(seconds=90)) is not None, "that takes its grace period"
        return
    assert end.way in WAYS
    codes = {pod.exit.code for pod in pods if pod.exit is not None}
    if codes & {42, 48}:
        assert end.kind is Kind.FINAL
    if any(pod.disrupted for pod in pods) and end.kind is Kind.CRASH:
        assert 43 in codes, "the cluster's doing is nobody's crash"


def test_a_lone_pod_need_not_wait_for_the_job_controller() -> None:
    assert ending(job(ended=None), [ended(137)], nodes=1, now=NOW) is not None
    assert ending(job(ended=None), [pod()], nodes=1, now=NOW) is None
    assert ending(job(ended=None), [ended(137)], nodes=2, now=NOW) is None


def test_a_job_that_has_ended_waits_for_news_of_pods_that_are_still_seen_to_run() -> None:
    """Lists and watches of Jobs and pods are not of one moment: their last message would be taken for lost."""
    assert ending(job(ended="Complete"), [pod()], nodes=1, now=NOW) is None
    assert ending(job(ended="Complete"), [pod(), ended(0, 1)], nodes=2, now=NOW) is None
    assert ending(job(), [pod()], nodes=1, now=NOW) is None
    assert ending(job(), [pod(), ended(1, 1)], nodes=2, now=NOW) is not None, "the other one is known to have failed"
    for gone in ([], [pod(meta=ASKED)], [pod(conditions=NOT_READY)]):
        late = ending(job(ended="Complete"), gone, nodes=1, now=NOW)
        assert late is not None
        assert late.reason == "MessageLost"


def test_a_job_that_is_suspended_and_resumed_has_not_ended() -> None:
    """Its pods are deleted, and others come."""
    gone = ended(45, last=STOPPED, meta=ASKED)
    assert ending(job(ended=None), [gone], nodes=1, now=NOW) is None
    assert ending(job(ended=None), [gone, pod()], nodes=1, now=NOW) is None
    assert ending(replace(job(ended=None), suspended=True), [ended(137)], nodes=1, now=NOW) is None


def test_pods_that_were_asked_to_go_may_commit_a_checkpoint_first() -> None:
    """The Job is at FailureTarget by then; the next attempt's claim would fence what they commit."""
    evicted = pod(meta=ASKED, conditions=target("EvictionByEvictionAPI"))
    assert ending(job(), [evicted], nodes=1, now=NOW) is None
    assert ending(job(), [evicted, ended(45, 1, meta=ASKED)], nodes=2, now=NOW) is None
    late = ending(job(), [evicted], nodes=1, now=datetime(2026, 3, 1, 12, 1, 30, tzinfo=UTC))
    assert late is not None
    assert late.reason == "EvictionByEvictionAPI"


def test_a_pod_that_is_gone_is_not_waited_for_and_what_it_said_counts() -> None:
    evicted = pod(meta=ASKED, conditions=target("EvictionByEvictionAPI")).removed
    end = ending(job(), [evicted], nodes=1, now=NOW)
    assert end is not None
    assert end.reason == "EvictionByEvictionAPI"
    end = look([ended(45, last=STOPPED, meta=ASKED, conditions=target("EvictionByEvictionAPI")).removed])
    assert (end.reason, end.committed) == ("EvictionByEvictionAPI", 40)


def test_a_pod_that_still_seems_to_run_is_waited_for_though_its_peer_is_gone_without_a_word() -> None:
    running, gone = pod(), pod(1).removed
    assert ending(job(), [running, gone], nodes=2, now=NOW) is None
    assert ending(job(), [running, ended(137, 1)], nodes=2, now=NOW) is not None


def test_nothing_is_waited_for_where_a_peer_is_dead() -> None:
    """The others will never reach the end of a step."""
    going = pod(meta=ASKED)
    assert ending(job(), [going, pod(1, conditions=NOT_READY)], nodes=2, now=NOW) is not None
    assert ending(job(), [going, pod(1, meta=ASKED, conditions=SIDECAR)], nodes=2, now=NOW) is None
    assert ending(job(), [going, ended(137, 1)], nodes=2, now=NOW) is not None
    assert ending(job(role="preflight"), [going], nodes=1, now=NOW) is not None


def test_a_job_of_a_queue_does_not_wait_for_ever_for_a_pod_that_was_asked_to_go() -> None:
    """It has no condition before that pod has ended: a node that does not answer ends none."""
    patient = replace(job(ended=None), patient=True)
    assert ending(patient, [pod(meta=ASKED)], nodes=1, now=NOW) is None
    assert ending(patient, [pod(conditions=NOT_READY)], nodes=1, now=NOW) is None, "it may come back"
    silent = pod(meta=ASKED, conditions=[*NOT_READY, *target("DeletionByTaintManager")])
    end = ending(patient, [silent, pod(1)], nodes=2, now=NOW)
    assert end is not None
    assert end.reason == "DeletionByTaintManager"
    assert ending(job(ended=None), [silent, pod(1)], nodes=2, now=NOW) is None, "of others the Job controller says so"
    assert ending(replace(patient, suspended=True), [silent], nodes=1, now=NOW) is None, "it wants no pods"
    pulls = pod(meta=ASKED, phase="Pending", containerStatuses=[{"name": "trainer", "state": {"waiting": {}}}])
    deadline = datetime(2026, 3, 1, 12, 1, 30, tzinfo=UTC)
    assert ending(patient, [pulls], nodes=1, now=deadline) is None
    late = ending(patient, [pulls], nodes=1, now=deadline + timedelta(seconds=31))
    assert late is not None
    assert late.reason == "PodDeleted"


def test_what_any_pod_says_of_steps_counts() -> None:
    """Only the first node's ranks know them, whichever tells how it ended."""
    last = said(45, "Stopped", step=40, reached_step=55, resumed_from_step=30)
    end = look([ended(45, last=last), ended(139, 1)])
    assert (end.reason, end.committed, end.reached, end.began_at) == ("Crashed", 40, 55, 30)


def test_a_result_counts_whatever_became_of_the_other_pods() -> None:
    result = {
        "finalStep": 9,
        "totalSteps": 9,
        "evaluation": {},
        "model": {"uri": "s3://m", "digest": "sha256:1", "sizeBytes": 1},
    }
    last = LastMessage.model_validate({"code": 0, "reason": "Completed", "message": "m", "result": result})
    end = look([ended(0, last=last), ended(139, 1)])
    assert (end.kind, end.last) == (Kind.DONE, last)


def test_a_preflight_is_told_to_split_its_rows() -> None:
    end = look([ended(137, word="OOMKilled")], job(role="preflight"), nodes=1)
    assert "split the files of rows" in end.message


def test_every_exit_code_has_a_way() -> None:
    assert set(CODES) == set(ExitCode)


def test_every_way_is_in_the_table_once() -> None:
    made = [value for value in vars(ways).values() if isinstance(value, Way)]
    assert len(made) > 10
    assert [way.reason for way in made if way not in WAYS] == []
    assert len({way.reason for way in WAYS}) == len(WAYS)
