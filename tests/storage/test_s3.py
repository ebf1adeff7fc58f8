"""What is particular to S3, on a real server: errors told apart, broken connections, credentials, endpoints."""

import errno
import itertools
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import ports

from finetune_trainer.storage import (
    AccessDenied,
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    Store,
    Unavailable,
    Unreachable,
    open_store,
    s3,
)
from finetune_trainer.storage.answers import Answer, Request, meaning
from finetune_trainer.storage.digests import Hasher, digest_of
from finetune_trainer.storage.transfer import (
    WORKERS,
    Crc32,
    Disconnected,
    FileBody,
    FilePart,
    Response,
    Target,
    fetch_ranges,
    part_size,
    range_size,
    read_parts,
    send_file,
    send_parts,
)

MIB = 1 << 20


def credentials(directory: Path, access: str, secret: str, token: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "AWS_ACCESS_KEY_ID").write_text(access + "\n")
    (directory / "AWS_SECRET_ACCESS_KEY").write_text(secret + "\n")
    if token:
        (directory / "AWS_SESSION_TOKEN").write_text(token)
    return directory


def everything(store: Store, path: Path) -> Iterator[Any]:
    """Each kind of operation once."""
    path.write_bytes(b"x")
    yield lambda: store.head("a")
    yield lambda: list(store.list())
    yield lambda: store.read("a")
    yield lambda: store.download("a", path.with_name("target"))
    yield lambda: store.write("a", b"x")
    yield lambda: store.upload(path, "a")
    yield lambda: store.create("b", b"x")
    yield lambda: store.replace("c", b"x", if_match=None)


def test_a_missing_bucket_is_told_by_every_operation_and_never_made(
    s3_server: Any, s3_settings: StorageSettings, tmp_path: Path
) -> None:
    for number in range(8):
        store = open_store("s3://no-such-bucket/prefix", s3_settings)
        with pytest.raises(NotFound, match=r"bucket no-such-bucket does not exist.*create it") as caught:
            list(everything(store, tmp_path / "file"))[number]()
        assert caught.value.reason == "BucketNotFound"
        assert caught.value.environment
        assert s3_server.admin_secret not in str(caught.value)
    assert "no-such-bucket" not in [bucket["Name"] for bucket in s3_server.client().list_buckets()["Buckets"]]


@pytest.mark.parametrize(("kind", "words"), [("access", "access key id is unknown"), ("secret", "does not belong")])
def test_wrong_credentials_are_told_by_every_operation(
    s3_server: Any, s3_bucket: str, tmp_path: Path, kind: str, words: str
) -> None:
    access = "WRONG" if kind == "access" else (s3_server.admin / "AWS_ACCESS_KEY_ID").read_text()
    directory = credentials(tmp_path / "credentials", access, "wrong-secret-value")
    store = open_store(f"s3://{s3_bucket}/prefix", s3_server.settings(directory))
    for operation in everything(store, tmp_path / "file"):
        with pytest.raises(AccessDenied, match=words) as caught:
            operation()
        assert caught.value.reason == "InvalidCredentials"
        assert caught.value.environment
        assert "wrong-secret-value" not in f"{caught.value!r}{caught.value}"
        assert str(directory) in str(caught.value)
        assert f"s3://{s3_bucket}/prefix" in str(caught.value)
        assert "HTTP 403" in str(caught.value)
        assert "request " in str(caught.value)


