"""Repositories of the Hugging Face Hub as stores to read from, by huggingface_hub: hf://org/name@revision/path.

A revision (a branch or tag; `main` when none is given) is resolved to a commit at the first question; from then on the
store's URI names the commit, so that what preflight has looked at is what trainers download, whatever happens to the
branch. An object's etag is its content's: the SHA-256 of a large file, git's own hash of a small one.

The Hub's address is HF_ENDPOINT; a token is the file HF_TOKEN among the credentials, else what huggingface_hub finds.
"""

import io
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast
from urllib.parse import unquote

from .base import (
    MIB,
    AccessDenied,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Unavailable,
    Unreachable,
    check_key,
    check_prefix,
    mismatch,
)
from .digests import Hasher, is_digest, told_sha256
from .files import file_error, pour, publish, temporary

TOKEN = "HF_TOKEN"  # noqa: S105 - the name of a file
_BLOCK = 16 * MIB
_TIMEOUT = 30.0
_PAUSES = (1.0, 2.0, 4.0, 8.0)
_TRANSPORTS = ("httpx", "httpx2", "requests", "urllib3")


class HfStore:
    """The files of one repository at one commit, below `path`. Everything that writes raises StorageError ReadOnly."""

    def __init__(self, repository: str, path: str, settings: StorageSettings) -> None:
        """`repository` is `org/name@revision`, or the same after `datasets/`; opens no connection."""
        name, _, revision = repository.partition("@")
        kind, _, rest = name.partition("/")
        self._repository = name
        self._type = "dataset" if kind == "datasets" and "/" in rest else "model"
        self._id = rest if self._type == "dataset" else name
        self._asked = unquote(revision) or "main"
        self._commit: str | None = None
        self._path = path
        self._settings = settings

    def __repr__(self) -> str:
        return f"HfStore({self.uri})"

    @property
    def uri(self) -> str:
        revision = self._commit or self._asked.replace("/", "%2F")
        return "/".join(filter(None, (f"hf://{self._repository}@{revision}", self._path)))

    def now(self) -> datetime:
        return datetime.now(UTC)

    def head(self, key: str) -> ObjectInfo | None:
        name = self._name(check_key(key))
        found = self._asked_again(
            "head",
            key,
            lambda: self._api.get_paths_info(self._id, [name], revision=self._resolved(), repo_type=self._type),
        )
        files = [entry for entry in found if _is_file(entry)]
        return self._info(files[0]) if files else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        directory = self._name(prefix.rpartition("/")[0]) or None
        entries = self._asked_again("list", prefix, lambda: [*self._tree(directory)])
        infos = [self._info(entry) for entry in entries if _is_file(entry)]
        return iter(sorted((info for info in infos if info.key.startswith(prefix)), key=lambda info: info.key))

    def read(self, key: str, *, if_match: str | None = None, limit: int | None = None) -> bytes:
        info = self._matching(key, if_match)
        size = info.size if limit is None else min(limit, info.size)
        return b"".join(self._range(key, start, min(start + _BLOCK, size) - 1) for start in range(0, size, _BLOCK))

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        info = self._matching(key, if_match)
        with _Ranges(lambda first, last: self._range(key, first, last), info.size) as raw:
            yield cast("BinaryIO", io.BufferedReader(raw, min(_BLOCK, max(1, info.size))))

    def download(
        self,
        key: str,
        path: Path,
        *,
        if_match: str | None = None,
        digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ObjectInfo:
        info = self._matching(key, if_match)
        others = [info.digest] if info.digest not in (None, digest) else []  # what the hub tells is of another kind
        hashers, size = [Hasher(wanted) for wanted in (digest, *others)], 0
        with file_error(path), temporary(path) as target:
            with open(target, "wb") as sink:
                while size < info.size:
                    block = self._range(key, size, min(size + _BLOCK, info.size) - 1)
                    for hasher in hashers:
                        hasher.update(block)
                    pour(block, sink)
                    size += len(block)
                    if progress is not None:
                        progress(size)
            found = [hasher.digest() for hasher in hashers]
            for wanted, one in zip((digest, *others), found, strict=True):
                if wanted is not None and one != wanted:
                    raise mismatch(f"{self.uri}/{key}", wanted=wanted, found=one)
            publish(target, path)
        return ObjectInfo(key, size, info.etag, info.modified, found[0])

    def write(self, key: str, data: bytes) -> ObjectInfo:
        self._refuse(key)

    def upload(self, path: Path, key: str, *, progress: Callable[[int], None] | None = None) -> ObjectInfo:
        self._refuse(key)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        self._refuse(key)

    def replace(self, key: str, data: bytes, *, if_match: str | None) -> ObjectInfo:
        self._refuse(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._refuse(key)

    def end_unfinished(self, prefix: str, wanted: Callable[[str], bool]) -> None:
        self._refuse(prefix)

    def _refuse(self, key: str) -> NoReturn:
        raise StorageError(
            "ReadOnly", f"{self.uri}/{key} is not written: the Hub is read only; write to s3://.", environment=False
        )

    @cached_property
    def _endpoint(self) -> str:
        return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"

    @property
    def _token(self) -> str | None:
        directory = self._settings.credentials_dir
        try:
            return (directory / TOKEN).read_text().strip() or None if directory else None
        except FileNotFoundError:
            return None

    @property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._endpoint, token=self._token)

    def _resolved(self) -> str:
        if self._commit is None:
            info = self._api.repo_info(self._id, revision=self._asked, repo_type=self._type, timeout=_TIMEOUT)
            self._commit = str(info.sha)
        return self._commit

    def _tree(self, directory: str | None) -> Iterable[Any]:
        from huggingface_hub.errors import EntryNotFoundError

        commit = self._resolved()
        try:
            yield from self._api.list_repo_tree(
                self._id, directory, recursive=True, revision=commit, repo_type=self._type
            )
        except EntryNotFoundError:  # no such directory: a store has none
            return

    def _range(self, key: str, first: int, last: int) -> bytes:
        """Bytes `first` to `last`, both included."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        with self._errors("read", key):
            commit = self._resolved()
            name = self._name(key)
            url = hf_hub_url(self._id, name, repo_type=self._type, revision=commit, endpoint=self._endpoint)
            headers = {**build_hf_headers(token=self._token), "Range": f"bytes={first}-{last}"}
            answer = http_backoff("GET", url, headers=headers, timeout=_TIMEOUT)
            hf_raise_for_status(answer)
            data = bytes(answer.content)
        if len(data) != last - first + 1:
            raise Unavailable("StoreUnavailable", f"{self.uri}/{key}: the Hub sent {len(data)} bytes; try again.")
        return data

    def _matching(self, key: str, if_match: str | None) -> ObjectInfo:
        info = self.head(key)
        if info is None:
            raise NotFound("ObjectNotFound", f"There is no object {self.uri}/{key}: correct the address.")
        if if_match is not None and info.etag != if_match:
            raise PreconditionFailed(
                "ObjectChanged", f"{self.uri}/{key} is not the version that was asked for: the revision has moved."
            )
        return info

    def _name(self, key: str) -> str:
        return "/".join(filter(None, (self._path, key)))

    def _info(self, entry: Any) -> ObjectInfo:
        key = entry.path[len(self._path) :].lstrip("/") if self._path else entry.path
        sha256 = entry.lfs.sha256 if entry.lfs else None
        told = told_sha256(sha256) if sha256 and is_digest(told_sha256(sha256)) else None
        return ObjectInfo(key, int(entry.size), sha256 or str(entry.blob_id), None, told)

    def _asked_again(self, operation: str, key: str, ask: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """What the API answers; a server in trouble is asked again, as the library does only for content."""
        for pause in _PAUSES:
            try:
                with self._errors(operation, key):
                    return ask()
            except Unavailable:
                time.sleep(pause)
        with self._errors(operation, key):
            return ask()

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        try:
            with _online:
                yield
        except (StorageError, OSError) as error:
            raise (error if isinstance(error, StorageError) else self._translated(error, operation, key)) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in _TRANSPORTS:
                raise
            raise Unreachable(
                "EndpointUnreachable",
                f"Nothing answered at {self._endpoint} ({type(error).__name__}): check HF_ENDPOINT and the network.",
            ) from error

    def _translated(self, error: OSError, operation: str, key: str) -> StorageError:
        """The library's errors, all of them OSError, as ours."""
        from huggingface_hub import errors

        what = f"{operation} of {self.uri}/{key}".rstrip("/")
        status = getattr(getattr(error, "response", None), "status_code", None)
        whose = "the token of HF_TOKEN" if self._token else "no token; give HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            return AccessDenied(
                "AccessDenied", f"The {what} was denied: the repository is gated; accept its terms ({whose})."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return NotFound(
                "BucketNotFound", f"The {what} failed: there is no repository {self._id}, or it is private ({whose})."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return NotFound(
                "RevisionNotFound", f"The {what} failed: {self._id} has no revision {self._asked}; correct the address."
            )
        if isinstance(error, errors.EntryNotFoundError):
            return NotFound("ObjectNotFound", f"The {what} failed: no such file; correct the address.")
        if status in (401, 403):
            return AccessDenied("AccessDenied", f"The {what} was denied ({status}, {whose}).")
        if isinstance(error, errors.HfHubHTTPError):
            return Unavailable("StoreUnavailable", f"The {what} failed: the Hub answered {status}; try again later.")
        return Unreachable(
            "EndpointUnreachable", f"Nothing answered at {self._endpoint} ({error}): check HF_ENDPOINT and the network."
        )


def _is_file(entry: Any) -> bool:
    return hasattr(entry, "blob_id")


class _Ranges(io.RawIOBase):
    """Bytes of a known number, fetched in ranges."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size, self._at = fetch, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        count = min(len(buffer), self._size - self._at)
        if count > 0:
            buffer[:count] = self._fetch(self._at, self._at + count - 1)
            self._at += count
        return count


class _Online:
    """While it is entered, huggingface_hub asks the Hub although HF_HUB_OFFLINE is set.

    The trainer sets that for its ranks, so that no library looks for files behind its back. An hf:// address in the
    document is the opposite: it asks for the Hub.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._before = False

    def __enter__(self) -> None:
        from huggingface_hub import constants

        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._before = bool(constants.HF_HUB_OFFLINE)
                constants.HF_HUB_OFFLINE = False

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import constants

        with self._lock:
            self._entered -= 1
            if not self._entered:
                constants.HF_HUB_OFFLINE = self._before


_online = _Online()
