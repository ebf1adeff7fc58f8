"""What the methods of the PEFT library share: where additions go, what trains whole, how it is saved and merged.

Everything is found by structure, so that any model the Auto classes load can be adapted: additions go into the trunk,
heads that belong to the task train and are saved whole, and the output layer of a language model stays the base's.
"""

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import MethodConfig
from finetune_trainer.adapt.base import Inputs, Method, plain_hint, reader_of, reads
from finetune_trainer.data.order import derive
from finetune_trainer.layers import plain_of, trunk_or_model
from finetune_trainer.model import Loaded, ModelError

TOLERANCE = 1e-4
"""By how much a merged model's outputs may differ from the adapted one's, relative to the largest of them above 1."""
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class PeftMethod(Method):
    """A method whose additions PEFT makes."""

    def __init__(self, config: MethodConfig) -> None:
        self._config = config

    def adapter(self, loaded: Loaded) -> Any:
        """PEFT's configuration for this model. Raises ModelError."""
        raise NotImplementedError  # each method has its own

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        from peft import get_peft_model

        adapter = self.adapter(loaded)
        torch.manual_seed(derive(seed, self._config.type))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it sets right by itself
            return get_peft_model(loaded.model, adapter)

    def save(self, model: Any, directory: Path, *, merge: bool, example: Inputs) -> None:
        if merge:
            merged(model, example).save_pretrained(directory)
            return
        model.save_pretrained(directory, save_embedding_layers=False)
        plain_of(model).config.save_pretrained(directory)
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


def task_type(model: Any) -> str | None:
    """PEFT's name of what the model is for; None for what PEFT has no name for, such as images."""
    found = next((kind for end, kind in _TASKS.items() if type(model).__name__.endswith(end)), None)
    if found is None and hasattr(model, "can_generate") and model.can_generate():
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return found


def saved_whole(model: Any, fresh: frozenset[str]) -> list[str]:
    """Modules that train and are saved whole: heads, and what the base lacks in its trunk (an untrained pooler).

    The output layer of a language model is no such head, unless the base lacks it.
    """
    inside = {id(parameter) for parameter in trunk_or_model(model).parameters()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            if name in fresh:
                found.add(name.rpartition(".")[0])
            continue
        head = _head(model, name)
        if name in fresh or output is None or output not in set(model.get_submodule(head).modules()):
            found.add(head)
    if "" in found:
        loose = [name for name in fresh if "." not in name]
        raise ModelError(f"The base model lacks {', '.join(loose)}, which additions cannot give it: use full.")
    return sorted(found)


def ties(model: Any, saved: list[str]) -> bool:
    """Whether an embedding that is saved whole is the output layer, too."""
    tied = getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "get_input_embeddings")
    return bool(tied) and any(model.get_submodule(name) is model.get_input_embeddings() for name in saved)


def _head(model: Any, name: str) -> str:
    """The outermost module above a parameter that is no mere collection of modules."""
    parts = name.split(".")[:-1]
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if not isinstance(model.get_submodule(path), torch.nn.ModuleDict | torch.nn.ModuleList):
            return path
    return ".".join(parts)


def target_pattern(model: Any, *, wanted: list[str] | None, apart: list[str]) -> str:
    """A pattern of the trunk's layers whose names end in one of `wanted`, by default of all linear ones.

    A trunk without linear layers (a CNN) offers its convolutions instead. Raises ModelError.
    """
    layers = dict(adaptable_layers(model, apart=apart))
    chosen = [name for name, module in layers.items() if not isinstance(module, torch.nn.Conv2d)] or list(layers)
    if wanted is not None:
        chosen = [name for name in layers if any(f".{name}".endswith(f".{end}") for end in wanted)]
    if not chosen:
        endings = sorted({name.rpartition(".")[2] for name in layers})
        raise ModelError(
            f"method.targets: no linear layer of {type(model).__name__} ends in {', '.join(wanted or ['anything'])}; "
            f"its layers end in {', '.join(endings) or 'nothing'}."
        )
    return pattern_of(model, chosen)


def adaptable_layers(model: Any, *, apart: list[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Layers of the trunk that can be adapted and merged; not what trains whole, nor the output layer."""
    from transformers.pytorch_utils import Conv1D

    trunk = trunk_or_model(model)
    inside = set(trunk.modules())
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if (
            module in inside
            and module is not output
            and isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Conv2d)
            and getattr(module, "groups", 1) == 1
            and not any(name == other or name.startswith(f"{other}.") for other in apart)
        ):
            yield name, module


def pattern_of(model: Any, names: list[str]) -> str:
    """A regular expression that matches these modules of the model and no others, as short as that allows."""
    trunk = trunk_or_model(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is trunk)
    ends = sorted({re.escape(name.rpartition(".")[2]) for name in names})
    by_end = rf"{re.escape(prefix)}(?:.*\.)?(?:{'|'.join(ends)})"
    by_place = "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names}))
    for pattern in (by_end, by_place):
        if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == set(names):
            return pattern
    return "|".join(map(re.escape, sorted(names)))


def merged(model: Any, example: Inputs) -> Any:
    """The base with the additions folded in, proven to answer `example` alike. Raises ModelError."""
    model.eval()
    before = answers(model, example)
    plain = model.merge_and_unload()
    compare(before, answers(plain, example))
    return plain


def compare(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """Raises ModelError where a merged model's outputs are not the adapted one's."""
    alike = len(before) == len(after) and all(a.shape == b.shape for a, b in zip(before, after, strict=True))
    if not alike or not before:
        raise ModelError("output.merge: the merged model's outputs have another form: publish the adapter instead.")
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(after, before, strict=True))
    if not worst <= TOLERANCE:
        raise ModelError(
            f"output.merge: the merged model's outputs differ by {worst:.2g} from the adapted model's, more than "
            f"{TOLERANCE}: publish the adapter instead (merge: false)."
        )


@torch.no_grad()
def answers(model: Any, example: Inputs) -> list[torch.Tensor]:
    """Every floating tensor of the model's output, in fp32; a decoder without inputs is given the encoder's first."""
    plain = plain_of(model)
    known = inspect.signature(plain.forward).parameters
    given: dict[str, Any] = {name: value for name, value in example.items() if name in known}
    if "use_cache" in known:
        given["use_cache"] = False
    if task_type(plain) == "SEQ_2_SEQ_LM" and not {"labels", "decoder_input_ids"} & given.keys():
        given["decoder_input_ids"] = given["input_ids"][:, :4]
    return [tensor.float() for tensor in _tensors(model(**given)) if tensor.is_floating_point()]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
