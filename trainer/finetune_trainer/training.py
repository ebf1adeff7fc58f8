"""Training within an attempt: from the newest whole checkpoint to the end, with everything the loop calls on."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from finetune_api.status import BestCheckpoint
from finetune_trainer import adapt, checkpoint
from finetune_trainer.adapt.base import InputsOf
from finetune_trainer.attempt import Attempt
from finetune_trainer.batches import order_of
from finetune_trainer.cadence import Cadence
from finetune_trainer.checkpoint import Restored, State
from finetune_trainer.course import Diverged
from finetune_trainer.data.order import Rows
from finetune_trainer.ema import Ema
from finetune_trainer.loop import Objective, Setup, train
from finetune_trainer.model import recompute_activations
from finetune_trainer.optim import learning_rate, make_optimizer
from finetune_trainer.regularise import Anchor, add_noise
from finetune_trainer.run import TRAIN, VALIDATION
from finetune_trainer.saving import Checkpoints
from finetune_trainer.signs import Pace, checkpointed, timestamp, wait_for
from finetune_trainer.storage import StorageError
from finetune_trainer.storage.commit import STOPPED, Record, RecordKind, attempt_prefix, live_checkpoints
from finetune_trainer.tasks import Metrics
from finetune_trainer.units import packs_of, units_of

_RECENT = 20
"""Steps whose losses are averaged for people."""
CHART_POINTS = 300
_REPORT_SECONDS = 1.0
_log = logging.getLogger("finetune.train")


def train_what_is_left(attempt: Attempt) -> None:
    """Train to the end and say so in the log; a divergence is given one more try from the last checkpoint.

    An attempt that is to finish now takes the newest checkpoint for the end. Raises Stopped, Diverged, OutOfMemory,
    Fenced, StorageError, ModelError.
    """
    checkpoints = Checkpoints(
        attempt.store,
        attempt.claim,
        prefix=attempt_prefix(attempt.record.run_id, attempt.number),
        work=attempt.work,
        keep_last=attempt.config.checkpoint.keep_last,
        passed_over=attempt.passed_over,
        world=attempt.world,
        committed=lambda record: _committed(attempt, record),
        beat=attempt.heart.beat,
    )
    try:
        try:
            _train(attempt, checkpoints)
        except Diverged as error:
            _log.warning("%s; trying once more from the last checkpoint", error)
            _train(attempt, checkpoints)
    finally:
        checkpoints.close()


def _committed(attempt: Attempt, record: Record) -> None:
    best = record.body["bestSoFar"]
    found = checkpointed(record.body, uri=attempt.store.uri, best=BestCheckpoint(**best) if best else None)
    attempt.reporter.update(checkpoint=found)
    _log.info("checkpoint of step %d committed", found.step)


def _train(attempt: Attempt, checkpoints: Checkpoints) -> None:
    attempt.reporter.update(stage="Loading")
    trainee = prepare(attempt)
    state = trainee.state
    progress = attempt.reporter.progress
    # A second try within this attempt does not change where the attempt itself began.
    began = progress.resumed_from_step if progress.total_steps else state.step or None
    attempt.reporter.update(stage="Training", step=state.step, total_steps=attempt.plan.total, resumed_from_step=began)
    if attempt.finish_now and not state.step:
        raise StorageError(
            "NothingCommitted",
            "The budget is used up and no checkpoint is committed that could be published: raise spec.budget.gpuHours.",
            environment=False,
        )
    try:
        if not attempt.finish_now or state.step == attempt.plan.total or state.stopped_early:
            train(trainee.setup, state, Duties(attempt, trainee, checkpoints))
    finally:
        checkpoints.wait()
        attempt.accelerator.free_memory()
    if attempt.claim is not None:
        attempt.claim.append(RecordKind.TRAINED, _trained(attempt, state))


def _trained(attempt: Attempt, state: State) -> dict[str, Any]:
    """The body of the trained record; `weights` are the numbers of the checkpoints that hold them."""
    records = [record for record in live_checkpoints(attempt.records) if record.number not in attempt.passed_over]
    last = next((r for r in records if r.body["step"] == state.step), records[0])
    best = next((r for r in records if state.best and r.body["best"] and r.body["step"] == state.best.step), None)
    return {
        "step": state.step,
        "totalSteps": attempt.plan.total,
        "end": _end(attempt, state),
        "best": state.best.document() if state.best else None,
        "finalLoss": recent(state),
        "curve": _curve(state),
        "weights": {"Last": last.number, "Best": (best or last).number},
    }


def _end(attempt: Attempt, state: State) -> str:
    if state.stopped_early:
        return "early-stopped"
    return "complete" if state.step == attempt.plan.total else STOPPED


def _curve(state: State) -> dict[str, Any]:
    """The course of training, as much of it as a chart can show: step and mean loss up to there, and evaluations."""
    width = -(-len(state.losses) // CHART_POINTS) or 1
    losses = [
        [min(start + width, len(state.losses)), sum(part) / len(part)]
        for start in range(0, len(state.losses), width)
        if (part := state.losses[start : start + width])
    ]
    stride = -(-len(state.evaluations) // CHART_POINTS) or 1
    return {"losses": losses, "evaluations": state.evaluations[::-1][::stride][::-1]}


def recent(state: State) -> float | None:
    """The loss that people are shown: the mean of the last steps'."""
    losses = state.losses[-_RECENT:]
    return sum(losses) / len(losses) if losses else None


