"""Metrics of a model, and of what any model must beat: a trivial answer, and a linear probe on the untouched base.

A new head knows nothing, so the untouched base is a baseline only where it can do the task. A linear model on its
frozen features always is one: it tells what tuning has added to what the base knew already.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.adapt.base import InputsOf
from finetune_trainer.course import is_out_of_memory
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Rows, derive, permute
from finetune_trainer.layers import plain_of
from finetune_trainer.shared import parts_of
from finetune_trainer.tasks import Learner, Metrics, Outcomes
from finetune_trainer.tasks.base import IGNORED, objects
from finetune_trainer.world import World

CHUNK = 64
"""Rows evaluated together; fixed, so that a loss does not depend on the micro-batch."""
PLACE = "place"
"""Name under which outcomes say which row of the encoded store they are of."""
PROBE_ROWS = 5000
SUSPECTS = 50
"""Rows of a task that are named at most as likely mislabelled."""
SUSPICIOUS = 0.2
"""Probability of a row's label below which it is named."""
PROBE_POSITIONS = 20_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suspect:
    """A training row whose label may be wrong."""

    place: int
    """Its number in the encoded store."""
    quality: float
    """How likely its label is, by a probe that has not seen the row."""
    label: str
    likelier: str
    """The label that the probe would give it."""
    part: str = ""
    """Of which of several tasks it is."""


@dataclass(frozen=True)
class Probed:
    """What a linear model on frozen features answers, and which training rows it finds odd."""

    outcomes: Outcomes
    suspects: list[Suspect]


class Pieces(Protocol):
    """Predictions for chunks of rows that outlast this process."""

    found: dict[int, Outcomes]
    """What is known, by the chunk's number."""

    def add(self, number: int, predictions: Outcomes) -> None:
        """Keep those for one chunk."""


