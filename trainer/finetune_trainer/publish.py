"""The published directory: what from_pretrained or PEFT reads, a model card, and a digest that equal runs share."""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune_api.contract import RunConfig
from finetune_api.job import EvaluationStatus
from finetune_trainer.adapt import Method
from finetune_trainer.adapt.base import Inputs, parameter_counts
from finetune_trainer.layers import plain_of
from finetune_trainer.storage import Store
from finetune_trainer.storage.commit import object_entry

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
) -> str:
    """Write the whole directory; returns its digest. Raises ModelError when a merge changes the model's answers."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model.eval()
    counts = parameter_counts(model)  # before a merge
    method.save(model, directory, merge=config.output.merge, example=example)
    plain = plain_of(model)
    if config.decoding is not None and not (directory / "generation_config.json").exists():
        plain.generation_config.save_pretrained(directory)  # methods that save additions alone leave it out
    for path in sorted(base.iterdir()):
        if _READS_WITH.fullmatch(path.name):
            for place in method.places(directory):
                shutil.copyfile(path, place / path.name)
    found = directory_digest(directory)
    card = model_card(config, model=model, method=method, evaluation=evaluation, digest=found, counts=counts)
    (directory / CARD).write_text(card)
    return found


def directory_digest(directory: Path) -> str:
    """`sha256:` and the SHA-256 over names and digests of all files but the card, which tells of circumstances."""
    lines = [
        f"{path.relative_to(directory).as_posix()} {_sha256(path)}\n"
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != CARD
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def upload_directory(directory: Path, store: Store, prefix: str, *, beat: Callable[[], None]) -> list[dict[str, Any]]:
    """Upload every file, verified; returns the entries of a record's `objects`."""
    objects = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            beat()
            objects.append(object_entry(store.upload(path, prefix + path.relative_to(directory).as_posix())))
    return objects


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def model_card(
    config: RunConfig,
    *,
    model: Any,
    method: Method,
    evaluation: EvaluationStatus,
    digest: str,
    counts: tuple[int, int],
) -> str:
    """README.md with the Hub's metadata. `counts` are the numbers of parameters that trained, and of all."""
    metadata = {
        "base_model": config.model,
        "library_name": method.library(merge=config.output.merge),
        "pipeline_tag": config.task.type,
        "metrics": sorted(evaluation.tuned or {}),
        "tags": ["finetune-operator", config.method.type],
    }
    training = config.training
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=True).strip()}
---

# {config.job}

Fine-tuned from `{config.model}` for {config.task.type} with method {config.method.type}: {length} of batches of
{training.batch_size} rows, {training.optimizer}, learning rate {training.learning_rate:g}, schedule
{training.schedule}, seed {training.seed}. {counts[0]:,} of {counts[1]:,} parameters trained
({counts[0] / counts[1]:.2%}).

## Evaluation

On {evaluation.rows} {evaluation.on} rows, beside an answer that needs no model (trivial), and, where there are such,
the untouched base model (base) and a linear model on its frozen features (probe):

{_table(evaluation)}

## Use

```python
{method.load_hint(model, merge=config.output.merge)}
```

Digest of this directory without this file: `{digest}`.
"""


def _table(evaluation: EvaluationStatus) -> str:
    columns: dict[str, Mapping[str, float] | None] = {
        "trivial": evaluation.trivial,
        "base": evaluation.base,
        "probe": evaluation.probe,
        "tuned": evaluation.tuned,
    }
    names: list[str] = list(evaluation.tuned or {})
    columns = {name: found for name, found in columns.items() if found}
    rows = [f"| metric | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        cells = [f"{found[name]:.4f}" if found and name in found else "-" for found in columns.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)
