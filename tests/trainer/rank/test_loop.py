"""The loop against a plain one, and what it does when something is wrong."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.memory import Memory, learner_of

from finetune_api.contract import TrainingConfig
from finetune_trainer import checkpoint
from finetune_trainer.checkpoint import State
from finetune_trainer.course import Diverged, OutOfMemory, Plan, is_gpu_memory, is_out_of_memory
from finetune_trainer.data.order import Order
from finetune_trainer.loop import Objective, Setup, train
from finetune_trainer.model import load
from finetune_trainer.optim import make_optimizer
from finetune_trainer.signs import Stopped
from finetune_trainer.tasks import Learner
from finetune_trainer.tasks.text_classification import ONE
from finetune_trainer.world import World

LEARNER = learner_of(labels=["a", "b", "c"], form=ONE)
ROWS, BATCH = 83, 8


def config(**changed: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "epochs": None,
        "max_steps": 50,
        "batch_size": BATCH,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_percent": 10.0,
        "warmup_steps": None,
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "precision": "fp32",
        "micro_batch": 3,
        "seed": 5,
        "evaluate_steps": 1000,
        "evaluate_epochs": None,
        "patience": None,
        "min_delta": 0.0,
        **changed,
    }
    return TrainingConfig(**values)


class Data:
    """Rows of random tokens with a random label of three."""

    def __init__(self) -> None:
        draw = np.random.default_rng(1)
        self.texts = [draw.integers(4, 19, size).astype(np.int32) for size in draw.integers(2, 20, ROWS)]
        labels = draw.integers(0, 3, ROWS).astype(np.int32)
        self.store = Memory(input_ids=self.texts, labels=labels[:, None])
        self.order = Order(ROWS, BATCH, 5, np.array([len(text) for text in self.texts]))

    def inputs_of(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = LEARNER.collate(self.store, rows)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def model_in(tiny_base: Path, *, dtype: torch.dtype, dropout: bool) -> Any:
    model = load(tiny_base, learner=LEARNER, seed=5).model.to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
        if hasattr(module, "dropout_prob") and not dropout:
            module.dropout_prob = 0.0
    return model


class Quiet:
    """Surroundings without a clock; a stop and a wait where a test wants them."""

    def __init__(
        self, stop_at: int | None = None, hold_at: int | None = None, held: Callable[[], None] = lambda: None
    ) -> None:
        self.calls, self.stop_at, self.hold_at, self.held = 0, stop_at, hold_at, held
        self.saved: list[int] = []

    def due(self) -> tuple[bool, bool, bool, bool]:
        self.calls += 1
        return self.calls == self.stop_at, False, False, self.calls == self.hold_at

    def hold(self) -> None:
        self.held()

    def evaluate(self) -> dict[str, float]:
        return {"f1": 0.5, "loss": 1.0}

    def checkpoint(self, state: State) -> None:
        self.saved.append(state.step)

    def report(self, state: State) -> None:
        pass


def setup_of(
    model: Any,
    data: Data,
    settings: TrainingConfig,
    *,
    objective: Any = None,
    plan: Plan | None = None,
    stored: checkpoint.Tensors | None = None,
    anchored: Collection[str] = (),
    learner: Learner = LEARNER,
) -> Setup:
    """A setup over the whole model, whose optimizer goes on from what is `stored`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    optimizer = make_optimizer(model, settings, anchored=anchored)
    checkpoint.restore_optimizer(model, optimizer, stored or {})
    wrapped, prepared = accelerator.prepare(objective or Objective(model, LEARNER), optimizer)
    return Setup(
        world=World(),
        accelerator=accelerator,
        objective=wrapped,
        optimizer=prepared,
        parameters=list(model.parameters()),
        config=settings,
        plan=plan or Plan(settings.max_steps or 1, None, "f1", True),
        order=data.order,
        rows=np.arange(ROWS),
        shares=lambda rows: learner.shares(data.store, rows),
        inputs_of=data.inputs_of,
        train_mode=model.train,
        beat=lambda: None,
    )


def reference(model: Any, data: Data, settings: TrainingConfig) -> list[float]:
    """A plain loop: whole batches, the mean by cross_entropy, AdamW and the schedule as everybody writes them."""
    from transformers import get_linear_schedule_with_warmup

    plain = {name: p for name, p in model.named_parameters() if "bias" in name or "LayerNorm" in name}
    rest = [p for name, p in model.named_parameters() if name not in plain]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": list(plain.values()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, foreach=False, fused=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, 50)
    model.train()
    losses = []
    for step in range(50):
        inputs = data.inputs_of(data.order.batch(step))
        labels = inputs.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_fifty_steps_equal_a_plain_loop(tiny_base: Path, dtype: torch.dtype, tolerance: float) -> None:
    data, state = Data(), State(micro_batch=3)
    train(setup_of(model := model_in(tiny_base, dtype=dtype, dropout=False), data, config()), state, Quiet())
    other = model_in(tiny_base, dtype=dtype, dropout=False)
    assert state.losses == pytest.approx(reference(other, data, config()), rel=tolerance)
    assert state.losses[-1] < state.losses[0]
    if dtype is torch.float64:
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_dropout_is_on_from_the_first_step_and_the_same_for_equal_seeds(tiny_base: Path) -> None:
    def losses(*, dropout: bool, seed: int = 5) -> list[float]:
        state = State(micro_batch=3)
        settings = config(max_steps=2, seed=seed)
        model = model_in(tiny_base, dtype=torch.float32, dropout=dropout)
        train(setup_of(model, Data(), settings), state, Quiet())
        return state.losses

    assert losses(dropout=True) == losses(dropout=True)
    assert losses(dropout=True)[0] != losses(dropout=False)[0]
    assert losses(dropout=True)[0] != losses(dropout=True, seed=6)[0]


