"""finetune-operator as a process of its own, forked from one that has imported it already: an import takes seconds."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["finetune_operator.__main__"])


def operator(
    arguments: list[str], log: Path, *, cold: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """`finetune-operator` with these arguments; it appends its output to `log`, and ends with this process. `cold`: it
    imports everything itself, as in a pod; what Python is to run. `environment`: what is added to this process's."""
    log.touch()  # to be read before the process has begun
    process = _CONTEXT.Process(target=_run, args=(arguments, str(log), cold, dict(environment or {})), daemon=True)
    process.start()
    return process


def _run(arguments: list[str], log: str, cold: Sequence[str] | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from finetune_operator.__main__ import main

    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(1, 2)
    if cold is not None:
        os.execv(sys.executable, [sys.executable, *cold, *arguments])
    sys.exit(main(arguments))
