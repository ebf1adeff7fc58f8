"""docs/security.md names tests, and these are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/security.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(NAMED.findall(PAGE.read_text(encoding="utf-8")))
    assert len(named) > 20
    assert [f"{file}::{name}" for file, name in sorted(named) if name not in functions(ROOT / file)] == []


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    claims = [row for row in rows if row not in ("|may not|because|shown by|", "|-|-|-|")]
    assert len(claims) > 20
    assert [row for row in claims if not NAMED.search(row.rsplit("|", 2)[1])] == []


def functions(file: Path) -> set[str]:
    """Of the top level of a module; none where there is no such file."""
    if not file.exists():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
