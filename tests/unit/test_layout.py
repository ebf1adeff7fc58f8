"""Rules of the house that import-linter cannot see."""

import ast
from collections.abc import Iterator
from pathlib import Path

from finetune_api.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]


def named(path: Path) -> Iterator[str]:
    """Tasks that the code of a file names; what docstrings say does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in said and node.value in TASKS:
            yield f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}"


def test_nothing_but_tasks_knows_the_task() -> None:
    files = [*ROOT.glob("trainer/finetune_trainer/**/*.py"), *ROOT.glob("operator/finetune_operator/**/*.py")]
    elsewhere = [path for path in files if "tasks" not in path.parent.parts]
    assert len(elsewhere) > 80
    assert [found for path in elsewhere for found in named(path)] == []


def test_a_task_that_is_named_is_found() -> None:
    assert len(list(named(ROOT / "trainer/finetune_trainer/tasks/__init__.py"))) >= len(TASKS)
