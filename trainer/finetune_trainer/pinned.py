"""A run that was begun: whether it is what the document asks for, and what has changed in storage since. Torch-free.

A run goes on with the inputs it began with, however long it rested: its record has them, and neither a row is read
again nor a new identity computed.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune_api.contract import RunConfig
from finetune_api.resolve import run_id, train_identity
from finetune_trainer import tasks
from finetune_trainer.data.read import DataError, Rows, locate
from finetune_trainer.run import (
    TEST,
    TRAIN,
    VALIDATION,
    EncodedRef,
    Input,
    RunRecord,
    input_changed,
    inputs_key,
    read_inputs,
    run_key,
)
from finetune_trainer.storage import NotFound, StorageError, StorageSettings, Store, open_store, split_uri
from finetune_trainer.storage.base import hash_object

_log = logging.getLogger("finetune.preflight")
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_NAMED = 3
"""Inputs that a sentence names."""


class CannotGoOnError(Exception):
    """The run is not to be gone on with, and why in a few words: everything is read anew."""


class RowsLostError(CannotGoOnError):
    """Nothing but the encoded rows is lost: the same rows bring them back, and others must not take their place."""


@dataclass(frozen=True)
class Source:
    """Rows that the document asks for. `split` None: they are divided between training and validation."""

    role: str
    uri: str
    split: int | None
    part: str = ""
    """Of which of several tasks the rows are."""


def sources(config: RunConfig) -> list[Source]:
    """All but those of retention sets, in the order they are read in."""
    data = config.data
    split = None if data.validation_fraction is not None else TRAIN
    parts = data.train_tasks or [""] * len(data.train)
    asked = [
        Source(f"train/{n}", uri, split, part) for n, (uri, part) in enumerate(zip(data.train, parts, strict=True))
    ]
    for role, uri, several, held in (
        ("validation", data.validation_uri, data.validation_sources, VALIDATION),
        ("test", data.test_uri, data.test_sources, TEST),
    ):
        asked += [Source(role, uri, held)] if uri is not None else []
        asked += [Source(f"{role}/{n}/{one.task}", one.uri, held, one.task) for n, one in enumerate(several or ())]
    return asked


def addresses(config: RunConfig) -> dict[str, str]:
    """What the document calls the inputs, by role."""
    kept = {f"retention/{one.name}": one.uri for one in config.evaluation.retention}
    return {"model": config.model, **{source.role: source.uri for source in sources(config)}, **kept}


def is_of(config: RunConfig, record: RunRecord) -> bool:
    """Whether a run of such inputs is what the document asks for."""
    return train_identity(config, labels=record.labels, inputs=record.identity.get("inputs", {})) == record.identity


def differs(config: RunConfig, record: RunRecord) -> str | None:
    """Why a record of the document's run is not of its inputs; None where it is."""
    if record.addresses != addresses(config) or config.task.labels not in (None, record.labels):
        return "has the inputs of another document"
    measured = {one.name: one.task.document() for one in config.evaluation.retention}
    kept = {name: one.task for name, one in record.retention.items()}
    if list(record.slices) != config.evaluation.slices or kept != measured:
        return "is of other rows to measure, or of other slices of them"
    return None


def check_record(config: RunConfig, record: RunRecord) -> None:
    """Raises StorageError, after which a preflight looks, where an attempt would measure what its document does not
    ask for. A record of before there were addresses is believed."""
    why = differs(config, record) if record.addresses else None
    if why is not None:
        raise StorageError(
            "InputsOfAnotherDocument",
            f"What was pinned for run {record.run_id} {why}: preflight looks again.",
        )


def begun(config: RunConfig, output: Store, run: str, inputs: str | None = None) -> RunRecord:
    """The record of a run that was begun for this very document. `run` and `inputs` come from a status, which anybody
    may have written: nothing is believed of them. Raises CannotGoOnError, and StorageError also where the record is
    damaged."""
    if not _RUN_ID.fullmatch(run):
        raise CannotGoOnError("that is no run")
    key = run_key(run) if inputs is None else inputs_key(run, inputs)
    try:
        record = read_inputs(output, run, inputs)
    except NotFound as error:
        if error.reason != "ObjectNotFound":
            raise
        raise CannotGoOnError(f"{key} is missing") from error
    if not (record.run_id == run == run_id(record.identity) and is_of(config, record)):
        raise CannotGoOnError(f"{key} is of another document")
    if not record.addresses:
        raise CannotGoOnError(f"{key} is of a version that did not tell by which addresses the inputs were asked for")
    if why := differs(config, record):
        raise CannotGoOnError(f"{key} {why}")
    return record


