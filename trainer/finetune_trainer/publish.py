"""The published directory: what from_pretrained or PEFT reads, a model card, and a digest that equal runs share."""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_api.contract import RunConfig
from finetune_api.status import EvaluationStatus
from finetune_trainer.adapt import Method
from finetune_trainer.adapt.base import Inputs, parameter_counts
from finetune_trainer.card import model_card
from finetune_trainer.layers import plain_of
from finetune_trainer.storage import Store
from finetune_trainer.storage.commit import Staging, object_entry

CARD = "README.md"
_READS_WITH = re.compile(
    r"(preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|.+\.model"
    r"|chat_template\.jinja"
)
_BLOCK = 4 * 1024 * 1024


def write_directory(
    directory: Path,
    *,
    model: Any,
    method: Method,
    base: Path,
    config: RunConfig,
    evaluation: EvaluationStatus,
    example: Inputs,
    files: Mapping[str, str],
    usage: str,
    license_name: str | None,
    beat: Callable[[], None] = lambda: None,
) -> str:
    """Write the whole directory, `files` in place of the base's; returns its digest. `beat` is called as often as it
    can be.

    Raises ModelError when a merge changes the model's answers.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model.eval()
    counts = parameter_counts(model)  # before a merge
    beat()
    method.save(model, directory, merge=config.output.merge, example=example)
    beat()
    plain = plain_of(model)
    if config.decoding is not None and not (directory / "generation_config.json").exists():
        plain.generation_config.save_pretrained(directory)  # methods that save additions alone leave it out
    for path in sorted(base.iterdir()):
        if _READS_WITH.fullmatch(path.name):
            for place in method.places(directory):
                shutil.copyfile(path, place / path.name)
    for name, text in files.items():
        for place in method.places(directory):
            (place / name).write_text(text, encoding="utf-8")
    found = directory_digest(directory, beat=beat)
    merge = config.output.merge
    card = model_card(
        config,
        library=method.library(merge=merge),
        load_hint=method.load_hint(model, merge=merge),
        usage=usage,
        evaluation=evaluation,
        digest=found,
        counts=counts,
        license_name=license_name,
    )
    (directory / CARD).write_text(card)
    return found


def directory_digest(directory: Path, *, beat: Callable[[], None] = lambda: None) -> str:
    """`sha256:` and the SHA-256 over names and digests of all files but the card, which tells of circumstances."""
    lines = [
        f"{path.relative_to(directory).as_posix()} {_sha256(path, beat)}\n"
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != CARD
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def upload_directory(
    directory: Path, store: Store | Staging, prefix: str, *, beat: Callable[[], None]
) -> list[dict[str, Any]]:
    """Upload every file, verified; returns the entries of a record's `objects`. `beat` is called all the while."""
    objects = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            beat()
            key = prefix + path.relative_to(directory).as_posix()
            objects.append(object_entry(store.upload(path, key, progress=lambda _done: beat())))
    return objects


def _sha256(path: Path, beat: Callable[[], None]) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            beat()
            sha256.update(block)
    return sha256.hexdigest()
