"""Retention sets in preflight: rows that the base is good at, checked and encoded like any others, each set by itself.

A set is a task of its own on the same base: `config_of` is the run as that task sees it. Torch-free.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.contract import EvaluationConfig, RetentionConfig, RunConfig
from finetune_api.tasks import PROBE, TASKS
from finetune_trainer import tasks
from finetune_trainer.data.check import MAX_LABELS, Checker, Problems
from finetune_trainer.data.encode import Encoded, Encoder
from finetune_trainer.data.read import DataError, Located, Rows, locate
from finetune_trainer.data.split import side
from finetune_trainer.run import TRAIN, VALIDATION, EncodedRef, Input, RetentionRecord, encoded_key
from finetune_trainer.storage import StorageSettings
from finetune_trainer.tasks import Task
from finetune_trainer.tasks.base import Tools

HELD = 0.5
"""The share of a set's rows, by a hash of their content, that a probe answers; it is fitted on the others."""
_log = logging.getLogger("finetune.preflight")


@dataclass(frozen=True)
class Prepared:
    """A set that is ready to be measured."""

    inputs: list[Input]
    record: RetentionRecord
    encoded: Encoded


def config_of(config: RunConfig, one: RetentionConfig) -> RunConfig:
    """The run as the task of a retention set sees it: nothing of how the run's own task is trained."""
    data = config.data.model_copy(
        update={
            "train": [],
            "train_tasks": None,
            "train_weights": None,
            "validation_uri": one.uri,
            "validation_sources": None,
            "test_uri": None,
            "test_sources": None,
            "overlong": "Split" if TASKS[one.task.type].splits else "Truncate",
        }
    )
    training = config.training.model_copy(
        update={"loss": "cross-entropy", "label_smoothing": 0.0, "class_weights": None}
    )
    task = one.task.model_copy(update={"image_size": config.task.image_size})
    update = {"task": task, "data": data, "training": training, "evaluation": EvaluationConfig(), "primary": one.metric}
    return config.model_copy(update=update)


def probed(one: RetentionConfig) -> bool:
    """Whether a set is measured by a linear probe on frozen features."""
    return one.metric.startswith(PROBE)


def prepare(
    config: RunConfig, one: RetentionConfig, *, tools: Tools, settings: StorageSettings, scratch: Path
) -> Prepared:
    """Read, check and encode a set. `tools` are those of its own task.

    Raises DataError with the first problem and the number of the others, and StorageError.
    """
    scratch.mkdir(parents=True)
    problems = Problems()
    task = tasks.get(config_of(config, one))
    facts = task.facts(tools)
    places = locate(one.uri, settings)
    encoder = Encoder(task, tools, scratch=scratch, sources=[place.uri for place in places], problem=problems.add)
    reading = _Reading(one, task, encoder, problems, scratch)
    for number, place in enumerate(places):
        several = len(places) > 1 or place.uri != one.uri
        reading.read(place, number, role=f"retention/{one.name}" + (f"/{number}" if several else ""))
    labels = reading.labels()
    _raise(problems)
    encoded = encoder.finish(labels, path=scratch / "encoded.safetensors")
    _raise(problems)
    record = RetentionRecord(
        task=one.task.document(),
        labels=labels,
        form=reading.checker.forms.get("", ""),
        facts=facts,
        encoded=EncodedRef(key=encoded_key(encoded.digest), digest=encoded.digest, rows=encoded.rows),
    )
    return Prepared(reading.inputs, record, encoded)


@dataclass
class _Reading:
    """The state of one pass over a set's files."""

    one: RetentionConfig
    task: Task
    encoder: Encoder
    problems: Problems
    scratch: Path
    inputs: list[Input] = field(default_factory=list)
    found: Mapping[int, Counter[str]] = field(default_factory=lambda: {TRAIN: Counter(), VALIDATION: Counter()})
    """How many rows of each side have each label."""
    rows: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        place = f"spec.evaluation.retention[{self.one.name}].task"
        self.checker = Checker(self.task, group_by=None, problems=self.problems, place=place)

    def read(self, place: Located, number: int, *, role: str) -> None:
        """Check and encode the rows of one file."""
        wanted = list(self.task.columns.values())
        rows = Rows(place.store, place.key, uri=place.uri, wanted=wanted, scratch=self.scratch)
        for example in self.checker.each(rows, group=False):
            split = side(example.key, HELD) if probed(self.one) else VALIDATION
            self.rows[split] += 1
            self.found[split].update(example.sample.labels)
            if len(self.found[split]) > MAX_LABELS:
                raise DataError(
                    "TooManyLabels", f"{self._named}: more than {MAX_LABELS} labels: is it the right column?"
                )
            if not self.problems.count:
                self.encoder.add(example, split=split, source=number)
        if rows.digest is not None:
            info = rows.info
            entry = Input(role=role, uri=place.uri, size=info.size, etag=info.etag, digest=rows.digest)
            self.inputs.append(entry)
        _log.info("%s: %d rows of %s", place.uri, sum(self.rows.values()), self._named)

    def labels(self) -> list[str]:
        """The set's labels in order; adds a problem where a probe could learn nothing."""
        if probed(self.one) and not self.problems.count:
            fitted, held = self.rows[TRAIN], self.rows[VALIDATION]
            if not fitted or not held:
                said = f"{self._named}: of {fitted + held} rows none is left for one half of the set; give more rows."
                self.problems.add(DataError("EmptySplit", said))
            elif len(self.found[TRAIN]) < 2:
                said = f"{self._named}: the {fitted} rows that the probe is fitted on have fewer than two labels"
                self.problems.add(DataError("OneClassOnly", f"{said}, so there is nothing to tell apart; add others."))
        return sorted({*self.found[TRAIN], *self.found[VALIDATION]})

    @property
    def _named(self) -> str:
        return f"evaluation.retention {self.one.name}"


def _raise(problems: Problems) -> None:
    for problem in problems.first:
        _log.error("%s: %s", problem.reason, problem.message)
    problems.raise_any()
