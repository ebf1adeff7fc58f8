"""Small models of real classes with random weights, and inputs for each."""

import re
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import MethodConfig
from finetune_trainer import adapt, checkpoint
from finetune_trainer.model import Loaded

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
DISTILBERT = {
    "vocab_size": 60,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 60,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", SMALL),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**SMALL, "embedding_size": 8}),
    "distilbert": ("DistilBertForQuestionAnswering", "DistilBertConfig", DISTILBERT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SMALL, "num_key_value_heads": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET),
}
"""Class, configuration class and sizes by name."""


def make(name: str, **changed: Any) -> Any:
    """The model in eval mode, always with the same weights."""
    import transformers

    kind, config, sizes = ARCHITECTURES[name]
    if name in ("bert", "albert", "roberta", "vit", "resnet"):
        changed.setdefault("num_labels", 3)
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **changed})).eval()


def inputs_for(name: str, *, rows: int = 2) -> dict[str, torch.Tensor]:
    """Inputs of a few rows that differ in length, without labels."""
    if name in ("vit", "resnet"):
        draw = torch.Generator().manual_seed(1)
        return {
            "pixel_values": torch.randn(rows, 3, 8 if name == "vit" else 32, 8 if name == "vit" else 32, generator=draw)
        }
    ids = torch.stack([torch.arange(5 + row, 15 + row) for row in range(rows)])
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[-1, -3:], mask[-1, -3:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if name in ("t5", "bart", "marian"):
        found["decoder_input_ids"] = torch.cat([torch.full((rows, 1), 2), ids[:, :4]], dim=1)
    return found


def tuned(name: str, config: MethodConfig, *, fresh: frozenset[str] = frozenset()) -> tuple[adapt.Method, Any]:
    """A model after two large steps by a method, so that what was added says something."""
    method = adapt.get(config)
    model = method.prepare(Loaded(make(name), fresh, lambda: Loaded(make(name), fresh)), seed=1)
    optimizer = torch.optim.Adam(checkpoint.trainable(model).values(), lr=0.05)
    method.train(model)
    for step in range(2):
        method.before_step(model, step)
        optimizer.zero_grad()
        found = model(**inputs_for(name))
        logits = found.start_logits * found.end_logits if "start_logits" in found else found.logits
        logits.square().mean().backward()
        optimizer.step()
    return method, model.eval()


def published(hint: str, directory: Path, base: Path) -> Any:
    """The model that the card's code loads; its line about the tokenizer is left out."""
    code = "\n".join(line for line in hint.splitlines() if not re.match("(tokenizer|processor) = ", line))
    names: dict[str, Any] = {"directory": str(directory), "base_directory": str(base)}
    exec(code, names)
    return names["model"].eval()
