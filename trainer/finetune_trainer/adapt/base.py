"""What a method is, and what methods share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune_trainer.checkpoint import trainable
from finetune_trainer.data.order import Rows
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded
from finetune_trainer.world import World

Inputs = dict[str, torch.Tensor]
InputsOf = Callable[[Rows], Inputs]


class Shortcut(NamedTuple):
    """A cheaper module that gives the same logits, and its inputs."""

    module: torch.nn.Module
    inputs_of: InputsOf


class Method:
    """How weights are tuned. What is said here holds for a method that trains the model's own weights."""

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        """Choose what trains (requires_grad) and wrap the model where the method adds to it. Raises ModelError."""
        raise NotImplementedError  # each method has its own

    def train(self, model: Any) -> None:
        """Training mode for what trains."""
        model.train()
        freeze_statistics(model)

    def before_step(self, model: Any, step: int) -> None:
        """Called before each step, counted from 0: what trains in it is a function of the step alone."""

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        """A way to train on `rows` without running all of the model each time, or None. On its own device."""
        return None

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        """Write weights and config of the tuned model as from_pretrained or PEFT read them.

        Raises ModelError when a merged model answers `example` otherwise than the adapted one.
        """
        model.save_pretrained(directory)

    def places(self, directory: Path) -> list[Path]:
        """Of the directory that `save` has filled those that hold a model each."""
        return [directory]

    def library(self, *, merge: bool) -> str:
        """The library that loads what was saved, as model cards name it."""
        return "transformers"

    def load_hint(self, model: Any, *, merge: bool) -> str:
        """Python that loads the published directory, for the model card."""
        return plain_hint(model)


def plain_hint(model: Any) -> str:
    """Loads a directory that holds a whole model."""
    kind, reader = type(plain_of(model)).__name__, reader_of(model)
    return f"""from transformers import {reader}, {kind}

model = {kind}.from_pretrained(directory)
{reads(model)}"""


def reader_of(model: Any) -> str:
    """The class that turns rows into the model's inputs."""
    return "AutoImageProcessor" if plain_of(model).main_input_name == "pixel_values" else "AutoTokenizer"


def reads(model: Any) -> str:
    """The line that loads it."""
    reader = reader_of(model)
    return f"{'processor' if reader == 'AutoImageProcessor' else 'tokenizer'} = {reader}.from_pretrained(directory)"


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """How many parameters train in some step of the run, and how many there are; packed ones count as unpacked."""
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    unused = ".original_module."  # where PEFT keeps what a module that trains whole was at first
    return trained, sum(_numel(parameter) for name, parameter in model.named_parameters() if unused not in name)


def _numel(parameter: torch.nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(torch.Size(packed.shape).numel())


def freeze_statistics(model: torch.nn.Module) -> None:
    """Batch-norm statistics stay as they are: otherwise the split into micro-batches would change the result."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
