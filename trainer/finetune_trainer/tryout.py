"""How much an untouched base knows of a task, and how fast it trains here: what `finetune advise` needs a model for."""

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from finetune_api.contract import RunConfig
from finetune_trainer import tasks, world
from finetune_trainer.adapt.base import parameter_counts
from finetune_trainer.advice import ROWS, Score
from finetune_trainer.attempt import Attempt, begin, fetch_inputs
from finetune_trainer.data.order import Rows, derive, permute
from finetune_trainer.data.read import Rows as Reader
from finetune_trainer.data.read import locate
from finetune_trainer.evaluate import PLACE
from finetune_trainer.intervals import TAILS, Draws, interval
from finetune_trainer.loop import step
from finetune_trainer.model import trunk_of
from finetune_trainer.run import TRAIN, VALIDATION, RunRecord
from finetune_trainer.signs import Heart, Reporter, Signals
from finetune_trainer.storage import StorageSettings, open_store
from finetune_trainer.tasks import Outcomes
from finetune_trainer.training import prepare

STEPS = 12
SECONDS = 20.0
"""Optimizer steps that are timed at most, and after how many seconds no further one begins."""
_SEED = 17
BITS = "bits per byte"


def try_out(
    config: RunConfig, record: RunRecord, *, settings: StorageSettings, work: Path
) -> tuple[Score | None, float, int, str]:
    """The base's score, seconds an epoch of training takes, its parameters, and the device. Raises ModelError,
    StorageError and what running out of memory raises."""
    state = work / "state"
    signals = Signals()
    attempt = Attempt(
        config=config,
        record=record,
        settings=settings,
        store=open_store(config.output.uri, settings),
        work=work,
        world=world.join(),
        signals=signals,
        heart=Heart(state, rank=0, signals=signals),
        reporter=Reporter(state, run_id=record.run_id, active=False),
    )
    begin(attempt)
    fetch_inputs(attempt)
    loaded = attempt.load()
    parameters = parameter_counts(loaded.model)[1]
    model = loaded.model.to(attempt.world.device)
    score = _probe(attempt, model) if attempt.learner.probe is not None else _bits(attempt, model, bool(loaded.fresh))
    del loaded, model
    gc.collect()
    return score, _seconds(attempt), parameters, str(attempt.numerics["device"])


def _sample(attempt: Attempt, split: int) -> Rows:
    """Rows of the store that up to ROWS rows of data have become: the same rows of data for every base."""
    rows = attempt.encoded.rows(split)
    places = np.stack([attempt.encoded.values(name, rows).astype(np.int64) for name in ("source", "row")])
    known, number = np.unique(places, axis=1, return_inverse=True)
    count = known.shape[1]
    chosen = permute(np.arange(min(ROWS, count)), size=count, key=derive(_SEED, "advise", split))
    return rows[np.isin(number.reshape(-1), chosen)]


def _probe(attempt: Attempt, model: torch.nn.Module) -> Score | None:
    """The primary metric of a linear model on frozen features; None where nothing can be learned."""
    learner, metric = attempt.learner, attempt.config.primary
    train, held = _sample(attempt, TRAIN), _sample(attempt, VALIDATION)
    evaluator = attempt.evaluator(attempt.world)
    probed = evaluator.probe(trunk_of(model), train, held, inputs_of=attempt.inputs_of, seed=_SEED)
    if probed is None:
        return None
    outcomes = probed.outcomes
    value = learner.metrics(outcomes).get(metric, math.nan)
    draws = Draws.of(learner, len(outcomes[PLACE]), seed=_SEED)
    ends = interval(draws.measured(learner, outcomes, needed=metric).get(metric, np.array([])))
    if not math.isfinite(value) or ends is None:
        return None
    return Score(f"{metric} of the probe", value, *ends, learner.higher_is_better(metric), len(outcomes[PLACE]))


def _bits(attempt: Attempt, model: torch.nn.Module, invented: bool) -> Score | None:
    """The untouched base's loss in bits a byte of what is to be written, which no tokenizer changes; None where the
    task has no such loss, or part of the base had to be invented."""
    learner = attempt.learner
    if learner.logits == "few" or learner.compares or invented:
        return None
    held = _sample(attempt, VALIDATION)
    outcomes = attempt.evaluator(attempt.world).outcomes(model, held, inputs_of=attempt.inputs_of, generate=False)
    places = outcomes[PLACE]
    sizes = _sizes(attempt)
    where = zip(
        attempt.encoded.values("source", places).tolist(), attempt.encoded.values("row", places).tolist(), strict=True
    )
    return bits_per_byte(outcomes, np.array([sizes[place] for place in where], dtype=np.float64))


def bits_per_byte(outcomes: Outcomes, sizes: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Score:
    """`sizes`: bytes of each row. The interval is over rows drawn again."""
    bits = outcomes["loss"] / math.log(2)
    drawn = Draws(len(bits), _SEED, 200).each()
    values = np.array([bits[draw].sum() / max(1.0, sizes[draw].sum()) for draw in drawn])
    low, high = np.percentile(values, TAILS)
    return Score(BITS, float(bits.sum() / max(1.0, sizes.sum())), float(low), float(high), False, len(bits))


def _sizes(attempt: Attempt) -> dict[tuple[int, int], int]:
    """By place in the data the bytes of what is to be written: a row's answer, or all of it where it has none."""
    task, found = tasks.get(attempt.config), {}
    sources = {entry.uri: number for number, entry in enumerate(attempt.record.manifest)}
    for uri in attempt.config.data.addresses.values():
        for place in locate(uri, attempt.settings):
            reader = Reader(
                place.store, place.key, uri=place.uri, wanted=list(task.columns.values()), scratch=attempt.work
            )
            for row in reader:
                if isinstance(row, Exception):
                    continue  # preflight has let it pass
                sample = task.read_row(row.values)
                found[sources[place.uri], row.number] = len((sample.answer or sample.content).encode())
    return found


def _seconds(attempt: Attempt) -> float:
    """What an epoch takes, by a few real optimizer steps and how many of its tokens these had."""
    trainee = prepare(attempt)
    setup, state = trainee.setup, trainee.state
    setup.train_mode()
    wait: Callable[[], None] = torch.cuda.synchronize if attempt.world.device.type == "cuda" else lambda: None
    tokens = spent = 0.0
    for number in range(STEPS + 1):
        batch = setup.order.batch(state.step)
        wait()
        began = time.perf_counter()
        step(setup, state)
        wait()
        seconds = time.perf_counter() - began
        state.step += 1
        if number:  # the first one warms up
            tokens += float(setup.order.lengths[batch].sum())
            spent += seconds
        if number and spent > SECONDS:
            break
    attempt.accelerator.free_memory()
    every = float(setup.order.lengths[np.arange(setup.order.rows)].sum())
    return spent * every / tokens
