"""One look, with an API server that only knows what is put into it."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY
from tests.unit.cluster import controlled_by
from tests.unit.test_decide import resolved

from finetune_api.resolve import Defaults
from finetune_operator.__main__ import _Json
from finetune_operator.cache import Cache
from finetune_operator.kube import ApiError, Kube
from finetune_operator.manifests import config_map
from finetune_operator.observe import Observer
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import LONGEST_BEHIND, LONGEST_REST, Reconciler
from finetune_operator.views import GENERATION, MANAGED_BY, MANAGER, ROLE, RUN, Subject

JOB = {
    "metadata": {
        "name": "one",
        "namespace": "ns",
        "uid": "uid-one",
        "resourceVersion": "1",
        "generation": 1,
        "creationTimestamp": "2026-03-01T00:00:00Z",
    },
    "spec": {
        "task": {"type": "text-classification"},
        "model": {"uri": "s3://models/base"},
        "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "output": {"uri": "s3://models/one"},
    },
}


class Api:
    """Takes what is created. With a `there`, whatever is created is there already, as this object."""

    outside = False

    def __init__(self, *, there: dict[str, Any] | None = None) -> None:
        self.there = there
        self.asked = 0
        self.statuses: list[dict[str, Any]] = []

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        if self.there is not None:
            raise ApiError(409, "AlreadyExists", "it is there")
        created = {"uid": f"uid-{self.asked}", "resourceVersion": str(10 + self.asked)}
        return {**manifest, "metadata": {**manifest["metadata"], **created}}

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        assert self.there is not None
        return self.there

    async def write_status(self, namespace: str, name: str, *, body: dict[str, Any]) -> dict[str, Any]:
        self.statuses.append(body["status"])
        meta = {**JOB["metadata"], "resourceVersion": str(100 + len(self.statuses))}
        return {**JOB, "metadata": meta, "spec": body["spec"], "status": body["status"]}


def ours(**labels: str) -> dict[str, Any]:
    """An object of the FineTuneJob."""
    meta = {"name": "any", "namespace": "ns", "uid": "gone", "resourceVersion": "5", "labels": labels}
    return {"metadata": {**meta, "ownerReferences": [controlled_by("FineTuneJob", "uid-one")]}}


def reconciler(
    api: Api, *, cache: Cache | None = None, profile: bool = True, now: datetime = datetime(2026, 3, 1, tzinfo=UTC)
) -> Reconciler:
    cache = cache or Cache()
    cache.apply("finetunejobs", JOB)
    if profile:
        meta = {"name": "default", "uid": "p", "resourceVersion": "1"}
        cache.apply("finetuneprofiles", {"metadata": meta, "spec": {}})
    kube = cast("Kube", api)
    defaults = Defaults(trainer_image="t", preflight_image="p")
    observer = Observer(cache, kube, ProgressReader(kube), defaults=defaults)
    return Reconciler(cache, kube, observer, clock=lambda: now)


def done(action: str) -> float:
    return REGISTRY.get_sample_value("finetune_actions_total", {"action": action}) or 0.0


async def test_an_object_that_never_comes_by_a_watch_is_looked_for_less_and_less_often() -> None:
    """It was deleted, and something keeps it: a finalizer of somebody's. Its name is taken until then."""
    cache, api = Cache(), Api(there=ours(**{MANAGED_BY: MANAGER}))
    cache.forget("gone")
    look = reconciler(api, cache=cache)
    waits = [await look("uid-one") for _ in range(10)]
    assert api.asked == 10
    assert waits == pytest.approx([0, 1, 2, 4, 8, 16, 32, LONGEST_BEHIND, LONGEST_BEHIND, LONGEST_BEHIND])


