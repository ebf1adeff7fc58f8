"""What is wrong, or only odd, about rows: every problem with its file and line, before a GPU is asked for.

Problems end a preflight (exit code 42); they are collected, because ten problems in one message save nine more tries.
Warnings are for people to judge. Neither holds the text of a row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.status import DroppedRows
from finetune_trainer.data.duplicates import Contents, Repeated
from finetune_trainer.data.read import DataError, Row, Rows
from finetune_trainer.data.read.base import weight
from finetune_trainer.data.split import content_hash, content_hashes
from finetune_trainer.run import TEST, TRAIN, VALIDATION
from finetune_trainer.tasks.base import MissingColumn, RowError, Sample, Task, labels_of

SHOWN = 10
MAX_LABELS = 10_000
FEW_ROWS = 10
SPLIT_NAMES = {TRAIN: "training", VALIDATION: "validation", TEST: "test"}


@dataclass(frozen=True, slots=True)
class Example:
    """A row that can be used. `key` decides its side of the split: the hash of its content, or of its group."""

    row: int
    sample: Sample
    key: int
    content_hash: int
    check_hash: int = 0
    """Another hash of the content."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The row as it was read."""
    size: int = 0
    """About how many bytes it takes in memory."""


class Problems:
    """Everything that is wrong, the first ten in full."""

    def __init__(self) -> None:
        self.first: list[DataError] = []
        self.count = 0

    def add(self, problem: DataError) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(problem)

    def raise_any(self) -> None:
        """Raise the first problem as a DataError that says how many more there are."""
        if self.count == 1:
            raise self.first[0]
        if self.count:
            first = self.first[0]
            raise DataError(first.reason, f"{first.message} (and {self.count - 1} more)")


class Checker:
    """Turns rows into examples, or into problems. All rows must be of one form."""

    def __init__(self, task: Task, *, group_by: str | None, problems: Problems, place: str = "spec.task") -> None:
        """`place`: where in the document the task is described."""
        self.task = task
        self.place = place
        self.problems = problems
        self.group_by = group_by
        self.forms: dict[str, str] = {}
        """Of the rows of each part of the task, known from the first one on."""
        self.labels: dict[str, Sequence[str]] = {}
        """Of each part, as label_in names them; once there, a label that is not among them is a problem."""
        self.found: set[str] = set()
        """Parts whose `labels` come from the rows and not from the document."""

    def each(self, rows: Rows, *, part: str = "", group: bool) -> Iterator[Example]:
        """The examples of an object, in order, of which `part` of the task they all are. `group`: whether the column of
        groupBy is needed there."""
        seen = False
        try:
            for item in rows:
                seen = True
                example = item if isinstance(item, DataError) else self._checked(item, rows, part, group)
                if isinstance(example, DataError):
                    self.problems.add(example)
                else:
                    yield example
            if not seen:
                raise DataError("EmptyData", f"{rows.uri}: the file has no rows; give it at least one.")
        except DataError as error:
            self.problems.add(error)

    def _checked(self, row: Row, rows: Rows, part: str, group: bool) -> Example | DataError:
        where = rows.where(row)
        try:
            values = self._with_image(row, rows)
            sample = self.task.parts[part].read_row(values).within(part)
        except DataError as error:
            return error
        except MissingColumn as error:
            return self._missing(error.name, f"{self._field(part)}.columns.{error.role}", row, rows)
        except RowError as error:
            return DataError("InvalidRow", f"{where}: {error}; mend or remove the row.")
        form = self.forms.setdefault(part, sample.form)
        if sample.form != form:
            said = f"the row has {sample.form} where the first row has {form}"
            return DataError("InvalidRow", f"{where}: {said}; write all rows in one way.")
        known = self.labels.get(part)
        unknown = None if known is None else next((label for label in sample.labels if label not in known), None)
        if unknown is not None:
            return DataError(
                "UnknownLabel",
                f"{where}: the label {unknown[:64]!r} is not in {self._named(part)} ({_some(known or ())}); "
                "mend the row or add the label.",
            )
        hashed, check = content_hashes(sample.content)
        key = hashed
        if part:  # another task's row of the same content is another row, but on the same side
            hashed, check = content_hashes(f"{part}\0{sample.content}")
        if group and self.group_by is not None:
            if self.group_by not in row.values:
                return self._missing(self.group_by, "spec.data.validation.groupBy", row, rows)
            value = row.values[self.group_by]
            if value is None or isinstance(value, list | dict):
                return DataError("InvalidRow", f"{where}: the column {self.group_by!r} of groupBy must hold one value.")
            key = content_hash(str(value))
        return Example(row.number, sample, key, hashed, check, values, weight(values))

    def _with_image(self, row: Row, rows: Rows) -> Mapping[str, Any]:
        """The row; in a task that reads images with the bytes of one that can be decoded. Raises DataError."""
        if self.task.reads != "images":
            return row.values
        name = self.task.columns["image"]
        return {**row.values, name: rows.image(row, name)[0]} if name in row.values else row.values

    def _named(self, part: str) -> str:
        if part in self.found:
            return "the labels of the training and validation rows"
        return f"{self._field(part)}.labels"

    def _field(self, part: str) -> str:
        return field_of(part) if part else self.place

    def _missing(self, name: str, field: str, row: Row, rows: Rows) -> DataError:
        """A column that the whole file lacks is reported once; raises then. Else the row's problem."""
        where = rows.where(row)
        found = rows.columns or list(row.values)
        if name not in found:
            raise DataError(
                "ColumnMissing",
                f"{where}: no column {name!r}; columns found: {_some(found) or 'none'}. Name the right one in {field}.",
            )
        return DataError("InvalidRow", f"{where}: the row has no {name!r}, which other rows have; mend the row.")


