"""How long training stands still for checkpoints, beside the time of its steps, in one run."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.training import document, prepare

STEPS, EVERY, BATCH = 100, 20, 16


def run(scratch: Path) -> str:
    """The section of the report."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hack"))
    from dataset import make
    from demo import base_model

    train, _ = make(scratch / "data", rows=STEPS * BATCH + 200, test_rows=50)
    lines = []
    for name, method in (("full", {"type": "full"}), ("lora", {"type": "lora"})):
        print(f"checkpoints: {name}", file=sys.stderr, flush=True)
        lines.append(_line(name, _measure(scratch / name, base_model(), train, method)))
    return "\n".join(
        [
            f"## What checkpoints cost: MiniLM, batch {BATCH}, one checkpoint every {EVERY} steps, fp32 on the CPU",
            "",
            "The loop waits for the copy to memory, for the checkpoint before when that is still on its way, and in a",
            "step that would be the 21st since the last commit.",
            f"Uploads go on beside training, here on the same {os.cpu_count()} processors, so that steps meanwhile are",
            "slower. The first share is of the time that the steps took, with those that an upload has slowed; the",
            "second, the stricter one, is of the time of as many steps that nothing has slowed.",
            "",
            "| | checkpoint, MiB | loop waits, ms: median, most | share of time | of undisturbed time | a step, ms "
            "| beside an upload, ms |",
            "|-|-:|-:|-:|-:|-:|-:|",
            *lines,
        ]
    )


def _measure(work: Path, model: Path, train: Path, method: dict[str, Any]) -> dict[str, Any]:
    content = document(work, model, train)
    content["spec"]["method"] = method
    content["spec"]["training"] = {"maxSteps": STEPS, "batchSize": BATCH, "microBatch": BATCH}
    content["spec"]["checkpoint"] = {"every": {"steps": EVERY}}
    config, run_id = prepare(work, content)
    command = [sys.executable, "-m", "bench.checkpoints", str(config), run_id, str(work / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"training ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _line(name: str, found: dict[str, Any]) -> str:
    waits, steps, busy = found["waits"], found["steps"], found["busy"]
    taken, undisturbed = sum(steps + busy), statistics.mean(steps) * len(steps + busy)
    shares = " | ".join(f"{sum(waits) / seconds * 100:.1f} %" for seconds in (taken, undisturbed))
    most = f"{statistics.median(waits) * 1000:.0f}, {max(waits) * 1000:.0f}"
    slow = f"{statistics.median(busy) * 1000:.0f}" if busy else "-"
    size = found["bytes"] / (1 << 20)
    return f"| {name} | {size:.0f} | {most} | {shares} | {statistics.median(steps) * 1000:.0f} | {slow} |"


def _rank(config: str, run_id: str, work: str) -> int:
    """In the child: one rank, with a watch at its steps and checkpoints. The last checkpoint does not count, nor do
    the first steps, in which the machine warms up."""
    import finetune_trainer.loop as loop
    from finetune_trainer import rank
    from finetune_trainer.saving import Checkpoints
    from finetune_trainer.training import Duties

    waits: list[float] = []
    steps: list[float] = []
    busy: list[float] = []
    size = 0
    step, checkpoint, save = loop.step, Duties.checkpoint, Checkpoints.save
    under_way: list[Any] = [None]

    def timed_step(setup: Any, state: Any, before_update: Any) -> Any:
        pending = under_way[0]._pending if under_way[0] else None
        uploading = pending is not None and not pending.done()
        started = time.monotonic()
        held = []

        def timed_hold() -> None:
            began = time.monotonic()
            before_update()
            held.append(time.monotonic() - began)

        result = step(setup, state, timed_hold)
        if state.step >= EVERY // 2:
            (busy if uploading else steps).append(time.monotonic() - started - sum(held))
        if waits and state.step < STEPS:
            waits[-1] += sum(held)
        return result

    def timed_checkpoint(self: Duties, state: Any) -> None:
        started = time.monotonic()
        checkpoint(self, state)
        if state.step < STEPS:
            waits.append(time.monotonic() - started)

    def watched_save(self: Checkpoints, state: Any, **tensors: Any) -> None:
        nonlocal size
        size = sum(t.nbytes for group in tensors.values() if group for t in group.values())
        under_way[0] = self
        save(self, state, **tensors)

    loop.step, Duties.checkpoint, Checkpoints.save = timed_step, timed_checkpoint, watched_save  # type: ignore
    code = rank.main(["--config", config, "--run-id", run_id, "--work", work])
    print(json.dumps({"waits": waits, "steps": steps, "busy": busy, "bytes": size}))
    return code


if __name__ == "__main__":
    sys.exit(_rank(*sys.argv[1:]))
