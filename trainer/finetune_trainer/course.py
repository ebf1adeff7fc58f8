"""The course of a run: how long it is, what ends it, and which evaluation is the best."""

import math
from dataclasses import dataclass

import torch

from finetune_trainer.checkpoint import Best, State
from finetune_trainer.tasks import Metrics


class Diverged(Exception):
    """The loss or the gradient of a step became NaN or infinite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"the {what} of step {step} is NaN or infinite")
        self.step = step


class OutOfMemory(Exception):
    """A single row does not fit, or one of several ranks ran out of memory: the next attempt halves the micro-batch."""

    def __init__(self, micro_batch: int) -> None:
        super().__init__(f"micro-batches of {micro_batch} rows do not fit into memory")
        self.micro_batch = micro_batch


_HOST_SAYS = "allocate memory"
_GPU_SAYS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Where it is not torch's own allocator that fails, but the driver or a library: another program holds the memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on the CPU torch says so in a plain RuntimeError."""
    if isinstance(error, MemoryError) or _of_gpu(error):
        return True
    return isinstance(error, RuntimeError) and _HOST_SAYS in str(error)


def is_gpu_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is used up and not the host's, for errors of is_out_of_memory and OutOfMemory."""
    return any(_of_gpu(one) for one in (error, error.__cause__))


def _of_gpu(error: BaseException | None) -> bool:
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _GPU_SAYS)
    return said or isinstance(error, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Plan:
    """How long a run is, when it is evaluated, and what an improvement is."""

    total: int
    evaluate_every: int | None
    """None: there are no validation rows."""
    metric: str
    higher_is_better: bool
    patience: int | None = None
    min_delta: float = 0.0

    def evaluates(self, step: int) -> bool:
        return self.evaluate_every is not None and step > 0 and (step % self.evaluate_every == 0 or step == self.total)

    def judge(self, state: State, metrics: Metrics) -> bool:
        """Write an evaluation into the state; whether it is the best so far. Raises Diverged for a loss of NaN.

        Other metrics may be undefined (a correlation with answers that are all alike) or too large for a number (a
        perplexity): those are left out, and where it is this plan's metric the evaluation is no improvement.
        """
        if not math.isfinite(metrics.get("loss", 0.0)):
            raise Diverged(state.step, "evaluation")
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        state.evaluations.append({"step": state.step, "metrics": finite})
        value, best = finite.get(self.metric, math.nan), state.best
        gain = math.inf if best is None else (value - best.value if self.higher_is_better else best.value - value)
        improved = math.isfinite(value) and gain > self.min_delta
        if improved:
            state.best = Best(state.step, self.metric, value)
        state.stale = 0 if improved else state.stale + 1
        state.stopped_early = self.patience is not None and state.stale >= self.patience and state.step < self.total
        return improved