def test_wrong_credentials_recover_when_the_files_are_mended(s3_server: Any, s3_bucket: str, tmp_path: Path) -> None:
    directory = credentials(tmp_path / "credentials", "WRONG", "wrong")
    store = open_store(f"s3://{s3_bucket}", s3_server.settings(directory))
    with pytest.raises(AccessDenied):
        store.write("a", b"1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (directory / name).write_text((s3_server.admin / name).read_text())
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_a_read_only_identity_reads_and_is_told_what_it_lacks(s3_server: Any, s3_bucket: str, tmp_path: Path) -> None:
    open_store(f"s3://{s3_bucket}", s3_server.settings()).write("a", b"1")
    store = open_store(f"s3://{s3_bucket}", s3_server.settings(s3_server.read_only))
    assert store.read("a") == b"1"
    assert store.head("b") is None
    (tmp_path / "large").write_bytes(bytes(33 * MIB))
    for write in (
        lambda: store.write("b", b"1"),
        lambda: store.create("b", b"1"),
        lambda: store.upload(tmp_path / "large", "b"),
    ):
        with pytest.raises(AccessDenied, match=f"of s3://{s3_bucket}/b .*denied.*allow s3:PutObject") as caught:
            write()
        assert caught.value.reason == "AccessDenied"
    with pytest.raises(AccessDenied, match="allow s3:DeleteObject"):
        store.delete(["a"])


def test_missing_credentials_are_told_with_their_place(s3_server: Any, tmp_path: Path) -> None:
    store = open_store("s3://bucket", s3_server.settings(tmp_path / "nothing"))
    with pytest.raises(AccessDenied, match=f"no credentials.*{tmp_path}/nothing") as caught:
        store.read("a")
    assert caught.value.reason == "CredentialsMissing"
    assert caught.value.environment


def test_the_sdk_chain_is_used_without_a_directory(
    s3_server: Any, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, (s3_server.admin / name).read_text())
    open_store(f"s3://{s3_bucket}", StorageSettings(s3_server.endpoint)).write("a", b"1")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no name is known here")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv(variable, "http://elsewhere.example.org")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(Unreachable):
        open_store("s3://bucket", StorageSettings(connect_deadline=0.2)).write("a", b"1")
    assert set(asked) == {"bucket.s3.amazonaws.com"}


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_endpoint_that_refuses_is_named_within_seconds(s3_server: Any) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    assert StorageSettings().connect_deadline + StorageSettings().connect_timeout < 15
    settings = replace(s3_server.settings(), endpoint=endpoint, connect_deadline=2.0)
    store = open_store("s3://bucket", settings)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=f"{endpoint} .*connection refused") as caught:
        store.head("a")
    assert time.monotonic() - started < 5
    assert caught.value.reason == "EndpointUnreachable"
    assert caught.value.environment


def test_an_endpoint_that_never_answers_is_named_within_the_deadline(s3_server: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = replace(s3_server.settings(), endpoint=endpoint, connect_deadline=1.0)
        started = time.monotonic()
        with pytest.raises(Unreachable, match=f"{endpoint}.*no answer within the time limit"):
            open_store("s3://bucket", settings).read("a")
        assert time.monotonic() - started < 5


def test_a_name_that_does_not_resolve_is_told(s3_server: Any) -> None:
    settings = replace(s3_server.settings(), endpoint="http://no-such-host.invalid", connect_deadline=0.5)
    with pytest.raises(Unreachable, match="does not resolve"):
        open_store("s3://bucket", settings).read("a")


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.1.1]", "[fd00:ec2::254]"])
def test_metadata_services_are_refused(s3_server: Any, host: str) -> None:
    store = open_store("s3://bucket", replace(s3_server.settings(), endpoint=f"http://{host}"))
    with pytest.raises(StorageError, match="link-local") as caught:
        store.read("a")
    assert caught.value.reason == "EndpointRefused"
    assert not caught.value.environment


@pytest.mark.parametrize("endpoint", ["ftp://host", "host:9000", "http://", "http://key:secret@host", "http://h:x"])
def test_what_is_no_endpoint_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_store("s3://bucket", StorageSettings(endpoint))
    assert caught.value.reason == "EndpointRefused"
    assert "secret" not in str(caught.value)


def answer(status: str, code: str = "", header: str = "") -> bytes:
    body = f"<Error><Code>{code}</Code><Message>said so</Message></Error>" if code else ""
    return f"HTTP/1.1 {status}\r\n{header}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("status", "code"),
    [("503 Slow", "SlowDown"), ("500 E", "InternalError"), ("429 E", ""), ("408 E", ""), ("400 E", "RequestTimeout")],
)
def test_what_may_pass_is_tried_again(proxied: Store, proxy: Any, status: str, code: str) -> None:
    proxied.write("a", b"1")
    proxy.answers += [answer(status, code)] * 2
    assert proxied.read("a") == b"1"
    assert proxy.answers == []


