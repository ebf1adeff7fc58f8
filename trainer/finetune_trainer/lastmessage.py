"""The last message of a pod: small, and free of secrets whatever went into it."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from finetune_api.contract import MESSAGE_LIMIT, ExitCode, LastMessage
from finetune_api.status import EvaluationStatus
from finetune_trainer.data.read import DataError
from finetune_trainer.storage import Damaged, PreconditionFailed, StorageError

# The access key id only names an identity, and is often a plain word that addresses hold, too.
_SECRET_NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
_SENTENCE_LIMIT = 512
# Shorter values would mangle sentences and protect nothing.
_SHORTEST_SECRET = 8


def failure(error: StorageError | DataError) -> LastMessage:
    """What an expected error amounts to: exit code, reason, sentence."""
    code = ExitCode.INVALID
    if isinstance(error, Damaged):
        code = ExitCode.DAMAGED
    elif isinstance(error, StorageError) and error.environment:
        code = ExitCode.STORAGE
    return LastMessage(code=code, reason=error.reason, message=clip(error.message))


def tell(error: StorageError | DataError, secrets: Iterable[str]) -> int:
    """Print what an expected error amounts to, for commands that leave no message; returns the exit code."""
    message = failure(error)
    print(scrub(message.message, secrets), file=sys.stderr)
    return message.code


def changed_meanwhile(error: PreconditionFailed) -> LastMessage:
    """For preflight alone, which pins what it finds: an object replaced while it was read is simply read again."""
    return LastMessage(code=ExitCode.STORAGE, reason=error.reason, message=clip(error.message))


def clip(sentence: str) -> str:
    """The sentence as a message may hold it: one line of at most 512 characters."""
    line = " ".join(sentence.split())
    return line if len(line) <= _SENTENCE_LIMIT else line[: _SENTENCE_LIMIT - 1] + "…"


def secrets_of(credentials: Path | None) -> set[str]:
    """Values that must never be shown: credentials in the environment and in the files of a mounted Secret."""
    found = {os.environ.get(name, "") for name in _SECRET_NAMES}
    if credentials is not None:
        for name in _SECRET_NAMES:
            try:
                found.add((credentials / name).read_text().strip())
            except (OSError, UnicodeDecodeError):
                continue
    return {value for value in found if len(value) >= _SHORTEST_SECRET}


def scrub(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def encoded(message: LastMessage, secrets: Iterable[str] = ()) -> bytes:
    """The message as JSON of at most MESSAGE_LIMIT bytes; what is least needed goes first: warnings, then details."""
    hidden = list(secrets)
    for smaller in _ever_smaller(message):
        data = scrub(smaller.model_dump_json(by_alias=True, exclude_none=True), hidden).encode()
        if len(data) <= MESSAGE_LIMIT:
            break
    return data


def _ever_smaller(message: LastMessage) -> Iterable[LastMessage]:
    yield message
    if message.preflight is not None:
        outcome = message.preflight
        for count in reversed(range(len(outcome.summary.warnings or []))):
            kept = (outcome.summary.warnings or [])[:count]
            summary = outcome.summary.model_copy(update={"warnings": kept or None})
            message = message.model_copy(update={"preflight": outcome.model_copy(update={"summary": summary})})
            yield message
    message = message.model_copy(update={"message": message.message[:256]})
    yield message
    for smaller in _smaller_evaluations(message.result.evaluation if message.result else None):
        assert message.result is not None
        message = message.model_copy(update={"result": message.result.model_copy(update={"evaluation": smaller})})
        yield message
    yield message.model_copy(update={"message": message.message[:100], "preflight": None, "result": None})


def _smaller_evaluations(evaluation: EvaluationStatus | None) -> Iterable[EvaluationStatus]:
    """Without what the report says as well, then with the first few metrics alone, and those of gates, then with those
    retention sets alone whose bound is broken."""
    if evaluation is None:
        return
    evaluation = evaluation.model_copy(update={"warnings": None, "train": None})
    yield evaluation
    evaluation = evaluation.model_copy(update={"intervals": None, "slices": None})
    yield evaluation
    kept = {gate.metric for gate in evaluation.gates or ()} | {evaluation.gain.metric if evaluation.gain else ""}
    for count in (8, 2):
        fewer = {}
        for name in ("trivial", "base", "probe", "tuned"):
            found = getattr(evaluation, name) or {}
            fewer[name] = {m: v for n, (m, v) in enumerate(found.items()) if n < count or m in kept} or None
        evaluation = evaluation.model_copy(update=fewer)
        yield evaluation
    broken = [one for one in evaluation.retention or () if one.passed is False]
    yield evaluation.model_copy(update={"retention": broken or None})


def write(path: Path | None, message: LastMessage, secrets: Iterable[str] = ()) -> None:
    """Write the message where the kubelet picks it up. A pod that cannot is no reason to fail."""
    if path is None:
        return
    try:
        # In place: the kubelet mounts this very file.
        path.write_bytes(encoded(message, secrets))
    except OSError as error:
        print(f"The last message cannot be written to {path}: {error.strerror}", flush=True)
