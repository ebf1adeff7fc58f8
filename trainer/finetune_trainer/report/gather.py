"""From what a run has recorded to what its report says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from finetune_api.contract import TrainOutcome
from finetune_trainer import tasks
from finetune_trainer.attempt import Attempt
from finetune_trainer.base_model import read_base_model
from finetune_trainer.foresight import foresee, quantity
from finetune_trainer.gates import BASELINES
from finetune_trainer.predicted import Prediction
from finetune_trainer.report.page import Errors, Mistake, Report
from finetune_trainer.run import TEST, TRAIN, VALIDATION
from finetune_trainer.storage import open_store
from finetune_trainer.storage.commit import RecordKind, find

_BINS = 24
_SHOWN_TOKENS = 256


def gather(attempt: Attempt, outcome: TrainOutcome, *, evaluation: str, load_hint: str) -> Report:
    """The report of a run that is about to be published. Texts of rows are decoded from their tokens."""
    config, status = attempt.config, outcome.evaluation
    baseline = _body(attempt, RecordKind.BASELINE, evaluation)
    tuned = _body(attempt, RecordKind.EVALUATED, evaluation)
    curve = attempt.trained.body.get("curve", {}) if attempt.trained else {}
    errors: Mapping[str, Any] = tuned.get("errors", {})
    suspects = baseline.get("suspects", [])
    parts = dict.fromkeys([*errors, *(found["part"] for found in suspects)])
    return Report(
        title=config.job,
        subtitle=f"{config.task.type} · {config.method.type} on {config.model}",
        evaluation=status,
        primary=config.primary,
        rivals={name: baseline.get(name) for name in BASELINES},
        tuned=tuned.get("metrics", {}),
        intervals=tuned.get("intervals", {}),
        fit=tuned.get("fit", {}),
        losses=curve.get("losses", ()),
        evaluations=curve.get("evaluations", ()),
        errors=[_errors(attempt, part, errors.get(part, {}), suspects) for part in parts],
        slices=tuned.get("slices", ()),
        lengths=_lengths(attempt),
        warnings=status.warnings or (),
        configuration=yaml.safe_dump(_configuration(attempt), sort_keys=False, allow_unicode=True, width=100),
        load_hint=load_hint,
        facts=_facts(attempt, outcome),
    )


def _body(attempt: Attempt, kind: RecordKind, evaluation: str) -> Mapping[str, Any]:
    for record in reversed(find(attempt.records, kind)):
        weights = record.body.get("weights", attempt.config.output.weights)
        if record.body.get("evaluationId") == evaluation and weights == attempt.config.output.weights:
            return record.body
    return {}


def _errors(attempt: Attempt, part: str, found: Mapping[str, Any], suspects: Sequence[Mapping[str, Any]]) -> Errors:
    """Where the model errs in one of several tasks, or in the only one."""
    return Errors(
        task=part,
        labels=found.get("labels", ()),
        confusion=found.get("confusion"),
        mistakes=[
            _mistake(attempt, one["place"], one["truth"] or "", one["answer"] or "", one["loss"])
            for one in found.get("mistakes", ())
        ],
        suspects=[
            _mistake(attempt, one["place"], one["label"], one["likelier"], one["quality"])
            for one in suspects
            if one["part"] == part
        ],
    )


def _mistake(attempt: Attempt, place: int, truth: str, answer: str, score: float) -> Mistake:
    """A row of the store: where it is in the data, and its picture, or its text as far as its tokens tell."""
    rows = np.array([place])
    number = int(attempt.encoded.values("source", rows)[0])
    line = int(attempt.encoded.values("row", rows)[0])
    where = f"{attempt.record.manifest[number].uri}:{line}"
    picture = attempt.learner.picture(attempt.encoded, place)
    if picture is not None:
        name, png = picture
        return Mistake(where, name or where.rpartition("/")[2], truth, answer, score, png)
    if not attempt.encoded.has("input_ids"):
        return Mistake(where, where.rpartition("/")[2], truth, answer, score)
    tokens = attempt.encoded.each("input_ids", rows)[0][:_SHOWN_TOKENS].tolist()
    return Mistake(where, attempt.tokenizer.decode(tokens, skip_special_tokens=True), truth, answer, score)


def _lengths(attempt: Attempt) -> tuple[list[int], list[float]]:
    """Tokens of rows; nothing where rows have none, which then count as one."""
    rows = np.concatenate([attempt.encoded.rows(split) for split in (TRAIN, VALIDATION, TEST)])
    lengths = attempt.encoded.lengths(rows)
    if lengths.max(initial=1) == 1:
        return [], []
    counts, edges = np.histogram(lengths, bins=_BINS)
    return counts.tolist(), edges.tolist()


def _configuration(attempt: Attempt) -> dict[str, Any]:
    """What decides the model and how it is judged; nothing of storage or pods."""
    document = attempt.config.document()
    kept = ("task", "model", "data", "method", "training", "primary", "evaluation", "decoding", "output")
    return {name: document[name] for name in kept if document.get(name)}


def _facts(attempt: Attempt, outcome: TrainOutcome) -> list[tuple[str, str]]:
    encoded, model = attempt.encoded, outcome.model
    rows = [f"{len(encoded.rows(split)):,}" for split in (TRAIN, VALIDATION, TEST)]
    found = [
        ("run", attempt.record.run_id),
        ("steps", f"{outcome.final_step} of {outcome.total_steps}"),
        ("rows: train, validation, test", ", ".join(rows)),
        ("measured on", f"{outcome.evaluation.rows} {outcome.evaluation.on} rows"),
        ("size", f"{model.size_bytes / 1e6:.1f} MB"),
    ]
    if model.trainable_parameters is not None and model.parameters:
        share = model.trainable_parameters / model.parameters
        found.append(("parameters trained", f"{model.trainable_parameters:,} of {model.parameters:,} ({share:.2%})"))
    predicted = _predicted(attempt)
    if predicted is not None:
        found.append(
            ("memory predicted", f"{quantity(predicted.total)} of a {'GPU' if attempt.config.pods.gpus else 'pod'}")
        )
    if outcome.best is not None:
        found.append(("best step", f"{outcome.best.step} ({outcome.best.metric} {outcome.best.value:.4g})"))
    return found


def _predicted(attempt: Attempt) -> Prediction | None:
    """What preflight has foretold, told again from the same files."""
    base = read_base_model(open_store(attempt.base.as_uri(), attempt.settings), reads=tasks.get(attempt.config).reads)
    config, record, encoded = attempt.config, attempt.record, attempt.encoded
    return foresee(config, record, model=base.config, shapes=base.shapes, encoded=encoded).memory
