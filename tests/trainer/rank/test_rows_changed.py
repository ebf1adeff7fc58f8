"""Rows that are replaced under their address while a run rests: the run ends as if nothing had happened, and whoever
begins anew has the new rows. Preflight and ranks are processes, storage is an S3 server."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rank.conftest import STEP, STOPPABLE, Made, Ranks, dictionaries, made, tiny_rows, write

from finetune_api.contract import LastMessage
from finetune_trainer.checkpoint import OPTIMIZER, WEIGHTS
from finetune_trainer.storage import StorageSettings, Store, open_store
from finetune_trainer.storage.commit import RecordKind, find, latest_checkpoint

FILES = ("train", "validation", "test")


@pytest.fixture
def bucket(tiny_base: Path, s3_settings: StorageSettings, s3_bucket: str) -> Store:
    """With a base and rows."""
    store = open_store(f"s3://{s3_bucket}", s3_settings)
    for path in tiny_base.iterdir():
        store.upload(path, f"base/{path.name}")
    return store


def upload_rows(bucket: Store, directory: Path, *, seed: int) -> None:
    for number, name in enumerate(FILES):
        write(directory / f"{name}.jsonl", dictionaries(tiny_rows(200 if number else 400, seed=seed + number)))
        bucket.upload(directory / f"{name}.jsonl", f"{name}.jsonl")


def run_of(bucket: Store, root: Path, ranks: Ranks, settings: StorageSettings) -> Made:
    root.mkdir()
    train, validation, test = ({"uri": f"{bucket.uri}/{name}.jsonl"} for name in FILES)
    spec: dict[str, Any] = {
        **STOPPABLE,
        "model": {"uri": f"{bucket.uri}/base"},
        "resources": {"perNode": {"gpus": 0}},
        "task": {"type": "text-classification"},
        "data": {"train": [train], "validation": validation, "test": test},
        "output": {"uri": f"{bucket.uri}/{root.name}"},
        "storage": {"endpoint": settings.endpoint},
    }
    return made(root, spec, ranks, settings)


def preflight(run: Made, work: Path, *, begun: str = "") -> LastMessage:
    """As a pod does it. `begun`: the run that the operator names to it."""
    message = work / "message"
    files = {"config": run.config_path, "credentials": run.settings.credentials_dir, "message": message, "work": work}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "finetune_trainer", "preflight", *options]
    environment = {**os.environ, "FINETUNE_RUN": begun, "FINETUNE_INPUTS": str(run.inputs) if begun else ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return LastMessage.model_validate_json(message.read_bytes())


def end_of(run: Made) -> tuple[Any, ...]:
    """Digests of the last checkpoint's weights, and moments with all losses; the published model, what it reached."""
    last = latest_checkpoint(run.records)
    assert last is not None
    digests = {Path(entry["key"]).name: entry["digest"] for entry in last.body["objects"]}
    outcome = find(run.records, RecordKind.PUBLISHED)[-1].body["outcome"]
    return last.body["step"], digests[WEIGHTS], digests[OPTIMIZER], outcome["model"]["digest"], outcome["evaluation"]


def test_a_run_ends_on_the_rows_it_began_with_and_the_next_generation_has_the_new_ones(
    bucket: Store, ranks: Ranks, s3_settings: StorageSettings, tmp_path: Path
) -> None:
    upload_rows(bucket, tmp_path, seed=0)
    calm = run_of(bucket, tmp_path / "calm", ranks, s3_settings)
    code, log = calm.run(tmp_path / "work-calm")
    assert code == 0, log
    run = run_of(bucket, tmp_path / "changed", ranks, s3_settings)
    code, log = run.run(tmp_path / "work-first", stop=(*STEP, 8, signal.SIGTERM.value))
    assert code == 45, log

    upload_rows(bucket, tmp_path, seed=10)
    name = run.record.run_id
    resumed = preflight(run, tmp_path, begun=name)
    assert resumed.preflight is not None
    assert (resumed.run_id, resumed.preflight.state, resumed.step) == (name, "Resume", 8)
    told = (resumed.preflight.summary.warnings or [""])[0]
    assert [word for word in FILES if f"{bucket.uri}/{word}.jsonl" in told] == [*FILES]
    assert "have changed since this run began; the run goes on with the rows it began with" in told
    code, log = run.run(tmp_path / "work-budget", options=["--finish-now"])  # the budget is used up, and raised
    assert code == 0, log
    resumed = preflight(run, tmp_path, begun=name)
    assert resumed.result is not None
    assert (resumed.run_id, resumed.step, resumed.result.partial) == (name, 8, True)
    code, log = run.run(tmp_path / "work-last")
    assert code == 0, log
    assert "going on from the checkpoint of step 8" in log
    assert end_of(run) == end_of(calm)

    following = preflight(run, tmp_path)
    assert following.preflight is not None
    assert (following.run_id == name, following.preflight.state) == (False, "Fresh")


def test_a_run_whose_encoded_store_is_damaged_goes_on_once_preflight_has_mended_it(
    bucket: Store, ranks: Ranks, s3_settings: StorageSettings, s3_server: Any, tmp_path: Path
) -> None:
    upload_rows(bucket, tmp_path, seed=0)
    run = run_of(bucket, tmp_path / "damaged", ranks, s3_settings)
    code, log = run.run(tmp_path / "work-first", stop=(*STEP, 8, signal.SIGTERM.value))
    assert code == 45, log
    stored, client = run.record.encoded, s3_server.client()
    place = {"Bucket": bucket.uri.removeprefix("s3://"), "Key": f"damaged/{stored.key}"}
    told = client.head_object(**place)
    client.put_object(**place, Body=b"x" * told["ContentLength"], Metadata=told["Metadata"])
    assert run.run(tmp_path / "work-damaged")[0] == 43
    resumed = preflight(run, tmp_path, begun=run.record.run_id)
    assert resumed.preflight is not None
    assert (resumed.run_id, resumed.preflight.state, resumed.step) == (run.record.run_id, "Resume", 8)
    code, log = run.run(tmp_path / "work-last")
    assert code == 0, log
    assert "going on from the checkpoint of step 8" in log
