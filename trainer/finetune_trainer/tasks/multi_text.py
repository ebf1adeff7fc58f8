"""Several tasks that write texts, on one encoder-decoder. They share all of it, the output layer too, so that it is one
model of one directory; what stands before a text, or the language it is to be in, says which task is meant.

All else is as with heads: micro-batches of one task, shares of the loss, metrics task by task.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.read import DataError
from finetune_trainer.tasks.base import Facts, Learner, Task, Tools
from finetune_trainer.tasks.multi_task import MultiTask, MultiTaskLearner
from finetune_trainer.tasks.seq2seq import Writer

INDEX = "tasks.json"
"""As adapt.shared writes it for tasks with heads, which needs torch."""
FORMAT = 1


class MultiText(MultiTask):
    """Rows of several tasks for one model, which must be able to tell them apart."""

    def facts(self, tools: Tools) -> dict[str, Any]:
        """Raises DataError TasksAlike, too."""
        assert tools.text is not None
        found = {name: _facts(name, task, tools) for name, task in self.parts.items()}
        alike: dict[str, list[str]] = defaultdict(list)
        for name, own in found.items():
            seen = {**own, "prefix": tools.text.ids([own["prefix"]], special=False)}
            alike[json.dumps(seen, sort_keys=True)].append(name)
        for names in alike.values():
            if len(names) > 1:
                before = found[names[0]]["prefix"]
                what = f"has {json.dumps(before, ensure_ascii=False)} before it" if before else "has nothing before it"
                raise DataError(
                    "TasksAlike",
                    f"spec.task.tasks: the model cannot tell {' and '.join(names)} apart: for its tokenizer a text of "
                    f"each {what}, and they name the same languages. Give each a prefix of its own, in words that the "
                    f"tokenizer knows, such as '{names[0]}: '.",
                )
        return found

    def _other_half(
        self, facts: Facts, parts: Mapping[str, Learner], views: Sequence[Callable[[Encoded], Encoded]]
    ) -> MultiTaskLearner:
        return MultiTextLearner(self.config, facts, parts, views)


class MultiTextLearner(MultiTaskLearner):
    """One model, which each task takes for its own."""

    auto_class = Writer.auto_class
    logits = Writer.logits

    @property
    def parts(self) -> Mapping[str, Learner]:
        return {"": self}

    @property
    def _writers(self) -> dict[str, Writer]:
        return {name: part for name, part in self.learners.items() if isinstance(part, Writer)}

    def _model_of(self, model: Any, name: str) -> Any:
        return model

    def set_up(self, model: Any, *, final: bool) -> None:
        """As the first task has it; how texts of the others begin, each says when it writes one."""
        next(iter(self.learners.values())).set_up(model, final=final)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of one task, with the names that the model has for them; the inputs of the others are of the same kind."""
        name = next(iter(inputs)).partition("/")[0]
        own = {key.partition("/")[2]: value for key, value in inputs.items() if key.startswith(f"{name}/")}
        return self.learners[name].model_inputs(own)

    def usage(self) -> str:
        begins = [part.begins for part in self._writers.values()]
        several = any(other != begins[0] for other in begins)
        lines = [f"- `{name}`: {_told(part, begins=several)}" for name, part in self._writers.items()]
        return "\n".join(["One model does all the tasks. What it is given says which one is meant:", "", *lines]) + "\n"

    def files(self) -> Mapping[str, str]:
        """An index of the tasks, which tells programs what `usage` tells people."""
        tasks = [
            {
                "name": name,
                "directory": ".",
                "class": part.auto_class,
                "type": part.config.task.type,
                "prefix": part.before,
                **part.languages,
                "generate": part.begins,
            }
            for name, part in self._writers.items()
        ]
        return {INDEX: json.dumps({"format": FORMAT, "tasks": tasks}, indent=2, ensure_ascii=False) + "\n"}


def _facts(name: str, task: Task, tools: Tools) -> dict[str, Any]:
    """Those of one task, whose problems say which one has them. Raises DataError."""
    try:
        return task.facts(tools)
    except DataError as error:
        raise DataError(error.reason, f"spec.task.tasks[{name}]: {error.message}") from error


def _told(part: Writer, *, begins: bool) -> str:
    """What to do so that a text is of that task."""
    task = part.config.task.type
    said = [f"{task}, with `{part.before}` before each text" if part.before else f"{task}, with nothing before a text"]
    said += [f"{name} {language}" for name, language in part.languages.items()]
    if begins:
        said.append(f"`model.generate(..., {', '.join(f'{key}={token}' for key, token in part.begins.items())})`")
    return "; ".join(said)
