"""Where a model errs: which answers are mixed up, and which rows it was surest about and still got wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np

from finetune_trainer.evaluate import PLACE
from finetune_trainer.tasks import Learner, Outcomes

MISTAKES = 30
"""Rows of a task that are named at most."""
_LINE = 300


def errors_of(learner: Learner, outcomes: Outcomes, beat: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """As JSON, of each task by its name (a lone one has none): `confusion`, or None, and its `labels`; `mistakes`, the
    surest first, with their places in the encoded store."""
    found = {}
    for name, (part, own) in learner.by_part(outcomes).items():
        beat()
        confusion = part.confusion(own)
        found[name] = {
            "labels": list(part.facts.labels) if confusion is not None else [],
            "confusion": None if confusion is None else confusion.tolist(),
            "mistakes": _mistakes(part, own),
        }
    return found


def _mistakes(learner: Learner, outcomes: Outcomes) -> list[dict[str, Any]]:
    """A high loss means that the model was sure of something else. Rows answered well are no mistakes."""
    shown = learner.shown(outcomes)
    if "loss" not in outcomes:
        return []
    losses = np.nan_to_num(outcomes["loss"] / np.maximum(1, outcomes["count"]), posinf=1e9)
    found = []
    for row in np.argsort(-losses, kind="stable"):
        truth, answer = (None, None) if shown is None else (shown[0][row], shown[1][row])
        if truth is not None and truth == answer:
            continue
        found.append(
            {
                "place": int(outcomes[PLACE][row]),
                "loss": float(losses[row]),
                "truth": truth[:_LINE] if truth is not None else None,
                "answer": answer[:_LINE] if answer is not None else None,
            }
        )
        if len(found) == MISTAKES:
            break
    return found
