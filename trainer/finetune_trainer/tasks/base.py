"""What a task must know: how its rows read, how they are encoded, and how a model learns from them.

A task has two halves. `Task` is what preflight asks, on a CPU and without torch: rows in, pieces of the encoded store
out. `Learner` is what training and evaluation ask: rows of the store in, micro-batches, losses, predictions and metrics
out. It is written with tensor methods, so that this package needs no torch to be imported.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_api.contract import RunConfig
from finetune_api.scalars import Overlong
from finetune_api.tasks import lower_is_better

if TYPE_CHECKING:
    from finetune_trainer.data.batch import Encoded
    from finetune_trainer.data.order import Rows
    from finetune_trainer.data.text import Text
    from finetune_trainer.tasks.continued import Spans

Metrics = dict[str, float]
Outcomes = dict[str, NDArray[Any]]
"""What is known of evaluated rows, by name: arrays of numbers, or of objects that JSON can hold, whose first dimension
is the rows. `loss` and `count` are a row's sum of the loss and its number of labelled positions."""
IGNORED = -100
"""The label of a position that is not learned from, as in torch."""
MAX_LABEL = 256
_SHOWN = 12


class RowError(ValueError):
    """A row cannot be used. The message says what is wrong with which column; the caller adds file and row."""


class MissingColumn(RowError):
    """A row has no column of that name."""

    def __init__(self, role: str, name: str, row: Mapping[str, Any]) -> None:
        super().__init__(f"the column {name!r} is missing; columns found: {listed(row)}")
        self.role = role
        self.name = name


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as its task understands it."""

    content: str
    """What goes into the model, as text: its hash decides the side of the split, and equal content is a duplicate."""
    answer: str
    """What is to come out: equal content with different answers is a conflict."""
    labels: tuple[str, ...] = ()
    """The labels the row names, in a task whose model has an output for each."""
    form: str = ""
    """In which of several ways the row is written, such as "a list of labels": all rows must be of one form."""
    payload: Any = None
    """Whatever `encode` needs."""
    part: str = ""
    """Of which of several tasks the row is."""

    def within(self, part: str) -> "Sample":
        """The sample beside those of other tasks: its labels are named by `label_in`, its payload is the sample."""
        if not part:
            return self
        return replace(self, labels=tuple(label_in(part, label) for label in self.labels), payload=self, part=part)


class Column(NamedTuple):
    """One column of the encoded store."""

    kind: Literal["I32", "I64", "U8", "F64"]
    ragged: bool = False
    """Any number of values a row, or exactly one."""
    labels: bool = False
    """Values of 0 or more are numbers given by Tools.number; the store ends up with places in the order of labels."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One row of the encoded store; most rows of data make exactly one."""

    columns: Mapping[str, Any]
    """A value, or a sequence of them, for each of the task's columns."""
    tokens: int
    """Tokens before anything was cut."""
    length: int
    """Tokens, or whatever a row costs in training: rows of similar length are batched together."""
    cut: bool = False
    """Whether something was cut off."""


@dataclass(frozen=True)
class Tools:
    """What encoding needs beside the rows."""

    text: "Text | None"
    """The tokenizer; None for a task that reads images."""
    overlong: Overlong
    model: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the base model."""
    images: Mapping[str, Any] = field(default_factory=dict)
    """preprocessor_config.json of the base model; empty for a task that reads text."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Provisional numbers of labels: their order is known when all rows are read."""

    part: str = ""
    """Which of several tasks encodes."""

    def number(self, label: str) -> int:
        """A label's provisional number."""
        return self.numbers.setdefault(label_in(self.part, label), len(self.numbers))


@dataclass(frozen=True)
class Facts:
    """What preflight has found out and fixed (run.json)."""

    labels: Sequence[str] = ()
    """In the order of the model's outputs; empty in a task without labels."""
    form: str = ""
    """Of all rows, see Sample."""
    pad_token_id: int = 0
    max_length: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    """What Task.facts and Task.measure have returned."""
    base: Path = Path()
    """Directory of the base model's files; not yet there in preflight."""


