"""Training the head on cached features: for rows, for tokens and for images, and why it is off where it is."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.rank.architectures import make

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.adapt import head
from finetune_trainer.adapt.base import Shortcut
from finetune_trainer.model import Loaded, ModelError
from finetune_trainer.world import World

CACHED = ["bert", "roberta", "albert", "distilbert", "llama", "vit", "resnet"]
ROWS = np.arange(70)


def inputs_of(name: str) -> Any:
    """Rows that depend on their number, of 5 to 14 tokens, and a label each."""

    def made(rows: Any) -> dict[str, torch.Tensor]:
        labels = torch.tensor([int(row) % 3 for row in rows])
        if name in ("vit", "resnet"):
            side = 8 if name == "vit" else 32
            images = [torch.randn(3, side, side, generator=torch.Generator().manual_seed(int(row))) for row in rows]
            return {"pixel_values": torch.stack(images), "labels": labels}
        lengths = [5 + int(row) % 10 for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[number, :length] = (torch.arange(length) * 3 + int(row)) % 50 + 5
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    return made


def shortcut(name: str, tmp_path: Path, *, inputs: Any = None, fresh: frozenset[str] = frozenset()) -> Any:
    method = adapt.get(MethodConfig(type="head"))
    model = method.prepare(Loaded(make(name), fresh), seed=1)
    given = inputs or inputs_of(name)
    short = method.shortcut(model, rows=ROWS, inputs_of=given, work=tmp_path, world=World(), beat=lambda: None)
    return method, model, short


def logits_of(found: Any) -> torch.Tensor:
    return torch.stack([found.start_logits, found.end_logits], -1) if "start_logits" in found else found.logits


def run(short: Shortcut, rows: Any) -> torch.Tensor:
    given = {name: value for name, value in short.inputs_of(rows).items() if name != "labels"}
    return logits_of(short.module(**given))


@pytest.mark.parametrize("name", CACHED)
def test_cached_features_give_the_answers_of_the_whole_model(name: str, tmp_path: Path) -> None:
    method, model, short = shortcut(name, tmp_path)
    assert short is not None
    assert short.module.by_token == (name in ("roberta", "distilbert", "llama"))
    model.eval()
    for rows in (np.array([3, 69, 0, 41]), np.array([7]), np.array([69, 3])):
        whole = inputs_of(name)(rows)
        labels = whole.pop("labels")
        assert torch.equal(short.inputs_of(rows)["labels"], labels)
        with torch.no_grad():
            found, wanted = run(short, rows), logits_of(model(**whole))
        if short.module.by_token:
            mask = whole["attention_mask"].bool()
            found, wanted = found[mask], wanted[mask]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    short.module.train()
    method.train(model)
    assert not model.base_model.training
    run(short, ROWS[:3]).sum().backward()
    grown = {key for key, p in model.named_parameters() if p.grad is not None}
    assert grown == set(checkpoint.trainable(model))


def test_an_image_is_decoded_twice_at_most(tmp_path: Path) -> None:
    decoded: list[int] = []

    def counted(rows: Any) -> dict[str, torch.Tensor]:
        decoded.extend(int(row) for row in rows)
        return inputs_of("vit")(rows)

    _, _, short = shortcut("vit", tmp_path, inputs=counted)
    before = len(decoded)
    for _ in range(3):
        assert short.inputs_of(np.array([5, 9]))["labels"].tolist() == [2, 0]
    assert decoded[before:] == [5, 9]


def off(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, **given: Any) -> str:
    with caplog.at_level(logging.WARNING):
        assert shortcut(name, tmp_path, **given)[2] is None
    return caplog.text


def test_augmented_rows_are_not_cached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def flipped(rows: Any) -> dict[str, torch.Tensor]:
        found = inputs_of("vit")(rows)
        return {**found, "pixel_values": found["pixel_values"] + torch.rand(1)}

    assert "rows look different each time" in off("vit", tmp_path, caplog, inputs=flipped)


def test_a_trunk_that_trains_in_part_is_not_cached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reason = off("bert", tmp_path, caplog, fresh=frozenset({"bert.pooler.dense.weight"}))
    assert "the base lacks bert.pooler.dense.weight in its trunk" in reason


def test_features_larger_than_half_the_free_space_are_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4096 * 2})())
    assert "more than half of what is free" in off("roberta", tmp_path, caplog)


def test_a_head_that_needs_its_trunk_is_not_cached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make("bert").__class__.forward

    def twice(self: Any, **given: Any) -> Any:
        found = plain(self, **given)
        found.logits = found.logits + self.bert.get_input_embeddings()(given["input_ids"]).mean() + found.logits.sum()
        found.logits = found.logits + self.bert(**given).pooler_output.sum()
        return found

    monkeypatch.setattr(make("bert").__class__, "forward", twice)
    assert "the head of BertForSequenceClassification needs all of its trunk" in off("bert", tmp_path, caplog)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_model_whose_output_layer_is_the_embedding_has_no_head(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has nothing there"):
        shortcut(name, tmp_path)


def test_two_ranks_share_the_features(make_run: Any, rows: Any, tmp_path: Path, free_port: int) -> None:
    training = {"maxSteps": 5, "batchSize": 16, "microBatch": 4, "learningRate": 1e-2}
    spec: dict[str, Any] = {"method": {"type": "head"}, "training": training}
    single = make_run(rows(60), name="single", **spec)
    code, log = single.run(tmp_path / "work-single")
    assert code == 0, log
    double = make_run(rows(60), name="double", **spec)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    both = [double.start(tmp_path / "work", RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in (0, 1)]
    assert [started.wait() for started in both] == [0, 0], "\n".join(started.log for started in both)
    assert double.losses() == pytest.approx(single.losses(), rel=1e-5)
