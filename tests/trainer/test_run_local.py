"""`finetune run` and the rest of the command line, as processes of their own."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hack.seaweed import serve
from tests.storage.network import authority
from tests.trainer.conftest import Cage
from tests.trainer.memory import config_of

from finetune_api.contract import ExitCode, LastMessage, Progress
from finetune_api.status import FineTuneJobStatus, PreflightStatus, RowCounts
from finetune_trainer.local import _STARVED, _read_message, _Tries, describe, describe_rows
from finetune_trainer.telemetry import read_progress

FINETUNE = [sys.executable, "-m", "finetune_trainer"]
WORDS = {
    "sea": ["wave", "tide", "harbour", "sail", "anchor", "whale", "salt", "island", "captain", "storm"],
    "kitchen": ["oven", "spoon", "recipe", "butter", "pepper", "soup", "bake", "knife", "onion", "plate"],
    "sky": ["cloud", "star", "moon", "orbit", "comet", "planet", "eclipse", "telescope", "meteor", "galaxy"],
}


def rows(count: int = 300) -> list[dict[str, str]]:
    """Sentences whose words tell their label."""
    found = []
    for number in range(count):
        label = sorted(WORDS)[number % 3]
        words = WORDS[label]
        chosen = [words[(number * k + k) % 10] for k in (1, 3, 7)]
        found.append({"text": f"note {number}: the {chosen[0]} and the {chosen[1]} by the {chosen[2]}", "label": label})
    return found


@pytest.fixture
def document(tmp_path: Path, minilm_dir: Path) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "notes"},
        "spec": {
            "task": {"type": "text-classification"},
            "model": {"uri": minilm_dir.as_uri()},
            "data": {
                "train": [{"uri": (tmp_path / "train.jsonl").as_uri()}],
                "validation": {"fraction": 0.2},
                "maxLength": 16,
            },
            "training": {
                "maxSteps": 40,
                "batchSize": 8,
                "learningRate": 0.003,
                "evaluateEvery": {"steps": 40},
            },
            "method": {"type": "lora", "rank": 4},
            "checkpoint": {"every": {"steps": 5}},
            "resources": {"perNode": {"gpus": 0}},
            "output": {"uri": (tmp_path / "output").as_uri(), "merge": True},
        },
    }


class Run:
    """`finetune run` on a document, its progress lines and its status."""

    def __init__(
        self, directory: Path, document: dict[str, Any] | str, *options: str, cage: Cage | None = None
    ) -> None:
        self.work = directory / "work"
        text = document if isinstance(document, str) else json.dumps(document)
        (directory / "job.yaml").write_text(text)
        self.error_file = open(directory / "stderr", "w+")  # noqa: SIM115
        command = [*FINETUNE, "run", str(directory / "job.yaml"), "--work", str(self.work), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = cage.around(command) if cage is not None else command
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.error_file, text=True, env=environment
        )

    def until(self, reached: Callable[[Progress], bool]) -> Progress:
        until = time.monotonic() + 120
        while True:
            found = next(self.work.glob("scratch-*/state/progress.json"), Path("none"))
            progress = read_progress(found)
            if progress is not None and progress.stage == "Training" and reached(progress):
                return progress
            assert self.process.poll() is None, self.errors()
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self) -> tuple[int, FineTuneJobStatus]:
        out, _ = self.process.communicate(timeout=180)
        status = FineTuneJobStatus.model_validate_json(json.dumps(yaml.safe_load(out)))
        return self.process.returncode, status

    def errors(self) -> str:
        self.error_file.seek(0)
        return self.error_file.read()


@contextmanager
def running(directory: Path, document: dict[str, Any] | str, *options: str, cage: Cage | None = None) -> Iterator[Run]:
    run = Run(directory, document, *options, cage=cage)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.communicate(timeout=60)
        run.error_file.close()


def ranks_of(work: Path) -> list[int]:
    """Process ids of the ranks of a run."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                arguments = (directory / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"finetune_trainer.rank" in arguments and str(work).encode() in b" ".join(arguments):
                found.append(int(directory.name))
    return found


