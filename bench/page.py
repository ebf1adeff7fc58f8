"""docs/benchmarks.md: a head and sections, each written by its own benchmark; those of the others stay as they are."""

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs/benchmarks.md"
MARK = "\n## "


def put(sections: Sequence[str], *, head: str | None = None) -> None:
    """Each section begins with `## ` and takes the place of the one with the same first word, or comes last."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    old_head, *kept = text.split(MARK)
    for section in sections:
        new = section.strip().removeprefix("## ")
        place = next((index for index, old in enumerate(kept) if _word(old) == _word(new)), len(kept))
        kept[place : place + 1] = [new]
    parts = [part.strip() for part in (head or old_head, *kept)]
    PAGE.write_text(f"\n{MARK}".join(parts) + "\n", encoding="utf-8")


def _word(section: str) -> str:
    return section.split(maxsplit=1)[0]
