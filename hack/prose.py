"""Real text for language models, out of what a Debian machine with the trainer has; nothing is downloaded.

text: topics of Python's own documentation (pydoc_data.topics), for continued pre-training.

instructions: in which section of the archive is this Debian package? Asked in several ways, as chat messages; the test
rows are about other packages, and ask in ways that no training row does.

preferences: two descriptions for the name of a Debian package: its own is preferred to that of another one.

Whole families (source packages, topics) are on one side. The same package lists and versions give the same bytes.

    python hack/prose.py text|instructions|preferences DIRECTORY
"""

import argparse
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docstrings import documented

SECTIONS = ("doc", "fonts", "games", "golang", "haskell", "java", "javascript", "localization", "perl", "php", "python")
"""Sections of the archive that instructions are about."""
MODULES = (
    *("argparse", "asyncio", "collections", "concurrent", "ctypes", "email", "http", "importlib", "json", "logging"),
    *("multiprocessing", "tkinter", "unittest", "urllib", "xml", "networkx", "numpy", "scipy", "sklearn", "sympy"),
)
"""Where docstrings are read. All of them come with the trainer or Python itself."""
ASKED = (
    "In which section of the archive is the Debian package {name}? It is described as: {description}",
    "{description}\nThat is what the package {name} is for. Which section does it belong to?",
    "Name the section of the package {name} ({description}).",
    "Which section holds {name}?\nDescription: {description}",
    "package: {name}\ndescription: {description}\nsection?",
    "A package called {name} says of itself: {description}. Where does it belong?",
)
ASKED_IN_TESTS = (
    "I look for the section of {name}. The description says: {description}",
    "Tell me which section {name} is in; its description is {description}",
    "Classify this package by section.\nname: {name}\ndescription: {description}",
)
SYSTEM = "You answer with one word."
_SKIPPED = re.compile(r"(^|/)(tests?|testing|externals|_vendor|benchmarks|__pycache__)(/|$)|conftest|test_")
_TEST_SHARE = 6
"""One family in so many goes to the test rows."""
_WORDS = range(8, 200)
_PIECE = 1200
"""Characters of a topic that make a text."""


@dataclass(frozen=True)
class Package:
    name: str
    description: str
    section: str
    source: str

    @property
    def tests(self) -> bool:
        return in_tests(self.source)


def in_tests(family: str) -> bool:
    """Whether a family belongs to the test rows."""
    return hashlib.sha256(family.encode()).digest()[0] % _TEST_SHARE == 0


def packages() -> list[Package]:
    """The Debian packages that this machine's lists know, each description once. Raises RuntimeError."""
    try:
        lists = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError("package lists are needed: run this on a Debian machine, after apt-get update") from error
    found: dict[str, Package] = {}
    for stanza in lists.split("\n\n"):
        entry = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if {"Package", "Description", "Section"} <= entry.keys():
            name, source = entry["Package"], entry.get("Source", entry["Package"]).split(" ")[0]
            section = entry["Section"].rpartition("/")[2]
            found.setdefault(entry["Description"], Package(name, entry["Description"], section, source))
    if len(found) < 10_000:
        raise RuntimeError(f"only {len(found)} packages are known to apt; run apt-get update")
    return sorted(found.values(), key=lambda package: package.name)


def docstrings() -> Iterator[tuple[str, str]]:
    """Paragraphs of prose in docstrings, each once, with the module they are in. Sources are parsed, never imported."""
    seen = set()
    for path, module in _sources():
        for _, docstring in documented(path):
            for text in _paragraphs(docstring):
                if text not in seen:
                    seen.add(text)
                    yield text, module


def _sources() -> Iterator[tuple[Path, str]]:
    for name in MODULES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin)
        paths = sorted(root.parent.rglob("*.py")) if spec.submodule_search_locations else [root]
        for path in paths:
            inside = path.relative_to(root.parent).as_posix()
            if not _SKIPPED.search(inside):
                yield path, f"{name}/{inside}"


def _paragraphs(docstring: str) -> Iterator[str]:
    for paragraph in docstring.split("\n\n"):
        text = re.sub(r":\w+:`~?([^`]*)`", r"\1", paragraph).replace("`", "")
        text = " ".join(text.split())
        prose = not text.startswith((">>>", "..", "@", "---", "===")) and "----" not in text and ">>>" not in text
        letters = sum(character.isalpha() or character == " " for character in text)
        if prose and len(text.split()) in _WORDS and letters > 0.85 * len(text):
            yield text


def topics() -> list[tuple[str, str]]:
    """Python's documentation in texts of some paragraphs, with the name of the topic."""
    from pydoc_data.topics import topics as found

    texts = []
    for name in sorted(found):
        piece = ""
        for paragraph in [*(" ".join(part.split()) for part in found[name].split("\n\n")), ""]:
            if piece and (len(piece) + len(paragraph) > _PIECE or not paragraph):
                texts.append((piece, name))
                piece = ""
            piece = f"{piece}\n{paragraph}".strip()
    return texts


def mixed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in an order that looks random and is the same every time."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())


# --- examples ---


def text(*, tests: bool, rows: int) -> list[dict[str, Any]]:
    return mixed({"text": text, "topic": name} for text, name in topics() if in_tests(name) == tests)[:rows]


def instructions(*, tests: bool, rows: int) -> list[dict[str, Any]]:
    """Messages; as many rows of each section."""
    draw = random.Random(17)
    asked = ASKED_IN_TESTS if tests else ASKED
    by_section: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    chosen = [package for package in packages() if package.tests == tests and package.section in by_section]
    draw.shuffle(chosen)
    for package in chosen:
        if len(by_section[package.section]) <= rows // len(SECTIONS):
            question = draw.choice(asked).format(name=package.name, description=package.description)
            system = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.5 else []
            answer = {"role": "assistant", "content": package.section}
            by_section[package.section].append(
                {"messages": [*system, {"role": "user", "content": question}, answer], "package": package.name}
            )
    return mixed(row for found in by_section.values() for row in found)[:rows]


def preferences(*, tests: bool, rows: int) -> list[dict[str, Any]]:
    draw = random.Random(17)
    chosen = [package for package in packages() if package.tests == tests and package.section in SECTIONS]
    draw.shuffle(chosen)
    found = []
    for package, other in itertools.pairwise(chosen):
        if package.section != other.section and len(found) < rows:
            found.append(
                {
                    "prompt": f"What is {package.name}?",
                    "chosen": package.description,
                    "rejected": other.description,
                }
            )
    return mixed(found)


KINDS: dict[str, tuple[Callable[..., list[dict[str, Any]]], int, int]] = {
    "text": (text, 400, 100),
    "instructions": (instructions, 2000, 220),
    "preferences": (preferences, 1600, 200),
}
"""What makes the rows, and how many there are for training and for tests."""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def make(kind: str, directory: Path) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` of one of KINDS and returns their paths."""
    rows_of, rows, test_rows = KINDS[kind]
    train = write(directory / "train.jsonl", rows_of(tests=False, rows=rows))
    return train, write(directory / "test.jsonl", rows_of(tests=True, rows=test_rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="Make rows for language models without a download")
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    for path in make(arguments.kind, arguments.directory):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
