"""The status of a FineTuneJob as a whole document, without what differs from run to run: times, UIDs and names of pods.

UPDATE_GOLDEN=1 writes the files anew, once it has been the same for a while; the diff is then what is reviewed. Tests
that end alike share a file, which the first of them writes.
"""

import difflib
import os
import re
import time
from pathlib import Path
from typing import Any

import yaml
from tests.e2e.test_operator import Document, Place, eventually

GOLDEN = Path(__file__).parent / "golden" / "status"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
PASSING = ("gpuSeconds", "runningSeconds", "tries")
"""Fields whose numbers depend on when somebody looks."""
SETTLED = 3.0
"""Seconds without a change, before a status is recorded."""
_recorded: set[str] = set()


def masked(job: Document) -> str:
    """The status of a whole FineTuneJob."""
    return yaml.safe_dump(_plain(job.get("status", {}), job), sort_keys=False, allow_unicode=True, width=110)


def masked_text(text: str, job: Document) -> str:
    """Names of its children are `one-UID-t1`, those of pods `one-UID-t1-0-POD`."""
    meta = job["metadata"]
    text = re.sub(r"\b[\d.]+ GPU hours are used", "HOURS GPU hours are used", text)
    text = re.sub(r"the attempts ran [\dhms]+", "the attempts ran DURATION", text)
    text = TIME.sub("TIME", text.replace(meta["uid"], "UID")).replace(f"-{meta['uid'][:5]}-", "-UID-")
    text = re.sub(r"(-UID-[pt]\d+(?:-\d+)?)-[a-z0-9]{5}\b", r"\1-POD", text)
    return re.sub(rf"\b{re.escape(meta['namespace'])}\b", "NAMESPACE", text)


def _plain(value: Any, job: Document) -> Any:
    if isinstance(value, dict):
        return {name: name if name in PASSING else _plain(inner, job) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, job) for inner in value]
    return masked_text(value, job) if isinstance(value, str) else value


def becomes(place: Place, job: str, name: str, phase: str, reason: str, *, seconds: float = 40) -> Document:
    """The FineTuneJob once its status is that of the golden file. Raises AssertionError with the difference."""
    path = GOLDEN / f"{name}.yaml"
    place.reaches(job, phase, reason, seconds=seconds)
    if os.environ.get("UPDATE_GOLDEN") and name not in _recorded:
        return _record(place, job, path)
    wanted = path.read_text()
    try:
        return dict(eventually(name, lambda: _fits(place.get(job), wanted), seconds=5))
    except AssertionError:
        found = masked(place.get(job)).splitlines()
        difference = "\n".join(difflib.unified_diff(wanted.splitlines(), found, path.name, job, lineterm=""))
        tail = place.operator.log.read_text()[-3000:]
        raise AssertionError(f"the status of {job} is another than {name}:\n{difference}\n{tail}") from None


def _fits(job: Document, wanted: str) -> Document | None:
    return job if masked(job) == wanted else None


def _record(place: Place, job: str, path: Path) -> Document:
    last, since = place.get(job), time.monotonic()
    while time.monotonic() - since < SETTLED:
        time.sleep(0.1)
        found = place.get(job)
        if found.get("status") != last.get("status"):
            last, since = found, time.monotonic()
    path.write_text(masked(last))
    _recorded.add(path.stem)
    return last


def same(name: str, text: str) -> None:
    """Any other text, compared with a golden file."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
