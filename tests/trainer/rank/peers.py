"""What everybody's trainer computes on the batches that ours saw: the reference for every task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune_api.contract import TrainingConfig
from finetune_trainer.checkpoint import State
from finetune_trainer.course import Plan
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Order
from finetune_trainer.loop import Objective, Setup, train
from finetune_trainer.optim import make_optimizer, warmup_steps
from finetune_trainer.tasks import Learner
from finetune_trainer.world import World

OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine_with_min_lr",
    "constant": "constant_with_warmup",
    "polynomial": "polynomial",
    "inverse-sqrt": "inverse_sqrt",
}
"""Of what is in the contract, by their names in transformers; it has no one-cycle, and its sgd has no momentum."""


class _Quiet:
    """Surroundings of a loop that only trains."""

    def due(self) -> tuple[bool, bool, bool]:
        return False, False, False

    def evaluate(self) -> dict[str, float]:
        return {}

    def checkpoint(self, state: State) -> None:
        pass

    def report(self, state: State) -> None:
        pass


def losses_of_ours(
    model: Any, learner: Learner, store: Encoded, settings: TrainingConfig, *, micro_batch: int = 3
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The loss of each step of our loop, which trains `model` on all rows of `store`, and the batch of each step."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def inputs_of(rows: Any) -> dict[str, torch.Tensor]:
        arrays = learner.collate(store, rows)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    rows = store.rows(0)
    steps = settings.max_steps or 1
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    objective, optimizer = accelerator.prepare(Objective(model, learner), make_optimizer(model, settings))
    setup = Setup(
        world=World(),
        accelerator=accelerator,
        objective=objective,
        optimizer=optimizer,
        parameters=list(model.parameters()),
        config=settings,
        plan=Plan(steps, None, "loss", False),
        order=Order(len(rows), settings.batch_size, settings.seed, store.lengths(rows)),
        rows=rows,
        count=lambda chosen: learner.count(store, chosen),
        inputs_of=inputs_of,
        train_mode=model.train,
        beat=lambda: None,
    )
    state = State(micro_batch=micro_batch)
    train(setup, state, _Quiet())
    return state.losses, [inputs_of(rows[setup.order.batch(step)]) for step in range(steps)]


def losses_of_trainer(
    model: Any, batches: Sequence[dict[str, torch.Tensor]], settings: TrainingConfig, *, work: Path
) -> list[float]:
    """The loss of each step of transformers.Trainer on a CPU, which trains `model` on the batches in their order.

    A batch is what the model takes, labels and all; its type is the model's own. `work` is a directory for its files.
    """
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(True)
    found: list[float] = []

    class InOrder(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(list(batches), batch_size=None, shuffle=False)

        def training_step(self, *given: Any, **more: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*given, **more)
            found.append(loss.item())
            return loss

    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=len(batches),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        lr_scheduler_kwargs=_schedule_options(settings),
        warmup_steps=warmup_steps(settings, total=len(batches)),
        optim=OPTIMIZERS[settings.optimizer],
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.epsilon,
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    InOrder(model=model, args=arguments, train_dataset=list(batches)).train()
    AcceleratorState._reset_state(True)
    return found


def _schedule_options(settings: TrainingConfig) -> dict[str, Any]:
    match settings.schedule:
        case "cosine":
            return {"min_lr_rate": settings.schedule_minimum}
        case "polynomial":
            end = settings.schedule_minimum * settings.learning_rate
            return {"power": settings.schedule_power, "lr_end": end}
        case _:
            return {}
