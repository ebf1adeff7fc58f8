"""What the files of a base model tell of its structure, without loading it: blocks, widths, layers.

Everything comes from the shapes in the headers of its safetensors files and from config.json. Parameters can be counted
for any model; how a block computes is known for the architectures in FAMILIES alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Family(NamedTuple):
    """How the blocks of an architecture compute, as far as shapes do not tell."""

    materialised: bool = False
    """Attention keeps the weights of every pair of tokens."""
    dropouts: float = 1.0
    """The share of its sublayers whose output is dropped from."""
    copies: float = 0.0
    """More tensors as wide as attention than query, key, value and output, such as rotated copies."""
    inner_dropout: str = ""
    """config.json's name of the dropout inside of the feed-forward part."""
    dense_head: bool = False
    """A classification head has a square layer before its last."""
    shared_blocks: bool = False
    """One block is used for all layers."""


FAMILIES: Mapping[str, Family] = {
    "albert": Family(shared_blocks=True),
    "bart": Family(inner_dropout="activation_dropout", dense_head=True),
    "bert": Family(),
    "camembert": Family(dense_head=True),
    "deit": Family(),
    "distilbert": Family(dropouts=0.5, dense_head=True),
    "electra": Family(dense_head=True),
    "gemma": Family(),
    "gpt2": Family(),
    "gpt_neox": Family(),
    "llama": Family(),
    "mbart": Family(inner_dropout="activation_dropout", dense_head=True),
    "mistral": Family(),
    "modernbert": Family(copies=2.0, dense_head=True),
    "mpnet": Family(materialised=True, dense_head=True),
    "mt5": Family(materialised=True, inner_dropout="dropout_rate"),
    "opt": Family(),
    "phi3": Family(copies=1.0),
    "qwen2": Family(),
    "qwen3": Family(copies=3.0),
    "roberta": Family(dense_head=True),
    "t5": Family(materialised=True, inner_dropout="dropout_rate"),
    "vit": Family(),
    "xlm-roberta": Family(dense_head=True),
}
"""By config.json's model_type; each is held against real training steps in tests/trainer/test_predicted.py."""
_KEPT_BY = {"relu": 0, "gelu": 1, "gelu_pytorch_tanh": 1, "silu": 1, "swish": 1, "gelu_new": 4, "gelu_fast": 6}
"""How many tensors as wide as its input an activation keeps for the backward pass, beside its output."""
_INNER = ("intermediate_size", "encoder_ffn_dim", "ffn_dim", "d_ff", "hidden_dim", "n_inner")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "num_heads", "n_head", "n_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ACTIVATION = ("hidden_activation", "hidden_act", "activation_function", "feed_forward_proj", "activation")
_TABLE_ROWS = ("vocab_size", "max_position_embeddings", "n_positions", "type_vocab_size")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
HIDDEN_DROPOUT = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout", "dropout_rate", "mlp_dropout")
_NUMBER = re.compile(r"(.*?)\.(\d+)\.(.+)")


class Unknown(ValueError):
    """Something about a model cannot be told from its files; the message says what, without a full stop."""


@dataclass(frozen=True)
class Stack:
    """Equal blocks, one behind the other. Widths are in values a token."""

    prefix: str
    blocks: int
    """How many run in a forward pass."""
    width: int
    attention: int
    """Width of all heads together."""
    heads: int
    inner: int
    norms: int
    """As many sublayers are there."""
    root_mean_square: bool
    """Norms are of that kind, and keep more."""
    gated: bool
    cross: bool
    """Blocks also attend to an encoder's output."""
    activation: int
    """Tensors of the inner width that the activation keeps."""
    matrices: Mapping[str, Shape]
    """The linear layers of one block by name, [out, in], or [in, out] in GPT-2."""


@dataclass(frozen=True)
class Anatomy:
    """A base model, as its files describe it."""

    family: Family
    stacks: Sequence[Stack]
    shapes: Shapes
    """All parameters of trunk and, if it is a language model, output layer."""
    linear: Shapes
    """Those of them that are linear layers of the trunk."""
    width: int
    vocabulary: int
    """0: it reads no text."""
    tied: bool
    """The output layer is the embedding."""
    config: Mapping[str, Any]


