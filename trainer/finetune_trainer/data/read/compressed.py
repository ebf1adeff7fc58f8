"""Bytes as they are stored -> bytes as they are meant: digest, decompression, and a bound on how much comes out."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from finetune_trainer.storage.digests import Hasher

from .base import MIB, DataError, File

RATIO_LIMIT = 200
"""Times its own size a file may decompress to, once it has passed FREE_BYTES. Text compresses 3 to 20 times."""
FREE_BYTES = 64 * MIB
BLOCK = MIB
# A zstd block of four bytes may stand for 128 KiB: small pieces bound what one call can produce to 64 MiB.
_ZSTD_PIECE = 2048
_ZSTD_WINDOW = 128 * MIB
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"FEA1": "feather version 1",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"%PDF-": "PDF",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"SQLite format 3": "SQLite",
}
_PACKED = ("zip", "bzip2", "xz")
_LFS = b"version https://git-lfs.github.com/spec/"


class Hashed(io.RawIOBase):
    """Reads through and takes the digest as the bytes pass."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._ahead = b""
        self._hasher = Hasher()
        self.count = 0

    def readable(self) -> bool:
        return True

    def digest(self) -> str:
        """Of all bytes read so far."""
        return self._hasher.digest()

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size and (block := self._source.read(size - len(self._ahead))):
            self._ahead += block
        return self._ahead

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        block = self._ahead or self._source.read(len(buffer))
        self._ahead = b""
        self._hasher.update(block)
        self.count += len(block)
        buffer[: len(block)] = block
        return len(block)


def check_magic(first: bytes, file: File, *, wanted: str) -> None:
    """Raise where a file's first bytes contradict its name. `wanted`: gzip, zstd or nothing known by its beginning."""
    named = file.uri.rsplit("/", 1)[-1]
    if first.startswith(_LFS):
        raise file.invalid("the file is a Git LFS pointer, not the data itself; fetch it with git lfs pull.")
    found = next((name for magic, name in _MAGIC.items() if first.startswith(magic)), "")
    if found == wanted:
        return
    said = f"the file is named {named} but is {found or f'not {wanted}'} data"
    if found in _PACKED:
        raise file.invalid(f"{said}; unpack it, or pack it with gzip or zstd.")
    raise file.invalid(f"{said}; give it the name of its format.")


def plain(source: Hashed, file: File, *, compression: str) -> BinaryIO:
    """The decompressed bytes; `compression` is "", "gz" or "zst". Raises where the first bytes contradict the name."""
    check_magic(source.peek(len(_LFS)), file, wanted={"": "", "gz": "gzip", "zst": "zstd"}[compression])
    if not compression:
        return cast("BinaryIO", io.BufferedReader(source, BLOCK))
    inflate = _gunzip if compression == "gz" else _unzstd
    return cast("BinaryIO", io.BufferedReader(_Inflated(source, inflate, file), BLOCK))


Inflate = Callable[[Iterator[bytes], File], Iterator[bytes]]


class _Inflated(io.RawIOBase):
    """Decompressed bytes, as long as they stay in proportion to the compressed ones."""

    def __init__(self, source: Hashed, inflate: Inflate, file: File) -> None:
        self._source = source
        self._file = file
        self._blocks = inflate(iter(lambda: source.read(BLOCK) or b"", b""), file)
        self._block = memoryview(b"")
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
            self._count += len(block)
            if self._count > FREE_BYTES and self._count > RATIO_LIMIT * self._source.count:
                raise DataError(
                    "DecompressionBomb",
                    f"{self._file.uri}: decompresses to more than {RATIO_LIMIT} times its size; store it uncompressed.",
                )
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count


def _gunzip(blocks: Iterator[bytes], file: File) -> Iterator[bytes]:
    """All members of a gzip file; zeros after the last one are padding."""
    decoder = None
    try:
        for block in blocks:
            rest = block
            while rest:
                if decoder is None:
                    rest = rest.lstrip(b"\0")
                    if not rest:
                        break
                    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
                yield decoder.decompress(rest, 4 * BLOCK)
                if decoder.eof:
                    rest, decoder = decoder.unused_data, None
                else:
                    rest = decoder.unconsumed_tail
        if decoder is not None:
            yield decoder.flush()
    except (zlib.error, gzip.BadGzipFile) as error:
        raise file.invalid(f"damaged gzip data ({error}); upload the file again.") from error
    if decoder is not None and not decoder.eof:
        raise file.invalid("the gzip data ends too early; upload the whole file again.")


def _unzstd(blocks: Iterator[bytes], file: File) -> Iterator[bytes]:
    """All frames of a zstd file."""
    import zstandard

    decoder = None
    try:
        for block in blocks:
            for at in range(0, len(block), _ZSTD_PIECE):
                rest = block[at : at + _ZSTD_PIECE]
                while rest:
                    if decoder is None:
                        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                    yield decoder.decompress(rest)
                    rest = b""
                    if decoder.eof:
                        rest, decoder = decoder.unused_data, None
    except zstandard.ZstdError as error:
        raise file.invalid(f"damaged zstd data ({error}); upload the file again.") from error
    if decoder is not None:
        raise file.invalid("the zstd data ends too early; upload the whole file again.")
