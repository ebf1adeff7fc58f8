"""An encoded store in memory, and learners without a run, for tests of a task alone."""

from typing import Any

import numpy as np

from finetune_api.contract import RunConfig
from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, resolve
from finetune_trainer import tasks
from finetune_trainer.data.batch import Encoded
from finetune_trainer.tasks import Facts, Learner


class Memory(Encoded):
    """Rows 0 to n - 1; a column of lists or arrays is ragged. `length` is that of input_ids unless given."""

    def __init__(self, **columns: Any) -> None:
        count = len(next(iter(columns.values())))
        if "length" not in columns:
            columns["length"] = [len(row) for row in columns.get("input_ids", [[0]] * count)]
        for name in ("split", "source", "row"):
            columns.setdefault(name, np.zeros(count, np.int64))
        self._tensors = {}
        for name, values in columns.items():
            if len(values) and isinstance(values[0], list | np.ndarray):
                self._tensors[name] = np.concatenate([np.asarray(row, _kind(values)) for row in values])
                self._tensors[f"{name}.offsets"] = np.cumsum([0, *map(len, values)], dtype=np.int64)
            else:
                self._tensors[name] = np.asarray(values)


def _kind(rows: Any) -> Any:
    """An empty list would be of floats."""
    return next((np.asarray(row).dtype for row in rows if len(row)), np.int64)


def config_of(kind: str = "text-classification", **spec: Any) -> RunConfig:
    """What resolve makes of a document for a kind of task; `spec` holds further parts of it."""
    document = {
        "model": {"uri": "file:///base"},
        "data": {"train": [{"uri": "file:///rows.jsonl"}]},
        "output": {"uri": "file:///output"},
        **spec,
        "task": {"type": kind, **spec.get("task", {})},
    }
    return resolve(
        FineTuneJobSpec.model_validate(document),
        FineTuneProfileSpec(),
        job="tests/memory",
        job_uid="memory",
        generation=1,
        defaults=Defaults("trainer", "preflight", in_cluster=False),
    )


def spec_of(kind: str) -> dict[str, Any]:
    """What a document for a kind of task cannot go without."""
    if kind != "multi-task":
        return {}
    return {
        "task": {"tasks": [{"name": name, "type": "text-classification"} for name in "ab"]},
        "data": {"train": [{"uri": f"file:///{name}.jsonl", "task": name} for name in "ab"]},
    }


def learner_of(kind: str = "text-classification", spec: dict[str, Any] | None = None, **facts: Any) -> Learner:
    """A learner with these facts, pad token 0."""
    return tasks.get(config_of(kind, **(spec or {}))).learner(Facts(**facts))
