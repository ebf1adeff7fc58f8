"""What can be known on a CPU, before a GPU is asked for: access, model, rows, identity, and what is done already.

The order is: output writable -> base model whole -> rows read, checked, split and encoded -> digests and run id ->
encoded store and the run's record written -> log read -> report. Nothing is written to the output before everything is
right, but for a probe that is deleted at once. Run again at any time, it comes to the same end.
"""

import json
import logging
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune_api.contract import ExitCode, LastMessage, PreflightOutcome, RunConfig, TrainOutcome
from finetune_api.resolve import digest, evaluation_id, publication_id, run_id, train_identity
from finetune_api.status import PreflightStatus, RowCounts
from finetune_trainer import gates, lastmessage, pinned, tasks
from finetune_trainer.base_model import BaseModel, check_dropout, model_digest, read_base_model
from finetune_trainer.config import read_config, storage_settings
from finetune_trainer.data.batch import Encoded as EncodedRows
from finetune_trainer.data.check import Checker, Problems, Survey, check_splits, field_of
from finetune_trainer.data.encode import Encoded, Encoder
from finetune_trainer.data.quality import Inspector, Quality
from finetune_trainer.data.read import DataError, Located, Rows, locate
from finetune_trainer.data.split import side
from finetune_trainer.data.text import read_text
from finetune_trainer.foresight import Foresight, foresee, memory_warning, quantity
from finetune_trainer.license import license_of
from finetune_trainer.retained import Prepared, config_of, prepare
from finetune_trainer.run import (
    MEASURED,
    TEST,
    TRAIN,
    VALIDATION,
    EncodedRef,
    Input,
    RunRecord,
    encoded_key,
    inputs_key,
    read_record,
    retained,
    run_key,
    tested,
)
from finetune_trainer.storage import (
    AlreadyExists,
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Store,
    open_store,
    probe_conditional_writes,
    remove_old_probes,
)
from finetune_trainer.storage.base import read_through
from finetune_trainer.storage.commit import (
    STOPPED,
    Record,
    RecordKind,
    RunLog,
    find,
    latest_checkpoint,
    part_of,
    training_end,
    what_is_wrong,
)
from finetune_trainer.storage.digests import EVERYONE, SHA256, Hasher, is_digest, is_sha256
from finetune_trainer.tasks import Task
from finetune_trainer.tasks.base import Facts, Tools, joined_forms, label_in, labels_of, listed

log = logging.getLogger("finetune.preflight")

FINISHED = ("complete", "early-stopped")
"""Ends of a training after which there is nothing left to train."""
_TRIES = 5


def main(
    *,
    config: Path,
    credentials: Path | None,
    message: Path | None,
    work: Path,
    run: str | None = None,
    inputs: str | None = None,
) -> int:
    """`finetune preflight`: returns the exit code, having written the last message to `message`."""
    secrets = lastmessage.secrets_of(credentials)
    with _quiet_on_bad_input() as outcome:
        outcome.message = preflight(read_config(config), credentials=credentials, work=work, run=run, inputs=inputs)
    last = outcome.message
    assert last is not None
    print(lastmessage.scrub(f"{last.reason}: {last.message}", secrets), file=sys.stderr, flush=True)
    lastmessage.write(message, last, secrets)
    return last.code


@dataclass
class _Outcome:
    message: LastMessage | None = None


@contextmanager
def _quiet_on_bad_input() -> Iterator[_Outcome]:
    """Every expected error becomes a last message; a traceback is for errors of our own."""
    outcome = _Outcome()
    try:
        yield outcome
    except PreconditionFailed as error:
        outcome.message = lastmessage.changed_meanwhile(error)
    except (StorageError, DataError) as error:
        outcome.message = lastmessage.failure(error)
    except MemoryError:
        outcome.message = LastMessage(
            code=ExitCode.MEMORY,
            reason="HostOutOfMemory",
            message="Preflight ran out of memory; split the files of rows into smaller ones.",
        )
    except OSError as error:
        outcome.message = LastMessage(
            code=ExitCode.STORAGE,
            reason="ScratchUnusable",
            message=lastmessage.clip(f"The scratch directory cannot be used ({error}); free space or choose another."),
        )
    except Exception as error:
        traceback.print_exc()
        outcome.message = LastMessage(
            code=1,
            reason="InternalError",
            message=f"Preflight failed with {type(error).__name__}, an error of its own; its log has the details.",
        )


