"""After training: baseline, evaluation of the weights that will be published, publication. On rank 0 alone.

Each is a record of its own in the run's log, so an attempt that is killed in between repeats at most one of them and
never trains again; another test set or another form of publication does not train again either.
"""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from finetune_api.contract import TrainOutcome
from finetune_api.job import EvaluationStatus, Metrics, ModelStatus
from finetune_api.resolve import evaluation_id, publication_id
from finetune_trainer import adapt, checkpoint, publish
from finetune_trainer.adapt.base import parameter_counts
from finetune_trainer.attempt import Attempt, fetch_inputs
from finetune_trainer.data.order import Rows
from finetune_trainer.model import trunk_of
from finetune_trainer.run import TEST, TRAIN, VALIDATION, tested
from finetune_trainer.storage import Damaged, Store
from finetune_trainer.storage.commit import Record, RecordKind, find, publish_current
from finetune_trainer.world import World

TunedModel = Callable[[], tuple[adapt.Method, Any]]
"""Gives the model that will be published, loaded when it is first asked for."""
_log = logging.getLogger("finetune.train")


def finish(attempt: Attempt) -> TrainOutcome:
    """Do what is left and return the outcome. Raises Stopped, Fenced, StorageError, ModelError."""
    trained = attempt.trained
    assert trained is not None
    steps = {"step": trained.body["step"], "total_steps": trained.body["totalSteps"]}
    evaluation = evaluation_id(attempt.record.run_id, test=tested(attempt.record.manifest))
    publication = publication_id(evaluation, attempt.config)
    outcome = _published(attempt, publication)
    if outcome is None:
        attempt.reporter.update(stage="Loading", **steps)
        fetch_inputs(attempt)
        attempt.reporter.update(stage="Evaluating", **steps)
        tuned = cache(partial(_tuned_model, attempt, trained))
        status = _evaluate(attempt, tuned, evaluation)
        attempt.reporter.update(stage="Publishing")
        outcome = _publish(attempt, trained, tuned, status, evaluation=evaluation, publication=publication)
    publish_current(
        attempt.store,
        {
            "runId": attempt.record.run_id,
            "publicationId": publication,
            "model": outcome.model.uri,
            "digest": outcome.model.digest,
        },
    )
    return outcome


def _published(attempt: Attempt, publication: str) -> TrainOutcome | None:
    """The outcome of the publication that is asked for, if it exists and is whole."""
    for record in reversed(find(attempt.records, RecordKind.PUBLISHED)):
        if record.body.get("publicationId") == publication and _is_whole(record, attempt.store):
            try:
                return TrainOutcome.model_validate_json(json.dumps(record.body["outcome"]))
            except (ValidationError, KeyError):
                continue
    return None


def _is_whole(record: Record, store: Store) -> bool:
    entries = record.body.get("objects") or []
    heads = [(store.head(entry["key"]), entry["size"]) for entry in entries]
    return bool(heads) and all(info is not None and info.size == size for info, size in heads)


def _evaluate(attempt: Attempt, tuned_model: TunedModel, evaluation: str) -> EvaluationStatus:
    """Baseline and tuned metrics on the test rows, or on the validation rows where there are none."""
    test, validation = attempt.encoded.rows(TEST), attempt.encoded.rows(VALIDATION)
    on, rows = ("test", test) if len(test) else ("validation", validation)
    if not len(rows):
        return EvaluationStatus(rows=0)
    baseline = _done(attempt, RecordKind.BASELINE, evaluationId=evaluation)
    if baseline is None:
        baseline = {"evaluationId": evaluation, "on": on, "rows": len(rows), **_baseline(attempt, rows)}
        _append(attempt, RecordKind.BASELINE, baseline)
    weights = attempt.config.output.weights
    tuned = _done(attempt, RecordKind.EVALUATED, evaluationId=evaluation, weights=weights)
    if tuned is None:
        evaluator = attempt.evaluator(_alone(attempt))
        metrics = evaluator.measure(tuned_model()[1], rows, inputs_of=attempt.inputs_of)
        _log.info("tuned: %s", metrics)
        tuned = {
            "evaluationId": evaluation,
            "weights": weights,
            "on": on,
            "rows": len(rows),
            "metrics": metrics,
        }
        _append(attempt, RecordKind.EVALUATED, tuned)
    return EvaluationStatus(
        rows=len(rows),
        on="test" if on == "test" else "validation",
        trivial=baseline["trivial"],
        base=baseline["base"],
        probe=baseline["probe"],
        tuned=tuned["metrics"],
    )


