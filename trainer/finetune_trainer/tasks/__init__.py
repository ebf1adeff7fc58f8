"""What the model learns: everything that depends on the task, one file each.

Nothing outside this package branches on the task. Preflight imports it too, so nothing here imports torch.
"""

from collections.abc import Callable

from finetune_api.contract import RunConfig
from finetune_api.tasks import WRITING_PARTS, TaskType
from finetune_trainer.tasks import regression, text_classification
from finetune_trainer.tasks.base import Facts, Learner, Metrics, Outcomes, Task
from finetune_trainer.tasks.causal_lm import CausalLm
from finetune_trainer.tasks.image_classification import ImageClassification
from finetune_trainer.tasks.instruction import Instruction
from finetune_trainer.tasks.multi_task import MultiTask
from finetune_trainer.tasks.multi_text import MultiText
from finetune_trainer.tasks.preference import Preference
from finetune_trainer.tasks.question_answering import QuestionAnswering
from finetune_trainer.tasks.summarization import Summarization
from finetune_trainer.tasks.token_classification import TokenClassification
from finetune_trainer.tasks.translation import Translation

__all__ = ["Facts", "Learner", "Metrics", "Outcomes", "Task", "get"]

_TASKS: dict[TaskType, Callable[[RunConfig], Task]] = {
    "text-classification": text_classification.of,
    "summarization": Summarization,
    "translation": Translation,
    "causal-lm": CausalLm,
    "instruction": Instruction,
    "preference": Preference,
    "token-classification": TokenClassification,
    "regression": regression.of,
    "question-answering": QuestionAnswering,
    "image-classification": ImageClassification,
}


def get(config: RunConfig) -> Task:
    """The task of a run."""
    if config.task.type == "multi-task":
        writes = all(part.type in WRITING_PARTS for part in config.task.tasks or ())
        return (MultiText if writes else MultiTask)(config, _TASKS)
    return _TASKS[config.task.type](config)
