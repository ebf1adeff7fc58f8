"""Checkpoints: safetensors and JSON, committed by the protocol of the run's log; no pickle anywhere.

A checkpoint holds what trains (never a frozen base), the optimizer's moments, the loss of every step and the state of
the course. How it is written is told in saving.py.
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune_trainer.storage import Damaged, NotFound, StorageError, Store
from finetune_trainer.storage.commit import Record, live_checkpoints

Tensors = dict[str, torch.Tensor]
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
MEAN = "/mean/"
"""Before the names of a running mean's tensors; no parameter's name begins so."""
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


def share(model: torch.nn.Module, *, rank: int, ranks: int) -> set[str]:
    """The parameters that this rank writes: all ranks hold the same, so each writes about as many bytes as the others.

    The largest first, each to the rank that has the least so far.
    """
    loads, mine = [0] * ranks, set()
    for name, parameter in sorted(trainable(model).items(), key=lambda item: (-item[1].nbytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += parameter.nbytes
        if least == rank:
            mine.add(name)
    return mine


def snapshot_weights(model: torch.nn.Module, *, only: Collection[str] | None = None) -> Tensors:
    """What trains, or the parameters of these names alone, copied to host memory."""
    return {name: copied(parameter.detach()) for name, parameter in _of(model, only)}


def snapshot_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, only: Collection[str] | None = None
) -> Tensors:
    """The optimizer's state as `<parameter>/<name>`, copied to host memory."""
    return {
        f"{name}/{key}": copied(torch.as_tensor(value))
        for name, parameter in _of(model, only)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _of(model: torch.nn.Module, only: Collection[str] | None) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in trainable(model).items() if only is None or name in only]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory, whatever becomes of the original."""
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


def files_of(body: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Where `fetch` puts the objects of a checkpoint record, by their keys."""
    return {entry["key"]: directory / entry["key"].rpartition("/")[2] for entry in body["objects"]}


def fetch(body: Mapping[str, Any], store: Store, directory: Path, *, beat: Callable[[], None]) -> None:
    """Download the files of a checkpoint record, verified. Raises Damaged, NotFound."""
    digests = {entry["key"]: entry["digest"] for entry in body["objects"]}
    for key, path in files_of(body, directory).items():
        if not path.exists():
            store.download(key, path, digest=digests[key], progress=lambda _done: beat())


def file_name(name: str, *, rank: int, ranks: int) -> str:
    """What a rank's share of `name` is called: `weights.safetensors`, or `weights-00002-of-00003.safetensors`."""
    stem, _, suffix = name.rpartition(".")
    return name if ranks == 1 else f"{stem}-{rank + 1:05}-of-{ranks:05}.{suffix}"


def _joined(directory: Path, name: str) -> Tensors:
    """The tensors of all shares of `name`; the record of the log has named every file that is here."""
    stem, _, suffix = name.rpartition(".")
    return {key: tensor for path in directory.glob(f"{stem}*.{suffix}") for key, tensor in load_file(path).items()}


def open_fetched(directory: Path) -> Restored:
    """Read a downloaded checkpoint, written by however many ranks. Raises Damaged."""
    try:
        optimizer = _joined(directory, OPTIMIZER)
        losses = optimizer.pop("losses").tolist()
        mean = {name: optimizer.pop(name) for name in list(optimizer) if name.startswith(MEAN)}
        mean = {name.removeprefix(MEAN): tensor for name, tensor in mean.items()}
        state = state_from(json.loads((directory / STATE).read_bytes()), losses)
        return Restored(state, _joined(directory, WEIGHTS), optimizer, mean)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise Damaged(
            "CheckpointUnreadable", f"A checkpoint cannot be read ({error}): start the run under a new output.uri."
        ) from error


def newest_whole(
    records: list[Record], store: Store, work: Path, *, beat: Callable[[], None], passed_over: set[int] | None = None
) -> Record | None:
    """The newest live checkpoint whose every byte is right, downloaded below `work`; None when there is no checkpoint.

    The numbers of damaged ones are added to `passed_over`. Raises Damaged when there are checkpoints and all are
    damaged.
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
            if passed_over is not None:
                passed_over.add(record.number)
            last = error
    if last is not None:
        raise Damaged("CheckpointsDamaged", f"No checkpoint of the run is whole; of the oldest: {last}") from last
    return None


def directory_of(work: Path, sha256: str) -> Path:
    """Where the checkpoint of the record with that digest is downloaded to."""
    return work / "checkpoints" / sha256[:32]