def preflight(
    config: RunConfig, *, credentials: Path | None, work: Path, run: str | None = None, inputs: str | None = None
) -> LastMessage:
    """Do all of it and say what was found. Raises DataError and StorageError.

    `run`: the one that was begun for this document, which goes on with the inputs it began with, by their name.
    """
    settings = storage_settings(config, credentials)
    output = open_store(config.output.uri, settings)
    check_output(output)
    lost = None
    if run is not None:
        try:
            return _go_on(config, run, inputs, output=output, settings=settings, scratch=work)
        except pinned.CannotGoOnError as error:
            theirs = isinstance(error, pinned.RowsLostError)
            lost = _Lost(run, str(error), pinned.begun(config, output, run, inputs) if theirs else None)
            log.warning("run %s is not gone on with: %s", run, error)
    task = tasks.get(config)
    base = read_base_model(open_store(config.model, settings), reads=task.reads)
    log.info("base model %s: %d files", base.uri, len(base.files))
    check_dropout(base, config.training.dropout)
    license_name = license_of(open_store(config.model, settings), config)
    tools = tools_of(config, task, base)
    scratch = work / "preflight"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        data = read_data(config, task=task, tools=tools, base=base, settings=settings, scratch=scratch)
        kept = read_retention(config, base=base, settings=settings, scratch=scratch)
        return _commit(
            config,
            output=output,
            base=base,
            tools=tools,
            data=data,
            kept=kept,
            settings=settings,
            license_name=license_name,
            lost=lost,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tools_of(config: RunConfig, task: Task, base: BaseModel) -> Tools:
    """What the task encodes with. Raises DataError ModelIncomplete."""
    text = None
    if task.reads == "text":
        text = read_text(
            base.config,
            base.tokenizer_json,
            base.tokenizer_config,
            asked=config.data.max_length,
            uri=base.uri,
            taken=config.method.virtual_tokens or 0,
        )
    return Tools(text, config.data.overlong, base.config, base.images)


def check_output(output: Store) -> None:
    """Write and delete a probe. Raises StorageError, with reason OutputNotWritable where writing alone is denied."""
    try:
        kept = probe_conditional_writes(output, "")
    except StorageError as error:
        if error.reason in ("AccessDenied", "ObjectNotFound", "NoSpace"):
            raise StorageError("OutputNotWritable", f"spec.output.uri is not writable: {error.message}") from error
        raise
    if not kept:
        raise StorageError(
            "ConditionalWritesUnsupported",
            f"{output.uri}: the store ignores conditional writes (If-None-Match, If-Match), without which two attempts "
            "could both commit; use a store that honours them.",
            environment=False,
        )
    try:
        remove_old_probes(output, "")
    except StorageError as error:
        log.warning("what killed preflights have left was not deleted: %s", error)


# --- rows ---


@dataclass(frozen=True)
class Data:
    """Everything known of the rows."""

    inputs: list[Input]
    labels: list[str]
    form: str
    facts: dict[str, Any]
    encoded: Encoded
    survey: Survey
    quality: Quality
    slices: dict[str, list[str]]


@dataclass(frozen=True)
class _File:
    """One file of rows."""

    role: str
    place: Located
    source: pinned.Source

    @property
    def split(self) -> int | None:
        return self.source.split


def _files(config: RunConfig, settings: StorageSettings) -> list[_File]:
    """All files, those a pattern matches in the order of their names. Raises DataError, StorageError."""
    found = []
    for source in pinned.sources(config):
        places = locate(source.uri, settings)
        several = len(places) > 1 or places[0].uri != source.uri
        found += [
            _File(f"{source.role}/{number}" if several else source.role, place, source)
            for number, place in enumerate(places)
        ]
    return found


@dataclass
class _Reading:
    """The state of one pass over all files."""

    config: RunConfig
    task: Task
    checker: Checker
    survey: Survey
    inspector: Inspector
    encoder: Encoder
    problems: Problems
    scratch: Path
    inputs: list[Input] = field(default_factory=list)

    def read(self, file: _File, position: int) -> None:
        """Check, split and encode the rows of one file, whose place in the manifest is `position`."""
        started = time.monotonic()
        place, data = file.place, self.config.data
        wanted = list(self.task.parts[file.source.part].columns.values())
        grouped = file.split is None and data.validation_group_by is not None
        if grouped:
            wanted.append(str(data.validation_group_by))
        sliced = self.config.evaluation.slices if self._measured(file) else []
        wanted += sliced
        try:
            rows = Rows(place.store, place.key, uri=place.uri, wanted=wanted, scratch=self.scratch)
        except DataError as error:
            self.problems.add(error)
            return
        count = 0
        for example in self.checker.each(rows, part=file.source.part, group=grouped):
            count += 1
            split = file.split
            if split is None:
                split = side(example.key, data.validation_fraction or 0.0)
            self.survey.add(example, split=split, source=position)
            if missing := next((name for name in sliced if name not in example.values), None):
                self.problems.add(
                    DataError(
                        "ColumnMissing",
                        f"{place.uri}:{example.row}: no column {missing!r}; columns found: {listed(example.values)}. "
                        "Name others in spec.evaluation.slices.",
                    )
                )
                sliced = []  # once a file is enough
            if not self.problems.count:
                self.inspector.add(example, split=split, source=position)
                self.encoder.add(example, split=split, source=position)
        if rows.digest is not None:
            info = rows.info
            entry = Input(role=file.role, uri=place.uri, size=info.size, etag=info.etag, digest=rows.digest)
            self.inputs.append(entry)
        log.info("%s: %d rows in %.1f s", place.uri, count, time.monotonic() - started)

    def _measured(self, file: _File) -> bool:
        """Whether the model is evaluated on rows of this file in the end."""
        return file.split == TEST if self.config.data.tested else file.split != TRAIN


def read_data(
    config: RunConfig, *, task: Task, tools: Tools, base: BaseModel, settings: StorageSettings, scratch: Path
) -> Data:
    """One pass over all files of rows. Raises DataError with the first problem and the number of the others."""
    facts = task.facts(tools)
    problems, survey = Problems(), Survey(scratch)
    checker = Checker(task, group_by=config.data.validation_group_by, problems=problems)
    for name, part in task.parts.items():
        wanted = part.config.task.labels
        if wanted is not None:
            _check_wanted(wanted, field=f"{field_of(name)}.labels")
            checker.labels[name] = [label_in(name, label) for label in wanted]
    files = _files(config, settings)
    models = [f"{base.uri}/{name}" for name in base.files]
    names = models + [file.place.uri for file in files]
    inspector = Inspector(config, text=task.reads == "text", scratch=scratch)
    encoder = Encoder(
        task,
        tools,
        scratch=scratch,
        sources=names,
        problem=problems.add,
        beat=lambda rows: log.info("%d rows encoded", rows) if rows % 102_400 < 1024 else None,
        slices=config.evaluation.slices,
    )
    reading = _Reading(config, task, checker, survey, inspector, encoder, problems, scratch)
    labels: list[str] | None = None
    for position, file in enumerate(files, start=len(models)):
        if file.split == TEST and labels is None:
            labels = _fix_labels(reading, base=base)
        reading.read(file, position)
    if labels is None:
        labels = _fix_labels(reading, base=base)
    _raise_problems(problems)
    found = inspector.decide(survey.contents, sources=names)
    encoded = encoder.finish(labels, path=scratch / "encoded.safetensors", marks=found.marks)
    _check_encoded(encoded, config, task, problems)
    _raise_problems(problems)
    limit = tools.text.max_length if tools.text else 0
    quality = found.report(encoded, survey, labels=labels, max_length=limit)
    form = joined_forms(checker.forms)
    store = EncodedRows(encoded.path)
    facts |= task.measure(store, store.rows(TRAIN), Facts(labels=labels, form=form, max_length=limit, more=facts))
    return Data(reading.inputs, labels, form, facts, encoded, survey, quality, encoder.slices)


def read_retention(
    config: RunConfig, *, base: BaseModel, settings: StorageSettings, scratch: Path
) -> dict[str, Prepared]:
    """The retention sets by name, each with what its own task encodes with. Raises DataError, StorageError."""
    found = {}
    for one in config.evaluation.retention:
        task = tasks.get(own := config_of(config, one))
        tools = tools_of(own, task, base)
        found[one.name] = prepare(config, one, tools=tools, settings=settings, scratch=scratch / f"set-{one.name}")
    return found


def _check_wanted(labels: Sequence[str], *, field: str) -> None:
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise DataError("InvalidLabels", f"{field} names {twice[0][:64]!r} twice; name each label once.")


def _fix_labels(reading: _Reading, *, base: BaseModel) -> list[str]:
    """Settle the labels once training and validation rows are read; test rows may bring no others."""
    task, config = reading.task, reading.config
    if not reading.problems.count:
        fraction = config.data.validation_fraction
        check_splits(reading.survey, task=task, problems=reading.problems, fraction=fraction)
    checker, labels, every = reading.checker, list[str](), reading.survey.found()
    for name, part in task.parts.items():
        if not part.labelled:
            continue
        found = labels_of(name, every)
        own = part.order_labels(found, wanted=part.config.task.labels, base=base.labels)
        own = [label_in(name, label) for label in own]
        if name not in checker.labels:
            checker.labels[name] = own
            checker.found.add(name)
        labels += own
    return labels


def _check_encoded(encoded: Encoded, config: RunConfig, task: Task, problems: Problems) -> None:
    """Leaving rows out may have emptied a side."""
    store = EncodedRows(encoded.path)
    needed = {TRAIN: "training", VALIDATION: "validation"} | ({TEST: "test"} if config.data.tested else {})
    for split, name in needed.items():
        for part, count in task.count_parts(store, store.rows(split)).items():
            if not count and not problems.count:
                why = "were dropped as longer than data.maxLength allows; raise it or choose Truncate."
                if not encoded.dropped:
                    why = "are left out, as repeated or held out (data.deduplicate, data.leakage); give other rows."
                problems.add(DataError("EmptySplit", f"All {name} rows{f' of task {part}' if part else ''} {why}"))


def _raise_problems(problems: Problems) -> None:
    for problem in problems.first:
        log.error("%s: %s", problem.reason, problem.message)
    problems.raise_any()


# --- what is written ---


def _commit(
    config: RunConfig,
    *,
    output: Store,
    base: BaseModel,
    tools: Tools,
    data: Data,
    kept: Mapping[str, Prepared],
    settings: StorageSettings,
    license_name: str | None,
    lost: "_Lost | None",
) -> LastMessage:
    """Everything is right: find the identity, write what train pods need, and say what is left to do."""
    manifest = _model_inputs(base, output=output, settings=settings) + data.inputs
    manifest += [entry for one in kept.values() for entry in one.inputs]
    digests = {entry.role: entry.digest for entry in data.inputs}
    digests = {role: content for role, content in digests.items() if role.partition("/")[0] not in MEASURED}
    if data.quality.leaked:
        digests["leaked"] = digest([f"{content:016x}" for content in data.quality.leaked])
    model = model_digest([entry for entry in manifest if entry.role.startswith("model/")])
    identity = train_identity(config, labels=data.labels, inputs={"model": model, **digests})
    run = run_id(identity)
    if lost is not None and lost.takes_others(run, manifest):
        raise lost.refusal()
    record = RunRecord(
        run_id=run,
        identity=identity,
        manifest=manifest,
        addresses=pinned.addresses(config),
        labels=data.labels,
        form=data.form,
        model_max_length=tools.text.max_length if tools.text else 0,
        pad_token_id=tools.text.pad_token_id if tools.text else 0,
        facts=data.facts,
        license=license_name,
        slices=data.slices,
        encoded=EncodedRef(key=encoded_key(data.encoded.digest), digest=data.encoded.digest, rows=data.encoded.rows),
        retention={name: one.record for name, one in kept.items()},
    )
    record = pin(output, record, [data.encoded, *(one.encoded for one in kept.values())])
    standing = _standing(config, record, output)
    foresight = foresee(config, record, model=base.config, shapes=base.shapes, encoded=EncodedRows(data.encoded.path))
    unlikely = memory_warning(foresight, config.pods)
    lasting = [*([unlikely] if unlikely else []), *data.quality.warnings]
    warnings = [*standing.trouble, *([lost.sentence(run)] if lost is not None and lost.run != run else []), *lasting]
    where = f"{output.uri}/{_report_key(run)}"
    summary = _summary(config, data=data, foresight=foresight, warnings=warnings, report=where)
    log.info("%d steps; predicted memory: %s", foresight.steps, summary.predicted_memory or foresight.why)
    memory = asdict(foresight.memory) if foresight.memory else {"unknown": foresight.why}
    more = {
        "summary": summary.document(),
        "warnings": warnings,
        _LASTING: lasting,
        "memory": memory,
        "publicationId": standing.publication,
    }
    output.write(_report_key(run), _report(record, data=data, more=more))
    return _passed(record, standing, summary=summary)


_LASTING = "lastingWarnings"
"""Of the report: what is to be said again when the run goes on."""


@dataclass(frozen=True)
class _Lost:
    """A run that the status tells of, and that is not gone on with."""

    run: str
    why: str
    record: RunRecord | None
    """Where it is the document's, and only its encoded rows are lost."""

    def takes_others(self, run: str, manifest: Sequence[Input]) -> bool:
        """Whether other rows would take the place of the lost ones: a run's name tells nothing of those to measure."""
        if self.record is None:
            return False
        before, now = ((tested(inputs), retained(inputs)) for inputs in (self.record.manifest, manifest))
        return self.run != run or before != now

    def refusal(self) -> StorageError:
        return StorageError(
            "InputChanged",
            f"{self.why}, and the rows are not those any more that run {self.run} began with, so that they cannot be "
            "encoded again: restore the object or the rows, or change the document to train on the rows as they are.",
            environment=False,
        )

    def sentence(self, other: str) -> str:
        return (
            f"Run {self.run}, which was begun before, cannot be gone on with ({self.why}); the rows as they are now "
            f"make another run, {other}."
        )


def _go_on(
    config: RunConfig, run: str, inputs: str | None, *, output: Store, settings: StorageSettings, scratch: Path
) -> LastMessage:
    """No row is read: what was found of them stands in the last report.

    Raises CannotGoOnError, StorageError; DataError where the license is not allowed any more.
    """
    record = pinned.begun(config, output, run, inputs)
    report = _last_report(output, record)
    standing = _standing(config, record, output)
    if standing.result is None or standing.result.partial:
        manifest = pinned.same_base(record, settings)
        license_name = license_of(open_store(pinned.base_of(record), settings), config)
        pinned.check_stores(output, _stores(record))
        record = pin(output, record.model_copy(update={"manifest": manifest, "license": license_name}), [])
    else:
        _keep(output, record)
    news = pinned.news_of_rows(config, record, settings, scratch)
    lasting = report.get(_LASTING, [])
    warnings = [*standing.trouble, *news, *lasting]
    summary = PreflightStatus.model_validate(report.get("summary", {})).model_copy(
        update={"warnings": _first_ten(warnings), "report_uri": f"{output.uri}/{_report_key(run)}"}
    )
    more = {
        "checkedAt": _now(),
        "summary": summary.document(),
        "warnings": warnings,
        "publicationId": standing.publication,
        "inputs": record.name,
        "record": record.document(),
    }
    output.write(_report_key(run), _json({**report, **more}))
    return _passed(record, standing, summary=summary)


def _last_report(output: Store, record: RunRecord) -> dict[str, Any]:
    """What the last preflight has told people of a document's inputs, or of the run where it was never of these;
    nothing where none can be read."""
    listed = output.list(f"runs/{record.run_id}/preflight/")
    newest_first = sorted(listed, key=lambda info: (info.modified is None, info.modified), reverse=True)
    other: dict[str, Any] = {}
    for info in newest_first:
        try:
            report = json.loads(output.read(info.key))
            PreflightStatus.model_validate(report["summary"])
        except (Damaged, NotFound, ValueError, TypeError, KeyError, RecursionError):
            continue
        told = report.get(_LASTING, report["summary"].get("warnings") or [])
        found = {**report, _LASTING: [str(sentence) for sentence in told] if isinstance(told, list) else []}
        if found.get("inputs") == record.name:
            return found
        other = other or found
    return other


@dataclass(frozen=True)
class _Standing:
    """How far a run is, by its log."""

    publication: str
    result: TrainOutcome | None
    """That of the whole run, or of one that was ended before its time and may go on."""
    step: int | None
    unmet: str | None
    """Why a model that is there already is not good enough by the gates that are asked for now."""
    trouble: list[str]
    """What is wrong with what was published."""


def _standing(config: RunConfig, record: RunRecord, output: Store) -> _Standing:
    run = record.run_id
    records = RunLog(output, run).read()
    trained = training_end(records, partial=True)
    part = part_of(records, trained, weights=config.output.weights)
    partial = part is not None
    evaluation = evaluation_id(
        run,
        config,
        test=tested(record.manifest),
        retention=retained(record.manifest),
        part=part,
    )
    publication = publication_id(evaluation, config)
    result, step, trouble = progress_of(records, publication=publication, output=output, partial=partial)
    unmet = None
    if result is not None:
        result, unmet = gates.rejudged(result, records, config, evaluation=evaluation)
        if unmet is None and not partial:
            gates.release(output, run, publication, result)
    if partial and unmet is not None:  # it is judged where it is asked for: the run may go on, and become good enough
        result, unmet = None, None
    return _Standing(publication, result, step, unmet, trouble)


def _passed(record: RunRecord, standing: _Standing, *, summary: PreflightStatus) -> LastMessage:
    run, result, step, unmet = record.run_id, standing.result, standing.step, standing.unmet
    state: Literal["Fresh", "Resume", "Reused"]
    if result is not None and not result.partial:
        state, sentence = "Reused", f"Run {run} is trained and published already; its model is reused."
    elif step is not None:
        state, sentence = "Resume", f"All checks passed; run {run} goes on from step {step}."
    else:
        state, sentence = "Fresh", f"All checks passed; run {run} begins."
    return LastMessage(
        code=ExitCode.DONE if unmet is None else ExitCode.GATE,
        reason="GateNotMet" if unmet else "Reused" if state == "Reused" else "PreflightPassed",
        message=lastmessage.clip(unmet or sentence),
        run_id=run,
        step=step,
        preflight=PreflightOutcome(state=state, run_id=run, inputs=record.name, step=step, summary=summary),
        result=result,
    )


def _report(record: RunRecord, *, data: Data, more: Mapping[str, Any]) -> bytes:
    """The full report, for people."""
    names = ((TRAIN, "train"), (VALIDATION, "validation"), (TEST, "test"))
    report = {
        "checkedAt": _now(),
        **more,
        "labels": {name: dict(sorted(data.survey.labels[split].items())) for split, name in names},
        "repeated": data.quality.repeated.document(),
        "audit": data.quality.audit,
        "truncated": data.encoded.truncated,
        "dropped": data.quality.dropped.document(),
        "inputs": record.name,
        "record": record.document(),
        "versions": {name: version(name) for name in ("numpy", "tokenizers", "pyarrow", "safetensors")},
    }
    return _json(report)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json(report: Mapping[str, Any]) -> bytes:
    return json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False).encode()