@pytest.mark.long
def test_a_run_that_is_killed_and_stopped_still_ends_in_a_published_model(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    with running(tmp_path, document) as run:
        run.until(lambda progress: progress.checkpoint is not None)
        for pid in ranks_of(run.work):
            os.kill(pid, signal.SIGKILL)
        resumed = run.until(lambda progress: progress.resumed_from_step is not None)
        assert resumed.resumed_from_step is not None
        assert resumed.resumed_from_step >= 5
        run.process.send_signal(signal.SIGINT)
        code, status = run.end()
        assert "failed (Killed): Rank 0 was ended by SIGKILL" in run.errors()
    assert (code, status.phase) == (ExitCode.STOPPED, "Suspended")
    assert status.usage is not None
    assert status.usage.attempts == 2
    assert status.checkpoint is not None
    stopped_at = status.checkpoint.step
    sentence = f"stopped after a committed checkpoint at step {stopped_at}; run the same command to go on"
    assert status.message == sentence

    with running(tmp_path, document) as run:
        code, status = run.end()
        assert f"going on from step {stopped_at}" in run.errors()
    assert (code, status.phase) == (0, "Succeeded")
    assert status.evaluation is not None
    tuned, majority = status.evaluation.tuned or {}, status.evaluation.trivial or {}
    assert tuned["accuracy"] > majority["accuracy"] + 0.2
    assert status.evaluation.probe is not None
    assert status.model is not None
    model = Path(status.model.uri.removeprefix("file://"))
    assert (model / "model.safetensors").is_file()

    assert status.preflight is not None
    assert status.progress is not None
    assert status.preflight.steps == status.progress.total_steps
    assert status.preflight.predicted_memory is not None
    assert status.model.report_uri is not None
    report = Path(status.model.report_uri.removeprefix("file://")).read_text()
    assert f"<dt>memory predicted</dt><dd>{status.preflight.predicted_memory} of a pod</dd>" in report

    assert not list(run.work.glob("scratch-*")), "downloads are gone, the log stays"
    assert (run.work / "logs/train-1.log").is_file()

    began = time.monotonic()
    with running(tmp_path, document) as run:
        code, again = run.end()
    assert (code, again.phase, again.model) == (0, "Succeeded", status.model)
    assert again.conditions is not None
    assert again.conditions[0].reason == "Reused"
    assert again.usage is None
    assert time.monotonic() - began < 20


# Fills a cgroup until the kernel kills a process in it.
GLUTTON = """
import sys, time
from finetune_trainer import oom
before, eaten = oom.kills(), []
while oom.kills() == before:
    eaten.append(b"x" * (8 << 20))
    time.sleep(0.01)
"""


@pytest.mark.long
def test_an_attempt_that_the_kernel_kills_for_memory_is_not_counted_and_the_next_halves_the_micro_batch(
    tmp_path: Path, document: dict[str, Any], cage: Callable[[int], Cage]
) -> None:
    document["spec"]["retries"] = {"max": 0}
    document["spec"]["training"]["maxSteps"] = 20_000  # it does not end before it is told to
    full = cage(2 << 30)
    with running(tmp_path, document, cage=full) as run:
        run.until(lambda progress: progress.checkpoint is not None)
        for pid in ranks_of(run.work):
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # which process the kernel takes is its own affair
        subprocess.run(full.around([sys.executable, "-c", GLUTTON]), check=True, timeout=60)
        run.until(lambda progress: progress.resumed_from_step is not None)
        run.process.send_signal(signal.SIGINT)
        code, status = run.end()
        told = "Attempt 1 ran out of memory, which is not counted (HostOutOfMemory): Rank 0 was killed by the kernel"
        assert told in run.errors()
    assert (code, status.phase) == (ExitCode.STOPPED, "Suspended")
    assert "micro-batches have 4 rows now" in (run.work / "logs/train-2.log").read_text()


def tries(batch_size: int, *, retries: int = 2) -> _Tries:
    config = config_of(training={"batchSize": batch_size}, retries={"max": retries})
    return _Tries(config, committed=0)


def ending(code: int, *, step: int = 0) -> LastMessage:
    return LastMessage(code=code, reason="Reason", message="So it is.", step=step)


def test_memory_is_tried_again_as_often_as_micro_batches_can_be_halved_and_once_more() -> None:
    ours = tries(8, retries=0)
    delays = [ours.after(ending(ExitCode.MEMORY), None) for _ in range(5)]
    assert delays == [0, 1, 2, 4, None]
    assert ours.arguments == ("--halve-micro-batch",)
    said = "5 attempts in a row ran out of memory without one more committed step, the last: So it is."
    assert ours.given_up(ending(ExitCode.MEMORY)).message == said


def test_memory_is_never_the_end_while_steps_are_won() -> None:
    ours = tries(1, retries=0)
    assert [ours.after(ending(ExitCode.MEMORY, step=step), None) for step in range(1, 40)] == [0] * 39


def test_crashes_are_counted_whatever_memory_did_in_between() -> None:
    ours = tries(64)
    codes = [1, ExitCode.MEMORY, 1, ExitCode.MEMORY, 137]
    assert [ours.after(ending(code), None) for code in codes] == [1, 0, 2, 1, None]
    assert ours.arguments == (), "what crashes says nothing of memory"
    assert ours.given_up(ending(137)).message == "So it is."


@pytest.mark.parametrize("command", ["preflight", "train"])
def test_a_process_that_the_kernel_kills_for_memory_is_told_with_what_helps(tmp_path: Path, command: str) -> None:
    """A supervisor or a preflight, which can leave no message."""
    none, log = tmp_path / "message", tmp_path / "log"
    last = _read_message(none, -signal.SIGKILL, log, stopped=0, starved=_STARVED[command])
    assert (last.code, last.reason) == (ExitCode.MEMORY, "HostOutOfMemory")
    assert last.message == f"The process was killed by the kernel because memory was used up: {_STARVED[command]}."
    assert "close other programs" in last.message
    by_hand = _read_message(none, -signal.SIGKILL, log, stopped=0)
    assert (by_hand.code, by_hand.reason) == (137, "Crashed")


def test_a_model_below_a_long_address_is_found_again(tmp_path: Path, document: dict[str, Any]) -> None:
    """What preflight says of it has no room for all that it found: an attempt finds out again."""
    document["spec"]["training"] = {"maxSteps": 4, "batchSize": 8}
    del document["spec"]["checkpoint"]
    document["spec"]["output"] = {"uri": (tmp_path / ("ж" * 70) / ("ж" * 70)).as_uri()}
    models = []
    for _ in range(2):
        with running(tmp_path, document) as run:
            code, status = run.end()
        assert (code, status.phase) == (0, "Succeeded")
        assert status.model is not None
        models.append(status.model.digest)
    assert len(set(models)) == 1


def test_bad_data_ends_with_the_sentence_and_no_training(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "x"}\n')
    with running(tmp_path, document) as run:
        code, status = run.end()
        assert "no column 'text'; columns found: body" in run.errors()
    assert (code, status.phase) == (ExitCode.INVALID, "Failed")
    assert status.conditions is not None
    assert status.conditions[0].reason == "ColumnMissing"
    assert not list((run.work / "logs").glob("train*"))


def test_s3_is_reached_with_the_credentials_of_the_environment(
    tmp_path: Path, document: dict[str, Any], s3_server: Any, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = s3_server.client()
    client.put_object(Bucket=s3_bucket, Key="train.jsonl", Body=b'{"text": "a", "label": "x"}\n')
    document["spec"]["data"]["train"] = [{"uri": f"s3://{s3_bucket}/train.jsonl"}]
    document["spec"]["output"]["uri"] = f"s3://{s3_bucket}/output"
    document["spec"]["storage"] = {"endpoint": s3_server.endpoint}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", (s3_server.admin / "AWS_ACCESS_KEY_ID").read_text())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-wrong-wrong")
    with running(tmp_path, document) as run:
        code, status = run.end()
        assert "wrong-wrong-wrong" not in run.errors()
    assert (code, status.phase) == (ExitCode.STORAGE, "Failed")
    assert status.conditions is not None
    assert status.conditions[0].reason == "InvalidCredentials"
    with running(tmp_path, document, "--credentials", str(s3_server.admin)) as run:
        code, status = run.end()
    assert code == ExitCode.INVALID
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", (s3_server.admin / "AWS_SECRET_ACCESS_KEY").read_text())
    with running(tmp_path, document) as run:
        code, status = run.end()
    assert (code, status.phase) == (ExitCode.INVALID, "Failed")
    assert status.message is not None
    assert status.message.startswith("Of 1 rows none is left for")


def test_outside_a_cluster_the_sdks_variable_stands_for_the_config_map_of_the_authority(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in ("authority", "server"):
        (tmp_path / directory).mkdir()
    ca = authority(tmp_path / "authority")
    with serve(tmp_path / "server", ca.tls) as server:
        client = server.client()
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="train.jsonl", Body=b'{"text": "a", "label": "x"}\n')
        document["spec"]["data"]["train"] = [{"uri": "s3://bucket/train.jsonl"}]
        document["spec"]["output"]["uri"] = "s3://bucket/output"
        document["spec"]["storage"] = {"endpoint": server.secure, "caConfigMap": "company-ca"}
        with running(tmp_path, document, "--credentials", str(server.admin)) as run:
            code, status = run.end()
        assert status.conditions is not None
        assert (code, status.conditions[0].reason) == (ExitCode.STORAGE, "CertificateNotTrusted")
        assert "outside a cluster AWS_CA_BUNDLE names the file" in (status.message or "")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(ca.ca_file))
        with running(tmp_path, document, "--credentials", str(server.admin)) as run:
            code, status = run.end()
    assert code == ExitCode.INVALID
    assert (status.message or "").startswith("Of 1 rows none is left for")


