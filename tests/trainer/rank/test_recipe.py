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
        1.096007,
        1.099574,
        1.101342,
        1.02544,
        1.193062,
        1.128488,
        1.145538,
        1.10571,
        1.09036,
        1.100129,
        1.10788,
        0.991738,
        0.914306,
        0.685866,
        0.820635,
        0.634097,
        0.691583,
        0.528469,
        0.734324,
        0.572685,
        0.447955,
        0.492753,
        0.493602,
        0.625097,
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
