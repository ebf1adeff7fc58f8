"""Optimizers and schedules: equal to those everybody knows by these names, and resumed to the bit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trainer.rank.test_loop import Data, Quiet, config, model_in, setup_of

from finetune_trainer import checkpoint
from finetune_trainer.checkpoint import State
from finetune_trainer.loop import train
from finetune_trainer.optim import learning_rate, make_optimizer, set_learning_rate
from finetune_trainer.signs import Stopped

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "betas": [0.8, 0.95], "epsilon": 1e-6},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
    "sgd with momentum": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1},
    "adamw-8bit": {"optimizer": "adamw-8bit"},
}


def wide(tiny_base: Path) -> Any:
    """The tiny model with embeddings large enough for moments of 8 bits."""
    model = model_in(tiny_base, dtype=torch.float32, dropout=True)
    torch.manual_seed(0)
    model.resize_token_embeddings(256)
    assert model.get_input_embeddings().weight.numel() >= 4096
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resume_goes_on_to_the_bit(tiny_base: Path, tmp_path: Path, name: str) -> None:
    settings, data = config(max_steps=9, **OPTIMIZERS[name]), Data()
    straight, state = wide(tiny_base), State(micro_batch=4)
    setup = setup_of(straight, data, settings)
    train(setup, state, Quiet())

    first, halfway = wide(tiny_base), State(micro_batch=4)
    setup = setup_of(first, data, settings)
    with pytest.raises(Stopped):
        train(setup, halfway, Quiet(stop_at=4))
    save_file(checkpoint.snapshot_weights(first), tmp_path / "weights")
    save_file(checkpoint.snapshot_optimizer(first, setup.optimizer), tmp_path / "optimizer")

    second = wide(tiny_base)
    checkpoint.restore_weights(second, load_file(tmp_path / "weights"))
    setup = setup_of(second, data, settings, stored=load_file(tmp_path / "optimizer"))
    train(setup, halfway, Quiet())
    assert halfway.losses == state.losses
    assert state.losses[-1] != state.losses[0]
    for one, two in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    if name == "adamw-8bit":
        kept = checkpoint.snapshot_optimizer(second, setup.optimizer)
        assert any(tensor.dtype == torch.uint8 for tensor in kept.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(tiny_base: Path, name: str) -> None:
    state = State(micro_batch=8)
    model = model_in(tiny_base, dtype=torch.float32, dropout=False)
    train(setup_of(model, Data(), config(max_steps=50, **OPTIMIZERS[name])), state, Quiet())
    assert sum(state.losses[-10:]) < sum(state.losses[:10])


def test_biases_and_norms_do_not_decay() -> None:
    model = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(3, 2),
            "wide": torch.nn.LayerNorm([2, 3]),
            "images": torch.nn.BatchNorm2d(4),
            "frozen": torch.nn.Linear(3, 2).requires_grad_(False),
        }
    )
    optimizer = make_optimizer(model, config(weight_decay=0.25))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {
        "linear.weight": 0.25,
        "linear.bias": 0.0,
        "wide.weight": 0.0,
        "wide.bias": 0.0,
        "images.weight": 0.0,
        "images.bias": 0.0,
    }


def test_each_layer_has_its_own_learning_rate(tiny_base: Path) -> None:
    model = model_in(tiny_base, dtype=torch.float32, dropout=False)
    optimizer = make_optimizer(model, config(layerwise_decay=0.5))
    set_learning_rate(optimizer, 0.8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        below = 3 if "embeddings" in name else 2 if "layer.0" in name else 1 if "layer.1" in name else 0
        assert rate == pytest.approx(0.8 * 0.5**below), name


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd with momentum"])
def test_the_learning_rate_is_the_schedules_alone(name: str) -> None:
    """Twice the rate is twice the first step, weight decay included: no optimizer has a rate of its own."""

    def moved(rate: float) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8, dtype=torch.float64)
        before = layer.weight.detach().clone()
        optimizer = make_optimizer(layer, config(**{**OPTIMIZERS[name], "learning_rate": rate}))
        layer(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
        optimizer.step()
        return layer.weight.detach() - before

    torch.testing.assert_close(moved(2e-3), 2 * moved(1e-3), rtol=1e-6, atol=1e-12)


def test_a_machine_without_bitsandbytes_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.model import ModelError

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ModelError, match=r"training\.optimizer\.type: adamw-8bit needs bitsandbytes.*choose adamw"):
        make_optimizer(torch.nn.Linear(2, 2), config(optimizer="adamw-8bit"))


# --- schedules ---

THEIRS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "linear": ({}, "linear", {}),
    "cosine": ({}, "cosine", {}),
    "cosine with minimum": (
        {"schedule": "cosine", "schedule_minimum": 0.1},
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    ),
    "constant": ({}, "constant_with_warmup", {}),
    "polynomial": ({"schedule_power": 2.5}, "polynomial", {"power": 2.5, "lr_end": 0.0}),
    "polynomial with minimum": (
        {"schedule": "polynomial", "schedule_minimum": 0.2, "schedule_power": 0.5},
        "polynomial",
        {"power": 0.5, "lr_end": 0.02},
    ),
    "inverse-sqrt": ({}, "inverse_sqrt", {}),
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", THEIRS)
def test_schedules_equal_those_of_transformers(name: Any, warmup: int) -> None:
    from transformers import get_scheduler

    changed, theirs, options = THEIRS[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = get_scheduler(theirs, optimizer, warmup, 40, scheduler_specific_kwargs=options)
    settings = config(**{"schedule": name, **changed}, learning_rate=0.1, warmup_percent=None, warmup_steps=warmup)
    for step in range(40):
        assert learning_rate(settings, step=step, total=40) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("percent", [5.0, 30.0, 60.0])
def test_one_cycle_equals_that_of_torch(percent: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=40, pct_start=percent / 100, cycle_momentum=False
    )
    settings = config(schedule="one-cycle", learning_rate=0.1, warmup_percent=percent)
    for step in range(40):
        assert learning_rate(settings, step=step, total=40) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        if step < 39:
            schedule.step()


@pytest.mark.parametrize("kind", [*dict.fromkeys(v[0].get("schedule", k) for k, v in THEIRS.items()), "one-cycle"])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_no_schedule_leaves_the_range_from_zero_to_the_peak(kind: Any, total: int) -> None:
    for percent in (0.0, 6.0, 100.0):
        settings = config(schedule=kind, learning_rate=0.1, warmup_percent=percent)
        rates = [learning_rate(settings, step=step, total=total) for step in range(total)]
        assert all(0.0 <= rate <= 0.1 for rate in rates)
        assert max(rates) > 0.0 or (total, percent) in {(1, 6.0), (1, 100.0)}  # the one step of a warm-up is nothing