@pytest.mark.parametrize(("status", "code"), [("403 F", "AccessDenied"), ("400 B", "InvalidArgument"), ("404 N", "")])
def test_what_is_refused_is_not_tried_again(proxied: Store, proxy: Any, status: str, code: str) -> None:
    proxied.write("a", b"1")
    proxy.answers += [answer(status, code)] * 2
    before = proxy.requests
    with pytest.raises(StorageError):
        proxied.read("a")
    assert proxy.requests == before + 1
    assert len(proxy.answers) == 1


def test_errors_of_the_server_end_at_the_deadline(proxy: Any, s3_settings: StorageSettings, s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}", replace(s3_settings, endpoint=proxy.url, deadline=1.0))
    proxy.answers += [answer("503 Slow", "SlowDown")] * 1000
    started = time.monotonic()
    with pytest.raises(Unavailable, match="HTTP 503 SlowDown") as caught:
        store.read("a")
    assert 0.2 < time.monotonic() - started < 4
    assert caught.value.reason == "StoreUnavailable"
    assert caught.value.environment


def test_expired_credentials_are_read_again_once(proxied: Store, proxy: Any) -> None:
    proxied.write("a", b"1")
    proxy.answers.append(answer("400 Bad", "ExpiredToken"))
    assert proxied.read("a") == b"1"
    proxy.answers.append(answer("400 Bad Request"))  # all that HEAD is told about expired credentials
    assert proxied.head("a") is not None
    proxy.answers += [answer("400 Bad", "ExpiredToken")] * 2
    with pytest.raises(AccessDenied) as caught:
        proxied.read("a")
    assert caught.value.reason == "CredentialsExpired"
    assert proxy.answers == []


def test_redirects_are_refused(proxied: Store, proxy: Any) -> None:
    proxied.write("a", b"1")
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.5)
        target = f"Location: http://127.0.0.1:{elsewhere.getsockname()[1]}/a\r\n"
        proxy.answers += [answer("307 Moved", "TemporaryRedirect", target)] * 3
        with pytest.raises(StorageError, match="redirect") as caught:
            proxied.read("a")
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert caught.value.reason == "RedirectRefused"


def test_a_server_that_is_no_s3_is_told(proxy: Any, s3_settings: StorageSettings) -> None:
    page = (
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\nConnection: close\r\n\r\n<p>Welcome!</p>\n"
    )
    proxy.answers += [page.encode()] * 1000
    store = open_store("s3://bucket", replace(s3_settings, endpoint=proxy.url, connect_deadline=0.3, deadline=0.3))
    for use in (lambda: store.head("a"), lambda: store.write("a", b"1"), lambda: list(store.list())):
        with pytest.raises(StorageError):
            use()


@pytest.mark.parametrize("operation", ["create", "replace"])
def test_a_lost_answer_is_recognised_as_our_own_write(proxied: Store, proxy: Any, operation: str) -> None:
    proxied.write("warm", b"1")
    proxy.drop_marker, proxy.drop_answers = b"/claimed", 1
    if operation == "create":
        proxied.create("claimed", b"mine")
    else:
        proxied.replace("claimed", b"mine", if_match=None)
    assert proxy.dropped == 1
    assert proxied.read("claimed") == b"mine"


def test_a_lost_answer_to_another_is_still_a_conflict(proxied: Store, proxy: Any) -> None:
    proxied.write("claimed", b"theirs")
    proxy.drop_marker, proxy.drop_answers = b"/claimed", 1
    with pytest.raises(PreconditionFailed):
        proxied.replace("claimed", b"mine", if_match=None)
    assert proxied.read("claimed") == b"theirs"


