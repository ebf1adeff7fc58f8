"""Digests of content, `algorithm:hexadecimal`: BLAKE3, or another's SHA-256 where a hub has told one.

BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020) is a tree of blocks, so that a processor hashes several of them
with each instruction, and several processors hash one file.
"""

import hashlib
import re
from typing import Any, Protocol

from blake3 import blake3

_BLAKE3, SHA256 = "blake3:", "sha256:"
PATTERN = r"^(blake3|sha256):[0-9a-f]{64}$"
"""Of a digest as it stands in a record."""


class Hash(Protocol):
    """What takes the bytes of a content in order."""

    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


class Hasher:
    """The digest of bytes that come in order, of the kind of `like`, else BLAKE3."""

    def __init__(self, like: str | None = None, *, threads: int = 1) -> None:
        self._algorithm = SHA256 if is_sha256(like) else _BLAKE3
        self._hash: Hash = hashlib.sha256() if self._algorithm == SHA256 else blake3(max_threads=threads)

    def update(self, data: Any) -> None:
        """Add bytes."""
        self._hash.update(data)

    def digest(self) -> str:
        """Of all bytes so far."""
        return self._algorithm + self._hash.hexdigest()


EVERYONE = blake3.AUTO
"""`threads` for as many as there are processors: for blocks of a MiB and more that nothing else waits for."""


def digest_of(data: bytes, *, like: str | None = None) -> str:
    """The digest of a content in memory, of the kind of `like`."""
    hasher = Hasher(like)
    hasher.update(data)
    return hasher.digest()


def told_sha256(digest: str) -> str:
    """The digest for a SHA-256 in hexadecimal that somebody else tells."""
    return SHA256 + digest


def is_sha256(digest: str | None) -> bool:
    """Whether a digest is of the kind that others tell, too."""
    return digest is not None and digest.startswith(SHA256)


def hex_of(digest: str) -> str:
    """What comes after the algorithm: for names of files and objects."""
    return digest.rpartition(":")[2]


def is_digest(value: object) -> bool:
    """Whether a value that was read somewhere can be a digest."""
    return isinstance(value, str) and re.fullmatch(PATTERN, value) is not None
