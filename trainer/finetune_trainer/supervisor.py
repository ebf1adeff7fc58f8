"""`finetune train`: process 1 of a train pod. Starts the ranks and answers for them; imports no torch.

A rank can crash, hang in a collective, be killed for memory or be told to stop. None of them can be trusted to notice
that about itself, so this small process does: it forwards signals, ends all ranks when one fails, watches their beats,
serves their progress, turns their ends into one exit code, and leaves one last message.

Ranks talk through files below WORK/state: `progress.json` and `message.json` by rank 0, `beat-<rank>` touched by each.
"""

import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from finetune_api.contract import PROGRESS_PORT, RENDEZVOUS_PORT, ExitCode, LastMessage, Progress, RunConfig
from finetune_trainer import lastmessage, oom, telemetry
from finetune_trainer.config import read_config, storage_settings
from finetune_trainer.data.read import DataError
from finetune_trainer.storage import AlreadyExists, StorageError, open_store

log = logging.getLogger("finetune.supervisor")

_SPECIFIC = range(ExitCode.INVALID, ExitCode.MEMORY + 1)
_TICK = 0.5  # seconds


@dataclass(frozen=True)
class Limits:
    """Patience, in seconds."""

    loading: float = 900.0
    """Without a beat while no training step is going on: imports, downloads, evaluation, publication."""
    stuck: float = 120.0
    """Without a beat in training, at least."""
    stuck_steps: float = 20.0
    """The same in median step times."""
    grace: float = 10.0
    """For the other ranks, when one has failed: they may hang in a collective."""
    finishing: float = 300.0
    """For the other ranks, when one has ended well or on request: they may be writing a checkpoint."""
    forced: float = 3.0
    """Between a second signal and the end."""
    stacks: float = 2.0
    """For writing stacks, before a hung rank is killed."""


