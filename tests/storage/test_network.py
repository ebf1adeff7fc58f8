"""S3 in other people's networks, on a real server: certificates of a private authority, buckets as hosts, proxies."""

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hack.seaweed import S3Server, serve
from tests.storage.network import DOMAIN, Authority, ForwardProxy, authority, forwarding

from finetune_api.job import FineTuneJobSpec
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.resolve import Defaults, resolve
from finetune_trainer.config import storage_settings
from finetune_trainer.storage import StorageError, StorageSettings, Unreachable, open_store
from finetune_trainer.storage.digests import digest_of

MIB = 1 << 20


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ca: Authority) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("seaweedfs"), ca.tls) as running:
        running.client().create_bucket(Bucket="bucket")
        yield running


@pytest.fixture
def settings(server: S3Server, tmp_path: Path) -> StorageSettings:
    """Stores with the same settings share a client, which keeps the proxy that it was made with."""
    shutil.copytree(server.admin, tmp_path / "credentials")
    return replace(server.settings(tmp_path / "credentials"), connect_deadline=1.0, deadline=5.0)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def forward() -> Iterator[ForwardProxy]:
    with forwarding() as running:
        yield running


def at(domain: str, address: str) -> str:
    """The same server by a name instead of its address."""
    return address.replace("127.0.0.1", domain)


def both_ways(uri: str, settings: StorageSettings, directory: Path) -> None:
    """A large file to the store and back, and what records are written with."""
    data = os.urandom(40 * MIB)
    (directory / "source").write_bytes(data)
    store = open_store(uri, settings)
    sent = store.upload(directory / "source", "big")
    got = store.download("big", directory / "target", if_match=sent.etag, digest=sent.digest)
    assert got.digest == digest_of(data)
    assert (directory / "target").read_bytes() == data
    store.create("record", b"1")
    assert [info.key for info in store.list()] == ["big", "record"]
    store.delete(["big", "record"])


# --- certificates ---


def test_a_server_whose_certificate_a_private_authority_signed_is_reached_with_its_ca_file(
    server: S3Server, settings: StorageSettings, ca: Authority, tmp_path: Path
) -> None:
    both_ways("s3://bucket/ca", replace(settings, endpoint=server.secure, ca_file=ca.ca_file), tmp_path)


def test_without_the_authority_one_sentence_says_what_where_and_how_to_mend_it(
    server: S3Server, settings: StorageSettings
) -> None:
    store = open_store("s3://bucket/prefix", replace(settings, endpoint=server.secure))
    with pytest.raises(Unreachable) as caught:
        store.head("a")
    assert caught.value.reason == "CertificateNotTrusted"
    assert caught.value.environment
    assert caught.value.message == (
        f"The head of s3://bucket/prefix/a at {server.secure} was not sent because the certificate there is not "
        "trusted (unable to get local issuer certificate): put its authority's certificate, as ca.crt, into the "
        "ConfigMap that storage.caConfigMap names; outside a cluster AWS_CA_BUNDLE names the file."
    )


def test_the_sdks_own_variable_names_the_authority_where_there_is_no_ca_file(
    server: S3Server, settings: StorageSettings, ca: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(ca.ca_file))
    open_store("s3://bucket/bundle", replace(settings, endpoint=server.secure)).write("a", b"1")


def test_a_name_that_the_certificate_does_not_bear_is_refused(
    server: S3Server, settings: StorageSettings, ca: Authority
) -> None:
    endpoint = at("localhost", server.secure)
    store = open_store("s3://bucket", replace(settings, endpoint=endpoint, ca_file=ca.ca_file))
    with pytest.raises(Unreachable, match=r"not trusted .*'localhost' doesn't match.*correct the endpoint") as caught:
        store.head("a")
    assert caught.value.reason == "CertificateNotTrusted"


