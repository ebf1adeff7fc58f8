"""`finetune data where`: on which rows a step of a run trains, by file and line.

The order of a run is a pure function of its record and its encoded store (data/order.py), so the answer needs neither
model nor GPU, and is the same before, while and after the step is trained.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from finetune_api.contract import ExitCode, RunConfig
from finetune_trainer import lastmessage
from finetune_trainer.batches import leading, learner_of, mixture_of, order_of, possible_packs, steps_of
from finetune_trainer.config import storage_settings
from finetune_trainer.data.batch import Encoded, EncodedError
from finetune_trainer.data.order import Rows
from finetune_trainer.data.packing import Packs
from finetune_trainer.data.read import DataError
from finetune_trainer.local import InvalidDocumentError, load
from finetune_trainer.pinned import is_of
from finetune_trainer.run import RunRecord, read_record, run_key
from finetune_trainer.storage import Damaged, StorageError, Store, open_store
from finetune_trainer.storage.commit import RecordKind, RunLog, find


@dataclass(frozen=True)
class Step:
    """What one optimizer step sees."""

    run: str
    total: int
    """Steps of the whole run."""
    epoch: int
    """Counted from 1, as the batch of the epoch is."""
    batch: int
    batches: int
    """Of an epoch."""
    packed: bool
    sequences: list[list[str]]
    """For each sequence of the batch its rows, as `<uri>:<line>`; those of a folder as the address of the file."""


def main(file: Path, *, step: int, run: str | None, profile: Path | None, credentials: Path | None) -> int:
    """Print the rows and return the exit code."""
    secrets = lastmessage.secrets_of(credentials)
    try:
        found = rows_of_step(load(file, profile), step=step, run=run, credentials=credentials)
    except InvalidDocumentError as error:
        print(error, file=sys.stderr)
        return ExitCode.INVALID
    except (StorageError, DataError) as error:
        return lastmessage.tell(error, secrets)
    rows = sum(map(len, found.sequences))
    many = f"{rows} rows in {len(found.sequences)} sequences" if found.packed else f"{rows} rows"
    where = f"batch {found.batch} of {found.batches} of epoch {found.epoch}"
    print(f"run {found.run}, step {step} of {found.total}: {where}, {many}", file=sys.stderr)
    for number, sequence in enumerate(found.sequences, start=1):
        for row in sequence:
            print(f"{row}\tsequence {number}" if found.packed else row)
    return ExitCode.DONE


def rows_of_step(config: RunConfig, *, step: int, run: str | None, credentials: Path | None) -> Step:
    """The rows of a step, counted from 1. Raises StorageError; DataError where there is no such run or step."""
    output = open_store(config.output.uri, storage_settings(config, credentials))
    record = _record(config, output, run)
    with TemporaryDirectory(prefix="finetune-") as scratch:
        path = Path(scratch) / "encoded.safetensors"
        output.download(record.encoded.key, path, digest=record.encoded.digest)
        try:
            encoded = Encoded(path)
        except EncodedError as error:
            raise DataError("FormatUnknown", f"{output.uri}/{record.encoded.key}: {error}.") from error
        return _step(config, record, encoded, step=step, packs=_packs(config, record, encoded, output))


def _record(config: RunConfig, output: Store, run: str | None) -> RunRecord:
    """Of the run that is asked for, else of the newest one that is this document's."""
    keys = {
        info.key: info for info in output.list("runs/") if info.key.count("/") == 2 and info.key.endswith("/run.json")
    }
    if run is not None:
        keys = {key: info for key, info in keys.items() if key == run_key(run)}
    found = []
    for key, info in keys.items():
        try:
            found.append((info.modified, key, read_record(output, key, info.etag)))
        except StorageError as error:
            if run is not None or not (isinstance(error, Damaged) or error.reason == "UnknownFormat"):
                raise  # of others, a damaged one, or another version's, is not in the way
    mine = [entry for entry in found if is_of(config, entry[2])]
    if mine:
        return max(mine, key=lambda entry: (entry[0] is not None, entry[0], entry[1]))[2]
    if run is not None and found:
        raise DataError("RunUnknown", f"Run {run} is of another document: give the document as it was for that run.")
    raise DataError(
        "RunUnknown",
        f"{output.uri} has no run {run}: status.run.id names it."
        if run is not None
        else f"{output.uri} has no run of this document as it stands: start it, or give the document as it was.",
    )


def _packs(config: RunConfig, record: RunRecord, encoded: Encoded, output: Store) -> Packs | None:
    """What batches are made of. Only training finds out whether the model keeps rows apart; its checkpoints say so."""
    packs = possible_packs(config, record, learner=learner_of(config, record), encoded=encoded)
    if packs is None or config.training.packing:
        return packs
    checkpoints = find(RunLog(output, record.run_id).read(), RecordKind.CHECKPOINT)
    packed = checkpoints[-1].body.get("packed") if checkpoints else None
    if packed is None:
        raise DataError(
            "PackingUnknown",
            "Whether rows share sequences is known once the run has committed a checkpoint: ask again then.",
        )
    return packs if packed else None


def _step(config: RunConfig, record: RunRecord, encoded: Encoded, *, step: int, packs: Packs | None) -> Step:
    mixture = mixture_of(config, record, encoded=encoded, packs=packs)
    learner = learner_of(config, record)
    order = order_of(config, learner=learner, encoded=encoded, packs=packs, mixture=mixture)
    total = steps_of(config, units=order.rows)
    if not 1 <= step <= total:
        raise DataError("StepUnknown", f"Run {record.run_id} has steps 1 to {total}, not {step}.")
    epoch, batch = divmod(step - 1, order.steps_per_epoch)
    units = order.batch(step - 1)
    sequences = [leading(encoded, None)[units[place : place + 1]] for place in range(len(units))]
    if packs is not None:
        sequences = packs.of(units)
    return Step(
        run=record.run_id,
        total=total,
        epoch=epoch + 1,
        batch=batch + 1,
        batches=order.steps_per_epoch,
        packed=packs is not None,
        sequences=[_named(record, encoded, rows) for rows in sequences],
    )


def _named(record: RunRecord, encoded: Encoded, rows: Rows) -> list[str]:
    places = np.stack([encoded.values(name, rows) for name in ("source", "row")], axis=1).tolist()
    paths = (
        [path.tobytes().decode() for path in encoded.each("path", rows)] if encoded.has("path") else [""] * len(rows)
    )
    uris = [record.manifest[source].uri for source, _ in places]
    return [
        f"{uri}{path}" if path and uri.endswith("/") else f"{uri}:{row}"
        for uri, path, (_, row) in zip(uris, paths, places, strict=True)
    ]
