"""The benchmark of the operator runs: a control plane with simulated kubelets, plain Jobs and FineTuneJobs, a table."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]


def test_twenty_jobs_go_through_the_benchmark_of_the_operator() -> None:
    command = [sys.executable, "-m", "bench.operator", "20", "--parts", ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| 40 plain Jobs | 20 FineTuneJobs |" in done.stdout
    answered = int(done.stdout.partition("Our trainers answered ")[2].split()[0].replace(",", ""))
    assert answered >= 20
