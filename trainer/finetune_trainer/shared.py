"""Several models on one trunk: each a whole model with a head of its own; the trunk's parameters are the same tensors.

Each part stays what the library made of it, and so is loaded, adapted and saved as any other model. What is computed
and trained is the same as with one trunk and several heads.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch


class SharedTrunk(torch.nn.Module):
    """Holds the parts by name. There is no forward pass through all of them: who calls one knows which."""

    def __init__(self, parts: Mapping[str, torch.nn.Module]) -> None:
        """A name may hold no dot."""
        super().__init__()
        self.parts = torch.nn.ModuleDict(dict(parts))

    @property
    def base_model(self) -> Any:
        """The trunk, as the first part has it."""
        return next(iter(self.parts.values())).base_model


def parts_of(model: Any) -> list[Any]:
    """The models that share a trunk, or the model itself."""
    return list(model.parts.values()) if isinstance(model, SharedTrunk) else [model]


def tie(models: Collection[Any], *, heads: Collection[str]) -> None:
    """Let parameters of the same name be one tensor, but those below the modules `heads`.

    Names are those within each model. Raises ValueError where two of one name have different shapes.
    """
    first: dict[str, torch.nn.Parameter] = {}
    for model in models:
        for path, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                full = f"{path}.{name}"
                if parameter is None or any(f".{head}." in f".{full}" for head in heads):
                    continue
                known = first.setdefault(full, parameter)
                if known.shape != parameter.shape:
                    raise ValueError(f"{full} has the shape {list(parameter.shape)} and {list(known.shape)}")
                module._parameters[name] = known
