"""`make test-trainer-all`: every cell of the matrix, written to docs/matrix.md; ends with 1 when one misses its margin.

`python -m tests.matrix [TASK...]` runs some tasks only and writes nothing.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.matrix.cells import Cell, Figures, cells, refusal, run
from tests.matrix.kinds import KINDS, ROWS, make_base
from tests.ports import free_port
from tests.trainer.rank.conftest import Ranks

from finetune_api.tasks import TASKS

TARGET = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
SECONDS = 8.0
"""A cell may take so long on two quiet cores."""


@dataclass(frozen=True)
class Line:
    """What became of a cell."""

    cell: Cell
    refused: str | None = None
    figures: Figures | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.error is not None or (self.figures is not None and self.figures.gain < self.cell.margin)


def main(wanted: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base_of = cache(lambda name: make_base(name, root / "bases" / name))
        lines = []
        for cell in cells():
            if wanted and cell.task not in wanted:
                continue
            lines.append(_line(cell, root / str(cell), base_of, ranks))
            print(_said(lines[-1]), flush=True)
    ranks.close()
    bad = [line for line in lines if line.bad]
    slow = [line for line in lines if line.seconds > SECONDS]
    if not wanted:
        TARGET.write_text(_document(lines, seconds=time.monotonic() - started))
    print(
        f"{len(lines)} cells, {len(bad)} bad, {len(slow)} slower than {SECONDS:.0f} s, "
        f"{time.monotonic() - started:.0f} s in all"
    )
    return 1 if bad else 0


def _line(cell: Cell, root: Path, base_of: Callable[[str], Path], ranks: Ranks) -> Line:
    refused = refusal(cell)
    if refused is not None:
        return Line(cell, refused=refused)
    base = base_of(cell.base)
    started = time.monotonic()
    try:
        figures = run(cell, root, base, ranks=ranks, port=free_port())
    except AssertionError as error:
        return Line(cell, error=str(error))
    return Line(cell, figures=figures, seconds=time.monotonic() - started)


def _said(line: Line) -> str:
    if line.refused is not None:
        return f"{line.cell}: refused: {line.refused}"
    if line.figures is None:
        return f"{line.cell}: FAILED: {line.error}"
    verdict = "BAD" if line.bad else "ok"
    found = f"gain {line.figures.gain:.4g}, wanted {line.cell.margin:g}"
    return f"{line.cell}: {verdict} {found}; {line.figures} in {line.seconds:.1f} s"


def _document(lines: list[Line], *, seconds: float) -> str:
    tables = "\n\n".join(_section(task, [line for line in lines if line.cell.task == task]) for task in KINDS)
    return f"""# Every task with every method

Written by `make test-trainer-all` ({seconds / 60:.0f} minutes for {len(lines)} cells). A cell fine-tunes a tiny
model, pretrained for seconds (tests/matrix/kinds.py), on {ROWS} generated rows, on one process and on two, and is
measured on rows never seen: it says that a task works with a method, not how good a real model becomes. Its figure must
beat the baseline in bold by the margin. What makes no sense is refused by `finetune validate`, and by the API server,
with the reason given.

{tables}
"""


def _section(task: str, lines: list[Line]) -> str:
    kind = KINDS[lines[0].cell.task]
    found = [line for line in lines if line.figures is not None or line.error is not None]
    metrics = kind.metrics or (TASKS[lines[0].cell.task].primary,)
    metric = " or ".join(metrics)
    names = ("trivial", "base", "probe")
    heads = [f"**{name}**" if name == kind.over else name for name in names]
    rows = [
        f"## {task}",
        "",
        f"| method | base model | processes | {' | '.join(heads)} | tuned {metric} | margin |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in found:
        cell, figures = line.cell, line.figures
        if figures is None:
            rows.append(f"| {cell.method} | {cell.base} | {cell.processes} | | | | failed | {cell.margin:g} |")
            continue
        rivals = " | ".join(f"{figures.rivals[name]:.3f}" if name in figures.rivals else "" for name in names)
        tuned = f"{figures.tuned:.3f}" + (f" ({figures.metric})" if len(metrics) > 1 else "")
        rows.append(f"| {cell.method} | {cell.base} | {cell.processes} | {rivals} | {tuned} | {cell.margin:g} |")
    refused = {line.cell.method: line.refused for line in lines if line.refused is not None}
    if refused:
        rows += ["", "Refused:", ""] + [f"- {method}: {reason}" for method, reason in refused.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
