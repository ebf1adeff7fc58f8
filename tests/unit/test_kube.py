"""What is sent to the API server: nothing by who does not lead, and nothing that a newer state would have to fear."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune_operator.cache import Kind
from finetune_operator.kube import ApiError, Kube, Listing, NotLeading

JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "team-a", "name": "one-12345-t1"}}
STATUS = {"metadata": {"name": "one", "namespace": "team-a", "uid": "u", "resourceVersion": "7"}, "status": {}}
LEASE = {"metadata": {"namespace": "system", "name": "operator"}, "spec": {"holderIdentity": "me"}}


@dataclass
class Answer:
    status: int
    body: Any

    async def read(self) -> bytes:
        return json.dumps(self.body).encode()


@dataclass
class Client:
    """The part of the library that sends."""

    answers: list[Answer] = field(default_factory=list)
    sent: list[tuple[str, str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    asked: list[tuple[dict[str, str], str]] = field(default_factory=list)
    """Query and Accept."""

    async def param_serialize(self, *, method: str, resource_path: str, **rest: Any) -> tuple[Any, ...]:
        self.asked.append((dict(rest["query_params"]), rest["header_params"]["Accept"]))
        return method, resource_path, {}, None, []

    async def call_api(self, method: str, path: str, headers: Any, body: Any, *, _request_timeout: float) -> Answer:
        self.sent.append((method, path, body))
        self.seconds.append(_request_timeout)
        return self.answers.pop(0) if self.answers else Answer(200, {"metadata": {}, "items": []})


Request = Callable[[Kube], Awaitable[Any]]
WRITES: dict[str, Request] = {
    "create": lambda kube: kube.create(JOB),
    "delete": lambda kube: kube.delete_job("team-a", "one-12345-t1", uid="u"),
    "status": lambda kube: kube.write_status("team-a", "one", body=STATUS),
}


def kube(*answers: Answer) -> tuple[Kube, Client]:
    client = Client(list(answers))
    return Kube(client, outside=False), client


@pytest.mark.parametrize("name", WRITES)
async def test_who_does_not_lead_sends_no_write(name: str) -> None:
    api, client = kube()
    api.write_only_while(lambda: False)
    with pytest.raises(NotLeading):
        await WRITES[name](api)
    assert client.sent == []


@pytest.mark.parametrize("name", WRITES)
async def test_the_election_is_asked_for_each_write_anew(name: str) -> None:
    api, client = kube()
    leading = iter([True, False])
    api.write_only_while(lambda: next(leading))
    await WRITES[name](api)
    with pytest.raises(NotLeading):
        await WRITES[name](api)
    assert len(client.sent) == 1


def test_every_method_that_changes_something_is_among_those() -> None:
    """A new one must be added above; what only reads or is the election's own is named here."""
    others = {"connect", "close", "write_only_while", "read_lease", "write_lease", "get", "read", "list", "refusals"}
    others |= {"unprepared", "pod_progress", "served", "outside", "kueue", "workload"}
    methods = {name for name in vars(Kube) if not name.startswith("_")}
    assert methods - others == {"create", "delete_job", "write_status"}


async def test_who_does_not_lead_reads_and_stands_for_election() -> None:
    api, client = kube()
    api.write_only_while(lambda: False)
    await api.list("jobs", None, exact=False)
    await api.read_lease("system", "operator", seconds=3.0)
    await api.write_lease(LEASE, seconds=3.0)
    assert [method for method, _, _ in client.sent] == ["GET", "GET", "POST"]


async def test_a_list_is_of_metadata_alone_and_comes_a_page_at_a_time() -> None:
    def page(name: str, **more: str) -> Answer:
        meta = {"namespace": "team-a", "name": name, "uid": f"uid-{name}", "resourceVersion": "7"}
        return Answer(200, {"metadata": {"resourceVersion": "12", **more}, "items": [{"metadata": meta}]})

    api, client = kube(page("one", **{"continue": "there"}), page("two"))
    listing = await api.list("jobs", "team-a", exact=True)
    assert [(item.namespace, item.name, item.uid, item.version) for item in listing.items] == [
        ("team-a", "one", "uid-one", 7),
        ("team-a", "two", "uid-two", 7),
    ]
    assert listing.version == 12
    assert [path for _, path, _ in client.sent] == ["/apis/batch/v1/namespaces/team-a/jobs"] * 2
    (first, accept), (second, again) = client.asked
    assert accept == again == "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
    assert second == {**first, "continue": "there"}
    assert first == {"limit": "1000", "labelSelector": "app.kubernetes.io/managed-by=finetune-operator"}


@pytest.mark.parametrize(
    ("kind", "exact", "query"),
    [
        ("jobs", False, {"labelSelector": "app.kubernetes.io/managed-by=finetune-operator", "resourceVersion": "0"}),
        ("finetunejobs", False, {"limit": "1000"}),
        ("finetunejobs", True, {"limit": "1000"}),
    ],
)
async def test_what_is_found_by_a_label_comes_from_memory_unless_it_has_to_be_exact(
    kind: Kind, exact: bool, query: dict[str, str]
) -> None:
    api, client = kube()
    await api.list(kind, None, exact=exact)
    assert [asked for asked, _ in client.asked] == [query]


