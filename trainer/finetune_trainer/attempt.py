"""One attempt at a run: what its parts share, how it begins, and the files it needs."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_api.contract import RunConfig
from finetune_trainer import adapt, numerics, tasks
from finetune_trainer.adapt.base import Inputs
from finetune_trainer.batches import leading, learner_of, mixture_of, steps_of
from finetune_trainer.compared import OfBase
from finetune_trainer.course import OutOfMemory, Plan
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.order import Mixture, Rows, evaluation_interval
from finetune_trainer.data.packing import Packs
from finetune_trainer.evaluate import Evaluator
from finetune_trainer.foresight import bytes_of
from finetune_trainer.model import Loaded, load
from finetune_trainer.run import VALIDATION, EncodedRef, Input, RunRecord, input_changed
from finetune_trainer.signs import Heart, Reporter, Signals, Stopped, wait_for
from finetune_trainer.storage import (
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Store,
    open_store,
    split_uri,
)
from finetune_trainer.storage.cache import Cache
from finetune_trainer.storage.commit import (
    Claim,
    Holder,
    Record,
    RecordKind,
    RunLog,
    find,
    live_checkpoints,
    training_end,
)
from finetune_trainer.storage.digests import hex_of
from finetune_trainer.world import World

_MEMORY_NOTE = "out-of-memory.json"
_log = logging.getLogger("finetune.train")


@dataclass
class Attempt:
    """What all parts of an attempt share."""

    config: RunConfig
    record: RunRecord
    settings: StorageSettings
    store: Store
    work: Path
    world: World
    signals: Signals
    heart: Heart
    reporter: Reporter
    numerics: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    claim: Claim | None = None
    """Rank 0 only."""
    cache_root: Path | None = None
    """A directory for base models that other pods use, too."""
    packs: Packs | None = None
    """What batches are made of, where rows are packed; settled once the model is loaded (units.py)."""
    finish_now: bool = False
    """Training is over, however far it is: the best checkpoint is evaluated and published."""
    of_base: OfBase | None = None
    """What the untouched base has said of rows, where the loss compares with it."""
    passed_over: set[int] = field(default_factory=set)
    """Numbers of checkpoints that are still live and were found to be damaged. Rank 0 only."""

    @cached_property
    def cache(self) -> Cache | None:
        """Where the base model's files may lie; holds them as long as the attempt lasts. For one rank of the node."""
        asked = self.config.pods.cache
        if self.cache_root is None:
            return None
        try:
            return Cache(self.cache_root, limit=int(bytes_of(asked.size)) if asked and asked.size else None)
        except OSError as error:
            _log.warning("the cache of base models cannot be used (%s); they are downloaded for this pod alone", error)
            return None

    @cached_property
    def learner(self) -> tasks.Learner:
        return learner_of(self.config, self.record, base=self.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, to show people what tokens say."""
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self.base / "tokenizer.json"))

    @property
    def base(self) -> Path:
        return self.work / "runs" / self.record.run_id / "base"

    @cached_property
    def encoded(self) -> Encoded:
        return Encoded(self.path_of(self.record.encoded))

    def path_of(self, stored: EncodedRef) -> Path:
        """Where an encoded store lies: by its content, since a work directory may have one of the same run already that
        was encoded of other rows to measure, or under another name of a retention set."""
        return self.base.parent / f"encoded-{hex_of(stored.digest)[:32]}.safetensors"

    @cached_property
    def accelerator(self) -> Any:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # find_unused_parameters also keeps DDP from rearranging its buckets after the first step, so that a resumed
        # run sums in the same order as an undisturbed one.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        return Accelerator(
            cpu=self.world.device.type == "cpu",
            mixed_precision="bf16" if self.numerics["precision"] == "bf16" else "no",
            kwargs_handlers=[ddp],
        )

    def evaluator(self, world: World) -> Evaluator:
        """Measures on all ranks of `world`, and heeds a stop in between."""
        beat = self.beat_or_stop_together(world)
        return Evaluator(self.learner, self.encoded, world, self.accelerator.autocast, beat, self.heart.beat)

    def beat_or_stop_together(self, world: World) -> Callable[[], None]:
        """For all ranks of `world`, which call it equally often: raises Stopped on each when any was asked to stop."""

        def act() -> None:
            self.heart.beat()
            (stop,) = world.flags([self.signals.stop]).wait(self.heart.beat)
            if stop:
                raise Stopped

        return act

    def inputs_of(self, rows: Rows) -> Inputs:
        """One micro-batch on this rank's device."""
        return self._with_base(self.learner.collate(self.encoded, rows), rows)

    def training_inputs_of(self, rows: Rows) -> Inputs:
        """One micro-batch to train on, augmented where the task does that."""
        return self._with_base(self.learner.collate_for_training(self.encoded, rows), rows)

    def _with_base(self, arrays: dict[str, NDArray[Any]], rows: Rows) -> Inputs:
        if self.of_base is not None:
            arrays["base"] = self.of_base.of(rows)
        return self.tensors(arrays)

    def ask_base(self, rows: Rows, *, world: World, model: Any = None) -> None:
        """Where the loss compares with the untouched base: let it say what is not yet known about rows, the longest
        first, each chunk on one rank of `world`. `model` is the base, loaded here where none is at hand."""
        learner = self.learner
        if not learner.compares:
            return
        if self.of_base is None:
            self.of_base = OfBase(
                self.work, rows=self.encoded.size, numbers=learner.compares, local_rank=self.world.local_rank
            )
        rows = self.evaluator(world).longest_first(self.of_base.unknown(np.unique(rows)))
        if not len(rows):
            return
        base = (self.load().model if model is None else model).to(self.world.device).eval()

        def answer(chunk: Rows) -> torch.Tensor:
            with self.accelerator.autocast():
                found: torch.Tensor = learner.of_base(base, self.tensors(learner.collate(self.encoded, chunk)))
            return found

        self.of_base.ask(rows, answer, world=world, beat=self.evaluator(world).beat)

    def tensors(self, arrays: Mapping[str, NDArray[Any]]) -> Inputs:
        """Arrays on this rank's device."""
        return {name: torch.from_numpy(array).to(self.world.device) for name, array in arrays.items()}

    @property
    def method(self) -> adapt.Method:
        """How the weights are tuned."""
        classes = {name: part.auto_class for name, part in self.learner.parts.items()}
        return adapt.get(self.config.method, classes=classes)

    def load(self, *, final: bool = True) -> Loaded:
        """The base model, freshly loaded, to be measured or published or, not `final`, to be trained."""
        self.heart.beat()
        training = self.config.training
        loaded = load(self.base, learner=self.learner, seed=training.seed, dropout=training.dropout)
        self.learner.set_up(loaded.model, final=final)
        return loaded

    @cached_property
    def mixture(self) -> Mixture | None:
        """How often training rows, or packs of them, are seen; None where each is seen once an epoch. When `packs` are
        settled."""
        return mixture_of(self.config, self.record, encoded=self.encoded, packs=self.packs)

    @cached_property
    def plan(self) -> Plan:
        """When `packs` are settled."""
        training = self.config.training
        rows = self.mixture.rows if self.mixture else len(leading(self.encoded, self.packs))
        every = evaluation_interval(
            steps_per_epoch=-(-rows // training.batch_size),
            steps=training.evaluate_steps,
            epochs=training.evaluate_epochs,
        )
        return Plan(
            total=steps_of(self.config, units=rows),
            evaluate_every=every if len(self.encoded.rows(VALIDATION)) else None,
            metric=self.config.primary,
            higher_is_better=self.learner.higher_is_better(self.config.primary),
            patience=training.patience,
            min_delta=training.min_delta,
        )

    @property
    def records(self) -> list[Record]:
        assert self.claim is not None
        return self.claim.records

    @property
    def trained(self) -> Record | None:
        """How training ended, None while there is something left to train."""
        return training_end(self.records, partial=self.finish_now)

    @property
    def result(self) -> Record:
        """The checkpoint whose weights will be published, once training is over. Raises Damaged."""
        assert self.trained is not None
        number = self.trained.body["weights"][self.config.output.weights]
        record = next((record for record in self.records if record.number == number), None)
        if record is None:
            raise Damaged(
                "CheckpointsDamaged", f"Record {number} of the run's log, which holds the trained weights, is damaged."
            )
        return record


def begin(attempt: Attempt, *, halve: bool = False) -> bool:
    """Claim the run, settle the numerics and tell the other ranks; whether training is over already.

    `halve`: the attempt before was killed for its memory and could not leave word of it.
    """
    world = attempt.world
    news: dict[str, Any] | None = None
    if world.leads:
        log = RunLog(attempt.store, attempt.record.run_id)
        before = _numerics_before(log.read(beat=attempt.heart.beat), attempt.store, attempt.record.run_id, halve=halve)
        settled = numerics.resolve(attempt.config, world=world, before=before)
        changed = numerics.changes(before, settled)
        if changed:
            _log.warning("NumericsChanged: %s; results may differ in their last digits", ", ".join(changed))
        attempt.claim = log.claim(holder=_holder(attempt.config), numerics=settled)
        news = {"number": attempt.claim.number, "numerics": settled, "over": attempt.trained is not None}
        _log.info("attempt %d of run %s: %s", attempt.claim.number, log.run_id, json.dumps(settled))
    world.flags([]).wait(attempt.heart.beat)  # a long log takes rank 0 its time
    news = world.share(news)
    attempt.number, attempt.numerics = news["number"], news["numerics"]
    numerics.apply(attempt.numerics)
    attempt.reporter.update(attempt=attempt.number)
    return bool(news["over"])


def _holder(config: RunConfig) -> Holder:
    return Holder(
        job_uid=config.job_uid,
        owner=os.environ.get("FINETUNE_OWNER", ""),
        pod_uid=os.environ.get("FINETUNE_POD_UID", ""),
    )


def _numerics_before(records: list[Record], store: Store, run_id: str, *, halve: bool = False) -> dict[str, Any] | None:
    """Numerics of the newest attempt, its micro-batch as it was at the end, halved if it ran out of memory."""
    claims = find(records, RecordKind.CLAIM)
    if not claims or not claims[-1].body.get("numerics"):
        return None
    found = dict(claims[-1].body["numerics"])
    checkpoints = live_checkpoints(records)
    if checkpoints and checkpoints[0].attempt == claims[-1].number:
        found["microBatch"] = checkpoints[0].body["microBatch"]
    used_up = _used_up(store, _memory_note(run_id, claims[-1].number), known=found["microBatch"])
    if used_up is None and not halve:
        return found
    size = max(1, min(found["microBatch"], used_up or found["microBatch"]) // 2)
    _log.warning("the attempt before ran out of memory: micro-batches have %d rows now", size)
    return {**found, "microBatch": size}


def _used_up(store: Store, key: str, *, known: int) -> int | None:
    """With how many rows an attempt has left word that memory was used up; None where it has left none. What lies there
    and cannot be read still says that it was: with as many as are `known`."""
    try:
        rows = json.loads(store.read(key))["microBatch"]
        if type(rows) is int and rows > 0:
            return rows
        raise ValueError(f"microBatch is {rows!r}")
    except NotFound:
        return None
    except (Damaged, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged (%s); it is taken to say that memory was used up", key, error)
        return known


def _memory_note(run_id: str, attempt: int) -> str:
    return f"runs/{run_id}/attempts/{attempt}/{_MEMORY_NOTE}"


def note_memory(attempt: Attempt, error: OutOfMemory) -> None:
    """Leave word for the next attempt; any rank may."""
    key = _memory_note(attempt.record.run_id, attempt.number)
    attempt.store.write(key, json.dumps({"microBatch": error.micro_batch}).encode())


# --- files ---


def fetch_inputs(attempt: Attempt) -> None:
    """Download the base model and the encoded stores, once a node, exactly as pinned. Raises StorageError."""
    shared = attempt.cache if attempt.world.leads_node else None
    for entry in attempt.record.manifest:
        kind, _, name = entry.role.partition("/")
        if kind == "model":
            get = partial(_download, attempt, entry)
            _once(attempt, attempt.base / name, partial(_link, attempt, entry, shared, get) if shared else get)
    for stored in (attempt.record.encoded, *(kept.encoded for kept in attempt.record.retention.values())):
        _fetch(attempt, stored)


def _link(attempt: Attempt, entry: Input, cache: Cache, download: Callable[[Path], Any], path: Path) -> None:
    """Let `path` lead to the file in the cache, or download it where the cache has no room or fails."""
    found = None
    path.unlink(missing_ok=True)
    try:
        found = cache.get(entry.digest, size=entry.size, download=download, beat=attempt.heart.beat_or_stop)
    except OSError as error:
        _log.warning("the cache of base models fails (%s); %s is downloaded for this pod alone", error, entry.uri)
    except StorageError as error:
        if error.reason != "NoSpace":
            raise
        _log.warning("%s; %s is downloaded for this pod alone", error, entry.uri)
    if found is None:
        download(path)
    else:
        path.symlink_to(found)


def _fetch(attempt: Attempt, stored: EncodedRef) -> None:
    get = partial(attempt.store.download, stored.key, digest=stored.digest, progress=attempt.heart.beat_or_stop)
    _once(attempt, attempt.path_of(stored), lambda path: get(path=path))


def _download(attempt: Attempt, entry: Input, path: Path) -> None:
    root, key = split_uri(entry.uri)
    store, beat = open_store(root, attempt.settings), attempt.heart.beat_or_stop
    try:
        store.download(key, path, if_match=entry.etag, digest=entry.digest, progress=beat)
    except (PreconditionFailed, Damaged) as error:
        raise input_changed(entry.uri) from error


def _once(attempt: Attempt, path: Path, download: Callable[[Path], Any]) -> None:
    """Let one rank of the node download a file; the others wait until it is there."""
    attempt.heart.beat_or_stop()
    if attempt.world.leads_node and (path.is_symlink() or not path.exists()):  # a link's file is held anew
        path.parent.mkdir(parents=True, exist_ok=True)
        download(path)
    wait_for(path, attempt.heart.beat_or_stop)
