"""How much memory training will take on a device, told from a model's shapes alone: no weights are read, no torch is
needed.

The peak of a training step is weights, gradients and the optimizer's state, which stay, and at the end of the forward
pass of its last micro-batch what the backward pass needs of it. What that is, tensor by tensor, follows from how the
operations of a transformer's block are differentiated (Korthikanti et al. 2022 count the same for GPT). Everything here
is in bytes, or in bytes a token where it says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, NamedTuple

from finetune_api.contract import MethodConfig, TrainingConfig
from finetune_trainer.anatomy import (
    ATTENTION_DROPOUT,
    HIDDEN_DROPOUT,
    Anatomy,
    Shape,
    Shapes,
    Stack,
    anatomy,
    block_number,
    count,
)
from finetune_trainer.base_model import DROPOUTS

OVERHEAD = {"cpu": 600 << 20, "gpu": 900 << 20}
"""What a process takes beside its tensors: on CPUs Python and its libraries, on GPUs context, kernels, cuBLAS
workspaces and what the allocator leaves unused."""
LOGITS_AT_ONCE = 1 << 24
"""As nexttoken.CELLS, which needs torch."""
FEATURE_ROWS = 64
"""As adapt.head.CHUNK."""
_FLOAT = 4
_QUANTISED = 4096
"""Values below which adamw-8bit keeps a tensor's state in 32 bits."""
_BLOCK = 64
"""Weights that share a scale in four bits."""
Device = Literal["cpu", "gpu"]


class Batch(NamedTuple):
    """The largest micro-batch. Sequences may be more than rows, or packs of rows."""

    sequences: int
    tokens: int
    """Of each sequence, with padding; patches of an image."""
    targets: int = 0
    """Tokens of each sequence that a decoder reads, 0 without one."""
    labelled: int = 0
    """Positions of all sequences for which the whole vocabulary is asked; 0 where a head is small."""
    chunked: bool = True
    """Those logits are computed some at a time, and again in the backward pass."""
    masked: bool = True
    """Which tokens see which is not left to the kernel."""


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """The running mean (ema), the base's weights (l2sp), and the buckets in which several ranks add their gradients."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    passing: int
    """The most that lives for a moment beside it: logits and their gradient, or the inside of a block."""
    overhead: int
    parameters: int
    trained: int
    """Parameters that train."""

    @property
    def total(self) -> int:
        parts = asdict(self)
        return sum(parts[name] for name in parts if name not in ("parameters", "trained"))


@dataclass(frozen=True)
class _Setting:
    """What the formulas below share."""

    model: Anatomy
    method: MethodConfig
    training: TrainingConfig
    device: Device
    half: bool
    """bf16: matrices multiply in two bytes, norms and softmax stay in four."""

    @property
    def narrow(self) -> int:
        return 2 if self.half else _FLOAT

    @property
    def mask(self) -> int:
        """Bytes of a dropout's mask, a value: a boolean on GPUs."""
        return 1 if self.device == "gpu" else self.narrow

    def dropout(self, *names: str) -> float:
        """The rate that config.json has under the first of these names, or that training.dropout puts there."""
        for name in names:
            if name in self.model.config:
                asked = self.training.dropout
                found = asked if asked is not None and name in DROPOUTS else self.model.config[name]
                return float(found or 0.0)
        return 0.0

    @property
    def frozen(self) -> bool:
        """The base's own linear layers stay as they are."""
        return self.method.type != "full"


def predict(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    method: MethodConfig,
    training: TrainingConfig,
    batch: Batch,
    labels: int,
    device: Device,
    ranks: int = 1,
) -> Prediction:
    """For a base with that config.json and tensors of those shapes, with a head for so many `labels` or, with 0, the
    output layer of a language model. Raises anatomy.Unknown with what cannot be told."""
    half = training.precision == "bf16" or (training.precision == "auto" and device == "gpu")
    model = anatomy(config, shapes, writes=labels == 0)
    setting = _Setting(model, method, training, device, half)
    head = _head(model, labels)
    trained = {**_trained(setting), **head}
    added = {name: shape for name, shape in trained.items() if name not in model.shapes}
    size = _FLOAT * count(trained)
    copies = sum((training.ema_decay is not None, training.l2sp_alpha is not None, ranks > 1))
    return Prediction(
        weights=_weights(setting, added),
        gradients=size,
        optimizer=_optimizer(training, trained),
        copies=copies * size,
        activations=_activations(setting, batch),
        passing=max(_passing(setting, batch), _logits(setting, batch, trained)),
        overhead=OVERHEAD[device],
        parameters=count(model.shapes) + count(added),
        trained=count(trained),
    )


