"""Which rows are held out: a pure function of the row's own content.

A row's side is decided by a hash of its normalised input (or of the value of its group), never of labels, seed,
position or the other rows. So equal texts never lie on both sides, and appending rows moves none of the old ones.
"""

import hashlib
import unicodedata

from finetune_trainer.run import TRAIN, VALIDATION

_SCALE = 1 << 64


def normalise(text: str) -> str:
    """What counts as the same text: compatibility characters, case and the amount of white space make no difference."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def content_hash(text: str) -> int:
    """64 bits of the normalised text."""
    return _hash(normalise(text).encode())


def content_hashes(text: str) -> tuple[int, int]:
    """`content_hash`, and another 64 bits of the same: where the first agree by chance, the others do not."""
    data = normalise(text).encode()
    return _hash(data), _hash(data, b"check")


def _hash(data: bytes, person: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=person).digest(), "big")


def side(key: int, fraction: float) -> int:
    """TRAIN or VALIDATION for a row whose text (or group) has the content hash `key`; `fraction` goes to VALIDATION."""
    return VALIDATION if key < int(fraction * _SCALE) else TRAIN
