"""The base model's directory, as far as a CPU without torch can judge it: complete, and free of pickles."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from finetune_api.resolve import digest
from finetune_trainer.data.read import DataError
from finetune_trainer.run import Input
from finetune_trainer.storage import NotFound, ObjectInfo, Store

_MIB = 1024 * 1024
_LISTED = 100_000
_SMALL = 512 * _MIB
_HEADER_LIMIT = 100 * _MIB
_PREPROCESSOR = "preprocessor_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_TEXT_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json"
    r"|vocab\.txt|merges\.txt|.+\.model|chat_template\.jinja"
)
_PICKLES = re.compile(r".+\.(bin|pt|pth|ckpt|pkl)")
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
DROPOUTS = frozenset(
    {
        "activation_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_dropout",
        "attn_pdrop",
        "classif_dropout",
        "classifier_dropout",
        "classifier_dropout_prob",
        "dropout",
        "dropout_prob",
        "dropout_rate",
        "emb_pdrop",
        "embd_pdrop",
        "embed_dropout",
        "embedding_dropout",
        "ff_dropout",
        "ffn_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "mlp_dropout",
        "pooler_dropout",
        "qa_dropout",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        "seq_classif_dropout",
        "summary_first_dropout",
        "summary_last_dropout",
    }
)
"""What architectures call the dropout of activations in config.json; not the dropping of whole layers or paths."""


@dataclass(frozen=True)
class BaseModel:
    """The files that count, by name, and the contents of the small ones."""

    uri: str
    files: Mapping[str, ObjectInfo]
    config: Mapping[str, Any]
    tokenizer_json: str
    """Empty for a model that reads images."""
    tokenizer_config: Mapping[str, Any]
    images: Mapping[str, Any]
    """preprocessor_config.json; empty for a model that reads text."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all tensors of floating point in the weights, by name."""

    @property
    def labels(self) -> list[str] | None:
        """The labels of its head in order, None when it has none or only LABEL_0 and the like."""
        found = self.config.get("id2label")
        if not isinstance(found, dict) or not found:
            return None
        labels = [found.get(str(number)) for number in range(len(found))]
        if not all(isinstance(label, str) and not _DEFAULT_LABEL.fullmatch(label) for label in labels):
            return None
        names = [str(label) for label in labels]
        return names if len(set(names)) == len(names) else None


