"""The cells of the matrix: task x method x number of processes, sensible or refused."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from tests.matrix.kinds import KINDS, ROWS, TEST_ROWS, Rows
from tests.trainer.rank.conftest import Made, Ranks, made, write

from finetune_api.job import FineTuneJobSpec
from finetune_api.tasks import TASKS, MethodType, TaskType, lower_is_better

RATES: Mapping[str, float] = {"full": 3e-3, "lora": 1e-2, "qlora": 5e-3, "dora": 3e-3, "prompt": 2e-2}
RATE = 2e-2
"""Of methods that train few weights."""


@dataclass(frozen=True)
class Cell:
    """One task with one method on some processes."""

    task: TaskType
    method: MethodType
    processes: int

    def __str__(self) -> str:
        return f"{self.task}-{self.method}-{self.processes}"

    @property
    def base(self) -> str:
        """Bases take turns over the methods."""
        kind = KINDS[self.task]
        bases = kind.bases
        return kind.only.get(self.method) or bases[get_args(MethodType).index(self.method) % len(bases)]

    @property
    def margin(self) -> float:
        kind = KINDS[self.task]
        return kind.margins.get(self.method, kind.margin)

    def document(self, root: Path, base: Path) -> dict[str, Any]:
        """The spec, over files below `root`."""
        kind = KINDS[self.task]
        spec = kind.spec
        return {
            "model": {"uri": base.as_uri()},
            "method": {"type": self.method, **kind.knobs.get(self.method, {})},
            "resources": {"perNode": {"gpus": 0}},
            **spec,
            "task": {"type": self.task, **spec.get("task", {})},
            "data": {
                **_files(root, [part["name"] for part in spec.get("task", {}).get("tasks", ())]),
                **({} if "data.maxLength" in TASKS[self.task].without else {"maxLength": 48}),
                **spec.get("data", {}),
            },
            "training": {
                "epochs": 4.0,
                "batchSize": 16,
                "learningRate": kind.rates.get(self.method, RATES.get(self.method, RATE)),
                **spec.get("training", {}),
                **({"epochs": kind.epochs[self.method]} if self.method in kind.epochs else {}),
            },
            "output": {"uri": (root / "output").as_uri()},
        }


def _files(root: Path, parts: list[str]) -> dict[str, Any]:
    """Where the rows are; several tasks read them from the same files."""
    train, test = ({"uri": (root / f"{side}.jsonl").as_uri()} for side in ("train", "test"))
    if not parts:
        return {"train": [train], "test": test}
    return {
        "train": [{**train, "task": name} for name in parts],
        "test": {"sources": [{**test, "task": name} for name in parts]},
    }


@dataclass(frozen=True)
class Figures:
    """What a cell gave, on the rows of the test file."""

    metric: str
    """Of several the one with the least gain."""
    rivals: Mapping[str, float]
    tuned: float
    gain: float
    """Over the baseline that the task names; more is better, whatever the metric."""


def cells() -> list[Cell]:
    """Every cell of the tasks that the matrix knows."""
    return [Cell(task, method, count) for task in KINDS for method in get_args(MethodType) for count in (1, 2)]


def covering() -> list[Cell]:
    """A subset that has each pair of task and method, task and number, method and number."""
    methods = get_args(MethodType)
    return [
        cell
        for cell in cells()
        if cell.processes == 1 + (list(KINDS).index(cell.task) + methods.index(cell.method)) % 2
    ]


def refusal(cell: Cell) -> str | None:
    """Why the API refuses a cell, None for a sensible one."""
    document = cell.document(Path("/data"), Path("/base"))
    try:
        FineTuneJobSpec.model_validate(document)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return None


def run(cell: Cell, root: Path, base: Path, *, ranks: Ranks, port: int) -> Figures:
    """Train and evaluate one cell. Raises AssertionError with the log when it does not end well."""
    kind = KINDS[cell.task]
    root.mkdir(parents=True)
    draw = random.Random(17)
    for name, count in (("train", ROWS), ("test", TEST_ROWS)):
        write(root / f"{name}.jsonl", with_files(kind.rows(draw, count), root / name))
    found = made(root, cell.document(root, base), ranks)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "1"}
    environments = (
        [{"RANK": str(rank), "LOCAL_RANK": "0", **group} for rank in range(2)] if cell.processes > 1 else [{}]
    )
    started = [found.start(root / f"work-{number}", **more) for number, more in enumerate(environments)]
    codes = [process.wait() for process in started]
    assert codes == [0] * cell.processes, started[0].log[-3000:]
    return figures(cell, found)


def with_files(rows: Rows, directory: Path) -> Rows:
    """The rows with bytes in files of `directory`, which they name relative to the one above it."""
    found = []
    for number, row in enumerate(rows):
        values = dict(row)
        for name, value in row.items():
            if isinstance(value, bytes):
                directory.mkdir(exist_ok=True)
                (directory / f"{number}.png").write_bytes(value)
                values[name] = f"{directory.name}/{number}.png"
        found.append(values)
    return found


def figures(cell: Cell, found: Made) -> Figures:
    evaluation = found.published()["outcome"]["evaluation"]
    metrics = KINDS[cell.task].metrics or (TASKS[cell.task].primary,)
    return min((_figures(cell, metric, evaluation) for metric in metrics), key=lambda figures: figures.gain)


def _figures(cell: Cell, metric: str, evaluation: Mapping[str, Any]) -> Figures:
    known = {name: evaluation.get(name) or {} for name in ("trivial", "base", "probe")}
    rivals = {name: metrics[metric] for name, metrics in known.items() if metric in metrics}
    tuned = evaluation["tuned"][metric]
    gain = tuned - rivals[KINDS[cell.task].over]
    return Figures(metric, rivals, tuned, -gain if lower_is_better(metric) else gain)