def test_broken_connections_are_resumed_where_they_broke(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    data = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(data)
    sent = proxied.upload(tmp_path / "source", "big")
    proxy.cuts, proxy.cut_after = 6, 5 * MIB
    got = proxied.download("big", tmp_path / "target", if_match=sent.etag, digest=sent.digest)
    assert proxy.cuts == 0
    assert got.digest == digest_of(data)
    assert (tmp_path / "target").read_bytes() == data
    proxy.cuts = 5
    with proxied.stream("big") as source:
        assert source.read() == data
    assert proxy.cuts == 0


def test_a_stream_never_mixes_two_versions(proxied: Store, proxy: Any) -> None:
    proxied.write("big", bytes(20 * MIB))
    proxy.cuts, proxy.cut_after = 1, 2 * MIB
    with proxied.stream("big") as source:
        assert source.read(MIB) == bytes(MIB)
        proxied.write("big", bytes([1]) * 20 * MIB)
        with pytest.raises(PreconditionFailed):
            source.read()


def test_lost_answers_during_an_upload_are_survived(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    data = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(data)
    proxied.write("warm", b"1")
    for marker in (b"partNumber=2", b"POST /"):
        proxy.drop_marker, proxy.drop_answers = marker, 1
        sent = proxied.upload(tmp_path / "source", "big")
        assert sent.digest == digest_of(data)
    assert proxy.dropped == 2
    assert proxied.download("big", tmp_path / "target").digest == sent.digest


def test_a_failed_upload_leaves_no_parts(
    proxied: Store, proxy: Any, s3_server: Any, s3_bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(bytes(40 * MIB))
    proxy.answer_marker = b"partNumber=3"
    proxy.answers += [answer("403 F", "AccessDenied")]
    with pytest.raises(AccessDenied):
        proxied.upload(tmp_path / "source", "big")
    assert proxy.answers == []
    assert proxied.head("big") is None
    assert s3_server.client().list_multipart_uploads(Bucket=s3_bucket).get("Uploads", []) == []


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("501 N", "NotImplemented"),
        ("403 F", "AccessDenied"),
        ("405 M", "MethodNotAllowed"),
        ("400 B", "InvalidRequest"),
    ],
)
def test_a_store_that_shows_no_unfinished_uploads_is_asked_once_and_fails_nothing(
    proxied: Store, proxy: Any, caplog: pytest.LogCaptureFixture, status: str, code: str
) -> None:
    caplog.set_level("INFO")
    proxy.answer_marker = b"uploads"
    proxy.answers += [answer(status, code)]
    for _ in range(2):
        proxied.end_unfinished("runs/", lambda _key: True)
    assert proxy.answers == []
    assert proxy.requests == 1
    assert caplog.text.count("lifecycle rule") == 1


def large_file(path: Path) -> bytes:
    """Three parts, with a word in the second that is found again on the wire, even where packets cut through it."""
    data = bytearray(os.urandom(40 * MIB))
    data[20 * MIB : 20 * MIB + 80] = 10 * b"the word"
    path.write_bytes(data)
    return bytes(data)


def without_crc32(proxy: Any) -> None:
    """Let the server answer as those do that refuse what they do not know."""
    proxy.answer_marker = b"?uploads"
    proxy.answers += [answer("501 Not Implemented", "NotImplemented")]


@pytest.mark.parametrize("known", [True, False], ids=["crc32", "md5"])
def test_bytes_damaged_on_their_way_to_the_store_are_sent_again(
    proxied: Store, proxy: Any, tmp_path: Path, known: bool
) -> None:
    data = large_file(tmp_path / "source")
    if not known:
        without_crc32(proxy)
    proxy.damage, proxy.damages_sent = b"the word", [b"k"]
    sent = proxied.upload(tmp_path / "source", "big")
    assert (proxy.damages_sent, proxy.answers) == ([], [])
    assert proxied.download("big", tmp_path / "target").digest == sent.digest == digest_of(data)


@pytest.mark.parametrize("known", [True, False], ids=["crc32", "md5"])
def test_bytes_that_are_damaged_each_time_are_refused(
    proxy: Any, s3_settings: StorageSettings, s3_bucket: str, tmp_path: Path, known: bool
) -> None:
    store = open_store(f"s3://{s3_bucket}/some/prefix", replace(s3_settings, endpoint=proxy.url, deadline=2.0))
    large_file(tmp_path / "source")
    if not known:
        without_crc32(proxy)
    proxy.damage, proxy.damages_sent = b"the word", [b"k"] * 1000
    with pytest.raises(Unavailable, match="BadDigest"):
        store.upload(tmp_path / "source", "big")
    assert store.head("big") is None


def test_a_store_that_refuses_crc32_is_given_md5(
    proxied: Store, proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = large_file(tmp_path / "source")
    without_crc32(proxy)
    monkeypatch.setattr(type(proxied), "_read_back", lambda *_: pytest.fail("the etag has proven it"))
    sent = proxied.upload(tmp_path / "source", "big")
    assert proxy.answers == []
    assert proxied.download("big", tmp_path / "target").digest == sent.digest == digest_of(data)


def test_the_bodies_of_parts_alone_are_not_signed(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    large_file(tmp_path / "source")
    proxy.answer_marker = b"UNSIGNED-PAYLOAD"
    proxy.answers += [answer("403 F", "AccessDenied")]
    proxied.write("a", b"1")
    (tmp_path / "small").write_bytes(b"2")
    proxied.upload(tmp_path / "small", "b")
    assert len(proxy.answers) == 1
    with pytest.raises(AccessDenied):
        proxied.upload(tmp_path / "source", "big")


@pytest.mark.parametrize("told", [True, False])
def test_an_upload_is_read_back_unless_the_store_tells_the_checksums_of_its_parts(
    proxied: Store, proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    data = large_file(tmp_path / "source")
    proxied.write("warm", b"1")
    read_back = []
    original = type(proxied)._read_back  # type: ignore[attr-defined]
    monkeypatch.setattr(type(proxied), "_read_back", lambda *given: (read_back.append(given), original(*given)))
    if not told:
        proxy.damage, proxy.damages = b"X-Amz-Checksum-Crc32:", [b";"]  # the header of one part's answer is lost
    sent = proxied.upload(tmp_path / "source", "big")
    assert (len(read_back), proxy.damages) == (0 if told else 1, [])
    assert sent.digest == digest_of(data)


def test_the_pauses_between_tries_are_drawn_from_wider_and_wider_ranges_until_the_deadline(
    s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[float, float]] = []
    now = [0.0]

    def draw(low: float, high: float) -> float:
        ranges.append((low, high))
        return high

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(s3, "random", SimpleNamespace(uniform=draw))
    monkeypatch.setattr(s3, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    settings = replace(s3_settings, endpoint=f"http://127.0.0.1:{ports.free_port()}", connect_deadline=60.0)
    with pytest.raises(Unreachable):
        open_store("s3://bucket", settings).read("a")
    assert ranges == [(0, min(8.0, 0.1 * 2**number)) for number in range(len(ranges))]
    assert len(ranges) > 10
    assert now[0] <= 60.0 < now[0] + 8.0


def test_a_slow_upload_tells_every_second_that_it_goes_on(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    large_file(tmp_path / "source")
    proxied.write("warm", b"1")
    proxy.pause, told = 0.02, [time.monotonic()]
    proxied.upload(tmp_path / "source", "big", progress=lambda _done: told.append(time.monotonic()))
    assert told[-1] - told[0] > 4, "a part takes this long"
    assert max(later - sooner for sooner, later in itertools.pairwise(told)) < 3


def test_what_progress_raises_ends_an_upload_in_the_midst_of_a_part(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    large_file(tmp_path / "source")
    proxied.write("warm", b"1")
    proxy.pause, started = 0.2, time.monotonic()  # 50 s for a part

    def stop(_done: int) -> None:
        if time.monotonic() - started > 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        proxied.upload(tmp_path / "source", "big", progress=stop)
    assert time.monotonic() - started < 20
    proxy.pause = 0
    assert proxied.head("big") is None
    assert not list(proxied._unfinished(""))  # type: ignore[attr-defined]


def test_an_upload_that_is_read_back_tells_of_that_too(
    proxied: Store, proxy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_file(tmp_path / "source")
    proxied.write("warm", b"1")
    proxy.damage, proxy.damages = b"X-Amz-Checksum-Crc32:", [b";"]
    seen: list[int] = []
    sent = proxied.upload(tmp_path / "source", "big", progress=seen.append)
    assert seen.count(sent.size) > sent.size // (4 * MIB)


def test_a_file_that_is_cut_while_it_is_uploaded_is_told_at_once(
    proxied: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_file(tmp_path / "source")
    original = type(proxied)._send_part  # type: ignore[attr-defined]

    def cut(*given: Any, **named: Any) -> Any:
        os.truncate(tmp_path / "source", 5 * MIB)
        return original(*given, **named)

    monkeypatch.setattr(type(proxied), "_send_part", cut)
    started = time.monotonic()
    with pytest.raises(StorageError, match="source changed while it was uploaded") as caught:
        proxied.upload(tmp_path / "source", "big")
    assert caught.value.reason == "FileChanged"
    assert time.monotonic() - started < 30
    assert proxied.head("big") is None


def test_bytes_damaged_on_their_way_are_asked_for_again(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    sent = proxied.write("a", b"what was written")
    proxy.damage = b"written"
    proxy.damages = [b"m", b"k"]
    assert proxied.read("a") == b"what was written"
    proxy.damages = [b"m", b"k"]
    assert proxied.download("a", tmp_path / "target", digest=sent.digest).digest == sent.digest
    assert (tmp_path / "target").read_bytes() == b"what was written"
    assert proxy.damages == []


@pytest.mark.parametrize("tag", ["LastModified", "Size"])
def test_a_listing_that_cannot_be_read_is_asked_for_again(proxied: Store, proxy: Any, tag: str) -> None:
    proxied.write("a", b"2" * 22)
    proxy.damage = f"<{tag}>2".encode()
    proxy.damages = [b"x"]
    assert [(info.key, info.size) for info in proxied.list()] == [("a", 22)]
    assert proxy.damages == []


def test_a_listing_whose_times_have_lost_their_zone_is_asked_for_again(proxied: Store, proxy: Any) -> None:
    """They would still be read as times, of which nobody can say whether they are before another."""
    proxied.write("a", b"what was written")
    (sound,) = proxied.list()
    assert sound.modified is not None
    proxy.damage = f"{sound.modified:%Y-%m-%dT%H:%M:%S}Z".encode()
    proxy.damages = [b" "]
    assert [info.modified for info in proxied.list()] == [sound.modified]
    assert proxy.damages == []


def test_what_comes_wrong_in_the_same_form_twice_is_damaged(proxied: Store, proxy: Any, tmp_path: Path) -> None:
    proxied.write("a", b"what was written")
    proxy.damage = b"written"
    for use in (lambda: proxied.read("a"), lambda: proxied.download("a", tmp_path / "target")):
        proxy.damages = [b"m", b"m", b"m"]
        with pytest.raises(Damaged):
            use()
        assert proxy.damages == [b"m"]
    proxy.damages = [b"%d" % number for number in range(9)]
    with pytest.raises(Damaged):
        proxied.read("a")
    assert proxy.damages == [b"5", b"6", b"7", b"8"]


def test_damage_behind_the_stores_back_is_found(
    s3_server: Any, s3_bucket: str, s3_settings: Any, tmp_path: Path
) -> None:
    store = open_store(f"s3://{s3_bucket}", s3_settings)
    written = store.write("a", b"right")
    client = s3_server.client()
    metadata = client.head_object(Bucket=s3_bucket, Key="a")["Metadata"]
    assert metadata["finetune-digest"] == written.digest
    client.put_object(Bucket=s3_bucket, Key="a", Body=b"wrong", Metadata=metadata)
    for read in (lambda: store.read("a"), lambda: store.download("a", tmp_path / "a")):
        with pytest.raises(Damaged) as caught:
            read()
        assert caught.value.reason == "ChecksumMismatch"
        assert not caught.value.environment
    assert not (tmp_path / "a").exists()


def test_an_object_of_anyone_is_read(s3_server: Any, s3_bucket: str, s3_settings: Any, tmp_path: Path) -> None:
    s3_server.client().put_object(Bucket=s3_bucket, Key="data/train.jsonl", Body=b"{}\n")
    store = open_store(f"s3://{s3_bucket}", s3_settings)
    found = store.head("data/train.jsonl")
    assert found is not None
    assert found.digest is None
    assert store.download("data/train.jsonl", tmp_path / "x").digest == digest_of(b"{}\n")


def test_ranges_and_parts_fit_their_limits() -> None:
    for size in (0, 1, 100 * MIB, 5 << 30, 5 << 40):
        assert 16 * MIB <= range_size(size) <= 64 * MIB
        assert part_size(size) >= 16 * MIB
        assert -(-size // part_size(size)) <= 10_000
        assert part_size(size) % MIB == 0


def test_the_first_failing_range_ends_a_transfer(tmp_path: Path) -> None:
    (tmp_path / "target").touch()

    def fetch(offset: int, length: int, target: Target) -> None:
        if offset:
            raise Unavailable("StoreUnavailable", "gone")
        target.write(offset, bytes(length))

    with pytest.raises(Unavailable):
        fetch_ranges(fetch, tmp_path / "target", 64 * MIB)


def test_a_file_is_cut_into_parts_with_their_checksums(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 5)
    (tmp_path / "source").write_bytes(data)
    for size, expected in ((MIB, [MIB] * 3 + [5]), (len(data), [len(data)]), (4 * MIB, [len(data)])):
        whole = Hasher()
        with open(tmp_path / "source", "rb") as source:
            parts = list(read_parts(source, size, whole=whole, each=Crc32))
            bodies = [part.body().read() for part in parts]
            body = parts[0].body()
            assert [len(body.read(600)), len(body.read(600)), body.seek(3), body.tell()] == [600, 600, 3, 3]
        assert [part.size for part in parts] == expected
        assert b"".join(bodies) == data
        assert [part.checksum for part in parts] == [zlib.crc32(body).to_bytes(4, "big") for body in bodies]
        assert whole.digest() == digest_of(data)


def sent_over(part: FilePart, *, limit: float = 5.0, slowly: bool = True) -> bytes:
    """What arrives at the other end of a socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(limit)
    found: list[bytes] = []

    def receive() -> None:
        while data := theirs.recv(65536):
            found.append(data)

    receiver = threading.Thread(target=receive)
    if slowly:
        receiver.start()
    try:
        send_file(part.body(), ours)
    finally:
        ours.close()
        if slowly:
            receiver.join()
        theirs.close()
    return b"".join(found)


def test_a_part_is_sent_out_of_its_file_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3 * MIB + 5)
    (tmp_path / "source").write_bytes(data)
    with open(tmp_path / "source", "rb") as source:
        monkeypatch.setattr(FileBody, "read", None)
        assert sent_over(FilePart(source, MIB, MIB + 7, b"")) == data[MIB : 2 * MIB + 7]
        assert source.tell() == 0


def test_uploads_over_plain_http_are_sent_out_of_their_file(
    s3_server: Any, s3_bucket: str, s3_settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, real = [0], os.sendfile

    def counted(*arguments: int) -> int:
        sent.append(real(*arguments))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", counted)
    data = os.urandom(40 * MIB + 1)
    (tmp_path / "source").write_bytes(data)
    store = open_store(f"s3://{s3_bucket}", s3_settings)
    assert store.upload(tmp_path / "source", "large").digest == digest_of(data)
    assert sum(sent) == len(data)


def test_where_the_kernel_cannot_send_a_file_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    data = os.urandom(MIB + 5)
    (tmp_path / "source").write_bytes(data)
    monkeypatch.setattr(os, "sendfile", refuse)
    with open(tmp_path / "source", "rb") as source:
        assert sent_over(FilePart(source, 3, MIB, b"")) == data[3 : MIB + 3]


def test_downloads_over_plain_http_are_moved_into_their_file_over_few_connections(
    s3_server: Any, s3_bucket: str, s3_settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, opened = 0, 0
    splice, connect = os.splice, socket.socket.connect

    def counted(source: int, to: int, count: int, **places: int) -> int:
        nonlocal moved
        done = splice(source, to, count, **places)
        moved += done if "offset_dst" in places else 0
        return done

    def noted(self: socket.socket, address: Any) -> None:
        nonlocal opened
        opened += 1
        connect(self, address)

    data = os.urandom(150 * MIB + 1)
    (tmp_path / "source").write_bytes(data)
    store = open_store(f"s3://{s3_bucket}", replace(s3_settings, read_timeout=29.0))  # with connections of its own
    store.upload(tmp_path / "source", "large")
    monkeypatch.setattr(os, "splice", counted)
    monkeypatch.setattr(socket.socket, "connect", noted)
    for _ in range(2):
        assert store.download("large", tmp_path / "target").digest == digest_of(data)
    assert moved > 2 * 0.95 * len(data)
    assert opened <= WORKERS, "a connection whose answer was read to its end is used again"
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("which", ["a socket", "a file"])
def test_what_the_kernel_cannot_move_is_read(
    s3_bucket: str, s3_settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    splice = os.splice

    def refuse(source: int, to: int, count: int, **places: int) -> int:
        if ("offset_dst" in places) == (which == "a file"):
            raise OSError(errno.EINVAL, "Invalid argument")
        return splice(source, to, count, **places)

    data = os.urandom(40 * MIB + 1)
    store = open_store(f"s3://{s3_bucket}", s3_settings)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "large")
    monkeypatch.setattr(os, "splice", refuse)
    store.download("large", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data


def test_a_full_disk_ends_a_download_and_a_broken_connection_does_not(
    proxied: Store, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are an OSError, of the same call."""
    splice = os.splice
    failures = [ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), TimeoutError("timed out")]

    def fail(source: int, to: int, count: int, **places: int) -> int:
        if "offset_dst" in places and full:
            raise OSError(errno.ENOSPC, "No space left on device")
        if "offset_dst" not in places and failures:
            raise failures.pop()
        return splice(source, to, count, **places)

    data, full = os.urandom(40 * MIB + 1), False
    (tmp_path / "source").write_bytes(data)
    proxied.upload(tmp_path / "source", "large")
    monkeypatch.setattr(os, "splice", fail)
    proxied.download("large", tmp_path / "target")
    assert not failures
    assert (tmp_path / "target").read_bytes() == data
    full = True
    with pytest.raises(StorageError, match="No space left on device") as told:
        proxied.download("large", tmp_path / "other")
    assert told.value.reason == "NoSpace"
    assert not (tmp_path / "other").exists()


def test_a_connection_that_brings_nothing_any_more_is_given_up(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(tmp_path / "target", "w+b") as file:
        ours.settimeout(0.1)
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
        response = Response(ours)
        response.begin()
        arrived = response.pour(Target(file.fileno()), 0, 1_000_000)
        assert next(arrived) == 1000
        with pytest.raises(Disconnected, match="Read timed out"):
            next(arrived)
        response.close()


def test_a_file_that_is_cut_while_it_is_sent_is_told_and_so_is_a_store_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(8 * MIB))
    with open(tmp_path / "source", "rb") as source:
        with pytest.raises(TimeoutError):
            sent_over(FilePart(source, 0, 8 * MIB, b""), limit=0.1, slowly=False)
        os.truncate(tmp_path / "source", MIB)
        with pytest.raises(StorageError, match="changed while it was uploaded"):
            sent_over(FilePart(source, 0, 8 * MIB, b""))


@pytest.mark.parametrize("size", [80 * MIB, 200 * MIB], ids=["at the end", "before it"])
def test_what_the_disk_refuses_while_a_file_grows_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The kernel tells an error of writing once: whoever asks afterwards is told that all is well."""
    calls = 0

    def fail_once(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail_once)
    (tmp_path / "target").touch()
    with pytest.raises(OSError, match="Input/output error"):
        fetch_ranges(lambda offset, length, target: target.write(offset, bytes(length)), tmp_path / "target", size)
    assert calls == 1


def test_parts_are_sent_in_bounded_number_and_reported_in_order() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def send(number: int, data: bytes) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1
        return f"{number}{data.decode()}"

    assert send_parts(send, (b"x" for _ in range(40))) == [f"{number}x" for number in range(1, 41)]
    assert 1 < most <= 4


@pytest.mark.parametrize(
    ("operation", "answered", "reason", "environment"),
    [
        ("create", Answer(501, "NotImplemented"), "ConditionalWritesUnsupported", False),
        ("read", Answer(403, "RequestTimeTooSkewed"), "ClockSkewed", True),
        ("read", Answer(400, "AuthorizationHeaderMalformed"), "WrongRegion", False),
        ("read", Answer(403, "InvalidToken"), "InvalidCredentials", True),
        ("write", Answer(400, "BadDigest"), "StoreUnavailable", True),
        ("read", Answer(416, "InvalidRange"), "ObjectChanged", False),
        ("write", Answer(400, "KeyTooLongError", "Your key is too long"), "RequestRefused", False),
    ],
)
def test_answers_that_this_server_never_gives_are_understood(
    operation: str, answered: Answer, reason: str, environment: bool
) -> None:
    error = meaning(Request(operation, "s3://b/k", "b", "http://e", "/c"), answered)
    assert (error.reason, error.environment) == (reason, environment)
    assert "s3://b/k" in error.message
    assert str(answered.status) in error.message


def test_what_is_printed_holds_no_secret(s3_server: Any, s3_settings: StorageSettings) -> None:
    assert s3_server.admin_secret not in f"{s3_settings!r}{open_store('s3://b', s3_settings)!r}"
