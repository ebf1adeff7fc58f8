"""Bad input on a real API server: each ends with one clear sentence, and no train pod was ever there.

All documents are applied at once, so that their preflight pods share the time.
"""

import json
import re
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.e2e.real import becomes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROWS = [
    {"text": f"the {subject} number {number}", "label": label}
    for number in range(20)
    for subject, label in (("invoice", "billing"), ("crash", "bug"))
]
GOOD = "".join(json.dumps(row) + "\n" for row in ROWS)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Case:
    """One thing wrong with an otherwise good document. `files`: keys below the case's own prefix in the bucket."""

    phase: str
    reason: str
    words: tuple[str, ...]
    """Regular expressions that the message must match."""
    spec: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=lambda: {"train.jsonl": GOOD})


FINAL: dict[str, Case] = {
    "column-missing": Case(
        "Failed",
        "ColumnMissing",
        (r"train\.jsonl", r"'?label'?", r"columns found: '?text'?, '?topic'?", r"spec\.task\.columns\.label"),
        files={"train.jsonl": lines([{"text": row["text"], "topic": row["label"]} for row in ROWS])},
    ),
    "line-17-is-not-json": Case(
        "Failed",
        "InvalidRow",
        (r"train\.jsonl:17:", r"JSON"),
        files={"train.jsonl": lines(ROWS[:16]) + '{"text": "half a row\n' + lines(ROWS[16:])},
    ),
    "empty-file": Case("Failed", "EmptyData", (r"train\.jsonl", r"the file is empty"), files={"train.jsonl": ""}),
    "one-class-only": Case(
        "Failed",
        "OneClassOnly",
        (r"'?bug'? alone", r"nothing to learn"),
        files={"train.jsonl": lines([{**row, "label": "bug"} for row in ROWS])},
    ),
    "label-outside": Case(
        "Failed",
        "UnknownLabel",
        (r"train\.jsonl:1:", r"'?billing'?", r"spec\.task\.labels", r"'?bug'?, '?question'?"),
        spec={"task": {"type": "text-classification", "labels": ["bug", "question"]}},
    ),
    "model-without-config": Case(
        "Failed",
        "ModelIncomplete",
        (r"config\.json is missing",),
        spec={"model": {"uri": "s3://BUCKET/PREFIX/model"}},
        files={"train.jsonl": GOOD, "model/tokenizer.json": "{}"},
    ),
    "pickle-only-model": Case(
        "Failed",
        "PickleModel",
        (r"pytorch_model\.bin", r"never read", r"save_pretrained"),
        spec={"model": {"uri": "s3://BUCKET/PREFIX/model"}},
        files={
            "train.jsonl": GOOD,
            "model/config.json": '{"model_type": "bert"}',
            "model/pytorch_model.bin": "\x80\x04",
        },
    ),
}

WAITING: dict[str, Case] = {
    "bucket-missing": Case(
        "Pending",
        "BucketNotFound",
        (r"MISSING", r"create it or correct"),
        spec={"data": {"train": [{"uri": "s3://MISSING/train.jsonl"}]}},
    ),
    "key-missing": Case("Pending", "ObjectNotFound", (r"s3://BUCKET/PREFIX/train\.jsonl", r"upload"), files={}),
    "wrong-credentials": Case(
        "Pending",
        "InvalidCredentials",
        (r"secret access key does not belong", r"in the Secret PREFIX"),
        spec={"storage": {"credentialsSecret": "PREFIX"}},
    ),
    "secret-missing": Case(
        "Pending",
        "CredentialsMissing",
        (r"provide AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the Secret PREFIX",),
        spec={"storage": {"credentialsSecret": "PREFIX"}},
    ),
    "authority-missing": Case(
        "Pending",
        "CertificateAuthorityMissing",
        (r"ca\.crt of the ConfigMap PREFIX is missing", r"put the certificate of the authority there, in PEM"),
        spec={"storage": {"caConfigMap": "PREFIX"}},
    ),
    "endpoint-unreachable": Case(
        "Pending",
        "EndpointUnreachable",
        (r"http://HOST:PORT", r"start its server"),
        spec={"storage": {"endpoint": "http://HOST:PORT"}},
    ),
    "output-not-writable": Case(
        "Pending",
        "OutputNotWritable",
        (r"spec\.output\.uri", r"s3:PutObject", r"the Secret reader"),
        spec={"storage": {"credentialsSecret": "reader"}},
    ),
}


