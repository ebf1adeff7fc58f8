"""What the Hugging Face Hub allows in a model card's metadata, and how our names map to its names.

The lists are those of the Hub's documentation (model cards, licenses; tasks of huggingface.js); its own validator would
ask the network. Torch-free.
"""

import re
from collections.abc import Mapping

import yaml

from finetune_api.contract import TaskConfig
from finetune_api.tasks import TASKS, WRITING_PARTS

_LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m "
    "bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear "
    "bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 "
    "creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 "
    "fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl "
    "lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl "
    "ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense "
    "wtfpl zlib"
)
LICENSES = frozenset(_LICENSES.split())
METRICS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
    "f1-micro": "f1",
    "f1-weighted": "f1",
    "mcc": "matthews_correlation",
    "roc-auc": "roc_auc",
    "exact-match": "exact_match",
    "rouge-1": "rouge",
    "rouge-2": "rouge",
    "rouge-l": "rouge",
    "bleu": "bleu",
    "chrf": "chrf",
    "perplexity": "perplexity",
    "mse": "mse",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""Ours -> the Hub's; what it has no name for is left out of the metadata."""
LIBRARIES = frozenset({"transformers", "peft"})
_FRONT = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_HUB = re.compile(r"hf://(?:datasets/)?([^/@]+/[^/@]+)")


def pipeline_tag(task: TaskConfig) -> str:
    """What the Hub calls a task; for several tasks what they have in common, as far as it has a name for it."""
    types = [part.type for part in task.tasks or ()]
    tags = {TASKS[name].pipeline_tag for name in types}
    if len(tags) == 1:
        return tags.pop()
    return "text-generation" if tags and set(types) <= set(WRITING_PARTS) else TASKS[task.type].pipeline_tag


def hub_id(uri: str) -> str | None:
    """`org/name` of an address on the Hub."""
    match = _HUB.match(uri)
    return match[1] if match else None


def license_in(card: str) -> str | None:
    """The license that a model card's front matter names, in lower case; None where it names none."""
    match = _FRONT.match(card)
    if match is None:
        return None
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError):
        return None
    named = found.get("license") if isinstance(found, dict) else None
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if named == "other" and isinstance(found.get("license_name"), str):
        named = found["license_name"]
    return named.strip().lower()[:64] or None if isinstance(named, str) else None
