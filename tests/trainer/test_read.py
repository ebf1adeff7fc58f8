"""Rows out of real files in a local store."""

import csv
import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.data.read import MIB, DataError, Row, Rows
from finetune_trainer.storage import StorageError, StorageSettings, open_store

ROWS = [{"text": "one, and\ntwo", "label": "a"}, {"text": "drei äöü", "label": "b"}]


def reader(path: Path, wanted: tuple[str, ...] = ("text", "label")) -> Rows:
    store = open_store(path.parent.as_uri(), StorageSettings())
    return Rows(store, path.name, uri=path.as_uri(), wanted=wanted, scratch=path.parent)


def problems(path: Path) -> list[DataError]:
    found: list[DataError] = []
    try:
        found += [item for item in reader(path) if isinstance(item, DataError)]
    except DataError as error:
        found.append(error)
    return found


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_separated(path: Path, separator: str, opener: Callable[..., Any] = open) -> None:
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def write_any(path: Path) -> None:
    name = path.name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.startswith("data.jsonl"):
        data = jsonl(ROWS)
        if name.endswith(".gz"):
            data = gzip.compress(data[:20]) + gzip.compress(data[20:]) + b"\0" * 64
        if name.endswith(".zst"):
            data = zstandard.compress(data[:20]) + zstandard.compress(data[20:])
        path.write_bytes(data)
    elif name.endswith(".gz"):
        write_separated(path, ",", gzip.open)
    else:
        write_separated(path, "\t" if ".tsv" in name else ",")


@pytest.mark.parametrize(
    "name",
    ["data.jsonl", "data.jsonl.gz", "data.jsonl.zst", "data.csv", "data.csv.gz", "data.tsv", "data.parquet"],
)
def test_every_format_gives_the_same_rows_and_the_digest_of_the_stored_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_any(path)
    rows = reader(path)
    assert [row.values for row in rows if isinstance(row, Row)] == ROWS
    assert rows.columns == ["text", "label"]
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_csv_row_is_numbered_by_the_line_where_it_starts(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('text,label\n"one\ntwo",a\n\nthree,b\n')
    assert [row.number for row in reader(tmp_path / "data.csv") if isinstance(row, Row)] == [2, 5]


def test_a_byte_order_mark_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:1]) + b"\n  \r\n" + jsonl(ROWS[1:]))
    rows = list(reader(tmp_path / "data.jsonl"))
    assert [row.number for row in rows if isinstance(row, Row)] == [1, 4]


