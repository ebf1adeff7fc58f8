"""Loading the base model: safetensors only, no code from elsewhere, a new head that depends on the seed alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.base_model import DROPOUTS
from finetune_trainer.data.order import derive
from finetune_trainer.layers import plain_of
from finetune_trainer.shared import SharedTrunk, parts_of, tie
from finetune_trainer.tasks import Learner


class ModelError(ValueError):
    """The base model cannot be used: exit code 42."""


@dataclass(frozen=True)
class Loaded:
    """A model in fp32 on the CPU, and the names of its parameters that are not from the base."""

    model: Any
    fresh: frozenset[str]
    again: "Callable[[], Loaded] | None" = None
    """Loads the same once more."""
    parts: "Mapping[str, Loaded]" = field(default_factory=dict)
    """By name the models of a SharedTrunk."""


def load(directory: Path, *, learner: Learner, seed: int, dropout: float | None = None) -> Loaded:
    """The base model with the head that its task needs, and with that dropout everywhere unless it is None.

    A learner of several parts gets a SharedTrunk of as many models. Raises ModelError.

    The base's own head is kept when its labels are `labels`; otherwise a new one is drawn from (seed, "head").
    """
    parts = {name: _load(directory, part, seed, dropout) for name, part in learner.parts.items()}
    if "" in parts:
        return parts[""]
    model = together({name: part.model for name, part in parts.items()})
    fresh = {id(loaded.model.get_parameter(name)) for loaded in parts.values() for name in loaded.fresh}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in fresh}
    return Loaded(model, frozenset(names), parts=parts)


def together(parts: Mapping[str, Any]) -> SharedTrunk:
    """Models of one base, perhaps with additions, on one trunk; the trunk is what the first has. Raises ModelError."""
    heads = set()
    for part in parts.values():
        plain = plain_of(part)
        inside = {id(module) for module in trunk_of(plain).modules()}
        heads |= {name for name, child in plain.named_children() if id(child) not in inside}
    try:
        tie(parts.values(), heads=heads)
    except ValueError as error:
        raise ModelError(f"The tasks cannot share one trunk, because theirs differ: {error}.") from error
    return SharedTrunk(parts)


def _load(directory: Path, learner: Learner, seed: int, dropout: float | None) -> Loaded:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **kinds)
        before = [config.id2label.get(number) for number in range(config.num_labels)]
        for name, value in learner.model_settings().items():
            setattr(config, name, value)
        if dropout is not None:
            for name in DROPOUTS & config.to_dict().keys():
                setattr(config, name, dropout)
        model, found = getattr(transformers, learner.auto_class).from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kinds,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"The base model cannot be loaded as {learner.auto_class} ({_first_line(error)}): give a model of a known "
            "architecture with config.json and safetensors weights; code from model directories is never run."
        ) from error
    model.config._name_or_path = ""
    fresh = set(found["missing_keys"]) | {entry[0] for entry in found["mismatched_keys"]}
    labels = learner.facts.labels
    if labels and before != list(labels):
        fresh |= _outputs(model, len(labels))
    parameters = dict(model.named_parameters())
    fresh &= parameters.keys()
    _initialise({name: parameters[name] for name in sorted(fresh)}, model.config, seed)
    again = partial(_load, directory, learner, seed, dropout)
    return Loaded(model, frozenset(fresh), again)


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing (Chen et al. 2016): blocks keep their inputs alone and run again in the backward pass.

    Each restores the state of the random generators first, so that dropout is the same. Raises ModelError.
    """
    for part in parts_of(model):
        _recompute_activations(plain_of(part))


def _recompute_activations(plain: Any) -> None:
    if not plain.supports_gradient_checkpointing:
        raise ModelError(
            f"training.gradientCheckpointing: {type(plain).__name__} cannot do it: leave it out and choose a smaller "
            "microBatch."
        )
    # transformers 5 renamed it on the way
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    plain.config.use_cache = False  # a cache would be filled twice; the published model is another copy


def trunk_of(model: Any) -> torch.nn.Module:
    """The part of a model below its head."""
    trunk: torch.nn.Module = model.base_model
    if trunk is model:
        raise ModelError(f"{type(model).__name__} has no trunk apart from its head: use method full.")
    return trunk


def outside_trunk(model: Any) -> set[str]:
    """Names of the parameters of the head."""
    inside = {id(parameter) for parameter in trunk_of(model).parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}


def _outputs(model: Any, count: int) -> set[str]:
    """Parameters of the head's last layer, which belong to other labels."""
    parameters = dict(model.named_parameters())
    return {name for name in outside_trunk(model) if parameters[name].shape[:1] == (count,)}


def _initialise(parameters: dict[str, torch.nn.Parameter], config: Any, seed: int) -> None:
    """Matrices normal, biases zero, norms one; each from a generator of its own."""
    spread = float(getattr(config, "initializer_range", 0.02))
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(derive(seed, "head", name))
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, spread, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:200]