class Tight(Objective):
    """Memory for four rows."""

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(inputs["labels"]) > 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return super().forward(inputs)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(tiny_base: Path) -> None:
    def losses(micro: int, kind: type[Objective]) -> tuple[list[float], int]:
        model, state = model_in(tiny_base, dtype=torch.float32, dropout=False), State(micro_batch=micro)
        train(setup_of(model, Data(), config(max_steps=5), objective=kind(model, LEARNER)), state, Quiet())
        return state.losses, state.micro_batch

    assert losses(8, Tight) == losses(4, Objective)


def test_a_row_that_does_not_fit_ends_the_run(tiny_base: Path) -> None:
    class Full(Objective):
        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            raise MemoryError

    model = model_in(tiny_base, dtype=torch.float32, dropout=False)
    with pytest.raises(OutOfMemory, match="micro-batches of 1 rows"):
        train(setup_of(model, Data(), config(), objective=Full(model, LEARNER)), State(micro_batch=3), Quiet())


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "host"),
        (MemoryError(), "host"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (ValueError("CUDA error: out of memory"), None),
    ],
)
def test_errors_of_memory_are_told_from_others_and_a_gpus_from_the_hosts(error: Exception, whose: str | None) -> None:
    assert is_out_of_memory(error) is (whose is not None)
    assert is_gpu_memory(error) is (whose == "GPU")


def test_the_step_that_diverged_is_named(tiny_base: Path) -> None:
    class Breaks(Objective):
        calls = 0

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            loss = super().forward(inputs)
            self.calls += 1
            return loss * torch.nan if self.calls == 7 else loss

    model, around = model_in(tiny_base, dtype=torch.float32, dropout=False), Quiet()
    with pytest.raises(Diverged, match="the loss of step 3 is NaN"):
        train(setup_of(model, Data(), config(), objective=Breaks(model, LEARNER)), State(micro_batch=3), around)
    assert around.saved == []


def vector(model: Any) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_a_step_that_must_wait_for_a_checkpoint_changes_nothing_before_it_has(tiny_base: Path) -> None:
    model, state = model_in(tiny_base, dtype=torch.float32, dropout=False), State(micro_batch=3)
    seen: list[tuple[int, torch.Tensor]] = []

    def look() -> None:
        seen.append((state.step, vector(model)))

    with pytest.raises(Stopped):
        train(setup_of(model, Data(), config()), state, Quiet(stop_at=2, hold_at=2, held=look))
    ((step, weights),) = seen
    assert (step, state.step) == (1, 2)
    assert not torch.equal(weights, vector(model))
    model, again = model_in(tiny_base, dtype=torch.float32, dropout=False), State(micro_batch=3)
    with pytest.raises(Stopped):
        train(setup_of(model, Data(), config()), again, Quiet(stop_at=1))
    assert torch.equal(weights, vector(model))


def test_a_stop_is_committed_at_the_next_step_boundary(tiny_base: Path) -> None:
    model, around, state = (
        model_in(tiny_base, dtype=torch.float32, dropout=False),
        Quiet(stop_at=4),
        State(micro_batch=3),
    )
    plan = Plan(50, 4, "f1", True)
    with pytest.raises(Stopped):
        train(setup_of(model, Data(), config(), plan=plan), state, around)
    assert (state.step, around.saved, len(state.losses)) == (4, [4], 4)
    assert not state.evaluated  # there is little time; the attempt that goes on does it first
    with pytest.raises(Stopped):
        train(setup_of(model, Data(), config(), plan=plan), state, again := Quiet(stop_at=1))
    assert [entry["step"] for entry in state.evaluations] == [4]
    assert again.saved == [4, 5]


def test_improvements_and_patience() -> None:
    plan, state = Plan(100, 10, "loss", False, patience=2, min_delta=0.1), State()
    assert plan.judge(state, {"loss": 1.0})
    assert not plan.judge(state, {"loss": 0.95})
    assert plan.judge(state, {"loss": 0.85})
    assert state.stale == 0
    for _ in range(2):
        assert not plan.judge(state, {"loss": 0.9})
    assert state.stopped_early
    with pytest.raises(Diverged):
        plan.judge(state, {"loss": float("nan")})
    plan, state = Plan(100, 10, "pearson", True), State()
    assert not plan.judge(state, {"pearson": float("nan"), "loss": 1.0})
    assert state.best is None
    assert plan.judge(state, {"pearson": -0.5, "perplexity": float("inf"), "loss": 1000.0})
    assert not plan.judge(state, {"pearson": float("nan"), "loss": 1.0})
    assert state.best is not None
    assert state.best.value == -0.5
    assert [entry["metrics"] for entry in state.evaluations] == [
        {"loss": 1.0},
        {"pearson": -0.5, "loss": 1000.0},
        {"loss": 1.0},
    ]
    assert [step for step in range(26) if Plan(25, 10, "f1", True).evaluates(step)] == [10, 20, 25]
    assert not any(Plan(25, None, "f1", True).evaluates(step) for step in range(26))
