"""Small causal language models with random weights, whose tokenizer knows bytes and a few words."""

import json
from pathlib import Path
from typing import Any

WORDS = ("the", "red", "green", "blue", "cat", "dog", "sees", "likes", "assistant", "user")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS, UNK, START, END = range(6)


def save_tokenizer(directory: Path, *, bos: bool = True, template: str | None = None) -> int:
    """Writes a byte-level tokenizer; `bos`: whether it begins each text with <s>. Returns its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=False)},
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """So that the words, and they behind a space, become one token each; what lies between is added."""
    merges: dict[tuple[str, str], None] = {}
    for word in [*WORDS, *(f"Ġ{word}" for word in WORDS)]:
        whole = word[0]
        for letter in word[1:]:
            merges[whole, letter] = None
            whole += letter
            vocabulary.setdefault(whole, len(vocabulary))
    return list(merges)


SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "gemma2": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
    },
    "cohere": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "bert": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
}


def make_lm(kind: str = "llama", *, vocabulary: int = 60, **changed: Any) -> Any:
    """A model in eval mode without dropout, always with the same weights; large ones, so that mistakes show."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    dropout = {"dropout": 0.0} if kind == "opt" else dropout
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": vocabulary,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "initializer_range": 0.2,
            **dropout,
            **SIZES[kind],
            **changed,
        },
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save_lm(
    directory: Path, kind: str = "llama", *, bos: bool = True, template: str | None = None, **changed: Any
) -> Path:
    """A base model's directory."""
    size = save_tokenizer(directory, bos=bos, template=template)
    make_lm(kind, vocabulary=size, **changed).save_pretrained(directory)
    return directory
