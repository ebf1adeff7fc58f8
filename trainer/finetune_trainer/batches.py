"""What batches are made of and in which order: pure functions of a run's record and its encoded store.

Training asks them, and so does whoever wants to know which rows a step has seen; neither needs a model for it.
"""

from pathlib import Path

import numpy as np

from finetune_api.contract import RunConfig
from finetune_trainer import tasks
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Mixture, Order, Rows, parts_of, total_steps
from finetune_trainer.data.packing import Packs, joined, pack
from finetune_trainer.run import TRAIN, RunRecord
from finetune_trainer.tasks import Facts, Learner

_ROWS = {False: 16, True: 64}
"""Rows at once on a CPU and on a GPU, of up to _TOKENS tokens."""
_TOKENS = 512


def learner_of(config: RunConfig, record: RunRecord, *, base: Path = Path()) -> Learner:
    """What preflight has fixed, in the hands of the task; `base` is where the base model's files are, or will be."""
    facts = Facts(
        labels=record.labels,
        form=record.form,
        pad_token_id=record.pad_token_id,
        max_length=record.model_max_length,
        more=record.facts,
        base=base,
    )
    return tasks.get(config).learner(facts)


def possible_packs(config: RunConfig, record: RunRecord, *, learner: Learner, encoded: Encoded) -> Packs | None:
    """The training rows put together, or None where each has a sequence of its own. Whether a model keeps the rows of a
    pack apart is another question."""
    if not learner.packs or config.training.packing is False:
        return None
    rows = encoded.rows(TRAIN)
    # Rows that are seen more often than others share no sequence with those.
    sources = encoded.values("source", rows) if config.data.train_weights else np.zeros_like(rows)
    parts = np.split(rows, np.flatnonzero(np.diff(sources)) + 1)
    packs = joined([pack(part, encoded.lengths(part), limit=record.model_max_length) for part in parts])
    return packs if len(packs) < len(rows) else None


def leading(encoded: Encoded, packs: Packs | None) -> Rows:
    """The first row of each unit that batches are made of: of each pack, or each training row itself."""
    return encoded.rows(TRAIN) if packs is None else packs.rows[packs.offsets[:-1]]


def mixture_of(config: RunConfig, record: RunRecord, *, encoded: Encoded, packs: Packs | None) -> Mixture | None:
    """How often units are seen, by data.train[].weight; None where each is seen once an epoch."""
    weights = config.data.train_weights
    if weights is None:
        return None
    roles = {position: entry.role.split("/") for position, entry in enumerate(record.manifest)}
    weight_of = {position: weights[int(role[1])] for position, role in roles.items() if role[0] == "train"}
    sources = encoded.values("source", leading(encoded, packs))
    return Mixture(parts_of(sources, weight_of), seed=config.training.seed)


def order_of(
    config: RunConfig, *, learner: Learner, encoded: Encoded, packs: Packs | None, mixture: Mixture | None
) -> Order:
    """The order of the units, which are counted from 0 as `leading` has them."""
    if packs is None:
        rows = encoded.rows(TRAIN)
        lengths = learner.costs(encoded, rows)
    else:
        lengths = packs.lengths(encoded.lengths(packs.rows))
    size = mixture.rows if mixture else len(lengths)
    return Order(size, config.training.batch_size, config.training.seed, lengths, mixture)


def micro_batch(config: RunConfig, *, gpu: bool, ranks: int) -> int:
    """Rows at once where the document does not say: a function of the document, the kind of device and the ranks.

    Not of the memory that happens to be there, so that equal machines in number give equal results; where it is too
    little, the loop halves.
    """
    rows = _ROWS[gpu]
    share = -(-config.training.batch_size // ranks)
    return max(1, min(rows, rows * _TOKENS // config.data.max_length, share))


def steps_of(config: RunConfig, *, units: int) -> int:
    """Optimizer steps of a whole run, in which so many units are seen an epoch."""
    training = config.training
    return total_steps(rows=units, batch_size=training.batch_size, epochs=training.epochs, max_steps=training.max_steps)
