"""Against learning rows by heart and against forgetting what the base knew: each off unless it is asked for."""

from collections.abc import Collection
from typing import Any

import torch

from finetune_trainer.checkpoint import trainable
from finetune_trainer.layers import plain_of
from finetune_trainer.shared import parts_of


class Anchor:
    """L2-SP (Li et al. 2018): weights of the base are drawn towards what they were, not towards zero.

    Decoupled from the gradient as AdamW's decay is, so that its strength means the same for every optimizer: each step
    goes the share `learning rate * alpha` of the way back. For sgd without clipping that is the paper's penalty
    alpha / 2 * |w - w0|^2.
    """

    def __init__(self, model: torch.nn.Module, *, alpha: float, fresh: Collection[str]) -> None:
        """Of a model that still has the weights of its base; `fresh` names those that are not from there."""
        self._alpha = alpha
        self._base = {
            name: parameter.detach().clone() for name, parameter in trainable(model).items() if name not in fresh
        }
        self._targets = {id(parameter): name for name, parameter in model.named_parameters() if name in self._base}

    @property
    def names(self) -> Collection[str]:
        """The parameters that are drawn."""
        return self._base.keys()

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of the optimizer."""
        for group in optimizer.param_groups:
            share = min(1.0, group["lr"] * self._alpha)
            for parameter in group["params"]:
                name = self._targets.get(id(parameter))
                if name is not None:
                    base = self._base[name] = self._base[name].to(parameter.device)
                    parameter.lerp_(base, share)


def add_noise(model: Any, *, alpha: float) -> None:
    """NEFTune (Jain et al. 2023): uniform noise on the token embeddings while the model trains.

    A row's noise is at most alpha / sqrt(tokens * width), over its real tokens as in the paper: padding neither counts
    nor is disturbed; rows that share a sequence count by themselves. It is drawn from the generator that is seeded for
    each micro-batch. An encoder-decoder embeds twice a pass; only its encoder's input is disturbed.
    """
    for part in parts_of(model):
        _add_noise(part, alpha=alpha)


def _add_noise(model: Any, *, alpha: float) -> None:
    plain = plain_of(model)
    reader = plain.get_encoder() if plain.config.is_encoder_decoder else plain
    inputs: list[dict[str, Any]] = []

    def begin(_model: Any, _arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        inputs[:] = [given]

    def disturb(embedding: Any, _inputs: Any, states: torch.Tensor) -> torch.Tensor | None:
        if not embedding.training or not inputs:
            return None
        given = inputs.pop()
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        real = torch.ones_like(states[..., 0]) if mask is None else mask.to(states.dtype)
        tokens = real.sum(1, keepdim=True) if mask is not None or positions is None else _tokens_of(positions)
        spread = alpha / torch.sqrt(tokens.clamp(min=1.0) * states.shape[-1])
        noise = torch.rand_like(states) * 2.0 - 1.0
        return states + noise * (real * spread)[..., None]

    model.register_forward_pre_hook(begin, with_kwargs=True)
    reader.get_input_embeddings().register_forward_hook(disturb)


def _tokens_of(positions: torch.Tensor) -> torch.Tensor:
    """For each position of packed rows, which count from 0 each, how many tokens its row has: [sequences, tokens]."""
    rows = (positions == 0).cumsum(1)
    counts = torch.zeros(len(rows), int(rows.max()) + 1, device=rows.device)
    return counts.scatter_add(1, rows, torch.ones_like(rows, dtype=counts.dtype)).gather(1, rows)
