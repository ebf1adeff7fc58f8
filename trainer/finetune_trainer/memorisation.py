"""The share of training rows that a model knows by heart: an eye on privacy, and on training for too long."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.attempt import Attempt
from finetune_trainer.data.order import Rows, derive, permute
from finetune_trainer.intervals import interval
from finetune_trainer.run import TRAIN
from finetune_trainer.tasks.continued import LEAST, Spans

METRIC = "memorisation"
ROWS = 100
"""Training rows that are asked for at most."""
_TRIED = 2000
_TOGETHER = 16
_DRAWS = 1000


def asked(attempt: Attempt) -> tuple[Rows, Spans]:
    """The first ROWS training rows, in an order by a hash of their place alone, that go on for LEAST tokens; none in a
    task whose models write no text."""
    rows = attempt.encoded.rows(TRAIN)
    count = min(_TRIED, len(rows))
    rows = rows[permute(np.arange(count), size=len(rows), key=derive(0, METRIC))]
    spans = attempt.learner.continuations(attempt.encoded, rows)
    if spans is None:
        return rows[:0], np.zeros((0, 2), dtype=np.int64)
    long = np.flatnonzero(spans[:, 1] - spans[:, 0] >= LEAST)[:ROWS]
    return rows[long], spans[long]


def known_by_heart(attempt: Attempt, model: Any) -> NDArray[np.bool_]:
    """Of each row that is asked for, whether the model reproduces it. Sets the model to eval mode."""
    rows, spans = asked(attempt)
    model.eval()
    found = [np.zeros(0, dtype=bool)]
    for start in range(0, len(rows), _TOGETHER):
        attempt.heart.beat_or_stop()
        chunk = slice(start, start + _TOGETHER)
        with torch.no_grad(), attempt.accelerator.autocast():
            found.append(attempt.learner.reproduced(model, attempt.inputs_of(rows[chunk]), spans[chunk]))
    return np.concatenate(found)


def share_of(known: NDArray[np.bool_]) -> dict[str, float]:
    """The metric, where any row was asked for."""
    return {METRIC: float(known.mean())} if len(known) else {}


def share_interval(known: NDArray[np.bool_]) -> dict[str, tuple[float, float]]:
    """Its 95 % bootstrap interval, the same each time."""
    if not len(known):
        return {}
    draws = np.random.default_rng(derive(0, METRIC, "intervals")).integers(0, len(known), (_DRAWS, len(known)))
    ends = interval(known[draws].mean(1).astype(np.float64))
    return {} if ends is None else {METRIC: ends}
