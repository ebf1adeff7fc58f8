"""Named things in real sentences: classes, functions and attributes, as programmers marked them up in docstrings.

Each row is a paragraph of a docstring with its markup taken out, and the places where a role of Sphinx had said that a
name is one of a class (`:class:`), a function or a method (`:func:`, `:meth:`), or an attribute or an argument
(`:attr:`, `:data:`). To see that from the sentence alone is what the model learns. Sources are parsed, never imported;
nothing is downloaded. The same package versions give the same bytes.

    python hack/names.py DIRECTORY [--rows N] [--test-rows N]
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset import gather
from docstrings import documented

PACKAGES = ("torch", "sympy", "sklearn", "networkx", "scipy", "urllib3", "requests")
KINDS = {
    "class": "class",
    "exc": "class",
    "func": "function",
    "meth": "function",
    "attr": "attribute",
    "data": "attribute",
}
ROWS_PER_MODULE = 12
WORDS = range(6, 61)
_MARKUP = re.compile(
    r":(?:py:)?(?P<role>\w+):`(?P<target>[^`<]*?)(?:\s*<(?P<link>[^`>]*)>)?`|``(?P<literal>[^`]+)``|`(?P<plain>[^`]+)`_?"
)
_NAME = re.compile(r"\w+(?:\.\w+)*")


def make(directory: Path, *, rows: int = 1500, test_rows: int = 400) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` (columns text, spans, module) and returns their paths.

    No module has rows in both. Raises RuntimeError when the installed packages say too little.
    """
    seen: set[str] = set()

    def rows_of(path: Path, module: str) -> Iterator[dict[str, Any]]:
        return _rows(path, module=module, seen=seen)

    return gather(PACKAGES, rows_of, directory, rows=rows, tests=test_rows, whole=True)


def _rows(path: Path, *, module: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    count = 0
    for _, docstring in documented(path, says=tuple(f":{kind}:`" for kind in KINDS)):
        for paragraph in docstring.split("\n\n"):
            row = plain(paragraph)
            if row is not None and row["text"] not in seen and count < ROWS_PER_MODULE:
                seen.add(row["text"])
                count += 1
                yield {**row, "module": module}


def plain(paragraph: str) -> dict[str, Any] | None:
    """The paragraph without markup, and the named things in it; None for what is no sentence or names nothing."""
    words = " ".join(paragraph.split())
    if not re.match(r"[A-Z:`]", words) or re.search(r">>>|\.\. |:math:|---|===|\*\*|::", words):
        return None
    text, spans, reached = "", [], 0
    for found in _MARKUP.finditer(words):
        text += words[reached : found.start()]
        reached = found.end()
        shown = found["target"] or found["literal"] or found["plain"] or found["link"] or ""
        if found["role"] is not None:
            shown = shown.removesuffix("()")
            shown = shown.rpartition(".")[2] if shown.startswith(("~", "!~")) else shown.lstrip("!.")
            if found["role"] in KINDS:
                if not _NAME.fullmatch(shown):
                    return None
                spans.append({"start": len(text), "end": len(text) + len(shown), "label": KINDS[found["role"]]})
        text += shown
    text += words[reached:]
    if not spans or "`" in text or len(text.split()) not in WORDS:
        return None
    return {"text": text, "spans": spans}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a real token-classification data set without network")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1500, help="training rows (default 1500)")
    parser.add_argument("--test-rows", type=int, default=400, help="test rows of other modules (default 400)")
    arguments = parser.parse_args()
    for path in make(arguments.directory, rows=arguments.rows, test_rows=arguments.test_rows):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        words = sum(len(row["text"].split()) for row in rows) / len(rows)
        counts = Counter(span["label"] for row in rows for span in row["spans"])
        said = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
        print(f"{path}: {len(rows)} rows, {words:.0f} words on average: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
