"""Every object that a run has in storage, damaged in turn: found out, and mended or named; never another model."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import Made, MakeRun, make_run, rows, tiny_base

from finetune_api.contract import ExitCode
from finetune_trainer.storage.commit import CURRENT

__all__ = ["make_run", "rows", "tiny_base"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]  # 330 attempts, seven minutes on a quiet machine
TRAINING = {"maxSteps": 12, "batchSize": 8, "microBatch": 4, "learningRate": 3e-3, "evaluateEvery": {"steps": 6}}
SPEC = {"training": TRAINING, "checkpoint": {"every": {"steps": 3}}}
COMMIT = ("finetune_trainer.storage.commit", "Claim", "append")
REFUSED = {ExitCode.INVALID, ExitCode.DAMAGED, ExitCode.STORAGE}


def flip(path: Path) -> None:
    """One bit in the midst."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "deleted": Path.unlink}


def stored(made: Made) -> Path:
    return Path(made.store.uri.removeprefix("file://"))


def damaged(root: Path, kept: Path) -> Iterator[tuple[str, str]]:
    """Put back what was kept and damage one object of it, each in each way: its key, and how it was damaged."""
    for path in sorted(path for path in kept.rglob("*") if path.is_file()):
        key = path.relative_to(kept).as_posix()
        for name, damage in DAMAGES.items():
            shutil.rmtree(root)
            shutil.copytree(kept, root)
            damage(root / key)
            yield key, name


def model_of(made: Made) -> dict[str, bytes]:
    """What consumers read: the files of the model that current.json leads to."""
    current = json.loads(made.store.read(CURRENT))
    directory = Path(current["model"].removeprefix("file://"))
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


def judge(made: Made, work: Path, *, key: str, wanted: dict[str, bytes]) -> str | None:
    """Let an attempt go on; what it did wrong, or None."""
    code, log = made.run(work)
    if code == 0:
        return None if model_of(made) == wanted else "another model"
    if code not in REFUSED:
        return f"it ended with {code}: {log[-400:]}"
    message = made.message(work).message if (work / "state/message.json").exists() else log
    name = key.rpartition("/")[2]
    return None if name in message or name.removesuffix(".json") in message else f"{code} without the name: {message}"


@pytest.fixture
def calm(make_run: MakeRun, rows: Any, tmp_path: Path) -> Made:
    made = make_run(rows(100), name="calm", **SPEC)
    code, log = made.run(tmp_path / "work-calm")
    assert code == 0, log
    return made


def wrong(made: Made, tmp_path: Path, *, wanted: dict[str, bytes], least: int) -> dict[str, str]:
    """What went wrong, by object and damage, when each object that is there now was damaged; `least` are expected."""
    kept, root = tmp_path / "kept", stored(made)
    shutil.copytree(root, kept)
    found = {}
    for number, (key, how) in enumerate(damaged(root, kept)):
        name = f"{key} {how}"
        found[name] = judge(made, tmp_path / f"work-{number}", key=key, wanted=wanted)
        print(f"{name}: {found[name] or 'ok'}", flush=True)
    assert len(found) > least
    return {name: said for name, said in found.items() if said is not None}


@pytest.mark.parametrize("records", [3, 6, 9], ids=["in-training", "trained", "half-evaluated"])
def test_a_run_that_is_under_way(make_run: MakeRun, rows: Any, calm: Made, tmp_path: Path, records: int) -> None:
    made = make_run(rows(100), name="run", **SPEC)
    code, _ = made.run(tmp_path / "work-begun", stop=(*COMMIT, records, signal.SIGKILL), MEASURED_EVERY="0")
    assert code == -signal.SIGKILL
    assert ("measured" in made.kinds()) is (records == 9)
    assert not wrong(made, tmp_path, wanted=model_of(calm), least=20)


def test_a_run_that_is_finished(calm: Made, tmp_path: Path) -> None:
    assert not wrong(calm, tmp_path, wanted=model_of(calm), least=40)