@dataclass(frozen=True)
class World:
    """Which ranks run here, and how they find the others."""

    ranks: int
    nodes: int
    node: int
    master: str
    port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """What torch.distributed reads."""
        return {
            "RANK": str(self.node * self.ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.nodes * self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }


def world_of(config: RunConfig, environment: Mapping[str, str]) -> World:
    """One rank a GPU; a single one where there is none."""
    devices = visible_gpus(environment)
    if config.pods.gpus and not devices:
        log.warning("%d GPUs were asked for and none is visible: training on the CPU", config.pods.gpus)
    master = environment.get("FINETUNE_MASTER", "")
    return World(
        ranks=max(1, min(config.pods.gpus, devices)),
        nodes=int(environment.get("FINETUNE_NODES") or 1),
        node=int(environment.get("JOB_COMPLETION_INDEX") or 0),
        master=master or "127.0.0.1",
        port=RENDEZVOUS_PORT if master else _free_port(),
    )


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPU devices of this container, without asking a driver."""
    found = sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    return min(found, sum(bool(part.strip()) and part.strip() != "-1" for part in chosen.split(",")))


def main(
    *,
    config: Path,
    run_id: str,
    credentials: Path | None,
    message: Path | None,
    work: Path,
    inputs: str | None = None,
    cache: Path | None = None,
    halve: bool = False,
    finish: bool = False,
    port: int = PROGRESS_PORT,
) -> int:
    """`finetune train`: returns the exit code, having written the last message. `port` 0 serves nothing."""
    secrets = lastmessage.secrets_of(credentials)
    state = work / "state"
    try:
        resolved = read_config(config)
        world = world_of(resolved, os.environ)
        _clear(state)
    except DataError as error:
        last = lastmessage.failure(error)
    except OSError as error:
        last = LastMessage(
            code=ExitCode.STORAGE,
            reason="ScratchUnusable",
            message=lastmessage.clip(f"The directory {state} cannot be used ({error}); free space or choose another."),
        )
    else:
        command = [sys.executable, "-m", "finetune_trainer.rank", "--config", str(config), "--run-id", run_id]
        if inputs is not None:
            command += ["--inputs", inputs]
        if credentials is not None:
            command += ["--credentials", str(credentials)]
        if cache is not None:
            command += ["--cache", str(cache)]
        if halve:
            command.append("--halve-micro-batch")
        if finish:
            command.append("--finish-now")
        command += ["--work", str(work)]
        if port:
            telemetry.serve(state / "progress.json", port)
        last = supervise(command, world=world, state=state, run_id=run_id)
        if last.code == ExitCode.MEMORY:
            note_memory(resolved, last, credentials=credentials)
    print(lastmessage.scrub(f"{last.reason}: {last.message}", secrets), file=sys.stderr, flush=True)
    lastmessage.write(message, last, secrets)
    return last.code


def supervise(
    command: Sequence[str], *, world: World, state: Path, run_id: str, limits: Limits | None = None
) -> LastMessage:
    """Run `command` once a rank until all have ended, and say how it went."""
    supervisor = _Supervisor(command, world=world, state=state, limits=limits or Limits())
    with _Signals() as signals:
        supervisor.start()
        supervisor.watch(signals)
    return _last_message(supervisor, run_id)


def note_memory(config: RunConfig, last: LastMessage, *, credentials: Path | None) -> None:
    """Leave word that the next attempt should halve the micro-batch: a rank killed for memory could not.

    A rank that noticed by itself has left a note already, which knows better.
    """
    if last.run_id is None or last.attempt is None:
        return
    key = memory_note_key(last.run_id, last.attempt)
    try:
        store = open_store(config.output.uri, storage_settings(config, credentials))
        # The next attempt halves this or what its predecessor recorded, whichever is lower.
        rows = config.training.micro_batch or config.training.batch_size
        store.create(key, json.dumps({"microBatch": rows}).encode())
    except AlreadyExists:
        return
    except StorageError as error:
        log.warning("the next attempt will not know that memory was used up: %s", error)


def memory_note_key(run_id: str, attempt: int) -> str:
    """Where the next attempt looks for such a note."""
    return f"runs/{run_id}/attempts/{attempt}/out-of-memory.json"


@dataclass
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    code: int | None = None
    """As a shell has it: 128 + n when ended by signal n."""
    killed: bool = False
    """Whether this supervisor ended it by force."""
    beat: tuple[int, float] = (0, 0.0)
    """Modification time of its beat file, and when that was first seen on this process's own clock, which stands still
    while a laptop sleeps."""


class _Signals:
    """Notes signals and wakes the loop. Reentrant handlers only count; everything else happens in the loop."""

    WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

    def __init__(self) -> None:
        self.stops = 0

    def __enter__(self) -> "_Signals":
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, self._note) for number in self.WATCHED}
        self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self.stops += 1

    def wait(self, seconds: float) -> None:
        """Return after that time, or at once when a signal comes."""
        import select

        if select.select([self._reader], [], [], seconds)[0]:
            with suppress(BlockingIOError):
                while self._reader.recv(4096):
                    pass


@dataclass
class _Steps:
    """Recent step times, from what rank 0 reports."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    last: tuple[int, float] | None = None

    def see(self, progress: Progress | None, now: float) -> None:
        if progress is None or progress.stage != "Training":
            self.last = None  # evaluation between two steps is no step time
            return
        if self.last is not None and progress.step > self.last[0]:
            self.times.append((now - self.last[1]) / (progress.step - self.last[0]))
        if self.last is None or progress.step != self.last[0]:
            self.last = (progress.step, now)

    def median(self) -> float:
        return statistics.median(self.times) if self.times else 0.0


class _Supervisor:
    """The ranks of this pod from their start to their end."""

    def __init__(self, command: Sequence[str], *, world: World, state: Path, limits: Limits) -> None:
        self.command = list(command)
        self.world = world
        self.state = state
        self.limits = limits
        self.ranks: list[_Rank] = []
        self.ended: list[_Rank] = []
        """In the order in which they ended."""
        self.stops = 0
        self.hung: str | None = None
        self.progress: Progress | None = None
        self.memory_kills = 0
        self._steps = _Steps()
        self._deadline: float | None = None
        self._kills_before = oom.kills()
        self._parent = os.getppid()

    def start(self) -> None:
        for number in range(self.world.ranks):
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1",
                **self.world.environment(number),
            }
            # A session of its own: a terminal's Ctrl-C reaches the ranks through us alone, and a kill reaches workers.
            process = subprocess.Popen(self.command, env=environment, start_new_session=True)  # noqa: S603 - our own
            self.ranks.append(_Rank(number, process, beat=(0, time.monotonic())))
        log.info("started %d of %d ranks", self.world.ranks, self.world.ranks * self.world.nodes)

    def watch(self, signals: _Signals) -> None:
        while True:
            self._reap()
            if not self._living():
                break
            self._forward(signals)
            self._judge()
            signals.wait(_TICK)
        self.progress = telemetry.read_progress(self.state / "progress.json")
        self.memory_kills = oom.kills() - self._kills_before

    def _living(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.code is None]

    def _reap(self) -> None:
        """Collect ended ranks; as process 1 also the orphans of others."""
        while True:
            pid, status = _wait([rank.process.pid for rank in self._living()])
            if pid == 0:
                return
            rank = next((rank for rank in self._living() if rank.process.pid == pid), None)
            if rank is not None:
                code = os.waitstatus_to_exitcode(status)
                rank.code = code if code >= 0 else 128 - code
                rank.process.returncode = rank.code
                self.ended.append(rank)
                self._hurry(rank.code)
                log.info("rank %d ended with code %d", rank.number, rank.code)

    def _hurry(self, code: int) -> None:
        """One rank has ended: the others shall, too."""
        well = code in (ExitCode.DONE, ExitCode.STOPPED)
        until = time.monotonic() + (self.limits.finishing if well else self.limits.grace)
        self._deadline = min(self._deadline or until, until)
        if not well:
            self._signal(signal.SIGTERM)

    def _forward(self, signals: _Signals) -> None:
        stops = signals.stops
        if os.getpid() != 1 and os.getppid() != self._parent:  # a local run that was killed
            self._parent = os.getppid()
            stops = max(stops, self.stops + 1)
            signals.stops = stops
        if stops == self.stops:
            return
        first, self.stops = self.stops == 0, stops
        self._signal(signal.SIGTERM)
        if first and stops == 1:
            log.info("asked to stop: the ranks commit a checkpoint")
        else:
            log.info("asked to stop again: ending at once")
            until = time.monotonic() + self.limits.forced
            self._deadline = min(self._deadline or until, until)

    def _judge(self) -> None:
        """End those that had their time, and all when one is stuck."""
        now = time.monotonic()
        if self._deadline is not None and now > self._deadline:
            self._kill()
            return
        # Once a rank has ended the others have their deadline; they may have waited for it in silence.
        if self.hung is None and not self.ended and (stuck := self._stuck(now)):
            self.hung = stuck
            log.error("%s; the stacks of all threads follow", stuck)
            self._signal(signal.SIGUSR1)
            until = now + self.limits.stacks
            self._deadline = min(self._deadline or until, until)

    def _stuck(self, now: float) -> str | None:
        progress = telemetry.read_progress(self.state / "progress.json")
        self._steps.see(progress, now)
        training = progress is not None and progress.stage == "Training"
        limit = self.limits.loading
        if training and self._steps.times:
            limit = max(self.limits.stuck, self.limits.stuck_steps * self._steps.median())
        silent = {rank.number: now - self._beat(rank, now) for rank in self._living()}
        # While not training, ranks may wait for one that works: all must be silent.
        number = max(silent, key=silent.__getitem__) if training else min(silent, key=silent.__getitem__)
        if silent[number] <= limit:
            return None
        median = f" (a step takes {self._steps.median():.1f} s)" if self._steps.times else ""
        return f"Rank {self._global(number)} has shown no sign of life for {silent[number]:.0f} s{median}"

    def _beat(self, rank: _Rank, now: float) -> float:
        """When the rank last gave a sign of life."""
        with suppress(OSError):
            at = (self.state / f"beat-{self._global(rank.number)}").stat().st_mtime_ns
            if at != rank.beat[0]:
                rank.beat = (at, now)
        return rank.beat[1]

    def _global(self, number: int) -> int:
        return self.world.node * self.world.ranks + number

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._living():
            with suppress(ProcessLookupError):
                os.kill(rank.process.pid, number)

    def _kill(self) -> None:
        for rank in self._living():
            rank.killed = True
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)


