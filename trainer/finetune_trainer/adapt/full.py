"""All weights train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.adapt.base import PLAIN_HINT, Inputs, InputsOf, Shortcut, freeze_statistics
from finetune_trainer.data.order import Rows
from finetune_trainer.model import Loaded
from finetune_trainer.world import World


class Full:
    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        return loaded.model

    def train(self, model: Any) -> None:
        model.train()
        freeze_statistics(model)

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        return None

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        model.save_pretrained(directory)

    def load_hint(self, *, merge: bool) -> str:
        return PLAIN_HINT