def read_base_model(store: Store, *, reads: Literal["text", "images"]) -> BaseModel:
    """List the directory, choose the files that count and read the small ones. `reads` is what goes into the model.

    Raises NotFound when there is nothing, DataError ModelIncomplete or PickleModel when it is no usable model.
    """
    found = {info.key: info for info in islice(store.list(), _LISTED) if "/" not in info.key}
    if not found:
        raise NotFound(
            "ObjectNotFound", f"There is no model at {store.uri}: correct the address or upload the model's directory."
        )
    if "config.json" not in found:
        adapter = " (adapter_config.json is there: publish an adapter with output.merge)"
        hint = adapter if "adapter_config.json" in found else ""
        raise _incomplete(store, f"config.json is missing{hint}")
    config = _json(store, found["config.json"])
    weights = _weights(store, found)
    if reads == "images" and _PREPROCESSOR not in found:
        raise _incomplete(
            store,
            f"{_PREPROCESSOR} is missing; make it with AutoImageProcessor.from_pretrained(DIR).save_pretrained(DIR)",
        )
    if reads == "text" and "tokenizer.json" not in found:
        raise _incomplete(
            store,
            "tokenizer.json is missing; make it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    chosen = {name: info for name, info in found.items() if name in weights or _TEXT_FILES.fullmatch(name)}
    if INDEX in found:
        chosen[INDEX] = found[INDEX]
    shapes = {name: shape for file in weights for name, shape in _check_weights(store, found[file]).items()}
    tokenizer_config = _json(store, found["tokenizer_config.json"]) if "tokenizer_config.json" in found else {}
    if _CHAT_TEMPLATE in found:  # it goes before what tokenizer_config.json has
        tokenizer_config["chat_template"] = _text(store, found[_CHAT_TEMPLATE])
    return BaseModel(
        uri=store.uri,
        files=dict(sorted(chosen.items())),
        config=config,
        tokenizer_json=_text(store, found["tokenizer.json"]) if reads == "text" else "",
        tokenizer_config=tokenizer_config,
        images=_json(store, found[_PREPROCESSOR]) if reads == "images" else {},
        shapes=shapes,
    )


def check_dropout(base: BaseModel, dropout: float | None) -> None:
    """Raises DataError where training.dropout would change nothing."""
    if dropout is not None and not DROPOUTS & base.config.keys():
        raise DataError(
            "NoDropout",
            f"training.dropout: the model at {base.uri} has no dropout (its config.json names none, such as "
            "hidden_dropout_prob); leave the field out, or write the name its architecture uses into config.json.",
        )


def model_digest(inputs: Sequence[Input]) -> str:
    """One SHA-256 over the names of the model's files and theirs, which hubs tell and preflight takes of others."""
    return digest({entry.role.removeprefix("model/"): entry.sha256 for entry in inputs})


def _weights(store: Store, found: Mapping[str, ObjectInfo]) -> list[str]:
    """Names of the safetensors files."""
    if INDEX in found:
        mapped = _json(store, found[INDEX]).get("weight_map")
        names = sorted({str(name) for name in mapped.values()}) if isinstance(mapped, dict) else []
        missing = [name for name in names if name not in found]
        if missing or not names:
            raise _incomplete(store, f"{missing[0] if missing else 'weight_map'}, which {INDEX} needs, is missing")
        return names
    if WEIGHTS in found:
        return [WEIGHTS]
    pickles = [name for name in sorted(found) if _PICKLES.fullmatch(name)]
    if pickles:
        raise DataError(
            "PickleModel",
            f"{store.uri}: the weights are pickles ({', '.join(pickles[:3])}), which run code when loaded and are "
            'never read; convert a model you trust with: python -c "from transformers import AutoModel; '
            "AutoModel.from_pretrained('DIR').save_pretrained('DIR')\" and upload model.safetensors.",
        )
    raise _incomplete(store, f"{WEIGHTS} is missing")


def _check_weights(store: Store, info: ObjectInfo) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's floating tensors, by its header. What that says of the file's size is compared with its
    size: an upload that was cut short is found here."""
    start = store.read(info.key, if_match=info.etag, limit=8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(_HEADER_LIMIT, info.size):
        raise _incomplete(store, f"{info.key} is not a safetensors file or cut short")
    try:
        header = json.loads(store.read(info.key, if_match=info.etag, limit=8 + length)[8:])
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items() if "F" in entry["dtype"]}
        wanted = 8 + length + max(entry["data_offsets"][1] for entry in tensors.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise _incomplete(store, f"{info.key} is not a safetensors file") from None
    if wanted != info.size:
        raise _incomplete(store, f"{info.key} has {info.size} bytes where its header says {wanted}")
    return shapes


def _json(store: Store, info: ObjectInfo) -> dict[str, Any]:
    try:
        value = json.loads(_text(store, info))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _incomplete(store, f"{info.key} is not a JSON object")
    return value


def _text(store: Store, info: ObjectInfo) -> str:
    if info.size > _SMALL:
        raise _incomplete(store, f"{info.key} has {info.size} bytes, which is no such file")
    try:
        return store.read(info.key, if_match=info.etag).decode()
    except UnicodeDecodeError:
        raise _incomplete(store, f"{info.key} is not UTF-8 text") from None


def _incomplete(store: Store, what: str) -> DataError:
    return DataError("ModelIncomplete", f"{store.uri}: {what}; upload the whole model directory.")
