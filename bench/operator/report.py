"""The section of docs/benchmarks.md."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.operator.burst import Burst, percentile
from bench.operator.contestants import OURS, PEER, PLAIN, Contestant
from bench.operator.stages import PREFLIGHT_SECONDS, TRAIN_SECONDS
from bench.operator.steady import AFTER_RESTART, MEASURED, Idle, Restart
from bench.operator.usage import writes

CAPTION = """\
`make bench-operator`, {date}, {cores} cores for everything. etcd, kube-apiserver, kube-controller-manager and
kube-scheduler are real, the latter two at 1,000 requests a second; kwok plays the kubelets. A preflight pod runs
{preflight} s, a train pod {train} s, and answers /progress meanwhile. The operator runs as the chart installs it,
with its own rights. The floor is as many plain Jobs as ours come to, every other one as short as a preflight.
Kubeflow Trainer and JobSet run with their webhooks, and with 20 workers and 1,000 requests a second instead of
their own 1 and 20. Each contestant has a fresh control plane. Load is that of the machine before; others' CPU was
spent by what has nothing to do with the benchmark: with much of it, only ratios mean something."""
Results = dict[str, Burst]
"""By the contestant's title."""


@dataclass(frozen=True)
class Steady:
    finished: int
    running: int
    idle: Idle
    restart: Restart


def section(results: Results, answers: int, steady: Steady | None, *, date: str) -> str:
    """`answers`: questions that the trainers have answered during ours."""
    mine = results[OURS.title]
    lines = [
        f"## Operator: {mine.number:,} FineTuneJobs at once, on a real control plane with simulated kubelets",
        "",
        CAPTION.format(date=date, cores=os.cpu_count(), preflight=PREFLIGHT_SECONDS, train=TRAIN_SECONDS),
        "",
        *_table(results, answers),
        "",
        *_requests(results),
        "",
        *(_steady(steady) if steady else []),
        *_goals(results, steady),
    ]
    return "\n".join(lines)


def _table(results: Results, answers: int) -> list[str]:
    order = [one for one in (PLAIN, OURS, PEER) if one.title in results]
    floor = results[PLAIN.title]
    rows = [[_row(one, results[one.title], floor)] for one in order]
    names = [name for name, _ in rows[0][0]]
    lines = ["| | " + " | ".join(_title(one, results[one.title]) for one in order) + " |", "|-|" + "-:|" * len(order)]
    for index, name in enumerate(names):
        lines.append(f"| {name} | " + " | ".join(row[0][index][1] for row in rows) + " |")
    return [*lines, "", f"Our trainers answered {answers:,} questions for their progress meanwhile."]


def _title(contestant: Contestant, burst: Burst) -> str:
    what = {PLAIN.title: "plain Jobs", OURS.title: "FineTuneJobs", PEER.title: "TrainJobs of Kubeflow Trainer 2.0"}
    return f"{burst.number:,} {what[contestant.title]}"


def _row(contestant: Contestant, burst: Burst, floor: Burst) -> list[tuple[str, str]]:
    used, own = burst.used, contestant.processes
    per_job = 1000 / burst.number
    cpu = sum(used.cpu[name] for name in own) * per_job
    memory = sum(used.peak[name] for name in own)
    requests = sum(sum(burst.requests[user].values()) for user in contestant.users) / burst.number
    writing = sum(writes(burst.requests[user]) for user in contestant.users) / burst.number
    return [
        ("first create until all are done, s", f"{burst.total:.1f}"),
        ("of the floor's time", f"{burst.total / floor.total:.2f}"),
        ("create to first pod, s: p50, p99", f"{percentile(burst.to_pod, 50):.1f}, {percentile(burst.to_pod, 99):.1f}"),
        (
            "create to the pod that trains, s: p50, p99",
            f"{percentile(burst.to_train, 50):.1f}, {percentile(burst.to_train, 99):.1f}",
        ),
        ("create to done, s: p50, p99", f"{percentile(burst.to_end, 50):.1f}, {percentile(burst.to_end, 99):.1f}"),
        ("its controllers' CPU, ms an object", f"{cpu:.0f}" if own else "-"),
        ("their peak memory, MiB", f"{memory:.0f}" if own else "-"),
        ("their requests to the API server, an object", f"{requests:.1f}" if own else "-"),
        ("of these writes", f"{writing:.1f}" if own else "-"),
        ("API server's CPU, ms an object", f"{used.cpu['kube-apiserver'] * per_job:.0f}"),
        ("creates a second", f"{burst.number / burst.creating:.0f}"),
        ("load before, others' CPU in cores", f"{burst.load:.1f}, {used.others / used.seconds:.1f}"),
    ]


def lifecycle_writes(burst: Burst) -> float:
    """An object's writes without those that tell of nothing but progress."""
    return (writes(burst.requests[OURS.users[0]]) - burst.turns["progress"]) / burst.number


