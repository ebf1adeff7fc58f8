"""Several tasks on one model: here an encoder with a head for each. What each task is, its own file says; here they are
put together. Tasks that write texts have no heads of their own: multi_text.py.

A row of the store is of one task, and so is a micro-batch. A step's rows are a mixture: each task has about the share
of them that it has of all rows. The loss of a step is the sum of the tasks' mean losses over their labelled positions,
each multiplied by its share of the step's rows and by its lossWeight, so that a task with a label for each token does
not drown one with a label a row.

Outcomes of different tasks stand beside each other as one object a row, which holds what the row's task knows of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.contract import PartConfig, RunConfig, TaskConfig
from finetune_api.tasks import PERCENT, TASKS, TaskType
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows
from finetune_trainer.tasks.base import (
    IGNORED,
    Column,
    Facts,
    Learner,
    Metrics,
    Outcomes,
    Piece,
    RowError,
    Sample,
    Task,
    Tools,
    form_of,
    labels_of,
)

TASK = "task"
"""The column of the store that holds the place of a row's task among task.tasks."""
CELL = "cell"
MEAN = "mean"
SHOWN = 24
"""Metrics at most: the status holds 32 of each kind, and a termination message 3,500 bytes of everything."""
_KEPT = ("loss", "count")
_RANKS = 1 << 31


class MultiTask(Task):
    """Rows of several tasks, each read and encoded by its own. `makers` makes a task of a configuration."""

    def __init__(self, config: RunConfig, makers: Mapping[TaskType, Callable[[RunConfig], Task]]) -> None:
        super().__init__(config)
        configs = [(part, _config(config, part)) for part in config.task.tasks or ()]
        self._tasks: dict[str, Task] = {part.name: makers[part.type](own) for part, own in configs}
        self._names = names_in_store([task.store for task in self._tasks.values()])
        columns = {
            self._names[number][name]: column
            for number, task in enumerate(self._tasks.values())
            for name, column in task.store.items()
        }
        self.store = {TASK: Column("U8"), **columns}  # type: ignore[misc]  # what they are depends on the document

    @property
    def parts(self) -> Mapping[str, Task]:
        return self._tasks

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        raise TypeError("rows are read by one of `parts`")

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        found: list[Sequence[Piece] | RowError] = [()] * len(samples)
        for number, (name, task) in enumerate(self._tasks.items()):
            places = [place for place, sample in enumerate(samples) if sample.part == name]
            if not places:
                continue
            encoded = task.encode([samples[place].payload for place in places], replace(tools, part=name))
            for place, pieces in zip(places, encoded, strict=True):
                found[place] = pieces if isinstance(pieces, RowError) else [self._whole(number, p) for p in pieces]
        return found

    def _whole(self, number: int, piece: Piece) -> Piece:
        """The piece with a value for every column of the store; those of other tasks are empty."""
        own = {self._names[number][name]: value for name, value in piece.columns.items()}
        empty = {name: () if column.ragged else 0 for name, column in self.store.items()}
        return replace(piece, columns={**empty, **own, TASK: number})

    def facts(self, tools: Tools) -> dict[str, Any]:
        return {name: task.facts(tools) for name, task in self._tasks.items()}

    def measure(self, store: Encoded, train: Rows, facts: Facts) -> dict[str, Any]:
        learners, numbers = self.learner(facts).learners, store.values(TASK, train)
        found = {}
        for number, (name, task) in enumerate(self._tasks.items()):
            view, own = self._view(store, number, facts), learners[name].facts
            found[name] = {**own.more, **task.measure(view, train[numbers == number], own)}
        return found

    def count_parts(self, store: Encoded, rows: Rows) -> dict[str, int]:
        counts = np.bincount(store.values(TASK, rows), minlength=len(self._tasks))
        return dict(zip(self._tasks, counts.tolist(), strict=True))

    def _view(self, store: Encoded, number: int, facts: Facts) -> "View":
        """The store as the task in that place knows it."""
        names = list(self._tasks)
        first = sum(len(labels_of(name, facts.labels)) for name in names[:number])
        columns = self._tasks[names[number]].store
        return View(store, self._names[number], {name: first for name, column in columns.items() if column.labels})

    def learner(self, facts: Facts) -> "MultiTaskLearner":
        parts = {
            name: task.learner(
                replace(
                    facts,
                    labels=labels_of(name, facts.labels),
                    form=form_of(name, facts.form),
                    more=facts.more.get(name, {}),
                )
            )
            for name, task in self._tasks.items()
        }
        views = [partial(self._view, number=number, facts=facts) for number in range(len(parts))]
        return self._other_half(facts, parts, views)

    def _other_half(
        self, facts: Facts, parts: Mapping[str, Learner], views: Sequence[Callable[[Encoded], Encoded]]
    ) -> "MultiTaskLearner":
        return MultiTaskLearner(self.config, facts, parts, views)


