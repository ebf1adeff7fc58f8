"""Gates: pure verdicts, and last messages that stay small and whole whatever was measured."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.contract import (
    MESSAGE_LIMIT,
    GateConfig,
    LastMessage,
    RetentionConfig,
    TaskConfig,
    TrainOutcome,
)
from finetune_api.status import EvaluationStatus, Gain, GateStatus, Interval, ModelStatus, RetentionStatus
from finetune_trainer.gates import best_baseline, judge, judge_retention
from finetune_trainer.lastmessage import encoded

TUNED = {"f1": 0.8, "loss": 0.5}
BASELINES = {"trivial": {"f1": 0.2, "loss": 2.0}, "base": None, "probe": {"f1": 0.7, "loss": 0.9}}


@pytest.mark.parametrize(
    ("gate", "passed", "said"),
    [
        ({"metric": "f1", "at_least": 0.8}, True, ""),
        ({"metric": "f1", "at_least": 0.81}, False, "f1 is 0.8, wanted >= 0.81"),
        ({"metric": "loss", "at_most": 0.5}, True, ""),
        ({"metric": "loss", "at_most": 0.4}, False, "loss is 0.5, wanted <= 0.4"),
        ({"metric": "f1", "improves_baseline_by": 0.05}, True, ""),
        (
            {"metric": "f1", "improves_baseline_by": 0.2},
            False,
            "f1 is 0.8, 0.1 better than probe (0.7), wanted better than the baseline by 0.2",
        ),
        ({"metric": "loss", "improves_baseline_by": 0.4}, True, ""),
        (
            {"metric": "loss", "improves_baseline_by": 0.5},
            False,
            "loss is 0.5, 0.4 better than probe (0.9), wanted better than the baseline by 0.5",
        ),
        ({"metric": "accuracy", "at_least": 0.0}, False, "accuracy was not measured, wanted >= 0"),
        (
            {"metric": "accuracy", "improves_baseline_by": 0.0},
            False,
            "accuracy was not measured, wanted better than the baseline by 0",
        ),
    ],
)
def test_a_gate_is_met_or_says_what_was_measured_and_wanted(gate: dict[str, Any], passed: bool, said: str) -> None:
    (status,), unmet = judge([GateConfig(**gate)], tuned=TUNED, baselines=BASELINES)
    assert status.passed is passed
    assert unmet == (said or None)


def test_without_a_baseline_nothing_improves_on_it() -> None:
    gate = GateConfig(metric="f1", improves_baseline_by=0.0)
    (status,), unmet = judge([gate], tuned=TUNED, baselines={"trivial": None, "base": None, "probe": None})
    assert not status.passed
    assert unmet == "no baseline has f1, wanted better than the baseline by 0"


@given(st.floats(allow_nan=True), st.floats(-10, 10))
def test_only_what_is_a_number_and_good_enough_passes(value: float, limit: float) -> None:
    for gate, holds in (
        (GateConfig(metric="f1", at_least=limit), value >= limit),
        (GateConfig(metric="f1", at_most=limit), value <= limit),
    ):
        (status,), unmet = judge([gate], tuned={"f1": value}, baselines={})
        assert status.passed == (math.isfinite(value) and holds) == (unmet is None)


def test_the_hardest_baseline_counts() -> None:
    assert best_baseline("f1", BASELINES) == ("probe", 0.7)
    assert best_baseline("loss", BASELINES) == ("probe", 0.9)
    assert best_baseline("accuracy", BASELINES) is None


def lost(base: float | None, tuned: float | None) -> dict[str, object]:
    difference = None if base is None or tuned is None else tuned - base
    ends = (difference, difference) if difference is not None else None
    return {"name": "a", "rows": 9, "base": base, "tuned": tuned, "difference": difference, "interval": ends}


@pytest.mark.parametrize(
    ("bound", "base", "tuned", "sentence"),
    [
        ({"max_rise_percent": 5.0}, 10.0, 10.4, None),
        (
            {"max_rise_percent": 5.0},
            10.0,
            11.0,
            "perplexity on a is 11 where the untouched base has 10, a rise of 10 %, wanted rise <= 5 %",
        ),
        ({"max_rise_percent": 0.0}, 10.0, 9.0, None),
        ({"max_rise_percent": 5.0}, 10.0, None, "perplexity on a was not measured, wanted rise <= 5 %"),
        ({"max_rise_percent": 5.0}, 0.0, 0.1, "perplexity on a is 0.1 where the untouched base has 0, a rise of inf %"),
        ({"max_drop": 0.02}, 0.9, 0.89, None),
        (
            {"max_drop": 0.02},
            0.9,
            0.8,
            "perplexity on a is 0.8 where the untouched base has 0.9, a drop of 0.1, wanted drop <= 0.02",
        ),
        ({}, 10.0, 1000.0, None),
    ],
)
def test_a_bound_is_broken_by_what_is_lost_in_its_direction(
    bound: dict[str, float], base: float | None, tuned: float | None, sentence: str | None
) -> None:
    task = TaskConfig(type="causal-lm", columns={"text": "text"}, labels=None)
    one = RetentionConfig(name="a", task=task, uri="s3://a/b.jsonl", metric="perplexity", **bound)
    (status,), broken = judge_retention([one], [lost(base, tuned)])
    assert status.passed == (None if not bound else sentence is None)
    assert (broken or "").startswith(sentence or "")
    assert (broken is None) == (sentence is None)
    (unknown,), said = judge_retention([one], [])
    assert (said is None) == (not bound)
    assert unknown.tuned is None


@pytest.mark.parametrize("count", [2, 10, 32])
def test_a_last_message_keeps_its_result_and_gates_however_much_was_measured(count: int) -> None:
    many = {f"a-metric-with-a-long-name-{number}": number + 0.12345 for number in range(count)}
    last = list(many)[-1]
    evaluation = EvaluationStatus(
        rows=10**6,
        on="test",
        trivial=many,
        base=many,
        probe=many,
        tuned=many,
        train=many,
        intervals={name: Interval(low=0.12345, high=0.23456) for name in many},
        gain=Gain(metric=last, over="probe", value=0.1, low=0.05, high=0.15),
        gates=[GateStatus(metric=last, passed=False, value=0.5, wanted=">= 0.8")] * 3,
        retention=[
            RetentionStatus(
                name="x" * 40,
                metric="probe-accuracy",
                rows=10**6,
                **dict.fromkeys(("base", "tuned", "difference", "low", "high"), 0.12345),
                wanted="drop <= 0.02",
                passed=number > 1,
            )
            for number in range(8)
        ],
        warnings=["w" * 512] * 10,
    )
    model = ModelStatus(uri="s3://bucket/" + "x" * 200, digest="sha256:" + "0" * 64, size_bytes=10**10)
    result = TrainOutcome(final_step=1, total_steps=1, evaluation=evaluation, model=model)
    message = LastMessage(code=48, reason="GateNotMet", message="m" * 512, run_id="a" * 16, result=result)
    data = encoded(message)
    assert len(data) <= MESSAGE_LIMIT
    found = LastMessage.model_validate_json(data)
    assert found.result is not None
    assert found.result.model == model
    assert found.result.evaluation.gates == evaluation.gates
    assert [one.passed for one in found.result.evaluation.retention or ()][:2] == [False, False]
    assert last in (found.result.evaluation.tuned or {})
    assert json.loads(data)["code"] == 48
