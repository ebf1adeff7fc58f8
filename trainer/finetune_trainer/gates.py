"""Gates: what a model must reach, and what it must not have forgotten, before consumers get it.

Judged from what was measured, so a changed gate or bound starts no training and no evaluation: preflight judges again.
Torch-free.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_api.contract import GateConfig, RetentionConfig, RunConfig, TrainOutcome
from finetune_api.status import EvaluationStatus, GateStatus, RetentionStatus
from finetune_api.tasks import lower_is_better
from finetune_trainer.slices import widest_gap
from finetune_trainer.storage import AlreadyExists, Store
from finetune_trainer.storage.commit import Record, RecordKind, publish_current

Metrics = Mapping[str, float]
BASELINES = ("trivial", "base", "probe")
ON_VALIDATION = "The gates were judged on validation rows, which also chose the checkpoint: give data.test."


def judge(
    gates: Sequence[GateConfig], *, tuned: Metrics, baselines: Mapping[str, Metrics | None]
) -> tuple[list[GateStatus], str | None]:
    """Each gate's verdict, and a sentence for those that are not met. What was not measured meets no gate."""
    judged, unmet = [], []
    for gate in gates:
        status, sentence = _judge(gate, tuned, baselines)
        judged.append(status)
        if not status.passed:
            unmet.append(sentence)
    return judged, "; ".join(unmet) or None


def _judge(gate: GateConfig, tuned: Metrics, baselines: Mapping[str, Metrics | None]) -> tuple[GateStatus, str]:
    value, name = tuned.get(gate.metric), gate.metric
    measured = value is not None and math.isfinite(value)
    if gate.improves_baseline_by is not None:
        wanted = f"better than the baseline by {gate.improves_baseline_by:g}"
        rival = best_baseline(name, baselines)
        if not measured or value is None or rival is None:
            missing = f"no baseline has {name}" if measured else f"{name} was not measured"
            return GateStatus(metric=name, passed=False, value=None, wanted=wanted), f"{missing}, wanted {wanted}"
        gain = value - rival[1] if not lower_is_better(name) else rival[1] - value
        said = f"{name} is {value:.5g}, {gain:.5g} better than {rival[0]} ({rival[1]:.5g})"
        passed = gain >= gate.improves_baseline_by
    else:
        least = gate.at_least is not None
        limit = gate.at_least if gate.at_least is not None else gate.at_most
        assert limit is not None
        wanted = f"{'>=' if least else '<='} {limit:g}"
        if not measured or value is None:
            said = f"{name} was not measured"
            return GateStatus(metric=name, passed=False, value=None, wanted=wanted), f"{said}, wanted {wanted}"
        said = f"{name} is {value:.5g}"
        passed = value >= limit if least else value <= limit
    return GateStatus(metric=name, passed=passed, value=value, wanted=wanted), f"{said}, wanted {wanted}"


def best_baseline(metric: str, baselines: Mapping[str, Metrics | None]) -> tuple[str, float] | None:
    """Name and value of the hardest baseline to beat, None where none has the metric."""
    values = {name: found[metric] for name, found in baselines.items() if found and metric in found}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    choose = min if lower_is_better(metric) else max
    best = choose(values, key=lambda name: values[name])
    return best, values[best]


def judge_retention(
    sets: Sequence[RetentionConfig], found: Sequence[Mapping[str, Any]]
) -> tuple[list[RetentionStatus], str | None]:
    """What each set has come to, and a sentence for those whose bound is broken. `found` is what is known of sets as
    retention.compare has it; what was not measured keeps no bound."""
    judged, broken = [], []
    by_name = {one["name"]: one for one in found}
    for one in sets:
        status, sentence = _judge_retention(one, by_name.get(one.name, {}))
        judged.append(status)
        if status.passed is False:
            broken.append(sentence)
    return judged, "; ".join(broken) or None


