"""What preflight leaves in storage for the train pods: records of a run's inputs, and the encoded store. Torch-free.

Layout under output.uri: `runs/<run id>/inputs/<name>.json`, named by its content, which the attempts of the document
read that it was made for; `runs/<run id>/run.json`, the same as the run's newest preflight has made it; and
`encoded/<key>.safetensors`, named by its content.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from finetune_api.base import Model
from finetune_api.resolve import digest
from finetune_trainer.storage import Damaged, NotFound, StorageError, Store
from finetune_trainer.storage.digests import PATTERN, hex_of

TRAIN, VALIDATION, TEST, LEFT_OUT = 0, 1, 2, 3
"""Values of the encoded store's tensor `split`."""


_SEAL = "sha256"
_NAME = re.compile(r"[0-9a-f]{32}")


def run_key(run_id: str) -> str:
    return f"runs/{run_id}/run.json"


def inputs_key(run_id: str, name: str) -> str:
    return f"runs/{run_id}/inputs/{name}.json"


def encoded_key(content: str) -> str:
    """Where an encoded store with that digest lies."""
    return f"encoded/{hex_of(content)[:32]}.safetensors"


class Input(Model):
    """One pinned input object. Every later read uses If-Match with the ETag and checks the digest."""

    role: str = Field(
        description="model/<file name>, train/<index>, validation, test, retention/<name>; with /<number> of a "
        "pattern's files"
    )
    uri: str
    size: int
    etag: str
    digest: str = Field(pattern=PATTERN)
    sha256: str | None = Field(
        None, pattern=PATTERN, description="of the base model's files: the run's identity, wherever they lie"
    )


MEASURED = ("test", "retention")
"""How the roles of inputs begin that decide what is measured, not what is trained."""


def tested(inputs: Iterable[Input]) -> str | None:
    """Digest of what a model is tested on; None where there are no test rows."""
    tests = {entry.role: entry.digest for entry in inputs if entry.role.partition("/")[0] == "test"}
    return tests["test"] if list(tests) == ["test"] else digest(tests) if tests else None


def retained(inputs: Iterable[Input]) -> dict[str, str]:
    """Digests of the rows of each retention set, by its name."""
    files: dict[str, list[str]] = {}
    for entry in inputs:
        kind, _, rest = entry.role.partition("/")
        if kind == "retention":
            files.setdefault(rest.partition("/")[0], []).append(entry.digest)
    return {name: digest(found) for name, found in files.items()}


class EncodedRef(Model):
    key: str = Field(description="key of the object under output.uri")
    digest: str = Field(pattern=PATTERN)
    rows: int


class RetentionRecord(Model):
    """What preflight fixed of a retention set."""

    task: dict[str, Any] = Field(description="what the document says of its rows")
    labels: list[str] = Field(description="those of its rows, in order; empty where rows have none")
    form: str = Field(description="as in RunRecord")
    facts: dict[str, Any] = Field(description="as in RunRecord")
    encoded: EncodedRef


class RunRecord(Model):
    """What the attempts of a document read: the identity's inputs, readable, the manifest, and what preflight fixed."""

    schema_version: Literal[2] = 2
    run_id: str
    identity: dict[str, Any]
    manifest: list[Input]
    addresses: dict[str, str] = Field(
        default={}, description="what the document calls the inputs, by role; all files of a pattern have one"
    )
    labels: list[str] = Field(description="in the order of the model's outputs")
    form: str = Field(description="how all rows are written, where a task reads several ways")
    model_max_length: int = Field(description="tokens: data.maxLength, or the model's limit if that is lower; or 0")
    pad_token_id: int
    facts: dict[str, Any] = Field(description="what the task has found out beside labels")
    license: str | None = Field(None, description="of the base model, in lower case, where it is known")
    slices: dict[str, list[str]] = Field(
        default={}, description="values of the columns of evaluation.slices, in the order of their numbers in the store"
    )
    encoded: EncodedRef
    retention: dict[str, RetentionRecord] = Field(
        default={}, description="of each set of evaluation.retention, by name"
    )

    @property
    def name(self) -> str:
        return _seal(self.model_dump(mode="json", by_alias=True))[:32]

    def sealed(self) -> bytes:
        """What is stored: the record and its digest, by which read_record knows it is whole."""
        document = self.model_dump(mode="json", by_alias=True)
        return json.dumps({**document, _SEAL: _seal(document)}, indent=1, ensure_ascii=False).encode()


def read_inputs(output: Store, run_id: str, name: str | None) -> RunRecord:
    """What was pinned for one document; without a name, by the run's newest preflight. Raises as read_record does."""
    if name is None:
        return read_record(output, run_key(run_id))
    if not _NAME.fullmatch(name):  # of a status, which anybody may have written
        raise NotFound("ObjectNotFound", f"Run {run_id} has no inputs of the name that the status tells.")
    return read_record(output, inputs_key(run_id, name), name=name)


def read_record(output: Store, key: str, etag: str | None = None, *, name: str = "") -> RunRecord:
    """A run's record. Raises StorageError; Damaged where it is none, or not as it was written, or of another name."""
    data = output.read(key, if_match=etag)
    record = None
    try:
        document = json.loads(data)
        seal = document.pop(_SEAL, None)
        sealed = (_seal(document), digest(document))  # the other one where an earlier version wrote it
        whole = seal in sealed and seal.startswith(name)
        _check_version(f"{output.uri}/{key}", document.get("schemaVersion") if whole else None)
        record = RunRecord.model_validate(document) if whole else None
    except (ValueError, TypeError, AttributeError, RecursionError):  # ValidationError is a ValueError
        pass
    if record is None:
        raise Damaged(
            "RunRecordDamaged",
            f"{output.uri}/{key} is not what a preflight writes; restore it, or delete it so that it is made anew.",
        )
    return record


def _seal(document: dict[str, Any]) -> str:
    """Of all that it says: slices have the order of their numbers in the store, which a digest does not see."""
    slices = list(document["slices"]) if isinstance(document.get("slices"), dict) else []
    return digest({**document, "slicesInOrder": slices} if len(slices) > 1 else document)


def input_changed(uri: str) -> StorageError:
    """An input that every later attempt needs is not the one that was pinned."""
    return StorageError(
        "InputChanged",
        f"{uri} is not what preflight found; restore it, or change the document to use the new one.",
        environment=False,
    )


def _check_version(name: str, version: object) -> None:
    if isinstance(version, int) and version != RunRecord.model_fields["schema_version"].default:
        raise StorageError(
            "UnknownFormat",
            f"{name} is of another version of this program (schema {version}): use the version that wrote it, or start "
            "the run under another output.",
            environment=False,
        )


# The encoded store is one safetensors file (later: shards). Every row has
#   length  int32 [rows]   what it costs in training, in tokens after any cut
#   split   uint8 [rows]   TRAIN, VALIDATION, TEST or LEFT_OUT
#   source  int32 [rows]   position in the manifest of the file it came from
#   row     int64 [rows]   1-based line (jsonl, csv) or row (parquet) in that file
#   slice.N int32 [rows]   of the column number N of evaluation.slices the number of its value, -1 for none
# and the columns of its task (Task.store): one value a row, or, where a column is ragged, the values
# NAME[NAME.offsets[i]:NAME.offsets[i + 1]] of row i, with NAME.offsets int64 [rows + 1].
# Metadata of the safetensors header: {"format": "finetune-encoded-2"}.
