"""The golden curve that guards RECIPE_VERSION: what a run computes changes only on purpose.

A run's identity holds the recipe's version, never a package's. So a change of numerics that nobody noticed would mix
two kinds of arithmetic in one run. Weights come from numpy's generator, whose stream is fixed for ever.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune_api.contract import RECIPE_VERSION

GOLDEN = {
    1: [
        1.09706,
        1.098871,
        1.090448,
        1.230007,
        1.092461,
        1.062698,
        1.017717,
        0.772571,
        0.713853,
        0.599143,
        0.678413,
        0.644662,
        0.433433,
        0.902725,
        0.365867,
        0.48674,
        0.411944,
        0.463933,
        0.405426,
        0.418973,
        0.46833,
        0.494129,
        0.427555,
        0.157985,
    ]
}
"""Losses of the first steps by recipe version; dropout, warm-up, decay, clipping and short batches are all in them."""

SPEC = {
    "training": {"epochs": 3.0, "batchSize": 24, "microBatch": 8, "learningRate": 2e-2, "maxGradNorm": 0.5, "seed": 5},
    "evaluation": {"primary": "accuracy"},
}


@pytest.fixture
def fixed_base(tiny_base: Path, tmp_path: Path) -> Path:
    base = tmp_path / "fixed"
    shutil.copytree(tiny_base, base)
    draw = np.random.Generator(np.random.PCG64(7))
    weights = load_file(base / "model.safetensors")
    for name in sorted(weights):
        norm = "LayerNorm" in name
        drawn = draw.normal(1.0 if norm and name.endswith("weight") else 0.0, 0.05, weights[name].shape)
        weights[name] = drawn.astype(np.float32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_the_losses_are_those_of_the_recipe(make_run: Any, rows: Any, fixed_base: Path, tmp_path: Path) -> None:
    made = make_run(rows(200), base=fixed_base, **SPEC)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    found = [round(loss, 6) for loss in made.losses()]
    assert found == pytest.approx(GOLDEN[RECIPE_VERSION], rel=2e-4), (
        "The trainer computes something else than before. If that is meant, raise RECIPE_VERSION (every run then "
        f"trains anew) and add these losses under its number; if not, undo it. Losses: {found}"
    )