class Task(ABC):
    """What preflight asks. One object a run."""

    reads: ClassVar[Literal["text", "images"]] = "text"
    labelled: ClassVar[bool] = False
    """Whether the model has an output for each label."""
    store: ClassVar[Mapping[str, Column]]
    """The columns of the encoded store that are this task's own."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.columns: Mapping[str, str] = config.task.columns
        """Names of the columns in the data, by role."""

    @property
    def parts(self) -> "Mapping[str, Task]":
        """By name the tasks that rows can be of: this one, unless it is made of several."""
        return {"": self}

    @abstractmethod
    def read_row(self, row: Mapping[str, Any]) -> Sample:
        """Raises RowError, MissingColumn."""

    @abstractmethod
    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        """For each sample its pieces, or why it has none. Called with about a thousand at a time, in order."""

    def order_labels(
        self, found: Collection[str], *, wanted: Sequence[str] | None, base: Sequence[str] | None
    ) -> list[str]:
        """The labels in the order of the model's outputs: `wanted`, else those of the base model where they cover
        `found` (its head is kept), else `found` by code point."""
        if wanted is not None:
            return list(wanted)
        if base is not None and set(found) <= set(base):
            return list(base)
        return sorted(set(found))

    def facts(self, tools: Tools) -> dict[str, Any]:
        """What the learner needs to know beside labels, as JSON. Called before the first row.

        Raises DataError ModelIncomplete, ModelUnsuitable when the base model cannot do the task.
        """
        return {}

    def measure(self, store: "Encoded", train: "Rows", facts: Facts) -> dict[str, Any]:
        """What the learner needs to know of the training rows, as JSON, beside `facts`. Called when all rows are
        encoded."""
        return {}

    def count_parts(self, store: "Encoded", rows: "Rows") -> dict[str, int]:
        """How many of the rows are of each of `parts`."""
        return {"": len(rows)}

    @abstractmethod
    def learner(self, facts: Facts) -> "Learner":
        """The other half."""


class Learner(ABC):
    """What training and evaluation ask. The model is anything that answers like a transformers model."""

    auto_class: ClassVar[str]
    """Name of the transformers class that loads the model."""
    targets: ClassVar[frozenset[str]] = frozenset({"labels"})
    """Names in a micro-batch that are not for the model's forward."""
    probe: ClassVar[Literal["rows", "positions"] | None] = None
    """Whether a linear model on the trunk's features is a baseline: of a row's mean, or of each labelled position."""
    packs: ClassVar[bool] = False
    """Whether several rows may share one sequence: then there are `collate_packs` and `packing_differs`."""
    compares: ClassVar[int] = 0
    """How many numbers `of_base` tells of each row; micro-batches have them as `base`, float64 [rows, numbers]."""
    logits: ClassVar[Literal["few", "chunked", "all"]] = "few"
    """How many a micro-batch has: one for each label, or the vocabulary at each labelled position, some at a time or
    all together."""
    draws: ClassVar[int] = 200
    """How often rows are drawn for intervals: fewer where `metrics` takes long, more where `resampled` is fast."""

    def __init__(self, config: RunConfig, facts: Facts) -> None:
        self.config = config
        self.facts = facts

    @property
    def parts(self) -> "Mapping[str, Learner]":
        """By name the learners whose models share a trunk: this one, unless it is made of several."""
        return {"": self}

    def model_settings(self) -> dict[str, Any]:
        """What the model's config must say, such as id2label."""
        return {}

    def set_up(self, model: Any, *, final: bool) -> None:  # noqa: B027 - most have nothing to say
        """What a loaded model must know beside its config, such as how it writes text. `final` is a model that is
        measured or published, not one that is about to be trained."""

    def usage(self) -> str:
        """For the model card, as Markdown: what the tokenizer and the published files do not do by themselves."""
        return ""

    def files(self) -> Mapping[str, str]:
        """Text files by name that are published beside the model and its tokenizer, such as a chat template."""
        return {}

    @abstractmethod
    def collate(self, store: "Encoded", rows: "Rows") -> dict[str, NDArray[Any]]:
        """One micro-batch: what the model's forward takes, and the targets."""

    @property
    def augments(self) -> bool:
        """Whether rows look different each time they are trained on, see `collate_for_training`."""
        return False

    def collate_for_training(self, store: "Encoded", rows: "Rows") -> dict[str, NDArray[Any]]:
        """`collate`, perhaps changed at random by Python's and numpy's generators, which are seeded before each."""
        return self.collate(store, rows)

    def collate_packs(self, store: "Encoded", packs: "Sequence[Rows]") -> dict[str, NDArray[Any]]:
        """One micro-batch of sequences, each of several rows that do not see one another."""
        raise NotImplementedError  # only asked where `packs` is set

    def packing_differs(self, model: Any, packed: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]) -> str | None:
        """Why a model cannot be trained on packed rows, or None: `packed` is one sequence of the rows in `alone`."""
        raise NotImplementedError  # only asked where `packs` is set

    def of_base(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """What the loss needs to know of the untouched base: a tensor [rows, numbers], the same in every attempt."""
        raise NotImplementedError  # only asked where `compares` is set

    @abstractmethod
    def count(self, store: "Encoded", rows: "Rows") -> float:
        """How many labelled positions rows have, or what these weigh: what a mean loss divides by. More than 0 for any
        row."""

    def groups(self, store: "Encoded", rows: "Rows") -> list["Rows"]:
        """The rows, apart from each other where they must not be in one micro-batch."""
        return [rows]

    def shares(self, store: "Encoded", batch: "Rows") -> list[tuple["Rows", float]]:
        """The groups of an optimizer step's rows, each with what the sum of its loss is divided by."""
        return [(batch, self.count(store, batch))]

    def costs(self, store: "Encoded", rows: "Rows") -> NDArray[np.int64]:
        """What rows are sorted by within some batches, so that equal ones come together: their length."""
        return store.lengths(rows)

    def part_of(self, inputs: Mapping[str, Any]) -> "tuple[Learner, Mapping[str, Any]]":
        """The one of `parts` whose micro-batch this is, and the micro-batch as that one knows it."""
        return self, inputs

    @abstractmethod
    def loss(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """The sum of the loss over the labelled positions, a tensor in at least fp32, from tensors as in `collate`."""

    @abstractmethod
    def gold(self, store: "Encoded", rows: "Rows") -> Outcomes:
        """The truth about rows, as far as metrics need it."""

    @abstractmethod
    def predict(self, model: Any, inputs: Mapping[str, Any], *, generate: bool) -> Outcomes:
        """What the model makes of a micro-batch, `loss` and `count` among it; logits are never kept. Without `generate`
        only what one forward pass tells: the metrics of that are those that `forward_metrics` names."""

    def settle(self, outcomes: Outcomes) -> Outcomes:
        """From rows of the store to rows of data, where one makes several. Metrics and intervals count these.

        What it does not know, such as `place`, it keeps, of several rows the first one's. What metrics need of each row
        and takes long to find is found here, once: intervals ask for the metrics of hundreds of selections.
        """
        return outcomes

    @abstractmethod
    def metrics(self, outcomes: Outcomes) -> Metrics:
        """All metrics of settled outcomes (truth and predictions), as far as these hold what they need."""

    def resampled(self, outcomes: Outcomes, draws: Iterable[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
        """The metrics of each selection of rows, for intervals; those it leaves out have none. Selections are the same
        each time they are gone through, and to go through them is a sign of life."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a label may be missing from a draw
            found = [self.metrics({name: values[draw] for name, values in outcomes.items()}) for draw in draws]
        names = dict.fromkeys(name for metrics in found for name in metrics)
        return {name: np.array([metrics.get(name, np.nan) for metrics in found]) for name in names}

    def rates(self, outcomes: Outcomes) -> NDArray[np.float64] | None:
        """True and false positive rates, [2, labels], NaN where no row could have been positive; None in tasks that do
        not classify rows."""
        return None

    def confusion(self, outcomes: Outcomes) -> NDArray[np.int64] | None:
        """How often each label (rows) was answered with each (columns); None where an answer is no single label."""
        return None

    def shown(self, outcomes: Outcomes) -> tuple[list[str], list[str]] | None:
        """For people, of each row the truth and the answer; None where a task has none that fit into a line."""
        return None

    def picture(self, store: "Encoded", row: int) -> tuple[str, bytes] | None:
        """For people, the name of a row's file, or nothing, and a small PNG; None where a row is text."""
        return None

    def by_part(self, outcomes: Outcomes) -> "dict[str, tuple[Learner, Outcomes]]":
        """By name each of `parts` that has rows among settled outcomes, and the outcomes as that one knows them."""
        return {"": (self, outcomes)}

    def label_quality(
        self, features: NDArray[np.float32], *, store: "Encoded", rows: "Rows", seed: int
    ) -> tuple[NDArray[np.float64], list[str], list[str]] | None:
        """How well the label of each of `rows` fits its features, 0 to 1, that label, and which one fits best; None
        where rows have no single label."""
        return None

    def label_qualities(
        self, features: NDArray[np.float32], *, store: "Encoded", rows: "Rows", seed: int
    ) -> "dict[str, tuple[Rows, NDArray[np.float64], list[str], list[str]]]":
        """By name each of `parts` that has `label_quality`: its rows, and what that says of them. Features are as in
        `fit_probe`."""
        found = self.label_quality(features, store=store, rows=rows, seed=seed) if self.probe == "rows" else None
        return {} if found is None else {"": (rows, *found)}

    def generates(self, metric: str) -> bool:
        """Whether a metric needs generated text."""
        return False

    def trivial(self, store: "Encoded", train: "Rows", rows: "Rows") -> Outcomes | None:
        """Predictions for `rows` that need no model, such as what is most frequent in `train`."""
        return None

    def fit_probe(
        self,
        features: NDArray[np.float32],
        answers: NDArray[np.float32],
        *,
        store: "Encoded",
        train: "Rows",
        rows: "Rows",
        seed: int,
    ) -> Outcomes | None:
        """Predictions for `rows` by a linear model of their features `answers`, fitted on `features` of `train`.

        Features are [rows, width], or [labelled positions of all rows in order, width]. None where nothing can be
        learned.
        """
        return None

    def continuations(self, store: "Encoded", rows: "Rows") -> "Spans | None":
        """What of rows is asked for to see whether they are known by heart: positions in what the model writes. None
        in tasks whose models write no text."""
        return None

    def reproduced(self, model: Any, inputs: Mapping[str, Any], asked: "Spans") -> NDArray[np.bool_]:
        """Which rows of a micro-batch the model goes on with word for word, each within its span of `asked`: [rows]."""
        raise NotImplementedError  # only asked where there are `continuations`

    def higher_is_better(self, metric: str) -> bool:
        """The direction of a metric."""
        return not lower_is_better(metric)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What is for the model's forward."""
        return {name: value for name, value in inputs.items() if name not in self.targets}


# --- what tasks share ---


def cell(row: Mapping[str, Any], columns: Mapping[str, str], role: str) -> Any:
    """The value of the column with that role, numpy values as plain ones. Raises MissingColumn."""
    name = columns[role]
    if name not in row:
        raise MissingColumn(role, name, row)
    value = row[name]
    return value.tolist() if hasattr(value, "tolist") else value


def label_in(part: str, label: str) -> str:
    """How a label of one of several tasks is called beside those of the others; that of a lone task is itself."""
    return f"{part}/{label}" if part else label


def labels_of(part: str, labels: Iterable[str]) -> list[str]:
    """Of labels of several tasks those of one, as that one calls them."""
    return [label.removeprefix(f"{part}/") for label in labels if not part or label.startswith(f"{part}/")]


def joined_forms(forms: Mapping[str, str]) -> str:
    """The forms of the rows of several tasks, by name, in one line; that of a lone task is itself."""
    return "; ".join(f"{part}: {form}" if part else form for part, form in forms.items() if form)


def form_of(part: str, form: str) -> str:
    """Of such a line what is about one task."""
    if not part:
        return form
    return next((one.removeprefix(f"{part}: ") for one in form.split("; ") if one.startswith(f"{part}: ")), "")


def text_cell(row: Mapping[str, Any], columns: Mapping[str, str], role: str, *, empty: bool = False) -> str:
    """The text of a column. Raises MissingColumn, and RowError for what is no text or, unless `empty`, blank."""
    value = cell(row, columns, role)
    name = columns[role]
    if not isinstance(value, str):
        raise RowError(f"the column {name!r} must hold text, found {kind_of(value)}")
    if not empty and (not value or value.isspace()):
        raise RowError(f"the text in the column {name!r} is empty")
    if not encodable(value):
        raise RowError(f"the text in the column {name!r} holds half a surrogate pair, which is no character")
    return value


def encodable(text: str) -> bool:
    """Whether a text is UTF-8: JSON can hold half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_of(value: Any, column: str) -> str:
    """A label is text, a whole number in decimal, or true/false. Raises RowError."""
    from decimal import Decimal
    from math import isfinite

    label: str | None = None
    if isinstance(value, bool):
        label = "true" if value else "false"
    elif isinstance(value, str):
        label = value
    elif isinstance(value, int):
        label = str(value)
    elif isinstance(value, float | Decimal) and isfinite(value) and value == int(value):
        label = str(int(value))
    if label is None:
        raise RowError(
            f"the column {column!r} must hold a label (text, a whole number, true or false), or a list of them, "
            f"found {kind_of(value)}"
        )
    if not label or len(label) > MAX_LABEL:
        raise RowError(f"the column {column!r} holds a label of {len(label)} characters; 1 to {MAX_LABEL} are allowed")
    if not encodable(label):
        raise RowError(f"the column {column!r} holds a label with half a surrogate pair, which is no character")
    return label


def kind_of(value: Any) -> str:
    """What a value is, in words that hold nothing of a row's text."""
    from decimal import Decimal

    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float | Decimal):
        return f"the number {value}"
    return {"str": "text", "list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)


def listed(names: Collection[str]) -> str:
    shown = [str(name)[:64] for name in names][:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "none"


def padded(rows: Sequence[NDArray[Any]], value: int) -> NDArray[np.int64]:
    """Rows of any length side by side, int64 [rows, longest], filled up on the right."""
    found = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return found


def mask_of(rows: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """1 where `padded` has a row's own value."""
    lengths = np.array([len(row) for row in rows])
    return (np.arange(lengths.max())[None, :] < lengths[:, None]).astype(np.int64)


def objects(values: Sequence[Any]) -> NDArray[Any]:
    """An array with one object a row, also where these are lists of equal length."""
    found = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        found[number] = value
    return found


def mean_loss(outcomes: Outcomes) -> Metrics:
    """`loss` as a mean over labelled positions, where it is known."""
    if "loss" not in outcomes:
        return {}
    return {"loss": float(outcomes["loss"].sum() / (outcomes["count"].sum() or 1))}
