"""Layers found by structure: a parameter's number is its distance from the input."""

from typing import Any

import pytest
from tests.trainer.rank.architectures import ARCHITECTURES, make

from finetune_trainer.layers import last_layer, layer_numbers

WANTED = {
    "bert": {
        "bert.embeddings.LayerNorm.weight": 0,
        "bert.encoder.layer.0.attention.self.query.weight": 1,
        "bert.encoder.layer.1.output.dense.bias": 2,
        "bert.pooler.dense.weight": 3,
        "classifier.weight": 3,
    },
    "roberta": {"roberta.embeddings.position_embeddings.weight": 0, "classifier.weight": 3},
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in.weight": 0,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": 1,  # one block, run twice
        "albert.pooler.weight": 2,
    },
    "distilbert": {
        "distilbert.embeddings.word_embeddings.weight": 0,
        "distilbert.transformer.layer.1.ffn.lin1.bias": 2,
    },
    "gpt2": {
        "transformer.wte.weight": 0,
        "transformer.wpe.weight": 0,
        "transformer.h.1.mlp.c_fc.weight": 2,
        "transformer.ln_f.weight": 3,
    },
    "llama": {
        "model.embed_tokens.weight": 0,
        "model.layers.0.mlp.up_proj.weight": 1,
        "model.norm.weight": 3,
        "lm_head.weight": 3,
    },
    "t5": {
        "shared.weight": 0,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 1,
        "encoder.block.1.layer.1.DenseReluDense.wi.weight": 2,
        "decoder.block.0.layer.2.layer_norm.weight": 1,
        "encoder.final_layer_norm.weight": 3,
    },
    "bart": {
        "model.encoder.layernorm_embedding.weight": 0,
        "model.decoder.embed_positions.weight": 0,
        "model.decoder.layers.1.encoder_attn.q_proj.weight": 2,
    },
    "vit": {
        "vit.embeddings.cls_token": 0,
        "vit.layers.1.mlp.fc1.weight": 2,
        "vit.layernorm.weight": 3,
        "classifier.bias": 3,
    },
    "resnet": {
        "resnet.embedder.embedder.convolution.weight": 0,
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight": 2,
        "classifier.1.weight": 3,
    },
}


@pytest.mark.parametrize("name", WANTED)
def test_each_parameter_has_the_number_of_its_block(name: str) -> None:
    numbers = layer_numbers(make(name))
    assert {key: numbers[key] for key in WANTED[name]} == WANTED[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_number_and_every_block_its_own(name: str) -> None:
    model = make(name)
    numbers = layer_numbers(model)
    assert set(numbers) == {key for key, _ in model.named_parameters()}
    assert set(numbers.values()) - {last_layer(model)} == set(range(last_layer(model)))


def test_stacks_of_unequal_length_end_together() -> None:
    numbers = layer_numbers(make("bart", decoder_layers=1, encoder_layers=3))
    firsts = {
        key: numbers[f"model.{key}.fc1.weight"] for key in ("encoder.layers.0", "encoder.layers.2", "decoder.layers.0")
    }
    assert firsts == {"encoder.layers.0": 1, "encoder.layers.2": 3, "decoder.layers.0": 3}


@pytest.mark.parametrize("name", ["bert", "t5", "resnet"])
def test_an_adapted_model_has_the_layers_of_its_base(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    def prefixless(numbers: dict[str, int]) -> dict[str, int]:
        return {
            key.removeprefix("base_model.model.").replace(".base_layer", ""): value for key, value in numbers.items()
        }

    plain: Any = layer_numbers(make(name))
    adapted = prefixless(layer_numbers(get_peft_model(make(name), LoraConfig(target_modules="all-linear"))))
    assert {key: adapted[key] for key in plain} == plain
    added = {key: value for key, value in adapted.items() if key not in plain}
    assert all(value == plain[key.split(".lora_")[0] + ".weight"] for key, value in added.items())
