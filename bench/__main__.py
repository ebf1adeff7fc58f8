"""`make bench`: runs the benchmarks that need no cluster, and writes their sections of docs/benchmarks.md.

`python -m bench transfer` runs one of them.
"""

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench import checkpoints, page, preflight, training, transfer

PARTS = (transfer, training, checkpoints, preflight)
PACKAGES = ("torch", "transformers", "accelerate", "botocore", "boto3")


def main(names: Sequence[str]) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parts = {part.__name__.rpartition(".")[2]: part for part in PARTS}
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        sections = [parts[name].run(Path(scratch) / name) for name in names or parts]
    page.put(sections, head=None if names else _head())
    print("\n\n".join(sections))
    return 0


def _head() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        "# Benchmarks\n\n"
        f"Written by `make bench` on {datetime.now(UTC).date()}: {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}. All rows of a table come from one run, the contestants "
        "taking turns; read the ratios, not the seconds."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