def check_stores(output: Store, stores: Sequence[EncodedRef]) -> None:
    """Raises RowsLostError where an encoded store is not there, or not whole."""
    for stored in stores:
        info = output.head(stored.key)
        if info is None:
            raise RowsLostError(f"{stored.key} is missing")
        if hash_object(output, info, like=stored.digest) != stored.digest:
            raise RowsLostError(f"{stored.key} is damaged")


def same_base(record: RunRecord, settings: StorageSettings) -> list[Input]:
    """The manifest, with the tags that the base model's files have now: the very bytes may have been uploaded again.

    Raises StorageError InputChanged where they are others: a run cannot change its base.
    """
    found = []
    for entry in record.manifest:
        if entry.role.startswith("model/"):
            store, key = _place(entry.uri, settings)
            info = store.head(key)
            if info is None:
                raise NotFound("ObjectNotFound", f"There is no object {entry.uri} any more: restore it to go on.")
            if info.etag != entry.etag:
                if info.size != entry.size or hash_object(store, info, like=entry.digest) != entry.digest:
                    raise input_changed(entry.uri)
                entry = entry.model_copy(update={"etag": info.etag})
        found.append(entry)
    return found


def base_of(record: RunRecord) -> str:
    """The URI of the base model as it was pinned: of the Hub it names the commit."""
    entry = next(entry for entry in record.manifest if entry.role.startswith("model/"))
    return entry.uri.removesuffix(f"/{entry.role.removeprefix('model/')}")


def news_of_rows(config: RunConfig, record: RunRecord, settings: StorageSettings, scratch: Path) -> list[str]:
    """In words that rows under the same address are others by now, or may be. Nothing depends on them: what cannot be
    looked at is no reason to wait."""
    kept = [Source(f"retention/{one.name}", one.uri, VALIDATION) for one in config.evaluation.retention]
    named = tasks.get(config).reads == "images"
    found: dict[_Since, list[Source]] = {"same": [], "written": [], "changed": []}
    for source in [*sources(config), *kept]:
        found[_since(source, record, settings, scratch, images=named)].append(source)
    news = []
    if changed := found["changed"]:
        news.append(f"{_named(changed)} changed since this run began; {_GOES_ON} the new ones.")
    if written := found["written"]:
        said = "been written again since this run began, perhaps with the same content: that of images is not compared"
        news.append(f"{_named(written)} {said}; {_GOES_ON} new ones.")
    return news


_GOES_ON = "the run goes on with the rows it began with; change the document to train on"


def _named(some: Sequence[Source]) -> str:
    named = ", ".join(f"{source.role} {source.uri}" for source in some[:_NAMED])
    more = f" and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
    return f"{named}{more} {'has' if len(some) == 1 else 'have'}"


_Since = Literal["same", "written", "changed"]
"""What has come of rows; those that were written again may be the same ones."""


def _since(source: Source, record: RunRecord, settings: StorageSettings, scratch: Path, *, images: bool) -> _Since:
    """By tags, and where these differ by content: the very bytes may have been uploaded again. The digest of a folder
    of images, and of rows that name images beside them, covers every image, and these are not read for it."""
    pinned = [entry for entry in record.manifest if _is_part(entry.role, source.role)]
    found: _Since = "same"
    try:
        places = locate(source.uri, settings)
        if len(places) != len(pinned):
            return "changed"
        for place, entry in zip(places, pinned, strict=True):
            info = Rows(place.store, place.key, uri=place.uri, wanted=(), scratch=scratch).info
            if info.etag == entry.etag:
                continue
            if info.size != entry.size:
                return "changed"
            if place.uri.endswith("/") or hash_object(place.store, info, like=entry.digest) != entry.digest:
                if not images:
                    return "changed"
                found = "written"
    except (DataError, NotFound):
        return "changed"  # they are gone
    except StorageError as error:
        _log.warning("%s %s cannot be compared with what the run began with: %s", source.role, source.uri, error)
    return found


def _is_part(role: str, of: str) -> bool:
    """Whether it is that of the one file, or of one of the files that a pattern matches."""
    return role == of or (role.startswith(f"{of}/") and role.removeprefix(f"{of}/").isdecimal())


def _place(uri: str, settings: StorageSettings) -> tuple[Store, str]:
    root, key = split_uri(uri)
    return open_store(root, settings), key
