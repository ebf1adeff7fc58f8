"""The only importer of kubernetes: requests to the API server, as raw JSON, with typed errors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
from kubernetes.aio import client, config

from finetune_api import GROUP, VERSION
from finetune_operator import tracing
from finetune_operator.cache import Kind
from finetune_operator.metrics import API_REQUESTS
from finetune_operator.views import SELECTOR, Raw

TIMEOUT, SHORT = 30.0, 10.0
"""Seconds for an answer; less where only words depend on it."""
PAGE, EVENTS = 1000, 500
UNPREPARED = ("NetworkNotReady", "FailedCreatePodSandBox", "FailedMapVolume", "FailedMount", "FailedAttachVolume")
"""Reasons of the Events of a pod that its node has taken and cannot prepare, the most telling last."""
"""Items in one answer."""
JSON = "application/json"
METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
KUEUE = "kueue.x-k8s.io"
PREFIXES = {
    "finetunejobs": f"/apis/{GROUP}/{VERSION}",
    "finetuneprofiles": f"/apis/{GROUP}/{VERSION}",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "configmaps": "/api/v1",
    "services": "/api/v1",
    "events": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}
PLURALS = {"Job": "jobs", "ConfigMap": "configmaps", "Service": "services", "Event": "events"}


class ApiError(Exception):
    """The API server said no: `code` is the HTTP status, `reason` its word, such as AlreadyExists."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def lasting(self) -> bool:
        """The same request would be refused again: somebody has to change something first."""
        return self.code in (400, 403, 413, 422)

    @property
    def internal(self) -> bool:
        """The API server answers, and something that it asks does not: an admission webhook that is down, say. Of its
        own troubles, and etcd's, it speaks otherwise."""
        return self.code == 500 and self.reason == "InternalError"


class NotLeading(Exception):
    """Nothing was sent, because another operator leads or may lead by now."""


class Outline(NamedTuple):
    """That an object is there, and in which version."""

    namespace: str
    name: str
    uid: str
    version: int

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}".lstrip("/")


TROUBLE = (ApiError, aiohttp.ClientError, TimeoutError, OSError)
"""What a request may end in that is worth another try."""


@dataclass(frozen=True)
class Listing:
    items: list[Outline]
    version: int


