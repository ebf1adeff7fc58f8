"""`make bench-operator` writes its section of docs/benchmarks.md; `python -m bench.operator 50` is for trying."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from bench import page
from bench.operator import burst, ours, peer, report, steady
from bench.operator.burst import Burst
from bench.operator.contestants import OURS, PEER, PLAIN
from bench.operator.plane import Plane, plane, trainers
from bench.operator.stages import TRAIN_SECONDS

FULL = 1000
LONG = 6 * 3600.0
"""Seconds that the trainings of the running jobs seem to take."""
WARM_UP = 10


def main() -> int:
    """What is measured is written at once, so that what fails later takes nothing away."""
    options = _parser().parse_args()
    section = ""
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        sizes = (options.finished or 5 * options.jobs, options.running or options.jobs // 2)
        for section in _measure(Path(scratch), options.jobs, set(options.parts.split(",")), sizes):
            if options.jobs == FULL or options.write:
                page.put([section])
    print(section)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    parser.add_argument("jobs", nargs="?", type=int, default=FULL, help=f"jobs at once, default {FULL}")
    parser.add_argument(
        "--parts", default="steady,peer", help="what to measure beside floor and ours; default: steady,peer"
    )
    parser.add_argument("--finished", type=int, help="jobs done while nothing changes, default 5 times JOBS")
    parser.add_argument("--running", type=int, help="jobs that go on meanwhile, default half of JOBS")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, whatever was measured")
    return parser


def _measure(scratch: Path, jobs: int, parts: set[str], sizes: tuple[int, int]) -> Iterator[str]:
    """The section, after each part."""
    results: report.Results = {}
    settled: report.Steady | None = None
    date = f"{datetime.now(UTC).date()}"
    _say(f"{2 * jobs} plain Jobs")
    with plane(scratch / "floor") as control:
        results[PLAIN.title] = _run(control, PLAIN, 2 * jobs)
    _say(f"{jobs} FineTuneJobs")
    with plane(scratch / "ours") as control:
        ours.install(control)
        ours.start(control)
        ours.await_start(control)
        with trainers(control, TRAIN_SECONDS) as answers:
            results[OURS.title] = _run(control, OURS, jobs)
            answered = answers()
        yield report.section(results, answered, settled, date=date)
        if "steady" in parts:
            settled = _steady(control, jobs, sizes)
            yield report.section(results, answered, settled, date=date)
    if "peer" in parts:
        _say(f"{jobs} TrainJobs")
        with plane(scratch / "peer") as control:
            peer.start(control)
            results[PEER.title] = _run(control, PEER, jobs)
        yield report.section(results, answered, settled, date=date)


def _run(control: Plane, contestant: burst.Contestant, number: int) -> Burst:
    """After a few that warm everything up, in a namespace of their own."""
    for namespace in ("warm", "bench"):
        control.namespace(namespace)
    burst.run(control, contestant, WARM_UP, namespace="warm")
    found = burst.run(control, contestant, number)
    print(f"    done after {found.total:.1f} s", flush=True)
    return found


def _steady(control: Plane, jobs: int, sizes: tuple[int, int]) -> report.Steady:
    """After `jobs` that are done; `sizes` are all that are done in the end, and those that go on."""
    finished, going = sizes
    _say(f"{finished} finished and {going} running FineTuneJobs")
    control.stop("operator")
    steady.finished_before(control, "bench", range(jobs, finished))
    ours.start(control)
    with trainers(control, LONG):
        steady.running(control, "bench", range(finished, finished + going))
        idle = steady.idle(control, "bench")
        again = steady.restart(control, "bench", jobs=finished + going + WARM_UP)
    return report.Steady(finished, going, idle, again)


def _say(what: str) -> None:
    print(f"bench-operator: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
