"""Bottleneck adapters: two small layers after the attention and the feed-forward part of each block (Houlsby et al.
2019), or after the feed-forward part alone (Pfeiffer et al. 2021).

An adapter is a child of the layer it follows and adds to that layer's output by a hook, before the residual
connection: x + up(gelu(down(x))). `up` begins with zeros, so that a fresh adapter changes nothing. Nothing else of the
model is touched, which is why ten lines of plain torch load what is published.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Inputs, Method, reader_of, reads
from finetune_trainer.adapt.with_peft import saved_whole
from finetune_trainer.checkpoint import snapshot_weights
from finetune_trainer.data.order import derive
from finetune_trainer.layers import output_projections, width_of
from finetune_trainer.model import Loaded, ModelError

WEIGHTS, DESCRIPTION = "adapters.safetensors", "adapters.json"


class Bottleneck(Method):
    def __init__(self, config: MethodConfig) -> None:
        assert config.reduction is not None
        self._reduction: int = config.reduction
        self._variant = config.variant
        self._widths: dict[str, tuple[int, int]] = {}

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        model = loaded.model
        outputs = output_projections(model)
        if not outputs.attention_out or not outputs.feed_forward:
            raise ModelError(
                f"method.type adapter goes after attention and feed-forward parts, and {type(model).__name__} has none "
                "that can be told by its structure; use lora."
            )
        places = outputs.feed_forward + (outputs.attention_out if self._variant == "houlsby" else [])
        trained = tuple(f"{name}." for name in saved_whole(model, loaded.fresh))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        self._widths = {}
        for name in sorted(places):
            layer = model.get_submodule(name)
            width = width_of(layer)
            inner = max(1, width // self._reduction)
            self._widths[name] = (width, inner)
            layer.adapter = _adapter(width, inner, seed=derive(seed, "adapter", name))
            layer.register_forward_hook(_added)
        return model

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        if merge:
            raise ModelError(
                "output.merge: bottleneck adapters compute something of their own after a layer and cannot be folded "
                "into its weights; publish the adapters (merge: false)."
            )
        save_file(snapshot_weights(model), directory / WEIGHTS)
        description = {
            "type": "bottleneck",
            "variant": self._variant,
            "activation": "gelu",
            "model": type(model).__name__,
            "adapters": self._widths,
        }
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
        model.config.save_pretrained(directory)

    def library(self, *, merge: bool) -> str:
        return "transformers"

    def load_hint(self, model: Any, *, merge: bool) -> str:
        kind = type(model).__name__
        return f"""import json, torch
from safetensors.torch import load_file
from transformers import AutoConfig, {reader_of(model)}, {kind}

config = AutoConfig.from_pretrained(directory)
model = {kind}.from_pretrained(base_directory, config=config, ignore_mismatched_sizes=True)
for name, (width, inner) in json.load(open(f"{{directory}}/{DESCRIPTION}"))["adapters"].items():
    layer, linear = model.get_submodule(name), torch.nn.Linear
    layer.adapter = torch.nn.Sequential(linear(width, inner), torch.nn.GELU(), linear(inner, width))
    layer.register_forward_hook(lambda layer, inputs, output: output + layer.adapter(output))
model.load_state_dict(load_file(f"{{directory}}/{WEIGHTS}"), strict=False)
{reads(model)}"""


def _adapter(width: int, inner: int, *, seed: int) -> torch.nn.Module:
    down, up = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
    with torch.no_grad():
        down.weight.normal_(0.0, width**-0.5, generator=torch.Generator().manual_seed(seed))
        for parameter in (down.bias, up.weight, up.bias):
            parameter.zero_()
    return torch.nn.Sequential(down, torch.nn.GELU(), up)


def _added(layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    adapter: Callable[[torch.Tensor], torch.Tensor] = layer.adapter
    return output + adapter(output)
