"""Whole runs: a real process, the real classes, a local store."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.trainer.rank.conftest import dictionaries, made, write

from finetune_api.tasks import TASKS
from finetune_trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS, file_name
from finetune_trainer.data.batch import Encoded
from finetune_trainer.run import TRAIN
from finetune_trainer.storage import StorageSettings, open_store
from finetune_trainer.storage.commit import CURRENT, Holder, RecordKind, RunLog, live_checkpoints, publish_current

FAST = {"epochs": 4.0, "batchSize": 16, "learningRate": 3e-3, "microBatch": 8}


def test_a_run_trains_evaluates_and_publishes(make_run: Any, rows: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    made = make_run(rows(300), test=rows(60, seed=1), training=FAST, output={"weights": "Last"})
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    message = made.message(tmp_path / "work")
    assert (message.code, message.reason, message.attempt, message.step) == (0, "Completed", 1, 68)
    outcome = message.result
    assert outcome is not None
    assert (outcome.final_step, outcome.total_steps, outcome.evaluation.on, outcome.evaluation.rows) == (
        68,
        68,
        "test",
        60,
    )
    for metrics in (outcome.evaluation.trivial, outcome.evaluation.probe, outcome.evaluation.tuned):
        assert set(metrics or {}) == set(TASKS["text-classification"].metrics)
    assert outcome.evaluation.tuned["accuracy"] > outcome.evaluation.trivial["accuracy"] + 0.2
    assert outcome.model.digest.startswith("sha256:")
    assert made.kinds()[-4:] == ["trained", "baseline", "evaluated", "published"]

    model = AutoModelForSequenceClassification.from_pretrained(made.model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(made.model())
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.problem_type == "single_label_classification"
    texts, labels = rows(60, seed=1)
    with torch.no_grad():
        chosen = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.argmax(-1)
    hits = sum(model.config.id2label[int(number)] == label for number, label in zip(chosen, labels, strict=True))
    assert hits / 60 == pytest.approx(outcome.evaluation.tuned["accuracy"], abs=1e-5)

    card = (made.model() / "README.md").read_text()
    assert "library_name: transformers" in card
    assert f"| accuracy | {outcome.evaluation.trivial['accuracy']:.4f} |" in card
    for path in made.model().iterdir():
        assert path.name == "README.md" or str(tmp_path).encode() not in path.read_bytes()
    assert json.loads(made.store.read(CURRENT))["digest"] == outcome.model.digest

    progress = json.loads((tmp_path / "work/state/progress.json").read_text())
    assert (progress["stage"], progress["step"], progress["totalSteps"]) == ("Publishing", 68, 68)
    assert progress["checkpoint"]["step"] == 68
    assert progress["startedAt"] <= progress["firstStepAt"] <= progress["updatedAt"]

    code, _ = made.run(tmp_path / "again")
    assert code == 0
    assert made.kinds()[-2:] == ["published", "claim"]
    assert made.message(tmp_path / "again").result == outcome


def wait_for_records(made: Any, count: int) -> None:
    """Until the log has so many records."""
    deadline = time.monotonic() + 60
    log = RunLog(made.store, made.record.run_id)
    while len(log.read()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(make_run: Any, rows: Any, tmp_path: Path) -> None:
    spec = {"training": FAST, "checkpoint": {"every": {"steps": 6}}}
    calm = make_run(rows(300), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(300), name="killed", **spec)
    codes = []
    for count, number in ((3, signal.SIGKILL), (6, signal.SIGTERM), (9, signal.SIGKILL), (11, signal.SIGINT)):
        started = made.start(tmp_path / f"work-{count}")
        wait_for_records(made, count)
        time.sleep(0.013 * count)
        started.kill(number)
        codes.append(started.wait())
        if number != signal.SIGKILL:
            message = made.message(tmp_path / f"work-{count}")
            assert (message.code, message.reason) == (45, "Stopped")
    assert codes == [-9, 45, -9, 45]
    code, log = made.run(tmp_path / "work-last")
    assert code == 0, log
    assert "going on from the checkpoint of step" in log
    assert made.last(WEIGHTS).read_bytes() == calm.last(WEIGHTS).read_bytes()
    assert made.last("optimizer.safetensors").read_bytes() == calm.last("optimizer.safetensors").read_bytes()
    assert made.last(STATE).read_bytes() == calm.last(STATE).read_bytes()
    assert made.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]
    assert made.published()["outcome"]["evaluation"] == calm.published()["outcome"]["evaluation"]


def test_a_second_signal_in_the_midst_of_an_upload_damages_nothing(make_run: Any, rows: Any, tmp_path: Path) -> None:
    spec = {"training": {**FAST, "epochs": 2.0}, "checkpoint": {"every": {"steps": 4}}}
    calm = make_run(rows(120), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(120), name="ended", **spec)
    ended = paused(made, tmp_path / "work-ended", "in the midst of a second checkpoint's upload")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):  # the same one twice would come once
        ended.kill(number)
    assert ended.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert made.kinds() == ["claim", "checkpoint"]
    code, log = made.run(tmp_path / "work-last")
    assert code == 0, log
    assert "going on from the checkpoint of step 4" in log
    assert made.losses() == calm.losses()
    assert made.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]
    assert below_attempts(made) == needed(made)


def test_a_real_model_killed_in_training_ends_in_the_same_model(
    make_run: Any, rows: Any, minilm_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_dir / name, base / name)
    spec: dict[str, Any] = {
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "training": {"maxSteps": 6, "batchSize": 8, "microBatch": 4, "learningRate": 1e-3},
        "checkpoint": {"every": {"steps": 2}},
        "output": {"merge": True},
    }
    calm = make_run(rows(40), base=base, name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(40), base=base, name="killed", **spec)
    started = made.start(tmp_path / "work-first")
    wait_for_records(made, 2)
    started.kill(signal.SIGKILL)
    assert started.wait() == -9
    code, log = made.run(tmp_path / "work-second")
    assert code == 0, log
    assert "going on from the checkpoint of step" in log
    assert made.losses() == calm.losses()
    assert made.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]


def test_rows_of_half_weight_are_seen_every_other_epoch(make_run: Any, rows: Any, tmp_path: Path) -> None:
    texts, labels = rows(60, seed=9)
    extra = [{"text": f"{text} more", "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "extra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in extra))
    train = [
        {"uri": (tmp_path / "run/train.jsonl").as_uri()},
        {"uri": (tmp_path / "extra.jsonl").as_uri(), "weight": 0.5},
    ]
    made = make_run(rows(300), training={**FAST, "epochs": 2.0}, data={"train": train})
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    store = Encoded(tmp_path / "run/output" / made.record.encoded.key)
    plain, halved = np.bincount(store.values("source", store.rows(TRAIN)))[-2:]
    assert halved == 60
    assert made.message(tmp_path / "work").result.total_steps == 2 * math.ceil((plain + 30) / 16)


def test_nothing_is_ever_unpickled(make_run: Any, rows: Any, tmp_path: Path) -> None:
    made = make_run(rows(100), training=FAST, checkpoint={"every": {"steps": 3}})
    started = made.start(tmp_path / "first", audit=True)
    wait_for_records(made, 3)
    started.kill(signal.SIGTERM)
    assert started.wait() == 45, started.log
    code, log = made.run(tmp_path / "second", audit=True)
    assert code == 0, log
    assert "going on from the checkpoint" in log


REFUSING = """
import sys

