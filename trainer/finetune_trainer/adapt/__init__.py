"""How the weights are tuned: one file a method. Nothing outside this package branches on the method."""

from collections.abc import Mapping

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Method, Shortcut
from finetune_trainer.adapt.bottleneck import Bottleneck
from finetune_trainer.adapt.full import Full
from finetune_trainer.adapt.head import Head
from finetune_trainer.adapt.ia3 import Ia3
from finetune_trainer.adapt.lora import Lora
from finetune_trainer.adapt.prompt import Prompt
from finetune_trainer.adapt.qlora import Qlora
from finetune_trainer.adapt.shared import Shared

__all__ = ["Method", "Shortcut", "get"]


def get(config: MethodConfig, *, classes: Mapping[str, str] | None = None) -> Method:
    """The method of that configuration. `classes`: by name the transformers classes of several models that share a
    trunk; None, or one without a name, for a model by itself."""
    if classes is not None and "" not in classes:
        return Shared({name: _get(config) for name in classes}, classes=classes)
    return _get(config)


def _get(config: MethodConfig) -> Method:
    match config.type:
        case "full":
            return Full(config)
        case "head":
            return Head()
        case "lora" | "dora":
            return Lora(config)
        case "qlora":
            return Qlora(config)
        case "adapter":
            return Bottleneck(config)
        case "ia3":
            return Ia3(config)
        case "prompt" | "prefix":
            return Prompt(config)
