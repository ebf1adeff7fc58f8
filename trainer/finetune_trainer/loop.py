"""The training loop: optimizer steps, and after each what is due. Short enough to read in one sitting.

The unit of work is the micro-batch. A step's batch is cut into pieces with numbers; rank r of W takes the pieces r,
r + W and so on, and all generators are seeded from (seed, step, number) before each, so that neither the number of
ranks nor a resume changes what is computed. The loss of a step is the sum over all labelled positions, divided by their
number, which is known before the first piece runs.

Nothing here waits for the device in each step: losses stay there until somebody needs them. What changes the course is
combined over the ranks while the gradients are, and so falls at the same step on all of them.
"""

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from finetune_api.contract import TrainingConfig
from finetune_trainer.adapt.base import InputsOf
from finetune_trainer.checkpoint import State
from finetune_trainer.course import Diverged, OutOfMemory, Plan, is_out_of_memory
from finetune_trainer.data.order import Order, Rows, derive, micro_batches
from finetune_trainer.optim import learning_rate, set_learning_rate
from finetune_trainer.signs import Stopped
from finetune_trainer.tasks import Learner, Metrics
from finetune_trainer.world import Flags, World


class Objective(torch.nn.Module):
    """Model and loss in one module, so that the wrapped forward returns one number and never logits."""

    def __init__(self, model: torch.nn.Module, learner: Learner) -> None:
        super().__init__()
        self.model = model
        self.learner = learner

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.learner.loss(self.model, inputs)
        return loss


@dataclass
class Setup:
    """Everything that optimizer steps need."""

    world: World
    accelerator: Any
    objective: Any
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    config: TrainingConfig
    plan: Plan
    order: Order
    rows: Rows
    """What batches are made of, by numbers that `shares` and `inputs_of` take: rows of the encoded store, or packs of
    them. The order counts them from 0."""
    shares: Callable[[Rows], list[tuple[Rows, float]]]
    """The groups of a step's rows that share no micro-batch, each with what the sum of its loss is divided by."""
    inputs_of: InputsOf
    train_mode: Callable[[], None]
    beat: Callable[[], None]
    before_step: Callable[[int], None] = lambda step: None
    """What trains may depend on the step."""
    after_step: Callable[[int], None] = lambda step: None
    """Given the number of steps done; changes the weights or looks at them."""


class Surroundings(Protocol):
    """What the loop calls on. `due` speaks for this rank; the rest is called at the same step on all ranks."""

    def due(self) -> tuple[bool, bool, bool, bool]:
        """Whether to stop, to checkpoint, to report, after the step that begins now; whether to hold in it."""
        ...

    def hold(self) -> None:
        """Wait for the checkpoint that is on its way: a kill would cost too much with this step."""
        ...

    def evaluate(self) -> Metrics:
        """Metrics of the weights on the validation rows. Raises Stopped when a stop comes in between."""
        ...

    def checkpoint(self, state: State) -> None: ...

    def report(self, state: State) -> None: ...


@dataclass
class Pending:
    """Losses and gradient norms of steps that have not been looked at, on the device."""

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def settle(self, state: State, world: World) -> None:
        """Move them into the state. Raises Diverged. The only wait for the device."""
        if not self.losses:
            return
        losses = world.total(torch.stack(self.losses)).tolist()
        norms = torch.stack(self.norms).tolist()
        first = len(state.losses) + 1
        self.losses, self.norms = [], []
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            for what, value in (("loss", loss), ("gradient", norm)):
                if not math.isfinite(value):
                    raise Diverged(first + number, what)
        state.losses += losses


def train(setup: Setup, state: State, around: Surroundings) -> None:
    """Train from `state` to the plan's end or an early stop, keeping `state` up to date.

    Raises Stopped, Diverged, OutOfMemory, and what `around` raises.
    """
    plan, pending = setup.plan, Pending()
    setup.train_mode()
    if plan.evaluates(state.step) and not state.evaluated:  # the stop came before the evaluation
        _evaluate(setup, state, around)
        around.checkpoint(state)
    while state.step < plan.total and not state.stopped_early:
        flags = setup.world.flags(around.due())
        pending.add(*step(setup, state, before_update=partial(_hold, flags, around)))
        state.step += 1
        stop, checkpoint, report, _ = flags.wait()
        last, evaluates = state.step == plan.total, plan.evaluates(state.step)
        if stop or checkpoint or report or last or evaluates:
            pending.settle(state, setup.world)
            around.report(state)
        if evaluates and not stop:
            try:
                checkpoint |= _evaluate(setup, state, around)
            except Stopped:
                stop = True
        if stop or checkpoint or last or state.stopped_early:
            around.checkpoint(state)
        if stop:
            raise Stopped


def _hold(flags: Flags, around: Surroundings) -> None:
    if flags.wait()[-1]:
        around.hold()


def _evaluate(setup: Setup, state: State, around: Surroundings) -> bool:
    improved = setup.plan.judge(state, around.evaluate())
    setup.train_mode()
    return improved


def step(
    setup: Setup, state: State, before_update: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: this rank's share of the loss, and the norm of the whole gradient. Raises OutOfMemory.

    Out of memory, a lone rank tries again with half the micro-batch; nothing has been changed by then.
    """
    setup.before_step(state.step)
    while True:
        try:
            loss = _gradients(setup, state)
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if setup.world.size > 1 or state.micro_batch == 1:
                raise OutOfMemory(state.micro_batch) from error
            state.micro_batch //= 2
            if setup.world.device.type == "cuda":
                torch.cuda.empty_cache()
    before_update()
    norm = torch.nn.utils.clip_grad_norm_(setup.parameters, setup.config.max_grad_norm)
    set_learning_rate(setup.optimizer, learning_rate(setup.config, step=state.step, total=setup.plan.total))
    setup.optimizer.step()
    setup.after_step(state.step + 1)
    return loss, norm


def _gradients(setup: Setup, state: State) -> torch.Tensor:
    world, accelerator = setup.world, setup.accelerator
    batch = setup.rows[setup.order.batch(state.step)]
    shares = setup.shares(batch)
    pieces = micro_batches(shares, size=state.micro_batch, rank=world.rank, ranks=world.size)
    # A rank left without a piece joins the reduction with a row that counts nothing.
    work = [(number, rows, world.size / count) for number, rows, count in pieces] or [(-1, batch[:1], 0.0)]
    total = torch.zeros((), device=world.device)
    setup.optimizer.zero_grad(set_to_none=True)
    for place, (number, rows, weight) in enumerate(work):
        setup.beat()
        seed_all(derive(setup.config.seed, "micro-batch", state.step, number))
        alone = place == len(work) - 1  # gradients are reduced once a step, with the last piece
        with nullcontext() if alone else accelerator.no_sync(setup.objective):
            loss = setup.objective(setup.inputs_of(rows))
            accelerator.backward(loss * weight)  # the reduction divides by the number of ranks
        total = total + loss.detach() * (weight / world.size)
    return total


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
