"""How the benchmark of the operator tells its writes apart."""

from typing import Any

from bench.operator.burst import said_by, turn


def version(number: int, *, phase: str = "Training", **status: Any) -> dict[str, Any]:
    conditions = [{"type": "Succeeded", "status": "Unknown", "reason": phase, "message": f"of version {number}"}]
    return {
        "metadata": {"uid": "1", "resourceVersion": str(number)},
        "status": {"phase": phase, "conditions": conditions, "message": f"of version {number}", **status},
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    now = said_by(after)
    assert now is not None
    return turn(said_by(before), now)


def test_a_new_phase_is_of_the_lifecycle_and_the_same_version_is_no_write() -> None:
    before = version(1)
    assert changed(version(1, phase="Starting"), version(2)) == "lifecycle"
    assert changed(before, before) is None
    assert said_by({"metadata": before["metadata"], "status": {}}) is None


def test_steps_and_what_goes_on_are_mere_progress() -> None:
    before = version(1, progress={"step": 1}, usage={"attempts": 1, "ongoing": {"gpuSeconds": 1}})
    usage = {"attempts": 1, "ongoing": {"gpuSeconds": 9}}
    after = version(2, progress={"step": 2}, checkpoint={"step": 2}, usage=usage)
    assert changed(before, after) == "progress"


def test_what_an_attempt_has_cost_is_not_mere_progress() -> None:
    assert changed(version(1, usage={"attempts": 1}), version(2, usage={"attempts": 2})) == "other"


def test_to_write_again_what_has_ended_is_never_progress() -> None:
    assert changed(version(1, phase="Succeeded"), version(2, phase="Succeeded")) == "other"