def anatomy(config: Mapping[str, Any], shapes: Shapes, *, writes: bool) -> Anatomy:
    """The structure of a base that is loaded with the output layer of a language model (`writes`) or with another
    head. Raises Unknown."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise Unknown(f"how a model of type {kind} computes is not known")
    vocabulary = int(config.get("vocab_size") or 0)
    tied = bool(config.get("tie_word_embeddings", True))
    shapes = used(shapes, config, writes=writes, tied=tied, vocabulary=vocabulary)
    stacks = [_stack(prefix, blocks, config, FAMILIES[kind]) for prefix, blocks in _grouped(shapes).items()]
    if not stacks:
        raise Unknown("no blocks are found among its weights")
    inside = {name for name in shapes if any(name.startswith(f"{stack.prefix}.") for stack in stacks)}
    linear = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith("weight") and (name in inside or not _is_table(shape, config))
        if not _is_bias(shape, config) and "lm_head" not in name
    }
    return Anatomy(FAMILIES[kind], stacks, shapes, linear, stacks[0].width, vocabulary, tied, config)


def used(shapes: Shapes, config: Mapping[str, Any], *, writes: bool, tied: bool, vocabulary: int) -> Shapes:
    """Parameters that a model is made of: no head that the file holds besides, no second copy of a tied table."""
    prefixes = {prefix.partition(".")[0] for prefix in _grouped(shapes)}
    trunk = prefixes.pop() if len(prefixes) == 1 else ""
    if not any(name.startswith(f"{trunk}.") and _first_layer(shapes[name], vocabulary) for name in shapes):
        trunk = ""  # the trunk by itself was saved
    found: dict[str, Shape] = {}
    tables = 0
    for name, shape in shapes.items():
        if shape[:2] == (1, 1):
            continue  # a mask, which old files of GPT-2 hold
        outside = bool(trunk) and not name.startswith(f"{trunk}.")
        table = len(shape) == 2 and vocabulary > 0 and shape[0] == vocabulary
        if (outside and not (writes and table)) or (table and tables >= (2 if writes and not tied else 1)):
            continue
        tables += table
        found[name] = shape
    return found


def _first_layer(shape: Shape, vocabulary: int) -> bool:
    """Whether a weight is a table of tokens, or cuts an image into patches."""
    return len(shape) == 4 or (len(shape) == 2 and vocabulary > 0 and shape[0] == vocabulary)


def _is_table(shape: Shape, config: Mapping[str, Any]) -> bool:
    return any(shape[0] in (rows, (rows or 0) + 2) for rows in map(config.get, _TABLE_ROWS) if rows)


def _is_bias(shape: Shape, config: Mapping[str, Any]) -> bool:
    """Whether it is T5's table of how much positions attend to each other."""
    return shape == (config.get("relative_attention_num_buckets"), config.get("num_heads"))


def _grouped(shapes: Shapes) -> dict[str, dict[int, dict[str, Shape]]]:
    """By the name of a stack its blocks, each with its parameters. A block has at least four matrices."""
    found: dict[str, dict[int, dict[str, Shape]]] = {}
    for name, shape in shapes.items():
        match = _NUMBER.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = shape
    return {
        prefix: blocks
        for prefix, blocks in found.items()
        if sum(len(shape) == 2 for shape in next(iter(blocks.values())).values()) >= 4
    }


def _stack(prefix: str, blocks: Mapping[int, Shapes], config: Mapping[str, Any], family: Family) -> Stack:
    block = blocks[max(blocks)]
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in block.items()
        if len(shape) == 2 and name.endswith("weight") and not _is_bias(shape, config)
    }
    heads = _first(config, _HEADS, "attention heads")
    norms = [name for name in block if len(block[name]) == 1 and re.search(r"(^|\.)(weight|gamma)$", name)]
    counts: dict[int, int] = {}
    for name in norms:
        counts[block[name][0]] = counts.get(block[name][0], 0) + 1
    if not counts:
        raise Unknown("its blocks have no norms")
    width = max(counts, key=lambda size: (counts[size], size))
    given = next((config[name] for name in _INNER if config.get(name)), 4 * width)
    inner = int(given)
    wide = sum(1 if inner in shape else 2 for shape in matrices.values() if {inner, 2 * inner} & set(shape))
    if wide not in (2, 3):
        raise Unknown(f"the feed-forward part of {prefix} has {wide} layers {inner} wide, where 2 or 3 are known")
    head = config.get("head_dim") or config.get("d_kv") or width // heads
    cross = bool(config.get("is_encoder_decoder")) and "decoder" in prefix
    name = next((str(config[key]) for key in _ACTIVATION if config.get(key)), "gelu_new")
    name = {"gated-gelu": "gelu_new", "gated-silu": "silu"}.get(name, name)
    if name not in _KEPT_BY:
        raise Unknown(f"what the activation {name} keeps is not known")
    biased = any(f"{norm.rpartition('.')[0]}.{end}" in block for norm in norms for end in ("bias", "beta"))
    return Stack(
        prefix=prefix,
        blocks=_first(config, _LAYERS, "layers") if family.shared_blocks else len(blocks),
        width=width,
        attention=heads * int(head),
        heads=heads,
        inner=inner,
        norms=3 if cross else 2,
        root_mean_square=not biased,
        gated=wide == 3,
        cross=cross,
        activation=_KEPT_BY[name],
        matrices=matrices,
    )


def _first(config: Mapping[str, Any], names: Sequence[str], what: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise Unknown(f"config.json does not say how many {what} there are")


def count(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def block_number(name: str, stack: Stack) -> int | None:
    """The number, from 0, of the block that a parameter is in."""
    match = re.match(rf"{re.escape(stack.prefix)}\.(\d+)\.", name)
    return int(match[1]) if match else None