def _wait(pids: Sequence[int]) -> tuple[int, int]:
    """An ended child and its status, or (0, 0)."""
    if os.getpid() == 1:
        try:
            return os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0, 0
    for pid in pids:
        with suppress(ChildProcessError):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return found, status
    return 0, 0


# --- what it all amounts to ---


def _last_message(done: _Supervisor, run_id: str) -> LastMessage:
    rank, code = _verdict(done)
    written = _written(done.state / "message.json")
    progress = done.progress
    reached = progress.step if progress and progress.total_steps else None
    if written is not None and written.code == code:
        return written.model_copy(update={"reached_step": reached})
    checkpoint = progress.checkpoint if progress else None
    reason, sentence = _sentence(done, rank, code)
    return LastMessage(
        code=code,
        reason=reason,
        message=lastmessage.clip(sentence),
        run_id=run_id,
        attempt=progress.attempt if progress else None,
        step=checkpoint.step if checkpoint else None,
        reached_step=reached,
        resumed_from_step=progress.resumed_from_step if progress else None,
    )


def _verdict(done: _Supervisor) -> tuple[_Rank, int]:
    """The rank that tells most, and the exit code: the first specific one, before crashes, before 0."""
    if done.hung is not None:
        return done.ended[0], ExitCode.HUNG
    codes = [(rank, _meant(done, rank)) for rank in done.ended]
    asked = [(rank, code) for rank, code in codes if code == ExitCode.STOPPED]
    specific = [(rank, code) for rank, code in codes if code in _SPECIFIC and code != ExitCode.STOPPED]
    crashed = [(rank, code) for rank, code in codes if code and code not in _SPECIFIC]
    # A rank that we ended, or told to stop because another had failed, says nothing about the cause.
    own = [(rank, code) for rank, code in crashed if not rank.killed]
    ordered = specific + ([] if done.stops else own) + asked + own + crashed + codes
    return ordered[0]