# --- what stays ---


def _head(model: Anatomy, labels: int) -> Shapes:
    """A new head for labels."""
    if not labels:
        return {}
    found: dict[str, Shape] = {"head.weight": (labels, model.width), "head.bias": (labels,)}
    if model.family.dense_head:
        found |= {"head.dense.weight": (model.width, model.width), "head.dense.bias": (model.width,)}
    return found


def _trained(setting: _Setting) -> Shapes:
    """What trains beside a new head."""
    model, method = setting.model, setting.method
    match method.type:
        case "full":
            return {name: shape for name, shape in model.shapes.items() if not _is_frozen(setting, name)}
        case "lora" | "dora" | "qlora":
            return dict(_low_rank(setting))
        case "adapter":
            return dict(_bottlenecks(setting))
        case "ia3":
            return dict(_factors(model))
        case "prompt":
            return {"prompt": (method.virtual_tokens or 0, model.width)}
        case "prefix":
            layers = sum(stack.blocks for stack in model.stacks)
            return {"prefix": (method.virtual_tokens or 0, 2 * layers * model.width)}
        case "head":
            return {}


def _is_frozen(setting: _Setting, name: str) -> bool:
    method = setting.method
    numbers = [block_number(name, stack) for stack in setting.model.stacks]
    number = next((number for number in numbers if number is not None), None)
    if any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in method.freeze_patterns or ()):
        return True
    if number is None:
        return bool(method.freeze_embeddings) and len(setting.model.shapes[name]) > 1 and "embed" in name.lower()
    return number < (method.freeze_layers or 0)


def _targets(setting: _Setting) -> Shapes:
    """The linear layers that get additions."""
    wanted = setting.method.targets
    found = setting.model.linear
    if wanted is None:
        return found
    return {
        name: shape
        for name, shape in found.items()
        if any(f".{name.removesuffix('.weight')}".endswith(f".{end}") for end in wanted)
    }


def _low_rank(setting: _Setting) -> Iterator[tuple[str, Shape]]:
    rank = setting.method.rank or 0
    for name, (one, other) in _targets(setting).items():
        yield f"{name}.down", (rank, other)
        yield f"{name}.up", (one, rank)
        if setting.method.type == "dora":
            yield f"{name}.magnitude", (one,)


def _bottlenecks(setting: _Setting) -> Iterator[tuple[str, Shape]]:
    places = 2 if setting.method.variant == "houlsby" else 1
    for stack in setting.model.stacks:
        inner = _bottleneck(setting, stack)
        for number in range(stack.blocks * places * (stack.norms - 1 if places == 2 else 1)):
            yield f"{stack.prefix}.{number}.down", (inner, stack.width)
            yield f"{stack.prefix}.{number}.up", (stack.width, inner)
            yield f"{stack.prefix}.{number}.biases", (inner + stack.width,)