async def test_an_object_that_lost_its_label_is_told() -> None:
    """The watches do not see it, and its name is taken."""
    api = Api(there=ours(another="label"))
    assert await reconciler(api)("uid-one") == 60.0
    (status,) = api.statuses
    assert {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}["Stalled"] == ("True", "LabelLost")
    label = "app.kubernetes.io/managed-by=finetune-operator"
    assert f"is there, but without its label {label}; put it back, or delete the ConfigMap" in status["message"]


async def test_an_action_counts_once_it_is_done() -> None:
    before = done("CreateConfig"), done("CreatePreflight")
    await reconciler(Api(there=ours(another="label")))("uid-one")
    assert (done("CreateConfig"), done("CreatePreflight")) == before
    await reconciler(Api())("uid-one")
    assert (done("CreateConfig"), done("CreatePreflight")) == (before[0] + 1, before[1] + 1)


async def test_no_clock_makes_a_job_rest_for_longer_than_ten_minutes() -> None:
    """One that is a year behind what was told must not hold the job for a year once it is right again."""
    lost = {"attempt": 1, "reason": "JobLost", "at": "2026-03-01T00:00:00Z", "resumedFromStep": 0, "lostSteps": 0}
    run = {"id": "a" * 16, "generation": 1, "interruptions": 3}
    status = {"phase": "Preflight", "run": run, "restarts": [lost], "usage": {"attempts": 1}}
    cache = Cache()
    look = reconciler(Api(), cache=cache, now=datetime(2025, 3, 1, tzinfo=UTC))
    newer = {**JOB["metadata"], "resourceVersion": "2"}
    cache.apply("finetunejobs", {**JOB, "metadata": newer, "status": status})
    assert await look("uid-one") == LONGEST_REST
    assert await look("uid-one") == LONGEST_REST


