"""What other programs have written is read as far as it is right: pods say anything, and versions are rolled back."""

import json
from typing import Any

import pytest
from tests.unit.cluster import Cluster, Process, clock
from tests.unit.documents import LIVES

from finetune_api.contract import LastMessage, Progress
from finetune_api.status import FineTuneJobStatus
from finetune_operator.reading import heard, with_unknown, written
from finetune_operator.views import Subject

Raw = dict[str, Any]
NOW = "2026-03-01T12:00:00+00:00"
READING: Raw = {
    "runId": "r",
    "stage": "Training",
    "step": 40,
    "totalSteps": 100,
    "loss": 0.5,
    "estimatedCompletionTime": NOW,
    "checkpoint": {"step": 30, "uri": "s3://c", "committedAt": NOW},
    "startedAt": NOW,
    "updatedAt": NOW,
}
RESULT: Raw = {
    "finalStep": 100,
    "totalSteps": 100,
    "evaluation": {"on": "test", "tuned": {"f1": 0.9}, "gates": [{"metric": "f1", "passed": True, "wanted": ">= 0.8"}]},
    "model": {"uri": "s3://m", "digest": "sha256:1", "sizeBytes": 7},
}
LAST: Raw = {"code": 0, "reason": "Trained", "message": "done", "runId": "r", "result": RESULT}


def everywhere(value: Any) -> Any:
    """A field of the future in every object, and in the objects of every list."""
    if isinstance(value, dict):
        maps = ("tuned", "trivial", "base", "probe", "train", "intervals")
        inner = {name: one if name in maps else everywhere(one) for name, one in value.items()}
        return {**inner, "ofTheFuture": {"a": [1]}}
    return [everywhere(one) for one in value] if isinstance(value, list) else value


# --- pods ---


@pytest.mark.parametrize("said", [READING, {**READING, "checkpoint": None}])
def test_fields_that_are_unknown_are_passed_over_in_what_a_trainer_answers(said: Raw) -> None:
    plain = heard(Progress, json.dumps(said))
    assert plain is not None
    assert heard(Progress, json.dumps(everywhere(said))) == plain


def test_a_published_model_is_heard_of_also_where_the_message_has_fields_that_are_unknown() -> None:
    plain = heard(LastMessage, json.dumps(LAST))
    assert plain is not None
    assert plain.result is not None
    assert heard(LastMessage, json.dumps(everywhere(LAST))) == plain


def changed(document: Raw, path: str, value: Any) -> str:
    document = json.loads(json.dumps(document))
    *around, last = path.split(".")
    found = document
    for name in around:
        found = found[name]
    found[last] = value
    return json.dumps(document)


@pytest.mark.parametrize("said", ["soon", "", "2026-03-01", "2026-03-01T12:00:00", "2026-13-01T12:00:00Z", 5, "x" * 99])
def test_a_time_that_is_none_is_no_news(said: Any) -> None:
    for path in ("updatedAt", "startedAt"):
        assert heard(Progress, changed(READING, path, said)) is None
    without = heard(Progress, changed(READING, "estimatedCompletionTime", said))
    assert without is not None
    assert (without.estimated_completion_time, without.step) == (None, 40)
    without = heard(Progress, changed(READING, "checkpoint.committedAt", said))
    assert without is not None
    assert (without.checkpoint, without.step) == (None, 40)


@pytest.mark.parametrize("said", ["2026-03-01T12:00:00Z", "2026-03-01T12:00:00.123456+01:00"])
def test_a_time_with_a_zone_is_taken_as_it_is(said: str) -> None:
    progress = heard(Progress, changed(READING, "updatedAt", said))
    assert progress is not None
    assert progress.updated_at == said


@pytest.mark.parametrize("said", [10**30, 2**60, -1, "40", 1.5, None, True])
def test_a_step_that_is_none_is_no_news(said: Any) -> None:
    assert heard(Progress, changed(READING, "step", said)) is None
    assert heard(Progress, changed(READING, "totalSteps", said)) is None


@pytest.mark.parametrize("said", [float("nan"), float("inf"), 10**400, "low", [1]])
def test_a_figure_that_is_none_is_left_out(said: Any) -> None:
    progress = heard(Progress, changed(READING, "loss", said))
    assert progress is not None
    assert (progress.loss, progress.step) == (None, 40)
    last = heard(LastMessage, changed(LAST, "result.evaluation.tuned.f1", said))
    assert last is not None
    assert last.result is not None
    assert last.result.evaluation.tuned == {}


@pytest.mark.parametrize("said", ["", "{", "[]", "5", "null", '"x"', "[" * 100_000, "9" * 10_000, "{}", '{"code": 0}'])
def test_what_is_no_message_is_none(said: str) -> None:
    assert heard(LastMessage, said) is None


