"""Only the head trains. The trunk is frozen and in eval mode, so its output is computed once and kept on disk.

How a head uses its trunk differs by architecture. What is cached is therefore found by watching: the input of the first
layer of the head that runs. Later passes put it in that layer's place, while the trunk is replaced by an empty answer.
It may be one array a row, or a vector for each of the row's tokens. A batch proves at the start that both ways give the
same answers; where they do not, the trunk simply runs each time, and the log says why.
"""

import inspect
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.adapt.base import Inputs, InputsOf, Method, Shortcut, freeze_statistics
from finetune_trainer.data.order import Rows
from finetune_trainer.model import Loaded, ModelError, outside_trunk, trunk_of
from finetune_trainer.world import World

CHUNK = 64
"""Rows whose features are computed together; fixed, because it decides bits."""
TOLERANCE = 1e-4
_PIXELS = "pixel_values"
_log = logging.getLogger(__name__)


class Uncached(Exception):
    """Why the trunk has to run each time."""


class Head(Method):
    def __init__(self) -> None:
        self._trains: set[str] = set()

    def prepare(self, loaded: Loaded, *, seed: int) -> Any:
        model = loaded.model
        self._trains = outside_trunk(model) | set(loaded.fresh)
        if not self._trains:
            raise ModelError(
                f"method.type head trains what lies above the trunk, and {type(model).__name__} has nothing there (its "
                "output layer is the embedding); use lora or full."
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trains)
        return model

    def train(self, model: Any) -> None:
        model.train()
        trunk_of(model).eval()
        freeze_statistics(model)

    def shortcut(
        self, model: Any, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> Shortcut | None:
        if not len(rows):
            return None
        model.eval()
        try:
            lacking = self._trains - outside_trunk(model)
            if lacking:
                raise Uncached(f"the base lacks {min(lacking)} in its trunk, which is trained, too")
            _same_each_time(inputs_of, rows[:2])
            tail = proven_tail(model, inputs_of(rows[:2]))
            features = _Features(tail, rows=rows, inputs_of=inputs_of, work=work, world=world, beat=beat)
        except Uncached as reason:
            _log.warning("the trunk's features are not cached, it runs each time: %s", reason)
            return None
        return Shortcut(tail, features.inputs_of)


class Tail(torch.nn.Module):
    """The model from the first layer of its head on: features -> the model's output.

    Features are [rows, *shape], or [rows, tokens, width] where `by_token`.
    """

    def __init__(
        self, model: Any, *, first: torch.nn.Module, answer: Any, features: torch.Tensor, given: Inputs
    ) -> None:
        super().__init__()
        self.model = model
        self._first = [first]  # in a list: not a second submodule
        self._answer = answer
        mask = given.get("attention_mask")
        self._tokens = mask.shape[1] if mask is not None else -1
        self.by_token = mask is not None and features.ndim == 3 and features.shape[:2] == mask.shape
        self.shape: tuple[int, ...] = tuple(features.shape[2:] if self.by_token else features.shape[1:])
        """Of what is kept for each row, or for each token."""

    def train(self, mode: bool = True) -> "Tail":
        super().train(mode)
        trunk_of(self.model).eval()
        freeze_statistics(self.model)
        return self

    def forward(self, features: torch.Tensor, **rest: Any) -> Any:
        first = True

        def inject(_module: Any, _inputs: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return (features,)
            return None

        if self.model.main_input_name == _PIXELS:
            rest[_PIXELS] = features.new_zeros(len(features), 3, 1, 1)
        hook = self._first[0].register_forward_pre_hook(inject)
        try:
            with _replaced(trunk_of(self.model), self._empty(len(features), rest)):
                return self.model(**rest)
        finally:
            hook.remove()

    def _empty(self, rows: int, given: Inputs) -> Any:
        """The trunk's answer with nothing in it, for so many rows and the tokens that are given."""
        tokens = given["attention_mask"].shape[1] if "attention_mask" in given else -1
        found: dict[str, torch.Tensor] = {}
        for name, value in self._answer.items():
            if isinstance(value, torch.Tensor):
                longer = value.ndim == 3 and value.shape[1] == self._tokens
                shape = (rows, tokens, value.shape[2]) if longer else (rows, *value.shape[1:])
                found[name] = value.new_zeros(shape)
        return type(self._answer)(**found)

    @torch.no_grad()
    def features(self, inputs: Inputs) -> torch.Tensor:
        """What the trunk gives the head: [rows, *shape], or [tokens of all rows, width]."""
        found = _watch(self.model, inputs)[1]
        return found[inputs["attention_mask"].bool()] if self.by_token else found


class _Features:
    """The trunk's features of some rows, on disk."""

    def __init__(
        self, tail: Tail, *, rows: Rows, inputs_of: InputsOf, work: Path, world: World, beat: Callable[[], None]
    ) -> None:
        self._tail, self._rows, self._inputs_of, self._world = tail, rows, inputs_of, world
        self._seen: dict[int, Inputs] | None = {} if tail.model.main_input_name == _PIXELS else None
        lengths = np.ones(len(rows), dtype=np.int64)
        if tail.by_token:
            found = []
            for _, chunk in self._chunks():
                beat()
                found.append(inputs_of(chunk)["attention_mask"].sum(1).cpu().numpy())
            lengths = np.concatenate(found)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        width = prod(tail.shape)
        size = int(self._offsets[-1]) * width * 4
        free = shutil.disk_usage(work).free
        if size > free // 2:
            raise Uncached(f"they take {size >> 20} MiB, more than half of what is free in {work} ({free >> 20} MiB)")
        path = work / "features.npy"
        self._cache = np.lib.format.open_memmap(
            path if world.leads_node else path.with_suffix(f".{world.local_rank}"),
            mode="w+",
            dtype=np.float32,
            shape=(int(self._offsets[-1]), width),
        )
        self._fill(beat)
        self._places = np.full(int(rows.max()) + 1, -1, dtype=np.int64)
        self._places[rows] = np.arange(len(rows))

    def _chunks(self) -> Iterator[tuple[int, Rows]]:
        return ((start, self._rows[start : start + CHUNK]) for start in range(0, len(self._rows), CHUNK))

    def _fill(self, beat: Callable[[], None]) -> None:
        """Compute all features, each chunk on one rank, the longest rows first."""
        world, width = self._world, self._cache.shape[1]
        for number, (start, chunk) in enumerate(self._chunks()):
            beat()
            low, high = self._offsets[start], self._offsets[start + len(chunk)]
            source = number % world.size
            if world.rank == source:
                features = self._tail.features(self._inputs_of(chunk)).float().reshape(-1, width).contiguous()
            else:
                features = torch.empty(int(high - low), width, device=world.device)
            self._cache[low:high] = world.spread(features, source=source).cpu().numpy()

    def inputs_of(self, wanted: Rows) -> Inputs:
        """A micro-batch as the tail and the task want it."""
        inputs = self._others(wanted)
        kept = self._read(self._places[wanted])
        if self._tail.by_token:
            mask = inputs["attention_mask"].bool()
            features = kept.new_zeros(*mask.shape, *self._tail.shape)
            features[mask] = kept
        else:
            features = kept.reshape(len(wanted), *self._tail.shape)
        return {**inputs, "features": features}

    def _others(self, wanted: Rows) -> Inputs:
        """All that is not features. An image is decoded once for that, then its row is remembered."""
        if self._seen is None:
            return self._inputs_of(wanted)
        missing = np.array([row for row in wanted if int(row) not in self._seen], dtype=np.int64)
        if len(missing):
            inputs = {name: value for name, value in self._inputs_of(missing).items() if name != _PIXELS}
            for number, row in enumerate(missing):
                self._seen[int(row)] = {name: value[number] for name, value in inputs.items()}
        rows = [self._seen[int(row)] for row in wanted]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _read(self, places: NDArray[np.int64]) -> torch.Tensor:
        parts = [self._cache[self._offsets[place] : self._offsets[place + 1]] for place in places]
        return torch.from_numpy(np.concatenate(parts)).to(self._world.device)


def _same_each_time(inputs_of: InputsOf, rows: Rows) -> None:
    """Raises Uncached where a row does not always look the same, such as an image that is flipped at random."""
    seen = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        seen.append(inputs_of(rows))
    if not all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0]):
        raise Uncached("rows look different each time they are read (augmentation)")


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
        model(**_for_model(model, inputs))
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    module, value = seen[0]
    return module, value, answers[0]


