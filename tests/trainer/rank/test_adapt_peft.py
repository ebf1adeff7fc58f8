"""Additions by PEFT, for every kind of model: what trains, what is saved, that it loads and merges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.rank.architectures import ARCHITECTURES, inputs_for, make, published
from tests.trainer.rank.architectures import tuned as tuned_by

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.adapt.with_peft import answers
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded, ModelError
from finetune_trainer.world import World

LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
LEARNED = {"virtual_tokens": 4}
METHODS: dict[str, dict[str, Any]] = {"lora": LORA, "dora": LORA, "ia3": {}, "prompt": LEARNED, "prefix": LEARNED}
REFUSED = {
    ("resnet", "ia3"): "scales keys and values, and ResNetForImageClassification has no attention",
    ("resnet", "prompt"): "does not read text that way",
    ("resnet", "prefix"): "does not read text that way",
    ("vit", "prompt"): "does not read text that way",
    ("vit", "prefix"): "does not read text that way",
    ("albert", "prefix"): "cannot be tuned by learned tokens .*past key values",
    ("distilbert", "prefix"): "cannot be tuned by learned tokens",
}
CELLS = [
    (name, kind)
    for name in ARCHITECTURES
    for kind in METHODS
    if (name, kind) not in REFUSED and (kind != "dora" or name in ("bert", "gpt2", "t5", "vit", "resnet"))
]
"""DoRA is LoRA with a factor more: a few kinds of layers do."""
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


def tuned(name: str, kind: Any, *, fresh: frozenset[str] = frozenset()) -> tuple[adapt.Method, Any]:
    return tuned_by(name, MethodConfig(type=kind, **METHODS[kind]), fresh=fresh)


def loaded_as_the_card_says(method: adapt.Method, model: Any, directory: Path, base: Path, *, merge: bool) -> Any:
    return published(method.load_hint(model, merge=merge), directory, base)


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_what_is_saved_loads_as_the_card_says_and_answers_alike(name: str, kind: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "base")
    method, model = tuned(name, kind)
    wanted = answers(model, inputs_for(name))
    untouched = answers(make(name), inputs_for(name))[0]
    assert float((wanted[0] - untouched).abs().max()) > 1e-4
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for(name))
    found = loaded_as_the_card_says(method, model, tmp_path / "adapter", tmp_path / "base", merge=False)
    again = answers(found, inputs_for(name))
    if "positions of its logits belong to the learned tokens" in method.load_hint(model, merge=False):
        again = [tensor[:, 4:] for tensor in again]
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)
    for file in (tmp_path / "adapter").glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert set(config["modules_to_save"] or []) >= HEADS.get(name, set())

    if kind in ("prompt", "prefix"):
        with pytest.raises(ModelError, match="no weights to merge"):
            method.save(model, tmp_path / "merged", merge=True, example=inputs_for(name))
        return
    method.save(model, tmp_path / "merged", merge=True, example=inputs_for(name))
    merged = loaded_as_the_card_says(method, make(name), tmp_path / "merged", tmp_path / "base", merge=True)
    assert type(merged) is type(make(name))
    torch.testing.assert_close(answers(merged, inputs_for(name)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(name: str, kind: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name, kind]):
        prepared(name, kind)


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


@pytest.mark.parametrize("kind", METHODS)
def test_additions_depend_on_the_seed_alone(kind: str) -> None:
    torch.manual_seed(3)
    one = checkpoint.snapshot_weights(prepared("bert", kind)[1])
    torch.manual_seed(4)
    two = checkpoint.snapshot_weights(prepared("bert", kind)[1])
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kind", METHODS)
def test_what_the_base_lacks_in_its_trunk_is_trained_and_saved(kind: str, tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path / "base")
    pooler = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"})
    method, model = tuned("bert", kind, fresh=pooler)
    assert len([key for key in checkpoint.trainable(model) if "pooler" in key]) == 2
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for("bert"))
    found = loaded_as_the_card_says(method, model, tmp_path / "adapter", tmp_path / "base", merge=False)
    torch.testing.assert_close(answers(found, inputs_for("bert")), answers(model, inputs_for("bert")))


# --- learned tokens ---


@pytest.mark.parametrize("name", ["roberta", "distilbert", "llama", "gpt2"])
def test_answers_for_learned_tokens_are_cut_off(name: str) -> None:
    _, model = prepared(name, "prompt")
    found, plain = model(**inputs_for(name)), make(name)(**inputs_for(name))
    for key in ("logits", "start_logits", "end_logits"):
        if key in plain:
            assert found[key].shape == plain[key].shape


def test_the_last_positions_answer_for_the_row(tmp_path: Path) -> None:
    """The cut leaves the row's own positions: they are what the model says when the tokens are given as embeddings."""
    _, model = prepared("llama", "prompt")
    given = inputs_for("llama", rows=1)
    plain = plain_of(model)
    embedded = plain.get_input_embeddings()(given["input_ids"])
    tokens = model.prompt_encoder.default.embedding.weight[None]
    wanted = plain(inputs_embeds=torch.cat([tokens, embedded], dim=1)).logits[:, 4:]
    torch.testing.assert_close(model(**given).logits, wanted)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_learned_tokens_steer_generation(name: str, kind: str) -> None:
    """Greedy generation with the cache picks what the model says on the whole sequence."""
    _, model = prepared(name, kind)
    given = {key: value for key, value in inputs_for(name, rows=1).items() if key != "decoder_input_ids"}
    made = model.generate(**given, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    if name in ("t5", "bart"):
        logits = model(**given, decoder_input_ids=made[:, :-1]).logits[:, -3:]
    else:
        logits = model(input_ids=made[:, :-1]).logits[:, -3:]
    logits[:, :, 2] = -torch.inf  # the end is forbidden
    if name == "t5":
        logits[:, :, 1] = -torch.inf
    assert logits.argmax(-1).tolist() == made[:, -3:].tolist()


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_a_model_that_looks_for_its_answer_by_token_id_takes_no_prompt(name: str) -> None:
    import transformers

    base = make(name)
    kind = {"gpt2": "GPT2", "t5": "T5", "bart": "Bart"}[name]
    model = getattr(transformers, f"{kind}ForSequenceClassification")(base.config)
    way = adapt.get(MethodConfig(type="prompt", virtual_tokens=4))
    with pytest.raises(ModelError, match="cannot be tuned by learned tokens"):
        way.prepare(Loaded(model, frozenset()), seed=1)


LIMITS = {"bert": 40, "roberta": 39, "gpt2": 40, "bart": 40, "llama": None}


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_rows_leave_room_for_learned_tokens(name: str, limit: int | None, tmp_path: Path) -> None:
    def fits(length: int) -> None:
        ids = {"input_ids": torch.ones(1, length, dtype=torch.long) * 5}
        method.shortcut(
            model,
            rows=np.arange(1),
            inputs_of=lambda rows: ids,
            work=tmp_path,
            world=World(),
            beat=lambda: None,
        )
        model(**ids, **({"decoder_input_ids": ids["input_ids"][:, :3]} if name == "bart" else {}))

    method, model = prepared(name, "prompt")
    if limit is None:
        return fits(1000)
    fits(limit - 4)
    with pytest.raises(ModelError, match=rf"set data\.maxLength to {limit - 4} or less"):
        fits(limit - 3)
    return None


def test_convolutions_are_named_among_the_targets_of_a_cnn() -> None:
    _, model = prepared("resnet", "lora", targets=["shortcut.convolution"])
    adapted = [key for key, module in model.named_modules() if hasattr(module, "lora_A")]
    assert [key.split("resnet.")[1] for key in adapted] == ["encoder.stages.1.layers.0.shortcut.convolution"]
    with pytest.raises(ModelError, match=r"ends in query; its layers end in convolution"):
        prepared("resnet", "lora", targets=["query"])
