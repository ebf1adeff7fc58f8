"""Metrics by the values of a column: where a model is worse for some rows than for others, bias shows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.order import derive
from finetune_trainer.intervals import Draws, interval
from finetune_trainer.tasks import Learner, Metrics, Outcomes

LEAST_ROWS = 20
"""A value with fewer rows is counted, and not measured."""


def by_values(
    learner: Learner,
    outcomes: Outcomes,
    codes: NDArray[Any],
    *,
    column: str,
    values: Sequence[str],
    metric: str,
    seed: int,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What is known of one column, as JSON. `codes`, int [rows], are places in `values`, or below 0 for none of them.

    The gap is that of `metric` between the best value and the worst; its interval is of rows drawn anew within both.
    `equalizedOdds` is the largest difference, over labels and values, of true and of false positive rates (Hardt,
    Price and Srebro, 2016).
    """
    counted = np.bincount(codes[codes >= 0], minlength=len(values))
    parts = {
        place: {name: array[codes == place] for name, array in outcomes.items()}
        for place in np.flatnonzero(counted >= LEAST_ROWS).tolist()
    }
    measured = {place: _finite(learner.metrics(part)) for place, part in parts.items()}
    known = [place for place in measured if metric in measured[place]]
    found: dict[str, Any] = {
        "column": column,
        "metric": metric,
        "values": [
            {"value": values[place], "rows": int(counted[place]), "metrics": measured[place]} for place in measured
        ],
        "tooFew": int((codes >= 0).sum() - counted[list(parts)].sum()) if parts else int((codes >= 0).sum()),
        "unknown": int((codes < 0).sum()),
        "gap": None,
        "equalizedOdds": _equalized_odds([learner.rates(part) for part in parts.values()]),
    }
    if len(known) > 1:
        sign = 1.0 if learner.higher_is_better(metric) else -1.0
        best, worst = (choose(known, key=lambda place: sign * measured[place][metric]) for choose in (max, min))
        draws = [
            Draws.of(
                learner, len(next(iter(parts[place].values()))), seed=derive(seed, column, values[place])
            ).measured(learner, parts[place], needed=metric, beat=beat)[metric]
            for place in (best, worst)
        ]
        ends = interval(sign * (draws[0][: len(draws[1])] - draws[1][: len(draws[0])]))
        found["gap"] = {
            "value": sign * (measured[best][metric] - measured[worst][metric]),
            "best": values[best],
            "worst": values[worst],
            "interval": ends,
        }
    return found


def widest_gap(found: Sequence[Mapping[str, Any]]) -> float | None:
    """What the gate `slice-gap` judges: None where no column has two values with enough rows."""
    gaps = [slices["gap"]["value"] for slices in found if slices["gap"] is not None]
    return max(gaps) if len(gaps) == len(found) and gaps else None


def _finite(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _equalized_odds(rates: Sequence[NDArray[np.float64] | None]) -> float | None:
    known = [found for found in rates if found is not None]
    if len(known) < 2:
        return None
    stacked = np.stack(known)
    both = (~np.isnan(stacked)).sum(0) > 1  # a rate of two groups at least
    if not both.any():
        return None
    spread = np.nanmax(stacked[:, both], 0) - np.nanmin(stacked[:, both], 0)
    return float(spread.max())