def _config(config: RunConfig, part: PartConfig) -> RunConfig:
    """The run as if one of its tasks were the only one."""
    task = TaskConfig(
        type=part.type,
        columns=part.columns,
        labels=part.labels,
        source_language=part.source_language,
        target_language=part.target_language,
        prefix=part.prefix,
    )
    return config.model_copy(update={"task": task, "primary": TASKS[part.type].primary})


def names_in_store(stores: Sequence[Mapping[str, Column]]) -> list[dict[str, str]]:
    """What the store calls each task's columns: by their own names where all who have one mean the same by it, else
    with the task's place before it."""
    kinds: dict[str, set[Column]] = {}
    for columns in stores:
        for name, column in columns.items():
            kinds.setdefault(name, set()).add(column)
    return [
        {name: name if len(kinds[name]) == 1 and name != TASK else f"{number}.{name}" for name in columns}
        for number, columns in enumerate(stores)
    ]


class View(Encoded):
    """The store as one of its tasks knows it."""

    def __init__(self, store: Encoded, names: Mapping[str, str], numbered: Mapping[str, int]) -> None:
        """`names` are those of columns; `numbered` says what to take off labels, which are numbered over all tasks."""
        self._store, self._names, self._numbered = store, names, numbered

    def rows(self, split: int) -> Rows:
        raise TypeError("a view has no rows of its own")

    def lengths(self, rows: Rows) -> NDArray[np.int64]:
        return self._store.lengths(rows)

    def each(self, name: str, rows: Rows) -> list[NDArray[Any]]:
        found = self._store.each(self._names.get(name, name), rows)
        first = self._numbered.get(name, 0)
        return [np.where(values < 0, values, values - first) for values in found] if first else found

    def sizes(self, name: str, rows: Rows) -> NDArray[np.int64]:
        return self._store.sizes(self._names.get(name, name), rows)

    def values(self, name: str, rows: Rows) -> NDArray[Any]:
        found = self._store.values(self._names.get(name, name), rows)
        first = self._numbered.get(name, 0)
        return np.where(found < 0, found, found - first) if first else found


