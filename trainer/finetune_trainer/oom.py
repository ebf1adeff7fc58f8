"""Has the kernel killed a process for memory? Its victim cannot say so, and a SIGKILL alone does not tell by whom."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MACHINE = Path("/proc/vmstat")
ADVICE = (
    "lower data.maxLength or choose a method with fewer weights; or give it more memory: resources.perNode.memory in a "
    "cluster, else close other programs"
)
"""What to do when the memory of a host is used up."""


def kills(sources: Iterable[Path] | None = None) -> int:
    """How often the kernel has killed a process of this cgroup for memory; of the whole machine without a cgroup.

    The first of `sources` that can be read counts; by default this process's own.
    """
    for source in _sources() if sources is None else sources:
        with suppress(OSError, ValueError):
            for line in source.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _sources() -> Iterator[Path]:
    """The files that count: of this process's cgroup, then of the outermost one that it sees, then of the machine."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield _CGROUPS / path.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                yield _CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
    yield _CGROUPS / "memory.events"
    yield _CGROUPS / "memory/memory.oom_control"
    yield _MACHINE
