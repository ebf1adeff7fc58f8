"""Checkpoints: safetensors and JSON, committed by the protocol of the run's log; no pickle anywhere.

A checkpoint holds what trains (never a frozen base), the optimizer's moments, the loss of every step and the state of
the course. It is copied to host memory, then written and uploaded by a thread while training goes on.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as done
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune_trainer.storage import Damaged, NotFound, StorageError, Store
from finetune_trainer.storage.commit import Claim, Record, RecordKind, collect_garbage, live_checkpoints, object_entry

Tensors = dict[str, torch.Tensor]
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
_MEAN = "/mean/"
"""Before the names of a running mean's tensors; no parameter's name begins so."""
GRACE = timedelta(minutes=10)
"""Age at which objects that no record needs are deleted."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    metric: str
    value: float

    def document(self) -> dict[str, Any]:
        return {"step": self.step, "metric": self.metric, "value": self.value}


@dataclass
class State:
    """The course of a run after `step` steps: all that, with the weights and the optimizer, decides the rest of it."""

    step: int = 0
    micro_batch: int = 0
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Step and metrics of each evaluation."""
    best: Best | None = None
    stale: int = 0
    """Evaluations without an improvement."""
    stopped_early: bool = False
    packed: bool | None = None
    """Whether batches are made of packs of rows; settled when training begins."""

    @property
    def evaluated(self) -> bool:
        """Whether the weights of this step have been evaluated."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "microBatch": self.micro_batch,
            "evaluations": self.evaluations,
            "best": self.best.document() if self.best else None,
            "stale": self.stale,
            "stoppedEarly": self.stopped_early,
            "packed": self.packed,
        }


def state_from(document: Mapping[str, Any], losses: list[float]) -> State:
    """The state in a checkpoint. Raises KeyError, TypeError or ValueError when it is none."""
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}")
    best = document["best"]
    return State(
        step=int(document["step"]),
        micro_batch=int(document["microBatch"]),
        losses=losses,
        evaluations=list(document["evaluations"]),
        best=Best(int(best["step"]), str(best["metric"]), float(best["value"])) if best else None,
        stale=int(document["stale"]),
        stopped_early=bool(document["stoppedEarly"]),
        packed=document.get("packed"),  # not there in checkpoints of earlier versions
    )


@dataclass(frozen=True)
class Restored:
    """A checkpoint in memory, verified by its digests."""

    state: State
    weights: Tensors
    optimizer: Tensors
    mean: Tensors = field(default_factory=dict)
    """The running mean of the weights; empty where none is kept."""

    @property
    def result(self) -> Tensors:
        """The weights that are evaluated and published."""
        return self.mean or self.weights


# --- tensors of a model and its optimizer, by name ---


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What trains in some step of the run, by name; a parameter that waits for its step belongs to it."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or getattr(parameter, "waits", False)
    }


def snapshot_weights(model: torch.nn.Module) -> Tensors:
    """What trains, copied to host memory."""
    return {name: _copied(parameter.detach()) for name, parameter in trainable(model).items()}


