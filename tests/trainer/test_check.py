"""Rows of images on their way to a task: wherever the bytes lie, it gets those of an image that can be decoded."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tests.trainer.memory import config_of

from finetune_trainer.data.check import Checker, Example, Problems
from finetune_trainer.data.read import Rows, locate
from finetune_trainer.storage import StorageSettings
from finetune_trainer.tasks.base import Column, Facts, Learner, Piece, RowError, Sample, Task, Tools, cell


class Pictures(Task):
    """Reads a label for an image, and learns nothing."""

    reads = "images"
    store: ClassVar[Mapping[str, Column]] = {}

    def __init__(self) -> None:
        super().__init__(config_of())
        self.columns = {"image": "image", "label": "label"}

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        data = cell(row, self.columns, "image")
        return Sample(hashlib.sha256(data).hexdigest(), str(cell(row, self.columns, "label")), payload=data)

    def encode(self, samples: Sequence[Sample], tools: Tools) -> Sequence[Sequence[Piece] | RowError]:
        raise NotImplementedError  # these tests only read rows

    def learner(self, facts: Facts) -> Learner:
        raise NotImplementedError  # these tests only read rows


def picture(color: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (color, 0, 0)).save(out, "PNG")
    return out.getvalue()


def folder(root: Path, images: list[bytes]) -> str:
    for number, data in enumerate(images):
        (root / "pets" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (root / "pets" / "ab"[number % 2] / f"{number}.png").write_bytes(data)
    return "pets/"


def paths(root: Path, images: list[bytes]) -> str:
    (root / "images").mkdir()
    for number, data in enumerate(images):
        (root / f"images/{number}.png").write_bytes(data)
    rows = [{"image": f"images/{number}.png", "label": "a"} for number in range(len(images))]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "rows.jsonl"


def table(root: Path, images: list[bytes]) -> str:
    rows = [{"image": {"bytes": data, "path": None}, "label": "a"} for data in images]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    return "rows.parquet"


def archive(root: Path, images: list[bytes]) -> str:
    with tarfile.open(root / "rows.tar", "w") as target:
        for number, image in enumerate(images):
            for name, data in ((f"{number}.png", image), (f"{number}.cls", b"a")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                target.addfile(entry, io.BytesIO(data))
    return "rows.tar"


WAYS = [folder, paths, table, archive]


def checked(root: Path, name: str) -> tuple[list[Example], Problems]:
    (found,) = locate(f"{root.as_uri()}/{name}", StorageSettings())
    rows = Rows(found.store, found.key, uri=found.uri, wanted=("image", "label"), scratch=root)
    problems = Problems()
    return list(Checker(Pictures(), group_by=None, problems=problems).each(rows, group=False)), problems


@pytest.mark.parametrize("make", WAYS)
def test_a_task_gets_the_bytes_of_images_however_they_are_stored(
    tmp_path: Path, make: Callable[[Path, list[bytes]], str]
) -> None:
    images = [picture(color) for color in range(4)]
    examples, problems = checked(tmp_path, make(tmp_path, images))
    assert problems.first == []
    assert sorted(example.sample.payload for example in examples) == sorted(images)
    assert all(example.size >= len(images[0]) for example in examples)


@pytest.mark.parametrize("make", WAYS)
def test_an_image_that_cannot_be_decoded_is_a_problem_of_its_row(
    tmp_path: Path, make: Callable[[Path, list[bytes]], str]
) -> None:
    images = [picture(0), picture(1)[:80], picture(2)]
    examples, problems = checked(tmp_path, make(tmp_path, images))
    assert [problem.reason for problem in problems.first] == ["InvalidRow"]
    assert "cannot be decoded" in problems.first[0].message
    assert any(place in problems.first[0].message for place in ("b/1.png", ":2:", ":2 (1):"))
    assert len(examples) == 2
