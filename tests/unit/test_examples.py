"""The examples: each is a document that holds, and each can be run on this machine."""

from pathlib import Path
from types import ModuleType

import pytest

from finetune_api.validate import load_job

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml") if path.stem != "profile")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "hack"))
    import example

    return example


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_reads_what_this_machine_can_make(
    example: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    for data in example.DATA:
        monkeypatch.setitem(example.DATA, data, made.append)
    text = (ROOT / "examples" / f"{name}.yaml").read_text()
    found = example.here(text, tmp_path)
    assert "s3://" not in found
    assert made
    job, problems = load_job(found.encode(), name=name)
    assert not problems
    assert job is not None
    assert Path(job.spec.model.uri.removeprefix("file://")).is_dir()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_stands_in_the_table_and_its_task_has_a_result(name: str) -> None:
    assert f"|`{name}.yaml`|" in (ROOT / "examples/README.md").read_text()
    assert f"make example NAME={name}`" in (ROOT / "docs/tasks.md").read_text()


def test_no_module_has_functions_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "hack"))
    import arguments
    from dataset import read

    train, test = map(read, arguments.make(tmp_path, rows=200, test_rows=50))
    assert not {row["module"] for row in train} & {row["module"] for row in test}
    assert all(0 <= int(row["value"]) <= arguments.MOST for row in train + test)
