"""LoRA over a base that is kept in four bits (Dettmers et al. 2023), by bitsandbytes and PEFT.

The trunk's linear layers are quantised as they are loaded, from the base's own fp32 or fp16 weights, on the CPU: what
trains does not depend on the device then. Merging is done into the unquantised base alone, loaded once more: the sum of
four-bit weights and additions would have to be rounded to four bits again, and lose what was learned.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Inputs, reader_of, reads
from finetune_trainer.adapt.lora import Lora
from finetune_trainer.adapt.with_peft import adaptable_layers, merged, saved_whole
from finetune_trainer.checkpoint import restore_weights, snapshot_weights
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded, ModelError


class Qlora(Lora):
    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._again: Callable[[], Loaded] | None = None
        self._seed = 0
        self._unquantised: list[str] = []

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        self._again, self._seed = loaded.again, seed
        self._unquantised = saved_whole(loaded.model, loaded.fresh)
        self._quantise(loaded.model)
        loaded.model.is_loaded_in_4bit = True  # where PEFT looks
        try:
            return super().prepare(loaded, seed=seed)
        finally:
            del loaded.model.is_loaded_in_4bit

    def _quantise(self, model: Any) -> None:
        """Put the trunk's linear layers into four bits. Raises ModelError."""
        exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # T5's code looks at their dtype
        layers = [
            (name, layer)
            for name, layer in adaptable_layers(model, apart=self._unquantised)
            if isinstance(layer, torch.nn.Linear) and not exact & set(name.split("."))
        ]
        if not layers:
            raise ModelError(
                f"method.type qlora keeps linear layers in four bits, and the trunk of {type(model).__name__} has none "
                "(convolutions and GPT-2's Conv1D cannot be quantised so); use lora."
            )
        for name, layer in layers:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, self._four_bits(layer))

    def _four_bits(self, layer: torch.nn.Linear) -> torch.nn.Module:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that it would download
        try:
            from bitsandbytes.nn.modules import Linear4bit, Params4bit
        except (ImportError, RuntimeError, OSError) as error:
            raise ModelError(
                f"method.type qlora needs bitsandbytes, which cannot be loaded here ({error}): install it, or use lora."
            ) from error
        kind, twice = self._config.quantization or "nf4", bool(self._config.double_quant)
        make: Any = Linear4bit
        small = make(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            quant_type=kind,
            compress_statistics=twice,
            device="meta",
        )
        small.weight = Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=twice, module=small
        )
        small.bias = layer.bias
        # Where a CPU has bf16 instructions, bitsandbytes packs the weights anew at the first evaluation and rounds
        # their scales to bf16: an evaluation would change what trains, and a resumed run would train something else.
        small.support_avx512bf16_for_cpu = False
        quantised: torch.nn.Module = small.to("cpu")
        return quantised

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        if not merge:
            super().save(model, directory, merge=False, example=example)
            return
        assert self._again is not None
        plain = super().prepare(self._again(), seed=self._seed)
        restore_weights(plain, snapshot_weights(model))
        on_cpu = {name: value.to("cpu") for name, value in example.items()}
        merged(plain, on_cpu).save_pretrained(directory)

    def load_hint(self, model: Any, *, merge: bool) -> str:
        if merge:
            return super().load_hint(model, merge=True)
        kind = type(plain_of(model)).__name__
        return f"""from peft import PeftModel
from transformers import AutoConfig, BitsAndBytesConfig, {reader_of(model)}, {kind}

config = AutoConfig.from_pretrained(directory)
four_bits = BitsAndBytesConfig(  # leave it out, and the adapter runs on the base as it is
    load_in_4bit=True,
    bnb_4bit_quant_type="{self._config.quantization}",
    bnb_4bit_use_double_quant={bool(self._config.double_quant)},
    llm_int8_skip_modules={[*self._unquantised, *self._kept(model)]},
)
base = {kind}.from_pretrained(
    base_directory, config=config, ignore_mismatched_sizes=True, quantization_config=four_bits
)
model = PeftModel.from_pretrained(base, directory)
{reads(model)}"""

    def _kept(self, model: Any) -> list[str]:
        """The output layer of a language model."""
        plain = plain_of(model)
        output = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
        return [name for name, module in plain.named_modules() if output is not None and module is output]
