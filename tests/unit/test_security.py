"""docs/security.md and docs/asks.md name tests, and these are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"security.md": "|may not|because|shown by|", "asks.md": "|they ask for|here|shown by|"}
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_the_page_names_is_there(page: str) -> None:
    named = set(NAMED.findall(text_of(page)))
    assert len(named) > 10
    assert [f"{file}::{name}" for file, name in sorted(named) if name not in functions(ROOT / file)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test(page: str) -> None:
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    claims = [row for row in rows if row not in (PAGES[page], "|-|-|-|")]
    assert len(claims) > 10
    assert [row for row in claims if not NAMED.search(row.rsplit("|", 2)[1])] == []


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def functions(file: Path) -> set[str]:
    """Of the top level of a module; none where there is no such file."""
    if not file.exists():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