class MultiTaskLearner(Learner):
    """Hands each micro-batch to the learner of its task, with the model of its task."""

    auto_class = ""  # each part has one

    def __init__(
        self,
        config: RunConfig,
        facts: Facts,
        parts: Mapping[str, Learner],
        views: Sequence[Callable[[Encoded], Encoded]],
    ) -> None:
        """`views` make of the store what each part knows of it."""
        super().__init__(config, facts)
        self._parts = parts
        self._numbers = {name: number for number, name in enumerate(parts)}
        self._weights = [part.loss_weight for part in config.task.tasks or ()]
        self._views = views
        if any(part.probe == "positions" for part in parts.values()):
            self.probe = "positions"  # type: ignore[misc]  # what it is depends on the document
        elif any(part.probe == "rows" for part in parts.values()):
            self.probe = "rows"  # type: ignore[misc]

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Of the tasks, by name."""
        return self._parts

    @property
    def parts(self) -> Mapping[str, Learner]:
        return self._parts

    def _model_of(self, model: Any, name: str) -> Any:
        """What a task's own learner knows as its model."""
        return model.parts[name]

    def set_up(self, model: Any, *, final: bool) -> None:
        for name, part in self._parts.items():
            part.set_up(self._model_of(model, name), final=final)

    def _view(self, store: Encoded, name: str) -> Encoded:
        return self._views[self._numbers[name]](store)

    def _split(self, store: Encoded, rows: Rows) -> list[tuple[str, Rows]]:
        """The rows of each task that has any among `rows`."""
        numbers = store.values(TASK, rows)
        found = [(name, rows[numbers == number]) for name, number in self._numbers.items()]
        return [(name, own) for name, own in found if len(own)]

    def groups(self, store: Encoded, rows: Rows) -> list[Rows]:
        return [own for _, own in self._split(store, rows)]

    def shares(self, store: Encoded, batch: Rows) -> list[tuple[Rows, float]]:
        return [
            (own, self._positions(store, name, own) * len(batch) / (self._weights[self._numbers[name]] * len(own)))
            for name, own in self._split(store, batch)
        ]

    def _positions(self, store: Encoded, name: str, rows: Rows) -> float:
        return self._parts[name].count(self._view(store, name), rows)

    def costs(self, store: Encoded, rows: Rows) -> NDArray[np.int64]:
        """Where a row's length stands among those of its task. Sorted by that, neighbours of a task are of like
        lengths, and every batch is a mixture of the tasks, however much their lengths differ."""
        lengths, numbers = store.lengths(rows), store.values(TASK, rows)
        found = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            place = np.empty(len(mine), dtype=np.int64)
            place[np.argsort(lengths[mine], kind="stable")] = np.arange(len(mine))
            found[mine] = (2 * place + 1) * _RANKS // (2 * len(mine))
        return found

    def collate(self, store: Encoded, rows: Rows) -> dict[str, NDArray[Any]]:
        """Arrays as TASK/ARRAY; training and evaluation ask for rows of one task only."""
        return {
            f"{name}/{key}": array
            for name, own in self._split(store, rows)
            for key, array in self._parts[name].collate(self._view(store, name), own).items()
        }

    def count(self, store: Encoded, rows: Rows) -> float:
        return sum(self._positions(store, name, own) for name, own in self._split(store, rows))

    def _own(self, inputs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The task of a micro-batch, and the micro-batch with the names that task gives its arrays."""
        names = {key.partition("/")[0] for key in inputs}
        assert len(names) == 1, f"a micro-batch holds rows of {sorted(names)}"
        return names.pop(), {key.partition("/")[2]: value for key, value in inputs.items()}

    def part_of(self, inputs: Mapping[str, Any]) -> tuple[Learner, Mapping[str, Any]]:
        name, own = self._own(inputs)
        return self._parts[name], own

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        def kept(key: str) -> bool:
            name, _, own = key.partition("/")
            return own not in self._parts[name].targets

        return {key: value for key, value in inputs.items() if kept(key)}

    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        name, own = self._own(inputs)
        return self._parts[name].loss(self._model_of(model, name), own)

    # --- outcomes ---

    def gold(self, store: Encoded, rows: Rows) -> Outcomes:
        numbers = store.values(TASK, rows)
        cells = np.empty(len(rows), dtype=object)
        for name, number in self._numbers.items():
            mine = np.flatnonzero(numbers == number)
            if len(mine):
                cells[mine] = cells_of(self._parts[name].gold(self._view(store, name), rows[mine]))
        return {TASK: numbers, "gold": cells}

    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        name, own = self._own(inputs)
        return _with_cells(self._parts[name].predict(self._model_of(model, name), own, generate=generate))

    def settle(self, outcomes: Outcomes) -> Outcomes:
        settled = []
        for name, number in self._numbers.items():
            mine = np.flatnonzero(outcomes[TASK] == number)
            if not len(mine) or not all(outcomes["predicted"][mine]):
                continue
            others = {key: values[mine] for key, values in outcomes.items() if key not in ("gold", "predicted", TASK)}
            own = {**others, **columns_of(outcomes["gold"][mine]), **columns_of(outcomes["predicted"][mine])}
            found = self._parts[name].settle(own)
            kept = {key: values for key, values in found.items() if key in others}
            count = len(next(iter(found.values())))
            settled.append({**kept, TASK: np.full(count, number), CELL: cells_of(found)})
        return {key: np.concatenate([part[key] for part in settled]) for key in settled[0]}

    def metrics(self, outcomes: Outcomes) -> Metrics:
        """Those of each task as NAME.METRIC, `mean` of their primary ones as shares of 1, and `loss` as in training."""
        found: dict[str, Metrics] = {}
        loss = 0.0
        for name, number in self._numbers.items():
            mine = np.flatnonzero(outcomes[TASK] == number)
            if not len(mine):
                continue
            own = columns_of(outcomes[CELL][mine])
            found[name] = self._parts[name].metrics(own)
            loss += self._weights[number] * len(mine) * found[name].get("loss", float("nan"))
        return self._shown(found, loss / len(outcomes[TASK]))

    def resampled(self, outcomes: Outcomes, draws: Iterable[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
        """By the tasks' own ways, each on its rows among those drawn."""
        numbers = outcomes[TASK]
        counts = [np.bincount(numbers[draw], minlength=len(self._parts)) for draw in draws]
        present = np.bincount(numbers, minlength=len(self._parts)) > 0
        if not counts or not present.all() or min(count.min() for count in counts) == 0:
            return super().resampled(outcomes, draws)
        found: dict[str, dict[str, NDArray[np.float64]]] = {}
        for name, number in self._numbers.items():
            mine = numbers == number
            place = np.cumsum(mine) - 1
            own = columns_of(outcomes[CELL][mine])
            found[name] = self._parts[name].resampled(own, (place[draw[mine[draw]]] for draw in draws))
        every = {f"{name}.{key}": values for name, own in found.items() for key, values in own.items()}
        primary = [found[name].get(self._primary(name)) for name in self._parts]
        losses = [own.get("loss") for own in found.values()]
        if not any(values is None for values in primary):
            every[MEAN] = np.mean(np.array(primary) / self._scales[:, None], axis=0)
        if not any(values is None for values in losses):
            shares = np.array(counts) / len(numbers) * np.array(self._weights)
            every["loss"] = (shares * np.array(losses).T).sum(1)
        return {name: every[name] for name in self.metrics(outcomes) if name in every}

    def _shown(self, found: Mapping[str, Metrics], loss: float) -> Metrics:
        """The most important first, and no more than SHOWN."""
        every: Metrics = {}
        if len(found) == len(self._parts):
            every = {"loss": loss}
            primary = [found[name].get(self._primary(name)) for name in self._parts]
            if None not in primary:
                every = {MEAN: float(np.mean(np.array(primary, dtype=np.float64) / self._scales)), **every}
        ordered = {name: sorted(own, key=lambda key: key != self._primary(name)) for name, own in found.items()}
        for place in range(max(map(len, ordered.values()), default=0)):
            for name, keys in ordered.items():
                if place < len(keys):
                    every[f"{name}.{keys[place]}"] = found[name][keys[place]]
        first = self.config.primary
        return dict(sorted(every.items(), key=lambda item: item[0] != first)[:SHOWN])

    def _primary(self, name: str) -> str:
        return self._parts[name].config.primary

    @cached_property
    def _scales(self) -> NDArray[np.float64]:
        """What the best value of each task's primary metric is."""
        return np.array([100.0 if self._primary(name) in PERCENT else 1.0 for name in self._parts])

    def generates(self, metric: str) -> bool:
        name, _, own = metric.rpartition(".")
        if name:
            return self._parts[name].generates(own)
        return metric == MEAN and any(part.generates(self._primary(name)) for name, part in self._parts.items())

    # --- errors ---

    def by_part(self, outcomes: Outcomes) -> dict[str, tuple[Learner, Outcomes]]:
        found: dict[str, tuple[Learner, Outcomes]] = {}
        for name, number in self._numbers.items():
            mine = np.flatnonzero(outcomes[TASK] == number)
            if len(mine):
                others = {key: values[mine] for key, values in outcomes.items() if key not in (TASK, CELL)}
                found[name] = self._parts[name], {**columns_of(outcomes[CELL][mine]), **others}
        return found

    def label_qualities(
        self, features: NDArray[np.float32], *, store: Encoded, rows: Rows, seed: int
    ) -> dict[str, tuple[Rows, NDArray[np.float64], list[str], list[str]]]:
        found = {}
        for name, (own, learned) in self._features(store, rows, features).items():
            part = self._parts[name]
            if part.probe == "rows":
                judged = part.label_quality(learned, store=self._view(store, name), rows=own, seed=seed)
                if judged is not None:
                    found[name] = (own, *judged)
        return found

    # --- baselines ---

    def trivial(self, store: Encoded, train: Rows, rows: Rows) -> Outcomes:
        known = dict(self._split(store, train))

        def answer(name: str, own: Rows) -> Outcomes | None:
            return self._parts[name].trivial(self._view(store, name), known[name], own)

        return self._answers(store, rows, answer)

    def fit_probe(
        self,
        features: NDArray[np.float32],
        answers: NDArray[np.float32],
        *,
        store: Encoded,
        train: Rows,
        rows: Rows,
        seed: int,
    ) -> Outcomes | None:
        known, asked = (self._features(store, *pair) for pair in ((train, features), (rows, answers)))

        def answer(name: str, own: Rows) -> Outcomes | None:
            part = self._parts[name]
            if part.probe is None or name not in known:
                return None
            view, (mine, learned) = self._view(store, name), known[name]
            return part.fit_probe(learned, asked[name][1], store=view, train=mine, rows=own, seed=seed)

        return self._answers(store, rows, answer)

    def _features(
        self, store: Encoded, rows: Rows, features: NDArray[np.float32]
    ) -> dict[str, tuple[Rows, NDArray[np.float32]]]:
        """By task its rows and their features, of features in the order of rows."""
        numbers = store.values(TASK, rows)
        found: dict[str, tuple[list[Rows], list[NDArray[np.float32]]]] = {}
        start = 0
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(numbers.astype(np.int64))) + 1):
            name = list(self._parts)[numbers[run[0]]]
            own = rows[run]
            count = len(own)
            if self._parts[name].probe == "positions":
                count = sum(int((labels != IGNORED).sum()) for labels in self._view(store, name).each("labels", own))
            mine = found.setdefault(name, ([], []))
            mine[0].append(own)
            mine[1].append(features[start : start + count])
            start += count
        assert start == len(features)
        return {name: (np.concatenate(pair[0]), np.concatenate(pair[1])) for name, pair in found.items()}

    def _answers(self, store: Encoded, rows: Rows, answer: Any) -> Outcomes:
        """Predictions task by task, in the order of rows; empty ones for a task without an answer. They have a
        loss where all answers have one."""
        numbers = store.values(TASK, rows)
        answers = {name: answer(name, own) for name, own in self._split(store, rows)}
        given = {name: _with_cells(predictions) for name, predictions in answers.items() if predictions is not None}
        found: Outcomes = {
            "predicted": np.array([{} for _ in rows], dtype=object),
            "loss": np.zeros(len(rows)),
            "count": np.ones(len(rows), dtype=np.int64),
        }
        found = {
            key: values for key, values in found.items() if all(key in predictions for predictions in given.values())
        }
        for name, predictions in given.items():
            mine = np.flatnonzero(numbers == self._numbers[name])
            for key in found:
                found[key][mine] = predictions[key]
        return found


# --- what is known of rows of one task, as one object a row ---


def _with_cells(outcomes: Outcomes) -> Outcomes:
    return {"predicted": cells_of(outcomes), **{key: outcomes[key] for key in _KEPT if key in outcomes}}


def cells_of(outcomes: Outcomes) -> NDArray[Any]:
    """One object a row, which JSON can hold: its values by name and type of the array."""
    count = len(next(iter(outcomes.values())))
    cells: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in outcomes.items():
        key = f"{name}|{values.dtype.str}"
        for cell, value in zip(cells, values.tolist(), strict=True):
            cell[key] = value
    found = np.empty(count, dtype=object)
    found[:] = cells
    return found


def columns_of(cells: NDArray[Any]) -> Outcomes:
    """The arrays that `cells_of` has made objects of."""
    found: Outcomes = {}
    for key in cells[0]:
        name, _, kind = key.partition("|")
        values = [cell[key] for cell in cells]
        if kind == "|O":
            found[name] = np.empty(len(values), dtype=object)
            for number, value in enumerate(values):
                found[name][number] = value
        else:
            found[name] = np.array(values, dtype=kind)
    return found
