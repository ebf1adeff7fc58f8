"""What a run must have come to. Each promise is one function that names what breaks it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.job import EVERY, STEPS, End, Job, Step
from tests.chaos.killer import AGAIN, Attempt, Run

from finetune_trainer.saving import NOT_DELETED
from finetune_trainer.storage import NotFound
from finetune_trainer.storage.commit import CURRENT, RecordKind, RunLog, live_checkpoints
from finetune_trainer.storage.digests import digest_of

KNOWN = {0, -9, *AGAIN}


@dataclass
class Judged:
    """A run and what is wrong with it."""

    run: Run
    wrong: list[str]


def verdict(run: Run, end: End, steps: dict[int, Step]) -> list[str]:
    """Everything that is wrong with a run, which is nothing for a good one. `end` and `steps` are those of the run
    that nothing has disturbed."""
    found = list(_endings(run.attempts))
    for attempt in run.attempts:
        found += _steps(attempt, steps)
        found += _lost(attempt)
    if run.attempts[-1].code != 0:
        return [*found, f"the run did not end well within {len(run.attempts)} attempts"]
    return [*found, *_result(run.job, end), *_storage(run.job, said=run.attempts[-1].log)]


def _endings(attempts: list[Attempt]) -> Iterator[str]:
    for number, attempt in enumerate(attempts, 1):
        if attempt.code not in KNOWN or (attempt.killed or "").startswith("never"):
            yield f"attempt {number} ended with code {attempt.code} ({attempt.killed})"
        if "Traceback (most recent call last)" in attempt.log:
            yield f"attempt {number} ended with a traceback"


def _steps(attempt: Attempt, steps: dict[int, Step]) -> Iterator[str]:
    """Each step that was ever done, also one that was lost, saw the right rows with the right weights."""
    first = min(attempt.steps, default=attempt.before + 1)
    if first != attempt.before + 1:
        yield f"an attempt went on from step {first - 1}, and {attempt.before} was committed"
    if list(attempt.steps) != list(range(first, first + len(attempt.steps))):
        yield "an attempt left out a step"
    for number, step in attempt.steps.items():
        if step.rows != steps[number].rows:
            yield f"step {number} was trained on other rows"
        elif step.loss != steps[number].loss:
            yield f"step {number} has the loss {step.loss}, not {steps[number].loss}"


def _lost(attempt: Attempt) -> Iterator[str]:
    """Whatever an attempt is killed at, it has done at most EVERY steps since the last committed checkpoint; and no
    checkpoint is handed over before the one before has been committed."""
    if not attempt.steps:
        return
    handed = [attempt.before, *attempt.saved]
    if attempt.lost > EVERY:
        yield f"{attempt.lost} steps are lost"
    if attempt.after < handed[-2:][0]:
        yield f"the checkpoint of step {handed[-2:][0]} was not committed, and that of {handed[-1]} was handed over"


def _result(job: Job, wanted: End) -> Iterator[str]:
    found = job.end()
    if found.model != wanted.model:
        yield "the published model differs in " + ", ".join(sorted(dict(found.model.items() ^ wanted.model.items())))
    if found.weights != wanted.weights:
        yield "the weights of the last checkpoint differ"
    if len(found.losses) != STEPS or found.losses != wanted.losses:
        yield "the losses of the last checkpoint differ"
    if found.metrics != wanted.metrics:
        yield "the evaluation differs"
    current, published = json.loads(job.store.read(CURRENT)), job.made.published()["outcome"]["model"]
    if (current["model"], current["digest"]) != (published["uri"], published["digest"]):
        yield "current.json names another model than the log"


def _storage(job: Job, *, said: str) -> Iterator[str]:
    """As the run has left it there is what the log names, whole, and nothing else.

    By design garbage may be left when the last attempt could not delete it, and `said` so in its log: a store that
    fails then is no reason to fail a run that is done. The next attempt of the run, if there ever is one, deletes it.
    """
    log = RunLog(job.store, job.made.record.run_id)
    records = log.read()
    if log.damaged:
        yield f"the log's records {log.damaged} are damaged"
    live = live_checkpoints(records)
    passing = (RecordKind.CHECKPOINT, RecordKind.MEASURED)
    kept = [record for record in records if record.kind not in passing or record in live]
    entries = {entry["key"]: entry["digest"] for record in kept for entry in record.body.get("objects") or ()}
    for key, digest in entries.items():
        try:
            if digest_of(job.store.read(key)) != digest:
                yield f"{key} is damaged"
        except NotFound:
            yield f"{key} is missing"
    for info in job.store.list():
        excused = NOT_DELETED in said and info.key.startswith(f"runs/{log.run_id}/attempts/")
        if info.key not in entries and not excused and not _documented(info.key, job):
            yield f"{info.key} is named by no record"


def _documented(key: str, job: Job) -> bool:
    """Whether a key stands beside the log by design: the run's record and data, what was
    released, and what preflight leaves."""
    run = f"runs/{job.made.record.run_id}"
    return key in (CURRENT, f"{run}/run.json", job.made.record.encoded.key) or key.startswith(
        (f"{run}/log/", f"{run}/released/", f"{run}/inputs/", f"{run}/preflight/", "digests/")
    )
