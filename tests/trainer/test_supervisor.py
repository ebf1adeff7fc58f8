"""The supervisor with small scripts in place of ranks: signals, the watchdog, exit codes, the last message."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.conftest import Cage

from finetune_api.contract import Checkpointed, ExitCode, LastMessage, Progress
from finetune_api.status import BestCheckpoint
from finetune_trainer import __main__ as command_line
from finetune_trainer import lastmessage, oom, supervisor, telemetry
from finetune_trainer.supervisor import memory_note_key, visible_gpus

# Runs supervise() as a process of its own, as in a pod: command, ranks, state directory, limits.
DRIVER = """
import json, sys
from pathlib import Path
from finetune_trainer.supervisor import Limits, World, supervise
rank, ranks, state, limits = sys.argv[1:]
world = World(ranks=int(ranks), nodes=1, node=0, master="127.0.0.1", port=1)
patience = Limits(**json.loads(limits))
last = supervise([sys.executable, rank], world=world, state=Path(state), run_id="r", limits=patience)
print(last.model_dump_json(by_alias=True))
sys.exit(last.code)
"""

PRELUDE = """
import faulthandler, json, os, signal, sys, time
from pathlib import Path
STATE = Path({state!r})
RANK = int(os.environ["RANK"])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: os._exit(143) if stopped else stopped.append(1))
faulthandler.register(signal.SIGUSR1, all_threads=True)
def beat(): (STATE / f"beat-{{RANK}}").touch()
def progress(stage="Training", step=1):
    document = dict(runId="r", attempt=3, stage=stage, step=step, totalSteps=9, startedAt="x", updatedAt="x",
                    checkpoint=dict(step=4, uri="file:///c", committedAt="2026-01-01T00:00:00+00:00"))
    new = STATE / f"tmp-{{RANK}}"; new.write_text(json.dumps(document)); new.rename(STATE / "progress.json")
def message(code, reason, text):
    (STATE / "message.json").write_text(json.dumps(dict(code=code, reason=reason, message=text)))
