"""All weights train, or all but those that are frozen; deeper layers perhaps later than those near the output.

Unfreezing from the output towards the input is gradual unfreezing (Howard and Ruder 2018): first what lies above the
blocks, then a block more every so many steps. What trains in a step is a function of the step alone, so a resumed run
trains the same.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Method
from finetune_trainer.layers import last_layer, layer_numbers
from finetune_trainer.model import Loaded, ModelError

_SHOWN = 12
"""Names in a message."""


class Full(Method):
    def __init__(self, config: MethodConfig) -> None:
        self._config = config
        self._waiting: list[tuple[int, Any]] = []
        self._reached = -1

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        model = loaded.model
        frozen = _frozen(model, self._config, fresh=loaded.fresh)
        numbers = layer_numbers(model)
        first = max(number for name, number in numbers.items() if name not in frozen)
        self._waiting = []
        self._reached = -1
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
            steps = (first - numbers[name]) * (self._config.unfreeze_every_steps or 0)
            if name not in frozen and steps:
                parameter.waits = True  # it counts among what trains, though for now it needs no gradient
                self._waiting.append((steps, parameter))
        return model

    def before_step(self, model: Any, step: int) -> None:
        reached = sum(since <= step for since, _ in self._waiting)
        if reached != self._reached:
            self._reached = reached
            for since, parameter in self._waiting:
                parameter.requires_grad_(since <= step)


def _frozen(model: Any, config: MethodConfig, *, fresh: frozenset[str]) -> set[str]:
    """Names of the parameters that never train. Raises ModelError."""
    numbers = layer_numbers(model)
    blocks = last_layer(model) - 1
    layers = config.freeze_layers or 0
    if layers > blocks:
        raise ModelError(
            f"method.freeze.layers: {type(model).__name__} has {blocks} layers, {layers} cannot be frozen; "
            f"give at most {blocks}."
        )
    frozen = {name for name, number in numbers.items() if 1 <= number <= layers}
    if config.freeze_embeddings:
        frozen |= {name for name, number in numbers.items() if number == 0}
    for pattern in config.freeze_patterns or []:
        matched = {name for name in numbers if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not matched:
            raise ModelError(
                f"method.freeze.patterns: {pattern} matches no parameter of {type(model).__name__}; there are "
                f"{_some(numbers)}."
            )
        frozen |= matched
    if frozen & fresh:
        raise ModelError(
            f"method.freeze: {_some(sorted(frozen & fresh))} would be frozen, but the base model has no such weights: "
            "they are drawn at random and have to be trained."
        )
    if frozen >= set(numbers):
        raise ModelError("method.freeze: nothing is left to train; freeze fewer layers or patterns.")
    return frozen


def _some(names: Iterable[str]) -> str:
    """Names for a message, those that differ in a number only as one."""
    seen = list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))
    return ", ".join(seen[:_SHOWN]) + (f" and {len(seen) - _SHOWN} more" if len(seen) > _SHOWN else "")
