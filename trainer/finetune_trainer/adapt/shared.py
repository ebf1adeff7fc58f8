"""Any method for several models that share a trunk: each is prepared as if it were alone, then they are tied again.

So additions inside of the trunk are shared, heads are not, and each model is saved in its method's own format, in a
directory of its own.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.adapt.base import Inputs, InputsOf, Method, Shortcut
from finetune_trainer.adapt.prompt import Prompt
from finetune_trainer.data.order import Rows
from finetune_trainer.model import Loaded, together
from finetune_trainer.world import World

INDEX = "tasks.json"
FORMAT = 1


class Shared(Method):
    """The methods of the parts, by name; `classes` are the transformers classes that load them."""

    def __init__(self, methods: Mapping[str, Method], *, classes: Mapping[str, str]) -> None:
        self._methods = methods
        self._classes = classes

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        return together({name: method.prepare(loaded.parts[name], seed=seed) for name, method in self._methods.items()})

    def train(self, model: Any) -> None:
        for name, method in self._methods.items():
            method.train(model.parts[name])

    def before_step(self, model: Any, step: int) -> None:
        for name, method in self._methods.items():
            method.before_step(model.parts[name], step)

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        """None: the features of a frozen trunk are not cached here."""
        name, method = next(iter(self._methods.items()))
        if isinstance(method, Prompt):  # whether the longest row leaves room is the same for all
            return method.shortcut(model.parts[name], rows=rows, inputs_of=inputs_of, work=work, world=world, beat=beat)
        return None

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        """Each part in a directory of its name, and an index of them. `example` has inputs as NAME/INPUT."""
        for name, method in self._methods.items():
            part = model.parts[name]
            if merge:  # in place, and so into what the parts share: each into a copy
                part = copy.deepcopy(part)
            place = directory / name
            place.mkdir()
            own = {key.partition("/")[2]: value for key, value in example.items() if key.startswith(f"{name}/")}
            method.save(part, place, merge=merge, example=own)
        tasks = [{"name": name, "directory": name, "class": kind} for name, kind in self._classes.items()]
        (directory / INDEX).write_text(json.dumps({"format": FORMAT, "tasks": tasks}, indent=2) + "\n")

    def places(self, directory: Path) -> list[Path]:
        return [directory / name for name in self._methods]

    def library(self, *, merge: bool) -> str:
        return next(iter(self._methods.values())).library(merge=merge)

    def load_hint(self, model: Any, *, merge: bool) -> str:
        name, method = next(iter(self._methods.items()))
        hint = method.load_hint(model.parts[name], merge=merge)
        return f"# {INDEX} names the directory and the class of each task; this one is {name}\n{hint}"
