"""What decides the bits of a result but not the run: recorded with every claim, restored by the attempts after it."""

import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from statistics import median
from typing import Any

import torch

from finetune_api.contract import RunConfig
from finetune_trainer.batches import micro_batch
from finetune_trainer.world import World

ATTENTION = "sdpa, or eager where the model has no other"
_TURNS = 7
_ROUNDS = 3
_PAUSE = 1.5
"""Seconds between two rounds of so many turns, which there are while more threads do not seem to pay."""
_PAYS = 1.25
"""How much faster more threads must be."""
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "numpy", "safetensors", "scikit-learn")


def resolve(config: RunConfig, *, world: World, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numerics of this attempt: those of the attempt before it, as far as this machine can do the same.

    The micro-batch is kept while the document asks for the same one, because an attempt that ran out of memory may have
    halved it.
    """
    asked = config.training.micro_batch
    kept = before or {}
    micro = kept.get("microBatch") if kept.get("microBatchAsked", 0) == asked else None
    return {
        "precision": _precision(config.training.precision, world=world, before=kept.get("precision")),
        "microBatch": int(micro or asked or micro_batch(config, gpu=world.device.type == "cuda", ranks=world.size)),
        "microBatchAsked": asked,
        "worldSize": world.size,
        "threads": _threads(world, before=kept.get("threads")),
        "device": _device_name(world),
        "attention": ATTENTION,
        "libraries": {name: version(name).partition("+")[0] for name in _LIBRARIES},
    }


def changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """In words, what differs from the attempt before: the warning NumericsChanged."""
    if not before:
        return []
    flat, new = _flat(before), _flat(now)
    return [
        f"{name} was {flat[name]}, is {new[name]}"
        for name in sorted(flat.keys() & new.keys())
        if flat[name] != new[name]
    ]


def apply(numerics: Mapping[str, Any]) -> None:
    """Make this process compute so. Deterministic kernels, where there are any."""
    os.environ["OMP_NUM_THREADS"] = str(numerics["threads"])  # accelerate would choose a number of its own
    torch.set_num_threads(int(numerics["threads"]))
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _flat(numerics: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in numerics.items() if not isinstance(value, Mapping)}
    return {**flat, **(numerics.get("libraries") or {})}


def _precision(asked: str, *, world: World, before: str | None) -> str:
    able = world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    wanted = before or ("bf16" if asked == "auto" else asked)
    return "bf16" if wanted == "bf16" and (able or asked == "bf16") else "fp32"


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _threads(world: World, *, before: int | None) -> int:
    """OMP_NUM_THREADS where it is set, else as many as the attempt before had, else as many as pay, measured.

    On idle cores two threads are up to twice as fast as one, on busy ones several times slower: more are taken only
    where they are clearly faster.
    """
    fixed = os.environ.get("OMP_NUM_THREADS", "")
    if fixed.isdecimal() and int(fixed) > 0:
        return int(fixed)
    if before:
        return int(before)
    if world.device.type == "cuda":
        return 1
    share = max(1, len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    times: dict[int, list[float]] = {count: [] for count in sorted({1, 2, share // 2, share} - {0}) if count <= share}
    for number in range(_ROUNDS):
        if number:  # what keeps the cores busy may be over in a moment, and the choice holds for the whole run
            time.sleep(_PAUSE)
        _measure(times)
        chosen = _paying({count: median(found) for count, found in times.items()})
        if chosen == share:
            break
    return chosen


def _paying(seconds: Mapping[int, float]) -> int:
    """The number of threads, of those measured in ascending order, beyond which more do not pay."""
    chosen, fastest = 1, 0.0
    for count, took in seconds.items():
        if not fastest or took * _PAYS < fastest:
            chosen, fastest = count, took
    return chosen


def _measure(times: Mapping[int, list[float]]) -> None:
    """Add the seconds of training steps of one transformer layer for each number of threads, in turns."""
    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
    rows = torch.randn(16, 48, 384)
    for number in range(_TURNS + 1):
        for count, found in times.items():
            torch.set_num_threads(count)
            start = time.perf_counter()
            layer(rows).sum().backward()
            if number:  # the first turn warms up
                found.append(time.perf_counter() - start)