def work(seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopped:
        beat(); time.sleep(0.02)
beat(); (STATE / f"ready-{{RANK}}").touch()
"""


class Supervised:
    """A supervisor process over fake ranks."""

    def __init__(
        self, directory: Path, script: str, *, ranks: int = 1, cage: Cage | None = None, **limits: float
    ) -> None:
        self.state = directory / "state"
        self.state.mkdir()
        self.ranks = ranks
        rank = directory / "rank.py"
        rank.write_text(PRELUDE.format(state=str(self.state)) + textwrap.dedent(script))
        (directory / "driver.py").write_text(DRIVER)
        command = [sys.executable, str(directory / "driver.py"), str(rank), str(ranks), str(self.state)]
        command.append(json.dumps(limits))
        self.process = subprocess.Popen(
            cage.around(command) if cage is not None else command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> "Supervised":
        until = time.monotonic() + 20
        while not all((self.state / f"ready-{rank}").exists() for rank in range(self.ranks)):
            assert time.monotonic() < until
            time.sleep(0.02)
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> LastMessage:
        out, self.errors = self.process.communicate(timeout=30)
        last = LastMessage.model_validate_json(out.splitlines()[-1])
        assert last.code == self.process.returncode
        return last


Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Any:
    started: list[Supervised] = []

    def begin(script: str, **options: Any) -> Supervised:
        started.append(Supervised(tmp_path, script, **options))
        return started[-1]

    yield begin
    for supervised in started:
        if supervised.process.poll() is None:
            supervised.process.kill()
            supervised.process.wait()


def test_a_good_end_passes_on_what_rank_0_says(start: Start) -> None:
    last = start("message(0, 'Completed', 'Trained 9 steps.') if RANK == 0 else work(0.2)", ranks=2).end()
    assert (last.code, last.reason, last.message) == (0, "Completed", "Trained 9 steps.")


def test_the_most_specific_code_wins_over_crashes(start: Start) -> None:
    last = start("sys.exit(47) if RANK == 1 else (time.sleep(0.3), sys.exit(1))", ranks=2).end()
    assert last.code == ExitCode.DIVERGED
    assert last.message.startswith("Rank 1 ended with code 47")


def test_a_message_that_belongs_to_another_end_is_not_believed(start: Start) -> None:
    last = start("message(0, 'Completed', 'all well'); os.kill(os.getpid(), signal.SIGSEGV)").end()
    assert (last.code, last.reason) == (128 + signal.SIGSEGV, "Killed")
    assert "Rank 0 was ended by SIGSEGV" in last.message


def test_when_one_rank_crashes_the_others_are_ended_after_a_grace(start: Start) -> None:
    began = time.monotonic()
    last = start("sys.exit(3) if RANK == 1 else [time.sleep(0.1) for _ in range(600)]", ranks=2, grace=0.5).end()
    assert (last.code, last.reason) == (3, "Crashed")
    assert last.message.startswith("Rank 1 ended with code 3")
    assert time.monotonic() - began < 15


def test_a_rank_that_stops_because_another_failed_does_not_hide_the_failure(start: Start) -> None:
    last = start("time.sleep(0.2), sys.exit(7) if RANK == 1 else (work(), sys.exit(45))", ranks=2).end()
    assert last.code == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_ends_in_a_commit(start: Start, number: int) -> None:
    script = """
        work()
        (STATE / f"stopped-{RANK}").touch()
        message(45, "Stopped", "committed at step 4")
        sys.exit(45)
    """
    supervised = start(script, ranks=2).ready()
    supervised.signal(number)
    last = supervised.end()
    assert (last.code, last.reason) == (ExitCode.STOPPED, "Stopped")
    assert sorted(path.name for path in supervised.state.glob("stopped-*")) == ["stopped-0", "stopped-1"]


def test_a_second_signal_ends_at_once(start: Start) -> None:
    supervised = start("work(); time.sleep(60)").ready()
    supervised.signal(signal.SIGTERM)
    time.sleep(0.7)
    assert supervised.process.poll() is None
    began = time.monotonic()
    supervised.signal(signal.SIGTERM)
    last = supervised.end()
    assert (last.code, last.reason) == (143, "Interrupted")
    assert time.monotonic() - began < 3


def test_a_rank_deaf_to_signals_is_killed_after_the_second(start: Start) -> None:
    supervised = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); work(60)", forced=0.3).ready()
    supervised.signal(signal.SIGTERM)
    time.sleep(0.2)
    supervised.signal(signal.SIGINT)
    assert supervised.end().code == 137


def test_a_stop_before_the_rank_can_hear_it_loses_nothing(start: Start) -> None:
    supervised = start("signal.signal(signal.SIGTERM, signal.SIG_DFL); (STATE / 'deaf').touch(); work()").ready()
    while not (supervised.state / "deaf").exists():
        time.sleep(0.01)
    supervised.signal(signal.SIGTERM)
    last = supervised.end()
    assert (last.code, last.reason) == (ExitCode.STOPPED, "Stopped")
    assert "before training had begun" in last.message


def test_a_rank_that_shows_no_life_is_ended_with_its_stacks_in_the_log(start: Start) -> None:
    script = """
        def stuck_in_a_collective(): time.sleep(60)
        for step in range(1, 6):
            progress(step=step); beat(); time.sleep(0.6)
        stuck_in_a_collective()
    """
    supervised = start(script, stuck=1.2, stuck_steps=1, stacks=0.5)
    last = supervised.end()
    assert (last.code, last.reason) == (ExitCode.HUNG, "Hung")
    assert "Rank 0 has shown no sign of life for" in last.message
    assert (last.run_id, last.attempt, last.step) == ("r", 3, 4)
    assert "in stuck_in_a_collective" in supervised.errors


def test_slow_steps_are_no_hang(start: Start) -> None:
    script = """
        for step in range(1, 5):
            progress(step=step); beat(); time.sleep(1.0)
    """
    assert start(script, stuck=0.1, stuck_steps=20).end().code == 0


def test_loading_has_more_patience_than_training(start: Start) -> None:
    assert start("progress(stage='Loading'); time.sleep(1.5)", stuck=0.1).end().code == 0


def test_while_rank_0_evaluates_the_others_may_wait(start: Start) -> None:
    script = """
        progress(stage="Evaluating")
        work(6) if RANK == 0 else time.sleep(6.5)
    """
    assert start(script, ranks=2, loading=4, stuck=0.1).end().code == 0


def test_a_supervisor_whose_parent_is_killed_asks_the_ranks_to_commit(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    script = "work(30); (STATE / 'committed').touch(); sys.exit(45)"
    (tmp_path / "rank.py").write_text(PRELUDE.format(state=str(state)) + script)
    (tmp_path / "driver.py").write_text(DRIVER)
    parent = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "rank.py"), "1", str(state), "{}"]
    process = subprocess.Popen([sys.executable, "-c", parent, *command], stdout=subprocess.DEVNULL)
    try:
        wait_for(state / "ready-0")
    finally:
        process.kill()
        process.wait()
    wait_for(state / "committed")


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.05)


def test_a_process_killed_for_memory_is_told_from_one_killed_by_hand(tmp_path: Path) -> None:
    """Without a cgroup of our own the kernel's count does not rise, so a plain kill stays a plain kill."""
    supervised = Supervised(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    last = supervised.end()
    assert (last.code, last.reason) == (137, "Killed")
    assert last.message.endswith("if nobody did that by hand, memory may have been used up; its log has the details.")


def test_a_rank_that_the_kernel_kills_for_memory_is_told_as_that(start: Start, cage: Callable[[int], Cage]) -> None:
    last = start("progress(); hog = b'x' * (600 << 20); work()", cage=cage(256 << 20)).end()
    assert (last.code, last.reason) == (ExitCode.MEMORY, "HostOutOfMemory")
    assert last.message.startswith("Rank 0 was killed by the kernel because memory was used up; where half the micro-")
    assert (last.attempt, last.step) == (3, 4)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("low 0\nhigh 0\nmax 31\noom 2\noom_kill 3\noom_group_kill 0\n", 3),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n", 4),
        ("nr_free_pages 5\noom_kill 6\n", 6),
        ("oom_kill_disable 0\nunder_oom 0\n", 7),
    ],
    ids=["a cgroup of version 2", "of version 1", "the machine", "an old kernel says nothing: the next file counts"],
)
def test_kills_for_memory_are_counted_by_the_kernel(tmp_path: Path, said: str, count: int) -> None:
    (tmp_path / "first").write_text(said)
    (tmp_path / "last").write_text("oom_kill 7\n")
    assert oom.kills([tmp_path / "none", tmp_path / "first", tmp_path / "last"]) == count
    assert oom.kills([tmp_path / "none"]) == 0