def refuse(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickled {arguments}")

sys.addaudithook(refuse)
from pathlib import Path
from finetune_trainer import preflight

config, credentials, message, work = (Path(argument) for argument in sys.argv[1:])
sys.exit(preflight.main(config=config, credentials=credentials, message=message, work=work))
"""


def test_nothing_is_unpickled_by_preflight_and_two_ranks_with_lora_on_s3(
    rows: Any, tiny_base: Path, ranks: Any, s3_settings: StorageSettings, s3_bucket: str, tmp_path: Path, free_port: int
) -> None:
    store = open_store(f"s3://{s3_bucket}", s3_settings)
    for path in tiny_base.iterdir():
        store.upload(path, f"base/{path.name}")
    write(tmp_path / "train.jsonl", dictionaries(rows(100)))
    store.upload(tmp_path / "train.jsonl", "train.jsonl")
    spec = {
        "model": {"uri": f"{store.uri}/base"},
        "resources": {"perNode": {"gpus": 0}},
        "task": {"type": "text-classification"},
        "data": {"train": [{"uri": f"{store.uri}/train.jsonl"}], "validation": {"fraction": 0.2}},
        "method": {"type": "lora", "rank": 4},
        "training": {**FAST, "epochs": 2.0},
        "checkpoint": {"every": {"steps": 3}},
        "output": {"uri": f"{store.uri}/output"},
        "storage": {"endpoint": s3_settings.endpoint},
    }
    run = made(tmp_path, spec, ranks, s3_settings)
    files = [tmp_path / "config.json", s3_settings.credentials_dir, tmp_path / "message", tmp_path / "again"]
    command = [sys.executable, "-c", REFUSING, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # the hook stays in its process
    assert done.returncode == 0, done.stderr
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    stop = ("finetune_trainer.training", "Duties", "due", 5, signal.SIGTERM.value)
    for work, stopped, code in (("first", stop, 45), ("second", None, 0)):
        both = [
            run.start(tmp_path / work, audit=True, stop=stopped, RANK=str(rank), LOCAL_RANK=str(rank), **group)
            for rank in (0, 1)
        ]
        assert [started.wait() for started in both] == [code, code], "\n".join(started.log for started in both)
    assert "going on from the checkpoint of step 5" in both[0].log


def test_two_nodes_give_the_losses_of_one(make_run: Any, rows: Any, tmp_path: Path, free_port: int) -> None:
    """290 rows leave a last batch of 5, which is one micro-batch: rank 1 joins its reduction with nothing."""
    spec = {"training": {**FAST, "epochs": 2.0, "neftune": {"alpha": 5.0}, "ema": {"decay": 0.9}}}
    single = make_run(rows(290), name="single", **spec)
    assert single.run(tmp_path / "work-single")[0] == 0
    double = make_run(rows(290), name="double", **spec)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "1"}
    both = [double.start(tmp_path / f"work-{rank}", RANK=str(rank), LOCAL_RANK="0", **group) for rank in (0, 1)]
    assert [started.wait() for started in both] == [0, 0], "\n".join(started.log for started in both)
    assert (tmp_path / "work-1/runs").exists()
    assert not (tmp_path / "work-1/state/message.json").exists()
    assert len(single.losses()) == 34
    assert double.losses() == pytest.approx(single.losses(), rel=1e-5)
    assert double.records[0].body["numerics"]["worldSize"] == 2
    ours, theirs = (load_file(made.model() / "model.safetensors") for made in (double, single))
    for name in ours:
        assert abs(ours[name] - theirs[name]).max() < 1e-4


def test_a_stop_reaches_all_ranks_at_one_step(make_run: Any, rows: Any, tmp_path: Path, free_port: int) -> None:
    made = make_run(rows(300), training={**FAST, "epochs": 6.0}, checkpoint={"every": {"steps": 5}})
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    stop = ("finetune_trainer.training", "Duties", "due", 13, signal.SIGTERM.value)
    both = [
        made.start(tmp_path / "work", stop=stop if rank else None, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in (0, 1)
    ]
    assert [started.wait() for started in both] == [45, 45], "\n".join(started.log for started in both)
    last = made.records[-1]
    steps = [record.body["step"] for record in made.records if record.kind is RecordKind.CHECKPOINT]
    assert (last.kind, steps[-1]) == (RecordKind.CHECKPOINT, 13)
    assert len(steps) > 1
    assert steps == sorted(set(steps))
    names = [Path(entry["key"]).name for entry in last.body["objects"]]
    files = [file_name(name, rank=rank, ranks=2) for name in (WEIGHTS, OPTIMIZER) for rank in (0, 1)]
    assert sorted(names) == sorted([STATE, *files])
    assert {Path(entry["key"]).parent.name for entry in last.body["objects"]} == {"step-13"}
    code, log = made.run(tmp_path / "alone", OMP_NUM_THREADS="1")
    assert code == 0, log
    assert "NumericsChanged: worldSize was 2, is 1" in log
    assert "going on from the checkpoint of step 13" in log


def test_a_run_goes_on_with_another_number_of_processes_in_the_same_order(
    make_run: Any, rows: Any, tmp_path: Path, free_port: int
) -> None:
    """Two begin, three go on, one ends: the losses are those of one alone."""
    spec = {"training": {**FAST, "microBatch": 4}, "checkpoint": {"every": {"steps": 5}}}
    single = make_run(rows(300), name="single", **spec)
    assert single.run(tmp_path / "work-single")[0] == 0
    moved = make_run(rows(300), name="moved", **spec)
    for count, until in ((2, 3), (3, 6)):
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port + count)}
        group |= {"LOCAL_WORLD_SIZE": str(count)}
        work = tmp_path / f"work-{count}"
        all_of_them = [moved.start(work, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(count)]
        wait_for_records(moved, until)
        all_of_them[-1].kill(signal.SIGTERM)
        logs = "\n".join(started.log for started in all_of_them)
        assert [started.wait() for started in all_of_them] == [45] * count, logs
    code, log = moved.run(tmp_path / "work-1")
    assert code == 0, log
    assert "NumericsChanged: worldSize was 3, is 1" in log
    claims = [record.body["numerics"]["worldSize"] for record in moved.records if record.kind is RecordKind.CLAIM]
    assert claims == [2, 3, 1]
    assert moved.losses() == pytest.approx(single.losses(), rel=1e-5)


def test_a_newer_attempt_fences_the_older(make_run: Any, rows: Any, tmp_path: Path) -> None:
    made = make_run(rows(300), training={**FAST, "epochs": 50.0}, checkpoint={"every": {"steps": 2}})
    started = made.start(tmp_path / "work")
    wait_for_records(made, 3)
    RunLog(made.store, made.record.run_id).claim(holder=Holder(pod_uid="other"))
    assert started.wait() == 44, started.log
    message = made.message(tmp_path / "work")
    assert (message.reason, message.attempt) == ("Fenced", 1)
    assert "pod_uid other" in message.message


PAUSES = {
    "before a step": ("finetune_trainer.training", "Duties", "due", 13),
    "between an upload and its record": ("finetune_trainer.storage.commit", "RunLog", "put", 3),
    "before the base is loaded": ("finetune_trainer.attempt", "Attempt", "load", 1),
    "in an evaluation": ("finetune_trainer.storage.local", "LocalStore", "write", 1),
    "in the midst of an upload of the model": ("finetune_trainer.storage.local", "LocalStore", "upload", 3),
    "before the last file of the model is there": ("finetune_trainer.storage.local", "LocalStore", "_finish", 6),
    "before the report is written": ("finetune_trainer.storage.local", "LocalStore", "write", 1),
    "in the midst of a second checkpoint's upload": ("finetune_trainer.storage.local", "LocalStore", "upload", 5),
    "before it releases its model": ("finetune_trainer", "gates", "publish_current", 1),
    "when nothing but the swap is left": ("finetune_trainer.storage.local", "LocalStore", "replace", 1),
}
WRITES = ("finetune_trainer", "publish", "write_directory", 1)
"""Where all is measured."""


def paused(made: Any, work: Path, where: str) -> Any:
    """An attempt that has stopped itself there."""
    started = made.start(work, stop=(*PAUSES[where], signal.SIGSTOP.value))
    deadline = time.monotonic() + 60
    while Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return started


def held(made: Any) -> dict[str, bytes]:
    """Every object of the store."""
    return {info.key: made.store.read(info.key) for info in made.store.list()}


@pytest.mark.parametrize("done", [True, False], ids=["after the newer is done", "before its first checkpoint"])
@pytest.mark.parametrize("where", list(PAUSES)[:2])
def test_a_paused_attempt_that_goes_on_beside_a_newer_one_ends_with_44_and_leaves_nothing(
    make_run: Any, rows: Any, tmp_path: Path, where: str, done: bool
) -> None:
    made = make_run(rows(120), training=FAST, checkpoint={"every": {"steps": 4}})
    old = paused(made, tmp_path / "old", where)
    begun = {key for key in held(made) if key.startswith(f"runs/{made.record.run_id}/attempts/1/step-")}
    if done:
        code, log = made.run(tmp_path / "new")
        assert code == 0, log
    else:
        RunLog(made.store, made.record.run_id).claim(holder=Holder(pod_uid="newer"))
    before = held(made)
    old.kill(signal.SIGCONT)
    assert old.wait() == 44, old.log
    after = held(made)
    committed = {entry["key"] for record in made.records for entry in record.body.get("objects") or ()}
    orphans = begun - committed
    assert bool(orphans) is (where == "between an upload and its record")
    assert not (done and orphans & set(before))  # the newer has collected them
    assert after == {key: data for key, data in before.items() if key not in orphans}


@pytest.mark.parametrize("asked", [False, True], ids=["", "and is asked to stop"])
@pytest.mark.parametrize("where", list(PAUSES)[3:7])
def test_a_paused_attempt_that_publishes_after_a_newer_one_ends_with_44_and_leaves_nothing(
    make_run: Any, rows: Any, tmp_path: Path, where: str, asked: bool
) -> None:
    made = make_run(rows(120), training={**FAST, "epochs": 1.0})
    if where != "in an evaluation":
        assert made.run(tmp_path / "killed", stop=(*WRITES, signal.SIGKILL.value))[0] == -signal.SIGKILL
    old = paused(made, tmp_path / "old", where)
    code, log = made.run(tmp_path / "new")
    assert code == 0, log
    before = held(made)
    if asked:
        old.kill(signal.SIGTERM)
    old.kill(signal.SIGCONT)
    assert old.wait() == 44, old.log
    assert held(made) == before
    assert below_attempts(made) == needed(made)


@pytest.mark.parametrize("where", list(PAUSES)[8:])
def test_a_paused_attempt_releases_no_model_in_place_of_a_newer_one(
    make_run: Any, rows: Any, tmp_path: Path, where: str
) -> None:
    made = make_run(rows(60), training={**FAST, "epochs": 1.0})
    old = paused(made, tmp_path / "old", where)
    code, log = made.run(tmp_path / "new")
    assert code == 0, log
    publish_current(made.store, {"runId": "of a changed document", "model": "s3://another"})
    before = held(made)
    old.kill(signal.SIGCONT)
    assert old.wait() == 44, old.log
    assert held(made) == before


def needed(made: Any) -> set[str]:
    """Keys below the attempts that the log still needs: not those of checkpoints that were dropped."""
    live = live_checkpoints(made.records)
    passing = (RecordKind.CHECKPOINT, RecordKind.MEASURED)
    records = [record for record in made.records if record.kind not in passing or record in live]
    return {entry["key"] for record in records for entry in record.body.get("objects") or ()}


def below_attempts(made: Any) -> set[str]:
    return {info.key for info in made.store.list(f"runs/{made.record.run_id}/attempts/")}


def test_a_run_of_seconds_keeps_as_many_checkpoints_as_it_was_asked_to(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(rows(120), training=FAST, checkpoint={"every": {"steps": 4}})
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    assert made.kinds().count("checkpoint") > 4
    assert len(live_checkpoints(made.records)) <= 3  # two, and the best one
    assert below_attempts(made) == needed(made)


def test_nothing_is_left_of_an_attempt_that_was_killed_while_it_published(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(rows(120), training=FAST, checkpoint={"every": {"steps": 4}})
    # The third is the report, after two of outcomes: all of the model is there, and no record of it.
    stop = ("finetune_trainer.storage.local", "LocalStore", "write", 3, signal.SIGKILL.value)
    assert made.run(tmp_path / "killed", stop=stop)[0] == -signal.SIGKILL
    torn = {key for key in below_attempts(made) if "/attempts/1/model/" in key}
    assert torn
    assert made.kinds()[-1] == "evaluated"
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    assert made.kinds()[-1] == "published"
    assert made.kinds().count("trained") == 1
    assert below_attempts(made) == needed(made)
    assert not torn & below_attempts(made)


def test_an_attempt_that_loads_what_a_newer_one_has_deleted_says_that_it_was_superseded(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(rows(120), training=FAST, checkpoint={"every": {"steps": 4}})
    stop = ("finetune_trainer.storage.commit", "RunLog", "put", 4, signal.SIGKILL.value)
    assert made.run(tmp_path / "killed", stop=stop)[0] == -signal.SIGKILL
    old = paused(made, tmp_path / "old", "before the base is loaded")
    code, log = made.run(tmp_path / "new")
    assert code == 0, log
    before = held(made)
    assert not any("/attempts/1/" in key for key in before)
    old.kill(signal.SIGCONT)
    assert old.wait() == 44, old.log
    assert held(made) == before


def test_a_damaged_checkpoint_is_passed_over(make_run: Any, rows: Any, tmp_path: Path) -> None:
    spec = {"training": FAST, "checkpoint": {"every": {"steps": 5}}}
    made = make_run(rows(200), **spec)
    started = made.start(tmp_path / "first")
    wait_for_records(made, 5)
    started.kill(signal.SIGKILL)
    started.wait()
    newest, before = live_checkpoints(made.records)[:2]
    weights = made.last(WEIGHTS)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    code, log = made.run(tmp_path / "second")
    assert code == 0, log
    assert f"the checkpoint of step {newest.body['step']} is passed over" in log
    assert f"going on from the checkpoint of step {before.body['step']}" in log


def test_a_damaged_checkpoint_that_was_passed_over_is_not_kept_in_place_of_a_whole_one(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(rows(200), training=FAST, checkpoint={"every": {"steps": 5}, "keepLast": 2})
    kept, codes = [], []
    for name, count in (("first", 4), ("second", 3)):  # each is killed before the record of one checkpoint more
        stop = ("finetune_trainer.storage.commit", "RunLog", "put", count, signal.SIGKILL.value)
        codes.append(made.run(tmp_path / name, stop=stop)[0])
        kept.append([record.body["step"] for record in live_checkpoints(made.records)])
        weights = made.last(WEIGHTS)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert codes == [-9, -9]
    assert kept == [[10, 5], [10, 5]]
    code, log = made.run(tmp_path / "third")
    assert code == 0, log
    assert "going on from the checkpoint of step 5" in log


def test_an_infinite_loss_ends_the_run_and_names_the_step(
    make_run: Any, rows: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["pooler.dense.weight"] = tensors["pooler.dense.weight"] * float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    made = make_run(rows(100), base=base, training=FAST)
    code, log = made.run(tmp_path / "work")
    assert code == 47, log
    message = made.message(tmp_path / "work")
    assert message.reason == "Diverged"
    assert "the loss of step 1 is NaN or infinite" in message.message
    assert "trying once more" in log
    assert made.kinds() == ["claim"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_divergence_is_tried_once_more_from_the_last_checkpoint(
    make_run: Any, rows: Any, tmp_path: Path, times: int
) -> None:
    """As after a bit that flipped in a GPU: the second try ends like a run without it, or the run ends."""
    spec = {"training": {**FAST, "maxSteps": 12, "epochs": None}, "checkpoint": {"every": {"steps": 4}}}
    calm = make_run(rows(200), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(200), name="lost", **spec)
    code, log = made.run(tmp_path / "work", NAN_AT=f"10,{times}")
    assert "the loss of step 10 is NaN or infinite" in log
    assert "going on from the checkpoint of step 8" in log
    assert made.kinds().count("claim") == 1
    message = made.message(tmp_path / "work")
    if times == 2:
        assert (code, message.reason, message.step) == (47, "Diverged", 8)
        assert made.kinds()[-1] == "checkpoint", "what was committed before stays"
        return
    assert code == 0, log
    assert message.resumed_from_step is None, "the attempt itself began at the beginning"
    for name in (WEIGHTS, OPTIMIZER, STATE):
        assert made.last(name).read_bytes() == calm.last(name).read_bytes()
    assert made.published()["outcome"]["model"]["digest"] == calm.published()["outcome"]["model"]["digest"]


def test_changed_inputs_are_refused_and_named(make_run: Any, rows: Any, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    made = make_run(rows(100), base=base, training=FAST)
    config = base / "config.json"
    config.write_text(config.read_text() + " ")
    assert made.run(tmp_path / "work")[0] == 42
    message = made.message(tmp_path / "work")
    assert message.reason == "InputChanged"
    assert f"{base.as_uri()}/config.json" in message.message
    config.unlink()
    assert made.run(tmp_path / "work2")[0] == 49
    assert made.message(tmp_path / "work2").reason == "ObjectNotFound"


def test_an_attempt_after_one_killed_for_its_memory_halves_the_micro_batch(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(rows(100), training={**FAST, "microBatch": 8}, checkpoint={"every": {"steps": 3}})
    started = made.start(tmp_path / "killed")
    wait_for_records(made, 2)
    started.kill(signal.SIGKILL)
    started.wait()
    code, log = made.run(tmp_path / "halved", options=["--halve-micro-batch"])
    assert code == 0, log
    claims = [record.body["numerics"]["microBatch"] for record in made.records if record.kind is RecordKind.CLAIM]
    assert claims == [8, 4]
    assert "ran out of memory: micro-batches have 4 rows now" in log


def test_runs_with_the_same_base_share_its_download(make_run: Any, rows: Any, tiny_base: Path, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    spec = {"base": tiny_base, "training": {**FAST, "epochs": 0.5}}
    first, second = make_run(rows(100), name="first", **spec), make_run(rows(120), name="second", **spec)
    code, log = first.run(tmp_path / "work-1", options=cache)
    assert code == 0, log
    assert "is downloaded into the cache" in log
    code, log = second.run(tmp_path / "work-2", options=cache)
    assert code == 0, log
    assert "is in the cache" in log
    base = tmp_path / "work-2/runs" / second.record.run_id / "base"
    assert all(path.is_symlink() for path in base.iterdir()), "also when all is done, evaluation and publication too"
    assert "downloaded" not in log

    alone = make_run(rows(140), name="alone", **spec)
    broken = tmp_path / "file"
    broken.write_text("")
    code, log = alone.run(tmp_path / "work-3", options=["--cache", str(broken)])
    assert code == 0, log
    assert "cannot be used (" in log


def test_a_model_that_needs_code_of_its_own_is_refused(
    make_run: Any, rows: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text("raise SystemExit('ran foreign code')\n")
    made = make_run(rows(100), base=base, training=FAST)
    assert made.run(tmp_path / "work")[0] == 42
    message = made.message(tmp_path / "work")
    assert message.reason == "InvalidModel"
    assert "code from model directories is never run" in message.message


def test_early_stopping_ends_the_run_and_the_best_weights_are_published(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    made = make_run(
        rows(200),
        training={**FAST, "epochs": 9.0, "earlyStopping": {"patience": 2, "minDelta": 5.0}},
        evaluation={"primary": "loss"},
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    body = made.published()
    assert body["end"] == "early-stopped"
    best = body["outcome"]["best"]
    assert (best["step"], body["outcome"]["finalStep"], body["outcome"]["totalSteps"]) == (12, 36, 108)
    assert body["outcome"]["evaluation"]["tuned"]["loss"] == pytest.approx(best["value"], abs=1e-6)


def test_a_run_that_was_killed_when_it_had_stopped_early_trains_no_further(
    make_run: Any, rows: Any, tmp_path: Path
) -> None:
    spec = {
        "training": {**FAST, "epochs": 9.0, "earlyStopping": {"patience": 1, "minDelta": 5.0}},
        "evaluation": {"primary": "loss"},
    }
    calm = make_run(rows(100), name="calm", **spec)
    assert calm.run(tmp_path / "work-calm")[0] == 0
    made = make_run(rows(100), name="killed", **spec)
    stop = ("finetune_trainer", "training", "_trained", 1, signal.SIGKILL.value)
    assert made.run(tmp_path / "work-killed", stop=stop)[0] == -signal.SIGKILL
    assert json.loads(made.last(STATE).read_bytes())["stoppedEarly"]
    assert "trained" not in made.kinds()
    code, log = made.run(tmp_path / "work-last")
    assert code == 0, log
    assert made.kinds()[made.kinds().index("trained") - 1] == "claim", "no step is done, and nothing committed again"
    assert made.losses() == calm.losses()
    ours, theirs = (run.published() for run in (made, calm))
    assert ours["end"] == theirs["end"] == "early-stopped"
    assert ours["outcome"]["model"]["digest"] == theirs["outcome"]["model"]["digest"]


def test_several_labels_a_row(make_run: Any, rows: Any, tmp_path: Path) -> None:
    texts, labels = rows(200)
    several = [[label, "long"] if len(text.split()) > 7 else [label] for text, label in zip(texts, labels, strict=True)]
    made = make_run((texts, several), training={**FAST, "precision": "bf16"})
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    config = json.loads((made.model() / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    evaluation = made.published()["outcome"]["evaluation"]
    assert set(evaluation["probe"]) == set(evaluation["tuned"])


def test_another_form_of_publication_trains_nothing(make_run: Any, rows: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    spec: dict[str, Any] = {"method": {"type": "lora", "rank": 4}, "training": FAST}
    made = make_run(rows(200), **spec)
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    adapter = made.model()
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in adapter.iterdir()
    }
    assert "library_name: peft" in (adapter / "README.md").read_text()
    names = set(load_file(made.last(WEIGHTS)))
    assert any("classifier" in name for name in names)
    assert not any(".base_layer." in name for name in names)

    merging = made.config.model_copy(update={"output": made.config.output.model_copy(update={"merge": True})})
    made.config_path.write_text(merging.model_dump_json(by_alias=True))
    code, log = made.run(tmp_path / "work2")
    assert code == 0, log
    assert made.kinds()[-3:] == ["published", "claim", "published"]
    merged = Path(made.records[-1].body["outcome"]["model"]["uri"].removeprefix("file://"))
    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(made.config.model.removeprefix("file://"), config=config)
    ids = torch.tensor([[2, 10, 11, 12, 3]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
        plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, plain, atol=1e-4, rtol=0)


def test_a_run_of_the_head_commits_the_head_alone(make_run: Any, rows: Any, tmp_path: Path) -> None:
    made = make_run(
        rows(200), method={"type": "head"}, training={**FAST, "learningRate": 1e-1}, output={"weights": "Last"}
    )
    code, log = made.run(tmp_path / "work")
    assert code == 0, log
    assert set(load_file(made.last(WEIGHTS))) == {"classifier.weight", "classifier.bias"}
    assert (tmp_path / "work/features.npy").exists()
    assert sum(made.losses()[-12:]) < 0.99 * sum(made.losses()[:12])
    # In training it was measured on cached features, at the end by the whole model.
    cached = json.loads(made.last(STATE).read_bytes())["evaluations"][-1]["metrics"]
    (evaluated,) = [record.body for record in made.records if record.kind is RecordKind.EVALUATED]
    assert cached == pytest.approx(evaluated["metrics"], abs=1e-5)
    assert {record.kind for record in made.records} == set(RecordKind) - {RecordKind.RETENTION, RecordKind.MEASURED}
