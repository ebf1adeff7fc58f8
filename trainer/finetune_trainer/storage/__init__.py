"""Storage: one small protocol over S3 and local directories, and the commit log built on it."""

import os
import re
import secrets
from datetime import timedelta
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
    "remove_old_probes",
    "split_uri",
]


_PROBED = timedelta(hours=1)
"""More than any process needs for a probe."""


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
    key = f"{_probes(prefix)}{secrets.token_hex(8)}"
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


def remove_old_probes(store: Store, prefix: str) -> list[str]:
    """Delete the probes below `prefix` that killed processes have left; returns their keys. A younger one may be
    another process's, which would be told a wrong answer."""
    probe = re.compile(re.escape(_probes(prefix)) + r"[0-9a-f]{16}")
    found = [info for info in store.list(_probes(prefix)) if probe.fullmatch(info.key)]
    before = store.now() - _PROBED if found else None
    old = [info.key for info in found if before and info.modified and info.modified < before]
    store.delete(old)
    return old


def _probes(prefix: str) -> str:
    """How the keys of probes begin."""
    return "/".join(filter(None, (prefix.strip("/"), "probe-")))
