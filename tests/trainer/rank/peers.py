"""What everybody's trainer computes on the batches that ours saw: the reference for every task."""

from collections.abc import Mapping, Sequence
from functools import partial
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

    def due(self) -> tuple[bool, bool, bool, bool]:
        return False, False, False, False

    def hold(self) -> None:
        pass

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
        shares=lambda chosen: learner.shares(store, chosen),
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
    from transformers import Trainer, TrainingArguments

    return _losses(Trainer, TrainingArguments, model, batches, settings, work=work)


def losses_of_sft(
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    settings: TrainingConfig,
    *,
    work: Path,
    tokenizer: Path,
    loss: Any = None,
) -> list[float]:
    """The same by TRL's SFTTrainer; `tokenizer` is a directory of one, `loss` another one than TRL's own, which is in
    fp32 always: (outputs, labels, num_items_in_batch) -> the mean."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    more = {
        "train_dataset": Dataset.from_list([{"input_ids": [0]}] * len(batches)),
        "processing_class": AutoTokenizer.from_pretrained(tokenizer),
        "compute_loss_func": loss,
    }
    config = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False, "bf16": False}
    return _losses(SFTTrainer, SFTConfig, model, batches, settings, work=work, more=more, **config)


def losses_of_dpo(
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    settings: TrainingConfig,
    *,
    work: Path,
    tokenizer: Path,
    loss: str,
    beta: float,
) -> list[float]:
    """The same by TRL's DPOTrainer, with `base` of our batches as what its reference model says. Its log-probabilities
    are in fp32 always; a model in float64 gets them from its own logits."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):  # type: ignore[misc]
        """Batches are ours, and the reference has spoken."""

        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            if self.model.dtype == torch.float64:
                self.model.forward = partial(_wide, self.model.forward)

        def _prepare_dataset(self, dataset: Any, *given: Any, **more: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *given: Any, **more: Any) -> Any:
            return dataset

    more = {
        "train_dataset": Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}] * len(batches)),
        "processing_class": AutoTokenizer.from_pretrained(tokenizer),
    }
    given = [
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "completion_mask": (batch["labels"] != -100).long(),
            "ref_chosen_logps": batch["base"][:, 0].to(model.dtype),
            "ref_rejected_logps": batch["base"][:, 1].to(model.dtype),
        }
        for batch in batches
    ]
    options = {"precompute_ref_log_probs": True, "loss_type": [loss], "beta": beta, "bf16": False}
    options["gradient_checkpointing"] = False
    return _losses(Prepared, DPOConfig, model, given, settings, work=work, more=more, **options)


def _wide(forward: Any, **inputs: Any) -> Any:
    """TRL's forward, with log-probabilities of labels in the precision of the logits."""
    found, labels = forward(**inputs), inputs["labels"][:, 1:]
    logits = forward(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, use_cache=False).logits
    chances = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    found.log_probs = chances.masked_fill(labels == -100, 0.0)
    return found


def _losses(
    trainer: Any,
    arguments_of: Any,
    model: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    settings: TrainingConfig,
    *,
    work: Path,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[float]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    found: list[float] = []

    class InOrder(trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(list(batches), batch_size=None, shuffle=False)

        def training_step(self, *given: Any, **more: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*given, **more)
            found.append(loss.item())
            return loss

    arguments = arguments_of(
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
        **options,
    )
    InOrder(**{"model": model, "args": arguments, "train_dataset": list(batches), **(more or {})}).train()
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