def test_a_risen_count_of_memory_kills_makes_it_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer import supervisor

    done = supervisor._Supervisor(
        [], world=supervisor.World(1, 1, 0, "", 0), state=Path("/"), limits=supervisor.Limits()
    )
    rank = supervisor._Rank(0, None, code=137)  # type: ignore[arg-type]
    done.ended.append(rank)
    done.memory_kills = 1
    assert supervisor._verdict(done) == (rank, ExitCode.MEMORY)
    assert supervisor._sentence(done, rank, ExitCode.MEMORY)[0] == "HostOutOfMemory"


def test_the_last_message_tells_the_step_that_was_reached_also_where_a_rank_has_written_it(tmp_path: Path) -> None:
    from finetune_trainer import supervisor

    done = supervisor._Supervisor(
        [], world=supervisor.World(1, 1, 0, "", 0), state=tmp_path, limits=supervisor.Limits()
    )
    done.ended.append(supervisor._Rank(0, None, code=1))  # type: ignore[arg-type]
    done.progress = PROGRESS
    assert (supervisor._last_message(done, "r").step, supervisor._last_message(done, "r").reached_step) == (4, 5)
    written = LastMessage(code=1, reason="Crashed", message="m", step=3)
    (tmp_path / "message.json").write_text(written.model_dump_json(by_alias=True))
    assert supervisor._last_message(done, "r") == written.model_copy(update={"reached_step": 5})


def test_the_note_about_memory_lies_where_the_next_attempt_looks() -> None:
    from finetune_trainer.attempt import _memory_note

    assert memory_note_key("run", 3) == _memory_note("run", 3)