class Bad:
    """All bad documents, applied, and what each is called."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.bucket = f"bad-{secrets.token_hex(4)}"
        self.missing = f"missing-{secrets.token_hex(4)}"
        self.host = world.endpoint.removeprefix("http://").partition(":")[0]
        with socket.create_server((self.host, 0)) as free:  # nothing listens there until a test mends it
            self.port = int(free.getsockname()[1])
        self.namespace = world.namespace("bad")
        world.s3.create_bucket(Bucket=self.bucket)
        reader = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret-key"}
        world.secret(self.namespace, "reader", reader)
        wrong = {**world.keys, "AWS_SECRET_ACCESS_KEY": "not-the-key"}
        world.secret(self.namespace, "wrong-credentials", wrong)
        for name, case in {**WAITING, **FINAL}.items():
            for path, text in case.files.items():
                self.upload(f"{name}/{path}", text)
            world.apply(self.document(name, case), self.namespace)

    def upload(self, key: str, text: str) -> None:
        self.world.s3.put_object(Bucket=self.bucket, Key=key, Body=text.encode("latin-1"))

    def filled(self, text: str, name: str) -> str:
        pairs = {"BUCKET": self.bucket, "PREFIX": name, "MISSING": self.missing, "HOST": self.host}
        pairs["PORT"] = str(self.port)
        for word, value in pairs.items():
            text = text.replace(word, value)
        return text

    def document(self, name: str, case: Case) -> dict[str, Any]:
        spec = {
            "task": {"type": "text-classification"},
            "model": {"uri": "s3://models/minilm"},
            "data": {"train": [{"uri": "s3://BUCKET/PREFIX/train.jsonl"}], "maxLength": 32},
            "output": {"uri": "s3://BUCKET/PREFIX/out"},
            **case.spec,
        }
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": json.loads(self.filled(json.dumps(spec), name)),
        }

    def said(self, name: str, case: Case) -> dict[str, Any]:
        """The status once it names the reason; every word of the case must be in its message."""
        status: dict[str, Any] = self.world.wait(
            self.namespace, name, lambda s: condition(s, "Succeeded").get("reason") == case.reason, what=case.reason
        )
        for pattern in case.words:
            assert re.search(self.filled(pattern, name), status["message"]), (pattern, status["message"])
        assert len(status["message"].splitlines()) == 1
        for secret in ("not-the-key", self.world.keys["AWS_SECRET_ACCESS_KEY"], "reader-secret-key"):
            assert secret not in json.dumps(status)
        assert status["phase"] == case.phase
        return status

    def becomes(self, name: str, case: Case) -> None:
        """The whole status, with the words above for what is drawn at random."""
        drawn = {self.bucket: "BUCKET", self.missing: "MISSING", f"{self.host}:{self.port}": "HOST:PORT"}
        becomes(self.world, self.namespace, name, name, case.phase, case.reason, names=drawn)

    def train_pods(self, name: str) -> list[Any]:
        """Those that were ever there; that the watch has seen the preflight pod shows that it sees."""
        uid = self.world.job(self.namespace, name)["metadata"]["uid"]
        assert self.world.pods.of(uid, "preflight")
        found: list[Any] = self.world.pods.of(uid, "train")
        return found

    def written(self, name: str) -> list[str]:
        found = self.world.s3.list_objects_v2(Bucket=self.bucket, Prefix=f"{name}/out")
        return [entry["Key"] for entry in found.get("Contents", ())]


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions", ()) if c["type"] == kind), {})


@pytest.fixture(scope="module")
def bad(world: Any) -> Iterator[Bad]:
    with world.timed("bad documents: apply"):
        applied = Bad(world)
    yield applied
    world.kubectl("delete", "finetunejobs", "--all", "-n", applied.namespace, "--wait=false")


@pytest.mark.parametrize("name", FINAL)
def test_wrong_content_is_final_and_says_what_to_mend(bad: Bad, name: str) -> None:
    bad.said(name, FINAL[name])
    bad.becomes(name, FINAL[name])
    assert bad.train_pods(name) == []
    assert bad.written(name) == []


def mend(bad: Bad, name: str) -> Any:
    """Mends what is wrong with a waiting document; returns what must live on."""
    world = bad.world
    if name == "bucket-missing":
        world.s3.create_bucket(Bucket=bad.missing)
        world.s3.put_object(Bucket=bad.missing, Key="train.jsonl", Body=GOOD.encode())
    elif name == "key-missing":
        bad.upload(f"{name}/train.jsonl", GOOD)
    elif name in ("wrong-credentials", "secret-missing"):
        world.secret(bad.namespace, name, world.keys)
    elif name == "authority-missing":  # any will do: the server of these documents shows no certificate
        known = world.look(f"/api/v1/namespaces/{bad.namespace}/configmaps/kube-root-ca.crt")["data"]
        authority = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": known}
        world.apply(authority, bad.namespace)
    elif name == "output-not-writable":
        world.secret(bad.namespace, "reader", world.keys)
    elif name == "endpoint-unreachable":
        return Forwarder(bad.host, bad.port, world.endpoint)
    return None


class Forwarder:
    """Accepts connections at an address and passes their bytes on to the S3 server, until it is closed."""

    def __init__(self, host: str, port: int, endpoint: str) -> None:
        target, _, target_port = endpoint.removeprefix("http://").partition(":")
        self.target = (target, int(target_port))
        self.listener = socket.create_server((host, port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.listener.close()


@pytest.mark.parametrize("name", WAITING)
def test_a_lacking_environment_is_waited_for(bad: Bad, name: str) -> None:
    status = bad.said(name, WAITING[name])
    bad.becomes(name, WAITING[name])
    assert re.search(r"next try at \d{4}-\d\d-\d\dT|looking again now", status["message"])
    assert bad.train_pods(name) == []
    assert bad.written(name) == []


@pytest.fixture(scope="module")
def mended(bad: Bad) -> Iterator[None]:
    """Everything mended at once, after all have been seen waiting."""
    for name, case in WAITING.items():
        bad.said(name, case)
    kept = [mend(bad, name) for name in WAITING]
    yield
    for thing in kept:
        if thing is not None:
            thing.close()


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("name", WAITING)
def test_it_recovers_by_itself_once_mended(bad: Bad, name: str) -> None:
    status = bad.world.wait(
        bad.namespace,
        name,
        lambda s: condition(s, "PreflightPassed").get("status") == "True",
        what="preflight to pass",
        seconds=300,
    )
    assert status["phase"] not in ("Failed", "Pending")
    bad.world.kubectl("delete", "finetunejob", name, "-n", bad.namespace, "--wait=false")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-field": ({"trainning": {"epochs": 1}}, r'unknown field "spec\.trainning"'),
    "negative-learning-rate": (
        {"training": {"learningRate": -1}},
        r"spec\.training\.learningRate: Invalid value: -1.*should be greater than 0",
    ),
    "epochs-and-max-steps": (
        {"training": {"epochs": 1, "maxSteps": 10}},
        r"spec\.training: .*give epochs and maxSteps not together: at most one of them",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_api_server_itself_refuses_nonsense(bad: Bad, name: str) -> None:
    extra, words = REFUSED[name]
    said = bad.world.refusal(bad.document(name, Case("", "", (), spec=extra)), bad.namespace)
    assert re.search(words, said), said
    assert bad.world.kubectl.run("get", "finetunejob", name, "-n", bad.namespace).returncode != 0
