"""What a model has made of rows, in storage: whole measurements beside their records, and pieces of one that goes on.

A piece is a record of its own, so an evaluation that dies goes on from the last one. Pieces are needed until a model
is published, which what they were for has come before.
"""

import gzip
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from finetune_api.resolve import digest
from finetune_trainer.adapt.base import InputsOf
from finetune_trainer.attempt import Attempt
from finetune_trainer.data.order import Rows
from finetune_trainer.evaluate import CHUNK, Evaluator, packed, unpacked
from finetune_trainer.signs import Stopped
from finetune_trainer.storage import Damaged, NotFound
from finetune_trainer.storage.commit import Record, RecordKind, find, needed, object_entry, uncommitted
from finetune_trainer.storage.digests import digest_of
from finetune_trainer.tasks import Outcomes

EVERY = 60.0
"""Seconds of measuring that a kill may cost."""
_log = logging.getLogger("finetune.train")


def commit(
    attempt: Attempt, kind: RecordKind, body: Mapping[str, Any], outcomes: Mapping[Any, Outcomes], *, name: str
) -> Record:
    """Append a record with the outcomes of rows beside it, in an object called `name` below the attempt's prefix.

    Raises Fenced, StorageError.
    """
    assert attempt.claim is not None
    data = gzip.compress(packed(outcomes), mtime=0)
    with uncommitted(attempt.claim) as staging:
        attempt.claim.check()
        entry = object_entry(staging.write(f"{attempt.claim.prefix}{name}.json.gz", data))
        return attempt.claim.append(kind, {**body, "objects": [entry]})


def committed(attempt: Attempt, body: Mapping[str, Any]) -> dict[str, Outcomes] | None:
    """The outcomes beside a record; None, and a warning, where they are gone or damaged. Raises StorageError."""
    (entry,) = body["objects"]
    try:
        data = attempt.store.read(entry["key"])
        wrong = None if digest_of(data, like=entry["digest"]) == entry["digest"] else "is damaged"
    except NotFound:
        wrong = "is missing"
    except Damaged:
        wrong = "is damaged"
    if wrong is None:
        return unpacked(gzip.decompress(data))
    _log.warning("%s %s; what it held is measured again", entry["key"], wrong)
    return None


def outcomes(
    attempt: Attempt,
    evaluator: Evaluator,
    model: Any,
    rows: Rows,
    *,
    of: Mapping[str, Any],
    inputs_of: InputsOf,
    generate: bool = True,
) -> Outcomes:
    """As the evaluator's, on one rank, but for the pieces that attempts have committed. `of` tells measurements of a
    run apart: which model, which encoded store. Raises Stopped, after a commit of what was found, Fenced, StorageError.
    """
    about = {"rows": digest_of(rows.tobytes()), "chunk": CHUNK, "generate": generate}
    pieces = Pieces(attempt, digest({**of, **about})[:16])
    try:
        found = evaluator.outcomes(model, rows, inputs_of=inputs_of, generate=generate, pieces=pieces)
        attempt.heart.beat_or_stop()  # asked for in the last chunk
    except Stopped:
        pieces.commit()
        raise
    return found


class Pieces:
    """Predictions for chunks of rows, by the chunk's number, of one measurement."""

    def __init__(self, attempt: Attempt, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempt, self._key, self._clock = attempt, key, clock
        self.found: dict[int, Outcomes] = {}
        """All that is known, of earlier attempts, too, unless a publication has made it needless."""
        for record in find(needed(attempt.records), RecordKind.MEASURED):
            if record.body.get("of") == key:
                known = committed(attempt, record.body) or {}
                self.found |= {int(number): predictions for number, predictions in known.items()}
        if self.found:
            _log.info("%d chunks of rows have been measured by an earlier attempt", len(self.found))
        self._new: dict[int, Outcomes] = {}
        self._since = clock()

    def add(self, number: int, predictions: Outcomes) -> None:
        """Those for one chunk. Raises Fenced, StorageError."""
        self.found[number] = self._new[number] = predictions
        if self._clock() - self._since >= EVERY:
            self.commit()

    def commit(self) -> None:
        """Commit what is new. Raises Fenced, StorageError."""
        if self._new:
            body = {"of": self._key, "chunks": sorted(self._new)}
            name = f"measured/{self._key}/{min(self._new)}"
            commit(self._attempt, RecordKind.MEASURED, body, self._new, name=name)
        self._new, self._since = {}, self._clock()
