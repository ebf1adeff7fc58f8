"""Ports to listen on a little later: none that the kernel gives away meanwhile to whoever connects to something."""

import random
import socket
from contextlib import ExitStack
from pathlib import Path

LOWEST = 15_000
TRIES = 100


def free_port(count: int = 1) -> int:
    """The first of so many in a row that nobody listens on, on any address."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    for _ in range(TRIES):
        first = random.SystemRandom().randrange(LOWEST, ephemeral - count)  # tests seed the other one
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError(f"no {count} free ports in a row were found from {LOWEST} to {ephemeral}")


def _is_free(port: int) -> bool:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