def test_a_last_line_without_a_line_end_counts(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(jsonl(ROWS).rstrip())
    assert len(list(reader(tmp_path / "data.jsonl"))) == 2


BAD_FILES = {
    "17-is-not-json.jsonl": (jsonl(ROWS * 8) + b"{broken\n" + jsonl(ROWS), "InvalidRow", ":17:2: not JSON"),
    "array.jsonl": (b'["a", "b"]\n', "InvalidRow", ":1: the line is an array, not an object"),
    "nan.jsonl": (b'{"text": "a", "label": NaN}\n', "InvalidRow", ":1: NaN is not JSON"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "InvalidRow", ":1: nested too deeply"),
    "latin1.jsonl": ('{"text": "ä"}'.encode("latin-1"), "InvalidRow", ":1: byte 11 of the line is not UTF-8"),
    "nul.jsonl": (b'{"text": "a\0b"}\n', "InvalidRow", ":1:12: a NUL byte"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "InvalidFile", "is UTF-16; convert it to UTF-8"),
    "empty.jsonl": (b"", "EmptyData", "the file is empty"),
    "empty.csv.gz": (gzip.compress(b""), "EmptyData", "the file is empty"),
    "empty.parquet": (b"", "EmptyData", "the file is empty"),
    "ragged.csv": (b"text,label\na,b\nc\n", "InvalidRow", ":3: the row has 1 fields where the header has 2"),
    "twice.csv": (b"text,text\na,b\n", "InvalidFile", ":1: the header names 'text' twice"),
    "quote.csv": (b'text,label\na,b\n"c,d\ne,f\n', "InvalidRow", ":3: not csv (a quotation mark opens here"),
    "plain.jsonl.gz": (jsonl(ROWS), "InvalidFile", "is named plain.jsonl.gz but is not gzip data"),
    "gzip.jsonl": (gzip.compress(jsonl(ROWS)), "InvalidFile", "is named gzip.jsonl but is gzip data"),
    "gzip.jsonl.zst": (gzip.compress(jsonl(ROWS)), "InvalidFile", "is named gzip.jsonl.zst but is gzip data"),
    "torn.jsonl.gz": (gzip.compress(jsonl(ROWS))[:-9], "InvalidFile", "the gzip data ends too early"),
    "torn.jsonl.zst": (zstandard.compress(jsonl(ROWS * 99))[:-9], "InvalidFile", "the zstd data ends too early"),
    "flipped.jsonl.gz": (b"\x1f\x8b\xff" + bytes(40), "InvalidFile", "damaged gzip data"),
    "text.parquet": (jsonl(ROWS), "InvalidFile", "not a whole parquet file"),
    "data.txt": (b"a\n", "UnknownFormat", "ends in none of .jsonl"),
    "data.parquet.gz": (b"a\n", "UnknownFormat", "ends in none of .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_place_and_reason(tmp_path: Path, name: str) -> None:
    data, reason, sentence = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    found = problems(path)
    assert found[0].reason == reason
    assert path.as_uri() in found[0].message
    assert sentence in found[0].message
    assert "Traceback" not in found[0].message


def test_reading_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"{\n" + jsonl(ROWS) + b"[]\n\xff\n" + jsonl(ROWS))
    items = list(reader(tmp_path / "data.jsonl"))
    assert [isinstance(item, Row) for item in items] == [False, True, True, False, False, True, True]


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_decompression_bomb_is_refused_in_bounded_memory(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    line = jsonl([{"text": "x" * (MIB - 100), "label": "a"}])
    piece = compress(line * 16)
    (tmp_path / f"bomb.jsonl.{ending}").write_bytes(piece * 20)
    tracemalloc.start()
    found = problems(tmp_path / f"bomb.jsonl.{ending}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[-1].reason == "DecompressionBomb"
    assert peak < 200 * MIB


def test_a_row_longer_than_the_limit_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    with open(tmp_path / "data.jsonl", "wb") as file:
        file.write(b'{"text": "')
        file.truncate(200 * MIB)
    found = problems(tmp_path / "data.jsonl")
    assert found[0].message.endswith(":1: the row is longer than 64 MiB; split it.")


def test_a_missing_object_is_the_environments_fault(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as error:
        reader(tmp_path / "nothing.jsonl")
    assert error.value.reason == "ObjectNotFound"
    assert error.value.environment


def test_only_the_wanted_columns_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(
        [{"text": "a", "label": 1, "other": "x"}, {"text": "b", "label": 2, "other": "y"}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    rows = reader(tmp_path / "data.parquet")
    assert list(rows) == [Row(1, {"text": "a", "label": 1}), Row(2, {"text": "b", "label": 2})]
    assert rows.columns == ["text", "label", "other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400), name=st.sampled_from(["a.jsonl", "a.csv", "a.jsonl.gz", "a.csv.zst", "a.parquet"]))
def test_no_bytes_whatever_end_in_anything_but_a_data_error(tmp_path: Path, data: bytes, name: str) -> None:
    magic = {"gz": b"\x1f\x8b\x08\0", "zst": b"\x28\xb5\x2f\xfd", "et": b"PAR1"}
    for prefix in (b"", magic.get(name[-3:].lstrip("."), magic.get(name[-2:], b""))):
        (tmp_path / name).write_bytes(prefix + data)
        problems(tmp_path / name)
