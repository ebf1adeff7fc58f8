"""A running mean of the weights, kept beside the optimizer's state."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from finetune_trainer.checkpoint import Tensors, copied, trainable


class Ema:
    """A running mean of what trains, which is evaluated and published in its place (Polyak and Juditsky 1992).

    Early steps count for more, as in TensorFlow's ExponentialMovingAverage: after step t the mean keeps the lower of
    `decay` and (1 + t) / (10 + t) of itself. Otherwise a short run would publish little but the base.
    """

    def __init__(self, model: torch.nn.Module, *, decay: float, stored: Tensors | None = None) -> None:
        self._decay = decay
        self._parameters = trainable(model)
        self._means = {
            name: (stored[name] if stored else parameter.detach()).to(parameter.device, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        kept = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._means.values()), list(self._parameters.values()), 1.0 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the mean meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            raw = parameter.clone()
            parameter.copy_(self._means[name])
            self._means[name].copy_(raw)

    def snapshot(self, *, only: Collection[str] | None = None) -> Tensors:
        """The mean, or that of the parameters of these names alone, copied to host memory."""
        return {name: copied(mean) for name, mean in self._means.items() if only is None or name in only}