def _meant(done: _Supervisor, rank: _Rank) -> int:
    code = rank.code or 0
    if code == 128 + signal.SIGKILL and not rank.killed and done.memory_kills > 0:
        return ExitCode.MEMORY
    if code == 128 + signal.SIGTERM and done.stops == 1:
        return ExitCode.STOPPED  # it was not yet ready to catch the signal, so nothing had begun
    return code


def _sentence(done: _Supervisor, rank: _Rank, code: int) -> tuple[str, str]:
    """Reason and message where the ranks left none."""
    name = f"Rank {rank.number + done.world.node * done.world.ranks}"
    if done.hung is not None:
        return "Hung", f"{done.hung}; its log has the stacks of its threads."
    if code == ExitCode.MEMORY:
        return (
            "HostOutOfMemory",
            f"{name} was killed by the kernel because memory was used up; where half the micro-batch is still too "
            f"much, {oom.ADVICE}.",
        )
    if code == ExitCode.STOPPED:
        early = rank.code == 128 + signal.SIGTERM
        return "Stopped", f"Stopped on request{' before training had begun; nothing is lost' if early else ''}."
    if code == ExitCode.DONE:
        return "Completed", "All ranks ended well."
    if code in _SPECIFIC:
        return "RankFailed", f"{name} ended with code {code} and left no message; its log has the details."
    if code > 128 and done.stops > 1:
        return "Interrupted", "Ended at once by a second signal; what was not committed is lost."
    if code > 128:
        by = "; if nobody did that by hand, memory may have been used up" if code == 128 + signal.SIGKILL else ""
        with suppress(ValueError):
            return "Killed", f"{name} was ended by {signal.Signals(code - 128).name}{by}; its log has the details."
    return "Crashed", f"{name} ended with code {code}, an error of its own; its log has the details."


def _written(path: Path) -> LastMessage | None:
    try:
        return LastMessage.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _clear(state: Path) -> None:
    """A new attempt begins: what an earlier one left in a kept work directory does not speak for this one."""
    state.mkdir(parents=True, exist_ok=True)
    for path in (state / "progress.json", state / "message.json", *state.glob("beat-*")):
        path.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
