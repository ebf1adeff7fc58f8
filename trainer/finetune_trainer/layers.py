"""How deep each parameter of a model lies: what layer-wise learning rates, freezing and unfreezing go by.

Nothing here knows architectures by name. A stack is an outermost ModuleList of the trunk (the blocks of a transformer,
the stages of a CNN). What lies before or beside the stacks and embeds, is layer 0; what comes after them (a last norm,
a pooler, the head) is the layer above all blocks.
"""

from collections.abc import Iterator
from typing import Any

import torch


def layer_numbers(model: Any) -> dict[str, int]:
    """The layer of each parameter: 0 embeddings, 1..N the blocks of the trunk, N + 1 what comes after them.

    N is the length of the longest stack. Stacks (encoder and decoder) are aligned at their ends, so that N + 1 minus
    the number is the distance from the output: the encoder's last block feeds every block of the decoder, and is no
    deeper than the decoder's last. Layers that share weights (ALBERT) count once. A tied output embedding is an
    embedding.
    """
    numbers = _numbers_by_identity(plain_of(model))
    last = last_layer(model)
    return {name: numbers.get(id(parameter), last) for name, parameter in model.named_parameters()}


def last_layer(model: Any) -> int:
    """The number of what comes after the blocks: N + 1."""
    found = stacks(trunk_or_model(plain_of(model)))
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