def _first_ten(warnings: Sequence[str]) -> list[str] | None:
    return [sentence[:1024] for sentence in warnings][:10] or None


def _report_key(run: str) -> str:
    name = os.environ.get("FINETUNE_POD_UID") or _LOCAL_UID
    return f"runs/{run}/preflight/{name}.json"


_LOCAL_UID = uuid.uuid4().hex


def _summary(
    config: RunConfig, *, data: Data, foresight: Foresight, warnings: Sequence[str], report: str
) -> PreflightStatus:
    encoded, rows = data.encoded, data.encoded.examples_by_split
    return PreflightStatus(
        rows=RowCounts(
            train=rows.get(TRAIN, 0),
            validation=rows.get(VALIDATION, 0),
            test=rows.get(TEST, 0) if config.data.tested else None,
        ),
        labels=len(data.labels) or None,
        form=data.form or None,
        tokens=encoded.lengths,
        truncated_percent=round(100 * encoded.truncated / max(1, encoded.rows), 2),
        dropped=data.quality.dropped if any(data.quality.dropped.document().values()) else None,
        audit=list(data.quality.figures) or None,
        warnings=_first_ten(warnings),
        steps=foresight.steps,
        predicted_memory=quantity(foresight.memory.total) if foresight.memory else None,
        report_uri=report,
    )


