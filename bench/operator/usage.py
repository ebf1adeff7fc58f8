"""What processes use, from /proc, and what was asked of the API server, from its audit log."""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
READS = ("get", "list", "watch")


@dataclass(frozen=True)
class Used:
    """Since when the snapshot before was taken."""

    seconds: float
    cpu: dict[str, float]
    """Processor seconds by process."""
    peak: dict[str, float]
    """MiB of memory by process."""
    others: float
    """Processor seconds of everything on the machine that is none of the processes, nor this one or its children."""


class Meter:
    """Starts at once; `stop` tells what was used since."""

    def __init__(self, pids: Mapping[str, int], *, now: float) -> None:
        self._pids, self._began = dict(pids), now
        for pid in self._pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the peak
        self._cpu, self._busy, self._own = self._of_all(), _busy(), _own()

    def stop(self, *, now: float) -> Used:
        cpu = {name: after - self._cpu[name] for name, after in self._of_all().items()}
        rest = _busy() - self._busy - sum(cpu.values()) - (_own() - self._own)
        peak = {name: peak_mib(pid) for name, pid in self._pids.items()}
        return Used(now - self._began, cpu, peak, max(0.0, rest))

    def _of_all(self) -> dict[str, float]:
        return {name: cpu_seconds(pid) for name, pid in self._pids.items()}


def _fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """User and system, since it began."""
    fields = _fields(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS


def _own() -> float:
    """Of this process and of its children: the watchers."""
    return sum(os.times()[:4]) + sum(cpu_seconds(child.pid) for child in multiprocessing.active_children() if child.pid)


def peak_mib(pid: int) -> float:
    """Of resident memory, since it began or a Meter did."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no memory")


def _busy() -> float:
    """Processor seconds of the machine: user, nice, system, interrupts."""
    fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (fields[0] + fields[1] + fields[2] + fields[5] + fields[6]) / TICKS


class Audit:
    """The requests since it was made, or since the last `counts`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = log.stat().st_size

    def counts(self, user: str) -> Counter[tuple[str, str, int]]:
        """By verb, resource and HTTP code, of the user whose name ends so. Without what only leader election does."""
        found: Counter[tuple[str, str, int]] = Counter()
        with open(self._log, encoding="utf-8") as log:
            log.seek(self._offset)
            for line in log:
                if not line.endswith("\n"):
                    break
                record = json.loads(line)
                if not record["user"]["username"].endswith(user):
                    continue
                target = record.get("objectRef") or {}
                resource = target.get("resource") or record["requestURI"].partition("?")[0]
                if "subresource" in target:
                    resource += f"/{target['subresource']}"
                if resource != "leases":
                    found[record["verb"], resource, record.get("responseStatus", {}).get("code", 0)] += 1
        return found


def writes(requests: Mapping[tuple[str, str, int], int]) -> int:
    return sum(number for (verb, _, _), number in requests.items() if verb not in READS)
