"""After training: baseline, evaluation of the weights that will be published, publication. On rank 0 alone.

Each is a record of its own in the run's log, and so are pieces of an evaluation that goes on (measured.py): an attempt
that is killed in between repeats little and never trains again. Another test set or another form of publication does
not train again either.
"""

import json
import logging
from functools import cache, partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from finetune_api.contract import TrainOutcome
from finetune_api.resolve import evaluation_id, publication_id
from finetune_api.status import EvaluationStatus, ModelStatus
from finetune_trainer import adapt, checkpoint, gates, publish
from finetune_trainer.adapt.base import parameter_counts
from finetune_trainer.assess import TunedModel, assess
from finetune_trainer.attempt import Attempt, fetch_inputs
from finetune_trainer.report import page
from finetune_trainer.report.gather import gather
from finetune_trainer.run import TRAIN, retained, tested
from finetune_trainer.saving import NOT_DELETED
from finetune_trainer.storage import StorageError
from finetune_trainer.storage.commit import (
    STOPPED,
    Fenced,
    Record,
    RecordKind,
    Staging,
    collect_garbage,
    find,
    object_entry,
    part_of,
    uncommitted,
    what_is_wrong,
)

_log = logging.getLogger("finetune.train")


def finish(attempt: Attempt) -> tuple[TrainOutcome, str | None]:
    """Do what is left; the outcome, and which gates are not met, or None.

    Consumers get the model only when it meets all gates. Raises Stopped, Fenced, StorageError, ModelError.
    """
    trained = attempt.trained
    assert trained is not None
    steps = {"step": trained.body["step"], "total_steps": trained.body["totalSteps"]}
    manifest = attempt.record.manifest
    evaluation = evaluation_id(
        attempt.record.run_id,
        attempt.config,
        test=tested(manifest),
        retention=retained(manifest),
        part=part_of(attempt.records, trained, weights=attempt.config.output.weights),
    )
    publication = publication_id(evaluation, attempt.config)
    outcome = _published(attempt, publication)
    if outcome is None:
        attempt.reporter.update(stage="Loading", **steps)
        fetch_inputs(attempt)
        attempt.reporter.update(stage="Evaluating", **steps)
        tuned = cache(partial(_tuned_model, attempt))
        status = assess(attempt, tuned, evaluation)
        attempt.reporter.update(stage="Publishing")
        outcome = _publish(attempt, trained, tuned, status, evaluation=evaluation, publication=publication)
    outcome, unmet = gates.rejudged(outcome, attempt.records, attempt.config, evaluation=evaluation)
    if unmet is None:
        assert attempt.claim is not None
        gates.release(attempt.store, attempt.record.run_id, publication, outcome, check=attempt.claim.check)
    _tidy(attempt)
    return outcome, unmet


def _tidy(attempt: Attempt) -> None:
    """No checkpoint follows whose commit would do it. What is done is done: a newer attempt or a store that fails here
    changes nothing of it."""
    assert attempt.claim is not None
    attempt.heart.beat()
    try:
        collect_garbage(attempt.claim)
    except (Fenced, StorageError) as error:
        _log.warning("%s: %s", NOT_DELETED, error)


def _published(attempt: Attempt, publication: str) -> TrainOutcome | None:
    """The outcome of the publication that is asked for, if it exists and is whole."""
    for record in reversed(find(attempt.records, RecordKind.PUBLISHED)):
        if record.body.get("publicationId") == publication:
            wrong = what_is_wrong(attempt.store, record.body.get("objects") or [], beat=attempt.heart.beat_or_stop)
            if wrong is not None:
                _log.warning("the published model is not whole (%s); it is made again", wrong)
                continue
            try:
                # A newer version, which was rolled back since, may have written more than is known here.
                return TrainOutcome.model_validate_json(json.dumps(record.body["outcome"]), extra="ignore")
            except (ValidationError, KeyError):
                continue
    return None


def _tuned_model(attempt: Attempt) -> tuple[adapt.Method, Any]:
    """The base with the weights that will be published."""
    record = attempt.result
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
    few = np.concatenate([rows[:8] for rows in groups])
    example = attempt.learner.model_inputs(attempt.tensors(attempt.learner.collate(attempt.encoded, few)))
    directory = attempt.work / "model"
    digest = publish.write_directory(
        directory,
        model=model,
        method=method,
        base=attempt.base,
        config=attempt.config,
        evaluation=status,
        example=example,
        files=attempt.learner.files(),
        usage=attempt.learner.usage(),
        license_name=attempt.record.license,
        beat=attempt.heart.beat_or_stop,
    )
    prefix = f"{attempt.claim.prefix}model/"
    with uncommitted(attempt.claim) as staging:
        attempt.claim.check()
        objects = publish.upload_directory(directory, staging, prefix, beat=attempt.heart.beat_or_stop)
        outcome = TrainOutcome(
            final_step=trained.body["step"],
            total_steps=trained.body["totalSteps"],
            final_loss=trained.body["finalLoss"],
            best=trained.body["best"],
            partial=trained.body["end"] == STOPPED,
            evaluation=status,
            model=ModelStatus(
                uri=f"{attempt.store.uri}/{prefix.rstrip('/')}",
                digest=digest,
                size_bytes=sum(entry["size"] for entry in objects),
                trainable_parameters=trained_parameters,
                parameters=parameters,
            ),
        )
        hint = method.load_hint(model, merge=attempt.config.output.merge)
        outcome, objects = _reported(attempt, outcome, objects, staging=staging, evaluation=evaluation, load_hint=hint)
        body = {
            "publicationId": publication,
            "evaluationId": evaluation,
            "end": trained.body["end"],
            "outcome": outcome.model_dump(mode="json", by_alias=True),
            "objects": objects,
        }
        attempt.claim.append(RecordKind.PUBLISHED, body)
    return outcome


def _reported(
    attempt: Attempt,
    outcome: TrainOutcome,
    objects: list[dict[str, Any]],
    *,
    staging: Staging,
    evaluation: str,
    load_hint: str,
) -> tuple[TrainOutcome, list[dict[str, Any]]]:
    """The outcome with the address of its report, which lies beside the model, and the objects with the report."""
    assert attempt.claim is not None
    judged, _ = gates.rejudged(outcome, attempt.records, attempt.config, evaluation=evaluation)
    html = page(gather(attempt, judged, evaluation=evaluation, load_hint=load_hint))
    key = f"{attempt.claim.prefix}report.html"
    entry = object_entry(staging.write(key, html.encode()))
    model = outcome.model.model_copy(update={"report_uri": f"{attempt.store.uri}/{key}"})
    return outcome.model_copy(update={"model": model}), [*objects, entry]