@dataclass(frozen=True)
class Evaluator:
    """Measures models on rows of the encoded store. Each chunk of rows is worked on by one rank of `world`."""

    learner: Learner
    encoded: Encoded
    world: World
    autocast: Callable[[], AbstractContextManager[Any]]
    beat: Callable[[], None]
    """Called before each chunk, equally often by all ranks of `world`."""
    alive: Callable[[], None] = lambda: None
    """Called with every forward pass: writing the texts of one chunk may take as long as many training steps."""

    def measure(self, model: Any, rows: Rows, *, inputs_of: InputsOf, generate: bool = True) -> Metrics:
        """The metrics on `rows`, the same on every rank; without `generate` those of one forward pass. Sets the model
        to eval mode."""
        return self.learner.metrics(self.outcomes(model, rows, inputs_of=inputs_of, generate=generate))

    def outcomes(
        self, model: Any, rows: Rows, *, inputs_of: InputsOf, generate: bool = True, pieces: Pieces | None = None
    ) -> Outcomes:
        """Truth and predictions, settled. With `pieces`, on one rank alone, chunks that are known are not measured."""
        model.eval()
        rows = self.longest_first(rows)
        found: dict[int, Outcomes] = {} if pieces is None else pieces.found
        hooks = [
            plain_of(part).register_forward_pre_hook(lambda _module, _inputs: self.alive()) for part in parts_of(model)
        ]
        try:
            chunks = self._chunks(rows)
            for start in range(0, len(chunks), self.world.size):
                self.beat()
                number = start + self.world.rank
                if number < len(chunks) and number not in found:
                    found[number] = self._predictions(model, chunks[number], inputs_of, generate)
                    if pieces is not None:
                        pieces.add(number, found[number])
        finally:
            for hook in hooks:
                hook.remove()
        found = self._gathered(found)
        return self._settled(joined([found[number] for number in sorted(found)]), rows)

    def _settled(self, predictions: Outcomes, rows: Rows) -> Outcomes:
        return self.learner.settle({**self.learner.gold(self.encoded, rows), **predictions, PLACE: rows})

    def longest_first(self, rows: Rows) -> Rows:
        """Little padding, and too little memory is noticed at once; group by group."""
        return np.concatenate(self._groups(rows)) if len(rows) else rows

    def _groups(self, rows: Rows) -> list[Rows]:
        found = [rows for rows in self.learner.groups(self.encoded, rows) if len(rows)]
        found = [group[np.argsort(-self.encoded.lengths(group), kind="stable")] for group in found]
        return sorted(found, key=lambda group: -int(self.encoded.lengths(group[:1])[0]))

    def _chunks(self, rows: Rows) -> list[Rows]:
        """What is worked on together, of rows in the order of `longest_first`: never rows of two groups."""
        return [group[start : start + CHUNK] for group in self._groups(rows) for start in range(0, len(group), CHUNK)]

    def _predictions(self, model: Any, rows: Rows, inputs_of: InputsOf, generate: bool) -> Outcomes:
        """Predictions for some rows, in halves where they do not fit into memory."""
        try:
            with torch.no_grad(), self.autocast():
                return self.learner.predict(model, inputs_of(rows), generate=generate)
        except (MemoryError, RuntimeError) as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        return joined([self._predictions(model, half, inputs_of, generate) for half in np.array_split(rows, 2)])

    def _gathered(self, mine: dict[int, Outcomes]) -> dict[int, Outcomes]:
        """Every rank's chunks, on every rank."""
        if self.world.size == 1:
            return mine
        everything: dict[int, Outcomes] = {}
        for source in range(self.world.size):
            data = packed(mine) if source == self.world.rank else b""
            parts = unpacked(self.world.send(data, source=source))
            everything |= {int(number): part for number, part in parts.items()}
        return everything

    def trivial(self, train: Rows, rows: Rows) -> Outcomes | None:
        """What needs no model."""
        rows = self.longest_first(rows)
        predictions = self.learner.trivial(self.encoded, train, rows)
        return None if predictions is None else self._settled(predictions, rows)

    def probe(
        self, trunk: Any, train: Rows, rows: Rows, *, inputs_of: InputsOf, seed: int, suspicious: bool = True
    ) -> Probed | None:
        """A linear model on the trunk's output, fitted on up to PROBE_ROWS training rows, and, where it is to be
        `suspicious`, which of these may be mislabelled.

        None where the task has none, or where there is nothing to learn.
        """
        if self.learner.probe is None:
            return None
        known, asked = self.longest_first(self._few(train, seed)), self.longest_first(rows)
        trunk.eval()
        features = self._features(trunk, known, inputs_of)
        predictions = self.learner.fit_probe(
            features,
            self._features(trunk, asked, inputs_of),
            store=self.encoded,
            train=known,
            rows=asked,
            seed=seed,
        )
        if predictions is None:
            return None
        self.beat()
        suspects = self._suspects(features, known, seed) if suspicious else []
        return Probed(self._settled(predictions, asked), suspects)

    def _suspects(self, features: NDArray[np.float32], rows: Rows, seed: int) -> list[Suspect]:
        """Training rows whose label the features speak against, of each task the most suspicious first."""
        suspects = []
        judged = self.learner.label_qualities(features, store=self.encoded, rows=rows, seed=seed)
        for part, (own, quality, labels, likelier) in judged.items():
            self.beat()
            worst = np.argsort(quality, kind="stable")[:SUSPECTS]
            suspects += [
                Suspect(int(own[n]), float(quality[n]), labels[n], likelier[n], part)
                for n in worst
                if quality[n] < SUSPICIOUS
            ]
        return suspects

    def _few(self, train: Rows, seed: int) -> Rows:
        """Training rows for the probe, the same for the same seed."""
        count = min(PROBE_ROWS, len(train))
        if self.learner.probe == "positions":
            count = max(1, min(count, int(count * PROBE_POSITIONS / max(1, self.encoded.lengths(train[:count]).sum()))))
        return train[np.sort(permute(np.arange(count), size=len(train), key=derive(seed, "probe")))]

    def _features(self, trunk: Any, rows: Rows, inputs_of: InputsOf) -> NDArray[np.float32]:
        """[rows, width], or [labelled positions, width]."""
        found = []
        for chunk in self._chunks(rows):
            self.beat()
            learner, inputs = self.learner.part_of(inputs_of(chunk))
            with torch.no_grad(), self.autocast():
                states = trunk(**learner.model_inputs(inputs))[0].float()
            if learner.probe == "positions":
                found.append(states[inputs["labels"] != IGNORED].cpu().numpy())
            else:
                found.append(_pooled(states, inputs).cpu().numpy())
        return np.concatenate(found)


def _pooled(states: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The mean over a row's tokens, patches or pixels: [rows, tokens, width] or [rows, width, ...] -> [rows, width]."""
    if states.ndim == 2:
        return states
    if states.ndim == 4:
        return states.mean((2, 3))
    if "attention_mask" not in inputs:
        return states.mean(1)
    mask: torch.Tensor = inputs["attention_mask"][:, : states.shape[1], None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


# --- outcomes of several chunks, and on their way between ranks: as JSON, never as pickles ---


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """Rows of several chunks, one behind the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def packed(parts: Mapping[Any, Outcomes]) -> bytes:
    """Outcomes by name, as JSON."""
    document = {
        str(part): {name: {"type": values.dtype.str, "values": values.tolist()} for name, values in outcomes.items()}
        for part, outcomes in parts.items()
    }
    return json.dumps(document).encode()


def unpacked(data: bytes) -> dict[str, Outcomes]:
    """What `packed` has made JSON of."""
    return {
        part: {name: _array(column["type"], column["values"]) for name, column in outcomes.items()}
        for part, outcomes in json.loads(data).items()
    }


def _array(kind: str, values: list[Any]) -> NDArray[Any]:
    return np.array(values, dtype=kind) if kind != "|O" else objects(values)
