"""Optimizer and learning rate."""

import logging
from collections.abc import Callable, Collection
from math import ceil, cos, pi, sqrt
from typing import Any

import torch

from finetune_api.contract import TrainingConfig
from finetune_trainer.checkpoint import trainable
from finetune_trainer.layers import last_layer, layer_numbers
from finetune_trainer.model import ModelError

_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = 1e-4
"""First rate of a one-cycle schedule as a share of its peak, and its last as a share of the first."""
_LONG = 10_000
"""Time scale of inverse-sqrt without a warm-up, in steps."""
_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.RMSNorm,
    torch.nn.GroupNorm,
    torch.nn.modules.batchnorm._NormBase,
)


def make_optimizer(
    model: torch.nn.Module, config: TrainingConfig, *, anchored: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer of what trains, with groups of their own for each layer's rate.

    Biases and norms do not decay: parameters of one dimension, those called a bias (T5's relative attention bias is a
    table), and all of norm layers. Nor do those named in `anchored`, which are drawn elsewhere. A group's rate is the
    schedule's times its `scale`.

    Raises ModelError where this machine lacks what the optimizer needs.
    """
    spared = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    parameters = trainable(model)
    spared |= {id(p) for name, p in parameters.items() if p.ndim < 2 or "bias" in name or name in anchored}
    scales = _scales(model, config.layerwise_decay)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for name, p in parameters.items() if (id(p) not in spared, scales[name]) == (decays, scale)],
            "weight_decay": config.weight_decay if decays else 0.0,
            "scale": scale,
        }
        for scale in sorted(set(scales.values()), reverse=True)
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = config.betas
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(
                groups, lr=config.learning_rate, betas=(beta1, beta2), eps=config.epsilon, fused=True
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
        case "adafactor":
            return _adafactor(groups, config)
        case "adamw-8bit":
            return _adamw_8bit(groups, config)


def _scales(model: torch.nn.Module, decay: float) -> dict[str, float]:
    """Each parameter's share of the learning rate: `decay` to the power of its distance from the head.

    Discriminative fine-tuning (Howard and Ruder 2018) with the factor of ELECTRA (Clark et al. 2020).
    """
    if decay == 1.0:
        return dict.fromkeys(dict(model.named_parameters()), 1.0)
    last = last_layer(model)
    return {name: decay ** (last - number) for name, number in layer_numbers(model).items()}


def _adafactor(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018) without its relative step: the schedule alone decides the learning rate.

    transformers' and not torch's, because torch's cannot do without: it takes the lower of the learning rate and
    1/sqrt(t), times the size of the weights.
    """
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups, lr=config.learning_rate, scale_parameter=False, relative_step=False
    )
    return optimizer


def _adamw_8bit(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits in blocks (Dettmers et al. 2021); parameters below 4096 values keep 32 bits."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of kernels for something else
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except (ImportError, RuntimeError, OSError) as error:
        raise ModelError(
            f"training.optimizer.type: adamw-8bit needs bitsandbytes, which cannot be loaded here ({error}): install "
            "it, or choose adamw or adafactor."
        ) from error
    betas = (config.betas[0], config.betas[1])
    make: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return make(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon)


def warmup_steps(config: TrainingConfig, *, total: int) -> int:
    """Steps over which the learning rate rises."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total)
    assert config.warmup_percent is not None
    return ceil(round(total * config.warmup_percent / 100, 6))


def learning_rate(config: TrainingConfig, *, step: int, total: int) -> float:
    """Learning rate of a step counted from 0.

    Equal to that of the schedules of the same names in transformers, one-cycle to torch's OneCycleLR without its cycle
    of momentum.
    """
    warmup = warmup_steps(config, total=total)
    if config.schedule == "one-cycle":
        return config.learning_rate * _one_cycle(step, warmup=warmup, total=total)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    minimum = config.schedule_minimum
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = minimum + (1.0 - minimum) * 0.5 * (1.0 + cos(pi * done))
        case "polynomial":
            share = minimum + (1.0 - minimum) * (1.0 - done) ** config.schedule_power
        case "inverse-sqrt":
            scale = warmup or _LONG
            share = sqrt(scale / (step - warmup + scale))
    return config.learning_rate * share


def _one_cycle(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak: up from 1/25 to 1 and down to 1/250,000, both along half a cosine (Smith and Topin 2018).

    The peak is the last step of the warm-up; with a warm-up of one step or none, the first step.
    """
    peak = max(0, warmup - 1)
    if step < peak:
        start, end, done = _ONE_CYCLE_START, 1.0, step / peak
    else:
        start, end = 1.0, _ONE_CYCLE_START * _ONE_CYCLE_END
        done = min(1.0, (step - peak) / max(1, total - 1 - peak))
    return end + (start - end) * 0.5 * (1.0 + cos(pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