def _requests(results: Results) -> list[str]:
    """Of the Job controller for the floor, of their own controllers for the others."""
    order = [one for one in (OURS, PLAIN, PEER) if one.title in results]
    counted = {one.title: _counted(one, results[one.title]) for one in order}
    total: dict[str, float] = {}
    for each in counted.values():
        for what, number in each.items():
            total[what] = total.get(what, 0.0) + number
    lines = ["| requests an object | " + " | ".join(one.title for one in order) + " |", "|-|" + "-:|" * len(order)]
    for what in sorted(total, key=lambda what: -total[what]):
        lines.append(f"| {what} | " + " | ".join(_share(counted[one.title].get(what, 0.0)) for one in order) + " |")
    mine = results[OURS.title]
    steps, progress, other = (mine.turns[kind] / mine.number for kind in ("lifecycle", "progress", "other"))
    return [
        *lines,
        "",
        f"Of our status writes a job {steps:.2f} tell of another phase or reason, {progress:.2f} of mere progress, "
        f"{other:.2f} of anything else.",
    ]


def _counted(one: Contestant, burst: Burst) -> dict[str, float]:
    counted: dict[str, float] = {}
    for user in one.users:
        for (verb, what, code), number in burst.requests[user].items():
            name = f"{verb} {what}" + (f", refused with {code}" if code >= 400 else "")
            counted[name] = counted.get(name, 0.0) + number / burst.number
    return counted


def _share(number: float) -> str:
    return f"{number:.2f}" if number else "-"


def needless(turns: Counter[str]) -> int:
    """Status writes of jobs to which nothing has happened, other than of progress."""
    return turns["lifecycle"] + turns["other"]


def _steady(steady: Steady) -> list[str]:
    idle, again = steady.idle, steady.restart
    writing = writes(idle.requests) / MEASURED
    others = ", ".join(f"{number} {what}" for what, number in again.others.items()) or "none"
    return [
        f"With {steady.finished:,} finished and {steady.running:,} running jobs:",
        "",
        f"| idle, over {MEASURED} s | |",
        "|-|-:|",
        f"| CPU, % of a core | {100 * idle.used.cpu['operator'] / idle.used.seconds:.1f} |",
        f"| peak memory, MiB | {idle.used.peak['operator']:.0f} |",
        f"| questions to trainers, a second | {idle.answers:.1f} |",
        f"| writes, a second, all of them of progress but {needless(idle.turns)} | {writing:.1f} |",
        "",
        "| restart | |",
        "|-|-:|",
        f"| start of the process until it has looked at every job, s | {again.ready:.1f} |",
        f"| CPU until then, s | {again.cpu:.1f} |",
        f"| peak memory, MiB | {again.peak:.0f} |",
        f"| writes until {AFTER_RESTART} s later: status, changed phase or reason | {again.turns['lifecycle']} |",
        f"| status, progress only | {again.turns['progress']} |",
        f"| status, else | {again.turns['other']} |",
        f"| others | {others} |",
        "",
    ]


def _goals(results: Results, steady: Steady | None) -> list[str]:
    floor, mine = results[PLAIN.title], results[OURS.title]
    ratio = mine.total / floor.total
    cpu = 1000 * mine.used.cpu["operator"] / mine.number
    goals = [
        ("all done within 1.3 times the floor's time", f"{ratio:.2f}", ratio <= 1.3),
        ("at most 60 ms of CPU a job", f"{cpu:.0f}", cpu <= 60),
        ("at most 8 lifecycle writes a job", f"{lifecycle_writes(mine):.1f}", lifecycle_writes(mine) <= 8),
        ("less than 220 MiB", f"{mine.used.peak['operator']:.0f}", mine.used.peak["operator"] < 220),
    ]
    if PEER.title in results:
        share = percentile(mine.to_pod, 99) / percentile(results[PEER.title].to_pod, 99)
        goals.append(("create to pod, p99, below half the peer's", f"{share:.2f}", share < 0.5))
    if steady is not None:
        idle, again = steady.idle, steady.restart
        share = 100 * idle.used.cpu["operator"] / idle.used.seconds
        writing = sum(again.others.values()) + needless(again.turns)
        goals += [
            ("idle below 5 % of a core", f"{share:.1f} %", share < 5),
            ("ready in less than 20 s after a restart", f"{again.ready:.1f}", again.ready < 20),
            ("no write after a restart but of progress", str(writing), writing == 0),
        ]
    return ["| goal | | |", "|-|-:|-|", *_lines(goals)]


def _lines(goals: Sequence[tuple[str, str, bool]]) -> list[str]:
    return [f"| {what} | {value} | {'met' if met else 'missed'} |" for what, value, met in goals]