async def test_a_list_of_metadata_that_is_empty_has_null_for_its_items() -> None:
    api, _ = kube(Answer(200, {"metadata": {"resourceVersion": "3"}, "items": None}))
    assert await api.list("jobs", None, exact=True) == Listing([], 3)


async def test_an_object_is_read_with_no_other_right_than_to_list() -> None:
    api, client = kube(Answer(200, {"metadata": {}, "items": [{"metadata": {"name": "one"}}]}))
    assert await api.read("pods", "team-a", "one") == {"metadata": {"name": "one"}}
    assert await api.read("pods", "team-a", "two") is None
    assert [(method, path) for method, path, _ in client.sent] == [("GET", "/api/v1/namespaces/team-a/pods")] * 2
    label = {"labelSelector": "app.kubernetes.io/managed-by=finetune-operator"}
    assert [asked for asked, _ in client.asked] == [
        {"fieldSelector": f"metadata.name={n}", **label} for n in ("one", "two")
    ]


async def test_of_the_events_of_a_job_the_newest_counts() -> None:
    def event(uid: str, when: str | None, message: str) -> dict[str, Any]:
        return {"involvedObject": {"uid": uid}, "lastTimestamp": when, "message": message}

    first = [event("a", "2026-01-01T00:00:05Z", "now"), event("b", None, "no time")]
    second = [event("a", "2026-01-01T00:00:01Z", "before"), event("c", "2026-01-01T00:00:01Z", "")]
    api, client = kube(
        Answer(200, {"metadata": {"continue": "there"}, "items": first}), Answer(200, {"metadata": {}, "items": second})
    )
    assert await api.refusals("team-a") == {"a": "now", "b": "no time"}
    assert [path for _, path, _ in client.sent] == ["/api/v1/namespaces/team-a/events"] * 2
    assert client.asked[0][0]["fieldSelector"] == "reason=FailedCreate,involvedObject.kind=Job"


async def test_of_the_events_of_a_pod_that_is_not_prepared_the_most_telling_counts_and_of_equal_ones_the_newest() -> (
    None
):
    def event(uid: str, reason: str, minute: int, message: str) -> dict[str, Any]:
        when = f"2026-01-01T00:{minute:02d}:00Z"
        return {"involvedObject": {"uid": uid}, "reason": reason, "lastTimestamp": when, "message": message}

    first = [event("a", "FailedAttachVolume", 1, "Multi-Attach"), event("b", "FailedMount", 2, "new")]
    second = [
        event("a", "FailedMount", 3, "timed out"),
        event("b", "FailedMount", 1, "old"),
        event("c", "Unhealthy", 1, "of no matter"),
    ]
    api, client = kube(
        Answer(200, {"metadata": {"continue": "there"}, "items": first}), Answer(200, {"metadata": {}, "items": second})
    )
    found = await api.unprepared("team-a")
    assert found == {"a": ("FailedAttachVolume", "Multi-Attach"), "b": ("FailedMount", "new")}
    assert client.asked[0][0]["fieldSelector"].startswith("involvedObject.kind=Pod,type=Warning,")


async def test_a_lease_is_created_or_replaced_in_the_version_that_was_read() -> None:
    api, client = kube()
    await api.write_lease(LEASE, seconds=3.0)
    read: Mapping[str, Any] = {**LEASE, "metadata": {**LEASE["metadata"], "resourceVersion": "7"}}
    await api.write_lease(read, seconds=2.5)
    leases = "/apis/coordination.k8s.io/v1/namespaces/system/leases"
    assert client.sent == [("POST", leases, LEASE), ("PUT", f"{leases}/operator", read)]
    assert client.seconds == [3.0, 2.5]


async def test_a_job_is_deleted_by_its_uid() -> None:
    api, client = kube()
    await api.delete_job("team-a", "one-12345-t1", uid="u")
    ((_, _, body),) = client.sent
    assert body["preconditions"] == {"uid": "u"}


@pytest.mark.parametrize("code", [404, 409])
async def test_a_job_that_is_gone_or_whose_name_another_has_by_now_is_deleted_already(code: int) -> None:
    api, _ = kube(Answer(code, {"reason": "x", "message": "y"}))
    await api.delete_job("team-a", "one-12345-t1", uid="u")


async def test_a_status_is_never_written_over_one_that_was_not_seen() -> None:
    api, client = kube(Answer(409, {"reason": "Conflict", "message": "changed"}))
    with pytest.raises(AssertionError):
        await api.write_status("team-a", "one", body={**STATUS, "metadata": {"resourceVersion": ""}})
    assert client.sent == []
    with pytest.raises(ApiError, match="409 Conflict"):
        await api.write_status("team-a", "one", body=STATUS)


async def test_nothing_is_created_under_a_name_that_the_api_server_makes_up() -> None:
    api, client = kube()
    with pytest.raises(KeyError):
        await api.create({"kind": "Event", "metadata": {"generateName": "one.", "namespace": "team-a"}})
    assert client.sent == []
