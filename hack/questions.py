"""Questions about real texts out of what a bare machine has: what scipy and scikit-learn say of their parameters.

The context is a few consecutive entries of a docstring's section Parameters; a question asks for a parameter's type,
for its default (which many do not have: then the context has no answer), or for the parameter that a description is of.
Sources are parsed, never imported; nothing is downloaded. The same package versions give the same bytes.

    python hack/questions.py DIRECTORY [--rows N] [--test-rows N]
"""

import argparse
import ast
import inspect
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dataset import gather
from docstrings import documented

PACKAGES = ("scipy", "sklearn")
QUESTIONS_PER_MODULE = 12
WORDS = 60
"""A context has about so many at most."""
_ENTRY = re.compile(r"^(?P<name>\w+) ?: (?P<kind>.+)$")
_DEFAULT = re.compile(r",? *\(?(?:optional, *)?default ?(?:=|:|is)? *(?P<value>[^,)]+)\)?")


class Parameter(NamedTuple):
    """One entry: `text` is all of it, `kind` and `default` are pieces of it."""

    name: str
    kind: str
    default: str | None
    says: str
    text: str


def make(directory: Path, *, rows: int = 1200, test_rows: int = 300) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `test.jsonl` (columns question, context, answers, module) and returns their paths.

    No module has rows in both. Raises RuntimeError when the installed packages say too little.
    """
    return gather(PACKAGES, _questions, directory, rows=rows, tests=test_rows)


def _questions(path: Path, module: str) -> Iterator[dict[str, Any]]:
    draw = random.Random(module)
    count = 0
    for node, docstring in documented(path, says=("Parameters",)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for group in _groups(_parameters(docstring)):
            if count < QUESTIONS_PER_MODULE and len(group) > 1:
                count += 1
                yield {**_question(draw, group), "module": module}


def _parameters(docstring: str) -> list[Parameter]:
    """The entries of the section Parameters, each in one line."""
    _, _, section = docstring.partition("Parameters\n----------\n")
    section = re.split(r"\n\n\w[\w ]*\n-{3,}\n", section)[0]
    found = []
    for block in re.split(r"\n(?=\w+ ?: )", section):
        head, _, rest = block.strip("\n").partition("\n")
        entry = _ENTRY.match(head)
        said = " ".join(inspect.cleandoc("\n" + rest).split("\n\n")[0].split())
        sentence = re.split(r"(?<=[a-z)])\. ", said)[0].rstrip(".")
        if entry is None or not 3 <= len(sentence.split()) <= 20 or "`" in sentence:
            continue
        default = _DEFAULT.search(entry["kind"])
        kind = entry["kind"][: default.start()] if default else entry["kind"]
        kind = re.sub(r", *optional$", "", kind).strip()
        if kind and len(kind.split()) <= 8:
            text = f"{entry['name']} : {entry['kind']}. {sentence}."
            found.append(Parameter(entry["name"], kind, default["value"].strip() if default else None, sentence, text))
    return found


def _groups(parameters: list[Parameter]) -> Iterator[list[Parameter]]:
    """Consecutive entries, up to WORDS words each group."""
    group: list[Parameter] = []
    for parameter in parameters:
        if group and sum(len(one.text.split()) for one in [*group, parameter]) > WORDS:
            yield group
            group = []
        group.append(parameter)
    yield group


def _question(draw: random.Random, group: list[Parameter]) -> dict[str, Any]:
    place = draw.randrange(len(group))
    chosen, at = group[place], sum(len(one.text) + 1 for one in group[:place])
    kind_at = at + chosen.text.index(" : ") + 3
    answers: list[dict[str, Any]]
    match draw.choice(("type", "default", "name")):
        case "type":
            question = f"What is the type of {chosen.name}?"
            answers = [{"text": chosen.kind, "start": kind_at}]
        case "default":
            question = f"What is the default of {chosen.name}?"
            answers = []
            if chosen.default is not None:
                start = chosen.text.index(chosen.default, chosen.text.index("default") + len("default"))
                answers = [{"text": chosen.default, "start": at + start}]
        case _:
            question = f"Which parameter is meant: {chosen.says.lower()}?"
            answers = [{"text": chosen.name, "start": at}]
    return {"question": question, "context": " ".join(one.text for one in group), "answers": answers}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a real question-answering data set without network")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1200, help="training rows (default 1200)")
    parser.add_argument("--test-rows", type=int, default=300, help="test rows of other modules (default 300)")
    arguments = parser.parse_args()
    for path in make(arguments.directory, rows=arguments.rows, test_rows=arguments.test_rows):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        none = sum(not row["answers"] for row in rows)
        print(f"{path}: {len(rows)} rows, {none} of them without an answer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
