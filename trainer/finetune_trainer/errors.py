"""Where a model errs: which answers are mixed up, and which rows it was surest about and still got wrong."""

from collections import Counter
from typing import Any

import numpy as np

from finetune_trainer.evaluate import PLACE
from finetune_trainer.tasks import Learner, Outcomes

MISTAKES = 30
"""Rows that are named at most; as many of each task where there are several."""
_LINE = 300


def errors_of(learner: Learner, outcomes: Outcomes) -> dict[str, Any]:
    """As JSON: `confusion`, or None; `mistakes`, the surest first, with their places in the encoded store."""
    confusion = learner.confusion(outcomes)
    return {
        "labels": list(learner.facts.labels) if confusion is not None else [],
        "confusion": None if confusion is None else confusion.tolist(),
        "mistakes": _mistakes(learner, outcomes),
    }


def _mistakes(learner: Learner, outcomes: Outcomes) -> list[dict[str, Any]]:
    """A high loss means that the model was sure of something else. Rows answered well are no mistakes."""
    shown = learner.shown(outcomes)
    if "loss" not in outcomes:
        return []
    losses = np.nan_to_num(outcomes["loss"] / np.maximum(1, outcomes["count"]), posinf=1e9)
    names = learner.part_names(outcomes)
    tasks = set(names) or {""}
    each = MISTAKES // len(tasks)
    found: list[dict[str, Any]] = []
    of: Counter[str] = Counter()
    for row in np.argsort(-losses, kind="stable"):
        truth, answer = (None, None) if shown is None else (shown[0][row], shown[1][row])
        if (truth is not None and truth == answer) or of[names[row]] == each:
            continue
        of[names[row]] += 1
        found.append(
            {
                "place": int(outcomes[PLACE][row]),
                "loss": float(losses[row]),
                "truth": truth[:_LINE] if truth is not None else None,
                "answer": answer[:_LINE] if answer is not None else None,
                "part": names[row],
            }
        )
        if len(found) == each * len(tasks):
            break
    return found
