"""Low-rank additions (Hu et al. 2021), rank-stabilised (Kalajdzievski 2023) or with magnitudes of their own as DoRA
(Liu et al. 2024), by PEFT."""

from typing import Any

from finetune_trainer.adapt.with_peft import PeftMethod, saved_whole, target_pattern, task_type, ties
from finetune_trainer.model import Loaded


class Lora(PeftMethod):
    def adapter(self, loaded: Loaded) -> Any:
        from peft import LoraConfig

        config, model = self._config, loaded.model
        assert config.rank is not None
        assert config.alpha is not None
        assert config.dropout is not None
        saved = saved_whole(model, loaded.fresh)
        return LoraConfig(
            task_type=task_type(model),
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=bool(config.rank_stabilized),
            use_dora=config.type == "dora",
            target_modules=target_pattern(model, wanted=config.targets, apart=saved),
            modules_to_save=saved,
            ensure_weight_tying=ties(model, saved),
        )
