"""Low-rank additions to linear layers (Hu et al. 2021), by PEFT; the head trains too."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Inputs, Method, plain_hint, reader_of, reads
from finetune_trainer.data.order import derive
from finetune_trainer.layers import plain_of
from finetune_trainer.model import Loaded, ModelError, outside_trunk, trunk_of

MERGED_TOLERANCE = 1e-4


class Lora(Method):
    def __init__(self, config: MethodConfig) -> None:
        self._config = config

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        from peft import LoraConfig, TaskType, get_peft_model

        model = loaded.model
        saved = _saved_whole(model, loaded.fresh)
        adapter = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=self._config.rank or 16,
            lora_alpha=self._config.alpha,
            lora_dropout=self._config.dropout,
            target_modules=_targets(model, wanted=self._config.targets, apart=saved),
            modules_to_save=saved,
        )
        torch.manual_seed(derive(seed, "lora"))
        return get_peft_model(model, adapter)

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        if merge:
            _merged(model, example).save_pretrained(directory)
            return
        model.save_pretrained(directory)
        model.get_base_model().config.save_pretrained(directory)
        path = directory / "adapter_config.json"
        adapter = json.loads(path.read_text())
        adapter["base_model_name_or_path"] = None  # a path of this machine; the model card names the base
        path.write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n")

    def library(self, *, merge: bool) -> str:
        return "transformers" if merge else "peft"

    def load_hint(self, model: Any, *, merge: bool) -> str:
        if merge:
            return plain_hint(model)
        kind = type(plain_of(model)).__name__
        return f"""from peft import PeftModel
from transformers import AutoConfig, {reader_of(model)}, {kind}

config = AutoConfig.from_pretrained(directory)
base = {kind}.from_pretrained(base_directory, config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, directory)
{reads(model)}"""


def _saved_whole(model: Any, fresh: frozenset[str]) -> list[str]:
    """Modules that train and are saved whole: the head, and what the base lacks in its trunk (an untrained pooler)."""
    names = outside_trunk(model)
    found = {name.split(".")[0] for name in names}
    found |= {name.rpartition(".")[0] for name in fresh - names}
    return sorted(found)


def _targets(model: Any, *, wanted: list[str] | None, apart: list[str]) -> str:
    """A pattern of the trunk's linear layers whose names end in one of `wanted`, by default of all of them."""
    from transformers.pytorch_utils import Conv1D

    trunk = trunk_of(model)
    prefix = next(name for name, module in model.named_modules() if module is trunk)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and name.startswith(f"{prefix}.")
        and not any(name == other or name.startswith(f"{other}.") for other in apart)
    ]
    endings = sorted({name.rpartition(".")[2] for name in layers})
    chosen = [name for name in layers if any(f".{name}".endswith(f".{end}") for end in wanted or endings)]
    if not chosen:
        raise ModelError(
            f"method.targets: no linear layer of {type(model).__name__} ends in {', '.join(wanted or ['anything'])}; "
            f"its layers end in {', '.join(endings) or 'nothing'}."
        )
    ends = sorted({name.rpartition(".")[2] for name in chosen}) if wanted is None else sorted(set(wanted))
    excluded = "".join(rf"(?!{re.escape(other)}(?:\.|$))" for other in apart if other.startswith(f"{prefix}."))
    return rf"{excluded}{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, ends))})"


def _merged(model: Any, example: Inputs) -> Any:
    """The base with the additions folded in, proven to answer alike."""
    model.eval()
    with torch.no_grad():
        before = model(**example).logits
        plain = model.merge_and_unload()
        difference = float((plain(**example).logits - before).abs().max())
    if not difference <= MERGED_TOLERANCE:
        raise ModelError(
            f"output.merge: the merged model's logits differ by {difference:.2g} from the adapted model's, more than "
            f"{MERGED_TOLERANCE}: publish the adapter instead (merge: false)."
        )
    return plain
