"""What batches are made of: rows, or packs of them where the task has them and the model keeps their rows apart."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.adapt.base import InputsOf
from finetune_trainer.attempt import Attempt
from finetune_trainer.data.order import Rows
from finetune_trainer.data.packing import Packs, joined, pack
from finetune_trainer.model import ModelError
from finetune_trainer.run import TRAIN

_log = logging.getLogger("finetune.train")


@dataclass(frozen=True)
class Units:
    """The order puts these into batches. `shares` and `inputs_of` take some of `numbers`."""

    numbers: Rows
    lengths: NDArray[np.int64]
    """What the order sorts by, so that like comes to like."""
    shares: Callable[[Rows], list[tuple[Rows, float]]]
    """Of a step, see Learner.shares."""
    inputs_of: InputsOf


def packs_of(attempt: Attempt, model: Any) -> Packs | None:
    """The packs of the training rows, or None where each row has a sequence of its own. The same on every rank.

    `model` has the weights that a run begins with, so that every attempt comes to the same end. Raises ModelError when
    training.packing asks for what the model cannot do.
    """
    asked, learner, encoded = attempt.config.training.packing, attempt.learner, attempt.encoded
    if not learner.packs or asked is False:
        return None
    rows = encoded.rows(TRAIN)
    # Rows that are seen more often than others share no sequence with those.
    sources = encoded.values("source", rows) if attempt.config.data.train_weights else np.zeros_like(rows)
    limit = attempt.record.model_max_length
    packs = joined([pack(part, encoded.lengths(part), limit=limit) for part in _by(sources, rows)])
    if len(packs) == len(rows):
        _log.info("rows are not packed: no two of them fit into %d tokens", limit)
        return None
    differs = attempt.world.share({"why": _differs(attempt, model, packs)} if attempt.world.leads else None)["why"]
    if differs is None:
        filled = encoded.lengths(rows).sum() / (len(packs) * limit)
        _log.info("%d rows are packed into %d sequences, %.0f %% full", len(rows), len(packs), 100 * filled)
        return packs
    if asked:
        raise ModelError(f"training.packing: {differs}; leave the field out, and rows are trained one a sequence.")
    _log.warning("rows are not packed: %s", differs)
    return None


def _by(sources: Rows, rows: Rows) -> list[Rows]:
    """Rows of equal sources, which are beside each other."""
    return np.split(rows, np.flatnonzero(np.diff(sources)) + 1)


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
        return Units(rows, learner.costs(encoded, rows), partial(learner.shares, encoded), inputs_of)
    return Units(
        np.arange(len(packs)),
        packs.lengths(encoded.lengths(packs.rows)),
        lambda chosen: [(chosen, learner.count(encoded, np.concatenate(packs.of(chosen))))],
        lambda chosen: attempt.tensors(learner.collate_packs(encoded, packs.of(chosen))),
    )
