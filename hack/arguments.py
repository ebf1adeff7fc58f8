"""Real numbers about real texts out of what a bare machine has: how many arguments a function takes, and its docstring.

The text is a docstring that describes its parameters, without the signature; the number is counted in the code.
Sources are parsed, never imported; nothing is downloaded. The same package versions give the same bytes.

    python hack/arguments.py DIRECTORY [--rows N] [--test-rows N]
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset import gather
from docstrings import documented

PACKAGES = ("networkx", "numpy", "scipy", "sklearn", "sympy")
ROWS_PER_MODULE = 10
"""So that no long module outweighs the others."""
WORDS = range(12, 100)
MOST = 12
"""Arguments: functions with more are few and far between."""
_RULE = re.compile(r"^\s*-{3,}$", re.MULTILINE)
"""Below a section's name."""


def make(directory: Path, *, rows: int = 1200, test_rows: int = 300) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` (columns text, value, module) and returns their paths.

    No module has rows in both. Raises RuntimeError when the installed packages have too few functions.
    """
    return gather(PACKAGES, _functions, directory, rows=rows, tests=test_rows)


def _functions(path: Path, module: str) -> Iterator[dict[str, Any]]:
    count = 0
    for node, docstring in documented(path, says=("Parameters",)):
        if not isinstance(node, ast.FunctionDef) or count == ROWS_PER_MODULE:
            continue
        text = " ".join(_RULE.sub("", docstring).split())
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        number = len([name for name in names if name not in ("self", "cls")])
        if "Parameters" in text and len(text.split()) in WORDS and number <= MOST and f"{node.name}(" not in text:
            count += 1
            yield {"text": text, "value": number, "module": module}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--test-rows", type=int, default=300)
    options = parser.parse_args()
    try:
        make(options.directory, rows=options.rows, test_rows=options.test_rows)
    except RuntimeError as error:
        print(f"arguments: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
