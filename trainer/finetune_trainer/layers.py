"""How deep each parameter of a model lies: what layer-wise learning rates, freezing and unfreezing go by.

Nothing here knows architectures by name. A stack is an outermost ModuleList of the trunk (the blocks of a transformer,
the stages of a CNN). What lies before or beside the stacks and embeds, is layer 0; what comes after them (a last norm,
a pooler, the head) is the layer above all blocks.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from finetune_trainer.shared import parts_of


def layer_numbers(model: Any) -> dict[str, int]:
    """The layer of each parameter: 0 embeddings, 1..N the blocks of the trunk, N + 1 what comes after them.

    N is the length of the longest stack. Stacks (encoder and decoder) are aligned at their ends, so that N + 1 minus
    the number is the distance from the output: the encoder's last block feeds every block of the decoder, and is no
    deeper than the decoder's last. Layers that share weights (ALBERT) count once. A tied output embedding is an
    embedding.
    """
    numbers: dict[int, int] = {}
    for part in parts_of(model):
        numbers |= _numbers_by_identity(plain_of(part))
    last = last_layer(model)
    return {name: numbers.get(id(parameter), last) for name, parameter in model.named_parameters()}


def last_layer(model: Any) -> int:
    """The number of what comes after the blocks: N + 1."""
    found = stacks(trunk_or_model(plain_of(parts_of(model)[0])))
    return max((len(stack) for _, stack in found), default=0) + 1


def plain_of(model: Any) -> Any:
    """The model inside of PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_or_model(model: Any) -> torch.nn.Module:
    """The part below the head; the whole of a model that has no such part (T5 with its output layer)."""
    trunk: torch.nn.Module = getattr(model, "base_model", model)
    return trunk


def stacks(trunk: torch.nn.Module) -> list[tuple[str, torch.nn.ModuleList]]:
    """The outermost lists of modules with parameters, and their names within the trunk."""
    return list(_stacks(trunk, ""))


def _stacks(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, torch.nn.ModuleList):
            if next(child.parameters(), None) is not None:
                yield path, child
        elif not _embeds(path):
            yield from _stacks(child, f"{path}.")


class Projections(NamedTuple):
    """Names of modules, in the order of the model."""

    attention: list[str]
    """The attention modules of all blocks."""
    attention_out: list[str]
    """The layer of each whose output leaves it."""
    feed_forward: list[str]
    """The layer of each block's feed-forward part whose output leaves it."""


def output_projections(model: Any) -> Projections:
    """The layers through which attention and feed-forward parts write: what adapters follow.

    An attention module is the outermost one of a block whose class is called so, which is so in all of transformers;
    its last linear layer is the one that leaves it. The feed-forward part is what lies beside it.
    """
    trunk = trunk_or_model(plain_of(model))
    paths = {id(module): name for name, module in model.named_modules()}
    found = Projections([], [], [])
    for _, stack in stacks(trunk):
        for parent in stack.modules():
            attentions = [child for child in parent.children() if _attends(child)]
            path = f"{paths[id(parent)]}."
            if not attentions or path.startswith(tuple(f"{name}." for name in found.attention)):
                continue
            inside = {module for attention in attentions for module in attention.modules()}
            beside = [module for module in _linear_layers(parent) if module not in inside]
            for attention in attentions:
                found.attention.append(paths[id(attention)])
                found.attention_out.extend(paths[id(module)] for module in _linear_layers(attention)[-1:])
            found.feed_forward.extend(paths[id(module)] for module in beside[-1:])
    return found


def width_of(layer: Any) -> int:
    """How wide the output of a linear layer is."""
    return int(layer.out_features if isinstance(layer, torch.nn.Linear) else layer.nf)


def _attends(module: torch.nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and bool(_linear_layers(module))


def _linear_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return [child for child in module.modules() if isinstance(child, torch.nn.Linear | Conv1D)]


def _embeds(path: str) -> bool:
    return "embed" in path.lower()


def _numbers_by_identity(model: Any) -> dict[int, int]:
    trunk = trunk_or_model(model)
    found = stacks(trunk)
    last = max((len(stack) for _, stack in found), default=0) + 1
    numbers: dict[int, int] = {}
    for _, stack in found:
        for place, block in enumerate(stack):
            for parameter in block.parameters():
                numbers.setdefault(id(parameter), last - len(stack) + place)
    tables = {id(p) for m in trunk.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    before = bool(found)
    for name, parameter in trunk.named_parameters():
        if id(parameter) in numbers:
            before = False
        else:
            embeds = before or id(parameter) in tables or _embeds(name)
            numbers[id(parameter)] = 0 if embeds else last
    return numbers
