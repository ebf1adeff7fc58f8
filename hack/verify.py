"""Checks that every generated file is what its source says; names those that are not and how to write them again."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What it makes, the command that checks it, the command that writes it.
GENERATED = [
    (
        "CRDs, their copies in the chart, docs/api.md",
        [sys.executable, "-m", "finetune_api.crd", "--check"],
        ".venv/bin/python -m finetune_api.crd --write",
    ),
    (
        "the chart's values.schema.json",
        [sys.executable, "hack/chart_schema.py", "--check"],
        ".venv/bin/python hack/chart_schema.py",
    ),
    ("docs/failures.md", [sys.executable, "hack/failures.py", "--check"], ".venv/bin/python hack/failures.py"),
    ("requirements/*.lock", ["hack/lock", "--check"], "make lock"),
]


def main() -> int:
    """Run the checks; the exit code is 1 when a file is stale."""
    stale = 0
    for what, check, write in GENERATED:
        result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
        print(f"{'stale' if result.returncode else 'fresh'}: {what}")
        if result.returncode:
            stale = 1
            print((result.stdout + result.stderr).rstrip())
            print(f"write it again with: {write}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
