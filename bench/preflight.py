"""Preflight over a large generated jsonl: minutes and peak memory of the process, which must stay below a GiB.

`python -m bench.preflight GB` runs it alone, with another size than that of `make bench`.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

GB = 10.0
LIMIT = 1024
"""MiB"""
_SENTENCES, _A_ROW = 20_000, 9


def run(scratch: Path, *, gb: float = GB) -> str:
    """The section of the report."""
    scratch.mkdir(parents=True, exist_ok=True)
    rows = generate(scratch / "rows.jsonl", size=int(gb * 1e9))
    figures = _measured(scratch, rows)
    (scratch / "rows.jsonl").unlink()
    assert figures["peak"] < LIMIT, f"preflight took {figures['peak']:.0f} MiB of memory"
    return "\n".join(
        [
            f"## Preflight of a jsonl of {gb:g} GB",
            "",
            f"{rows:,} rows, read, checked, split, tokenised with MiniLM's tokenizer (maxLength 64), searched for "
            "duplicates and leaks exactly and for personal data and near-duplicates in a sample.",
            "",
            "| | |",
            "|-|-:|",
            f"| minutes | {figures['seconds'] / 60:.1f} |",
            f"| MB/s | {gb * 1000 / figures['seconds']:.1f} |",
            f"| peak memory, MiB | {figures['peak']:.0f} |",
            f"| encoded store, GB | {figures['encoded'] / 1e9:.2f} |",
        ]
    )


def generate(path: Path, *, size: int) -> int:
    """Write rows until the file has `size` bytes; returns their number. A row is some of 20,000 sentences."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdfglmnprstv", k=rng.randint(2, 9))) for _ in range(5000)]
    sentences = [" ".join(rng.choices(words, k=18)) + "." for _ in range(_SENTENCES)]
    written = rows = 0
    with open(path, "w", encoding="ascii", buffering=1 << 20) as file:
        while written < size:
            text = " ".join(rng.choices(sentences, k=_A_ROW))
            mail = f" jane{rows}@example.org" if rows % 1000 == 0 else ""
            written += file.write(f'{{"text": "{text}{mail}", "label": "{"abcd"[rows % 4]}", "id": {rows}}}\n')
            rows += 1
    return rows


def _measured(scratch: Path, rows: int) -> dict[str, Any]:
    """Preflight by the command line that pods use, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hack"))
    from demo import base_model

    from finetune_api.job import FineTuneJobSpec
    from finetune_api.profile import FineTuneProfileSpec
    from finetune_api.resolve import Defaults, resolve

    document = {
        "task": {"type": "text-classification"},
        "model": {"uri": base_model().as_uri()},
        "data": {"train": [{"uri": (scratch / "rows.jsonl").as_uri()}], "maxLength": 64},
        "output": {"uri": (scratch / "output").as_uri()},
    }
    spec = FineTuneJobSpec.model_validate(yaml.safe_load(json.dumps(document)))
    defaults = Defaults("", "", in_cluster=False)
    config = resolve(spec, FineTuneProfileSpec(), job="bench/bench", job_uid="bench", generation=1, defaults=defaults)
    (scratch / "config.json").write_text(config.model_dump_json(by_alias=True), encoding="utf-8")
    command = [sys.executable, "-m", "finetune_trainer", "preflight", "--config", str(scratch / "config.json")]
    command += ["--message", str(scratch / "message.json"), "--work", str(scratch / "work")]
    started = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.monotonic() - started
    summary = json.loads((scratch / "message.json").read_text())["preflight"]["summary"]
    assert summary["rows"]["train"] + summary["rows"]["validation"] == rows
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    encoded = sum(path.stat().st_size for path in (scratch / "output/encoded").iterdir())
    return {"seconds": seconds, "peak": peak, "encoded": encoded}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as directory:
        print(run(Path(directory), gb=float(sys.argv[1])))
