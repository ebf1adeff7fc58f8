"""What golden documents of the real node do not hide."""

import copy
from typing import Any

import pytest
from tests.e2e.real import shown

pytestmark = pytest.mark.e2e

UID = "12345678-aaaa-bbbb-cccc-123456789012"


def job(*, run: str = "0123456789abcdef", stopped: int = 12, total: int = 36, f1: float = 0.861) -> dict[str, Any]:
    """One that was stopped and has succeeded, whose numbers are such."""
    output = f"s3://runs/{run[:8]}-one"
    said = f"f1 {f1:.3f} on validation (trivial 0.111, probe 0.700)"
    status = {
        "phase": "Succeeded",
        "message": said,
        "conditions": [
            {"type": "PreflightPassed", "status": "True", "message": f"goes on from step {stopped}"},
            {"type": "Succeeded", "status": "True", "lastTransitionTime": "2026-01-02T03:04:05Z", "message": said},
        ],
        "run": {"id": run, "generation": 3, "attempt": stopped, "startedAt": "2026-01-02T03:04:05Z"},
        "restarts": [{"attempt": 1, "reason": "Suspended", "resumedFromStep": stopped, "lostSteps": 0}],
        "checkpoint": {"step": total, "best": {"step": total, "metric": "f1", "value": f1}},
        "progress": {"step": total, "totalSteps": total, "percent": 100, "loss": f1 / 3},
        "preflight": {"rows": {"train": 4 * total, "validation": total // 2}, "steps": total, "labels": 2},
        "evaluation": {"on": "validation", "rows": total // 2, "tuned": {"f1": f1}, "gates": [{"passed": True}]},
        "model": {"uri": f"{output}/runs/{run}/attempts/{stopped}/model", "digest": f"sha256:{run * 4}"},
        "usage": {"attempts": 2, "gpuSeconds": stopped, "lostSteps": 0},
    }
    meta = {"name": "one", "namespace": f"e2e-{run[:5]}", "uid": UID}
    return {"metadata": meta, "spec": {"output": {"uri": output}}, "status": status}


def test_numbers_of_another_run_on_another_machine_make_no_other_document() -> None:
    assert shown(job()) == shown(job(run="fedcba9876543210", stopped=8, total=40, f1=0.5))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("phase",), "Failed"),
        (("conditions", 0, "status"), "Unknown"),
        (("conditions", 0, "message"), "goes on from step 11"),
        (("restarts", 0, "reason"), "Killed"),
        (("restarts", 0, "lostSteps"), 1),
        (("checkpoint", "step"), 35),
        (("progress", "step"), 12),
        (("preflight", "labels"), 3),
        (("evaluation", "on"), "test"),
        (("evaluation", "rows"), 17),
        (("evaluation", "tuned"), {"accuracy": 0.861}),
        (("evaluation", "gates", 0, "passed"), False),
        (("model", "uri"), "s3://elsewhere/model"),
        (("usage", "attempts"), 3),
        (("run", "generation"), 2),
    ],
)
def test_what_is_wrong_makes_another_document(path: tuple[str | int, ...], value: Any) -> None:
    wrong: Any = copy.deepcopy(job())
    place = wrong["status"]
    for name in path[:-1]:
        place = place[name]
    assert place[path[-1]] != value
    place[path[-1]] = value
    assert shown(wrong) != shown(job())