@dataclass(frozen=True)
class Trainee:
    """A model that is being trained. `module` and `inputs_of` give its logits, perhaps by a shortcut."""

    model: Any
    module: Any
    inputs_of: InputsOf
    setup: Setup
    state: State
    mean: Ema | None = None


def prepare(attempt: Attempt) -> Trainee:
    """Model, optimizer and state as the newest whole checkpoint has them, or as a run begins.

    Raises ModelError, Damaged.
    """
    config, encoded = attempt.config.training, attempt.encoded
    method = attempt.method
    loaded = attempt.load(final=False)
    seen = np.concatenate([encoded.rows(TRAIN), encoded.rows(VALIDATION)])
    attempt.ask_base(seen, world=attempt.world, model=loaded.model)
    model = method.prepare(loaded, seed=config.seed)
    anchor = Anchor(model, alpha=config.l2sp_alpha, fresh=loaded.fresh) if config.l2sp_alpha is not None else None
    model.to(attempt.world.device)
    restored = _newest(attempt)
    attempt.packs = packs_of(attempt, model, before=restored.state.packed if restored else None)
    if restored is not None:
        checkpoint.restore_weights(model, restored.weights)
        _log.info("going on from the checkpoint of step %d", restored.state.step)
    state = restored.state if restored else State()
    state.micro_batch = attempt.numerics["microBatch"]
    state.packed = attempt.packs is not None
    rows = encoded.rows(TRAIN)
    shortcut = None
    if not attempt.learner.augments:  # a shortcut keeps what is known of rows that stay as they are
        shortcut = method.shortcut(
            model,
            rows=attempt.evaluator(attempt.world).longest_first(np.concatenate([rows, encoded.rows(VALIDATION)])),
            inputs_of=attempt.inputs_of,
            work=attempt.work,
            world=attempt.world,
            beat=attempt.beat_or_stop_together(attempt.world),
        )
    module, inputs_of = shortcut or (model, attempt.inputs_of)
    if config.neftune_alpha is not None:
        add_noise(model, alpha=config.neftune_alpha)
    if config.gradient_checkpointing:
        recompute_activations(model)
    mean = None
    if config.ema_decay is not None:
        mean = Ema(model, decay=config.ema_decay, stored=restored.mean if restored else None)
    optimizer = make_optimizer(model, config, anchored=anchor.names if anchor else ())
    if restored is not None:
        checkpoint.restore_optimizer(model, optimizer, restored.optimizer)
    units = units_of(attempt, inputs_of=inputs_of if shortcut else attempt.training_inputs_of)
    objective, prepared = attempt.accelerator.prepare(Objective(module, attempt.learner), optimizer)
    setup = Setup(
        world=attempt.world,
        accelerator=attempt.accelerator,
        objective=objective,
        optimizer=prepared,
        parameters=list(checkpoint.trainable(model).values()),
        config=config,
        plan=attempt.plan,
        order=order_of(
            attempt.config,
            learner=attempt.learner,
            encoded=encoded,
            packs=attempt.packs,
            mixture=attempt.mixture,
        ),
        rows=units.numbers,
        shares=units.shares,
        inputs_of=units.inputs_of,
        train_mode=_train_mode(method, model=model, module=module),
        beat=attempt.heart.beat,
        before_step=partial(method.before_step, model),
        after_step=_after_step(optimizer, anchor=anchor, mean=mean),
    )
    return Trainee(model, module, inputs_of, setup, state, mean)


def _after_step(optimizer: torch.optim.Optimizer, *, anchor: Anchor | None, mean: Ema | None) -> Callable[[int], None]:
    def act(step: int) -> None:
        if anchor is not None:
            anchor.pull(optimizer)
        if mean is not None:
            mean.update(step)

    return act