@pytest.mark.parametrize("content", [None, "no certificate", ""])
def test_a_ca_file_that_is_missing_or_holds_no_certificate_is_told_by_its_name_and_waited_for(
    server: S3Server, settings: StorageSettings, ca: Authority, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_text(content)
    named = replace(settings, endpoint=server.secure, ca_file=path, ca_name="the ConfigMap company-ca")
    store = open_store("s3://bucket/mended", named)
    words = "is missing" if content is None else "holds no certificate"
    with pytest.raises(StorageError, match=rf"{server.secure} .*ca\.crt of the ConfigMap company-ca {words}") as caught:
        store.write("a", b"1")
    assert caught.value.reason == "CertificateAuthorityMissing"
    assert caught.value.environment
    shutil.copy(ca.ca_file, path)
    store.write("a", b"1")


# --- what a document says ---


def pods_settings(storage: dict[str, Any], directory: Path) -> StorageSettings:
    """How a pod reaches the storage of a job that says this of it."""
    spec = {
        "task": {"type": "text-classification"},
        "model": {"uri": "s3://bucket/model"},
        "data": {"train": [{"uri": "s3://bucket/train.jsonl"}]},
        "output": {"uri": "s3://bucket/output"},
        "storage": storage,
    }
    config = resolve(
        FineTuneJobSpec.model_validate(spec),
        FineTuneProfileSpec.model_validate({"allowedEndpoints": ["http://*", "https://*"]}),
        job="ns/job",
        job_uid="uid",
        generation=1,
        defaults=Defaults(trainer_image="trainer", preflight_image="preflight"),
    )
    return replace(storage_settings(config, directory), connect_deadline=1.0, deadline=5.0)


def test_a_documents_addressing_and_authority_are_what_its_pods_reach_storage_with(
    server: S3Server,
    settings: StorageSettings,
    ca: Authority,
    forward: ForwardProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settings.credentials_dir is not None
    monkeypatch.setattr("finetune_trainer.config.CA_PATH", str(ca.ca_file))
    monkeypatch.setenv("HTTPS_PROXY", forward.url)
    endpoint = at(DOMAIN, server.secure)
    said = {"endpoint": endpoint, "caConfigMap": "company-ca"}
    for addressing, host in (("Auto", ""), ("Path", ""), ("VirtualHost", "bucket.")):
        forward.seen.clear()
        store = open_store(
            "s3://bucket/said", pods_settings({**said, "addressing": addressing}, settings.credentials_dir)
        )
        store.write("a", b"1")
        assert set(forward.seen) == {f"CONNECT {host}{endpoint.partition('//')[2]}"}


def test_a_config_map_that_is_missing_is_told_by_its_name(
    server: S3Server, settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.credentials_dir is not None
    monkeypatch.setattr("finetune_trainer.config.CA_PATH", str(tmp_path / "ca.crt"))
    said = pods_settings({"endpoint": server.secure, "caConfigMap": "company-ca"}, settings.credentials_dir)
    with pytest.raises(StorageError, match=r"ca\.crt of the ConfigMap company-ca is missing") as caught:
        open_store("s3://bucket/said", said).write("a", b"1")
    assert (caught.value.reason, caught.value.environment) == ("CertificateAuthorityMissing", True)


# --- buckets as hosts ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_buckets_are_hosts_in_virtual_host_style(
    server: S3Server,
    settings: StorageSettings,
    ca: Authority,
    forward: ForwardProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", forward.url)
    endpoint = at(DOMAIN, server.endpoint if scheme == "http" else server.secure)
    both_ways(
        "s3://bucket/hosts", replace(settings, endpoint=endpoint, addressing="virtual", ca_file=ca.ca_file), tmp_path
    )
    tunnel = "CONNECT " if scheme == "https" else ""
    assert set(forward.seen) == {f"{tunnel}bucket.{endpoint.partition('//')[2]}"}


@pytest.mark.parametrize("addressing", ["auto", "path"])
def test_buckets_are_paths_of_an_endpoint_by_default(
    server: S3Server, settings: StorageSettings, forward: ForwardProxy, monkeypatch: pytest.MonkeyPatch, addressing: Any
) -> None:
    monkeypatch.setenv("HTTP_PROXY", forward.url)
    endpoint = at(DOMAIN, server.endpoint)
    open_store("s3://bucket/paths", replace(settings, endpoint=endpoint, addressing=addressing)).write("a", b"1")
    assert set(forward.seen) == {endpoint.partition("//")[2]}


# --- proxies ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_requests_go_through_the_proxy_of_the_environment_and_go_on_where_it_cuts_them(
    server: S3Server,
    settings: StorageSettings,
    ca: Authority,
    forward: ForwardProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", forward.url)
    endpoint = server.endpoint if scheme == "http" else server.secure
    store = open_store("s3://bucket/cut", replace(settings, endpoint=endpoint, ca_file=ca.ca_file))
    data = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(data)
    sent = store.upload(tmp_path / "source", "big")
    forward.cuts, forward.cut_after = 6, 5 * MIB
    got = store.download("big", tmp_path / "target", if_match=sent.etag, digest=sent.digest)
    assert (forward.cuts, got.digest) == (0, digest_of(data))
    assert (tmp_path / "target").read_bytes() == data
    forward.cuts = 3
    with store.stream("big") as source:
        assert source.read() == data
    assert forward.cuts == 0
    tunnel = "CONNECT " if scheme == "https" else ""
    assert set(forward.seen) == {f"{tunnel}{endpoint.partition('//')[2]}"}


def test_the_kernel_moves_what_comes_over_plain_http_through_a_proxy_too(
    settings: StorageSettings, forward: ForwardProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", forward.url)
    splice, moved = os.splice, []

    def counted(*given: Any, **places: Any) -> int:
        done = splice(*given, **places)
        if "offset_dst" in places:
            moved.append(done)
        return done

    monkeypatch.setattr(os, "splice", counted)
    both_ways("s3://bucket/splice", settings, tmp_path)
    assert sum(moved) > 35 * MIB


def test_a_name_that_only_the_proxy_knows_is_looked_up_once(
    server: S3Server, settings: StorageSettings, forward: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no name resolves, each look-up may take seconds."""
    monkeypatch.setenv("HTTP_PROXY", forward.url)
    look_up, asked = socket.getaddrinfo, []

    def counted(host: Any, *given: Any, **named: Any) -> Any:
        asked.append(host)
        return look_up(host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    store = open_store("s3://bucket/names", replace(settings, endpoint=at(DOMAIN, server.endpoint)))
    for key in ("a", "b", "c"):
        store.write(key, b"1")
    assert asked.count(DOMAIN) == 1


def test_what_no_proxy_names_is_reached_directly(
    server: S3Server, settings: StorageSettings, forward: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", forward.url)
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    open_store("s3://bucket/direct", settings).write("a", b"1")
    assert forward.seen == []


def test_a_proxy_with_a_password_is_given_it(
    server: S3Server, settings: StorageSettings, ca: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forwarding("secret-word") as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url.replace("//", "//user:secret-word@"))
        for endpoint in (server.endpoint, server.secure):
            open_store("s3://bucket", replace(settings, endpoint=endpoint, ca_file=ca.ca_file)).write("a", b"1")
        assert len(proxy.seen) >= 2


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("trouble", ["password", "down"])
def test_a_proxy_that_does_not_let_through_is_named_and_its_password_is_not(
    server: S3Server,
    settings: StorageSettings,
    ca: Authority,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    trouble: str,
) -> None:
    with forwarding("another") as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.url.replace("//", "//user:secret-word@"))
        if trouble == "down":
            proxy.close()
        endpoint = server.endpoint if scheme == "http" else server.secure
        store = open_store("s3://bucket", replace(settings, endpoint=endpoint, ca_file=ca.ca_file))
        with pytest.raises(Unreachable) as caught:
            store.read("a")
    assert caught.value.reason == "ProxyRefused"
    assert caught.value.environment
    assert f"The read of s3://bucket/a at {endpoint} " in caught.value.message
    assert f"127.0.0.1:{proxy.port}" in caught.value.message
    assert ("407" if trouble == "password" else "connection refused") in caught.value.message
    assert f"{scheme.upper()}_PROXY" in caught.value.message
    assert "secret-word" not in f"{caught.value!r}{caught.value}"
