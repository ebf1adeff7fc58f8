"""What shall happen to each run: when or where its attempts are killed. Pure: a seed gives a plan."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.chaos.job import STEPS


@dataclass(frozen=True)
class Place:
    """A method at whose beginning an attempt may kill itself, and about how often one attempt calls it."""

    name: str
    module: str
    owner: str
    method: str
    calls: int


_S3 = ("finetune_trainer.storage.s3", "S3Store")
STEP = Place("before a step", "finetune_trainer.training", "Duties", "due", STEPS)
PLACES = (
    Place("before an upload", *_S3, "upload", 30),
    Place("between an upload and its verification", *_S3, "_verified", 30),
    Place("before a record is committed", "finetune_trainer.storage.commit", "RunLog", "put", 25),
    Place("between a checkpoint's record and the deletion of older ones", *_S3, "delete", 12),
    Place("before a download", *_S3, "download", 8),
    Place("in a download", *_S3, "_fetch_range", 8),
    Place("in an evaluation", "finetune_trainer.evaluate", "Evaluator", "_predictions", 8),
    Place("before outcomes of rows or the report are stored", *_S3, "write", 10),
    Place("while the model is written", "finetune_trainer.adapt.full", "Full", "save", 1),
    Place("before current.json is replaced", *_S3, "replace", 1),
)
"""Upload, commit, download, evaluation, publication."""


@dataclass(frozen=True)
class AtTime:
    """Kill after a share of the time that an attempt takes when nothing kills it."""

    share: float

    def sooner(self) -> "AtTime":
        return AtTime(self.share * 0.7)


@dataclass(frozen=True)
class AtCall:
    """Kill at the beginning of a call, counted from 1."""

    place: Place
    call: int

    def sooner(self) -> "AtCall":
        return replace(self, call=max(1, self.call // 2))


Kill = AtTime | AtCall


@dataclass(frozen=True)
class Plan:
    """Kills of one run's attempts, the first attempt's first; the attempt after them is left alone."""

    number: int
    kills: tuple[Kill, ...]
    cold: bool = False
    faults: bool = True

    def sooner(self) -> "Plan":
        """For a run that ended before it was killed."""
        return replace(self, kills=tuple(kill.sooner() for kill in self.kills))


def plans(runs: int, *, seed: int, cold: int) -> list[Plan]:
    """Half of the kills fall at random instants, half at the places in turn; a third of the runs are killed twice.

    `cold` runs, spread evenly, are processes of their own, killed at random instants.
    """
    chilled = {round((number + 0.5) * runs / cold) + 1 for number in range(cold)} if cold else set()
    return [_plan(number, seed=seed, cold=number in chilled) for number in range(1, runs + 1)]


def _plan(number: int, *, seed: int, cold: bool) -> Plan:
    draw = random.Random(f"{seed}/{number}")
    twice = draw.random() < 1 / 3
    first = AtTime(draw.random()) if cold or number % 2 else _aimed(draw, PLACES[number // 2 % len(PLACES)])
    second = AtTime(draw.random()) if cold or draw.random() < 0.5 else _aimed(draw, draw.choice(PLACES))
    return Plan(number, (first, second) if twice else (first,), cold=cold)


def _aimed(draw: random.Random, place: Place) -> AtCall:
    return AtCall(place, draw.randint(1, place.calls))


def every_step(steps: Sequence[int] = range(1, STEPS + 1)) -> list[Plan]:
    """One run a step, killed at its beginning; nothing else goes wrong."""
    return [Plan(step, (AtCall(STEP, step),), faults=False) for step in steps]