def test_a_message_of_another_schema_is_not_read_as_if_it_were_of_this() -> None:
    assert heard(LastMessage, json.dumps({**LAST, "schemaVersion": 1})) is not None
    assert heard(LastMessage, json.dumps({**LAST, "schemaVersion": 2})) is None


def test_only_the_smallest_part_around_a_mistake_is_left_out() -> None:
    gates = [*RESULT["evaluation"]["gates"], {"metric": "x" * 99, "passed": True, "wanted": ""}]
    last = heard(LastMessage, changed(LAST, "result.evaluation.gates", gates))
    assert last is not None
    assert last.result is not None
    assert [gate.metric for gate in last.result.evaluation.gates or []] == ["f1"]
    without = heard(LastMessage, changed(LAST, "result.model.digest", 5))
    assert without is not None
    assert (without.reason, without.result) == ("Trained", None), "a model without a digest is none"


# --- a status, of whatever version ---


@pytest.mark.parametrize("name", LIVES)
def test_a_status_with_unknown_fields_is_read_as_if_they_were_not_there(name: str) -> None:
    """In every phase: nothing is decided otherwise, so nothing is written and no Job begins."""
    document = LIVES[name].document()
    if "status" not in document:
        return
    plain, later = Subject.of(document), Subject.of({**document, "status": everywhere(document["status"])})
    assert (later.status, later.at_rest) == (plain.status, plain.at_rest)
    assert later.unknown[("ofTheFuture",)] == {"a": [1]}
    assert not plain.unknown


def test_of_a_status_that_is_wrong_in_places_the_rest_counts() -> None:
    status, _ = written(
        FineTuneJobStatus,
        {
            "observedGeneration": 3,
            "phase": "Dreaming",
            "message": "m",
            "usage": {"attempts": 2, "gpuSeconds": "many"},
            "run": {"id": "r"},
            "restarts": [
                {"attempt": 1, "reason": "Killed", "at": "t"},
                {"attempt": "two", "reason": "Killed", "at": "t"},
            ],
        },
    )
    assert status is not None
    assert (status.observed_generation, status.phase, status.message, status.run) == (3, None, "m", None)
    assert status.usage is not None
    assert (status.usage.attempts, status.usage.gpu_seconds) == (2, None)
    assert [restart.attempt for restart in status.restarts or []] == [1]


def test_unknown_fields_stay_where_the_object_around_them_stays_as_it_is() -> None:
    unknown = {("later",): 1, ("run", "later"): 2, ("usage", "later"): 3, ("model", "later"): 4}
    before: Raw = {"run": {"id": "r"}, "usage": {"attempts": 1}, "model": {"uri": "u"}}
    after: Raw = {"run": {"id": "r"}, "usage": {"attempts": 2}}
    assert with_unknown(before, after, unknown) == {**after, "later": 1, "run": {"id": "r", "later": 2}}
    assert after["run"] == {"id": "r"}


def test_what_a_rolled_back_operator_writes_keeps_unknown_fields_and_is_written_once() -> None:
    cluster = Cluster()
    undo = clock(cluster)
    written_: list[str] = []
    try:
        spec = {
            "task": {"type": "text-classification"},
            "model": {"uri": "s3://models/base"},
            "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "output": {"uri": "s3://models/out"},
        }
        cluster.create("finetunejobs", {"metadata": {"name": "one", "namespace": "ns"}, "spec": spec})
        process = Process(cluster)
        _until_rest(cluster, process)
        (subject,) = cluster.subjects()
        assert subject["status"]["phase"] == "Preflight"
        cluster.put("finetunejobs", {**subject, "status": everywhere(subject["status"])})
        cluster.on_write = lambda uid, what, raw: written_.append(what)
        _until_rest(cluster, process)
        assert not written_, "there is nothing to say"
        (pod,) = cluster.running("preflight")
        cluster.end(pod["metadata"]["uid"], 49)
        _until_rest(cluster, process)
        (subject,) = cluster.subjects()
        assert subject["status"]["phase"] == "Pending"
        assert subject["status"]["ofTheFuture"] == {"a": [1]}
        assert written_ == ["status"]
    finally:
        process.die()
        undo()


def _until_rest(cluster: Cluster, process: Process) -> None:
    for _ in range(100):
        process.catch_up()
        for key in process.ready():
            process.look(key)
            process.finish(key)
        chores = cluster.chores()
        if not chores and not process.ready() and not process.behind():
            return
        for chore in chores[:1]:
            chore()
    raise AssertionError("it does not come to rest")
