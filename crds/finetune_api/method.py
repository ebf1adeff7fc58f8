"""spec.method: what of the model trains."""

from typing import ClassVar, Literal

from finetune_api.base import Model, Rule, only_with, spec_field
from finetune_api.scalars import Column
from finetune_api.tasks import MethodType


class Freeze(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.embeddings) || has(self.layers) || has(self.patterns)",
            "give at least one of embeddings, layers and patterns",
            lambda model: any(value is not None for value in (model.embeddings, model.layers, model.patterns)),
        ),
    )

    embeddings: bool | None = spec_field("train", "Whether the embeddings stay as they are. Default: false.")
    layers: int | None = spec_field(
        "train",
        "Blocks that stay as they are, counted from the input; where encoder and decoder differ in length, their last blocks "
        "have the same number. Default: 0.",
        ge=1,
        le=1000,
    )
    patterns: list[Column] | None = spec_field(
        "train",
        "Parameters or modules that stay as they are, by name; * stands for anything, as in bert.encoder.layer.*.attention.",
        min_length=1,
        max_length=64,
    )


class Unfreeze(Model):
    every_steps: int = spec_field(
        "train",
        "Training begins with what lies above the blocks; after so many steps the next block joins, down to the embeddings.",
        required=True,
        ge=1,
        le=10_000_000,
    )


class Method(Model):
    rules: ClassVar[tuple[Rule, ...]] = (
        only_with("type", values=("full",), fields=("freeze", "unfreeze")),
        only_with("type", values=("lora", "qlora", "dora"), fields=("rank", "alpha", "dropout", "rankStabilized")),
        only_with("type", values=("lora", "qlora", "dora", "ia3"), fields=("targets",)),
        only_with("type", values=("qlora",), fields=("quantization", "doubleQuant")),
        only_with("type", values=("adapter",), fields=("reduction", "variant")),
        only_with("type", values=("prompt", "prefix"), fields=("virtualTokens",)),
    )

    type: MethodType = spec_field(
        "train",
        "full trains all weights, head only the new output layer, lora low-rank additions, qlora those over a base of four bits, dora those with magnitudes of "
        "their own, adapter small layers between the base's, ia3 factors on keys, values and feed-forward layers, prompt tokens before each row, prefix keys and "
        "values before each layer's.",
        required=True,
    )
    freeze: Freeze | None = spec_field(None, "Weights that do not train. Default: none.")
    unfreeze: Unfreeze | None = spec_field(
        None, "Gradual unfreezing from the output towards the input. Default: all layers train from the first step."
    )
    rank: int | None = spec_field("train", "Rank of the LoRA matrices. Default: 16.", ge=1, le=1024)
    alpha: float | None = spec_field(
        "train", "Scale of the LoRA update, divided by the rank. Default: twice the rank.", gt=0
    )
    rank_stabilized: bool | None = spec_field(
        "train", "Divide alpha by the root of the rank instead (rsLoRA), for high ranks. Default: false."
    )
    dropout: float | None = spec_field("train", "Dropout in front of the LoRA matrices. Default: 0.05.", ge=0, lt=1)
    targets: list[Column] | None = spec_field(
        "train",
        "Name endings of the layers that are added to. Default: every linear layer of the trunk; for ia3 keys, values and "
        "the second layer of each feed-forward part.",
        min_length=1,
        max_length=64,
    )
    quantization: Literal["nf4", "fp4"] | None = spec_field(
        "train", "The four-bit numbers the base is kept in. Default: nf4."
    )
    double_quant: bool | None = spec_field(
        "train", "Whether the scales of blocks of four-bit numbers are quantised, too. Default: true."
    )
    reduction: int | None = spec_field(
        "train", "By how much narrower than the model the inside of an adapter is. Default: 16.", ge=1, le=1024
    )
    variant: Literal["houlsby", "pfeiffer"] | None = spec_field(
        "train",
        "Adapters after attention and feed-forward parts (houlsby), or after the latter alone. Default: pfeiffer.",
    )
    virtual_tokens: int | None = spec_field(
        "train", "Learned tokens; data.maxLength leaves room for them. Default: 20.", ge=1, le=4096
    )
