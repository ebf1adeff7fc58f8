"""What every store offers, and how it fails.

A store holds objects below one root, `s3://bucket/prefix` or `file:///directory`. Objects become visible whole or not
at all, and keys are relative to the root. Everything above this package speaks to a `Store`; nothing else looks at a
URI's scheme.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, runtime_checkable
from urllib.parse import unquote

from .digests import Hasher

MIB = 1024 * 1024
_REPOSITORY = re.compile(r"((?:datasets/)?[\w.-]+/[\w.-]+(?:@[^/@]+)?)(/.*)?")


@dataclass(frozen=True)
class StorageSettings:
    """How one store is reached. Holds where the credentials lie, never the credentials.

    `credentials_dir` is a directory with the files AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and optionally
    AWS_SESSION_TOKEN (a mounted Secret), read again whenever they change; None leaves credentials to the SDK's own
    chain. `credentials_name` is what messages call them, for people who do not see that directory. `addressing` auto
    means path style when an endpoint is set, virtual hosts otherwise. `ca_file` holds the certificates, in PEM, that
    are trusted instead of the usual ones; `ca_name` is what messages call where it comes from. Proxies are the
    environment's.

    Times are in seconds. `deadline` bounds how long one request is retried without progress; `connect_deadline`
    replaces it until the store has answered for the first time, so that a mistyped endpoint is reported within
    seconds while an outage in mid-run is waited for.
    """

    endpoint: str | None = None
    region: str | None = None
    credentials_dir: Path | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    ca_file: Path | None = None
    connect_timeout: float = 3.0
    read_timeout: float = 30.0
    deadline: float = 120.0
    connect_deadline: float = 8.0
    credentials_name: str | None = None
    ca_name: str | None = None


@dataclass(frozen=True)
class ObjectInfo:
    """One object as the store describes it: size in bytes, opaque version tag, digest where it is known."""

    key: str
    size: int
    etag: str
    modified: datetime | None
    digest: str | None = None


class StorageError(Exception):
    """A storage operation failed.

    `reason` is PascalCase and stable; the message is one sentence that names the object, the operation and the
    remedy, and never a secret. `environment` is true where mending the environment (bucket, permission, network,
    space) is enough to go on: exit code 49. Otherwise the document or the stored data is wrong.
    """

    def __init__(self, reason: str, message: str, *, environment: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.environment = environment

    def __reduce__(self) -> tuple[Callable[..., "StorageError"], tuple[object, ...]]:
        return _rebuild, (type(self), self.reason, self.message, self.environment)


def _rebuild(kind: type[StorageError], reason: str, message: str, environment: bool) -> StorageError:
    """Unpickle an error as it was: it crosses process boundaries in worker pools."""
    return kind(reason, message, environment=environment)


class NotFound(StorageError):
    """The bucket or the object does not exist: reasons BucketNotFound, ObjectNotFound."""


class AccessDenied(StorageError):
    """The store refused the identity: InvalidCredentials, CredentialsMissing, CredentialsExpired, AccessDenied."""


class Unreachable(StorageError):
    """Nothing answered at the endpoint: reason EndpointUnreachable."""


class Unavailable(StorageError):
    """The store answered, but only with errors of its own until the deadline: reason StoreUnavailable."""


class AlreadyExists(StorageError):
    """`create` found the key taken: reason AlreadyExists."""

    def __init__(self, reason: str, message: str, *, environment: bool = False) -> None:
        super().__init__(reason, message, environment=environment)


class PreconditionFailed(StorageError):
    """The object is not the version that was asked for: reason ObjectChanged."""

    def __init__(self, reason: str, message: str, *, environment: bool = False) -> None:
        super().__init__(reason, message, environment=environment)


class Damaged(StorageError):
    """Bytes are not those that were written: reason ChecksumMismatch, exit code 43."""

    def __init__(self, reason: str, message: str, *, environment: bool = False) -> None:
        super().__init__(reason, message, environment=environment)


@runtime_checkable
class Store(Protocol):
    """Objects below one root. Every method may raise the errors above; keys are relative and cannot leave the root."""

    @property
    def uri(self) -> str:
        """The root, without a trailing slash."""
        ...

    def now(self) -> datetime:
        """The store's own clock: ages of objects are measured against it, never against this machine's."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Describe an object, or None when it does not exist. Raises NotFound when its bucket does not."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, at any depth, in the order of their keys."""
        ...

    def read(self, key: str, *, if_match: str | None = None, limit: int | None = None) -> bytes:
        """The object's bytes, or the first `limit`. A version other than `if_match` raises PreconditionFailed."""
        ...

    def stream(self, key: str, *, if_match: str | None = None) -> AbstractContextManager[BinaryIO]:
        """Read sequentially. A broken connection is resumed where it broke, on the same version of the object."""
        ...

    def download(
        self,
        key: str,
        path: Path,
        *,
        if_match: str | None = None,
        digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ObjectInfo:
        """Copy an object to a file that appears whole or not at all; the returned info carries its digest.

        `progress` is called with the bytes done so far. Raises Damaged when the content has not the given digest.
        """
        ...

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object, replacing whatever is there."""
        ...

    def upload(self, path: Path, key: str, *, progress: Callable[[int], None] | None = None) -> ObjectInfo:
        """Copy a file to an object, verified on arrival by size and checksum; the returned info carries its digest.

        `progress` is called with the bytes done so far, also while a large file is on its way; what it raises ends the
        upload.
        """
        ...

    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object that must not exist: of many callers exactly one succeeds, the others get AlreadyExists."""
        ...

    def replace(self, key: str, data: bytes, *, if_match: str | None) -> ObjectInfo:
        """Write an object if its etag is still `if_match` (None: if there is none), else raise PreconditionFailed."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that do not exist are no error."""
        ...

    def end_unfinished(self, prefix: str, wanted: Callable[[str], bool]) -> None:
        """Take away what killed processes have begun to write below a prefix and never finished, where `wanted` says so
        of its key: no listing shows it, and it takes room. Whoever is still writing it fails. A store that cannot say
        what that is leaves it."""
        ...


def check_key(key: str) -> str:
    """The key itself, or StorageError InvalidKey where it could leave the root or mean two things on two stores."""
    parts = key.split("/")
    if not key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StorageError(
            "InvalidKey",
            f"The key {key!r} is not a relative path of plain names: separate names by single slashes, without . or ..",
            environment=False,
        )
    return key


def check_prefix(prefix: str) -> str:
    """A prefix is the beginning of a key; it may be empty or end within a name or with a slash."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def parse_uri(uri: str) -> tuple[str, str, str]:
    """Split a URI into scheme, bucket (empty for files) and path. Raises StorageError InvalidUri.

    Keys of s3:// are taken as they stand; paths of file:// are percent-decoded, as `Path.as_uri` encodes them. The
    bucket of hf:// is a repository, `org/name@revision` or the same after `datasets/`.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "s3":
        bucket, _, path = rest.partition("/")
        if bucket and "@" not in bucket:
            return "s3", bucket, path.strip("/")
    if separator and scheme == "file":
        host, _, path = rest.partition("/")
        if host in ("", "localhost"):
            return "file", "", "/" + unquote(path).strip("/")
    if separator and scheme == "hf" and (match := _REPOSITORY.fullmatch(rest)):
        return "hf", match[1], (match[2] or "").strip("/")
    raise StorageError(
        "InvalidUri",
        f"The URI {uri!r} names no store: use s3://bucket/key, hf://org/name@revision or file:///absolute/path.",
        environment=False,
    )


def split_uri(uri: str) -> tuple[str, str]:
    """Split an object's URI into its store's (bucket or directory) and its key. Raises StorageError InvalidUri."""
    scheme, bucket, path = parse_uri(uri)
    if scheme in ("s3", "hf") and path and not uri.endswith("/"):
        return f"{scheme}://{bucket}", path
    directory, _, name = path.rpartition("/")
    if scheme == "file" and name and not uri.endswith("/"):
        return Path(directory or "/").as_uri(), name
    raise StorageError(
        "InvalidUri",
        f"The URI {uri!r} names no object: add the object's key after the bucket or directory.",
        environment=False,
    )


def hash_object(
    store: Store, info: ObjectInfo, *, like: str | None = None, beat: Callable[[], None] = lambda: None
) -> str:
    """The digest of an object as it is stored, in a stream of bounded memory, of the kind of `like`. `beat` is called
    for each block."""
    hasher = Hasher(like)
    read_through(store, info, hasher, beat=beat)
    return hasher.digest()


def read_through(store: Store, info: ObjectInfo, *hashers: Hasher, beat: Callable[[], None] = lambda: None) -> None:
    """Let digests be taken of an object as it is stored, in a stream of bounded memory."""
    with store.stream(info.key, if_match=info.etag) as source:
        while block := source.read(4 * MIB):
            beat()
            for hasher in hashers:
                hasher.update(block)


def mismatch(uri: str, *, wanted: str, found: str) -> Damaged:
    """The error for bytes with another digest than the recorded one."""
    return Damaged(
        "ChecksumMismatch",
        f"{uri} has digest {found[:24]}... where {wanted[:24]}... was recorded: its content was damaged or replaced; "
        "restore the object or start from data that is whole.",
    )
