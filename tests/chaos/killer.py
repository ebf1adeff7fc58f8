"""Kills attempts as planned and starts the next one, as the operator would, until one ends with 0."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hack.seaweed import S3Server
from tests.chaos.job import Job, Jobs, Step, steps_in
from tests.chaos.plan import AtCall, AtTime, Kill, Plan
from tests.chaos.proxy import Running
from tests.trainer.rank.conftest import Ranks

from finetune_api.contract import ExitCode

MOST_ATTEMPTS = 12
AGAIN = {ExitCode.STORAGE}
"""Codes at which the operator starts another attempt, beside a kill: storage gave no usable answer for too long."""
PATIENCE = 300.0
"""Seconds that an attempt may take."""


@dataclass(frozen=True)
class Attempt:
    """One process's life. `killed` names the place, None where it ended by itself; `before` and `after` are the steps
    of the newest committed checkpoint. `steps` and `saved` are known of forked attempts alone."""

    code: int
    killed: str | None
    before: int
    after: int
    steps: dict[int, Step]
    saved: list[int]
    log: str
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that were done and must be done again."""
        return max(0, max(self.steps, default=0) - self.after)


@dataclass
class Run:
    """What became of a planned run."""

    plan: Plan
    job: Job
    attempts: list[Attempt] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def kills(self) -> list[str]:
        return [attempt.killed for attempt in self.attempts if attempt.killed is not None]

    @property
    def log(self) -> str:
        heads = (f"--- attempt {n}: code {a.code}, killed {a.killed}" for n, a in enumerate(self.attempts, 1))
        return "\n".join(f"{head}\n{a.log}" for head, a in zip(heads, self.attempts, strict=True))


class Killer:
    """One fork server and one proxy: runs one run at a time."""

    def __init__(self, server: S3Server, jobs: Jobs, *, seed: int) -> None:
        self._jobs, self._seed = jobs, seed
        self._ranks, self._proxy = Ranks(), Running(server.endpoint)
        self.duration, self.cold_duration = 1.0, 10.0
        """Seconds that an undisturbed attempt takes, as a fork and as a process of its own."""

    def close(self) -> None:
        self._proxy.close()
        self._ranks.close()

    def run(self, plan: Plan) -> Run:
        """A run that ends before anything has killed it shows nothing: it is done anew with sooner kills."""
        faults: Counter[str] = Counter()
        for tries_left in reversed(range(5)):
            run = self._once(plan)
            faults += run.faults
            run.faults = faults
            if run.kills or not plan.kills or run.attempts[-1].code != 0 or not tries_left:
                break
            run.job.forget()
            plan = plan.sooner()
        return run

    def _once(self, plan: Plan) -> Run:
        job = self._jobs.make(self._ranks, self._proxy.endpoint if plan.faults else None)
        run = Run(plan, job)
        kills = list(plan.kills)
        started = time.monotonic()
        self._proxy.begin(f"{self._seed}/{plan.number}", **({} if plan.faults else {"rates": {}}))
        while len(run.attempts) < MOST_ATTEMPTS:
            kill = kills[0] if kills else None
            run.attempts.append(self._attempt(job, len(run.attempts), kill, cold=plan.cold))
            code = run.attempts[-1].code
            if code not in AGAIN:  # the one that gave up on storage before it could be killed does not count
                kills = kills[1:]
            if code != -signal.SIGKILL and code not in AGAIN:
                break
        run.faults = self._proxy.end()
        run.seconds = time.monotonic() - started
        return run

    def _attempt(self, job: Job, number: int, kill: Kill | None, *, cold: bool) -> Attempt:
        before, started = job.committed(), time.monotonic()
        work, trace = job.root / f"work-{number}", job.root / f"trace-{number}"
        work.mkdir()
        log = job.root / f"{work.name}-0.log"
        if cold:
            code, place = self._cold(job, work, log, kill)
        else:
            code, place = self._forked(job, work, trace, kill)
        seconds = time.monotonic() - started
        steps, saved = steps_in(trace)
        shutil.rmtree(work)
        return Attempt(
            code=code,
            killed=place if code == -signal.SIGKILL else None,
            before=before,
            after=job.committed(),
            steps=steps,
            saved=saved,
            log=log.read_text() if log.exists() else "",  # killed before it had written a word
            seconds=seconds,
        )

    def _forked(self, job: Job, work: Path, trace: Path, kill: Kill | None) -> tuple[int, str]:
        stop = None
        if isinstance(kill, AtCall):
            place = kill.place
            stop = (place.module, place.owner, place.method, kill.call, signal.SIGKILL.value)
        # each chunk of an evaluation is committed, as those of a large model are
        environment = {"MEASURED_EVERY": "0"}
        started = self._ranks.start(job.made, work, stop=stop, trace=trace, environment=environment)
        # Of a process that nobody has waited for yet: the number cannot be another's.
        descriptor = os.pidfd_open(started.pid)
        try:
            limit = kill.share * self.duration if isinstance(kill, AtTime) else PATIENCE
            killed = not select.select([descriptor], [], [], limit)[0]
            if killed:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            code = started.wait()
        finally:
            os.close(descriptor)
        if killed and not isinstance(kill, AtTime):
            return code, f"never: it hung for {PATIENCE:.0f} s"
        return code, kill.place.name if isinstance(kill, AtCall) else f"at a random instant, {_stage(work)}"

    def _cold(self, job: Job, work: Path, log: Path, kill: Kill | None) -> tuple[int, str]:
        """`finetune train`, a supervisor and its rank, both killed as a pod's processes are."""
        command = [sys.executable, "-m", "finetune_trainer", "train", "--config", str(job.made.config_path)]
        command += ["--run-id", job.made.record.run_id, "--work", str(work), "--port", "0"]
        command += ["--inputs", str(job.made.inputs)]
        command += ["--credentials", str(job.made.settings.credentials_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        limit = kill.share * self.cold_duration if isinstance(kill, AtTime) else PATIENCE
        try:
            return process.wait(limit), ""
        except subprocess.TimeoutExpired:
            _end(process)
        stage = _stage(work) if isinstance(kill, AtTime) else f"never: it hung for {PATIENCE:.0f} s"
        return process.wait(), f"at a random instant of a process of its own, {stage}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a supervisor and its ranks. It is stopped first, so that it cannot give a rank's number away."""
    os.kill(process.pid, signal.SIGSTOP)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)


def _stage(work: Path) -> str:
    """What an attempt was at, by its own report."""
    try:
        progress = json.loads((work / "state" / "progress.json").read_bytes())
    except FileNotFoundError:
        return "before its first sign of life"
    return str(progress["stage"]).lower()
