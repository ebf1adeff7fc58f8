"""What the model learns: everything that depends on the task, and nothing that depends on torch.

Nothing outside this package branches on the task. Preflight imports it too, so losses are written with tensor methods
alone.
"""

from finetune_api.job import TaskType
from finetune_trainer.tasks.base import Columns, Labels, Metrics, RowError, Task
from finetune_trainer.tasks.text_classification import TextClassification

__all__ = ["Columns", "Labels", "Metrics", "RowError", "Task", "get"]

_TASKS: dict[str, Task] = {"text-classification": TextClassification()}


def get(kind: TaskType) -> Task:
    """The task of that name."""
    return _TASKS[kind]
