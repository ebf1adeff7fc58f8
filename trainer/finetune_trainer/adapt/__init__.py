"""How the weights are tuned: one file a method. Nothing outside this package branches on the method."""

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Method, Shortcut
from finetune_trainer.adapt.bottleneck import Bottleneck
from finetune_trainer.adapt.full import Full
from finetune_trainer.adapt.head import Head
from finetune_trainer.adapt.ia3 import Ia3
from finetune_trainer.adapt.lora import Lora
from finetune_trainer.adapt.prompt import Prompt
from finetune_trainer.adapt.qlora import Qlora

__all__ = ["Method", "Shortcut", "get"]


def get(config: MethodConfig) -> Method:
    """The method of that configuration."""
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