def test_an_invalid_document_lists_every_problem_with_its_line(tmp_path: Path, document: dict[str, Any]) -> None:
    document["spec"]["training"] |= {"learningRate": -1, "epochs": 2}
    document["spec"]["colour"] = "red"
    with running(tmp_path, yaml.safe_dump(document)) as run:
        out, _ = run.process.communicate(timeout=60)
        errors = run.errors()
    assert run.process.returncode == ExitCode.INVALID
    assert out == ""
    for part in ("spec.training.learningRate", "epochs and maxSteps", "spec.colour", "job.yaml:"):
        assert part in errors
    assert "Traceback" not in errors


def test_a_relative_file_address_is_refused_with_the_absolute_one(tmp_path: Path, document: dict[str, Any]) -> None:
    document["spec"]["data"]["train"] = [{"uri": "file://data/train.jsonl"}]
    with running(tmp_path, document) as run:
        run.process.communicate(timeout=60)
        errors = run.errors()
    assert run.process.returncode == ExitCode.INVALID
    assert "spec.data.train[0].uri: file://data/train.jsonl is relative" in errors
    assert f"write {(Path.cwd() / 'data/train.jsonl').as_uri()}" in errors


def test_one_document_is_run_once_at_a_time(tmp_path: Path, document: dict[str, Any]) -> None:
    with running(tmp_path, document) as run:
        until = time.monotonic() + 60
        while not (run.work / "config.json").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        command = [*FINETUNE, "run", str(tmp_path / "job.yaml"), "--work", str(run.work)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        run.process.send_signal(signal.SIGINT)
        code, status = run.end()
    assert second.returncode == 1
    assert f"Process {run.process.pid} runs this document already" in second.stderr
    assert (code, status.phase) == (ExitCode.STOPPED, "Suspended")
    assert status.message == "stopped before training; run the same command to go on"


def test_a_terminal_sees_one_line_that_is_redrawn(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "job.yaml").write_text(json.dumps(document))
    ours, theirs = pty.openpty()
    command = [*FINETUNE, "run", str(tmp_path / "job.yaml"), "--work", str(tmp_path / "work")]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment, timeout=60, check=False
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == ExitCode.INVALID
    assert shown.startswith("\r\x1b[KPreflight  reading model and data\r\x1b[K")
    assert "the file is empty" in shown


def test_progress_is_told_in_a_line() -> None:
    end = (datetime.now(UTC) + timedelta(minutes=14, seconds=5)).isoformat()
    progress = Progress(
        run_id="r",
        stage="Training",
        step=410,
        total_steps=1200,
        loss=0.3111,
        samples_per_second=212.4,
        estimated_completion_time=end,
        started_at="",
        updated_at="",
    )
    text = "step 410 of 1200  34 %  loss 0.311  212 rows/s  about 14 min left"
    assert describe(progress, width=0) == f"Training   {text}"
    wide = describe(progress, width=110)
    assert wide.endswith(text)
    assert wide.count("█") == 10
    assert wide.count("█") + wide.count("░") == 30
    assert describe(progress, width=0, stopping=True).startswith("Stopping   step 410 of 1200")
    assert describe(progress.model_copy(update={"stage": "Evaluating"}), width=80) == "Evaluating step 410 of 1200"


def test_rows_are_told_with_what_there_is_of_them() -> None:
    counts = RowCounts(train=90, validation=10)
    assert describe_rows(PreflightStatus(rows=counts)) == "90 training rows, 10 validation"
    more = PreflightStatus(rows=counts.model_copy(update={"test": 5}), labels=3)
    assert describe_rows(more) == "90 training rows, 10 validation, 5 test, 3 labels"
    told = PreflightStatus(rows=counts, steps=9, predicted_memory="1.2Gi")
    assert describe_rows(told) == "90 training rows, 10 validation, 9 steps, about 1.2Gi of memory"


def test_without_arguments_the_help_is_shown() -> None:
    shown = subprocess.run(FINETUNE, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0
    for word in ("validate", "run", "advise", "preflight", "train", "exit codes"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("command", "forbidden"),
    [
        ("from finetune_trainer.__main__ import main; main(['validate', '/dev/null'])", {"numpy", "torch", "botocore"}),
        ("import finetune_trainer.supervisor", {"torch", "transformers", "botocore"}),
        ("import finetune_trainer.preflight, finetune_trainer.local", {"torch", "transformers", "sklearn"}),
        ("import finetune_trainer.advise", {"torch", "transformers", "sklearn"}),
        ("import finetune_trainer.where", {"torch", "transformers", "sklearn", "botocore"}),
    ],
)
def test_a_command_imports_only_what_it_needs(command: str, forbidden: set[str]) -> None:
    code = f"{command}; import sys, json; print(json.dumps(sorted({forbidden!r} & sys.modules.keys())))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(shown.stdout.splitlines()[-1]) == []


def test_the_pods_command_lines_are_understood(tmp_path: Path, document: dict[str, Any]) -> None:
    """As the operator writes them; without a config both say so in one sentence."""
    common = ["--config", str(tmp_path / "none.json"), "--message", str(tmp_path / "message"), "--work", str(tmp_path)]
    for command in (["preflight", *common], ["train", *common, "--run-id", "0123456789abcdef"]):
        done = subprocess.run([*FINETUNE, *command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == ExitCode.INVALID
        assert json.loads((tmp_path / "message").read_text())["reason"] == "InvalidConfig"
        assert "Traceback" not in done.stderr
        (tmp_path / "message").unlink()
