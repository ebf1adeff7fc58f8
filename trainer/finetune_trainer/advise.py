"""`finetune advise`: tries several bases on the rows of a task and says which one to tune, and why.

Each base goes the way a run goes, into a directory that is thrown away: preflight on all rows, then what tryout.py
measures. A base that cannot do the task is listed with the reason; what is wrong with the rows ends it all.
"""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from finetune_api.contract import ExitCode, RunConfig
from finetune_trainer import lastmessage, tasks
from finetune_trainer.advice import Found, as_json, as_yaml, recommend, table
from finetune_trainer.base_model import read_base_model
from finetune_trainer.config import storage_settings
from finetune_trainer.data.batch import Encoded
from finetune_trainer.data.read import DataError
from finetune_trainer.foresight import foresee, memory_warning
from finetune_trainer.local import InvalidDocumentError, load
from finetune_trainer.preflight import preflight
from finetune_trainer.run import RunRecord, read_record, run_key
from finetune_trainer.storage import StorageError, open_store

_OF_THE_BASE = frozenset({"ModelIncomplete", "ModelUnsuitable", "PickleModel", "LicenseNotAllowed", "NoDropout"})
"""Reasons of preflight that are about a base and not about the rows."""
_NAME = "advised"
_INTERRUPTED = 130


@dataclass(frozen=True)
class Question:
    """What is asked, as the command line has it."""

    data: str
    task: str
    models: Sequence[str]
    method: str
    columns: Mapping[str, str]
    max_length: int | None
    output: str
    profile: Path | None = None
    credentials: Path | None = None

    def document(self, model: str, *, output: str) -> dict[str, Any]:
        """The FineTuneJob for one base."""
        task: dict[str, Any] = {"type": self.task}
        data: dict[str, Any] = {"train": [{"uri": address(self.data)}]}
        if self.columns:
            task["columns"] = dict(self.columns)
        if self.max_length is not None:
            data["maxLength"] = self.max_length
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": _NAME},
            "spec": {
                "task": task,
                "model": {"uri": model},
                "data": data,
                "method": {"type": self.method},
                "output": {"uri": output},
            },
        }


def main(question: Question, *, as_document: bool) -> int:
    """Print the table, the advice and a FineTuneJob, or all of it as JSON; returns the exit code."""
    secrets = lastmessage.secrets_of(question.credentials)
    try:
        with _quietly():
            found, device, code = _all(question)
    except InvalidDocumentError as error:
        print(error, file=sys.stderr)
        return ExitCode.INVALID
    except (StorageError, DataError) as error:
        return lastmessage.tell(error, secrets)
    except OSError as error:
        print(f"The scratch directory cannot be used ({error}): free space or choose another TMPDIR.", file=sys.stderr)
        return ExitCode.STORAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    advice = recommend(found)
    job = question.document(advice.model, output=address(question.output)) if advice.model else None
    if as_document:
        print(lastmessage.scrub(as_json(found, advice, device=device, job=job), secrets))
    else:
        said = [table(found, device=device), advice.reason, as_yaml(job) if job else ""]
        print(lastmessage.scrub("\n\n".join(part for part in said if part).rstrip(), secrets))
    return code if job is None else ExitCode.DONE


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the logs of what a run consists of: what matters of each base is in the table."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def address(given: str) -> str:
    """A URI as it is, a path as the file:// URI of what it names from here."""
    return given if "://" in given else Path(os.path.abspath(given)).as_uri().replace("%2A", "*")


def _all(question: Question) -> tuple[list[Found], str, int]:
    """What was found of each base, the device, and the exit code where none can be used. Raises what is wrong with the
    document or the rows."""
    found, device, codes = [], "", []
    for number, given in enumerate(question.models, start=1):
        model = address(given)
        print(f"base {number} of {len(question.models)}: {model}", file=sys.stderr, flush=True)
        with TemporaryDirectory(prefix="finetune-advise-") as scratch:
            try:
                base, device = _one(question, model, Path(scratch))
                base = replace(base, name=given)
            except _Refused as refusal:
                base = Found(model, given, refused=str(refusal))
                codes.append(refusal.code)
        found.append(base)
    return found, device, min(codes, default=ExitCode.DONE)


class _Refused(Exception):
    """Why one base cannot be used."""

    def __init__(self, why: str, code: int = ExitCode.INVALID) -> None:
        super().__init__(why)
        self.code = code


def _one(question: Question, model: str, scratch: Path) -> tuple[Found, str]:
    """Raises _Refused; InvalidDocumentError, DataError, StorageError where it is not the base's fault."""
    from finetune_trainer.course import OutOfMemory, is_out_of_memory
    from finetune_trainer.model import ModelError
    from finetune_trainer.tryout import try_out

    file = scratch / "job.yaml"
    file.write_text(yaml.safe_dump(question.document(model, output=(scratch / "output").as_uri())))
    try:
        config = load(file, question.profile)
    except InvalidDocumentError as error:  # whoever reads it has never seen that file
        raise InvalidDocumentError(re.sub(rf"{re.escape(str(file))}(:[0-9]+)*: ", "", str(error))) from error
    known, record = _known(config, question, scratch)
    try:
        score, seconds, parameters, device = try_out(
            config, record, settings=storage_settings(config, question.credentials), work=scratch / "work"
        )
    except ModelError as error:
        raise _Refused(str(error)) from error
    except (OutOfMemory, MemoryError, RuntimeError) as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        raise _Refused("it does not fit into the memory of this machine", ExitCode.MEMORY) from error
    finally:
        shutil.rmtree(scratch / "work", ignore_errors=True)
    return replace(known, score=score, seconds_per_epoch=seconds, parameters=parameters), device


def _known(config: RunConfig, question: Question, scratch: Path) -> tuple[Found, RunRecord]:
    """What needs no model, and preflight's record. Raises as `_one` does."""
    settings = storage_settings(config, question.credentials)
    task = tasks.get(config)
    try:
        base = read_base_model(open_store(config.model, settings), reads=task.reads)
        last = preflight(config, credentials=question.credentials, work=scratch / "work")
    except StorageError as error:
        if config.model not in error.message:
            raise
        raise _Refused(error.message, lastmessage.failure(error).code) from error
    except DataError as error:
        if error.reason not in _OF_THE_BASE:
            raise
        raise _Refused(error.message) from error
    output = open_store(config.output.uri, settings)
    assert last.run_id is not None
    assert last.preflight is not None
    record, summary = read_record(output, run_key(last.run_id)), last.preflight.summary
    report = json.loads(output.read(str(summary.report_uri).removeprefix(f"{output.uri}/")))
    path = scratch / "encoded.safetensors"
    output.download(record.encoded.key, path, digest=record.encoded.digest)
    encoded = Encoded(path)
    foresight = foresee(config, record, model=base.config, shapes=base.shapes, encoded=encoded)
    tokens = report["audit"].get("tokens", {"count": 0, "unknown": 0})
    found = Found(
        config.model,
        config.model,
        license=record.license,
        size_bytes=sum(info.size for name, info in base.files.items() if name.endswith(".safetensors")),
        tokens_mean=float(encoded.lengths(np.arange(encoded.size)).mean()) if summary.tokens else 0.0,
        tokens_p95=(summary.tokens.p95 if summary.tokens else None) or 0,
        unknown_percent=100 * tokens["unknown"] / max(1, tokens["count"]),
        truncated_percent=summary.truncated_percent or 0.0,
        memory=foresight.memory.total if foresight.memory else None,
        gpu=config.pods.gpus > 0,
        warning=memory_warning(foresight, config.pods) or "",
    )
    return found, record