class Kube:
    """One connection pool to one API server."""

    def __init__(self, api: client.ApiClient, *, outside: bool) -> None:
        self._api = api
        self.outside = outside
        """True when pods are out of reach and only the API server's proxy leads to them."""
        self._may_write: Callable[[], bool] = lambda: True

    @classmethod
    async def connect(cls, kubeconfig: str | None) -> "Kube":
        """With a kubeconfig from outside, else with the service account of the pod.

        Raises kubernetes' ConfigException when neither is there.
        """
        settings = client.Configuration()
        if kubeconfig is not None:
            await config.load_kube_config(config_file=kubeconfig, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)
        settings.client_session_kwargs = {"trust_env": False}
        return cls(client.ApiClient(configuration=settings), outside=kubeconfig is not None)

    async def close(self) -> None:
        await self._api.close()

    # --- writes: asked of the election at the last moment, and harmless if the answer is out of date on arrival ---

    def write_only_while(self, leading: Callable[[], bool]) -> None:
        """From now on whatever changes something, but a Lease, raises NotLeading unless `leading()`."""
        self._may_write = leading

    async def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The object as created. Raises ApiError, with reason AlreadyExists if the name is taken.

        Names follow from what was decided: whoever decides the same twice, here or elsewhere, creates it once.
        """
        plural, namespace = PLURALS[manifest["kind"]], manifest["metadata"]["namespace"]
        assert manifest["metadata"]["name"], "a name made up by the API server would be another one each time"
        return await self._request("POST", _path(plural, namespace), body=manifest)

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        """In the background; it is fine if that very Job is gone already. Raises ApiError."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._request("DELETE", _path("jobs", namespace, name), body=options)
        except ApiError as error:
            if error.code not in (404, 409):  # 409: the name belongs to another Job by now
                raise

    async def write_status(self, namespace: str, name: str, *, body: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the status; the body's resourceVersion makes sure nobody else has. Raises ApiError."""
        assert body["metadata"]["resourceVersion"], "without it any newer status would be overwritten"
        return await self._request("PUT", _path("finetunejobs", namespace, name) + "/status", body=body)

    # --- the election's own ---

    async def read_lease(self, namespace: str, name: str, *, seconds: float) -> dict[str, Any]:
        """Raises ApiError, with code 404 if there is none."""
        return await self._request("GET", _path("leases", namespace, name), seconds=seconds)

    async def write_lease(self, lease: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Create it if it has no resourceVersion, else replace that version.

        Raises ApiError, with code 409 when somebody else was faster.
        """
        meta = lease["metadata"]
        if "resourceVersion" not in meta:
            path, method = _path("leases", meta["namespace"]), "POST"
        else:
            path, method = _path("leases", meta["namespace"], meta["name"]), "PUT"
        return await self._request(method, path, body=lease, seconds=seconds, guarded=False)

    # --- reads ---

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        return await self._request("GET", _path(PLURALS[kind], namespace, name))

    async def read(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        """The object as the watches would show it, or None. Needs no right but theirs. Raises ApiError."""
        query = {"fieldSelector": f"metadata.name={name}", **_labels(kind)}
        answer = await self._request("GET", _path(kind, namespace), query=query)
        return next(iter(answer["items"]), None)

    async def list(self, kind: Kind, namespace: str | None, *, exact: bool) -> Listing:
        """Metadata alone: whole objects of thousands of jobs are a hundred megabytes.

        Unless it has to be `exact`, what is found by a label comes from the API server's memory, at most moments old:
        it may be a small part of the cluster, all of which is read otherwise. The rest comes a page at a time.

        Raises ApiError, with code 410 if the API server has forgotten where it was.
        """
        query = _labels(kind)
        query |= {"limit": str(PAGE)} if exact or not query else {"resourceVersion": "0"}
        items: list[Outline] = []
        while True:
            answer = await self._request("GET", _path(kind, namespace), query=query, accept=METADATA)
            items += (_outline(item["metadata"]) for item in answer["items"] or ())  # null where there are none
            meta = answer["metadata"]
            if not meta.get("continue"):
                return Listing(items, _number(meta.get("resourceVersion")))
            query["continue"] = meta["continue"]

    async def refusals(self, namespace: str) -> dict[str, str]:
        """By UID of a Job: why its controller could not create pods for it, in the words of its newest Event."""
        query = {"fieldSelector": "reason=FailedCreate,involvedObject.kind=Job", "limit": str(EVENTS)}
        newest: dict[str, tuple[str, str]] = {}
        while True:
            answer = await self._request("GET", _path("events", namespace), query=query, seconds=SHORT)
            for item in answer["items"]:
                uid, when = item["involvedObject"].get("uid", ""), item.get("lastTimestamp") or ""
                newest[uid] = max(newest.get(uid, ("", "")), (when, str(item.get("message", ""))))
            if not answer["metadata"].get("continue"):
                return {uid: message for uid, (_, message) in newest.items() if message}
            query["continue"] = answer["metadata"]["continue"]

    async def unprepared(self, namespace: str) -> dict[str, tuple[str, str]]:
        """By UID of a pod: why its node cannot prepare it, in the reason and the words of an Event."""
        scope = "involvedObject.kind=Pod,type=Warning,reason!=FailedScheduling,reason!=BackOff"
        query = {"fieldSelector": scope, "limit": str(EVENTS)}
        found: dict[str, tuple[int, str, str, str]] = {}
        while True:
            answer = await self._request("GET", _path("events", namespace), query=query, seconds=SHORT)
            for item in answer["items"]:
                uid, reason = item["involvedObject"].get("uid", ""), str(item.get("reason", ""))
                if reason in UNPREPARED:
                    when = item.get("lastTimestamp") or item.get("eventTime") or ""
                    told = UNPREPARED.index(reason), when, reason, str(item.get("message", ""))
                    found[uid] = max(found.get(uid, told), told)
            if not answer["metadata"].get("continue"):
                return {uid: (reason, message) for uid, (_, _, reason, message) in found.items()}
            query["continue"] = answer["metadata"]["continue"]

    async def kueue(self) -> str | None:
        """The version in which Workloads are served; None where Kueue is not installed. Raises ApiError."""
        try:
            answer = await self._request("GET", f"/apis/{KUEUE}")
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        return str(answer["preferredVersion"]["version"])

    async def workload(self, namespace: str, *, version: str, job_uid: str) -> dict[str, Any] | None:
        """What Kueue made of the Job with this UID; None before it has looked at it. Raises ApiError."""
        query = {"labelSelector": f"{KUEUE}/job-uid={job_uid}", "limit": "1"}
        answer = await self._request("GET", f"/apis/{KUEUE}/{version}/namespaces/{namespace}/workloads", query=query)
        return next(iter(answer["items"]), None)

    async def pod_progress(self, namespace: str, pod: str, port: int) -> bytes:
        """GET /progress through the API server's proxy. Raises ApiError."""
        path = _path("pods", namespace, f"{pod}:{port}") + "/proxy/progress"
        return await self._raw("GET", path, seconds=5.0)

    async def served(self) -> bool:
        """Does the API server know our resources?"""
        try:
            answer = await self._request("GET", f"/apis/{GROUP}/{VERSION}")
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return {"finetunejobs", "finetuneprofiles"} <= {item["name"] for item in answer["resources"]}

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Raw | None = None,
        seconds: float = TIMEOUT,
        guarded: bool = True,
        accept: str = JSON,
    ) -> dict[str, Any]:
        content = await self._raw(method, path, query=query, body=body, seconds=seconds, guarded=guarded, accept=accept)
        answer: dict[str, Any] = json.loads(content)
        return answer

    async def _raw(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Raw | None = None,
        seconds: float = TIMEOUT,
        guarded: bool = True,
        accept: str = JSON,
    ) -> bytes:
        # Without the body, which is JSON already: it would be walked through for things that are not.
        verb, url, headers, _, _ = await self._api.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params={"Accept": accept},
            auth_settings=["BearerToken"],
        )
        if guarded and method != "GET" and not self._may_write():
            raise NotLeading(f"{method} {path} was not sent: this operator does not lead")
        code = "none"
        with tracing.request(method, _resource(path), url) as answered:
            try:
                answer = await self._api.call_api(verb, url, headers, body, _request_timeout=seconds)
                code = str(answer.status)
                answered(answer.status)
            finally:
                API_REQUESTS.labels(method, _resource(path), code).inc()
            content: bytes = await answer.read()
        if answer.status >= 400:
            raise _error(answer.status, content)
        return content


def _path(plural: str, namespace: str | None, name: str | None = None) -> str:
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"{PREFIXES[plural]}{where}/{plural}" + (f"/{name}" if name else "")


def _labels(kind: Kind) -> dict[str, str]:
    return {} if kind in ("finetunejobs", "finetuneprofiles") else {"labelSelector": SELECTOR}


def _outline(meta: Raw) -> Outline:
    return Outline(meta.get("namespace", ""), meta["name"], meta["uid"], _number(meta.get("resourceVersion")))


def _number(version: str | None) -> int:
    return int(version) if version and version.isdigit() else 0


def _resource(path: str) -> str:
    """The plural of what a path names, with its subresource; of a group alone, "discovery"."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[:1] == ["namespaces"]:
        parts = parts[2:]
    return "/".join([*parts[:1], *parts[2:3]]) or "discovery"


def _error(code: int, content: bytes) -> ApiError:
    try:
        status = json.loads(content)
        return ApiError(code, status.get("reason") or str(code), status.get("message") or "")
    except (ValueError, AttributeError):
        return ApiError(code, str(code), content[:200].decode(errors="replace"))