def test_gpus_are_counted_by_their_devices_and_by_what_the_environment_shows(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0


# --- telemetry ---

PROGRESS = Progress(
    run_id="r",
    attempt=2,
    stage="Training",
    step=5,
    total_steps=20,
    loss=0.25,
    samples_per_second=31.5,
    checkpoint=Checkpointed(
        step=4,
        uri="s3://b/c",
        committed_at="2026-01-01T00:00:00+00:00",
        best=BestCheckpoint(step=2, metric="f1", value=0.5),
    ),
    started_at="2026-01-01T00:00:00+00:00",
    updated_at="2026-01-01T00:01:00+00:00",
)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_progress_metrics_and_health_share_a_port(tmp_path: Path) -> None:
    server = telemetry.serve(tmp_path / "progress.json", 0)
    assert server is not None
    port = server.server_address[1]
    assert isinstance(port, int)
    try:
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/progress")[0] == 503
        assert 'finetune_stage{stage="Training"} 0.0' in get(port, "/metrics")[1]
        (tmp_path / "progress.json").write_text(PROGRESS.model_dump_json(by_alias=True))
        status, body = get(port, "/progress")
        assert (status, Progress.model_validate_json(body)) == (200, PROGRESS)
        metrics = get(port, "/metrics")[1]
        for line in (
            "finetune_step 5.0",
            "finetune_planned_steps 20.0",
            "finetune_loss 0.25",
            "finetune_samples_per_second 31.5",
            "finetune_checkpoint_step 4.0",
            "finetune_checkpoint_timestamp_seconds 1.7672256e+09",
            'finetune_stage{stage="Training"} 1.0',
            "# TYPE finetune_loss gauge",
        ):
            assert line in metrics.splitlines()
        assert "finetune_learning_rate" not in metrics
        assert get(port, "/anything")[0] == 404
    finally:
        server.shutdown()
        server.server_close()


def test_a_taken_port_is_no_reason_to_fail(tmp_path: Path) -> None:
    server = telemetry.serve(tmp_path / "progress.json", 0)
    assert server is not None
    try:
        assert telemetry.serve(tmp_path / "progress.json", int(server.server_address[1])) is None
    finally:
        server.shutdown()
        server.server_close()


# --- the last message ---


def test_the_last_message_fits_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(secret + "\n")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-token-token")
    message = LastMessage.model_validate(
        {
            "code": 0,
            "reason": "PreflightPassed",
            "message": lastmessage.clip(f"used {secret} and token-token-token " + "ü" * 600),
            "preflight": {"state": "Fresh", "run_id": "r", "summary": {"warnings": ["w" * 1000] * 10}},
        }
    )
    lastmessage.write(tmp_path / "message", message, lastmessage.secrets_of(tmp_path))
    data = (tmp_path / "message").read_bytes()
    assert len(data) <= 3500
    assert secret.encode() not in data
    assert b"token-token-token" not in data
    assert LastMessage.model_validate_json(data).preflight is not None


def test_a_message_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    lastmessage.write(tmp_path / "no/such/place", LastMessage(code=0, reason="Done", message="x"))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sequence[str]]:
    """Gives the command of the ranks, by options of `finetune train`."""
    commands: list[Sequence[str]] = []

    def supervise(command: Sequence[str], **_: Any) -> LastMessage:
        commands.append(command)
        return LastMessage(code=0, reason="Completed", message="m")

    def train(*options: str) -> Sequence[str]:
        arguments = ["train", "--config", "c", "--run-id", "r", "--work", str(tmp_path), "--port", "0"]
        assert command_line.main([*arguments, *options]) == 0
        return commands[-1]

    monkeypatch.setattr(supervisor, "supervise", supervise)
    monkeypatch.setattr(supervisor, "read_config", lambda _: None)
    monkeypatch.setattr(supervisor, "world_of", lambda *_: None)
    return train


@pytest.mark.parametrize("finish", [True, False])
def test_the_ranks_are_told_to_finish_now(told: Callable[..., Sequence[str]], finish: bool) -> None:
    assert ("--finish-now" in told(*["--finish-now"] * finish)) is finish


def test_the_ranks_are_told_what_to_read(told: Callable[..., Sequence[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--inputs" not in told()
    for options, name in ((["--inputs", "one"], "one"), ([], "two")):
        monkeypatch.setenv("FINETUNE_INPUTS", "two")
        command = told(*options)
        assert command[command.index("--inputs") + 1] == name
