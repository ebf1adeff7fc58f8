"""What preflight foresees of training: how many steps it will have, and how much memory it will take. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from finetune_api.contract import PodsConfig, RunConfig
from finetune_trainer.anatomy import Shapes, Unknown
from finetune_trainer.batches import leading, learner_of, micro_batch, mixture_of, possible_packs, steps_of
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.packing import Packs
from finetune_trainer.predicted import Batch, Device, Prediction, predict
from finetune_trainer.run import TRAIN, RunRecord
from finetune_trainer.tasks import Learner
from finetune_trainer.tasks.base import IGNORED

_BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50}
_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "m": 1e-3}


@dataclass(frozen=True)
class Foresight:
    steps: int
    """Optimizer steps. Where rows may be packed it is assumed that the model keeps them apart."""
    memory: Prediction | None
    """Of the device of one rank."""
    why: str
    """Why there is none; empty where there is."""


def foresee(
    config: RunConfig, record: RunRecord, *, model: Mapping[str, Any], shapes: Shapes, encoded: Encoded
) -> Foresight:
    """For a base with that config.json and tensors of those shapes."""
    learner = learner_of(config, record)
    packs = possible_packs(config, record, learner=learner, encoded=encoded)
    mixture = mixture_of(config, record, encoded=encoded, packs=packs)
    steps = steps_of(config, units=mixture.rows if mixture else len(leading(encoded, packs)))
    device: Device = "gpu" if config.pods.gpus else "cpu"
    ranks = config.pods.nodes * max(1, config.pods.gpus)
    rows = config.training.micro_batch or micro_batch(config, gpu=device == "gpu", ranks=ranks)
    labels = max(2, len(record.labels)) if learner.logits == "few" else 0
    try:
        found = [
            predict(
                model,
                shapes,
                method=config.method,
                training=config.training,
                batch=batch,
                labels=labels,
                device=device,
                ranks=ranks,
            )
            for batch in largest(learner, encoded, packs=packs, rows=rows, model=model)
        ]
    except Unknown as error:
        return Foresight(steps, None, str(error))
    return Foresight(steps, max(found, key=lambda prediction: prediction.total), "")


def largest(
    learner: Learner, encoded: Encoded, *, packs: Packs | None, rows: int, model: Mapping[str, Any]
) -> list[Batch]:
    """The micro-batch of the longest training rows, for each group of rows that share none."""
    if packs is not None:
        lengths = packs.lengths(encoded.lengths(packs.rows))
        longest = np.argsort(-lengths, kind="stable")[:rows]
        return [_batch(learner, learner.collate_packs(encoded, packs.of(longest)), model, packed=True)]
    found = []
    for group in learner.groups(encoded, encoded.rows(TRAIN)):
        longest = group[np.argsort(-encoded.lengths(group), kind="stable")[:rows]]
        if len(longest):
            found.append(_batch(learner, learner.collate(encoded, longest), model, packed=False))
    return found


def _batch(learner: Learner, inputs: Mapping[str, Any], model: Mapping[str, Any], *, packed: bool) -> Batch:
    _, arrays = learner.part_of(inputs)
    if "pixel_values" in arrays:
        images, _, height, width = arrays["pixel_values"].shape
        patch = int(model.get("patch_size") or 1)
        return Batch(images, 1 + (height // patch) * (width // patch), masked=False)
    sequences, tokens = arrays["input_ids"].shape
    targets = arrays["decoder_input_ids"].shape[1] if "decoder_input_ids" in arrays else 0
    labelled = 0
    if learner.logits != "few":
        wanted = arrays["labels"] != IGNORED
        labelled = int(wanted.sum()) if learner.logits == "chunked" else wanted.size
    return Batch(sequences, tokens, targets, labelled, learner.logits != "all")


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them, rounded up: 512Mi, 3.1Gi."""
    if size < 1 << 30:
        return f"{ceil(size / (1 << 20))}Mi"
    return f"{ceil(10 * size / (1 << 30)) / 10:g}Gi"


def bytes_of(amount: str) -> float:
    """What a Kubernetes quantity says."""
    for units in (_BINARY, _DECIMAL):
        for unit, factor in units.items():
            if amount.endswith(unit):
                return float(amount.removesuffix(unit)) * factor
    return float(amount)


def memory_warning(found: Foresight, pods: PodsConfig) -> str | None:
    """In words that training is likely to run out of memory; None where all is well, or not known."""
    limit, field = (pods.gpu_memory, "a GPU has") if pods.gpus else (pods.memory, "resources.perNode.memory gives")
    if limit is None or found.memory is None or found.memory.total <= bytes_of(limit):
        return None
    return (
        f"Training is predicted to take {quantity(found.memory.total)} of memory, and {field} {limit}: choose a "
        "smaller training.microBatch or data.maxLength, training.gradientCheckpointing, method lora or qlora, or more "
        "memory."
    )
