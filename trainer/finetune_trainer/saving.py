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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as done
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_trainer.checkpoint import MEAN, OPTIMIZER, STATE, WEIGHTS, Best, State, Tensors, file_name
from finetune_trainer.storage import StorageError, Store
from finetune_trainer.storage.commit import (
    Claim,
    Fenced,
    Record,
    RecordKind,
    collect_garbage,
    live_checkpoints,
    object_entry,
)
from finetune_trainer.world import World

GRACE = timedelta(minutes=10)
"""Age at which objects that no record needs are deleted."""
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
        world: World | None = None,
        committed: Callable[[Record], None] = lambda record: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`prefix` is where the attempt's objects lie; `committed` is called by the thread."""
        self._world = world or World()
        self._store, self._claim, self._prefix = store, claim, prefix
        self._work = work / f"upload-{self._world.rank}"  # ranks of a node share its work directory
        self._keep_last = keep_last
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
            self._world.post(place, json.dumps(self._told(files, place)).encode())
            return
        self._claim.check()  # one that woke up too late uploads nothing
        entries = self._uploaded(files, place, document)
        for said in map(json.loads, self._world.collect(place)):
            if "reason" in said:
                raise StorageError(said["reason"], said["message"], environment=said["environment"])
            entries += said["objects"]
        try:
            self._commit(self._claim, state, entries)
        except Fenced:  # nobody else would ever delete them when the newer attempt is done already
            self._store.delete([entry["key"] for entry in entries])
            raise
        self.seconds = time.monotonic() - started

    def _told(self, files: dict[str, Tensors], place: str) -> dict[str, Any]:
        """What rank 0 is to know of this rank's files. It says so when they cannot be uploaded: others wait."""
        try:
            return {"objects": self._uploaded(files, place, None)}
        except StorageError as error:
            return {"reason": error.reason, "message": str(error), "environment": error.environment}

    def _uploaded(self, files: dict[str, Tensors], place: str, document: bytes | None) -> list[dict[str, Any]]:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        paths = []
        for name, tensors in files.items():
            if tensors or self._world.leads:  # a small model has not a parameter for each rank
                paths.append(self._work / file_name(name, rank=self._world.rank, ranks=self._world.size))
                save_file(tensors, paths[-1])
        if document is not None:
            paths.append(self._work / STATE)
            paths[-1].write_bytes(document)
        entries = []
        for path in paths:
            entries.append(object_entry(self._store.upload(path, f"{self._prefix}{place}/{path.name}")))
            path.unlink()
        return entries

    def _commit(self, claim: Claim, state: State, entries: list[dict[str, Any]]) -> None:
        best = state.best
        at_best = best is not None and best.step == state.step
        body = {
            "step": state.step,
            "objects": entries,
            "metric": {"name": best.metric, "value": best.value} if best and at_best else None,
            "best": at_best,
            "bestSoFar": best.document() if best else None,
            "microBatch": state.micro_batch,
            "packed": state.packed,
            "committedAt": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._committed(claim.append(RecordKind.CHECKPOINT, body, live=self._kept(claim, best)))
        try:
            collect_garbage(self._store, claim.log.run_id, claim, GRACE)
        except StorageError as error:
            _log.warning("old checkpoints were not deleted: %s", error)

    def _kept(self, claim: Claim, best: Best | None) -> list[int]:
        """Earlier checkpoints that stay live beside the one being written: the last ones, and the best of each."""
        records = live_checkpoints(claim.records)
        last = records[: self._keep_last - 1]
        needed = {(record.body["bestSoFar"] or {}).get("step") for record in last} | {best.step if best else None}
        bests: dict[int, int] = {}
        for record in records:  # newest first: of two of the same step, the newer
            if record.body["best"] and record.body["step"] in needed:
                bests.setdefault(record.body["step"], record.number)
        return sorted({record.number for record in last} | set(bests.values()))
