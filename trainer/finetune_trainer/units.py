"""What batches are made of: rows, or packs of them where the task has them and the model keeps their rows apart."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from finetune_trainer.adapt.base import InputsOf
from finetune_trainer.attempt import Attempt
from finetune_trainer.batches import possible_packs
from finetune_trainer.data.order import Rows
from finetune_trainer.data.packing import Packs
from finetune_trainer.model import ModelError
from finetune_trainer.run import TRAIN

_log = logging.getLogger("finetune.train")


@dataclass(frozen=True)
class Units:
    """The order puts these into batches. `shares` and `inputs_of` take some of `numbers`."""

    numbers: Rows
    shares: Callable[[Rows], list[tuple[Rows, float]]]
    """Of a step, see Learner.shares."""
    inputs_of: InputsOf


def packs_of(attempt: Attempt, model: Any, *, before: bool | None) -> Packs | None:
    """The packs of the training rows, or None where each row has a sequence of its own. The same on every rank.

    `model` has the weights that a run begins with; `before` is how earlier attempts have decided, which holds for the
    whole run, None where there was none. Raises ModelError when rows are to be packed and the model cannot do it.
    """
    packing, limit = attempt.config.training.packing, attempt.record.model_max_length
    packs = possible_packs(attempt.config, attempt.record, learner=attempt.learner, encoded=attempt.encoded)
    if packs is None or before is False:
        if before is None and attempt.learner.packs and packing is not False:
            _log.info("rows are not packed: no two of them fit into %d tokens", limit)
        return None
    differs = attempt.world.share({"why": _differs(attempt, model, packs)} if attempt.world.leads else None)["why"]
    if differs is None:
        filled = attempt.encoded.lengths(packs.rows).sum() / (len(packs) * limit)
        _log.info("%d rows are packed into %d sequences, %.0f %% full", len(packs.rows), len(packs), 100 * filled)
        return packs
    if before:
        raise ModelError(
            f"the run began with packed rows, and here {differs}; go on where it began, or set training.packing to "
            "false, which begins another run."
        )
    if packing:
        raise ModelError(f"training.packing: {differs}; leave the field out, and rows are trained one a sequence.")
    _log.warning("rows are not packed: %s", differs)
    return None


def _differs(attempt: Attempt, model: Any, packs: Packs) -> str | None:
    """Tried on the shortest pack of several rows, padded to the next longer one."""
    encoded, learner = attempt.encoded, attempt.learner
    several = np.flatnonzero(np.diff(packs.offsets) > 1)
    lengths = packs.lengths(encoded.lengths(packs.rows))[several]
    order = several[np.argsort(lengths, kind="stable")]
    chosen = [packs[int(order[0])], packs[int(order[min(len(order) - 1, len(order) // 2)])]]
    packed = {name: value[:1] for name, value in attempt.tensors(learner.collate_packs(encoded, chosen)).items()}
    alone = [attempt.inputs_of(chosen[0][place : place + 1]) for place in range(len(chosen[0]))]
    return learner.packing_differs(model, packed, alone)


def units_of(attempt: Attempt, *, inputs_of: InputsOf) -> Units:
    """`inputs_of` are those of rows by themselves."""
    encoded, learner, packs = attempt.encoded, attempt.learner, attempt.packs
    if packs is None:
        rows = encoded.rows(TRAIN)
        return Units(rows, partial(learner.shares, encoded), inputs_of)
    return Units(
        np.arange(len(packs)),
        lambda chosen: [(chosen, learner.count(encoded, np.concatenate(packs.of(chosen))))],
        lambda chosen: attempt.tensors(learner.collate_packs(encoded, packs.of(chosen))),
    )
