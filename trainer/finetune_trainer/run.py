"""What preflight leaves in storage for the train pods: run.json and the encoded store. Torch-free.

Layout under output.uri (api.md): `runs/<run id>/run.json`, created once and never changed, and
`encoded/<key>.safetensors`, addressed by what it was made of.
"""

from typing import Any, Literal

from pydantic import Field

from finetune_api.base import Model

TRAIN, VALIDATION, TEST = 0, 1, 2
"""Values of the encoded store's tensor `split`."""


def run_key(run_id: str) -> str:
    return f"runs/{run_id}/run.json"


def encoded_key(key: str) -> str:
    return f"encoded/{key}.safetensors"


class Input(Model):
    """One pinned input object. Every later read uses If-Match with the ETag and checks the digest."""

    role: str = Field(description="model/<file name>, train/<index>, validation, test")
    uri: str
    size: int
    etag: str
    sha256: str


class EncodedRef(Model):
    key: str = Field(description="key of the object under output.uri")
    sha256: str
    rows: int


class RunRecord(Model):
    """run.json: the identity's inputs, readable, the manifest, and what preflight fixed."""

    schema_version: Literal[1] = 1
    run_id: str
    identity: dict[str, Any]
    manifest: list[Input]
    labels: list[str] = Field(description="in the order of the model's outputs")
    multi_label: bool
    model_max_length: int = Field(description="tokens: data.maxLength, or the model's limit if that is lower")
    pad_token_id: int
    encoded: EncodedRef


# The encoded store is one safetensors file (later: shards) with these tensors; row i has the tokens
# input_ids[offsets[i]:offsets[i + 1]], special tokens included, already truncated:
#   input_ids  int32  [tokens]
#   offsets    int64  [rows + 1]
#   labels     int32  [rows]            index of the label, or
#              uint8  [rows, labels]    multi-hot, for multi-label data
#   split      uint8  [rows]            TRAIN, VALIDATION or TEST
#   source     int32  [rows]            position in the manifest of the file a row came from
#   row        int64  [rows]            1-based line (jsonl, csv) or row (parquet) in that file
# Metadata of the safetensors header: {"format": "finetune-encoded-1"}.
