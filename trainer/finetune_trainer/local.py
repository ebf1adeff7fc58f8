"""`finetune run`: the very same document without a cluster.

Does what the operator does for one job, and with the same parts: resolve, then `finetune preflight`, then `finetune
train` as child processes with the command lines that pods have. Progress goes to standard error, the status document to
standard output. Exit code 0 means that the model is published.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml
from pydantic import ValidationError

from finetune_api.contract import ExitCode, LastMessage, Progress, RunConfig
from finetune_api.job import FineTuneJob
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, ResolveError, resolve
from finetune_api.status import Condition, FineTuneJobStatus, Phase, PreflightStatus, RunStatus, Usage
from finetune_api.validate import load_job, load_profile
from finetune_trainer import lastmessage, oom
from finetune_trainer.telemetry import read_progress

_POLL = 0.3  # seconds
_LINE_EVERY = 5.0
"""Seconds between two progress lines where the terminal cannot redraw one."""
_LONGEST_WAIT = 60.0
_FINAL = (ExitCode.INVALID, ExitCode.FENCED, ExitCode.STOPPED, ExitCode.DIVERGED, ExitCode.GATE)
"""Ends after which another attempt would come to the same end."""
_INTERRUPTED = 130
_MOST_INTERRUPTIONS = 10
"""In a row without one more committed step, as in a cluster."""
_STARVED = {"preflight": "split the files of rows into smaller ones, or close other programs", "train": oom.ADVICE}
"""What helps a command that was killed for memory."""


class InvalidDocumentError(Exception):
    """The document cannot be run; the message says all of it."""


def main(file: Path, *, profile: Path | None, work: Path | None, credentials: Path | None) -> int:
    """Run one document and return the exit code."""
    try:
        config = load(file, profile)
    except InvalidDocumentError as error:
        print(error, file=sys.stderr)
        return ExitCode.INVALID
    directory = work or _default_work(config.job_uid)
    try:
        with _alone(directory):
            return _Run(config, directory.resolve(), credentials.resolve() if credentials else None).main()
    except InvalidDocumentError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"The work directory {directory} cannot be used ({error}): choose another with --work.", file=sys.stderr)
        return ExitCode.STORAGE


# --- the document ---


def load(file: Path, profile: Path | None) -> RunConfig:
    """Parse, validate and resolve. Raises InvalidDocumentError with every problem, a line each."""
    job, problems = load_job(_bytes(file), name=str(file))
    spec = FineTuneProfileSpec()
    if profile is not None:
        found, more = load_profile(_bytes(profile), name=str(profile))
        problems = [*problems, *more]
        spec = found.spec if found is not None else spec
    if problems or job is None:
        raise InvalidDocumentError("\n".join(str(problem) for problem in problems))
    if job.spec.storage is not None and job.spec.storage.endpoint is not None:
        # Whoever runs this here may reach that endpoint anyway: the fence is for those who share a cluster.
        spec = spec.model_copy(update={"allowed_endpoints": [job.spec.storage.endpoint]})
    try:
        config = resolve(
            job.spec,
            spec,
            job=f"{job.metadata.get('namespace', 'local')}/{job.metadata.get('name', file.stem)}",
            job_uid=_uid(file, job),
            generation=1,
            defaults=Defaults(trainer_image="local", preflight_image="local", in_cluster=False),
        )
    except ResolveError as error:
        raise InvalidDocumentError(f"{file}: {error.message}") from error
    if relative := _relative(config):
        raise InvalidDocumentError(f"{file}: {relative}")
    # There are no ConfigMaps here: what the SDK knows of authorities holds.
    return config.model_copy(update={"storage": config.storage.model_copy(update={"ca_config_map": None})})


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidDocumentError(f"{file}: cannot be read: {error.strerror}: give the path of a YAML file") from error


def _uid(file: Path, job: FineTuneJob) -> str:
    """Names the document, whatever it says: changed and run again, it is still the same job."""
    return hashlib.sha256(f"{file.resolve()}\n{job.metadata.get('name')}".encode()).hexdigest()[:32]


def _relative(config: RunConfig) -> str | None:
    """What is wrong with a file:// URI that is not absolute."""
    for path, uri in config.addresses.items():
        if uri.startswith("file://") and not uri.startswith(("file:///", "file://localhost/")):
            meant = (Path.cwd() / uri.removeprefix("file://")).as_uri()
            return f"{path}: {uri} is relative; only absolute paths say where a file is: write {meant}"
    return None


