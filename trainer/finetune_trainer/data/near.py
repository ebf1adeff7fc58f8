"""Texts that nearly repeat an earlier one: MinHash signatures (Broder 1997, by datasketch) and banding over them.

datasketch's own index keeps Python objects, kilobytes a row; here the signatures lie in a scratch file (512 bytes a
row) and one band after another is sorted, which takes about 40 bytes a row for as long as it lasts.
"""

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.split import normalise

if TYPE_CHECKING:
    from datasketch import MinHash

THRESHOLD = 0.8
"""Estimated Jaccard similarity of the shingles from which on two texts count as nearly equal."""
PERMUTATIONS = 128
_BANDS, _ROWS = 16, 8
"""Two texts of similarity s share a band with the chance 1 - (1 - s^8)^16: 0.95 at 0.8, 0.9999 at 0.9, 0.06 at 0.5."""
_SHINGLE, _CHARACTERS = 3, 5
_TEXT_LIMIT = 16 * 1024
_BLOCK = 64 * 1024


def shingles(text: str) -> list[bytes]:
    """Runs of three words; of five characters where the script sets no spaces between words."""
    words = normalise(text[:_TEXT_LIMIT]).split()
    joined = " ".join(words)
    if len(joined) > 20 * len(words):
        pieces = {joined[at : at + _CHARACTERS] for at in range(max(1, len(joined) - _CHARACTERS + 1))}
    else:
        pieces = {" ".join(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))}
    return [piece.encode(errors="replace") for piece in sorted(pieces)]


class NearDuplicates:
    """Takes texts one by one and says in the end which nearly repeat an earlier one.

    Only the beginning of a text counts, 16,384 characters.
    """

    def __init__(self, scratch: Path) -> None:
        self._path = scratch / "signatures.bin"
        self._file: BinaryIO = open(self._path, "wb")  # noqa: SIM115 - open as long as texts come
        self._empty: MinHash | None = None
        self.count = 0

    def add(self, text: str, *, apart: str = "") -> None:
        """Texts that are `apart` from each other, such as those of different tasks, are never alike."""
        signature = self._signer()
        signature.update_batch(shingles(text))
        values = signature.hashvalues.astype("<u4") ^ np.uint32(zlib.crc32(apart.encode()))
        self._file.write(values.tobytes())
        self.count += 1

    def find(self) -> NDArray[np.int64]:
        """Numbers of the texts, in ascending order and counted from 0, that nearly repeat an earlier one."""
        self._file.close()
        if not self.count:
            return np.zeros(0, np.int64)
        signatures = np.memmap(self._path, np.dtype("<u4"), "r", shape=(self.count, PERMUTATIONS))
        found = np.zeros(self.count, dtype=bool)
        for band in range(_BANDS):
            keys = _band_keys(signatures, band)
            order = np.argsort(keys, kind="stable")
            begins = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] ^ np.uint64(1)))
            sizes = np.diff(np.append(begins, self.count))
            leaders = np.repeat(order[begins], sizes)
            _compare(signatures, leaders, order, found)
        return np.flatnonzero(found)

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _signer(self) -> "MinHash":
        if self._empty is None:
            from datasketch import MinHash

            self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        return self._empty.copy()


def _band_keys(signatures: Any, band: int) -> NDArray[np.uint64]:
    """64 bits of each row's part of the signature."""
    keys = np.empty(len(signatures), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(signatures), _BLOCK):
            part = signatures[start : start + _BLOCK, band * _ROWS : (band + 1) * _ROWS].astype(np.uint64)
            key = np.zeros(len(part), dtype=np.uint64)
            for column in range(_ROWS):
                key = (key ^ part[:, column]) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
            keys[start : start + _BLOCK] = key
    return keys


def _compare(signatures: Any, leaders: NDArray[Any], rows: NDArray[Any], found: NDArray[np.bool_]) -> None:
    """Mark rows that are like the first one of their bucket."""
    candidates = np.flatnonzero(leaders != rows)
    for start in range(0, len(candidates), _BLOCK):
        block = candidates[start : start + _BLOCK]
        block = block[~found[rows[block]]]
        for at in range(0, len(block), 4096):
            piece = block[at : at + 4096]
            alike = (signatures[leaders[piece]] == signatures[rows[piece]]).mean(axis=1) >= THRESHOLD
            found[rows[piece][alike]] = True
