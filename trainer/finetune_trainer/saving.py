"""Writes an attempt's checkpoints in the background, one at a time: each rank its share, rank 0 the record.

Under data parallelism all ranks hold the same tensors. A share is a set of whole parameters, with their moments and
means, in files of its own; it is copied to host memory, then written and uploaded by a thread while training goes on.
Rank 0 waits for what the others say of their files and commits all of them in one record, which is the index: it names
each file with its digest. However many ranks read them later, they read all.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as done
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetune_trainer.checkpoint import MEAN, OPTIMIZER, STATE, WEIGHTS, Best, State, Tensors, file_name
from finetune_trainer.storage import StorageError, Store
from finetune_trainer.storage.commit import (
    Claim,
    Fenced,
    Record,
    RecordKind,
    Staging,
    collect_garbage,
    live_checkpoints,
    object_entry,
    superseded,
    uncommitted,
)
from finetune_trainer.storage.files import file_error
from finetune_trainer.world import World

PATIENCE = 600.0
"""Seconds that rank 0 waits at least for what another rank has uploaded beside it."""
NOT_DELETED = "what no record needs was not deleted"
"""Begins the warning of an attempt that could not collect its run's garbage."""
_log = logging.getLogger(__name__)


class Checkpoints:
    """One rank's part. Every rank calls `save` at the same steps; the claim is rank 0's alone."""

    def __init__(
        self,
        store: Store,
        claim: Claim | None,
        *,
        prefix: str,
        work: Path,
        keep_last: int,
        passed_over: Collection[int] = (),
        world: World | None = None,
        committed: Callable[[Record], None] = lambda record: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`prefix` is where the attempt's objects lie; `passed_over` are the numbers of checkpoints that are known to
        be damaged, `committed` is called by the thread."""
        self._world = world or World()
        self._store, self._claim, self._prefix = store, claim, prefix
        self._work = work / f"upload-{self._world.rank}"  # ranks of a node share its work directory
        self._keep_last, self._passed_over = keep_last, passed_over
        self._committed = committed
        self._beat = beat
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._used: dict[int, int] = {}
        self.seconds = 0.0
        """What the last one took to be written and committed."""

    def save(self, state: State, *, weights: Tensors, optimizer: Tensors, mean: Tensors | None = None) -> None:
        """Commit a snapshot of this rank's share in the background; waits for the one before. Raises what that one
        raised: Fenced, StorageError."""
        self.wait()
        means = {f"{MEAN}{name}": tensor for name, tensor in (mean or {}).items()}
        files = {WEIGHTS: weights, OPTIMIZER: {**optimizer, **means}}
        document = None
        if self._world.leads:
            files[OPTIMIZER]["losses"] = torch.tensor(state.losses, dtype=torch.float64)
            document = json.dumps(state.document(), sort_keys=True).encode()
        self._pending = self._thread.submit(self._write, replace(state), files, document)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._pending is None

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

    # --- in the thread ---

    def _write(self, state: State, files: dict[str, Tensors], document: bytes | None) -> None:
        started = time.monotonic()
        self._used[state.step] = again = self._used.get(state.step, 0) + 1  # done again after a divergence; keys never
        place = f"step-{state.step}{f'-{again}' if again > 1 else ''}"
        if self._claim is None:
            told = json.dumps(self._told(files, place)).encode()
            with _peers("post"):
                self._world.post(place, told)
            return
        record = self._record(self._claim, state, files, document, place)
        self.seconds = time.monotonic() - started
        self._committed(record)
        try:
            collect_garbage(self._claim)
        except StorageError as error:
            _log.warning("%s: %s", NOT_DELETED, error)

    def _told(self, files: dict[str, Tensors], place: str) -> dict[str, Any]:
        """What rank 0 is to know of this rank's files. It says so when they cannot be uploaded: others wait."""
        staging = Staging(self._store)
        try:
            return {"objects": self._uploaded(files, place, None, staging), "keys": staging.keys}
        except StorageError as error:
            told = {"reason": error.reason, "message": str(error), "environment": error.environment}
            return {**told, "keys": staging.keys}

    def _record(
        self, claim: Claim, state: State, files: dict[str, Tensors], document: bytes | None, place: str
    ) -> Record:
        """Commit what all ranks have uploaded. A superseded attempt takes away what the others have uploaded, too."""
        started, late, entries = time.monotonic(), None, []
        with uncommitted(claim) as staging:
            try:
                claim.check()  # one that woke up too late uploads nothing
                entries = self._uploaded(files, place, document, staging)
            except Fenced as error:
                late = error
            except StorageError:
                late = superseded(claim)
                if late is None:
                    raise
            patience = max(PATIENCE, 10 * (time.monotonic() - started))
            entries += self._of_others(place, staging, patience=patience)
            if late is not None:
                raise late
            return claim.append(RecordKind.CHECKPOINT, _body(state, entries), live=self._kept(claim, state.best))

    def _of_others(self, place: str, staging: Staging, *, patience: float) -> list[dict[str, Any]]:
        """The entries of the other ranks' objects. Raises StorageError: theirs, or PeerSilent after `patience` s."""
        with _peers("hear from"):
            said = [json.loads(data) for data in self._world.collect(place, patience=patience)]
        for answer in said:
            staging.keys += answer["keys"]
        for answer in said:
            if "reason" in answer:
                raise StorageError(answer["reason"], answer["message"], environment=answer["environment"])
        return [entry for answer in said for entry in answer["objects"]]

    def _uploaded(
        self, files: dict[str, Tensors], place: str, document: bytes | None, staging: Staging
    ) -> list[dict[str, Any]]:
        paths = []
        with _scratch(self._work):
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
            for name, tensors in files.items():
                if tensors or self._world.leads:  # a small model has not a parameter for each rank
                    paths.append(self._work / file_name(name, rank=self._world.rank, ranks=self._world.size))
                    save_file(tensors, paths[-1])
            if document is not None:
                paths.append(self._work / STATE)
                paths[-1].write_bytes(document)
        entries = []
        for path in paths:
            entries.append(object_entry(staging.upload(path, f"{self._prefix}{place}/{path.name}")))
            path.unlink()
        return entries

    def _kept(self, claim: Claim, best: Best | None) -> list[int]:
        """Earlier checkpoints that stay live beside the one being written: the last ones that are not known to be
        damaged, and the best of each."""
        records = [record for record in live_checkpoints(claim.records) if record.number not in self._passed_over]
        last = records[: self._keep_last - 1]
        needed = {(record.body["bestSoFar"] or {}).get("step") for record in last} | {best.step if best else None}
        bests: dict[int, int] = {}
        for record in records:  # newest first: of two of the same step, the newer
            if record.body["best"] and record.body["step"] in needed:
                bests.setdefault(record.body["step"], record.number)
        return sorted({record.number for record in last} | set(bests.values()))


def _body(state: State, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a checkpoint's record."""
    best = state.best
    at_best = best is not None and best.step == state.step
    return {
        "step": state.step,
        "objects": entries,
        "metric": {"name": best.metric, "value": best.value} if best and at_best else None,
        "best": at_best,
        "bestSoFar": best.document() if best else None,
        "microBatch": state.micro_batch,
        "packed": state.packed,
        "committedAt": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def _scratch(directory: Path) -> Iterator[None]:
    """Raises StorageError where files cannot be written."""
    try:
        with file_error(directory):
            yield
    except SafetensorError as error:  # the library's own word for a full disk, among others
        raise StorageError(
            "ScratchUnusable",
            f"A checkpoint cannot be written below {directory} ({error}): give the pod more ephemeral storage.",
        ) from error


@contextmanager
def _peers(what: str) -> Iterator[None]:
    """Raises StorageError where the other ranks cannot be reached, or one says nothing."""
    try:
        yield
    except (TimeoutError, RuntimeError) as error:  # torch.distributed raises RuntimeErrors
        raise StorageError(
            "PeerSilent",
            f"Cannot {what} the other processes of the run about a checkpoint ({error}); the next attempt goes on from "
            "the one before.",
        ) from error
