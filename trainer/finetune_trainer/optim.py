"""Optimizer and learning rate."""

from collections.abc import Iterable
from math import ceil, cos, pi
from typing import Any

import torch

from finetune_api.contract import TrainingConfig


def make_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], config: TrainingConfig) -> torch.optim.Optimizer:
    """adamw (fused; betas 0.9 and 0.999, eps 1e-8) or sgd without momentum. Biases and norms, which are the parameters
    of one dimension, do not decay."""
    parameters = [parameter for _, parameter in named]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def warmup_steps(config: TrainingConfig, *, total: int) -> int:
    """Steps over which the learning rate rises."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total)
    assert config.warmup_percent is not None
    return ceil(round(total * config.warmup_percent / 100, 6))


def learning_rate(config: TrainingConfig, *, step: int, total: int) -> float:
    """Learning rate of a step counted from 0; equal to that of the schedules of the same names in transformers."""
    warmup = warmup_steps(config, total=total)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = max(0.0, 1.0 - done)
        case "cosine":
            share = max(0.0, 0.5 * (1.0 + cos(pi * done)))
    return config.learning_rate * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
