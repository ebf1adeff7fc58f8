"""Everything that strangers' files may be: each ends in one sentence that names file, row and remedy.

One table: name of the file, what makes its bytes, the row that is to be named (None: the file as a whole), and words
of the sentence. The files are made here, because most are binary and some unpack to gigabytes.
"""

import gzip
import io
import json
import random
import re
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image

from finetune_trainer.data.read import MIB, DataError, Row, Rows
from finetune_trainer.storage import StorageSettings, open_store

SECRET = "s3cret-c0ntent"
GOOD = {"text": SECRET, "label": "a"}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


LINE = jsonl(GOOD)


def line(text: str) -> bytes:
    return text.encode() + b"\n"


def raw(value: str) -> bytes:
    """A good line, then one whose text is this JSON."""
    return LINE + f'{{"text": {value}, "label": "{SECRET}"}}\n'.encode()


def png(width: int = 4, height: int = 3, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(out, kind)
    return out.getvalue()


def deep(kind: type, name: str = "PNG") -> bytes:
    """Grey values of more than 8 bits."""
    out = io.BytesIO()
    Image.fromarray(np.linspace(0, 60_000, 16).reshape(4, 4).astype(kind)).save(out, name)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def table(*rows: dict[str, Any]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(list(rows) or [GOOD] * 500)


def parquet(*rows: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table(*rows), out, **options)
    return out.getvalue()


def arrow(*rows: dict[str, Any], stream: bool = False, compression: str | None = None) -> bytes:
    out = io.BytesIO()
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    data = table(*rows)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(out, data.schema, options=options) as writer:
        writer.write_table(data)
    return out.getvalue()


def zeros(count: int) -> bytes:
    """An arrow file with a row of so many zeros, compressed."""
    return arrow({"text": "0" * count, "label": "a"}, compression="zstd")


def tar(*files: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                archive.addfile(file)
            else:
                entry = tarfile.TarInfo(file[0])
                entry.size = len(file[1])
                archive.addfile(entry, io.BytesIO(file[1]))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def damaged_second_header() -> bytes:
    data = bytearray(tar(("1.txt", b"one"), ("2.txt", b"two")))
    data[1024 + 150] ^= 0xFF  # in the checksum
    return bytes(data)


def pax(records: bytes) -> bytes:
    """A tar file whose first member is a pax header with these records."""
    entry = tarfile.TarInfo("header")
    entry.type, entry.size = tarfile.XHDTYPE, len(records)
    return entry.tobuf(tarfile.USTAR_FORMAT) + records + b"\0" * (-len(records) % 512) + tar(("1.txt", b"a"))


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.jsonl", data)
    return out.getvalue()


def bomb(compress: Callable[[bytes], bytes]) -> bytes:
    """Rows of 1 MiB, 300 MiB of them, out of some hundred KiB."""
    return compress(jsonl({"text": "x" * MIB}) * 15) * 20


def endless_line(compress: Callable[[bytes], bytes]) -> bytes:
    """A row of 65 MiB that compresses so badly that the ratio alone does not refuse it."""
    return compress(random.Random(0).randbytes(33 * MIB).hex().encode())


def flipped(data: bytes, at: int, mask: int = 0xFF) -> bytes:
    changed = bytearray(data)
    changed[at] ^= mask
    return bytes(changed)


def fast_gzip(data: bytes) -> bytes:
    return gzip.compress(data, 1)


PARQUET = parquet()
ARROW = arrow()
TAR = tar(("1.png", png()), ("1.cls", b"a"), ("2.png", png()), ("2.cls", b"b"))
Case = tuple[str, Callable[[], bytes], int | None, str]
CASES: list[Case] = [
    # encodings
    ("utf16-le.jsonl", lambda: '{"text": "a"}'.encode("utf-16"), None, "is UTF-16; convert it to UTF-8"),
    ("utf16-be.csv", lambda: b"\xfe\xff" + "text,label\n".encode("utf-16-be"), None, "is UTF-16; convert it"),
    ("utf16-without-mark.jsonl", lambda: '{"text": "a"}\n'.encode("utf-16-le"), 1, "a NUL byte; the file is damaged"),
    ("utf32.jsonl", lambda: '{"text": "a"}'.encode("utf-32"), None, "is UTF-16; convert it"),
    ("latin1.jsonl", lambda: LINE + '{"text": "ä"}'.encode("latin-1"), 2, "byte 11 of the line is not UTF-8"),
    ("cp1252.csv", lambda: b"text,label\n\x93quoted\x94,a\n", 2, "byte 1 of the line is not UTF-8; convert the file"),
    ("latin1.txt", lambda: "grün\n".encode("latin-1"), 1, "byte 3 of the line is not UTF-8; convert the file"),
    ("overlong-utf8.jsonl", lambda: b'{"text": "\xc0\xaf"}\n', 1, "is not UTF-8; convert the file"),
    ("surrogates-in-utf8.jsonl", lambda: b'{"text": "\xed\xa0\x80"}\n', 1, "is not UTF-8; convert the file"),
    ("cut-in-a-character.jsonl", lambda: jsonl({"text": "a"})[:-3] + b"\xc3", 1, "is not UTF-8; convert the file"),
    ("latin1-header.csv", lambda: "größe,label\na,b\n".encode("latin-1"), 1, "is not UTF-8; convert the file"),
    ("nul.jsonl", lambda: LINE + b'{"text": "a\0b"}\n', 2, ":12: a NUL byte; the file is damaged"),
    ("nul.csv", lambda: b"text,label\na\0,b\n", 2, "a NUL byte; the file is damaged"),
    ("only-nuls.txt", lambda: bytes(100), 1, "a NUL byte; the file is damaged"),
    ("mark-in-the-middle.jsonl", lambda: LINE + b"\xef\xbb\xbf" + LINE, 2, "2:1: not JSON (Expecting value)"),
    # JSON
    ("not-json.jsonl", lambda: LINE * 16 + b"{broken\n" + LINE, 17, "17:2: not JSON (Expecting property name"),
    ("single-quotes.jsonl", lambda: line("{'text': 'a'}"), 1, "not JSON (Expecting property name"),
    ("trailing-comma.jsonl", lambda: line('{"text": "a",}'), 1, "not JSON"),
    ("two-objects-a-line.jsonl", lambda: LINE.strip() + LINE, 1, "not JSON (Extra data); every line must be one"),
    ("pretty-printed.jsonl", lambda: json.dumps(GOOD, indent=1).encode(), 1, "every line must be one JSON object"),
    ("array-of-all.jsonl", lambda: json.dumps([GOOD, GOOD]).encode(), 1, "the line is an array, not an object; write"),
    ("array-over-lines.jsonl", lambda: b"[\n" + LINE + b"]\n", 1, "not JSON"),
    ("text.jsonl", lambda: line(f'"{SECRET}"'), 1, "the line is a string, not an object; write rows as"),
    ("number.jsonl", lambda: line("17"), 1, "the line is a number, not an object; write rows as"),
    ("null.jsonl", lambda: line("null"), 1, "the line is null, not an object; write rows as"),
    ("true.jsonl", lambda: line("true"), 1, "the line is a boolean, not an object; write rows as"),
    ("web-page.jsonl", lambda: b"<!DOCTYPE html>\n<html>\n", 1, "not JSON (Expecting value); every line must be"),
    ("nan.jsonl", lambda: raw("NaN"), 2, "NaN is not JSON; use null or leave the field out"),
    ("infinity.jsonl", lambda: raw("Infinity"), 2, "Infinity is not JSON; use null"),
    ("minus-infinity.jsonl", lambda: raw("[-Infinity]"), 2, "-Infinity is not JSON; use null"),
    ("beyond-a-double.jsonl", lambda: raw("1e999"), 2, "out of the range of 64-bit floats; write it as text"),
    ("too-many-digits.jsonl", lambda: raw("9" * 5000), 2, "too many digits; write it as text"),
    ("leading-zero.jsonl", lambda: raw("007"), 2, "not JSON"),
    ("hexadecimal.jsonl", lambda: raw("0xff"), 2, "not JSON"),
    ("python-none.jsonl", lambda: raw("None"), 2, "not JSON"),
    ("deep-arrays.jsonl", lambda: LINE + b'{"text": ' + b"[" * 100_000 + b"\n", 2, "nested too deeply"),
    ("deep-closed.jsonl", lambda: raw("[" * 65 + "]" * 65), 2, "nested too deeply, more than 64 levels; simplify"),
    ("deep-objects.jsonl", lambda: raw('{"a": ' * 200 + "1" + "}" * 200), 2, "nested too deeply, more than 64 levels"),
    ("duplicate-key.jsonl", lambda: LINE + b'{"text": "a", "text": "b"}\n', 2, "names 'text' twice; name each column"),
    ("duplicate-key-inside.jsonl", lambda: raw('{"b": 1, "b": 2}'), 2, "names 'b' twice; name each column once"),
    ("half-a-surrogate.jsonl", lambda: raw(r'"\ud83d"'), 2, "half a surrogate pair, which is no character; mend"),
    ("half-a-surrogate-in-a-key.jsonl", lambda: LINE + b'{"\\uDE00": "a"}\n', 2, "half a surrogate pair"),
    ("control-character.jsonl", lambda: raw('"a\x01b"'), 2, "not JSON (Invalid control character at)"),
    ("bad-escape.jsonl", lambda: raw(r'"C:\data"'), 2, "not JSON (Invalid \\escape)"),
    ("unclosed-string.jsonl", lambda: raw('"a'), 2, "not JSON"),
    ("mac-line-ends.jsonl", lambda: LINE.strip() + b"\r" + LINE, 1, "not JSON (Extra data)"),
    # separated values
    ("ragged-short.csv", lambda: b"text,label\na,b\nc\n", 3, "has 1 fields where the header has 2; quote fields"),
    ("ragged-long.csv", lambda: b"text,label\na,b,c\n", 2, "has 3 fields where the header has 2; quote fields"),
    ("ragged.tsv", lambda: b"text\tlabel\na b\n", 2, "has 1 fields where the header has 2; quote fields"),
    ("quote-never-closed.csv", lambda: b'text,label\na,b\n"c,d\ne,f\n', 3, "quotation mark opens here and is not"),
    ("text-after-quote.csv", lambda: b'text,label\n"a"b,c\n', 2, "not csv (',' expected after '\"'); quote fields"),
    ("header-twice.csv", lambda: b"text,text\na,b\n", 1, "the header names 'text' twice; name each column once"),
    ("header-quote-open.csv", lambda: b'"text,label\na,b\n', 1, "quotation mark opens here and is not closed"),
    ("semicolons.csv", lambda: b"text;label\na;b\n", 1, "one column, whose name holds ';'; separate fields by commas"),
    ("tabs.csv", lambda: b"text\tlabel\na\tb\n", 1, "whose name holds a tab; separate fields by commas"),
    ("commas.tsv", lambda: b"text,label\na,b\n", 1, "whose name holds ','; separate fields by tabs"),
    ("only-a-header.csv", lambda: b"text,label\n", None, "the file has no rows; give it at least one"),
    # empty
    ("empty.jsonl", lambda: b"", None, "the file is empty; give it at least one row"),
    ("empty.parquet", lambda: b"", None, "the file is empty; give it at least one row"),
    ("empty.arrow", lambda: b"", None, "the file is empty; give it at least one row"),
    ("empty.csv.gz", lambda: gzip.compress(b""), None, "the file is empty; give it at least one row"),
    ("empty.txt.zst", lambda: zstandard.compress(b""), None, "the file is empty; give it at least one row"),
    ("blank-lines.jsonl", lambda: b"\n \n\t\n", None, "the file has no rows; give it at least one"),
    ("blank-lines.txt", lambda: b"\n\n", None, "the file has no rows; give it at least one"),
    ("no-rows.parquet", lambda: _sliced(PARQUET), None, "the file has no rows; give it at least one"),
    ("no-files.tar", lambda: tar(), None, "the file is empty; give it at least one row"),
    # names that lie
    ("really-plain.jsonl.gz", lambda: LINE, None, "is named really-plain.jsonl.gz but is not gzip data; give it"),
    ("really-gzip.jsonl", lambda: gzip.compress(LINE), None, "but is gzip data; give it the name of its format"),
    ("really-gzip.jsonl.zst", lambda: gzip.compress(LINE), None, "but is gzip data; give it the name of its"),
    ("really-parquet.csv", lambda: PARQUET, None, "but is parquet data; give it the name of its format"),
    ("really-jsonl.parquet", lambda: LINE, None, "but is not parquet data; give it the name of its format"),
    ("really-arrow.parquet", lambda: ARROW, None, "but is arrow data; give it the name of its format"),
    ("really-jsonl.arrow", lambda: LINE, None, "ends too early; upload the whole file again"),
    ("really-zip.jsonl", lambda: zipped(LINE), None, "but is zip data; unpack it, or pack it with gzip or zstd"),
    ("really-bzip2.csv", lambda: b"BZh91AY&SY", None, "but is bzip2 data; unpack it, or pack it with gzip or zstd"),
    ("really-xz.jsonl", lambda: b"\xfd7zXZ\0\0", None, "but is xz data; unpack it, or pack it with gzip or zstd"),
    ("really-jsonl.tar", lambda: LINE * 20, None, "not a whole tar file (invalid header); write it again"),
    ("lfs-pointer.jsonl", lambda: b"version https://git-lfs.github.com/spec/v1\noid", None, "fetch it with git lfs"),
    ("lfs-pointer.parquet", lambda: b"version https://git-lfs.github.com/spec/v1\noid", None, "fetch it with git lfs"),
    ("data.json", lambda: LINE, None, "ends in none of .jsonl"),
    ("data.xlsx", lambda: zipped(b""), None, "ends in none of .jsonl"),
    ("data.parquet.gz", lambda: gzip.compress(PARQUET), None, "ends in none of .jsonl"),
    ("jsonl", lambda: LINE, None, "rename or convert the file"),
    # compressed
    ("torn.jsonl.gz", lambda: gzip.compress(LINE)[:-9], None, "the gzip data ends too early; upload the whole"),
    ("torn.jsonl.zst", lambda: zstandard.compress(LINE * 99)[:-9], None, "the zstd data ends too early; upload"),
    ("flipped.jsonl.gz", lambda: b"\x1f\x8b\xff" + bytes(40), None, "damaged gzip data"),
    ("wrong-checksum.jsonl.gz", lambda: flipped(gzip.compress(LINE), -6), None, "damaged gzip data"),
    ("wrong-checksum.csv.zst", lambda: flipped(_checked(b"text,label\na,b\n" * 99), -1), None, "damaged zstd data"),
    ("garbage-behind.jsonl.gz", lambda: gzip.compress(LINE) + b"garbage", None, "damaged gzip data"),
    ("bomb.jsonl.gz", lambda: bomb(gzip.compress), None, "decompresses to more than 200 times its size; store it"),
    ("bomb.jsonl.zst", lambda: bomb(zstandard.compress), None, "decompresses to more than 200 times its size"),
    ("bomb.txt.gz", lambda: bomb(gzip.compress), None, "decompresses to more than 200 times its size"),
    ("bomb.tar.gz", lambda: gzip.compress(tar(*[(f"{n}.txt", bytes(8 * MIB)) for n in range(12)])), None, "200 times"),
    ("huge-window.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(40), None, "damaged zstd data"),
    # huge rows
    ("huge-row.jsonl.gz", lambda: endless_line(fast_gzip), 1, "the row is longer than 64 MiB; split it"),
    ("huge-row.csv.zst", lambda: b"".join([zstandard.compress(b"text,label\n"), endless_line(zstandard.compress)]), 2,
     "the row is longer than 64 MiB; split it"),
    ("huge-file.tar", lambda: _huge_member(), 1, "the row is longer than 64 MiB; split it"),
    # tables
    ("torn.parquet", lambda: PARQUET[:-20], None, "not a whole parquet file (ArrowInvalid); write it again"),
    ("torn-in-the-middle.parquet", lambda: PARQUET[:200] + PARQUET[260:], None, "not a whole parquet file"),
    ("flipped-footer.parquet", lambda: flipped(PARQUET, -5), None, "not a whole parquet file"),
    ("only-a-magic.parquet", lambda: b"PAR1PAR1", None, "not a whole parquet file"),
    ("bomb.parquet", lambda: _constant_column(), None, "decompresses to 80 MiB, more than 1000 times its size; write"),
    ("torn-file.arrow", lambda: ARROW[:-20], None, "the arrow file ends too early; upload the whole file again"),
    ("torn-stream.arrow", lambda: arrow(stream=True)[:-600], None, "the arrow data ends too early; upload the whole"),
    ("flipped-footer.arrow", lambda: ARROW[:-10] + b"\xff\xff\xff\x7fARROW1", None, "its footer is damaged"),
    ("only-a-magic.arrow", lambda: b"ARROW1", None, "the arrow file ends too early"),
    ("wild-offsets.arrow", lambda: _wild_offsets(), None, "not a whole arrow file (ArrowInvalid); write it again"),
    ("bomb.arrow", lambda: zeros(600 * MIB), None, "the record batch 1 holds 600 MiB, compressed to"),
    ("feather-one.feather", lambda: b"FEA1" + bytes(40) + b"FEA1", None, "a feather file of version 1; write it again"),
    ("invalid-text.arrow", lambda: _invalid_text(), None, "not a whole arrow file (ArrowInvalid); write it again"),
    # tar
    ("torn.tar", lambda: TAR[:1500], None, "the tar file ends too early; upload the whole file again"),
    ("torn-between-files.tar", lambda: TAR[:2048], None, "the tar file ends too early; upload the whole file again"),
    ("damaged-second-header.tar", lambda: damaged_second_header(), None, "not a whole tar file (invalid header)"),
    ("traversal.tar", lambda: tar(("../../etc/x.txt", b"a")), None, "outside of itself; write it with relative names"),
    ("absolute.tar", lambda: tar(("/etc/x.txt", b"a")), None, "outside of itself; write it with relative names"),
    ("symbolic-link.tar", lambda: tar(special("1.txt", tarfile.SYMTYPE, "/etc/passwd")), None, "holds a symbolic link"),
    ("hard-link.tar", lambda: tar(("1.txt", b"a"), special("2.txt", tarfile.LNKTYPE, "1.txt")), None, "a hard link"),
    ("device.tar", lambda: tar(special("1.txt", tarfile.CHRTYPE)), None, "which is no plain file; leave it out"),
    ("appended.tar", lambda: tar(("1.txt", b"a")) + TAR, None, "goes on after its end; write it as one archive"),
    ("huge-header.tar", lambda: pax(b"9" * (2 * MIB)), None, "a header of more than 1 MiB; write it again"),
    ("damaged-pax.tar", lambda: pax(b"99 path=a\n"), None, "a damaged pax header"),
    ("endless-pax.tar", lambda: pax(b"0 path=a\n"), None, "a damaged pax header"),
    ("negative-size.tar", lambda: pax(b"12 size=-1\n\n"), None, "not a whole tar file"),
    ("not-json.tar", lambda: tar(("1.txt", b"a"), ("2.json", b"{")), 2, "2.json: not JSON"),
    ("json-array.tar", lambda: tar(("1.json", b"[1]")), 1, "1.json: the JSON is no object; write its values as named"),
    ("two-images.tar", lambda: tar(("1.png", png()), ("1.jpg", png())), 1, "has 'image' twice; give each sample one"),
    ("json-over-label.tar", lambda: tar(("1.cls", b"a"), ("1.json", b'{"label": 1}')), 1, "has 'label' twice"),
    ("latin1.tar", lambda: tar(("1.txt", b"a"), ("2.txt", "ä".encode("latin-1"))), 2, "2.txt: byte 1 is not UTF-8"),
    # images
    ("torn-image.tar", lambda: tar(("1.png", png(64, 64)[:80])), 1, "the image cannot be decoded"),
    ("torn-jpeg.tar", lambda: tar(("1.jpg", png(99, 99, "JPEG")[:-200])), 1, "the image cannot be decoded"),
    ("no-image.tar", lambda: tar(("1.png", SECRET.encode())), 1, "not an image of a known format"),
    ("svg.tar", lambda: tar(("1.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 1, "convert or replace it"),
    ("postscript.tar", lambda: tar(("1.png", b"%!PS-Adobe-3.0 EPSF-3.0\n")), 1, "convert or replace it"),
    ("pixel-bomb.tar", lambda: tar(("1.png", png_header(60000, 60000))), 1, "more than 64 million pixels; make it"),
    ("short-pixels.tar", lambda: tar(("1.png", png_header(640, 480))), 1, "the image cannot be decoded"),
    ("flipped-image.tar", lambda: tar(("1.png", flipped(png(64, 64), 45))), 1, "the image cannot be decoded"),
    ("deep-image.tar", lambda: tar(("1.png", deep(np.uint16))), 1, "more than 8 bits a channel (mode I;16)"),
    ("float-image.tar", lambda: tar(("1.tiff", deep(np.float32, "TIFF"))), 1, "(mode F), of which models would see"),
    ("cut-header.tar", lambda: tar(("1.png", png()[:20])), 1, "the image cannot be decoded (OSError); replace it"),
    ("empty-image.tar", lambda: tar(("1.png", b"")), 1, "found nothing; mend the row"),
    ("missing-image.jsonl", lambda: jsonl({"image": "nowhere.png"}), 1, "no image 'nowhere.png' beside the file"),
    ("climbing-path.jsonl", lambda: jsonl({"image": "a/../../x.png"}), 1, "leads out of the directory of the file"),
    ("absolute-path.jsonl", lambda: jsonl({"image": "/etc/passwd"}), 1, "leads out of the directory of the file"),
    ("path-of-a-store.jsonl", lambda: jsonl({"image": "s3://b/x.png"}), 1, "leads out of the directory of the file"),
    ("backslashes.csv", lambda: b"image,label\nimages\\1.png,a\n", 2, "write paths relative to the file"),
    ("path-is-a-number.jsonl", lambda: jsonl({"image": 5}), 1, "bytes or a path relative to the file, found int"),
    ("image-is-null.parquet", lambda: parquet({"image": png()}, {"image": None}), 2, "found nothing; mend the row"),
]  # fmt: skip


def _sliced(data: bytes) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(io.BytesIO(data)).slice(0, 0), out)
    return out.getvalue()


def _checked(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def _constant_column() -> bytes:
    return parquet({"text": "0" * (80 * MIB), "label": "a"}, compression="zstd", use_dictionary=False)


def _huge_member() -> bytes:
    entry = tarfile.TarInfo("1.txt")
    entry.size = 65 * MIB
    return entry.tobuf() + bytes(1024)


def _wild_offsets() -> bytes:
    """A valid frame around a text column whose offsets lead out of its data."""
    data = _written(pyarrow.array(["a" * 7, "b" * 13]))
    return data.replace(struct.pack("<3i", 0, 7, 20), struct.pack("<3i", 0, 7, 1_000_000))


def _invalid_text() -> bytes:
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(struct.pack("<2i", 0, 2)), pyarrow.py_buffer(b"\xff\xfe")]
    )
    return _written(column)


def _written(column: Any) -> bytes:
    out = io.BytesIO()
    batch = pyarrow.record_batch([column], names=["text"])
    with pyarrow.ipc.new_stream(out, batch.schema) as writer:
        writer.write_batch(batch)
    return out.getvalue()


def reader(path: Path, uri: str | None = None) -> Rows:
    store = open_store(path.parent.as_uri(), StorageSettings())
    return Rows(
        store, path.name, uri=uri or path.as_uri(), wanted=("text", "label", "image"), scratch=path.parent / "scratch"
    )


def first_problem(rows: Callable[[], Rows]) -> DataError:
    """What preflight would say first: of reading, and of decoding where there are images."""
    found = list(_problems(rows))
    assert found, "everything was accepted"
    return found[0]


def _problems(opened: Callable[[], Rows]) -> Iterable[DataError]:
    try:
        rows = opened()
        for item in rows:
            if isinstance(item, DataError):
                yield item
            elif "image" in item.values:
                rows.image(item, "image")
    except DataError as error:
        yield error


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize(("name", "make", "row", "words"), CASES, ids=[case[0] for case in CASES])
def test_bad_data_ends_in_one_sentence_with_file_row_and_remedy(
    tmp_path: Path, name: str, make: Callable[[], bytes], row: int | None, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    (tmp_path / "scratch").mkdir()
    message = first_problem(lambda: reader(path)).message
    place = re.match(re.escape(path.as_uri()) + r"(?::(\d+))?", message)
    assert place, message
    assert place[1] == (None if row is None else str(row)), message
    assert words in message
    assert re.search(r"[;:] [a-z].*\.$", message) or "convert the file." in message, f"no remedy: {message}"
    assert "\n" not in message
    assert len(message) < 480
    assert SECRET not in message
    assert not list((tmp_path / "scratch").iterdir())


FOLDERS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no-classes": ({"1.png": png()}, "1.png", "lies in no directory of a class; move it to folder/class/file"),
    "rows-instead": ({"a.jsonl": LINE}, "a.jsonl", "name files of rows by a pattern such as folder/*.jsonl"),
    "notes-between": ({"cat/1.png": png(), "cat/notes.txt": b"x"}, "cat/notes.txt", "rename or remove the file"),
    "torn-image": ({"cat/1.png": png(64, 64)[:80]}, "cat/1.png", "cannot be decoded (OSError); replace it"),
    "web-page": ({"cat/1.png": b"<html>"}, "cat/1.png", "not an image of a known format"),
    "zero-bytes": ({"cat/1.png": png(), "cat/2.png": b""}, "cat/2.png", "the file is empty; replace or remove it"),
    "nothing": ({}, "", "the folder holds no files; correct the address or upload images there"),
    "only-hidden": ({".DS_Store": b"x", "cat/.thumb.png": b"x"}, "", "the folder holds no files"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_ends_in_one_sentence_with_file_and_remedy(tmp_path: Path, name: str) -> None:
    files, where, words = FOLDERS[name]
    for path, data in files.items():
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / path).write_bytes(data)
    uri = f"{(tmp_path / name).as_uri()}/"
    store = open_store(uri.rstrip("/"), StorageSettings())
    message = first_problem(lambda: Rows(store, "", uri=uri, wanted=("image", "label"), scratch=tmp_path)).message
    assert message.startswith(f"{uri}{where}: ")
    assert words in message
    assert message.endswith(".")


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst", "bomb.arrow", "pixel-bomb.tar", "huge-file.tar"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path, name: str) -> None:
    make = next(case[1] for case in CASES if case[0] == name)
    path = tmp_path / name
    path.write_bytes(make())
    (tmp_path / "scratch").mkdir()
    before = pyarrow.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    first_problem(lambda: reader(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * MIB
    assert pyarrow.default_memory_pool().bytes_allocated() - before < MIB


def test_good_rows_beside_bad_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(LINE + raw("NaN") + raw(r'"\ud800"') + LINE)
    assert [item.number for item in reader(path) if isinstance(item, Row)] == [1, 2, 4, 6]
