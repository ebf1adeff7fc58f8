"""Storage: one small protocol over S3 and local directories, and the commit log built on it."""

import os
import secrets
from pathlib import Path

from .base import (
    AccessDenied,
    AlreadyExists,
    Damaged,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Store,
    Unavailable,
    Unreachable,
    parse_uri,
    split_uri,
)

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "Damaged",
    "NotFound",
    "ObjectInfo",
    "PreconditionFailed",
    "StorageError",
    "StorageSettings",
    "Store",
    "Unavailable",
    "Unreachable",
    "open_store",
    "probe_conditional_writes",
    "split_uri",
]


def open_store(uri: str, settings: StorageSettings) -> Store:
    """The store at `uri`. Opens no connection. Raises StorageError InvalidUri or EndpointRefused."""
    scheme, bucket, path = parse_uri(uri)
    if scheme == "file":
        from .local import LocalStore

        return LocalStore(Path(os.path.normpath(path)))
    if scheme == "hf":
        from .hf import HfStore

        return HfStore(bucket, path, settings)
    from .s3 import S3Store  # the SDK takes a third of a second to import; a local run needs none of it

    return S3Store(bucket, path, settings)


def probe_conditional_writes(store: Store, prefix: str) -> bool:
    """Whether the store keeps its word on conditional writes. Some S3 servers silently ignore the condition.

    Writes a small object below `prefix` and deletes it again.
    """
    key = "/".join(filter(None, (prefix.strip("/"), f"probe-{secrets.token_hex(8)}")))
    try:
        store.create(key, b"first")
    except (AccessDenied, NotFound, Unreachable):
        raise  # nothing was written; a denied clean-up would only hide that
    except StorageError as error:
        store.delete([key])  # its answer may have been lost
        if error.reason == "ConditionalWritesUnsupported":
            return False
        raise
    try:
        try:
            store.create(key, b"second")
            return False
        except AlreadyExists:
            pass
        try:
            store.replace(key, b"third", if_match="0" * 32)
            return False
        except PreconditionFailed:
            return store.read(key) == b"first"
    except StorageError as error:
        if error.reason == "ConditionalWritesUnsupported":
            return False
        raise
    finally:
        store.delete([key])
