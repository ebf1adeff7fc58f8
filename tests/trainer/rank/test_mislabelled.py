"""Likely mislabelled rows: real sentences, a real base model, and labels that were flipped on purpose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_trainer.tasks import probe

ROOT = Path(__file__).parents[3]
ROWS, SHARE = 700, 0.05


def test_most_flipped_labels_are_in_the_top_tenth(minilm_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "hack"))
    from dataset import make

    train, _ = make(tmp_path, rows=ROWS, test_rows=7)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    labels = np.array([names.index(row["label"]) for row in rows])
    draw = np.random.default_rng(0)
    flipped = draw.choice(len(rows), int(SHARE * len(rows)), replace=False)
    labels[flipped] = (labels[flipped] + draw.integers(1, len(names), len(flipped))) % len(names)

    features = mean_features(minilm_dir, [row["text"] for row in rows])
    found = probe.label_quality(features, labels, count=len(names), seed=17)
    assert found is not None
    top = np.argsort(found[0])[: len(rows) // 10]
    share = np.isin(flipped, top).mean()
    print(f"{share:.0%} of {len(flipped)} flipped labels are among the {len(top)} most suspicious of {len(rows)} rows")
    assert share >= 0.6
    honest = np.setdiff1d(np.arange(len(rows)), flipped)
    assert found[0][flipped].mean() < 0.5 * found[0][honest].mean()


def mean_features(base: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """[rows, 384]: the mean over tokens of the last hidden states, as an evaluation takes them."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    order = np.argsort([len(text) for text in texts])
    features = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(texts), 64):
        chosen = order[start : start + 64]
        batch = tokenizer([texts[n] for n in chosen], padding=True, truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        features[chosen] = ((states * mask).sum(1) / mask.sum(1)).numpy()
    return features


def test_too_few_rows_accuse_nobody() -> None:
    features = np.zeros((20, 4), dtype=np.float32)
    assert probe.label_quality(features, np.arange(20) % 2, count=2, seed=1) is None
    assert probe.label_quality(np.zeros((80, 4), np.float32), np.zeros(80, np.int64), count=2, seed=1) is None
