"""Losses of a causal language model at its labelled positions alone, without the logits of all others.

Logits are what costs most: a vocabulary is a hundred times as wide as a model. The model runs with its output layer
replaced by nothing, so that it answers with the states below; labelled ones go through the output layer, a chunk at a
time, and in training each chunk's logits are computed again in the backward pass instead of kept.

That is right where the output layer comes last. Some architectures do more (soft-capping), so it is proven on the first
batch of each model against the model's own logits, with states so large that any curve shows; where it does not hold,
all logits are computed. The same batch shows whether the model sees the tokens that it is to predict.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint

from finetune_trainer.layers import plain_of
from finetune_trainer.model import ModelError

IGNORED = -100
CELLS = 1 << 24
"""Logits computed together: 64 MiB in fp32."""
_ROWS, _TOKENS = 2, 32
"""How much of a batch the proof takes."""
_LARGE = 100.0
_CLOSE = 1e-5
_log = logging.getLogger(__name__)
Inputs = Mapping[str, Any]
Linear = Callable[[torch.Tensor], torch.Tensor]


class NextToken:
    """Next-token losses of any number of models. Labels are as transformers has them: a position's label is what the
    position before it is to predict, or IGNORED."""

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
        """Whether a model's output layer comes last."""

    def loss(self, model: Any, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
        """The sum over labelled positions, in fp32 or what is wider. Raises ModelError."""
        states, targets, head = self._states(model, inputs, labels)
        pieces = list(_chunks(states, targets, head))
        total = states.sum().float() * 0.0 if not pieces else None
        for piece, wanted in pieces:
            if len(pieces) > 1 and torch.is_grad_enabled():
                found = checkpoint(_loss, head, piece, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                found = _loss(head, piece, wanted)
            total = found if total is None else total + found
        assert total is not None
        return total

    def row_losses(self, model: Any, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
        """The sum over the labelled positions of each row: [rows]. Raises ModelError."""
        states, targets, head = self._states(model, inputs, labels)
        pieces = list(_chunks(states, targets, head))
        found = []
        for piece, wanted in pieces:
            if len(pieces) > 1 and torch.is_grad_enabled():
                found.append(checkpoint(_each, head, piece, wanted, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(_each(head, piece, wanted))
        losses = torch.cat(found)
        rows = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
        return torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, rows, losses)

    @torch.no_grad()
    def scores(self, model: Any, inputs: Inputs, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, and whether the likeliest token is the right one, float64 and bool [rows, positions - 1], 0 and false
        where there is no label. Raises ModelError."""
        states, targets, head = self._states(model, inputs, labels)
        wanted = labels[:, 1:] != IGNORED
        losses = torch.zeros(wanted.shape, dtype=torch.float64, device=labels.device)
        hits = torch.zeros_like(wanted)
        if len(targets):
            found = [_judged(head(piece), right) for piece, right in _chunks(states, targets, head)]
            losses[wanted] = torch.cat([loss for loss, _ in found])
            hits[wanted] = torch.cat([hit for _, hit in found])
        return losses, hits

    def _states(self, model: Any, inputs: Inputs, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Linear]:
        """States [labelled positions, width], their targets, and what makes logits of states."""
        if model not in self._last:
            self._last[model] = _proven(model, inputs)
        wanted = labels[:, 1:] != IGNORED
        targets = labels[:, 1:][wanted]
        if not self._last[model]:
            return _answer(model, inputs)[:, :-1][wanted], targets, _same
        head = _head(model)
        with _replaced(head, _same):
            states = _answer(model, inputs)
        return states[:, :-1][wanted], targets, head


def _chunks(states: torch.Tensor, targets: torch.Tensor, head: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    width = states.shape[-1] if head is _same else head.weight.shape[0]
    size = max(1, CELLS // width)
    for start in range(0, len(targets), size):
        yield states[start : start + size], targets[start : start + size]


def _loss(head: Linear, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(_wide(head(states)), targets, reduction="sum")


def _each(head: Linear, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(_wide(head(states)), targets, reduction="none")


def _judged(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _wide(logits)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.double(), logits.argmax(-1) == targets


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.element_size() < 4 else logits


def _answer(model: Any, inputs: Inputs) -> torch.Tensor:
    """The logits of a pass without a cache: a cache would keep packed rows from being told apart."""
    found: torch.Tensor = model(**inputs, use_cache=False).logits
    return found


def _head(model: Any) -> Any:
    return plain_of(model).get_output_embeddings()


def _same(states: torch.Tensor) -> torch.Tensor:
    return states


@contextmanager
def _replaced(module: Any, forward: Linear) -> Iterator[None]:
    """Let a module compute something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


# --- the proof ---


@torch.no_grad()
def _proven(model: Any, inputs: Inputs) -> bool:
    """Whether the output layer comes last. Raises ModelError when the model is not causal."""
    few = {name: value[:_ROWS, :_TOKENS] for name, value in inputs.items()}
    training = {module: module.training for module in model.modules()}
    model.eval()  # and so nothing is drawn from the random generators
    try:
        with torch.autocast(few["input_ids"].device.type, enabled=False):
            _check_causal(model, few)
            return _head_is_last(model, few)
    finally:
        for module, was in training.items():
            module.training = was


def _check_causal(model: Any, inputs: Inputs) -> None:
    ids = inputs["input_ids"]
    if ids.shape[1] < 2:
        return
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    before = _answer(model, inputs)[:, :-1]
    after = _answer(model, {**inputs, "input_ids": other})[:, :-1]
    if float((before - after).abs().max()) > 1e-3 * float(before.abs().max()):
        raise ModelError(
            f"{type(plain_of(model)).__name__} sees the tokens that it is to predict, so it is no causal language "
            "model: give a base such as GPT-2 or Llama."
        )


def _head_is_last(model: Any, inputs: Inputs) -> bool:
    head = _head(model)
    if head is None or not hasattr(head, "weight"):
        return False
    compute = head.forward
    try:
        factor = _LARGE / float(_answer(model, inputs).abs().max())
        with _replaced(head, lambda states: compute(states * factor)):
            wanted = _answer(model, inputs)
        with _replaced(head, lambda states: states * factor):
            found = compute(_answer(model, inputs))
    except Exception as error:  # whatever an architecture does with its states: the plain way always works
        _log.info("all logits of %s are computed: %s", type(plain_of(model)).__name__, error)
        return False
    holds = found.shape == wanted.shape and float((found - wanted).abs().max()) <= _CLOSE * _LARGE
    if not holds:
        _log.info("all logits of %s are computed: it does more than its output layer", type(plain_of(model)).__name__)
    return holds


# --- packing ---


@torch.no_grad()
def packing_differs(model: Any, packed: Inputs, alone: list[Inputs], *, tolerance: float = 1e-4) -> str | None:
    """Why rows must not be packed, or None: the logits of rows in one sequence against those of each by itself.

    `packed` holds one sequence of all rows of `alone` in order, and perhaps padding behind them. The tolerance is a
    share of the largest logit. Sets the model to eval mode.
    """
    model.eval()
    name = type(plain_of(model)).__name__
    try:
        with torch.autocast(packed["input_ids"].device.type, enabled=False):
            together = _answer(model, packed)[0]
            apart = torch.cat([_answer(model, row)[0] for row in alone])
    except Exception as error:  # an architecture that takes no positions
        return f"{name} cannot read packed rows ({str(error).strip().partition(chr(10))[0][:120]})"
    worst = float((together[: len(apart)] - apart).abs().max() / apart.abs().max())
    return (
        None
        if worst <= tolerance
        else f"{name} answers packed rows otherwise than alone (by {worst:.2g} of its logits)"
    )