def _model_inputs(base: BaseModel, *, output: Store, settings: StorageSettings) -> list[Input]:
    """The model's part of the manifest. Digests of large files are kept in the output by URI, ETag and size."""
    store = open_store(base.uri, settings)
    found = []
    for name, info in base.files.items():
        uri = f"{base.uri}/{name}"
        cache = f"digests/{digest([uri, info.etag, info.size])}.json"
        told = info.digest if is_sha256(info.digest) else None
        known = (told, told) if told else _cached_digests(output, cache)
        if known is None:
            started = time.monotonic()
            hasher, theirs = Hasher(threads=EVERYONE), Hasher(SHA256)
            read_through(store, info, hasher, theirs)
            known = hasher.digest(), theirs.digest()
            log.info("%s: %d bytes hashed in %.1f s", uri, info.size, time.monotonic() - started)
            entry = {"uri": uri, "etag": info.etag, "size": info.size, "digest": known[0], "sha256": known[1]}
            output.write(cache, json.dumps({**entry, "seal": digest(entry)}, sort_keys=True).encode())
        found.append(
            Input(role=f"model/{name}", uri=uri, size=info.size, etag=info.etag, digest=known[0], sha256=known[1])
        )
    return found


def _cached_digests(output: Store, key: str) -> tuple[str, str] | None:
    try:
        cached = json.loads(output.read(key))
        whole = cached.pop("seal", None) == digest(cached)
        found = cached["digest"], cached["sha256"]
    except StorageError as error:
        if error.reason == "ObjectNotFound":
            return None
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if whole and all(map(is_digest, found)) and is_sha256(found[1]) else None


