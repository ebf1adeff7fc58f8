"""What a model has kept of what its base knew: retention sets, measured on the base and on the published weights.

Each measurement is a record of its own in the run's log, with the outcome of every row beside it, so that no attempt
measures twice, and both models are compared row by row. Rank 0 measures alone.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from finetune_api.contract import RetentionConfig
from finetune_api.resolve import digest
from finetune_api.tasks import PROBE
from finetune_trainer import measured, tasks
from finetune_trainer.attempt import Attempt
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import derive
from finetune_trainer.evaluate import PLACE, Evaluator, packed, unpacked
from finetune_trainer.intervals import Draws, interval
from finetune_trainer.layers import plain_of
from finetune_trainer.model import trunk_of
from finetune_trainer.retained import config_of, probed
from finetune_trainer.run import TRAIN, VALIDATION
from finetune_trainer.shared import parts_of
from finetune_trainer.signs import Stopped
from finetune_trainer.storage.commit import RecordKind, find
from finetune_trainer.tasks import Facts, Learner, Outcomes
from finetune_trainer.world import World

BASE = "base"
_log = logging.getLogger("finetune.train")


@dataclass(frozen=True)
class RetentionSet:
    """One set, in the hands of its own task."""

    config: RetentionConfig
    learner: Learner
    encoded: Encoded
    key: str
    """Equal for measurements that must come to the same."""

    @property
    def metric(self) -> str:
        """What the set's own learner calls the metric."""
        return self.config.metric.removeprefix(PROBE)


def sets_of(attempt: Attempt) -> list[RetentionSet]:
    """The sets of a run, whose files must have been fetched."""
    return [_set(attempt, one) for one in attempt.config.evaluation.retention]


def _set(attempt: Attempt, one: RetentionConfig) -> RetentionSet:
    record = attempt.record.retention[one.name]
    facts = Facts(
        labels=record.labels,
        form=record.form,
        pad_token_id=attempt.record.pad_token_id,
        max_length=attempt.record.model_max_length,
        more=record.facts,
        base=attempt.base,
    )
    learner = tasks.get(config_of(attempt.config, one)).learner(facts)
    key = digest({"task": record.task, "encoded": record.encoded.digest})[:16]
    return RetentionSet(one, learner, Encoded(attempt.path_of(record.encoded)), key)


def measure_base(attempt: Attempt) -> None:
    """Measure each set on the untouched base, unless the log has it. The other ranks wait, and show signs of life; a
    stop of rank 0 is heeded in between, and one of theirs before or after.

    Raises Stopped, Fenced, StorageError, ModelError.
    """
    if not attempt.config.evaluation.retention:
        return
    assert attempt.accelerator is not None  # made on every rank alike
    stopped = False
    if attempt.world.leads:
        try:
            of_base(attempt, beat=attempt.heart.beat_or_stop)
        except Stopped:
            stopped = True
    (stop,) = attempt.world.flags([stopped or attempt.signals.stop]).wait(attempt.heart.beat)
    if stop:
        raise Stopped


def of_base(attempt: Attempt, *, beat: Callable[[], None]) -> list[Outcomes]:
    """What the untouched base makes of each set; measures what the log lacks. On rank 0 alone."""
    base = cache(lambda: attempt.load().model.to(attempt.world.device))
    return [_outcomes(attempt, one, base, of=BASE, beat=beat) for one in sets_of(attempt)]


def compare(attempt: Attempt, before: Sequence[Outcomes], tuned_model: Callable[[], Any]) -> list[dict[str, Any]]:
    """For each set what the base (`before`, as of_base has it) and the published weights are worth on it, as JSON;
    measures what the log lacks. On rank 0 alone.

    `difference` is by how much the tuned model's metric is above that of the base, `interval` its 95 % interval, of
    rows drawn alike for both. None stands for what is no number. Raises Stopped, Fenced, StorageError, ModelError.
    """
    sets, of, beat = sets_of(attempt), attempt.config.output.weights, attempt.heart.beat_or_stop
    weights = attempt.result.sha256
    after = [_outcomes(attempt, one, tuned_model, of=of, beat=beat, weights=weights) for one in sets]
    return [_compared(attempt, *found) for found in zip(sets, before, after, strict=True)]


