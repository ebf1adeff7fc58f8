"""`make chaos`: kills runs of a small real job while its storage misbehaves, and writes docs/reliability.md.

Ends with 1 when a run breaks a promise; what is known of it is kept, and the command that repeats it is printed.
"""

import argparse
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from hack.seaweed import serve
from tests.chaos.document import Results, document
from tests.chaos.job import End, Jobs, Step
from tests.chaos.judge import Judged, verdict
from tests.chaos.killer import Killer
from tests.chaos.plan import Plan, every_step, plans

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "reliability.md"


class Chaos:
    """Killers that share one storage server, and the end that every run must come to."""

    def __init__(self, killers: list[Killer], *, seed: int, keep: Path) -> None:
        self._free: SimpleQueue[Killer] = SimpleQueue()
        self._killers, self._seed, self._keep = killers, seed, keep
        self._say = threading.Lock()
        self.until = math.inf
        """On this process's clock; no run is begun after that."""
        for killer in killers:
            self._free.put(killer)
        calm = killers[0].run(Plan(0, (), faults=False))
        assert [attempt.code for attempt in calm.attempts] == [0], calm.log
        self.end: End = calm.job.end()
        self.steps: dict[int, Step] = calm.attempts[0].steps

    def measure(self, *, cold: bool) -> list[Judged]:
        """Runs that nothing kills: how long an attempt takes, faults included."""
        found = self.all([Plan(-number, ()) for number in range(1, 1 + len(self._killers))], "undisturbed")
        for killer in self._killers:
            killer.duration = max(one.run.attempts[0].seconds for one in found)
        if cold:
            found += self.all([Plan(-10, (), cold=True)], "undisturbed, cold")
            for killer in self._killers:
                killer.cold_duration = found[-1].run.attempts[0].seconds
        return found

    def all(self, wanted: list[Plan], what: str) -> list[Judged]:
        """Do all runs, as many at once as there are killers."""
        with ThreadPoolExecutor(len(self._killers)) as pool:
            found = pool.map(lambda plan: self._one(plan, what), wanted)
            return [one for one in found if one is not None]

    def _one(self, plan: Plan, what: str) -> Judged | None:
        if time.monotonic() > self.until:
            return None
        killer = self._free.get()
        try:
            run = killer.run(plan)
            try:
                judged = Judged(run, verdict(run, self.end, self.steps))
            except Exception as error:  # what cannot be judged is no success, and no reason to end the others
                judged = Judged(run, [f"it cannot be judged: {error!r}"])
        finally:
            self._free.put(killer)
        lost = ", ".join(str(attempt.lost) for attempt in run.attempts if attempt.killed)
        with self._say:
            print(
                f"{what} {plan.number}: {'BAD' if judged.wrong else 'ok'}, {len(run.attempts)} attempts, "
                f"killed {'; '.join(run.kills) or 'never'}, steps lost {lost or 0}, {run.seconds:.1f} s",
                flush=True,
            )
        if judged.wrong:
            self._kept(judged, what)
        else:
            run.job.forget()
        return judged

    def _kept(self, judged: Judged, what: str) -> None:
        number = judged.run.plan.number
        self._keep.mkdir(parents=True, exist_ok=True)
        path = self._keep / f"{what.replace(', ', '-')}-{number}.log"
        path.write_text(
            "\n".join([f"seed {self._seed}", *map(str, judged.wrong), str(judged.run.plan), judged.run.log])
        )
        option = "--steps" if what == "step" else "--only"
        with self._say:
            print("\n".join(f"    {wrong}" for wrong in judged.wrong))
            print(f"    log: {path}; again: python -m tests.chaos --seed {self._seed} {option} {number}", flush=True)


@contextmanager
def chaos(scratch: Path, *, seed: int, at_once: int, keep: Path) -> Iterator[Chaos]:
    """Start everything that the runs need, and measure what they are compared with."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    (scratch / "seaweedfs").mkdir()
    killers: list[Killer] = []
    with serve(scratch / "seaweedfs") as server:
        jobs = Jobs(server, scratch)
        try:
            for _ in range(at_once):
                killers.append(Killer(server, jobs, seed=seed))
            yield Chaos(killers, seed=seed, keep=keep)
        finally:
            for killer in killers:
                killer.close()


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    started = time.monotonic()
    cold = options.cold if options.cold is not None else round(options.runs / 40)
    wanted = plans(options.runs, seed=options.seed, cold=cold)
    steps = every_step()
    if options.only or options.steps:
        wanted = [plan for plan in wanted if plan.number in options.only]
        steps = [plan for plan in steps if plan.number in options.steps]
    results = Results(seed=options.seed, asked=len(wanted))
    with (
        tempfile.TemporaryDirectory() as scratch,
        chaos(Path(scratch), seed=options.seed, at_once=options.at_once, keep=options.keep) as running,
    ):
        results.calm = running.measure(cold=any(plan.cold for plan in wanted))
        running.until = started + options.minutes * 60
        results.swept = running.all(steps, "step")
        results.killed = running.all(wanted, "run")
    results.seconds = time.monotonic() - started
    if options.report is not None:
        options.report.write_text(document(results))
    everything = [*results.calm, *results.killed, *results.swept]
    print(f"{len(everything)} runs, {len(results.bad)} bad, {results.seconds:.0f} s, seed {options.seed}")
    return 1 if results.bad else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="runs that are killed (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="decides kills and faults (default: 1)")
    parser.add_argument("--cold", type=int, help="of these, processes of their own (default: one of 40)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that time (default: never)")
    parser.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="do runs of these numbers alone")
    parser.add_argument("--steps", type=int, nargs="+", default=[], metavar="N", help="kill at these steps alone")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "chaos", help="logs of bad runs go there")
    parser.add_argument("--report", type=Path, default=None, help="(default: docs/reliability.md, unless --only)")
    options = parser.parse_args(arguments)
    if options.report is None and not options.only and not options.steps:
        options.report = TARGET
    return options


if __name__ == "__main__":
    sys.exit(main())