def pin(output: Store, record: RunRecord, encoded: Sequence[Encoded]) -> RunRecord:
    """Keep what the attempts of this document read, make run.json say the same, and the encoded stores be there.

    The identity fixes the content of all inputs but those that are only measured; what may differ from an earlier
    preflight is where they lie, what the run is measured on, and which columns slice that. Then run.json is replaced,
    with If-Match. When nothing differs, earlier encoded stores stay where they are whole, even if this version of the
    tokenizer library would make others. Without `encoded` there is nothing to mend them with: they were checked before.
    """
    record = _newest(output, record, encoded)
    _keep(output, record)
    return record


def _keep(output: Store, record: RunRecord) -> None:
    """For attempts: another preflight of the run replaces run.json, but never this."""
    output.write(inputs_key(record.run_id, record.name), record.sealed())


def _newest(output: Store, record: RunRecord, encoded: Sequence[Encoded]) -> RunRecord:
    key = run_key(record.run_id)
    for _ in range(_TRIES):
        info = output.head(key)
        if info is not None:
            known = read_record(output, key, info.etag)
            same = (known.manifest, _asked(known)) == (record.manifest, _asked(record))
            # Columns have numbers in the store: in another order they are of another store.
            same = same and [*known.slices.items()] == [*record.slices.items()]
            if same and (_are_whole(output, _stores(known)) if encoded else _stores(known) == _stores(record)):
                if (known.license, known.addresses) == (record.license, record.addresses):
                    return known
                record = record.model_copy(update={"encoded": known.encoded, "retention": known.retention})
        for ref in _stores(record):
            _put(output, ref, encoded)
        data = record.sealed()
        try:
            if info is None:
                output.create(key, data)
            else:
                output.replace(key, data, if_match=info.etag)
        except (AlreadyExists, PreconditionFailed):
            continue  # another preflight of the same run was faster
        return record
    raise StorageError("StoreUnavailable", f"{output.uri}/{key} changes faster than it can be read; try again.")