def _default_work(uid: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "finetune-operator" / "work" / uid[:16]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the work directory. Raises InvalidDocumentError when another process does."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise InvalidDocumentError(
                f"Process {holder} runs this document already in {directory}: wait for it, stop it, or choose --work."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


# --- the run ---


@dataclass
class _Run:
    """One document on its way, and the status it has reached."""

    config: RunConfig
    work: Path
    credentials: Path | None
    status: dict[str, Any] = field(default_factory=dict)
    """Fields of FineTuneJobStatus."""
    stops: int = 0
    attempts: int = 0
    child: "subprocess.Popen[bytes] | None" = None
    line: "_Line" = field(default_factory=lambda: _Line(sys.stderr))

    @property
    def scratch(self) -> Path:
        """What pods have as /work. Named so that nothing of the user's lies there, whatever --work says."""
        return self.work / f"scratch-{self.config.job_uid[:8]}"

    def main(self) -> int:
        secrets = lastmessage.secrets_of(self.credentials)
        (self.work / "logs").mkdir(exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        (self.work / "config.json").write_text(self.config.model_dump_json(by_alias=True, indent=1))
        with self._signals():
            last = self._preflight()
            if last.code == ExitCode.DONE and (last.result is None or last.result.partial):
                last = self._train(last)
        self.line.end()
        return self._finish(last, secrets)

    def _preflight(self) -> LastMessage:
        self.line.show("Preflight  reading model and data")
        last = self._call("preflight", "preflight.log", [])
        inputs = last.preflight.inputs if last.preflight is not None else None
        self.status["run"] = RunStatus(id=last.run_id, generation=1, inputs=inputs) if last.run_id else None
        if last.preflight is not None:
            self.status["preflight"] = last.preflight.summary
            self._tell(last)
        return last

    def _tell(self, last: LastMessage) -> None:
        """What preflight has found, for people."""
        assert last.preflight is not None
        summary = last.preflight.summary
        if summary.rows is not None:
            self.line.print(f"Preflight  run {last.run_id}: {describe_rows(summary)}")
        for warning in summary.warnings or []:
            self.line.print(f"           {warning}")
        if last.preflight.state == "Resume":
            self.line.print(f"           going on from step {last.preflight.step}")

    def _train(self, checked: LastMessage) -> LastMessage:
        """Attempts until one ends for good; each goes on from the last checkpoint."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        found = checked.preflight  # what it says in few words may have no room for it
        inputs = ["--inputs", found.inputs] if found is not None and found.inputs is not None else []
        tries = _Tries(self.config, committed=(found.step if found is not None else None) or 0)
        while True:
            self.attempts += 1
            self.line.show("Starting   loading the model")
            arguments = ["--run-id", str(checked.run_id), *inputs, "--port", "0", *tries.arguments]
            last = self._call("train", f"train-{self.attempts}.log", arguments)
            progress = read_progress(self.scratch / "state/progress.json")
            self._note_progress(progress, last, started)
            if last.code == ExitCode.DONE or last.code in _FINAL or self.stops:
                return last
            delay = tries.after(last, progress)
            if delay is None:
                return tries.given_up(last)
            what = "ran out of memory, which is not counted" if last.code == ExitCode.MEMORY else "failed"
            self.line.print(f"Attempt {self.attempts} {what} ({last.reason}): {last.message}")
            if not self._wait(delay):
                return last

    def _wait(self, seconds: float) -> bool:
        """Back off before the next attempt; False when a stop was asked for meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stops:
            time.sleep(0.1)
        return not self.stops

    def _call(self, command: str, log: str, arguments: Sequence[str]) -> LastMessage:
        """Run `finetune <command>` as a pod would, following its progress, and return its last message."""
        message = self.work / "message"
        message.unlink(missing_ok=True)
        (self.scratch / "state/progress.json").unlink(missing_ok=True)
        line = [sys.executable, "-m", "finetune_trainer", command, "--config", str(self.work / "config.json")]
        line += ["--message", str(message), "--work", str(self.scratch), *arguments]
        if self.credentials is not None:
            line += ["--credentials", str(self.credentials)]
        kills = oom.kills()
        with open(self.work / "logs" / log, "wb") as sink:
            # A session of its own: the terminal's Ctrl-C reaches it through us alone, once.
            self.child = subprocess.Popen(  # noqa: S603 - our own command line
                line, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
            while self.child.poll() is None:
                self.line.progress(read_progress(self.scratch / "state/progress.json"), stopping=self.stops > 0)
                time.sleep(_POLL)
        code, self.child = self.child.returncode, None
        starved = _STARVED[command] if oom.kills() > kills else None
        return _read_message(message, code, self.work / "logs" / log, stopped=self.stops, starved=starved)

    def _note_progress(self, progress: Progress | None, last: LastMessage, started: str) -> None:
        assert self.status.get("run") is not None
        run: RunStatus = self.status["run"]
        self.status["run"] = run.model_copy(update={"attempt": last.attempt, "started_at": started})
        if progress is None:
            return
        self.status["progress"] = progress.status().model_copy(update={"estimated_completion_time": None})
        if progress.checkpoint is not None:
            self.status["checkpoint"] = progress.checkpoint_status()

    def _finish(self, last: LastMessage, secrets: set[str]) -> int:
        """Complete the status, print it, and return the exit code."""
        phase: Phase = "Succeeded" if last.code == ExitCode.DONE else "Failed"
        message = last.message
        if last.code == ExitCode.STOPPED:
            phase = "Suspended"
            where = f"after a committed checkpoint at step {last.step}" if last.step is not None else "before training"
            message = f"stopped {where}; run the same command to go on"
        if last.result is not None:
            self.status["evaluation"] = last.result.evaluation
            self.status["model"] = last.result.model
        if self.attempts:
            self.status["usage"] = Usage(attempts=self.attempts)
        condition = Condition(
            type="Succeeded",
            status="True" if phase == "Succeeded" else "False",
            reason=last.reason,
            message=lastmessage.scrub(message, secrets),
            last_transition_time=datetime.now(UTC).isoformat(timespec="seconds"),
            observed_generation=1,
        )
        status = FineTuneJobStatus(
            observed_generation=1,
            phase=phase,
            message=lastmessage.scrub(message, secrets),
            conditions=[condition],
            **self.status,
        )
        self.line.print(f"{phase}: {status.message}")
        if phase == "Succeeded":
            self._tidy()
        if phase == "Failed" and last.code not in _FINAL:
            self.line.print(f"The logs are in {self.work / 'logs'}.")
        print(yaml.safe_dump(status.document(), sort_keys=False, allow_unicode=True, width=120), end="", flush=True)
        return last.code

    def _tidy(self) -> None:
        """Downloads are of no more use once the result is published; logs stay."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in watched}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _: FrameType | None) -> None:
        self.stops += 1
        if self.child is not None:
            with suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGTERM)


@dataclass
class _Tries:
    """Whether there is another attempt, and when: by the rules of a cluster.

    Crashes are counted. Memory is not, as the next attempt halves the micro-batch; but in a row and without one more
    committed step only as often as there is something to halve, and once more.
    """

    config: RunConfig
    committed: int
    """The last committed step."""
    failures: int = 0
    interruptions: int = 0
    arguments: tuple[str, ...] = ()
    """Of the next `finetune train`."""

    def after(self, last: LastMessage, progress: Progress | None) -> float | None:
        """Seconds from the end of an attempt to the next one; None: there is none."""
        checkpoint = progress.checkpoint if progress is not None else None
        committed = max(last.step or 0, checkpoint.step if checkpoint is not None else 0)
        won, self.committed = committed > self.committed, max(committed, self.committed)
        self.interruptions = 0 if won else self.interruptions
        if last.code != ExitCode.MEMORY:
            self.failures, self.arguments = self.failures + 1, ()
            return _back_off(self.failures) if self.failures <= self.config.max_retries else None
        # One that could leave word in storage did: then this says nothing more.
        self.interruptions, self.arguments = self.interruptions + 1, ("--halve-micro-batch",)
        if self.interruptions > min(self._halvings, _MOST_INTERRUPTIONS - 1):
            return None
        return _back_off(self.interruptions - 1) if self.interruptions > 1 else 0.0

    @property
    def _halvings(self) -> int:
        """How often micro-batches can be halved, at most."""
        training = self.config.training
        return (training.micro_batch or training.batch_size).bit_length()

    def given_up(self, last: LastMessage) -> LastMessage:
        """What to say at the end."""
        if last.code != ExitCode.MEMORY:
            return last
        often = f"{self.interruptions} attempts in a row ran out of memory without one more committed step, the last:"
        return last.model_copy(update={"message": lastmessage.clip(f"{often} {last.message}")})


def _back_off(times: int) -> float:
    return float(min(_LONGEST_WAIT, 2.0 ** (times - 1)))


def _read_message(path: Path, code: int, log: Path, *, stopped: int, starved: str | None = None) -> LastMessage:
    """A child's last message; its own words where it left none.

    `starved` says what to do, where the kernel has killed a process for memory meanwhile.
    """
    with suppress(OSError, ValidationError):
        last = LastMessage.model_validate_json(path.read_bytes())
        if last.code == code:
            return last
    if stopped:
        code = _INTERRUPTED if stopped > 1 else ExitCode.STOPPED
        return LastMessage(code=code, reason="Interrupted", message="Interrupted; what was not committed is lost.")
    if code == -signal.SIGKILL and starved is not None:
        message = f"The process was killed by the kernel because memory was used up: {starved}."
        return LastMessage(code=ExitCode.MEMORY, reason="HostOutOfMemory", message=lastmessage.clip(message))
    code = code if code > 0 else 128 - code
    return LastMessage(
        code=code, reason="Crashed", message=lastmessage.clip(f"Ended with code {code}; {log} has the details.")
    )


# --- the terminal ---


class _Line:
    """One line that says where the run is: redrawn in place on a terminal, else written now and then."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = ""
        self._at = 0.0

    def progress(self, progress: Progress | None, *, stopping: bool) -> None:
        if progress is not None:
            self.show(describe(progress, width=self._width() if self._live else 0, stopping=stopping))
        elif stopping:
            self.show("Stopping")

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._live:
            self._stream.write(f"\r\x1b[K{text[: self._width() - 1]}")
            self._stream.flush()
        elif text != self._shown and (
            text.split(" ", 1)[0] != self._shown.split(" ", 1)[0] or time.monotonic() - self._at >= _LINE_EVERY
        ):
            print(text, file=self._stream, flush=True)
            self._shown, self._at = text, time.monotonic()

    def print(self, text: str) -> None:
        """A line that stays."""
        self.end()
        print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Clear the live line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _width(self) -> int:
        return shutil.get_terminal_size((100, 24)).columns


def describe_rows(summary: PreflightStatus) -> str:
    """`1354 training rows, 146 validation, 500 test, 7 labels, 86 steps, about 1.2Gi of memory`, as far as known."""
    rows = summary.rows
    assert rows is not None
    parts = [f"{rows.train} training rows", f"{rows.validation} validation"]
    parts += [f"{rows.test} test"] if rows.test is not None else []
    parts += [f"{summary.labels} labels"] if summary.labels is not None else []
    parts += [f"{summary.steps} steps"] if summary.steps is not None else []
    parts += [f"about {summary.predicted_memory} of memory"] if summary.predicted_memory is not None else []
    return ", ".join(parts)


def describe(progress: Progress, *, width: int, stopping: bool = False) -> str:
    """`Training   ████░░░░  step 40 of 120  loss 0.310  212 rows/s  about 2 min left`; a bar where `width` has room."""
    stage = "Stopping" if stopping else progress.stage
    if progress.stage != "Training" or not progress.total_steps:
        return f"{stage:<10} step {progress.step} of {progress.total_steps}" if progress.total_steps else f"{stage:<10}"
    parts = [f"step {progress.step} of {progress.total_steps}", f"{progress.percent} %"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.samples_per_second is not None:
        parts.append(f"{progress.samples_per_second:.0f} rows/s")
    left = _left(progress.estimated_completion_time)
    if left is not None and not stopping:
        parts.append(f"about {left} left")
    text = "  ".join(parts)
    room = min(30, width - len(text) - 14)
    bar = ""
    if room >= 8:
        done = room * progress.step // progress.total_steps
        bar = "█" * done + "░" * (room - done) + "  "
    return f"{stage:<10} {bar}{text}"


def _left(time_of_end: str | None) -> str | None:
    if time_of_end is None:
        return None
    with suppress(ValueError):
        seconds = max(0.0, (datetime.fromisoformat(time_of_end) - datetime.now(UTC)).total_seconds())
        if seconds < 90:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return None
