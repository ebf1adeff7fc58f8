"""The data of the multi-task example: no markup is left in the text, and the spans are where it was."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names() -> ModuleType:
    sys.path.insert(0, str(ROOT / "hack"))  # where its neighbours are when it runs as a script
    spec = importlib.util.spec_from_file_location("hack_names", ROOT / "hack/names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_markup_becomes_spans(names: ModuleType) -> None:
    row = names.plain("Like :class:`~torch.nn.Linear`, but :meth:`forward()` ignores ``bias`` and :attr:`self.scale`.")
    assert row["text"] == "Like Linear, but forward ignores bias and self.scale."
    found = [(row["text"][span["start"] : span["end"]], span["label"]) for span in row["spans"]]
    assert found == [("Linear", "class"), ("forward", "function"), ("self.scale", "attribute")]


@pytest.mark.parametrize(
    "paragraph",
    [
        "Nothing in this sentence is marked up as a name of anything.",
        "See :ref:`the user guide <guide>` for more of this and other things.",
        ">>> model = :class:`Linear` of a doctest that is no sentence at all",
        "Too short: :class:`Linear`.",
        "A name that is none, :func:`f(x) for x in y`, is left out with its row.",
    ],
)
def test_what_names_nothing_or_is_no_sentence_is_left_out(names: ModuleType, paragraph: str) -> None:
    assert names.plain(paragraph) is None


def test_train_and_test_share_neither_modules_nor_sentences(names: ModuleType, tmp_path: Path) -> None:
    names.PACKAGES = ("requests", "urllib3")
    train, test = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in names.make(tmp_path, rows=30, test_rows=5)
    )
    assert len(train) == 30
    for key in ("module", "text"):
        assert not {row[key] for row in train} & {row[key] for row in test}
    with pytest.raises(RuntimeError, match=r"only \d+ of 1000000 train rows"):
        names.make(tmp_path, rows=10**6)
