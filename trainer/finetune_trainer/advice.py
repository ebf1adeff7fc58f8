"""Which of several bases to choose, and how that is said: pure functions of what was found of each."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from finetune_trainer.foresight import quantity

ROWS = 1000
"""Rows that a probe is trained on, and as many that are held out, at most."""


@dataclass(frozen=True)
class Score:
    """How much a base knows of the task before it is tuned, on rows held out."""

    metric: str
    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    higher_is_better: bool
    rows: int
    """That it was measured on."""

    def beats(self, other: "Score") -> bool:
        return self.value > other.value if self.higher_is_better else self.value < other.value

    def holds(self, other: "Score") -> bool:
        """Whether another base's score lies within this one's interval, or beyond its better end."""
        return other.value >= self.low if self.higher_is_better else other.value <= self.high


@dataclass(frozen=True)
class Found:
    """What was found of one base."""

    model: str
    """Its URI."""
    name: str
    """As it was asked for."""
    refused: str = ""
    """Why it cannot be used; then nothing else is known."""
    license: str | None = None
    parameters: int = 0
    size_bytes: int = 0
    """Of its weights as they are stored."""
    tokens_mean: float = 0.0
    """Of a row after any cut; the 95th percentile is of rows as they are. Both are 0 for images."""
    tokens_p95: int = 0
    unknown_percent: float = 0.0
    truncated_percent: float = 0.0
    memory: int | None = None
    """Predicted bytes at the peak of training; None where the architecture is not known."""
    gpu: bool = False
    """That is of one GPU, not of a pod without."""
    warning: str = ""
    """That it will not fit into the memory there is."""
    score: Score | None = None
    seconds_per_epoch: float = 0.0


@dataclass(frozen=True)
class Advice:
    model: str | None
    """None: none of the bases can be used."""
    reason: str


def recommend(bases: Sequence[Found]) -> Advice:
    """Among the bases whose score is not clearly worse than the best one's, the fastest; of equally fast ones the
    smallest. Bases that will not fit into memory come last."""
    usable = [base for base in bases if not base.refused]
    if not usable:
        return Advice(None, "None of the bases can be used.")
    fitting = [base for base in usable if not base.warning] or usable
    scored = [base for base in fitting if base.score is not None]
    best = scored[0] if scored else None
    for base in scored[1:]:
        assert best is not None
        assert best.score is not None
        assert base.score is not None
        best = base if base.score.beats(best.score) else best
    alike = [b for b in scored if best and best.score and b.score and best.score.holds(b.score)] or fitting
    chosen = min(alike, key=lambda base: (base.seconds_per_epoch, base.parameters))
    said = [_why(chosen, best, alone=len(usable) == 1)]
    if chosen.warning:
        said.append(chosen.warning)
    elif len(fitting) < len(usable):
        said.append("Bases that are predicted not to fit into memory are left aside.")
    if chosen.license is None:
        said.append("Its license is not known: find out before you publish, and name it in spec.model.license.")
    return Advice(chosen.model, " ".join(said))


def _why(chosen: Found, best: Found | None, *, alone: bool) -> str:
    if alone:
        return f"{chosen.name} is the only base that can be used."
    if best is None or best.score is None or chosen.score is None:
        return f"No score tells the bases apart; {chosen.name} is the fastest of them."
    score = best.score
    told = f"{score.metric}, {score.value:.3g} (95 % interval {score.low:.3g} to {score.high:.3g})"
    if chosen is best:
        return f"{chosen.name} has the best {told}; none that comes close to it is faster."
    times = best.seconds_per_epoch / chosen.seconds_per_epoch if chosen.seconds_per_epoch else 1.0
    faster = f"trains {times:.1f} times as fast as" if times >= 1.05 else "is no slower and no larger than"
    own = f"its own {chosen.score.value:.3g} is within that interval"
    return f"{chosen.name} {faster} {best.name}, whose {told} is the best; {own}."


def table(bases: Sequence[Found], *, device: str) -> str:
    """For people, a line a base; those that cannot be used below, each with the reason. The seconds were
    measured on `device`."""
    usable = [base for base in bases if not base.refused]
    score = next((base.score for base in usable if base.score is not None), None)
    head = ["base", "license", "parameters", "size", "tokens a row", "p95", "unknown", "truncated"]
    head += [
        "GPU memory" if any(base.gpu for base in usable) else "memory",
        score.metric if score else "score",
        "s an epoch",
    ]
    lines = [head, *(_cells(base) for base in usable)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    said = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    said = said if usable else []
    said += [f"{base.name}: {base.refused}" for base in bases if base.refused]
    if usable:
        held = f"Scores are of {score.rows} rows held out; seconds" if score else "Seconds"
        said.append(f"{held} were measured on {device}.")
    return "\n".join(said)


def _cells(base: Found) -> list[str]:
    score = base.score
    return [
        base.name,
        base.license or "unknown",
        f"{base.parameters / 1e6:.3g}M" if base.parameters >= 1e6 else f"{base.parameters / 1e3:.3g}k",
        quantity(base.size_bytes),
        f"{base.tokens_mean:.1f}" if base.tokens_p95 else "none",
        str(base.tokens_p95 or "none"),
        f"{base.unknown_percent:.2g} %",
        f"{base.truncated_percent:.2g} %",
        quantity(base.memory) if base.memory is not None else "unknown",
        f"{score.value:.3f} ({score.low:.3f}-{score.high:.3f})" if score else "none",
        f"{base.seconds_per_epoch:.3g}",
    ]


def as_json(bases: Sequence[Found], advice: Advice, *, device: str, job: dict[str, Any] | None) -> str:
    document = {
        "bases": [asdict(base) for base in bases],
        "recommended": advice.model,
        "reason": advice.reason,
        "device": device,
        "job": job,
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def as_yaml(job: dict[str, Any]) -> str:
    return yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=120)
