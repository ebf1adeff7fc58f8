"""README.md of a published model: the Hub's metadata, what was measured, and how to load it."""

from collections.abc import Mapping
from typing import Any

import yaml

from finetune_api.contract import RunConfig
from finetune_api.status import EvaluationStatus
from finetune_trainer.hub import LICENSES, METRICS, hub_id, pipeline_tag


def model_card(
    config: RunConfig,
    *,
    library: str,
    load_hint: str,
    usage: str,
    evaluation: EvaluationStatus,
    digest: str,
    counts: tuple[int, int],
    license_name: str | None,
) -> str:
    """The file. `usage` is what Learner.usage says, `counts` are the numbers of parameters that trained, and of all;
    `license_name` is that of the base model, as far as it is known."""
    training = config.training
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    front = yaml.safe_dump(
        metadata(config, library=library, evaluation=evaluation, license_name=license_name),
        sort_keys=False,
        allow_unicode=True,
    )
    known = (
        f"The base model's license is {license_name}."
        if license_name
        else "The license of the base model is not known."
    )
    told = f"{usage}\n" if usage else ""
    return f"""---
{front.strip()}
---

# {config.job}

Fine-tuned from `{config.model}` for {config.task.type} with method {config.method.type}: {length} of batches of
{training.batch_size} rows, {training.optimizer}, learning rate {training.learning_rate:g}, schedule
{training.schedule}, seed {training.seed}. {counts[0]:,} of {counts[1]:,} parameters trained
({counts[0] / counts[1]:.2%}). {known}

## Evaluation

On {evaluation.rows} {evaluation.on} rows, beside an answer that needs no model (trivial), and, where there are such,
the untouched base model (base) and a linear model on its frozen features (probe):

{_table(evaluation)}
{_notes(evaluation)}{_retention(evaluation)}
## Use

```python
{load_hint}
```

{told}Digest of this directory without this file: `{digest}`.
"""


def metadata(
    config: RunConfig, *, library: str, evaluation: EvaluationStatus, license_name: str | None
) -> dict[str, Any]:
    """The front matter. Names only what the Hub knows: a base model in a bucket is in the text alone."""
    found: dict[str, Any] = {}
    if license_name is not None:
        found["license"] = license_name if license_name in LICENSES else "other"
        if license_name not in LICENSES:
            found["license_name"] = license_name
    base = hub_id(config.model)
    if base is not None:
        found["base_model"] = base
        found["base_model_relation"] = "adapter" if library == "peft" else "finetune"
    datasets = sorted({name for uri in config.data.train if (name := hub_id(uri)) is not None})
    if datasets:
        found["datasets"] = datasets
    tag = pipeline_tag(config.task)
    if tag is not None:
        found["pipeline_tag"] = tag
    found["library_name"] = library
    found["tags"] = ["finetune-operator", config.task.type, config.method.type]
    metrics = {name: value for name, value in (evaluation.tuned or {}).items() if name in METRICS}
    if metrics:
        found["metrics"] = sorted({METRICS[name] for name in metrics})
    if metrics and tag is not None:
        rows = {"name": f"{evaluation.rows} {evaluation.on} rows", "type": datasets[0] if datasets else "private"}
        measured = [{"type": METRICS[name], "value": value, "name": name} for name, value in metrics.items()]
        result = {"task": {"type": tag}, "dataset": rows, "metrics": measured}
        found["model-index"] = [{"name": config.job, "results": [result]}]
    return found


def _notes(evaluation: EvaluationStatus) -> str:
    """Intervals and warnings."""
    said = [
        f"{name}: 95 % interval {ends.low:.4g} to {ends.high:.4g}."
        for name, ends in (evaluation.intervals or {}).items()
    ]
    said += evaluation.warnings or []
    return "\n" + "\n".join(f"- {sentence}" for sentence in said) + "\n" if said else ""


def _retention(evaluation: EvaluationStatus) -> str:
    """What the model has kept of what the base knew."""
    if not evaluation.retention:
        return ""
    rows = ["| set | rows | metric | base | tuned | difference (95 % interval) |", "|---|---:|---|---:|---:|---:|"]
    for one in evaluation.retention:
        base, tuned, difference = ("-" if v is None else f"{v:.4g}" for v in (one.base, one.tuned, one.difference))
        if one.low is not None and one.high is not None:
            difference += f" ({one.low:.4g} to {one.high:.4g})"
        rows.append(f"| {one.name} | {one.rows} | {one.metric} | {base} | {tuned} | {difference} |")
    said = "What the model has kept of what its base knew, measured on sets of rows beside those of the task:"
    return "\n" + said + "\n\n" + "\n".join(rows) + "\n"


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
