"""The data set of demo, example and e2e tests: real, reproducible, and no label given away."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def dataset() -> ModuleType:
    sys.path.append(str(ROOT / "hack"))  # where its neighbours are when it runs as a script
    spec = importlib.util.spec_from_file_location("hack_dataset", ROOT / "hack/dataset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_same_packages_give_the_same_bytes(dataset: ModuleType, tmp_path: Path) -> None:
    first = dataset.make(tmp_path / "a", rows=70, test_rows=14)
    second = dataset.make(tmp_path / "b", rows=70, test_rows=14)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.fixture(scope="module")
def made(dataset: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Rows]:
    train, test = map(dataset.read, dataset.make(tmp_path_factory.mktemp("rows"), rows=350, test_rows=70))
    return train, test


def test_train_and_test_share_neither_modules_nor_sentences(made: tuple[Rows, Rows]) -> None:
    train, test = made
    assert (len(train), len(test)) == (350, 70)
    for column in ("module", "text"):
        assert not {row[column] for row in train} & {row[column] for row in test}
    texts = [row["text"].casefold() for row in train + test]
    assert len(set(texts)) == len(texts)


def test_no_row_says_its_packages_name_and_labels_are_balanced(dataset: ModuleType, made: tuple[Rows, Rows]) -> None:
    train, _ = made
    assert not [row["text"] for row in train if dataset.NAMES.search(row["text"])]
    counts = {label: sum(row["label"] == label for row in train) for label in dataset.TOPICS}
    assert set(counts.values()) == {50}


def test_too_many_rows_are_refused_in_words(
    dataset: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "TOPICS", {"networking": ("http",)})  # few files, all of which are read
    with pytest.raises(RuntimeError, match=r"networking: only \d+ of 100000 training rows in http; ask for fewer rows"):
        dataset.make(tmp_path, rows=10**5)
