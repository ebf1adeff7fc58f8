"""The status of a FineTuneJob as a whole document, without what differs from run to run: times, UIDs and names of pods.

UPDATE_GOLDEN=1 writes the files anew, once it has been the same for a while; the diff is then what is reviewed. Tests
that end alike share a file, which the first of them writes. What real.py adds is for the real node.
"""

import difflib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import yaml

Document = dict[str, Any]
GOLDEN = Path(__file__).parent / "golden"
STATUS = GOLDEN / "status"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
PASSING = ("gpuSeconds", "runningSeconds", "tries")
"""Fields whose numbers depend on when somebody looks."""
SETTLED = 3.0
"""Seconds without a change, before a status is recorded."""
_recorded: set[Path] = set()


class Jobs(Protocol):
    """The FineTuneJobs of one namespace."""

    def get(self, job: str) -> Document: ...

    def reaches(self, job: str, phase: str, reason: str | None = None, *, seconds: float = 40) -> Document:
        """Waits for phase and reason. Raises AssertionError."""

    def log(self) -> str:
        """The operator's last words."""


def masked(job: Document) -> str:
    """The status of a whole FineTuneJob."""
    return yaml.safe_dump(_plain(job.get("status", {}), job), sort_keys=False, allow_unicode=True, width=110)


def masked_text(text: str, job: Document) -> str:
    """Names of its children are `one-UID-t1`, those of pods `one-UID-t1-0-POD`."""
    meta = job["metadata"]
    text = re.sub(r"\b[\d.]+ GPU hours are used", "HOURS GPU hours are used", text)
    text = re.sub(r"the attempts ran [\dhms]+", "the attempts ran DURATION", text)
    text = TIME.sub("TIME", text.replace(meta["uid"], "UID")).replace(f"-{meta['uid'][:5]}-", "-UID-")
    text = UUID.sub("ANOTHER-UID", text)  # of what Kueue names, say
    text = re.sub(r"-[0-9a-f]{5}(-[pt]\d+-\d+)-[a-z0-9]{5}\b", r"-ANOTHER\1-POD", text)  # of one that is deleted
    text = re.sub(r"(-UID-[pt]\d+(?:-\d+)?)-[a-z0-9]{5}\b", r"\1-POD", text)
    return re.sub(rf"\b{re.escape(meta['namespace'])}\b", "NAMESPACE", text)


def _plain(value: Any, job: Document) -> Any:
    if isinstance(value, dict):
        return {name: name if name in PASSING else _plain(inner, job) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, job) for inner in value]
    return masked_text(value, job) if isinstance(value, str) else value


def becomes(place: Jobs, job: str, name: str, phase: str, reason: str, *, seconds: float = 40) -> Document:
    """The FineTuneJob once its status is that of the golden file. Raises AssertionError with the difference."""
    return compared(place, job, STATUS / f"{name}.yaml", phase, reason, shown=masked, seconds=seconds)


def compared(
    place: Jobs,
    job: str,
    path: Path,
    phase: str,
    reason: str,
    *,
    shown: Callable[[Document], str],
    seconds: float,
    patience: float = 5,
) -> Document:
    """The FineTuneJob once it is `shown` as the file has it, `patience` seconds after phase and reason at most.

    Raises AssertionError with the difference.
    """
    place.reaches(job, phase, reason, seconds=seconds)
    if os.environ.get("UPDATE_GOLDEN") and path not in _recorded:
        return _record(place, job, path, phase, reason, shown=shown)
    wanted, until = path.read_text(), time.monotonic() + patience
    while True:
        found = place.get(job)
        if shown(found) == wanted:
            return found
        if time.monotonic() > until:
            lines = difflib.unified_diff(wanted.splitlines(), shown(found).splitlines(), path.name, job, lineterm="")
            difference = "\n".join(lines)
            raise AssertionError(f"the status of {job} is another than {path.stem}:\n{difference}\n{place.log()}")
        time.sleep(0.1)


def _record(
    place: Jobs, job: str, path: Path, phase: str, reason: str, *, shown: Callable[[Document], str]
) -> Document:
    """Of what changes between two phases the one that is asked for is recorded."""
    while True:
        place.reaches(job, phase, reason)
        last, since = place.get(job), time.monotonic()
        while shown(place.get(job)) == shown(last):
            if time.monotonic() - since > SETTLED:
                path.write_text(shown(last))
                _recorded.add(path)
                return last
            time.sleep(0.1)


def same(name: str, text: str) -> None:
    """Any other text, compared with a golden file."""
    path = STATUS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
