"""Bottleneck adapters: where they go, what trains, that ten lines load them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.rank.architectures import ARCHITECTURES, inputs_for, make, published, tuned

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.adapt.with_peft import answers
from finetune_trainer.layers import layer_numbers
from finetune_trainer.model import Loaded, ModelError

ADAPTED = [name for name in ARCHITECTURES if name != "resnet"]
PLACES = {
    "bert": ({"output.dense"}, {"attention.output.dense"}),
    "albert": ({"ffn_output"}, {"attention.dense"}),
    "distilbert": ({"ffn.lin2"}, {"attention.out_lin"}),
    "gpt2": ({"mlp.c_proj"}, {"attn.c_proj"}),
    "llama": ({"mlp.down_proj"}, {"self_attn.o_proj"}),
    "t5": ({"layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"}, {"SelfAttention.o", "EncDecAttention.o"}),
    "bart": ({"fc2"}, {"self_attn.out_proj", "encoder_attn.out_proj"}),
    "vit": ({"mlp.fc2"}, {"attention.o_proj"}),
}
"""The layers that leave feed-forward parts, and those that leave attention."""


def config(**fields: Any) -> MethodConfig:
    return MethodConfig(type="adapter", **{"reduction": 4, "variant": "houlsby", **fields})


def prepared(name: str, **fields: Any) -> tuple[adapt.Method, Any]:
    method = adapt.get(config(**fields))
    return method, method.prepare(Loaded(make(name), frozenset()), seed=1)


@pytest.mark.parametrize("name", PLACES)
def test_adapters_follow_feed_forward_parts_and_with_houlsby_attention(name: str) -> None:
    def places(variant: str) -> set[str]:
        _, model = prepared(name, variant=variant)
        return {key for key, module in model.named_modules() if hasattr(module, "adapter")}

    after, attention = PLACES[name]
    small, large = places("pfeiffer"), places("houlsby")
    assert all(key.endswith(tuple(after)) and not key.endswith(tuple(attention)) for key in small)
    assert all(key.endswith(tuple(attention)) for key in large - small)
    blocks = 1 if name == "albert" else 4 if name in ("t5", "bart") else 2
    assert len(small) == blocks
    assert len(large) == {"albert": 2, "t5": 10, "bart": 10}.get(name, 4)


@pytest.mark.parametrize("name", ADAPTED)
def test_fresh_adapters_change_nothing_and_only_they_and_the_head_train(name: str) -> None:
    _, model = prepared(name)
    torch.testing.assert_close(answers(model, inputs_for(name)), answers(make(name), inputs_for(name)))
    numbers = layer_numbers(model)
    for key in checkpoint.trainable(model):
        assert ".adapter." in key or key.startswith(("classifier", "qa_outputs"))
        assert ".adapter." not in key or 1 <= numbers[key] <= 2
    width = {"albert": 16}.get(name, 16)
    downs = [p for key, p in model.named_parameters() if key.endswith("adapter.0.weight")]
    assert {tuple(p.shape) for p in downs} == {(width // 4, width)}


@pytest.mark.parametrize("name", ADAPTED)
def test_ten_lines_of_the_card_load_what_is_saved(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "base")
    method, model = tuned(name, config())
    wanted = answers(model, inputs_for(name))
    assert float((wanted[0] - answers(make(name), inputs_for(name))[0]).abs().max()) > 1e-4
    (tmp_path / "adapter").mkdir()
    method.save(model, tmp_path / "adapter", merge=False, example=inputs_for(name))
    found = published(method.load_hint(model, merge=False), tmp_path / "adapter", tmp_path / "base")
    torch.testing.assert_close(answers(found, inputs_for(name)), wanted)
    description = json.loads((tmp_path / "adapter" / "adapters.json").read_text())
    assert description["variant"] == "houlsby"
    assert len(method.load_hint(model, merge=False).splitlines()) <= 13


def test_merging_adapters_is_refused(tmp_path: Path) -> None:
    method, model = prepared("bert")
    with pytest.raises(ModelError, match="cannot be folded into its weights"):
        method.save(model, tmp_path, merge=True, example=inputs_for("bert"))


def test_a_cnn_takes_no_adapters() -> None:
    with pytest.raises(ModelError, match="after attention and feed-forward parts, and ResNet"):
        prepared("resnet")


def test_adapters_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = checkpoint.snapshot_weights(prepared("bert")[1])
    torch.manual_seed(2)
    two = checkpoint.snapshot_weights(prepared("bert")[1])
    assert all(torch.equal(one[key], two[key]) for key in one)
