"""`make bench`: runs the benchmarks that need no cluster, and writes their sections of docs/benchmarks.md."""

import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench import checkpoints, page, preflight, training, transfer

PARTS = (transfer, training, checkpoints, preflight)
PACKAGES = ("torch", "transformers", "accelerate", "botocore", "boto3")


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        sections = [part.run(Path(scratch) / part.__name__.rpartition(".")[2]) for part in PARTS]
    page.put(sections, head=_head())
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
    sys.exit(main())
