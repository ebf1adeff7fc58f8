"""The status of a FineTuneJob on the real node as a whole document, compared with a file in golden/real.

goldens.py says how the files are written, and what is masked everywhere. A real run has more numbers that nobody can
know before. Each has a name here, and what must be equal has the same one. Whether figures are right is not asked here.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.e2e.goldens import GOLDEN, UUID, compared, masked
from tests.e2e.test_operator import Document, condition

REAL = GOLDEN / "real"
PATIENCE = 120.0
"""Seconds: what waits is looked at again now and then, and is in another phase meanwhile, for long on a busy node."""
LEFT_OUT = (
    # There only if the trainer was asked at the right moment: it is asked every few seconds, and ends when it is done.
    "checkpoint.uri",
    "checkpoint.committedAt",
    "run.startedAt",
    "evaluation.warnings",  # most speak of figures, and come and go with them
    # The rows are what Python and its packages say of themselves: another version repeats itself elsewhere.
    "preflight.dropped",
    "preflight.audit",
    "preflight.warnings",
)
UNKNOWN = (
    # The last digits are the processor's, and a metric of few rows jumps with them. The model's card has them, too.
    "evaluation",
    "checkpoint.best.value",
    "progress.loss",
    "model.sizeBytes",
    # By the lengths of the rows, and these are Python's again.
    "preflight.tokens",
    "preflight.truncatedPercent",
    "preflight.predictedMemory",
)
"""Fields, and those below them, that have their own names for values. Words and verdicts of `evaluation` stay."""
STEPS = ("step", "steps", "totalSteps", "resumedFromStep")


@dataclass(frozen=True)
class Namespace:
    """One of the real cluster."""

    world: Any
    name: str

    def get(self, job: str) -> Document:
        return dict(self.world.job(self.name, job))

    def reaches(self, job: str, phase: str, reason: str | None = None, *, seconds: float = PATIENCE) -> Document:
        def there(status: Document) -> bool:
            return status.get("phase") == phase and reason in (None, condition(status, "Succeeded").get("reason"))

        return dict(self.world.wait(self.name, job, there, what=f"{phase} {reason}", seconds=seconds))

    def log(self) -> str:
        words = ("logs", "-n", "finetune-system", "deployment/finetune-operator", "--tail=30")
        return str(self.world.kubectl.run(*words).stdout)


def becomes(
    world: Any,
    namespace: str,
    job: str,
    name: str,
    phase: str,
    reason: str,
    *,
    without: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    own_rows: bool = False,
    seconds: float = PATIENCE,
) -> Document:
    """The FineTuneJob once its status is that of the golden file. Raises AssertionError with the difference.

    without: names of fields that differ from run to run in this test; names: from what is drawn at random to what
    stands for it; own_rows: the test has written the rows, so that all that preflight says of them is known.
    """
    known = {world.endpoint.removeprefix("http://"): "S3", **(names or {})}
    told = partial(shown, names=known, without=without, own_rows=own_rows)
    path, place = REAL / f"{name}.yaml", Namespace(world, namespace)
    return compared(place, job, path, phase, reason, shown=told, seconds=seconds, patience=PATIENCE)


def shown(
    job: Document,
    *,
    names: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    own_rows: bool = False,
) -> str:
    """The status of a whole FineTuneJob as the files have it; the arguments are those of `becomes`."""
    mask = _Mask(job, names or {}, without=without, own_rows=own_rows)
    return masked({**job, "status": mask.plain(job.get("status", {}))})


class _Mask:
    """Of one status. Paths are names of fields joined by dots; elements of a list have that of the list."""

    def __init__(self, job: Document, names: Mapping[str, str], *, without: Collection[str], own_rows: bool) -> None:
        self._without, self._own_rows = without, own_rows
        status = self._status = job.get("status", {})
        self._uid = job["metadata"]["uid"]
        self._names = {job["spec"]["output"]["uri"]: "OUTPUT", **names}
        if "run" in status:
            self._names[status["run"]["id"]] = "RUN"
            self._names[status["run"].get("inputs", "INPUTS")] = "INPUTS"
        self._steps = {0: 0}
        if "resumedFromStep" not in without:
            self._steps |= {r["resumedFromStep"]: "RESUMED" for r in status.get("restarts", ()) if r["resumedFromStep"]}
        total = status.get("progress", {}).get("totalSteps") or status.get("preflight", {}).get("steps")
        self._steps |= {total: "ALL"} if total else {}

    def plain(self, value: Any, path: str = "") -> Any:
        if isinstance(value, dict):
            below = {name: f"{path}.{name}".lstrip(".") for name in value if name not in self._without}
            return {name: self.plain(value[name], at) for name, at in below.items() if not self._left_out(at)}
        if isinstance(value, list):
            return [self.plain(one, path) for one in value]
        if isinstance(value, bool):
            return value
        if path == "preflight.predictedMemory" and self._unknown(path):
            return "predictedMemory"
        return self._text(value) if isinstance(value, str) else self._number(value, path)

    def _exact(self, path: str) -> bool:
        return self._own_rows and path.startswith("preflight.")

    def _left_out(self, path: str) -> bool:
        return path in LEFT_OUT and not self._exact(path)

    def _unknown(self, path: str) -> bool:
        return any(path == one or path.startswith(f"{one}.") for one in UNKNOWN) and not self._exact(path)

    def _number(self, value: float, path: str) -> Any:
        field = path.rpartition(".")[2]
        if self._exact(path):
            return value
        if path == "checkpoint.best.step":  # which evaluation was the best is a matter of figures
            return "BEST"
        if field in STEPS:
            return self._steps.get(int(value), "STEP")
        if path in ("preflight.rows.train", "preflight.rows.validation"):
            return field.upper()
        if path == "evaluation.rows":
            return self._evaluated(int(value))
        if path == "run.attempt":
            return _claim(int(value))
        if path == "progress.percent":
            return value if value == 100 else field
        return field if self._unknown(path) else value

    def _evaluated(self, rows: int) -> Any:
        chosen_by = self._status["preflight"]["rows"]["validation"]
        return "VALIDATION" if (self._status["evaluation"]["on"], rows) == ("validation", chosen_by) else rows

    def _text(self, text: str) -> str:
        for found, name in self._names.items():
            text = text.replace(found, name)
        text = UUID.sub(lambda found: found[0] if found[0] == self._uid else "POD-UID", text)
        text = re.sub(r"\bsha256:[0-9a-f]{64}\b", "sha256:DIGEST", text)
        text = re.sub(r"\brequest [0-9A-Za-z-]+(?=\))", "request REQUEST", text)
        text = re.sub(r"(?<=/probe-)[0-9a-f]{16}\b", "RANDOM", text)
        text = re.sub(r"(?<=/attempts/)\d+", lambda found: str(_claim(int(found[0]))), text)
        text = re.sub(r"(?<=\bstep )\d+(?: of \d+)?", self._step_of, text)
        if "evaluation" in self._status:
            text = re.sub(r"\b([a-z][a-z0-9-]*) -?\d+\.\d{3}\b", r"\1 FIGURE", text)
            text = re.sub(r"\bis [\d.e-]+(?=, wanted)", "is FIGURE", text)
        return text

    def _step_of(self, found: re.Match[str]) -> str:
        return " of ".join(str(self._steps.get(int(number), "STEP")) for number in found[0].split(" of "))


def _claim(number: int) -> Any:
    """An attempt has the number of its claim in the run's log; who resumes a run finds any number of records there."""
    return number if number == 1 else "CLAIM"
