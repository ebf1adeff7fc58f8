"""A real data set out of what a bare machine has: the sentences programmers wrote about their own code.

Every row is the first paragraph of a docstring of an installed package or of the standard library, its label the
subject of that package. Sources are parsed, never imported; nothing is downloaded, nothing made up. The same package
versions give the same bytes.

    python hack/dataset.py DIRECTORY [--rows N] [--test-rows N]
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from docstrings import documented

TOPICS: dict[str, tuple[str, ...]] = {
    "algebra": ("sympy",),
    "deep-learning": ("torch",),
    "graphs": ("networkx",),
    "machine-learning": ("sklearn",),
    "networking": ("asyncio", "http", "email", "urllib", "aiohttp", "urllib3", "requests", "huggingface_hub"),
    "science": ("scipy",),
    "types": ("mypy", "typing_extensions", "pydantic"),
}
"""Label -> the packages that write about it. All of them come with the trainer, its tests or Python itself."""

NAMES = re.compile(
    r"\b(sym\s?py|num\s?py|np|py\s?torch|torch|network\s?x|nx|transformers|sentence[-_ ]transformers|tokenizers|peft|"
    r"sklearn|scikit[-_ ]learn|asyncio|http|email|urllib3?|aiohttp|requests|hugging\s?face(_hub)?|hub|sci\s?py|mypy|"
    r"pydantic)\b",
    re.IGNORECASE,
)
"""The packages' own names: a row that says them would give its label away."""

SKIPPED = re.compile(r"(^|/)(tests?|testing|externals|_vendor|benchmarks|__pycache__)(/|$)|conftest|test_")
TEST_SHARE = 5
"""One module in so many goes to the test rows."""
ROWS_PER_MODULE = 8
"""So that no long module outweighs the others."""
WORDS = range(8, 81)


@dataclass(frozen=True)
class Row:
    text: str
    label: str
    module: str


def make(directory: Path, *, rows: int = 1500, test_rows: int = 500) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` (columns text, label, module) and returns their paths.

    No module has rows in both. Raises RuntimeError when the installed packages have too few sentences.
    """
    train: list[Row] = []
    test: list[Row] = []
    seen: set[str] = set()
    for position, label in enumerate(sorted(TOPICS)):
        wanted = (_share(rows, position), _share(test_rows, position))
        found = _rows(label, wanted, seen)
        for name, got, want in zip(("training", "test"), found, wanted, strict=True):
            if len(got) < want:
                packages = ", ".join(TOPICS[label])
                raise RuntimeError(f"{label}: only {len(got)} of {want} {name} rows in {packages}; ask for fewer rows")
        train += found[0]
        test += found[1]
    directory.mkdir(parents=True, exist_ok=True)
    return _write(directory / "train.jsonl", train), _write(directory / "test.jsonl", test)


def _share(total: int, position: int) -> int:
    return total // len(TOPICS) + (position < total % len(TOPICS))


def _rows(label: str, wanted: tuple[int, int], seen: set[str]) -> tuple[list[Row], list[Row]]:
    """The first training and test rows of a topic, its modules taken in an order that looks random and is not."""
    found: tuple[list[Row], list[Row]] = ([], [])
    found_in = sorted((hashlib.sha256(name.encode()).digest(), name, path) for name, path in modules(TOPICS[label]))
    for digest, name, path in found_in:
        side = int(digest[-1] % TEST_SHARE == 0)
        if len(found[side]) < wanted[side]:
            rows = _of_module(path, label=label, module=name, seen=seen)
            found[side].extend(rows[: wanted[side] - len(found[side])])
        if all(len(rows) >= want for rows, want in zip(found, wanted, strict=True)):
            break
    return found


def modules(packages: tuple[str, ...], *, whole: bool = False) -> Iterator[tuple[str, Path]]:
    """Name and file of each module; packages are named without `.__init__`, unless it is the `whole` name."""
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        if not spec.submodule_search_locations:
            yield package, Path(spec.origin)
            continue
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not SKIPPED.search(inside.as_posix()):
                name = ".".join((package, *inside.with_suffix("").parts))
                yield name if whole else name.removesuffix(".__init__"), path


def gather(
    packages: tuple[str, ...],
    rows_of: Callable[[Path, str], Iterable[object]],
    directory: Path,
    *,
    rows: int,
    tests: int,
    whole: bool = False,
) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` and returns their paths: what `rows_of` finds in each module (its file, its
    name, as `modules` has it) of the packages. No module has rows in both.

    Raises RuntimeError when the installed packages say too little.
    """
    found: dict[str, list[object]] = {"train": [], "test": []}
    wanted = {"train": rows, "test": tests}
    found_in = sorted((hashlib.sha256(n.encode()).digest(), n, p) for n, p in modules(packages, whole=whole))
    for digest, name, path in found_in:
        side = "test" if digest[-1] % TEST_SHARE == 0 else "train"
        if len(found[side]) < wanted[side]:
            found[side] += list(rows_of(path, name))[: wanted[side] - len(found[side])]
    directory.mkdir(parents=True, exist_ok=True)
    for side, count in wanted.items():
        if len(found[side]) < count:
            raise RuntimeError(
                f"only {len(found[side])} of {count} {side} rows in {', '.join(packages)}; ask for fewer rows"
            )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found[side])
        (directory / f"{side}.jsonl").write_text(lines, encoding="utf-8")
    return directory / "train.jsonl", directory / "test.jsonl"


def _of_module(path: Path, *, label: str, module: str, seen: set[str]) -> list[Row]:
    rows: list[Row] = []
    for _, docstring in documented(path):
        text = _sentence(docstring)
        key = re.sub(r"\W+", " ", text).casefold()
        if text and key not in seen and len(rows) < ROWS_PER_MODULE:
            seen.add(key)
            rows.append(Row(text, label, module))
    return rows


def _sentence(docstring: str) -> str:
    """The first paragraph in plain words, without the package's name; empty when it is no sentence to learn from."""
    paragraph = docstring.strip().split("\n\n")[0]
    if paragraph.startswith((">>>", "..", "@")) or "copyright" in paragraph.casefold():
        return ""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", paragraph).replace("`", "")
    text = " ".join(NAMES.sub(" ", text).split())
    return text if len(text.split()) in WORDS else ""


def _write(path: Path, rows: list[Row]) -> Path:
    """Rows in an order of their own, so that a file cut anywhere still has every label."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(row.text.encode()).digest())
    lines = (json.dumps({"text": r.text, "label": r.label, "module": r.module}, ensure_ascii=False) for r in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `make` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a real text-classification data set without network")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1500, help="training rows (default 1500)")
    parser.add_argument("--test-rows", type=int, default=500, help="test rows of other modules (default 500)")
    arguments = parser.parse_args()
    for path in make(arguments.directory, rows=arguments.rows, test_rows=arguments.test_rows):
        rows = read(path)
        words = sum(len(row["text"].split()) for row in rows) / len(rows)
        counts = ", ".join(f"{label} {count}" for label, count in sorted(Counter(r["label"] for r in rows).items()))
        print(f"{path}: {len(rows)} rows, {words:.0f} words on average: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