def _asked(record: RunRecord) -> dict[str, Any]:
    """How the rows of retention sets are read: the same files may be read in another way."""
    return {name: one.task for name, one in record.retention.items()}


def _are_whole(output: Store, stores: Sequence[EncodedRef]) -> bool:
    try:
        pinned.check_stores(output, stores)
    except pinned.RowsLostError as error:
        log.warning("%s; it is written again", error)
        return False
    return True


def _stores(record: RunRecord) -> list[EncodedRef]:
    return [record.encoded, *(one.encoded for one in record.retention.values())]


def _put(output: Store, ref: EncodedRef, encoded: Sequence[Encoded]) -> None:
    """Upload an encoded store unless it is there already, and whole."""
    mine = next((one for one in encoded if one.digest == ref.digest), None)
    if mine is not None and what_is_wrong(output, [{"key": ref.key, "size": mine.size, "digest": ref.digest}]):
        output.upload(mine.path, ref.key)


# --- what is done already ---


def progress_of(
    records: Sequence[Record], *, publication: str, output: Store, partial: bool = False
) -> tuple[TrainOutcome | None, int | None, list[str]]:
    """The published result that is asked for, the last committed step, and what is wrong with what was published."""
    trouble: list[str] = []
    ends = (STOPPED,) if partial else FINISHED
    for record in reversed(find(records, RecordKind.PUBLISHED)):
        if record.body.get("publicationId") != publication or record.body.get("end") not in ends:
            continue
        wrong = what_is_wrong(output, record.body.get("objects") or [])
        outcome = _outcome(record.body.get("outcome"))
        if wrong is None and outcome is not None:
            return outcome, _step(records), trouble
        trouble.append(f"The published model is not whole ({wrong or 'its record cannot be read'}); it is made again.")
    return None, _step(records), trouble


def _step(records: Sequence[Record]) -> int | None:
    last = training_end(records, partial=False) or latest_checkpoint(records)
    step = last.body.get("step") if last is not None else None
    return step if isinstance(step, int) else None


def _outcome(document: Any) -> TrainOutcome | None:
    """A newer version, which was rolled back since, may have written more than is known here."""
    try:
        return TrainOutcome.model_validate_json(json.dumps(document), extra="ignore")
    except ValidationError:
        return None