async def test_a_clock_that_is_behind_lengthens_no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this one the end will be in a year; it was over when it became known."""
    monkeypatch.setattr("finetune_operator.cache.NEWS_SECONDS", 0.0)  # no news of pods comes here
    api, cache = Api(), Cache()
    now = datetime(2026, 3, 1, tzinfo=UTC)
    behind = reconciler(api, cache=cache, now=now - timedelta(days=365))
    job = {**ours(**{MANAGED_BY: MANAGER})["metadata"], "name": "one-p1", "uid": "uid-p1", "resourceVersion": "7"}
    await behind("uid-one")
    (preflight,) = cache.children("uid-one")
    ended = {"type": "Failed", "status": "True", "lastTransitionTime": "2026-03-01T00:00:00Z"}
    meta = {**job, "name": preflight.name, "uid": preflight.uid, "resourceVersion": "200"}
    notes = {"annotations": {"finetune.dev/restart-key": preflight.key, "finetune.dev/ordinal": "1"}}
    cache.apply("jobs", {"metadata": {**meta, **notes}, "status": {"conditions": [ended]}})
    rest = await behind("uid-one")
    assert rest is not None
    assert 9.0 < rest <= 10.0
    assert "next try at 2025-03-01T00:00:" in api.statuses[-1]["message"]


# --- a write without an answer ---


class Mute(Api):
    """Takes a status, or does not, and says neither."""

    def __init__(self, *, takes: bool) -> None:
        super().__init__()
        self.takes = takes
        self.silent = True
        self.events: list[str] = []
        self.written: dict[str, Any] | None = None

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if manifest["kind"] == "Event":
            self.events.append(manifest["reason"])
        return await super().create(manifest)

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        """It goes."""

    async def refusals(self, namespace: str) -> dict[str, str]:
        return {}

    async def write_status(self, namespace: str, name: str, *, body: dict[str, Any]) -> dict[str, Any]:
        if not self.silent:
            return await super().write_status(namespace, name, body=body)
        if self.takes:
            meta = {**STOPPED["metadata"], "resourceVersion": "50"}
            self.written = {**STOPPED, "metadata": meta, "status": body["status"]}
        raise TimeoutError


STOPPED = {
    **JOB,
    "spec": {**JOB["spec"], "suspend": True},
    "status": {
        "phase": "Training",
        "observedGeneration": 1,
        "run": {
            "id": "a" * 16,
            "generation": 1,
            "startedAt": "2026-03-01T00:00:00Z",
            "placedAt": "2026-03-01T00:00:00Z",
        },
        "usage": {"attempts": 1},
    },
}


@pytest.mark.parametrize("takes", [True, False])
async def test_what_was_written_without_an_answer_counts_once(takes: bool) -> None:
    """The API server took it, and the network lost the word of it; or it took nothing, and it is written again."""
    api, cache = Mute(takes=takes), Cache()
    look = reconciler(api, cache=cache, now=datetime(2026, 3, 1, 0, 1, 40, tzinfo=UTC))
    cache.apply("finetunejobs", {**STOPPED, "metadata": {**JOB["metadata"], "resourceVersion": "2"}})
    pinned = config_map(Subject.of(STOPPED), resolved(), key="k")
    cache.apply("configmaps", {**pinned, "metadata": {**pinned["metadata"], "uid": "uid-g1", "resourceVersion": "3"}})
    raw = ours(**{GENERATION: "1", ROLE: "train", RUN: "a" * 16})
    notes = {"finetune.dev/ordinal": "1", "finetune.dev/restart-key": "k"}
    cache.apply("jobs", {"metadata": {**raw["metadata"], "uid": "uid-t1", "annotations": notes}})
    before = counted()
    with pytest.raises(TimeoutError):
        await look("uid-one")
    assert counted() == before, "nobody knows yet"
    api.silent = False
    if api.written is not None:
        cache.apply("finetunejobs", api.written)
    for _ in range(3):
        await look("uid-one")
    assert counted() == before + 100


def counted() -> float:
    return REGISTRY.get_sample_value("finetune_gpu_seconds_total") or 0.0


# --- looks that fail ---

LOOKED_AT = {"phase": "Preflight", "run": {"id": "0123456789abcdef", "generation": 1}}


class Broken(Api):
    """Takes Events, and fails at everything else."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.broken = True
        self.events: dict[str, dict[str, Any]] = {}

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if manifest["kind"] == "Event":
            name = manifest["metadata"]["name"]
            if name in self.events:
                raise ApiError(409, "AlreadyExists", "it is there")
            self.events[name] = manifest
            return manifest
        if self.broken:
            raise self.error
        return await super().create(manifest)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the operator logs as JSON."""
    logger, stream = logging.getLogger("finetune_operator"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json())
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


async def failing(api: Broken, times: int) -> Reconciler:
    look = reconciler(api)
    for _ in range(times):
        with pytest.raises(type(api.error)):
            await look("uid-one")
    return look


async def test_a_look_that_fails_is_logged_with_the_names_of_its_job(log: io.StringIO) -> None:
    cache = Cache()
    look = reconciler(Broken(RuntimeError("no idea")), cache=cache)
    newer = {**JOB["metadata"], "resourceVersion": "2"}
    cache.apply("finetunejobs", {**JOB, "metadata": newer, "status": LOOKED_AT})
    with pytest.raises(RuntimeError):
        await look("uid-one")
    (line,) = [told for told in map(json.loads, log.getvalue().splitlines()) if told["level"] == "warning"]
    names = {"job": "ns/one", "job_uid": "uid-one", "run": "0123456789abcdef", "phase": "Preflight"}
    assert names.items() <= line.items()
    assert line["message"] == "ns/one: look 1 in a row failed: RuntimeError: no idea"


async def test_a_job_whose_looks_fail_says_so_in_one_event() -> None:
    api = Broken(RuntimeError("no idea"))
    look = await failing(api, 2)
    assert api.events == {}
    for _ in range(5):
        with pytest.raises(RuntimeError):
            await look("uid-one")
    (event,) = api.events.values()
    assert (event["type"], event["reason"]) == ("Warning", "ReconcileError")
    assert event["message"] == "3 looks in a row failed; tried again until one does not. RuntimeError: no idea"
    assert event["involvedObject"]["uid"] == "uid-one"


async def test_a_look_that_does_not_fail_begins_the_count_anew() -> None:
    api = Broken(RuntimeError("no idea"))
    look = await failing(api, 2)
    api.broken = False
    await look("uid-one")
    api.broken = True
    for _ in range(2):
        await look._tell_failure("uid-one", api.error)
    assert api.events == {}
    await look._tell_failure("uid-one", api.error)
    assert len(api.events) == 1


@pytest.mark.parametrize(
    "error",
    [
        ApiError(503, "ServiceUnavailable", "etcd"),
        ApiError(500, "500", "etcdserver: request timed out"),
        ApiError(429, "TooManyRequests", "later"),
        TimeoutError(),
        OSError(),
    ],
)
async def test_an_api_server_in_trouble_is_no_event_of_a_job(error: Exception) -> None:
    api = Broken(error)
    await failing(api, 4)
    assert api.events == {}


HOOK = 'Internal error occurred: failed calling webhook "jobs.example.com": failed to call webhook: '


async def test_a_webhook_that_fails_is_told_from_the_third_look_on_until_it_does_not() -> None:
    refused = ApiError(500, "InternalError", f"{HOOK}read tcp 10.0.0.1:51234->10.0.0.2:443: connection reset by peer")
    api = Broken(refused)
    look = await failing(api, 2)
    assert api.statuses == []
    assert await look("uid-one") == 60.0
    (status,) = api.statuses
    said = f"{HOOK}read tcp 10.0.0.2:443: connection reset by peer; tried again every 60 s"
    assert status["message"] == f"the API server refuses what the job needs: {said}"
    stalled = next(c for c in status["conditions"] if c["type"] == "Stalled")
    assert (status["phase"], stalled["status"], stalled["reason"]) == ("Pending", "True", "CreateInternalError")
    api.error = ApiError(500, "InternalError", refused.message.replace("51234", "51235"))
    assert await look("uid-one") == 60.0
    assert len(api.statuses) == 1
    assert len(api.events) == 1
    api.broken = False
    await look("uid-one")
    assert api.statuses[-1]["phase"] == "Preflight"
    assert look._failed == {}


class Unwritable(Broken):
    """Takes no status, either."""

    async def write_status(self, namespace: str, name: str, *, body: dict[str, Any]) -> dict[str, Any]:
        raise self.error


async def test_a_webhook_that_lets_no_status_be_written_is_told_in_an_event() -> None:
    api = Unwritable(ApiError(500, "InternalError", HOOK))
    await failing(api, 4)
    (event,) = api.events.values()
    assert (event["type"], event["reason"]) == ("Warning", "ReconcileError")


class Keeping(Api):
    """Deletes no Job."""

    def __init__(self, error: ApiError) -> None:
        super().__init__()
        self.error: ApiError | None = error
        self.deleted: list[str] = []
        self.kept: list[str] = []

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        (self.deleted if self.error is None else self.kept).append(name)
        if self.error is not None:
            raise self.error


async def test_one_job_that_is_kept_keeps_no_other_from_being_deleted() -> None:
    api, cache = Keeping(ApiError(403, "Forbidden", "kept for the auditors")), Cache()
    look = reconciler(api, cache=cache, profile=False)
    halted = {**JOB, "metadata": {**JOB["metadata"], "resourceVersion": "2"}, "spec": {**JOB["spec"], "suspend": True}}  # type: ignore[dict-item]
    cache.apply("finetunejobs", halted)
    for uid in ("one", "two"):
        there = {**ours(**{MANAGED_BY: MANAGER})["metadata"], "creationTimestamp": "2026-03-01T00:00:00Z"}
        cache.apply("jobs", {"metadata": {**there, "name": f"job-{uid}", "uid": uid}})
    assert await look("uid-one") == 60.0
    assert sorted(api.kept) == ["job-one", "job-two"]
    told = api.statuses[-1]
    stalled = next(c for c in told["conditions"] if c["type"] == "Stalled")
    assert (told["phase"], stalled["reason"]) == ("Suspended", "DeleteForbidden")
    assert "refuses to delete Job job-" in told["message"]
    api.error = None
    await look("uid-one")
    assert sorted(api.deleted) == ["job-one", "job-two"]


def twin(name: str, *, created: str) -> dict[str, Any]:
    """A FineTuneJob whose preflight has passed."""
    marks = {"PreflightPassed": ("True", "Fresh"), "Succeeded": ("Unknown", "PreflightPassed")}
    conditions = [
        {"type": kind, "status": truth, "reason": reason, "message": "", "lastTransitionTime": created}
        | {"observedGeneration": 1}
        for kind, (truth, reason) in marks.items()
    ]
    run = {"id": "a" * 16, "generation": 1}
    meta = {**JOB["metadata"], "name": name, "uid": f"uid-{name}", "creationTimestamp": created}
    status = {"phase": "Queued", "observedGeneration": 1, "run": run, "conditions": conditions}
    return {**JOB, "metadata": meta, "status": status}


class Slow(Api):
    """While it takes the first train Job, somebody else is looked at."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.fails = fails
        self.begun: list[str] = []
        self.look: Reconciler | None = None

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if not manifest["metadata"]["name"].endswith("-t1"):
            return await super().create(manifest)
        self.begun.append(manifest["metadata"]["name"])
        look, self.look = self.look, None
        if look is not None and not self.fails:
            await look("uid-older")
        if self.fails:
            raise TimeoutError
        return await super().create(manifest)


