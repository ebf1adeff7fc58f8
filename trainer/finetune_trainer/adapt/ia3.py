"""Learned factors on keys, values and the inside of feed-forward layers (Liu et al. 2022), by PEFT."""

import re
from typing import Any

from finetune_trainer.adapt.with_peft import PeftMethod, pattern_of, saved_whole, target_pattern, task_type
from finetune_trainer.layers import output_projections
from finetune_trainer.model import Loaded, ModelError

_KEYS_AND_VALUES = re.compile(r"(k|v|key|value)(_proj|_lin)?|c_attn|qkv|qkv_proj|query_key_value|Wqkv")
"""How architectures name these projections; where query, key and value are one layer, all are scaled, as in PEFT."""


class Ia3(PeftMethod):
    def adapter(self, loaded: Loaded) -> Any:
        from peft import IA3Config

        model, wanted = loaded.model, self._config.targets
        saved = saved_whole(model, loaded.fresh)
        outputs = output_projections(model)
        down = outputs.feed_forward
        if wanted is None:
            within = [f"{name}." for name in outputs.attention]
            scaled = [
                name
                for name, _ in model.named_modules()
                if name.startswith(tuple(within)) and _KEYS_AND_VALUES.fullmatch(name.rpartition(".")[2])
            ]
            if not scaled:
                raise ModelError(
                    f"method.type ia3 scales keys and values, and {type(model).__name__} has no attention layers with "
                    "such; name layers in method.targets, or use lora."
                )
            pattern = pattern_of(model, scaled + down)
        else:
            pattern = target_pattern(model, wanted=wanted, apart=saved)
        inner = [name for name in down if re.fullmatch(pattern, name)]
        return IA3Config(
            task_type=task_type(model),
            target_modules=pattern,
            feedforward_modules=pattern_of(model, inner) if inner else [],
            modules_to_save=saved,
        )
