"""What a rank and its supervisor say to each other through files below WORK/state, and by signals. Torch-free."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from finetune_api.contract import Checkpointed, Progress
from finetune_api.status import BestCheckpoint

Stage = Literal["Loading", "Training", "Evaluating", "Publishing"]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Asked to stop; in training, a checkpoint of the last step has been handed over."""


class Signals:
    """The first SIGTERM or SIGINT asks for a stop, a second one ends at once; SIGUSR1 writes all stacks."""

    def __init__(self) -> None:
        self.stop = False

    def install(self) -> None:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """From here on the end is near anyway."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.stop:
            os._exit(128 + number)
        self.stop = True


class Heart:
    """Signs of life: the watchdog reads the time of the file `beat-<rank>`."""

    def __init__(self, state: Path, *, rank: int, signals: Signals) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._path = state / f"beat-{rank}"
        self._signals = signals
        self.beat()

    def beat(self) -> None:
        self._path.touch()

    def beat_or_stop(self, *_: Any) -> None:
        """Where there is nothing to commit first. Raises Stopped when a stop was asked for."""
        self.beat()
        if self._signals.stop:
            raise Stopped


class Reporter:
    """Writes progress.json for the supervisor; does nothing on ranks that do not lead. Safe to use from two threads."""

    def __init__(self, state: Path, *, run_id: str, active: bool) -> None:
        self._path = state / "progress.json"
        self._active = active
        self._lock = threading.Lock()
        now = timestamp()
        self.progress = Progress(run_id=run_id, stage="Loading", step=0, total_steps=0, started_at=now, updated_at=now)
        self.update()

    def update(self, **changed: Any) -> None:
        """Change fields and write the whole by an atomic replacement. A full disk is no reason to end a run."""
        with self._lock:
            self.progress = self.progress.model_copy(update={**changed, "updated_at": timestamp()})
            if self._active:
                temporary = self._path.with_suffix(".tmp")
                with suppress(OSError):
                    temporary.write_text(self.progress.model_dump_json(by_alias=True))
                    os.replace(temporary, self._path)


class Pace:
    """Speed of training since the first step of this attempt, evaluations left out."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._paused = 0.0
        self._steps = 0

    def step(self) -> None:
        self._steps += 1

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def estimate(self, *, rows: int, left: int) -> dict[str, Any]:
        """Fields of Progress; `rows` are those of a step, `left` the steps to come."""
        elapsed = time.monotonic() - self._start - self._paused
        if not self._steps or elapsed <= 0:
            return {}
        end = datetime.now(UTC) + timedelta(seconds=left * elapsed / self._steps)
        return {
            "samples_per_second": round(rows * self._steps / elapsed, 2),
            "estimated_completion_time": end.isoformat(timespec="seconds"),
        }


def checkpointed(body: Mapping[str, Any], *, uri: str, best: BestCheckpoint | None) -> Checkpointed:
    """A checkpoint record's body as /progress shows it."""
    prefix = body["objects"][0]["key"].rpartition("/")[0]
    return Checkpointed(step=body["step"], uri=f"{uri}/{prefix}", committed_at=body["committedAt"], best=best)


def wait_for(path: Path, beat: Callable[[], None]) -> None:
    """Until another rank of this node has made a file."""
    while not path.exists():
        beat()
        time.sleep(0.1)


def timestamp() -> str:
    """Now, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
