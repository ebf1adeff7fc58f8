"""After training: what the published weights are worth, beside baselines on the same rows, and how sure that is.

Two records of the run's log hold it: `baseline` and `evaluated`. Beside them lie the outcomes of every row, so that
both models are compared row by row, whichever attempt measured them. Before them come the pieces of what is not done.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from finetune_api.status import EvaluationStatus, Gain, Interval, SliceStatus
from finetune_trainer import adapt, measured
from finetune_trainer.attempt import Attempt
from finetune_trainer.data.order import Rows, derive, permute
from finetune_trainer.errors import errors_of
from finetune_trainer.evaluate import PLACE
from finetune_trainer.gates import BASELINES, best_baseline, judge_retention
from finetune_trainer.intervals import Draws, Samples, gains, interval, intervals
from finetune_trainer.memorisation import METRIC as MEMORISATION
from finetune_trainer.memorisation import known_by_heart, share_interval, share_of
from finetune_trainer.model import trunk_of
from finetune_trainer.retention import compare, of_base
from finetune_trainer.run import TEST, TRAIN, VALIDATION
from finetune_trainer.slices import LEAST_ROWS, by_values
from finetune_trainer.storage.commit import RecordKind, find
from finetune_trainer.tasks import Metrics, Outcomes
from finetune_trainer.world import World

TunedModel = Callable[[], tuple[adapt.Method, Any]]
"""Gives the model that will be published, loaded when it is first asked for."""
SAMPLE = 2000
"""Training rows that are measured beside validation rows, always the same ones."""
FEW = 100
_WANTED = {"auto": BASELINES, "Base": ("base",), "Probe": ("probe",), "Trivial": ("trivial",), "None": ()}
_log = logging.getLogger("finetune.train")


def evaluated_rows(attempt: Attempt) -> tuple[str, Rows]:
    """The test rows, or the validation rows where there are none."""
    test = attempt.encoded.rows(TEST)
    return ("test", test) if len(test) else ("validation", attempt.encoded.rows(VALIDATION))


def assess(attempt: Attempt, tuned_model: TunedModel, evaluation: str) -> EvaluationStatus:
    """Measure what the log does not hold yet, and say what was found."""
    on, rows = evaluated_rows(attempt)
    if not len(rows):
        return EvaluationStatus(rows=0)
    samples = [sample(attempt.encoded.rows(split)) for split in (TRAIN, VALIDATION)]
    attempt.ask_base(np.concatenate([rows, *samples]), world=_alone(attempt))
    weights = attempt.config.output.weights
    about = {"evaluationId": evaluation, "on": on, "rows": len(rows)}
    baseline = _done(attempt, RecordKind.BASELINE, evaluationId=evaluation)
    tuned = _done(attempt, RecordKind.EVALUATED, evaluationId=evaluation, weights=weights)
    rivals: dict[str, Outcomes] | None = None
    if baseline is not None and tuned is None:
        rivals = measured.committed(attempt, baseline)
        baseline = None if rivals is None else baseline
    if baseline is None:
        rivals, suspects, shares = _baselines(attempt, rows, evaluation)
        metrics = {
            name: {**_metrics(attempt, rivals[name]), **shares.get(name, {})} if name in rivals else None
            for name in BASELINES
        }
        baseline = _append(attempt, RecordKind.BASELINE, {**about, **metrics, "suspects": suspects}, rivals)
    if tuned is None:
        assert rivals is not None
        before = of_base(attempt, beat=attempt.heart.beat_or_stop)  # while there is no other model in memory
        outcomes, found = _tuned(
            attempt, tuned_model()[1], rows, evaluation=evaluation, baseline=baseline, rivals=rivals
        )
        found["retention"] = compare(attempt, before, lambda: tuned_model()[1])
        about = {**about, "weights": weights, "rows": len(outcomes[PLACE])}  # of one row of data may be several there
        tuned = _append(attempt, RecordKind.EVALUATED, {**about, **found}, {"tuned": outcomes})
    return status_of(attempt, baseline, tuned)


def _done(attempt: Attempt, kind: RecordKind, **wanted: str) -> Mapping[str, Any] | None:
    """The newest record of a kind that is about what is wanted."""
    for record in reversed(find(attempt.records, kind)):
        if all(record.body.get(name) == value for name, value in wanted.items()):
            return record.body
    return None


def _append(
    attempt: Attempt, kind: RecordKind, body: Mapping[str, Any], outcomes: Mapping[str, Outcomes]
) -> Mapping[str, Any]:
    """Commit a record, with the outcomes of all rows beside it."""
    for name in (*BASELINES, "metrics"):
        if body.get(name):
            _log.info("%s: %s", name, body[name])
    name = f"evaluation/{body['evaluationId']}/{kind.value}"
    return measured.commit(attempt, kind, body, outcomes, name=name).body


def _outcomes(
    attempt: Attempt, model: Any, rows: Rows, *, evaluation: str, of: str | None, generate: bool = True
) -> Outcomes:
    """What a model makes of rows, in pieces that are kept. `of` is the digest of the checkpoint's record, None the
    base."""
    about = {"evaluationId": evaluation, "encoded": attempt.record.encoded.digest, "of": of}
    evaluator = attempt.evaluator(_alone(attempt))
    inputs_of = attempt.inputs_of
    return measured.outcomes(attempt, evaluator, model, rows, of=about, inputs_of=inputs_of, generate=generate)


def _metrics(attempt: Attempt, outcomes: Outcomes) -> Metrics:
    """Those that are defined: JSON has no NaN."""
    return {name: value for name, value in attempt.learner.metrics(outcomes).items() if math.isfinite(value)}


def _alone(attempt: Attempt) -> World:
    return World(device=attempt.world.device)


def _baselines(
    attempt: Attempt, rows: Rows, evaluation: str
) -> tuple[dict[str, Outcomes], list[dict[str, Any]], dict[str, Metrics]]:
    """What is to be beaten, training rows that are likely mislabelled, which the probe finds by the way, and what a
    baseline knows of training rows by heart.

    The untouched base is a baseline where nothing of it had to be invented.
    """
    wanted = _WANTED[attempt.config.evaluation.baseline]
    evaluator, train = attempt.evaluator(_alone(attempt)), attempt.encoded.rows(TRAIN)
    found: dict[str, Outcomes | None] = {}
    suspects: list[dict[str, Any]] = []
    shares: dict[str, Metrics] = {}
    if "trivial" in wanted:
        found["trivial"] = evaluator.trivial(train, rows)
    if "base" in wanted or ("probe" in wanted and attempt.learner.probe is not None):
        loaded = attempt.load()
        base = loaded.model.to(attempt.world.device)
        if "base" in wanted and not loaded.fresh:
            found["base"] = _outcomes(attempt, base, rows, evaluation=evaluation, of=None)
            shares["base"] = share_of(known_by_heart(attempt, base))
        if "probe" in wanted and attempt.learner.probe is not None:
            seed = attempt.config.training.seed
            probed = evaluator.probe(trunk_of(base), train, rows, inputs_of=attempt.inputs_of, seed=seed)
            if probed is not None:
                found["probe"], suspects = probed.outcomes, [asdict(suspect) for suspect in probed.suspects]
    return {name: outcomes for name, outcomes in found.items() if outcomes is not None}, suspects, shares


def _tuned(
    attempt: Attempt,
    model: Any,
    rows: Rows,
    *,
    evaluation: str,
    baseline: Mapping[str, Any],
    rivals: Mapping[str, Outcomes],
) -> tuple[Outcomes, dict[str, Any]]:
    """Outcomes of the tuned model, and the body of its record."""
    learner = attempt.learner
    measure = partial(_outcomes, attempt, model, evaluation=evaluation, of=attempt.result.sha256)
    outcomes = measure(rows)
    samples = _samples(attempt, outcomes)
    by_heart = known_by_heart(attempt, model)
    over = best_baseline(attempt.config.primary, {name: baseline.get(name) for name in BASELINES})
    better: Mapping[str, tuple[float, float]] = {}
    if over is not None and over[0] in rivals and _same_rows(rivals[over[0]], outcomes):
        better = gains(samples, _samples(attempt, rivals[over[0]]), higher_is_better=learner.higher_is_better)
    found = {
        "metrics": {**_metrics(attempt, outcomes), **share_of(by_heart)},
        "intervals": {**intervals(samples), **share_interval(by_heart)},
        "askedByHeart": len(by_heart),
        "gains": {"over": over[0] if over else None, "intervals": better},
        "fit": _fit(attempt, measure, outcomes),
        "slices": _slices(attempt, outcomes),
        "errors": errors_of(learner, outcomes, attempt.heart.beat_or_stop),
    }
    return outcomes, found


def _samples(attempt: Attempt, outcomes: Outcomes, *, purpose: str = "intervals") -> Samples:
    seed = derive(attempt.config.training.seed, purpose)
    draws = Draws.of(attempt.learner, len(outcomes[PLACE]), seed=seed)
    return draws.measured(attempt.learner, outcomes, needed=attempt.config.primary, beat=attempt.heart.beat_or_stop)


def _same_rows(one: Outcomes, two: Outcomes) -> bool:
    return bool(np.array_equal(one[PLACE], two[PLACE]))


def _slices(attempt: Attempt, outcomes: Outcomes) -> list[dict[str, Any]]:
    return [
        by_values(
            attempt.learner,
            outcomes,
            attempt.encoded.values(f"slice.{number}", outcomes[PLACE]),
            column=column,
            values=attempt.record.slices[column],
            metric=attempt.config.primary,
            seed=derive(attempt.config.training.seed, "slices"),
            beat=attempt.heart.beat_or_stop,
        )
        for number, column in enumerate(attempt.config.evaluation.slices)
    ]


# --- training rows beside validation rows ---


def sample(rows: Rows) -> Rows:
    """Up to SAMPLE of the rows, chosen by a hash of their place alone."""
    count = min(SAMPLE, len(rows))
    return rows[np.sort(permute(np.arange(count), size=len(rows), key=derive(0, "sample")))]


def _fit(attempt: Attempt, measure: Callable[..., Outcomes], outcomes: Outcomes) -> dict[str, Any]:
    """Metrics on training rows and on validation rows, and by how much the former are better. Nothing is generated."""
    train = measure(sample(attempt.encoded.rows(TRAIN)), generate=False)
    held = outcomes
    if len(attempt.encoded.rows(TEST)):
        held = measure(sample(attempt.encoded.rows(VALIDATION)), generate=False)
    metrics = {"train": _metrics(attempt, train), "validation": _metrics(attempt, held)}
    names = [name for name in (attempt.config.primary, "loss") if all(name in found for found in metrics.values())]
    gap = None
    if names:
        name = names[0]
        sign = 1.0 if attempt.learner.higher_is_better(name) else -1.0
        drawn = [_samples(attempt, found, purpose=p).get(name) for found, p in ((train, "train"), (held, "held"))]
        ends = None
        if drawn[0] is not None and drawn[1] is not None:
            count = min(len(drawn[0]), len(drawn[1]))
            ends = interval(sign * (drawn[0][:count] - drawn[1][:count]))
        value = sign * (metrics["train"][name] - metrics["validation"][name])
        gap = {"metric": name, "value": value, "interval": ends}
    return {"rows": len(train[PLACE]), **metrics, "gap": gap}


# --- what is said of it ---


def status_of(attempt: Attempt, baseline: Mapping[str, Any], tuned: Mapping[str, Any]) -> EvaluationStatus:
    """The figures that people are shown first."""
    config = attempt.config
    asked = config.evaluation.metrics
    names = list(tuned["metrics"]) if asked is None else list(dict.fromkeys([config.primary, *asked]))
    named = [config.primary, *(asked or [])]

    def shown(metrics: Mapping[str, float] | None) -> Metrics | None:
        return None if metrics is None else {name: metrics[name] for name in names if name in metrics}

    ends = {name: Interval(low=low, high=high) for name, (low, high) in tuned["intervals"].items() if name in named}
    return EvaluationStatus(
        rows=tuned["rows"],
        on="test" if tuned["on"] == "test" else "validation",
        trivial=shown(baseline["trivial"]),
        base=shown(baseline["base"]),
        probe=shown(baseline["probe"]),
        tuned=shown(tuned["metrics"]),
        intervals=ends or None,
        gain=_gain(attempt, baseline, tuned),
        train=shown(tuned["fit"]["train"]),
        slices=[_slice_status(found) for found in tuned["slices"]] or None,
        retention=judge_retention(config.evaluation.retention, tuned.get("retention") or ())[0] or None,
        warnings=_warnings(attempt, baseline, tuned)[:10] or None,
    )


def _gain(attempt: Attempt, baseline: Mapping[str, Any], tuned: Mapping[str, Any]) -> Gain | None:
    name, over = attempt.config.primary, tuned["gains"]["over"]
    if over is None or name not in tuned["metrics"]:
        return None
    sign = 1.0 if attempt.learner.higher_is_better(name) else -1.0
    low, high = tuned["gains"]["intervals"].get(name, (None, None))
    return Gain(
        metric=name, over=over, value=sign * (tuned["metrics"][name] - baseline[over][name]), low=low, high=high
    )


def _slice_status(found: Mapping[str, Any]) -> SliceStatus:
    gap = found["gap"] or {}
    low, high = gap.get("interval") or (None, None)
    named = {"gap": gap.get("value"), "best": gap.get("best"), "worst": gap.get("worst")}
    return SliceStatus(column=found["column"], **named, low=low, high=high, equalized_odds=found["equalizedOdds"])


def _warnings(attempt: Attempt, baseline: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    said = []
    gain = _gain(attempt, baseline, tuned)
    if gain is not None and gain.low is not None and gain.high is not None and gain.low <= 0:
        said.append(
            f"The tuned model is not surely better than {gain.over}: {gain.metric} is better by {gain.value:.3g} "
            f"({gain.low:.3g} to {gain.high:.3g})."
        )
    gap = tuned["fit"]["gap"]
    if gap is not None and gap["interval"] is not None and gap["interval"][0] > 0:
        name = gap["metric"]
        train, held = (tuned["fit"][side][name] for side in ("train", "validation"))
        said.append(
            f"Overfitting: {name} is {train:.3g} on training rows and {held:.3g} on validation rows; fewer epochs, "
            "more rows, dropout or weight decay help."
        )
    said += _by_heart(baseline, tuned)
    for found in tuned["slices"]:
        gap, column, name = found["gap"], found["column"], found["metric"]
        if gap is None:
            said.append(f"{column}: fewer than two values have {LEAST_ROWS} rows, so there is no gap between them.")
        elif gap["interval"] and gap["interval"][0] > 0:
            said.append(f"{column}: {name} is better by {gap['value']:.3g} for {gap['best']} than for {gap['worst']}.")
    if attempt.config.evaluation.baseline == "Base" and baseline["base"] is None:
        said.append("The untouched base cannot do the task, so there is no baseline: choose evaluation.baseline auto.")
    if tuned["rows"] < FEW:
        said.append(f"Only {tuned['rows']} rows were measured, so the figures are rough.")
    return said


def _by_heart(baseline: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    """Whether the model has surely learned training rows by heart that the base did not know so."""
    ends = tuned["intervals"].get(MEMORISATION)
    before = (baseline["base"] or {}).get(MEMORISATION, 0.0)
    if ends is None or ends[0] <= before:
        return []
    return [
        f"The model knows training rows by heart: {tuned['metrics'][MEMORISATION]:.1%} of {tuned['askedByHeart']} "
        f"({ends[0]:.1%} to {ends[1]:.1%}), the base {before:.1%}; fewer epochs, data.deduplicate or a lower learning "
        "rate help, and personal data does not belong in such rows."
    ]
