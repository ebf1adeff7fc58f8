"""Rows out of real files in a local store."""

import csv
import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune_trainer.data.read import MIB, DataError, Row, Rows, locate
from finetune_trainer.data.read.locate import translate
from finetune_trainer.storage import StorageError, StorageSettings, open_store
from finetune_trainer.storage.digests import digest_of

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


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    if path.name.startswith("stream"):
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
    else:
        packing = "zstd" if path.name.startswith("packed") else "uncompressed"
        pyarrow.feather.write_feather(table, path, compression=packing)


def tar(rows: list[dict[str, Any]]) -> bytes:
    """A sample a row: a file each for text and label."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number, row in enumerate(rows):
            for ending, value in (("txt", row["text"]), ("cls", row["label"])):
                entry = tarfile.TarInfo(f"./part/{number:04}.{ending}")
                entry.size = len(value.encode())
                archive.addfile(entry, io.BytesIO(value.encode()))
    return out.getvalue()


def write_any(path: Path) -> None:
    name = path.name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(("arrow", "feather")):
        write_arrow(path)
    elif ".t" in name and "tsv" not in name:
        data = tar(ROWS)
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        if name.endswith("zst"):
            path.write_bytes(zstandard.compress(data))
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
    [
        "data.jsonl",
        "data.jsonl.gz",
        "data.jsonl.zst",
        "data.csv",
        "data.csv.gz",
        "data.tsv",
        "data.parquet",
        "data.arrow",
        "stream.arrow",
        "data.feather",
        "packed.feather",
        "data.tar",
        "data.tgz",
        "data.tar.zst",
    ],
)
def test_every_format_gives_the_same_rows_and_the_digest_of_the_stored_bytes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_any(path)
    rows = reader(path)
    assert [row.values for row in rows if isinstance(row, Row)] == ROWS
    assert rows.columns == ["text", "label"]
    assert rows.digest == digest_of(path.read_bytes())


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


def test_reading_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"{\n" + jsonl(ROWS) + b"[]\n\xff\n" + jsonl(ROWS))
    items = list(reader(tmp_path / "data.jsonl"))
    assert [isinstance(item, Row) for item in items] == [False, True, True, False, False, True, True]


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


def test_the_rows_of_a_dictionary_encoded_arrow_file_are_its_values(tmp_path: Path) -> None:
    column = pyarrow.array(["a", "b", None, "a"] * 200).dictionary_encode()
    table = pyarrow.table({"text": column, "label": list(range(800)), "other": ["x"] * 800})
    pyarrow.feather.write_feather(table, tmp_path / "data.feather")
    rows = reader(tmp_path / "data.feather")
    found = list(rows)
    assert [row.values["text"] for row in found[:4] if isinstance(row, Row)] == ["a", "b", None, "a"]
    assert found[-1] == Row(800, {"text": "a", "label": 799})
    assert rows.columns == ["text", "label", "other"]


def test_a_row_of_plain_text_is_a_line_that_is_not_blank(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n \n  two \nthree")
    rows = reader(tmp_path / "data.txt")
    assert list(rows) == [Row(1, {"text": "one"}), Row(4, {"text": "  two "}), Row(5, {"text": "three"})]
    assert rows.columns == ["text"]


def picture(path: Path, color: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (color, 0, 0)).save(path)
    return path.read_bytes()


def folder_reader(path: Path) -> Rows:
    (found,) = locate(f"{path.as_uri()}/", StorageSettings())
    return Rows(found.store, found.key, uri=found.uri, wanted=("image", "label"), scratch=path.parent)


def test_a_tar_sample_holds_image_label_fields_and_whatever_else_there_is(tmp_path: Path) -> None:
    image = picture(tmp_path / "1.png")
    with tarfile.open(tmp_path / "data.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in {
            f"{'deep/' * 30}0001.PNG": image,
            f"{'deep/' * 30}0001.cls": b"cat\n",
            f"{'deep/' * 30}0001.json": b'{"split": "a", "size": 2}',
            f"{'deep/' * 30}0001.seg.npy": b"raw",
            "._0002.txt": b"of a Mac",
            "0002.txt": b"two",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    rows = reader(tmp_path / "data.tar")
    one, two = (row for row in rows if isinstance(row, Row))
    assert one.values == {"image": image, "label": "cat", "split": "a", "size": 2, "seg.npy": b"raw"}
    assert (two.number, two.name, two.values) == (2, "0002", {"text": "two"})
    assert rows.where(two) == f"{rows.uri}:2 (0002)"


def test_directories_of_a_folder_are_the_labels_of_its_images(tmp_path: Path) -> None:
    images = [picture(tmp_path / "pets" / name) for name in ("cat/1.png", "cat/deep/2.jpg", "dog/1.png")]
    (tmp_path / "pets/.DS_Store").write_bytes(b"x")
    rows = folder_reader(tmp_path / "pets")
    found = [row for row in rows if isinstance(row, Row)]
    assert [row.values["image"] for row in found] == images
    assert [row.values["label"] for row in found] == ["cat", "cat", "dog"]
    assert rows.where(found[1]).endswith("/pets/cat/deep/2.jpg")
    assert rows.image(found[0], "image")[1].width == 4


def test_a_folders_digest_changes_with_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    def digest() -> str | None:
        rows = folder_reader(tmp_path / "pets")
        list(rows)
        return rows.digest

    picture(tmp_path / "pets/cat/1.png")
    first = digest()
    picture(tmp_path / "pets/cat/1.png")
    assert digest() == first
    picture(tmp_path / "pets/cat/1.png", color=9)
    changed = digest()
    (tmp_path / "pets/cat/1.png").rename(tmp_path / "pets/cat/2.png")
    assert len({first, changed, digest()}) == 3


def test_images_that_rows_name_belong_to_the_digest(tmp_path: Path) -> None:
    def digest(*, opened: bool = True) -> str | None:
        rows = reader(tmp_path / "data.jsonl")
        for row in rows:
            if opened and isinstance(row, Row):
                assert rows.image(row, "image")[1].format == "PNG"
        return rows.digest

    (tmp_path / "data.jsonl").write_bytes(jsonl([{"image": "pets/1.png", "label": "a"}]))
    picture(tmp_path / "pets/1.png")
    first = digest()
    assert first == digest()
    picture(tmp_path / "pets/1.png", color=9)
    assert digest() != first
    assert digest(opened=False) == digest_of((tmp_path / "data.jsonl").read_bytes())


def matched(tmp_path: Path, pattern: str) -> list[str]:
    return [found.key for found in locate(f"{tmp_path.as_uri()}/{pattern}", StorageSettings())]


def test_a_pattern_names_files_in_the_order_of_their_keys(tmp_path: Path) -> None:
    for name in ("2026-02.jsonl", "2026-01.jsonl", "2025-12.jsonl", "deep/2026-03.jsonl", "deep/er/x.jsonl", "[1].csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    assert matched(tmp_path, "2026-*.jsonl") == ["2026-01.jsonl", "2026-02.jsonl"]
    assert matched(tmp_path, "202[5-6]-?2.jsonl") == ["2025-12.jsonl", "2026-02.jsonl"]
    assert matched(tmp_path, "deep/*.jsonl") == ["2026-03.jsonl"]
    assert matched(tmp_path, "*/*.jsonl") == ["deep/2026-03.jsonl"]
    assert len(matched(tmp_path, "**/*.jsonl")) == 5
    assert matched(tmp_path, "[1].csv") == ["[1].csv"]
    assert [item.number for item in reader(tmp_path / "2026-01.jsonl") if isinstance(item, Row)] == [1]


def test_a_pattern_without_a_match_says_what_lies_there(tmp_path: Path) -> None:
    for name in "abcdefg":
        (tmp_path / f"{name}.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"no file matches; below .* lies 'a.jsonl', .* and 2 more; correct the") as e:
        matched(tmp_path, "2026-*.jsonl.zst")
    assert e.value.reason == "NothingMatches"
    with pytest.raises(DataError, match="there is nothing below"):
        matched(tmp_path, "nowhere/*.jsonl")


@given(st.text("ab/.*", max_size=12))
def test_a_pattern_without_wildcards_matches_itself_alone(key: str) -> None:
    plain = key.replace("*", "x")
    assert re.fullmatch(translate(plain), plain)
    assert not re.fullmatch(translate(plain), plain + "a")
    assert re.fullmatch(translate(key), plain) or "//" in plain or "*" not in key


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=400),
    name=st.sampled_from(["a.jsonl", "a.csv", "a.jsonl.gz", "a.csv.zst", "a.parquet", "a.arrow", "a.tar"]),
)
def test_no_bytes_whatever_end_in_anything_but_a_data_error(tmp_path: Path, data: bytes, name: str) -> None:
    magic = {"gz": b"\x1f\x8b\x08\0", "zst": b"\x28\xb5\x2f\xfd", "et": b"PAR1"}
    for prefix in (b"", magic.get(name[-3:].lstrip("."), magic.get(name[-2:], b""))):
        (tmp_path / name).write_bytes(prefix + data)
        problems(tmp_path / name)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["data.parquet", "stream.arrow", "packed.feather", "data.tar", "data.jsonl.zst"]),
    at=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
)
def test_a_changed_byte_never_ends_in_anything_but_rows_or_a_data_error(
    tmp_path: Path, name: str, at: float, value: int
) -> None:
    path = tmp_path / name
    write_any(path)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] = value
    path.write_bytes(data)
    problems(path)