def snapshot_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as `<parameter>/<name>`, copied to host memory."""
    return {
        f"{name}/{key}": _copied(torch.as_tensor(value))
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True).contiguous()


@torch.no_grad()
def restore_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Raises Damaged when they are of another model."""
    parameters = trainable(model)
    if {name: parameter.shape for name, parameter in parameters.items()} != {
        name: tensor.shape for name, tensor in weights.items()
    }:
        raise Damaged(
            "CheckpointMismatch",
            "The checkpoint's parameters are not those of this model: it was written for another model or method; "
            "use a new output.uri.",
        )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The optimizer continues where the snapshot was taken.

    Not by load_state_dict, which casts what is kept in other types than the parameters, such as moments of 8 bits.
    """
    parameters = trainable(model)
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        counter = tensor.ndim == 0 and tensor.dtype == torch.int64  # a plain number when the snapshot was taken
        optimizer.state[parameter][part] = int(tensor) if counter else tensor.to(parameter.device)


# --- in storage ---


class Checkpoints:
    """Writes an attempt's checkpoints in the background, one at a time. Rank 0 only."""

    def __init__(
        self,
        store: Store,
        claim: Claim,
        *,
        work: Path,
        keep_last: int,
        committed: Callable[[Record], None] = lambda record: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._claim, self._work = store, claim, work / "upload"
        self._keep_last = keep_last
        self._committed = committed
        self._beat = beat
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._used: dict[int, int] = {}
        self.seconds = 0.0
        """What the last one took to be written and committed."""

    def save(self, state: State, *, weights: Tensors, optimizer: Tensors, mean: Tensors | None = None) -> None:
        """Commit a snapshot in the background; waits for the one before. Raises what that one raised."""
        self.wait()
        document = json.dumps(state.document(), sort_keys=True).encode()
        means = {f"{_MEAN}{name}": tensor for name, tensor in (mean or {}).items()}
        optimizer = {**optimizer, **means, "losses": torch.tensor(state.losses, dtype=torch.float64)}
        self._pending = self._thread.submit(self._commit, replace(state), document, weights, optimizer)

    def poll(self) -> None:
        """Raise what a finished commit raised (Fenced, StorageError), without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is on its way."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            while not done([pending], timeout=1.0).done:
                self._beat()
            pending.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _commit(
        self,
        state: State,
        document: bytes,
        weights: Tensors,
        optimizer: Tensors,
    ) -> None:
        step, best, started = state.step, state.best, time.monotonic()
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        self._used[step] = again = self._used.get(step, 0) + 1  # a step is done again after a divergence; keys never
        prefix = f"{self._claim.prefix}step-{step}{f'-{again}' if again > 1 else ''}/"
        save_file(weights, self._work / WEIGHTS)
        save_file(optimizer, self._work / OPTIMIZER)
        (self._work / STATE).write_bytes(document)
        objects = []
        for name in (WEIGHTS, OPTIMIZER, STATE):
            objects.append(object_entry(self._store.upload(self._work / name, prefix + name)))
            (self._work / name).unlink()
        at_best = best is not None and best.step == step
        body = {
            "step": step,
            "objects": objects,
            "metric": {"name": best.metric, "value": best.value} if best and at_best else None,
            "best": at_best,
            "bestSoFar": best.document() if best else None,
            "microBatch": state.micro_batch,
            "packed": state.packed,
            "committedAt": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record = self._claim.append(RecordKind.CHECKPOINT, body, live=self._kept(best))
        self._committed(record)
        self.seconds = time.monotonic() - started
        try:
            collect_garbage(self._store, self._claim.log.run_id, self._claim, GRACE)
        except StorageError as error:
            _log.warning("old checkpoints were not deleted: %s", error)

    def _kept(self, best: Best | None) -> list[int]:
        """Earlier checkpoints that stay live beside the one being written: the last ones, and the best of each."""
        records = live_checkpoints(self._claim.records)
        last = records[: self._keep_last - 1]
        needed = {(record.body["bestSoFar"] or {}).get("step") for record in last} | {best.step if best else None}
        bests: dict[int, int] = {}
        for record in records:  # newest first: of two of the same step, the newer
            if record.body["best"] and record.body["step"] in needed:
                bests.setdefault(record.body["step"], record.number)
        return sorted({record.number for record in last} | set(bests.values()))


def fetch(body: Mapping[str, Any], store: Store, directory: Path, *, beat: Callable[[], None]) -> None:
    """Download the files of a checkpoint record, verified. Raises Damaged, NotFound."""
    for entry in body["objects"]:
        path = directory / entry["key"].rpartition("/")[2]
        if not path.exists():
            store.download(entry["key"], path, sha256=entry["sha256"], progress=lambda _done: beat())


def open_fetched(directory: Path) -> Restored:
    """Read a downloaded checkpoint. Raises Damaged."""
    try:
        optimizer = load_file(directory / OPTIMIZER)
        losses = optimizer.pop("losses").tolist()
        mean = {name: optimizer.pop(name) for name in list(optimizer) if name.startswith(_MEAN)}
        mean = {name.removeprefix(_MEAN): tensor for name, tensor in mean.items()}
        state = state_from(json.loads((directory / STATE).read_bytes()), losses)
        return Restored(state, load_file(directory / WEIGHTS), optimizer, mean)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise Damaged(
            "CheckpointUnreadable", f"A checkpoint cannot be read ({error}): start the run under a new output.uri."
        ) from error


def newest_whole(records: list[Record], store: Store, work: Path, *, beat: Callable[[], None]) -> Record | None:
    """The newest live checkpoint whose every byte is right, downloaded below `work`; None when there is no checkpoint.

    Raises Damaged when there are checkpoints and all are damaged.
    """
    last: StorageError | None = None
    for record in live_checkpoints(records):
        directory = directory_of(work, record.sha256)
        try:
            fetch(record.body, store, directory, beat=beat)
            open_fetched(directory)
            return record
        except (Damaged, NotFound) as error:
            _log.warning("the checkpoint of step %s is passed over: %s", record.body.get("step"), error)
            shutil.rmtree(directory, ignore_errors=True)
            last = error
    if last is not None:
        raise Damaged("CheckpointsDamaged", f"No checkpoint of the run is whole; of the oldest: {last}") from last
    return None


def directory_of(work: Path, sha256: str) -> Path:
    """Where the checkpoint of the record with that digest is downloaded to."""
    return work / "checkpoints" / sha256[:32]
