"""Only the head trains. The trunk is frozen and in eval mode, so its output is computed once and kept on disk.

How a head uses its trunk differs by architecture. What is cached is therefore found by watching: the input of the first
layer of the head that runs. Where that is one vector a row, it is kept, and later passes put it in that layer's place
while the trunk is replaced by an empty answer. One batch proves at the start that both ways give the same logits; where
they do not, or where the head reads whole sequences, the trunk simply runs each time.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_trainer.adapt.base import Inputs, InputsOf, Method, Shortcut, freeze_statistics
from finetune_trainer.data.order import Rows
from finetune_trainer.model import Loaded, outside_trunk, trunk_of
from finetune_trainer.world import World

CHUNK = 64
"""Rows whose features are computed together; fixed, because it decides bits."""
TOLERANCE = 1e-4
_log = logging.getLogger(__name__)


class Head(Method):
    def __init__(self) -> None:
        self._trains: set[str] = set()

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        self._trains = outside_trunk(loaded.model) | set(loaded.fresh)
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_(name in self._trains)
        return loaded.model

    def train(self, model: Any) -> None:
        model.train()
        trunk_of(model).eval()
        freeze_statistics(model)

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        if self._trains - outside_trunk(model) or not len(rows):
            return None
        model.eval()
        tail = _tail(model, inputs_of(rows[:2]))
        if tail is None:
            _log.info("the trunk's features are not cached: the head of %s needs all of it", type(model).__name__)
            return None
        path = work / "features.npy"
        size = len(rows) * tail.width * 4
        if size > shutil.disk_usage(work).free // 2:
            _log.warning("the trunk's features are not cached: they take %d MiB, too much for %s", size >> 20, work)
            return None
        cache = np.lib.format.open_memmap(
            path if world.leads_node else path.with_suffix(f".{world.local_rank}"),
            mode="w+",
            dtype=np.float32,
            shape=(len(rows), tail.width),
        )
        _fill(cache, tail, rows=rows, inputs_of=inputs_of, world=world, beat=beat)
        places = np.full(int(rows.max()) + 1, -1, dtype=np.int64)
        places[rows] = np.arange(len(rows))

        def cached(wanted: Rows) -> Inputs:
            labels = inputs_of(wanted)["labels"]
            return {"features": torch.from_numpy(cache[places[wanted]]).to(world.device), "labels": labels}

        return Shortcut(tail, cached)


class Tail(torch.nn.Module):
    """The model from the first layer of its head on: features [rows, width] -> logits."""

    def __init__(self, model: Any, *, first: torch.nn.Module, answer: Any, width: int) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._first = [first]  # in a list: not a second submodule
        self._answer = answer

    def train(self, mode: bool = True) -> "Tail":
        super().train(mode)
        trunk_of(self.model).eval()
        freeze_statistics(self.model)
        return self

    def forward(self, features: torch.Tensor) -> Any:
        trunk = trunk_of(self.model)
        empty = _emptied(self._answer, features)
        ids = torch.zeros(len(features), 1, dtype=torch.long, device=features.device)
        first = True

        def inject(_module: Any, _inputs: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return (features,)
            return None

        hook = self._first[0].register_forward_pre_hook(inject)
        try:
            with _replaced(trunk, empty):
                return self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            hook.remove()

    @torch.no_grad()
    def features(self, inputs: Inputs) -> torch.Tensor:
        """What the trunk gives the head."""
        return _watch(self.model, inputs)[1]


class _Seen(Exception):
    """Ends a forward pass early."""


def _watch(model: Any, inputs: Inputs) -> tuple[torch.nn.Module, torch.Tensor, Any]:
    """The first leaf of the head that runs, its input, and the trunk's answer."""
    inside = set(trunk_of(model).modules())
    leaves = [module for module in model.modules() if module not in inside and not list(module.children())]
    seen: list[Any] = []
    answers: list[Any] = []

    def look(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        seen.append((module, given[0]))
        raise _Seen

    hooks = [leaf.register_forward_pre_hook(look) for leaf in leaves]
    hooks.append(trunk_of(model).register_forward_hook(lambda _module, _inputs, answer: answers.append(answer)))
    try:
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    module, value = seen[0]
    return module, value, answers[0]


@torch.no_grad()
def _tail(model: Any, inputs: Inputs) -> Tail | None:
    """The tail of a model, if it exists and is proven on a batch."""
    try:
        first, features, answer = _watch(model, inputs)
        if features.ndim != 2:
            return None
        tail = Tail(model, first=first, answer=answer, width=features.shape[1]).eval()
        logits = tail(features).logits
        wanted = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    except Exception as error:  # whatever an architecture does with an empty trunk: the plain way always works
        _log.info("no short way through %s: %s", type(model).__name__, error)
        return None
    return tail if logits.shape == wanted.shape and float((logits - wanted).abs().max()) <= TOLERANCE else None


def _emptied(answer: Any, features: torch.Tensor) -> Any:
    """The trunk's answer with nothing in it, for as many rows and one token."""
    found: dict[str, torch.Tensor] = {}
    for name, value in answer.items():
        if isinstance(value, torch.Tensor):
            shape = (len(features), *((1,) if value.ndim == 3 else ()), value.shape[-1])
            found[name] = torch.zeros(shape, dtype=value.dtype, device=features.device)
    return type(answer)(**found)


@contextmanager
def _replaced(trunk: torch.nn.Module, answer: Any) -> Iterator[None]:
    """Let a module answer without computing."""
    trunk.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del trunk.forward


def _fill(cache: Any, tail: Tail, *, rows: Rows, inputs_of: InputsOf, world: World, beat: Callable[[], None]) -> None:
    """Compute all features, each chunk on one rank, the longest rows first."""
    for number, start in enumerate(range(0, len(rows), CHUNK)):
        beat()
        chunk = rows[start : start + CHUNK]
        source = number % world.size
        if world.rank == source:
            features = tail.features(inputs_of(chunk)).float().contiguous()
        else:
            features = torch.empty(len(chunk), tail.width, device=world.device)
        cache[start : start + CHUNK] = world.spread(features, source=source).cpu().numpy()