def _done(attempt: Attempt, kind: RecordKind, **wanted: str) -> Mapping[str, Any] | None:
    """The newest record of a kind that is about what is wanted."""
    for record in reversed(find(attempt.records, kind)):
        if all(record.body.get(name) == value for name, value in wanted.items()):
            return record.body
    return None


def _append(attempt: Attempt, kind: RecordKind, body: Mapping[str, Any]) -> None:
    assert attempt.claim is not None
    attempt.claim.append(kind, body)


def _baseline(attempt: Attempt, rows: Rows) -> dict[str, Metrics | None]:
    """The metrics to beat. The untouched base is one of them where nothing of it had to be invented."""
    evaluator, train = attempt.evaluator(_alone(attempt)), attempt.encoded.rows(TRAIN)
    loaded = attempt.load()
    base = loaded.model.to(attempt.world.device)
    found: dict[str, Metrics | None] = {
        "trivial": evaluator.trivial(train, rows),
        "base": None if loaded.fresh else evaluator.measure(base, rows, inputs_of=attempt.inputs_of),
        "probe": None,
    }
    if attempt.learner.probe is not None:
        seed = attempt.config.training.seed
        found["probe"] = evaluator.probe(trunk_of(base), train, rows, inputs_of=attempt.inputs_of, seed=seed)
    for name, metrics in found.items():
        _log.info("%s: %s", name, metrics)
    return found


def _alone(attempt: Attempt) -> World:
    return World(device=attempt.world.device)


def _tuned_model(attempt: Attempt, trained: Record) -> tuple[adapt.Method, Any]:
    """The base with the weights that will be published."""
    number = trained.body["weights"][attempt.config.output.weights]
    record = next((record for record in attempt.records if record.number == number), None)
    if record is None:
        raise Damaged(
            "CheckpointsDamaged", f"Record {number} of the run's log, which holds the trained weights, is damaged."
        )
    directory = checkpoint.directory_of(attempt.work, record.sha256)
    checkpoint.fetch(record.body, attempt.store, directory, beat=attempt.heart.beat_or_stop)
    method = attempt.method
    model = method.prepare(attempt.load(), seed=attempt.config.training.seed)
    checkpoint.restore_weights(model, checkpoint.open_fetched(directory).result)
    return method, model.to(attempt.world.device)


def _publish(
    attempt: Attempt,
    trained: Record,
    tuned_model: TunedModel,
    status: EvaluationStatus,
    *,
    evaluation: str,
    publication: str,
) -> TrainOutcome:
    """Write, upload and commit the model's directory."""
    assert attempt.claim is not None
    method, model = tuned_model()
    trained_parameters, parameters = parameter_counts(model)
    groups = attempt.learner.groups(attempt.encoded, attempt.encoded.rows(TRAIN))
    some = np.concatenate([rows[:8] for rows in groups])
    example = attempt.learner.model_inputs(attempt.inputs_of(some))
    directory = attempt.work / "model"
    digest = publish.write_directory(
        directory,
        model=model,
        method=method,
        base=attempt.base,
        config=attempt.config,
        evaluation=status,
        example=example,
    )
    prefix = f"{attempt.claim.prefix}model/"
    objects = publish.upload_directory(directory, attempt.store, prefix, beat=attempt.heart.beat_or_stop)
    outcome = TrainOutcome(
        final_step=trained.body["step"],
        total_steps=trained.body["totalSteps"],
        final_loss=trained.body["finalLoss"],
        best=trained.body["best"],
        evaluation=status,
        model=ModelStatus(
            uri=f"{attempt.store.uri}/{prefix.rstrip('/')}",
            digest=digest,
            size_bytes=sum(entry["size"] for entry in objects),
            trainable_parameters=trained_parameters,
            parameters=parameters,
        ),
    )
    body = {
        "publicationId": publication,
        "evaluationId": evaluation,
        "end": trained.body["end"],
        "outcome": outcome.model_dump(mode="json", by_alias=True),
        "objects": objects,
    }
    attempt.claim.append(RecordKind.PUBLISHED, body)
    return outcome
