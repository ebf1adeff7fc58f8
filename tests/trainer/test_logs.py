"""No line of a log holds a credential, whoever wrote it."""

import os
import subprocess
import sys
from pathlib import Path

SECRET, TOKEN = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY", "token-token-token"


def said(code: str, *, code_is_wrong: bool = False, **environment: str) -> str:
    """What a process with this program writes, on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) is code_is_wrong, done.stderr
    return done.stdout + done.stderr


def test_credentials_are_taken_out_of_every_line(tmp_path: Path) -> None:
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(SECRET + "\n")
    told = said(
        f"""
import logging, pathlib
from finetune_trainer import logs
credentials = pathlib.Path({str(tmp_path)!r})
logs.begin("%(name)s: %(message)s", credentials)
log = logging.getLogger("of.a.library")
log.warning("signed with %s and %s", {SECRET!r}, {TOKEN!r})
try:
    raise ValueError("not signed with {SECRET}")
except ValueError:
    log.exception("it failed")
(credentials / "AWS_SECRET_ACCESS_KEY").write_text("another-and-newer-one")
log.warning("signed with another-and-newer-one, once with {SECRET}")
""",
        HF_TOKEN=TOKEN,
    )
    assert SECRET not in told
    assert TOKEN not in told
    assert "another-and-newer-one" not in told
    assert "of.a.library: signed with *** and ***" in told
    assert "ValueError: not signed with ***" in told
    assert "of.a.library: signed with ***, once with ***" in told


def test_an_end_that_nobody_expected_tells_no_credential_either() -> None:
    told = said(
        f"""
import pathlib
from finetune_trainer import logs
logs.begin("%(message)s", None)
raise RuntimeError("signed with {TOKEN}")
""",
        code_is_wrong=True,
        HF_TOKEN=TOKEN,
    )
    assert TOKEN not in told
    assert "RuntimeError: signed with ***" in told


def test_commands_log_so(tmp_path: Path) -> None:
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(SECRET)
    told = said(
        f"""
import logging
from finetune_trainer.__main__ import main
main(["preflight", "--config", "/none", "--credentials", {str(tmp_path)!r}, "--work", {str(tmp_path)!r}])
logging.getLogger("of.a.library").warning("signed with {SECRET}")
"""
    )
    assert "of.a.library: signed with ***" in told
    assert SECRET not in told


def test_ranks_log_so(tmp_path: Path) -> None:
    """The place where its state should be is a file, which nobody expects."""
    work = tmp_path / SECRET.replace("/", "-")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(work.name)
    work.write_text("a file")
    options = ["--config", "/none", "--run-id", "r", "--work", str(work), "--credentials", str(tmp_path)]
    told = said(
        f"from finetune_trainer.rank import main; main({options!r})",
        code_is_wrong=True,
    )
    assert "Traceback" in told
    assert work.name not in told
    assert "/***/state" in told