def _judge_retention(one: RetentionConfig, found: Mapping[str, Any]) -> tuple[RetentionStatus, str]:
    base, tuned = found.get("base"), found.get("tuned")
    low, high = found.get("interval") or (None, None)
    status = RetentionStatus(
        name=one.name,
        metric=one.metric,
        rows=found.get("rows", 0),
        base=base,
        tuned=tuned,
        difference=found.get("difference"),
        low=low,
        high=high,
    )
    if one.max_drop is None and one.max_rise_percent is None:
        return status, ""
    if base is None or tuned is None:
        change, passed, said = None, False, f"{one.metric} on {one.name} was not measured"
    elif one.max_drop is not None:
        change = base - tuned
        passed, said = change <= one.max_drop, f"a drop of {change:.4g}"
    else:
        assert one.max_rise_percent is not None
        change = 100.0 * (tuned - base) / base if base else math.inf if tuned > 0 else 0.0
        passed, said = change <= one.max_rise_percent, f"a rise of {change:.4g} %"
    bound = f"{one.max_drop:g}" if one.max_drop is not None else f"{one.max_rise_percent:g} %"
    wanted = f"{'drop' if one.max_drop is not None else 'rise'} <= {bound}"
    if change is not None:
        said = f"{one.metric} on {one.name} is {tuned:.5g} where the untouched base has {base:.5g}, {said}"
    return status.model_copy(update={"wanted": wanted, "passed": passed}), f"{said}, wanted {wanted}"


def rejudged(
    outcome: TrainOutcome, records: Sequence[Record], config: RunConfig, *, evaluation: str
) -> tuple[TrainOutcome, str | None]:
    """An outcome judged by the gates and bounds that are asked for now, and why it does not pass, or None."""
    status = outcome.evaluation
    baselines: dict[str, Metrics | None] = {name: getattr(status, name) for name in BASELINES}
    tuned = dict(status.tuned or {})
    kept = [_stored(one) for one in status.retention or ()]
    for record in records:  # what is stored has more digits than the status
        if record.body.get("evaluationId") != evaluation:
            continue
        if record.kind is RecordKind.BASELINE:
            baselines = {name: record.body.get(name) for name in BASELINES}
        if record.kind is RecordKind.EVALUATED and record.body.get("weights") == config.output.weights:
            tuned = dict(record.body["metrics"])
            kept = list(record.body.get("retention") or ())
            gap = widest_gap(record.body.get("slices") or [])
            if gap is not None:
                tuned["slice-gap"] = gap
    judged, unmet = judge(config.evaluation.gates, tuned=tuned, baselines=baselines)
    retained, broken = judge_retention(config.evaluation.retention, kept)
    sentences = []
    if unmet is not None:
        sentences.append(f"Not good enough on {status.on or 'no'} rows: {unmet}.")
    if broken is not None:
        sentences.append(f"Forgotten too much: {broken}.")
    judged_status = _with(status, judged).model_copy(update={"retention": retained or None})
    return outcome.model_copy(update={"evaluation": judged_status}), " ".join(sentences) or None


def _stored(one: RetentionStatus) -> dict[str, Any]:
    """A set's status as retention.compare would have it."""
    ends = None if one.low is None else (one.low, one.high)
    return {**one.model_dump(), "interval": ends}


def _with(status: EvaluationStatus, judged: list[GateStatus]) -> EvaluationStatus:
    """Gates, and a warning where validation rows were judged, go into the status."""
    others = [said for said in status.warnings or [] if said != ON_VALIDATION]
    said = [ON_VALIDATION] if judged and status.on == "validation" else []
    return status.model_copy(update={"gates": judged or None, "warnings": [*said, *others][:10] or None})


def release(
    store: Store, run_id: str, publication: str, outcome: TrainOutcome, *, check: Callable[[], None] = lambda: None
) -> None:
    """Let `current.json` name this model, once: what was released before is not released again by a later look, unless
    that file is gone or damaged, or names what this model has replaced because it was damaged.

    `check` is called when all is ready; what it raises keeps the model from being released.
    """
    marker = f"runs/{run_id}/released/{publication}.json"
    body = {"runId": run_id, "publicationId": publication, "model": outcome.model.uri, "digest": outcome.model.digest}

    def settled(current: dict[str, Any] | None) -> bool:
        check()
        if current is None or store.head(marker) is None:
            return False
        ours = (current.get("runId"), current.get("publicationId")) == (run_id, publication)
        return not ours or current == body

    if not publish_current(store, body, unless=settled):
        return
    try:
        store.create(marker, json.dumps(body, sort_keys=True).encode())
    except AlreadyExists:
        return