def _bottleneck(setting: _Setting, stack: Stack) -> int:
    return max(1, stack.width // (setting.method.reduction or 1))


def _factors(model: Anatomy) -> Iterator[tuple[str, Shape]]:
    for stack in model.stacks:
        for number in range(stack.blocks):
            yield f"{stack.prefix}.{number}.factors", ((stack.norms - 1) * 2 * stack.attention + stack.inner,)


def _weights(setting: _Setting, added: Shapes) -> int:
    """All weights are loaded in fp32, whatever the precision; qlora keeps the trunk's linear layers in four bits, with
    a scale for each 64 of them, itself in eight bits with `doubleQuant`."""
    model = setting.model
    values = count(model.shapes) + count(added)
    if setting.method.type != "qlora":
        return _FLOAT * values
    packed = count({name: shape for name, shape in model.linear.items() if _in_a_block(model, name)})
    scale = 1 + 4 / 256 if setting.method.double_quant else 4
    return _FLOAT * (values - packed) + int(packed * (0.5 + scale / _BLOCK))


def _in_a_block(model: Anatomy, name: str) -> bool:
    return any(block_number(name, stack) is not None for stack in model.stacks)


def _optimizer(training: TrainingConfig, trained: Shapes) -> int:
    match training.optimizer:
        case "adamw":
            return 2 * _FLOAT * count(trained)
        case "sgd":
            return _FLOAT * count(trained) if training.momentum else 0
        case "adamw-8bit":
            sizes = [prod(shape) for shape in trained.values()]
            return sum(2 * size + 2 * _FLOAT * (size // 256) if size >= _QUANTISED else 8 * size for size in sizes)
        case "adafactor":
            return _FLOAT * sum(sum(shape) if len(shape) == 2 else prod(shape) for shape in trained.values())


# --- what the backward pass needs ---


def _activations(setting: _Setting, batch: Batch) -> int:
    """Of the blocks, and what lies before and after them."""
    if setting.method.type == "head":  # the trunk's output is computed beforehand and kept on disk
        return 0
    batch = _lengthened(setting, batch)
    total = 0.0
    for stack in setting.model.stacks:
        kept = stack.width * _FLOAT if setting.training.gradient_checkpointing else _block(setting, stack, batch)
        total += _tokens(stack, batch) * (stack.blocks - _below(setting, stack)) * kept
    total += batch.sequences * (batch.tokens + batch.targets) * _around(setting)
    return int(total + _casts(setting))


def _lengthened(setting: _Setting, batch: Batch) -> Batch:
    """With learned tokens before each sequence."""
    learned = (setting.method.virtual_tokens or 0) if setting.method.type == "prompt" else 0
    return batch._replace(tokens=batch.tokens + learned)


def _tokens(stack: Stack, batch: Batch) -> int:
    """What a stack reads of all sequences."""
    return batch.sequences * (batch.targets if stack.cross else batch.tokens)


def _below(setting: _Setting, stack: Stack) -> int:
    """Blocks below all that trains: nothing of them is kept."""
    method = setting.method
    if method.type == "adapter" and method.variant == "pfeiffer":
        return 1  # an adapter is the last thing in its block
    if method.type == "full" and method.freeze_embeddings:
        return min(stack.blocks, method.freeze_layers or 0)
    return 0


def _block(setting: _Setting, stack: Stack, batch: Batch) -> float:
    """Bytes a token that one block keeps for the backward pass."""
    sublayers = stack.norms
    hidden = setting.dropout(*HIDDEN_DROPOUT) > 0
    kept = sublayers * stack.width * float(_FLOAT)  # the inputs of norms
    if stack.root_mean_square and not setting.frozen:
        kept += sublayers * stack.width * _FLOAT  # what the norm's weights multiply
    if hidden:
        kept += setting.model.family.dropouts * sublayers * stack.width * setting.mask
    kept += _attention(setting, stack, batch)
    kept += _feed_forward(setting, stack)
    kept += _inputs(setting, stack)
    return kept


def _attention(setting: _Setting, stack: Stack, batch: Batch) -> float:
    """Queries, keys, values and the answer; the weights of all pairs where no fused kernel can be used."""
    own = batch.targets if stack.cross else batch.tokens
    family = setting.model.family
    kept = (4 + family.copies) * stack.attention * setting.narrow
    seen = [own]
    if stack.cross:
        ratio = batch.tokens / max(1, batch.targets)
        kept += (2 + 2 * ratio) * stack.attention * setting.narrow
        seen.append(batch.tokens)
    dropped = setting.dropout(*ATTENTION_DROPOUT) > 0
    for others in seen:
        if family.materialised or (dropped and setting.device == "cpu"):
            kept += stack.heads * others * (_FLOAT + (setting.mask + setting.narrow if dropped else 0))
        elif batch.masked:
            kept += others * setting.narrow
    return kept


def _feed_forward(setting: _Setting, stack: Stack) -> float:
    """What lies between its layers; the input of the last one is `_inputs`'."""
    narrow, family = setting.narrow, setting.model.family
    tensors = float(stack.activation)
    if stack.gated:
        tensors += 2  # both factors
    kept = tensors * stack.inner * narrow
    dropped = bool(family.inner_dropout) and setting.dropout(family.inner_dropout) > 0
    if dropped:
        kept += stack.inner * setting.mask
    if stack.activation == 0 and (dropped or setting.frozen):
        kept += stack.inner * narrow  # relu's output, which is no layer's input then
    return kept


def _inputs(setting: _Setting, stack: Stack) -> float:
    """The inputs of layers whose weights train, and what additions to layers keep."""
    narrow, method = setting.narrow, setting.method
    attentions = stack.norms - 1
    match method.type:
        case "full":
            return (stack.norms * stack.width + stack.inner) * narrow
        case "lora" | "dora" | "qlora":
            return _beside(setting, stack)
        case "adapter":
            places = stack.norms if method.variant == "houlsby" else 1
            return places * (stack.width + 2 * _bottleneck(setting, stack)) * narrow
        case "ia3":
            return (2 * attentions * stack.attention + stack.inner) * narrow
        case _:
            return 0.0


def _beside(setting: _Setting, stack: Stack) -> float:
    """What low-rank additions keep of their inputs: each a dropped copy of its own, or without dropout one together."""
    narrow, method = setting.narrow, setting.method
    targets = _targets(setting)
    shapes = [
        shape
        for name, shape in stack.matrices.items()
        if any(target.startswith(f"{stack.prefix}.") and target.endswith(f".{name}.weight") for target in targets)
    ]
    if not shapes:
        return 0.0
    # An [out, in] of GPT-2 is [in, out]: over a block's layers the sums of both are close.
    inputs = [shape[1] for shape in shapes]
    kept = sum((method.rank or 0) * narrow for _ in shapes)
    if method.dropout:
        kept += sum(width * (narrow + setting.mask) for width in inputs)
    else:
        kept += (stack.norms * stack.width + stack.inner) * narrow
    if method.type == "dora":
        kept += sum(2 * shape[0] * narrow for shape in shapes)
    return kept


def _around(setting: _Setting) -> float:
    """Bytes a token before the first block and after the last one: a norm and a dropout each."""
    if setting.method.type != "full":
        return 2.0 * setting.model.width * _FLOAT
    return 3.0 * setting.model.width * _FLOAT


def _casts(setting: _Setting) -> int:
    """In bf16 the copies of the linear layers that the backward pass multiplies with."""
    if not setting.half or setting.method.type == "qlora":
        return 0
    return 2 * count(setting.model.linear)


def _passing(setting: _Setting, batch: Batch) -> int:
    """The largest tensors of a block, which live for a moment; all of a block that is computed again."""
    if setting.method.type == "head":
        batch = batch._replace(sequences=max(batch.sequences, FEATURE_ROWS))
    batch = _lengthened(setting, batch)
    found = 0.0
    for stack in setting.model.stacks:
        widest = max(2 * stack.inner * setting.narrow, 4 * stack.width * _FLOAT)
        if setting.method.type == "head":
            widest = (2 + stack.gated) * stack.inner * setting.narrow + 4 * stack.width * _FLOAT
        if setting.model.family.materialised:
            widest = max(widest, 2 * stack.heads * batch.tokens * _FLOAT)
        if setting.training.gradient_checkpointing and setting.method.type != "head":
            widest += int(_block(setting, stack, batch))
        found = max(found, _tokens(stack, batch) * widest)
    if setting.method.type == "qlora":
        found += max((prod(shape) for shape in setting.model.linear.values()), default=0) * setting.narrow
    return int(found)


def _logits(setting: _Setting, batch: Batch, trained: Shapes) -> int:
    """Logits, their softmax and its gradient; and the gradient of an output layer that trains, before it is added."""
    if not batch.labelled:
        return 0
    values = batch.labelled * setting.model.vocabulary
    if batch.chunked:
        values = min(values, LOGITS_AT_ONCE)
    table = (setting.model.vocabulary, setting.model.width)
    grows = table in trained.values()
    return 3 * _FLOAT * values + (_FLOAT * prod(table) if grows else 0)