def _train_mode(method: adapt.Method, *, model: Any, module: Any) -> Callable[[], None]:
    def switch() -> None:
        module.train()
        method.train(model)

    return switch


def _newest(attempt: Attempt) -> Restored | None:
    """The newest whole checkpoint, chosen by rank 0, on every rank."""
    news: dict[str, Any] | None = None
    if attempt.world.leads:
        beat, passed_over = attempt.heart.beat, attempt.passed_over
        record = checkpoint.newest_whole(
            attempt.records, attempt.store, attempt.work, beat=beat, passed_over=passed_over
        )
        news = {"sha256": record.sha256, "body": dict(record.body)} if record else {}
    news = attempt.world.share(news)
    if not news:
        return None
    directory = checkpoint.directory_of(attempt.work, news["sha256"])
    if attempt.world.leads_node:
        checkpoint.fetch(news["body"], attempt.store, directory, beat=attempt.heart.beat)
    for path in checkpoint.files_of(news["body"], directory).values():
        wait_for(path, attempt.heart.beat)
    return checkpoint.open_fetched(directory)


class Duties:
    """What the loop calls on: the clock, the signals, evaluations, checkpoints and reports."""

    def __init__(self, attempt: Attempt, trainee: Trainee, checkpoints: Checkpoints) -> None:
        self._attempt, self._trainee, self._checkpoints = attempt, trainee, checkpoints
        self._evaluator = attempt.evaluator(attempt.world)
        self._validation: Rows = attempt.encoded.rows(VALIDATION)
        self._pace = Pace()
        self._reported = now = time.monotonic()
        self._began, self._first_step = trainee.state.step, attempt.reporter.progress.first_step_at
        self._mine = checkpoint.share(trainee.model, rank=attempt.world.rank, ranks=attempt.world.size)
        self._cadence = Cadence(
            attempt.config.checkpoint, grace=attempt.config.pods.grace_seconds, step=trainee.state.step, now=now
        )

    def due(self) -> tuple[bool, bool, bool, bool]:
        self._pace.step()
        self._note_first_step()
        stop = self._attempt.signals.stop
        self._checkpoints.poll()
        if not self._attempt.world.leads:
            return stop, False, False, False
        if self._checkpoints.idle:
            self._cadence.committed()
        now, step = time.monotonic(), self._trainee.state.step + 1
        checkpoint_due, waits = self._cadence.begin(step=step, now=now)
        return stop, checkpoint_due, now - self._reported >= _REPORT_SECONDS, waits

    def hold(self) -> None:
        started = time.monotonic()
        self._checkpoints.wait()
        self._together()
        self._pace.pause(time.monotonic() - started)

    def evaluate(self) -> Metrics:
        started = time.monotonic()
        attempt, trainee = self._attempt, self._trainee
        generate = attempt.learner.generates(attempt.plan.metric)  # what takes long, and only where it decides
        with trainee.mean.in_place() if trainee.mean else nullcontext():
            metrics = self._evaluator.measure(
                trainee.module, self._validation, inputs_of=trainee.inputs_of, generate=generate
            )
        self._pace.pause(time.monotonic() - started)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        _log.info("step %d, %d validation rows: %s", self._trainee.state.step, len(self._validation), shown)
        return metrics

    def checkpoint(self, state: State) -> None:
        started = time.monotonic()
        model, optimizer, mean = self._trainee.model, self._trainee.setup.optimizer, self._trainee.mean
        self._checkpoints.save(
            state,
            weights=checkpoint.snapshot_weights(model, only=self._mine),
            optimizer=checkpoint.snapshot_optimizer(model, optimizer, only=self._mine),
            mean=mean.snapshot(only=self._mine) if mean else None,
        )
        now = time.monotonic()
        self._cadence.saved(step=state.step, now=now, stall=now - started, written=self._checkpoints.seconds)
        self._together()

    def _together(self) -> None:
        """A rank may have waited for an upload: the others wait for it here, where they can show signs of life."""
        self._attempt.world.flags([]).wait(self._attempt.heart.beat)

    def _note_first_step(self) -> None:
        if self._first_step is None and self._trainee.state.step > self._began:
            self._first_step = timestamp()

    def report(self, state: State) -> None:
        self._note_first_step()
        self._reported = time.monotonic()
        setup = self._trainee.setup
        self._attempt.reporter.update(
            step=state.step,
            first_step_at=self._first_step,
            epoch=round(state.step / setup.order.steps_per_epoch, 4),
            loss=recent(state),
            learning_rate=learning_rate(setup.config, step=max(0, state.step - 1), total=setup.plan.total),
            **self._pace.estimate(rows=setup.config.batch_size, left=setup.plan.total - state.step),
        )
