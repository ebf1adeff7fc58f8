"""The protocol of a method, and what methods share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from finetune_trainer.data.order import Rows
from finetune_trainer.model import Loaded
from finetune_trainer.world import World

Inputs = dict[str, torch.Tensor]
InputsOf = Callable[[Rows], Inputs]


class Shortcut(NamedTuple):
    """A cheaper module that gives the same logits, and its inputs."""

    module: torch.nn.Module
    inputs_of: InputsOf


class Method(Protocol):
    """What a method must know."""

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        """Choose what trains (requires_grad) and wrap the model where the method adds to it. Raises ModelError."""
        ...

    def train(self, model: Any) -> None:
        """Training mode for what trains."""
        ...

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        """A way to train on `rows` without running all of the model each time, or None. On its own device."""
        ...

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        """Write weights and config of the tuned model as from_pretrained or PEFT read them.

        Raises ModelError when a merged model answers `example` otherwise than the adapted one.
        """
        ...

    def load_hint(self, *, merge: bool) -> str:
        """Python that loads the published directory, for the model card."""
        ...


PLAIN_HINT = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)"""


def freeze_statistics(model: torch.nn.Module) -> None:
    """Batch-norm statistics stay as they are: otherwise the split into micro-batches would change the result."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