@torch.no_grad()
def proven_tail(model: Any, inputs: Inputs) -> Tail:
    """The tail of a model, proven on a batch. Raises Uncached."""
    kind = type(model).__name__
    given = _for_model(model, inputs)
    try:
        first, features, answer = _watch(model, inputs)
        tail = Tail(model, first=first, answer=answer, features=features, given=given).eval()
        found, wanted = tail(features, **given), model(**given)
    except Exception as error:  # whatever an architecture does with an empty trunk: the plain way always works
        raise Uncached(f"the head of {kind} cannot run without its trunk ({error})") from error
    for name, value in wanted.items():
        if "logits" in name and not _alike(found[name], value, given if tail.by_token else {}):
            raise Uncached(f"the head of {kind} needs all of its trunk")
    return tail


def _alike(one: torch.Tensor, other: torch.Tensor, given: Inputs) -> bool:
    """Whether logits agree, those of padding aside."""
    mask = given.get("attention_mask")
    if mask is not None and other.shape[:2] == mask.shape:
        one, other = one[mask.bool()], other[mask.bool()]
    return one.shape == other.shape and float((one - other).abs().max()) <= TOLERANCE


def _for_model(model: Any, inputs: Inputs) -> Inputs:
    """What the trunk reads of a micro-batch: the rest is the truth."""
    known = inspect.signature(trunk_of(model).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


@contextmanager
def _replaced(trunk: torch.nn.Module, answer: Any) -> Iterator[None]:
    """Let a module answer without computing."""
    trunk.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del trunk.forward