class Survey:
    """Counts over all examples, from which warnings are made. Takes 37 bytes a row on disk and an entry a label."""

    def __init__(self, scratch: Path) -> None:
        """`scratch`: a directory for temporary files."""
        self.rows: Counter[int] = Counter()
        self.parts: dict[int, Counter[str]] = {TRAIN: Counter(), VALIDATION: Counter(), TEST: Counter()}
        self.labels: dict[int, Counter[str]] = {TRAIN: Counter(), VALIDATION: Counter(), TEST: Counter()}
        self.contents = Contents(scratch)

    def add(self, example: Example, *, split: int, source: int) -> None:
        """`source` is the position of the file in the manifest. Raises DataError when there are more labels than any
        model could have outputs."""
        sample = example.sample
        self.rows[split] += 1
        self.parts[split][sample.part] += 1
        counts = self.labels[split]
        counts.update(sample.labels)
        if len(counts) > MAX_LABELS:
            raise DataError(
                "TooManyLabels", f"There are more than {MAX_LABELS} different labels: is it the right column?"
            )
        self.contents.add(
            content=example.content_hash,
            check=example.check_hash,
            answer=content_hash(sample.answer),
            place=(source, example.row),
            split=split,
        )

    def found(self) -> set[str]:
        """Labels of the rows that make the model: training and validation, never test."""
        return set(self.labels[TRAIN]) | set(self.labels[VALIDATION])


def field_of(part: str) -> str:
    """Where in the document a task, or one of several, is described."""
    return f"spec.task.tasks[{part}]" if part else "spec.task"


def check_splits(survey: Survey, *, task: Task, problems: Problems, fraction: float | None) -> None:
    """Add what makes training or evaluation impossible: an empty side, one class only; of each part of the task."""
    for part, one in task.parts.items():
        of = f" of task {part}" if part else ""
        rows = {side: survey.parts[side][part] for side in (TRAIN, VALIDATION)}
        if not all(rows.values()):
            side = SPLIT_NAMES[VALIDATION if rows[TRAIN] else TRAIN]
            how = f" with validation.fraction {fraction}" if fraction is not None else ""
            said = f"Of {sum(rows.values())} rows{of} none is left for {side}{how}; give more rows or another split."
            problems.add(DataError("EmptySplit", said))
            continue
        trained = labels_of(part, survey.labels[TRAIN])
        if one.labelled and len(trained) < 2:
            only = f"the label {trained[0][:64]!r} alone" if trained else "no label at all"
            problems.add(
                DataError(
                    "OneClassOnly",
                    f"The {rows[TRAIN]} training rows{of} have {only}, so there is nothing to learn; "
                    "add rows with other labels or name another label column.",
                )
            )


def warnings(
    survey: Survey, repeated: Repeated, *, labels: Sequence[str], truncated: int, dropped: DroppedRows, max_length: int
) -> list[str]:
    """What a person should know before trusting the result, the most important first."""
    total = sum(survey.rows.values())
    found: list[str] = []
    trained = survey.labels[TRAIN]
    if never := [label for label in labels if not trained[label]]:
        found.append(f"No training row has {_these(never)}: the model cannot learn it.")
    if few := [label for label in labels if 0 < trained[label] < FEW_ROWS]:
        found.append(f"Fewer than {FEW_ROWS} training rows have {_these(few)}.")
    if unseen := [label for label in labels if trained[label] and not survey.labels[VALIDATION][label]]:
        found.append(f"No validation row has {_these(unseen)}, so its quality is not measured.")
    if dropped.leaked:
        held = [(repeated.validation_in_train, "validation"), (repeated.test_in_train, "test")]
        those = " and ".join(f"{count} {name}" for count, name in held if count)
        found.append(f"{dropped.leaked} training rows are left out: {those} rows have their content (data.leakage).")
    if repeated.conflicts:
        found.append(f"{repeated.conflicts} times the same text has another label in another row.")
    if dropped.overlong:
        found.append(f"{dropped.overlong} rows of more than {max_length} tokens were dropped (overlong: Drop).")
    if truncated * 20 > total:
        found.append(f"{100 * truncated / total:.0f} % of the rows were cut to {max_length} tokens (data.maxLength).")
    if left_out := dropped.duplicates + dropped.near_duplicates:
        found.append(f"{left_out} training rows that repeat others are left out (data.deduplicate).")
    elif repeated.duplicates * 20 > total:
        found.append(f"{repeated.duplicates} of {total} rows repeat the text of another row (see data.deduplicate).")
    return found


def _these(labels: list[str]) -> str:
    return f"{'the label' if len(labels) == 1 else f'{len(labels)} labels,'} {_some(labels, 5)}"


def _some(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(name[:64] for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
