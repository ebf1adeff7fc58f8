"""What kwok plays instead of a kubelet and of what runs in the pods: they run at once, and end after a while.

A pod of ours ends as our images do: with the termination message of the contract.
"""

from typing import Any

import yaml

from finetune_api.contract import LastMessage, PreflightOutcome, TrainOutcome
from finetune_api.status import (
    BestCheckpoint,
    EvaluationStatus,
    GateStatus,
    Interval,
    ModelStatus,
    PreflightStatus,
    RowCounts,
    TokenLengths,
)
from finetune_operator.views import ROLE, Role

RUN_ID = "5f0c1d2e3b4a5968"
"""Of every run: it is a hash of what determines the weights, in which these documents do not differ."""
STEPS = 1000
PREFLIGHT_SECONDS, TRAIN_SECONDS = 1, 10
DURATION = "bench.finetune.dev/runs-for"
"""An annotation of pods: for how long they run, as Go writes durations."""
ADDRESSES = "127.66.0.1/16"
"""Of pods. All of them lead to this machine."""

RUNNING = """
{{ $now := Now }}
conditions:
- {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
- {type: Ready, status: "True", lastTransitionTime: {{ $now | Quote }}}
- {type: ContainersReady, status: "True", lastTransitionTime: {{ $now | Quote }}}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: true
  restartCount: 0
  state: {running: {startedAt: {{ $now | Quote }}}}
{{ end }}
hostIP: {{ NodeIPWith .spec.nodeName | Quote }}
podIP: {{ PodIPWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace | Quote }}
phase: Running
startTime: {{ $now | Quote }}
"""
ENDED = """
{{ $now := Now }}
{{ $began := .status.startTime }}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: false
  restartCount: 0
  state:
    terminated:
      exitCode: 0
      reason: Completed
      startedAt: {{ $began | Quote }}
      finishedAt: {{ $now | Quote }}
      message: 'MESSAGE'
{{ end }}
phase: Succeeded
"""
NODE = """
{{ $now := Now }}
conditions:
{{ range NodeConditions }}
- type: {{ .type | Quote }}
  status: {{ .status | Quote }}
  reason: {{ .reason | Quote }}
  message: {{ .message | Quote }}
  lastHeartbeatTime: {{ $now | Quote }}
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
phase: Running
"""


def configuration() -> str:
    """kwok's configuration file."""
    options = {
        "manageAllNodes": True,
        "cidr": ADDRESSES,
        "podPlayStageParallelism": 32,
        "nodePlayStageParallelism": 4,
        "nodeLeaseParallelism": 4,
        "nodeLeaseDurationSeconds": 40,
        "serverAddress": "",
    }
    documents = [
        {"apiVersion": "config.kwok.x-k8s.io/v1alpha1", "kind": "KwokConfiguration", "options": options},
        _stage("node-ready", "Node", [_absent_condition()], {"statusTemplate": NODE}),
        _stage("pod-runs", "Pod", [_there(False), _key(".status.podIP", "DoesNotExist")], {"statusTemplate": RUNNING}),
        _stage("pod-goes", "Pod", [_there(True)], {"finalizers": {"empty": True}, "delete": True}),
        _ending("preflight-ends", _role("preflight"), PREFLIGHT_SECONDS, _told(_preflight_message()), lasting=False),
        _ending("train-ends", _role("train"), TRAIN_SECONDS, _told(_train_message())),
        _ending("other-ends", _key(f'.metadata.labels["{ROLE}"]', "DoesNotExist"), TRAIN_SECONDS, ""),
    ]
    return yaml.safe_dump_all(documents, sort_keys=False, width=1 << 20)


def _stage(name: str, kind: str, selector: list[dict[str, Any]], following: dict[str, Any], **more: Any) -> Any:
    spec = {"resourceRef": {"apiGroup": "v1", "kind": kind}, "selector": {"matchExpressions": selector}}
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {**spec, **more, "next": following},
    }


def _ending(name: str, which: dict[str, Any], seconds: int, message: str, *, lasting: bool = True) -> Any:
    """`lasting`: an annotation of the pod may give another time."""
    delay = {"durationMilliseconds": 1000 * seconds}
    asked = {"durationFrom": {"expressionFrom": f'.metadata.annotations["{DURATION}"]'}} if lasting else {}
    selector = [_there(False), _key(".status.phase", "In", "Running"), which]
    following = {"statusTemplate": ENDED.replace("MESSAGE", message)}
    return _stage(name, "Pod", selector, following, delay={**delay, **asked})


def _key(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


def _there(deleting: bool) -> dict[str, Any]:
    return _key(".metadata.deletionTimestamp", "Exists" if deleting else "DoesNotExist")


def _role(role: Role) -> dict[str, Any]:
    return _key(f'.metadata.labels["{ROLE}"]', "In", role)


def _absent_condition() -> dict[str, Any]:
    return _key('.status.conditions.[] | select( .type == "Ready" ) | .status', "NotIn", "True")


# --- what a pod says at its end ---


def _told(message: LastMessage) -> str:
    text = message.model_dump_json(by_alias=True, exclude_none=True)
    assert "'" not in text, "it goes between single quotes"
    assert "{{" not in text, "it goes through a template"
    return text


def _preflight_message() -> LastMessage:
    rows = RowCounts(train=38211, validation=4245, test=2000)
    summary = PreflightStatus(
        rows=rows,
        labels=12,
        tokens=TokenLengths(p50=44, p95=120, p99=201, max=512),
        truncated_percent=0.3,
        warnings=["the label other has 3 rows only"],
        steps=STEPS,
        predicted_memory="3100Mi",
        report_uri=f"s3://models/any/runs/{RUN_ID}/preflight/report.json",
    )
    outcome = PreflightOutcome(state="Fresh", run_id=RUN_ID, summary=summary)
    return LastMessage(code=0, reason="Checked", message="the run may begin", run_id=RUN_ID, preflight=outcome)


def _train_message() -> LastMessage:
    tuned = {"accuracy": 0.87, "f1": 0.861}
    evaluation = EvaluationStatus(
        rows=2000,
        on="test",
        trivial={"accuracy": 0.2, "f1": 0.08},
        probe={"accuracy": 0.8, "f1": 0.79},
        tuned=tuned,
        intervals={"f1": Interval(low=0.84, high=0.88)},
        gates=[GateStatus(metric="f1", passed=True, value=0.861, wanted=">= 0.8")],
    )
    folder = f"s3://models/any/runs/{RUN_ID}/attempts/1"
    model = ModelStatus(
        uri=f"{folder}/model",
        digest="sha256:" + "0123456789abcdef" * 4,
        size_bytes=90_000_000,
        report_uri=f"{folder}/report.html",
        trainable_parameters=22_700_000,
        parameters=22_700_000,
    )
    result = TrainOutcome(
        final_step=STEPS,
        total_steps=STEPS,
        final_loss=0.31,
        best=BestCheckpoint(step=STEPS, metric="f1", value=0.85),
        evaluation=evaluation,
        model=model,
    )
    return LastMessage(
        code=0,
        reason="Done",
        message="the model is published",
        run_id=RUN_ID,
        attempt=1,
        step=STEPS,
        reached_step=STEPS,
        result=result,
    )
