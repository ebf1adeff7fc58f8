"""Additions by PEFT, for every kind of model: what trains, what is saved, that it loads and merges."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.rank.architectures import ARCHITECTURES, inputs_for, make

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.adapt.with_peft import answers
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded, ModelError

LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
METHODS: dict[str, dict[str, Any]] = {"lora": LORA, "dora": LORA}
HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier"},
    "albert": {"classifier"},
    "distilbert": {"qa_outputs"},
    "vit": {"classifier"},
    "resnet": {"classifier"},
}
"""What trains whole; nothing for language models."""


def prepared(name: str, kind: Any, *, fresh: frozenset[str] = frozenset(), **fields: Any) -> tuple[adapt.Method, Any]:
    method = adapt.get(MethodConfig(type=kind, **{**METHODS[kind], **fields}))
    return method, method.prepare(Loaded(make(name), fresh), seed=1)


def loss_of(model: Any, name: str) -> torch.Tensor:
    found = model(**inputs_for(name))
    logits = found.start_logits * found.end_logits if "start_logits" in found else found.logits
    return logits.square().mean()


def tuned(name: str, kind: Any, **fields: Any) -> tuple[adapt.Method, Any]:
    """A few large steps, so that additions say something."""
    method, model = prepared(name, kind, **fields)
    optimizer = torch.optim.Adam(checkpoint.trainable(model).values(), lr=0.05)
    method.train(model)
    for step in range(2):
        method.before_step(model, step)
        optimizer.zero_grad()
        loss_of(model, name).backward()
        optimizer.step()
    return method, model.eval()


def loaded_as_the_card_says(method: adapt.Method, model: Any, directory: Path, base: Path, *, merge: bool) -> Any:
    """Runs the card's code but for the tokenizer's line."""
    hint = method.load_hint(model, merge=merge)
    code = "\n".join(line for line in hint.splitlines() if not re.match("(tokenizer|processor) = ", line))
    names: dict[str, Any] = {"directory": str(directory), "base_directory": str(base)}
    exec(code, names)
    return names["model"].eval()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_loads_as_the_card_says_and_answers_alike(name: str, kind: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "base")
    method, model = tuned(name, kind)
    wanted = answers(model, inputs_for(name))
    untouched = answers(make(name), inputs_for(name))
    assert max(float((a - b).abs().max()) for a, b in zip(wanted, untouched, strict=True)) > 1e-3
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for(name))
    found = loaded_as_the_card_says(method, model, tmp_path / "adapter", tmp_path / "base", merge=False)
    torch.testing.assert_close(answers(found, inputs_for(name)), wanted, atol=1e-5, rtol=1e-5)
    for file in (tmp_path / "adapter").glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert set(config["modules_to_save"] or []) >= HEADS.get(name, set())

    method.save(model, tmp_path / "merged", merge=True, example=inputs_for(name))
    merged = loaded_as_the_card_says(method, make(name), tmp_path / "merged", tmp_path / "base", merge=True)
    assert type(merged) is type(make(name))
    torch.testing.assert_close(answers(merged, inputs_for(name)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_additions_and_the_tasks_head_train_and_nothing_else(name: str) -> None:
    _, model = prepared(name, "lora")
    whole = {
        key.removeprefix("base_model.model.").split(".modules_to_save.")[0]
        for key in checkpoint.trainable(model)
        if "lora_" not in key
    }
    assert whole == HEADS.get(name, set())
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(adapted) >= 4
    assert not any(module is plain_of(model).get_output_embeddings() for module in adapted)


def test_the_rank_stabilised_update_is_larger_at_equal_alpha() -> None:
    def scale(**fields: Any) -> float:
        model = prepared("bert", "lora", rank=16, alpha=16.0, **fields)[1]
        return float(next(m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")))

    assert scale() == 1.0
    assert scale(rank_stabilized=True) == 4.0


def test_a_merge_that_changes_the_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = tuned("bert", "lora")
    before = model.merge_and_unload

    def wrong() -> Any:
        plain = before()
        with torch.no_grad():
            plain.classifier.weight.add_(0.01)
        return plain

    monkeypatch.setattr(model, "merge_and_unload", wrong)
    with pytest.raises(ModelError, match=r"output\.merge: the merged model's outputs differ by"):
        method.save(model, tmp_path, merge=True, example=inputs_for("bert"))


def test_tied_embeddings_that_the_base_lacks_stay_tied(tmp_path: Path) -> None:
    make("qwen2").save_pretrained(tmp_path / "base")
    method, model = tuned("qwen2", "lora", fresh=frozenset({"model.embed_tokens.weight"}))
    wanted = answers(model, inputs_for("qwen2"))
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for("qwen2"))
    found = loaded_as_the_card_says(method, model, tmp_path / "adapter", tmp_path / "base", merge=False)
    torch.testing.assert_close(answers(found, inputs_for("qwen2")), wanted)
    method.save(model, tmp_path / "merged", merge=True, example=inputs_for("qwen2"))
    merged = loaded_as_the_card_says(method, make("qwen2"), tmp_path / "merged", tmp_path / "base", merge=True)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(answers(merged, inputs_for("qwen2")), wanted, atol=1e-4, rtol=1e-4)


def test_an_output_layer_that_the_base_lacks_is_trained_whole(tmp_path: Path) -> None:
    _, model = prepared("llama", "lora", fresh=frozenset({"lm_head.weight"}))
    assert any("lm_head.modules_to_save" in key for key in checkpoint.trainable(model))


def test_additions_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    one = checkpoint.snapshot_weights(prepared("bert", "lora")[1])
    torch.manual_seed(4)
    two = checkpoint.snapshot_weights(prepared("bert", "lora")[1])
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_convolutions_are_named_among_the_targets_of_a_cnn() -> None:
    _, model = prepared("resnet", "lora", targets=["shortcut.convolution"])
    adapted = [key for key, module in model.named_modules() if hasattr(module, "lora_A")]
    assert [key.split("resnet.")[1] for key in adapted] == ["encoder.stages.1.layers.0.shortcut.convolution"]
    with pytest.raises(ModelError, match=r"ends in query; its layers end in convolution"):
        prepared("resnet", "lora", targets=["query"])