@pytest.mark.parametrize("fails", [False, True], ids=["is not answered yet", "was never answered"])
async def test_a_twin_begins_nothing_while_the_first_attempt_of_the_run(fails: bool) -> None:
    """The older one goes first where both may, but not beside a train Job that may be there already."""
    api, cache = Slow(fails=fails), Cache()
    cache.apply("finetunejobs", twin("younger", created="2026-03-01T00:00:00Z"))
    look = api.look = reconciler(api, cache=cache, now=datetime(2026, 3, 1, 1, tzinfo=UTC))
    older = twin("older", created="2026-02-01T00:00:00Z")
    if fails:
        with pytest.raises(TimeoutError):
            await look("uid-younger")
        cache.apply("finetunejobs", older)
        await look("uid-older")
    else:
        create = api.create

        async def comes_meanwhile(manifest: dict[str, Any]) -> dict[str, Any]:
            cache.apply("finetunejobs", older)
            return await create(manifest)

        api.create = comes_meanwhile  # type: ignore[method-assign]
        await look("uid-younger")
    assert api.begun == ["younger-uid-y-t1"]


async def test_a_group_begins_nothing_while_another_is_being_begun() -> None:
    """The older one goes first where both may, but not while the younger one's Job is on its way."""
    api, cache = Slow(fails=False), Cache()

    def group(name: str, *, created: str) -> dict[str, Any]:
        raw = twin(name, created=created)
        return {**raw, "spec": {**raw["spec"], "output": {"uri": f"s3://{name}/"}, "resources": {"nodes": 2}}}

    cache.apply("finetunejobs", group("younger", created="2026-03-01T00:00:00Z"))
    look = api.look = reconciler(api, cache=cache, now=datetime(2026, 3, 1, 1, tzinfo=UTC))
    create = api.create

    async def comes_meanwhile(manifest: dict[str, Any]) -> dict[str, Any]:
        cache.apply("finetunejobs", group("older", created="2026-02-01T00:00:00Z"))
        return await create(manifest)

    api.create = comes_meanwhile  # type: ignore[method-assign]
    await look("uid-younger")
    assert api.begun == ["younger-uid-y-t1"]
