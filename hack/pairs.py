"""Real data for translation and summarization, out of what a Debian machine with the trainer has.

translation: one-line descriptions of Debian's packages for programmers, English and German. apt fetches the
translations from the machine's own package sources; nothing of the machine's apt is changed.

summarization: the body of a docstring and the signature of its function, and the docstring's first line. Sources are
parsed, never imported.

Both put whole families (source packages, modules) on one side, so that no test row has a near copy among the training
rows. The same package lists and package versions give the same bytes.

    python hack/pairs.py translation|summarization DIRECTORY
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from docstrings import documented

DOMAIN = (
    *("cli-mono", "debug", "devel", "doc", "gnu-r", "haskell", "interpreters", "introspection", "java", "javascript"),
    *("libdevel", "libs", "lisp", "ocaml", "oldlibs", "perl", "php", "python", "ruby", "vcs"),
)
"""Sections of the archive, all about programming, whose packages are translated in the example; the others are for
pretraining."""
PACKAGES = (
    *("accelerate", "huggingface_hub", "networkx", "numpy", "peft", "scipy", "sklearn", "sympy"),
    *("argparse", "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging"),
    *("multiprocessing", "tkinter", "unittest", "urllib", "xml", "xmlrpc"),
)
"""Where docstrings are read. All of them come with the trainer, its tests or Python itself."""
PRETRAINED = 6000
"""Summaries that the small encoder-decoder of tests/assets has learned from; the example takes others."""
TESTED = 500
_SKIPPED = re.compile(r"(^|/)(tests?|testing|externals|_vendor|benchmarks|models|__pycache__)(/|$)|conftest|test_")
_TEST_SHARE = 6
"""One family in so many goes to the test rows."""
_BODY_WORDS = 30
_PER_MODULE = 40
_SUMMARY_WORDS = range(3, 16)
_APT = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True)
class Row:
    source: str
    target: str
    family: str
    """The source package, or the module."""
    kind: str
    """The archive's section, or the package."""

    @property
    def tests(self) -> bool:
        """Whether its family belongs to the test rows."""
        return hashlib.sha256(self.family.encode()).digest()[0] % _TEST_SHARE == 0


def descriptions(scratch: Path) -> list[Row]:
    """One-line descriptions of Debian packages, English and German, each pair once. Raises RuntimeError."""
    lists = scratch / "lists"
    if not list(lists.glob("*Translation-de*")):
        _fetch(scratch)
    english: dict[str, dict[str, str]] = {}
    for path in sorted(lists.glob("*_Packages*")):
        english |= {entry["Description-md5"]: entry for entry in _stanzas(path) if "Description-md5" in entry}
    found: dict[tuple[str, str], Row] = {}
    for path in sorted(lists.glob("*Translation-de*")):
        for entry in _stanzas(path):
            package = english.get(entry.get("Description-md5", ""))
            if package is not None:
                pair = _first_line(package["Description"]), _first_line(entry["Description-de"])
                family = package.get("Source", package["Package"]).split(" ")[0]
                if all(pair) and pair[0] != pair[1]:
                    found.setdefault(pair, Row(*pair, family=family, kind=package.get("Section", "").split("/")[-1]))
    if not found:
        raise RuntimeError("apt has no German descriptions: its package sources must be Debian's")
    return sorted(found.values(), key=lambda row: hashlib.sha256(row.source.encode()).digest())


def _fetch(scratch: Path) -> None:
    for name in ("lists/partial", "cache"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    options = {
        "Acquire::Languages": "de",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "APT::Sandbox::User": "root",
        "Dir::State::lists": str(scratch / "lists"),
        "Dir::Cache": str(scratch / "cache"),
    }
    command = ["apt-get", "-qq", "update", *(f"-o{name}={value}" for name, value in options.items())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"apt-get cannot fetch the translations: {result.stderr.strip()[:300]}")


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    text = subprocess.run([_APT, "cat-file", str(path)], capture_output=True, check=True).stdout.decode()
    for stanza in text.split("\n\n"):
        lines = re.findall(r"^([A-Za-z0-9-]+):[ ]?(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        if lines:
            yield dict(lines)


def _first_line(text: str) -> str:
    return " ".join(text.partition("\n")[0].split())


def docstrings() -> list[Row]:
    """Bodies of docstrings, signatures behind them, and their first lines."""
    found: dict[str, Row] = {}
    for package in PACKAGES:
        for name, path in _modules(package):
            for source, target in _documented(path):
                key = re.sub(r"\W+", " ", target).casefold()
                found.setdefault(key, Row(source, target, family=name, kind=package))
    return sorted(found.values(), key=lambda row: hashlib.sha256(row.source.encode()).digest())


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return
    if not spec.submodule_search_locations:
        yield package, Path(spec.origin)
        return
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _SKIPPED.search(inside.as_posix()):
            yield ".".join((package, *inside.with_suffix("").parts)).removesuffix(".__init__"), path


def _documented(path: Path) -> list[tuple[str, str]]:
    found = []
    for node, docstring in documented(path):
        if not isinstance(node, ast.Module):
            summary, _, body = docstring.partition("\n\n")
            words, text = _plain(summary).split(), _plain(body).split()
            if len(words) in _SUMMARY_WORDS and len(text) >= len(words):
                found.append((f"{' '.join(text[:_BODY_WORDS])} ({_signature(node)})", " ".join(words)))
    return found[:_PER_MODULE]


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
    return f"def {node.name}: {', '.join(names)}" if names else f"def {node.name}"


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text)
    return re.sub(r"[`*]|[-=~]{3,}|>>>", "", text)


def write(path: Path, rows: list[Row], names: tuple[str, str]) -> Path:
    """jsonl with the columns `names`, family and kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({names[0]: r.source, names[1]: r.target, "family": r.family, "kind": r.kind}, ensure_ascii=False)
        for r in rows
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make(task: str, directory: Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` and returns their paths. Raises RuntimeError."""
    if task == "translation":
        rows, names = [row for row in descriptions(directory / "apt") if row.kind in DOMAIN], ("source", "target")
        first = 0
    else:
        rows, names, first = docstrings(), ("text", "summary"), PRETRAINED
    train, test = [row for row in rows if not row.tests][first:], [row for row in rows if row.tests][:TESTED]
    return write(directory / "train.jsonl", train, names), write(directory / "test.jsonl", test, names)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make real data for translation or summarization")
    parser.add_argument("task", choices=["translation", "summarization"])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    for path in make(arguments.task, arguments.directory):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