def _compared(attempt: Attempt, one: RetentionSet, base: Outcomes, tuned: Outcomes) -> dict[str, Any]:
    assert np.array_equal(base[PLACE], tuned[PLACE]), "both models have seen the same rows in the same order"
    draws = Draws.of(one.learner, len(base[PLACE]), seed=derive(attempt.config.training.seed, "retention", one.key))
    values, drawn = [], []
    for outcomes in (base, tuned):
        values.append(one.learner.metrics(outcomes).get(one.metric, math.nan))
        found = draws.measured(one.learner, outcomes, needed=one.metric, beat=attempt.heart.beat_or_stop)
        drawn.append(found.get(one.metric))
    ends = None if drawn[0] is None or drawn[1] is None else interval(drawn[1] - drawn[0])
    return {
        "name": one.config.name,
        "metric": one.config.metric,
        "rows": len(base[PLACE]),
        "base": _finite(values[0]),
        "tuned": _finite(values[1]),
        "difference": _finite(values[1] - values[0]),
        "interval": ends,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- one measurement ---


def _outcomes(
    attempt: Attempt,
    one: RetentionSet,
    model: Callable[[], Any],
    *,
    of: str,
    beat: Callable[[], None],
    weights: str | None = None,
) -> Outcomes:
    """Outcomes of a set's rows: those of the log, or new ones, which are committed.

    `of` is the base, or which weights; `weights` is then the digest of the checkpoint's record, since those of a run
    that was ended before its time are others when it goes on. `model` gives them.
    """
    about = {"key": one.key, "of": of, "weights": weights}
    known = _known(attempt, about)
    if known is not None:
        return known
    outcomes = _measured(attempt, one, model(), about=about, beat=beat)
    metrics = {name: value for name, value in one.learner.metrics(outcomes).items() if math.isfinite(value)}
    _log.info("retention set %s, %s: %s", one.config.name, of, metrics)
    body = {"set": one.config.name, **about, "rows": len(outcomes[PLACE]), "metrics": metrics}
    measured.commit(attempt, RecordKind.RETENTION, body, {of: outcomes}, name=f"retention/{one.key}/{of}")
    return unpacked(packed({of: outcomes}))[of]


def _known(attempt: Attempt, about: Mapping[str, Any]) -> Outcomes | None:
    """What the log has of a set and a model; None where that is nothing, or its outcomes are gone."""
    for record in reversed(find(attempt.records, RecordKind.RETENTION)):
        if {name: record.body.get(name) for name in about} == about:
            found = measured.committed(attempt, record.body)
            if found is not None:
                return found[about["of"]]
    return None


def _measured(
    attempt: Attempt, one: RetentionSet, model: Any, *, about: Mapping[str, Any], beat: Callable[[], None]
) -> Outcomes:
    """What a model makes of a set's rows, or what a linear probe makes of its features of them."""
    encoded, alone = one.encoded, World(device=attempt.world.device)
    evaluator = Evaluator(one.learner, encoded, alone, attempt.accelerator.autocast, beat, attempt.heart.beat)
    rows = encoded.rows(VALIDATION)

    def inputs_of(chunk: Any) -> Any:
        return attempt.tensors(one.learner.collate(encoded, chunk))

    if not probed(one.config):
        return measured.outcomes(attempt, evaluator, model, rows, of=about, inputs_of=inputs_of, generate=False)
    seed, fitted = attempt.config.training.seed, encoded.rows(TRAIN)
    found = evaluator.probe(Features(model), fitted, rows, inputs_of=inputs_of, seed=seed, suspicious=False)
    assert found is not None, "preflight has found several labels"
    return found.outcomes


class Features:
    """A model's trunk as its head sees it: with everything that a method has put inside of it or before its rows."""

    def __init__(self, model: Any) -> None:
        self._model = parts_of(model)[0]
        self._trunk = trunk_of(plain_of(self._model))

    def eval(self) -> None:
        self._model.eval()

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """The trunk's states: [rows, tokens, width], or as a CNN has them. Those of learned tokens are left out."""
        found: list[torch.Tensor] = []
        hook = self._trunk.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
        try:
            self._model(**inputs)
        finally:
            hook.remove()
        (states,) = found
        return (states[:, -inputs["input_ids"].shape[1] :] if "input_ids" in inputs else states,)
