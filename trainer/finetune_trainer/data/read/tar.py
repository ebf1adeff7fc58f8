"""Tar archives in the WebDataset convention: consecutive files with the same stem are one sample.

    0001.jpg 0001.cls 0002.jpg 0002.cls ...

`.jpg`, `.png` and the like become the column `image` (bytes), `.cls` becomes `label` and `.txt` becomes `text` (both
without white space around them), the fields of a `.json` object become columns; any other file is a column named by its
ending, as bytes. Nothing is unpacked to disk. Blocks are parsed by tarfile, but walked here: tarfile takes a damaged
header in the middle for the end of the archive and loses the rest without a word.
"""

import json
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from .base import MIB, ROW_LIMIT, DataError, File, Row, some, weight
from .images import ENDINGS
from .jsonl import parse

_BLOCK = 512
_HEADER_LIMIT = MIB
_SKIPPED = (tarfile.DIRTYPE, tarfile.XGLTYPE)
_LINKS = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}


def rows(source: BinaryIO, file: File) -> Iterator[Row | DataError]:
    """A row a sample. Raises where the archive is damaged or holds what no data set needs."""
    number, stem = 0, ""
    values: dict[str, Any] = {}
    problem: DataError | None = None
    for name, data in _files(source, file):
        here, ending = _split(name)
        if here != stem and (values or problem):
            number += 1
            yield _sample(number, stem, values, problem, file)
            values, problem = {}, None
        stem = here
        if data is None:
            raise file.too_long(number + 1)
        problem = problem or _add(values, name, ending, data, file, number + 1)
    if values or problem:
        yield _sample(number + 1, stem, values, problem, file)


def _sample(number: int, stem: str, values: dict[str, Any], problem: DataError | None, file: File) -> Row | DataError:
    if problem is not None:
        return problem
    if not file.columns:
        file.columns = list(values)
    return Row(number, values, stem) if weight(values) <= ROW_LIMIT else file.too_long(number)


def _split(name: str) -> tuple[str, str]:
    """Stem and ending: the name of the file is cut at its first dot, as WebDataset does."""
    directory, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{directory}{slash}{stem}", ending.lower()


def _add(values: dict[str, Any], name: str, ending: str, data: bytes, file: File, number: int) -> DataError | None:
    """Put one file into its sample, or say what is wrong with it."""
    found: dict[str, Any]
    if ending in ENDINGS:
        found = {"image": data}
    elif ending in ("cls", "txt"):
        try:
            found = {"label" if ending == "cls" else "text": data.decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            return file.bad_row(number, f"{name}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8.")
    elif ending == "json":
        try:
            found = parse(data.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            return file.bad_row(number, f"{name}: not JSON ({error.msg}, line {error.lineno}); mend the file.")
        except UnicodeDecodeError as error:
            return file.bad_row(number, f"{name}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8.")
        except ValueError as error:
            return file.bad_row(number, f"{name}: {error}")
        if not isinstance(found, dict):
            return file.bad_row(number, f"{name}: the JSON is no object; write its values as named fields.")
    else:
        found = {ending or "file": data}
    if twice := sorted(set(found) & set(values)):
        return file.bad_row(number, f"{name}: the sample has {some(twice)} twice; give each sample one of each.")
    values.update(found)
    return None


def _files(source: BinaryIO, file: File) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of the regular files, in order; None for one that is too long, the last one then."""
    given: dict[str, str] = {}
    empty = True
    while True:
        block = _exactly(source, _BLOCK, file)
        if not block.strip(b"\0"):
            _check_end(source, file)
            if empty:
                raise file.empty()
            return
        empty = False
        header = _header(block, file)
        size = _size(given, header, file)
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if size > _HEADER_LIMIT:
                raise file.invalid("the tar file has a header of more than 1 MiB; write it again with plain names.")
            data = _content(source, size, file)
            given |= _extended(data, file) if header.type == tarfile.XHDTYPE else {"path": _name(data)}
            continue
        name = given.get("path", header.name)
        given = {}
        _refuse(name, header, file)
        if size > ROW_LIMIT:
            yield name, None
            return
        data = _content(source, size, file)
        if header.type not in _SKIPPED and not name.rpartition("/")[2].startswith("."):
            yield name.removeprefix("./"), data


def _header(block: bytes, file: File) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise file.invalid(f"not a whole tar file ({error}); write it again.") from error


def _size(given: dict[str, str], header: tarfile.TarInfo, file: File) -> int:
    said = given.get("size", str(header.size))
    if not said.isdecimal() or len(said) > 15:
        raise file.invalid("not a whole tar file (a size is no number); write it again.")
    return int(said)


def _refuse(name: str, header: tarfile.TarInfo, file: File) -> None:
    shown = name.encode("utf-8", "replace").decode()[:200]
    if name.startswith("/") or ".." in name.split("/"):
        raise file.invalid(f"the tar file names {shown!r}, outside of itself; write it with relative names.")
    if header.type in _LINKS:
        raise file.invalid(f"the tar file holds {_LINKS[header.type]}, {shown!r}; write the file itself.")
    if header.type not in (*_SKIPPED, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        raise file.invalid(f"the tar file holds {shown!r}, which is no plain file; leave it out.")


def _extended(data: bytes, file: File) -> dict[str, str]:
    """Records of a pax header: "<length> <key>=<value>\\n" each."""
    found: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < 8 or not len(length) + 1 < int(length) <= len(data):
            raise file.invalid("not a whole tar file (a damaged pax header); write it again.")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    if any(key.startswith("GNU.sparse") for key in found):
        raise file.invalid("the tar file holds a sparse file; write it again without --sparse.")
    return {key: value for key, value in found.items() if key in ("path", "size")}


def _name(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")


def _content(source: BinaryIO, size: int, file: File) -> bytes:
    return _exactly(source, size + -size % _BLOCK, file)[:size]


def _exactly(source: BinaryIO, size: int, file: File) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise file.invalid("the tar file ends too early; upload the whole file again.")
    return data


def _check_end(source: BinaryIO, file: File) -> None:
    """Only zeros may follow the first block of zeros."""
    while block := source.read(MIB):
        if block.strip(b"\0"):
            raise file.invalid("the tar file goes on after its end; write it as one archive (not by appending).")
