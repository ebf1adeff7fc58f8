"""The ranks of a run and what they say to each other; no object crosses as a pickle."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

# Ranks wait for one another while files are downloaded. A rank that hangs is found by the supervisor's watchdog, which
# sees every rank's sign of life; a collective's own timeout could only end a slow but healthy run.
TIMEOUT = timedelta(hours=12)
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks, and its device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    board: Any = None
    """A store of torch.distributed where ranks post what is no part of a collective, from any thread; None for one."""

    @property
    def leads(self) -> bool:
        """Rank 0 alone speaks to the log and to the supervisor."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """One rank a node downloads what the others of the node read."""
        return self.local_rank == 0

    def share(self, value: Mapping[str, Any] | None) -> dict[str, Any]:
        """Rank 0's JSON object, on every rank."""
        data = json.dumps(value).encode() if self.leads else b""
        return dict(json.loads(self.send(data, source=0)))

    def send(self, data: bytes, *, source: int) -> bytes:
        """`source`'s bytes, at least one, on every rank."""
        if self.size == 1:
            return data
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=source)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, src=source)
        return bytes(buffer.numpy())

    def post(self, name: str, data: bytes) -> None:
        """Leave at least one byte for rank 0, under a name that this rank uses once."""
        self.board.set(f"{name}/{self.rank}", data)

    def collect(self, name: str, *, patience: float) -> list[bytes]:
        """On rank 0: what each other rank has posted under that name. Raises TimeoutError after `patience` seconds in
        which one has not: its node may have fallen silent."""
        found = []
        until = time.monotonic() + patience
        for rank in range(1, self.size):
            key = f"{name}/{rank}"
            while not self.board.check([key]):  # a blocking get would keep the connection from the collectives
                if time.monotonic() > until:
                    raise TimeoutError(f"rank {rank} has said nothing for {patience:.0f} s")
                time.sleep(0.02)
            found.append(bytes(self.board.get(key)))
            self.board.delete_key(key)
        return found

    def flags(self, mine: Sequence[bool]) -> "Flags":
        """Begin to combine flags: each is set when any rank has set it. They travel while the gradients do."""
        tensor = torch.tensor([*mine, False], dtype=torch.uint8)
        if self.size == 1:
            return Flags(tensor, None)
        return Flags(tensor, dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def spread(self, tensor: torch.Tensor, *, source: int) -> torch.Tensor:
        """`source`'s tensor on every rank, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def leave(self) -> None:
        """Leave the group: from here on ranks end when they like."""
        if self.size > 1:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Flags:
    """Flags on their way."""

    tensor: torch.Tensor
    work: Any

    def wait(self, beat: Callable[[], None] | None = None) -> list[bool]:
        """The combined flags; `beat` is called meanwhile."""
        if self.work is not None:
            pause = 0.001  # others are often only a little behind
            while beat is not None and not self.work.is_completed():
                beat()
                time.sleep(pause)
                pause = min(0.05, 2 * pause)
            self.work.wait()
        return [bool(flag) for flag in self.tensor[:-1]]


def join() -> World:
    """This process's world, from the launcher's environment; one rank alone needs no group and no port."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        for name in _LAUNCHER:  # accelerate would make a group of one
            os.environ.pop(name, None)
        return World(device=device)
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=TIMEOUT)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    return World(rank, size, local, device, PrefixStore("board", store))
