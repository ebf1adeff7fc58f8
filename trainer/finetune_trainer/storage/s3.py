"""S3 as a store, on any server that speaks it. The only importer of the SDK.

The SDK's own transfer manager and its retries are not used: its fast variant ignores a configured endpoint, and
neither resumes a broken read. One loop here decides what is tried again: answers of 5xx, 408 and 429, timeouts,
resets and short reads, with full jitter until a deadline; never another 4xx. Records are committed by one conditional
PutObject; completing a multipart upload conditionally had several winners on a real server.

Redirects are not followed, and requests to link-local addresses (the metadata services of clouds) are refused.
"""

import base64
import hashlib
import io
import logging
import os
import random
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool
from botocore.config import Config
from botocore.credentials import CredentialResolver, Credentials, ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as ConnectError
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError
from botocore.session import Session
from botocore.utils import get_environ_proxies

from .answers import (
    EXPIRED,
    Answer,
    Request,
    changed,
    meaning,
    not_through,
    unavailable,
    unreachable,
    untrusted,
    without_authority,
    without_credentials,
)
from .base import (
    MIB,
    AccessDenied,
    AlreadyExists,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StorageError,
    StorageSettings,
    check_key,
    check_prefix,
    hash_object,
    mismatch,
)
from .digests import Hasher, digest_of
from .files import file_changed, file_error, publish, temporary
from .transfer import (
    BLOCK,
    Checksum,
    Crc32,
    Disconnected,
    FileBody,
    FilePart,
    Response,
    Stopped,
    Target,
    fetch_ranges,
    part_size,
    read_parts,
    send_file,
    send_parts,
)

T = TypeVar("T")

_SINGLE_PUT = 32 * MIB
_BLOCK = MIB
_DIGEST = "finetune-digest"  # user metadata of objects written from memory
_NONCE = "finetune-write"  # user metadata that tells our own write from another's
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 8.0  # seconds
_MOST_DAMAGED = 4  # times that an object is asked for again because it came damaged, each time otherwise
_NOT_FOR_US = {"AccessDenied", "Unsupported", "RequestRefused", "ObjectNotFound"}
"""How stores answer that know no list of uploads, or show it to others alone."""
_LOADER = create_loader()  # parses the SDK's description of S3 once a process
_log = logging.getLogger(__name__)
_RESOLVED_FOR = 60.0  # seconds that an endpoint's addresses are trusted
# Addresses of cloud metadata services that are not link-local.
_METADATA = {ip_address("fd00:ec2::254"), ip_address("100.100.100.200")}


class S3Store:
    """Objects below `s3://bucket/prefix`. Opens no connection before the first operation."""

    def __init__(self, bucket: str, prefix: str, settings: StorageSettings) -> None:
        self.bucket = bucket
        self.settings = settings
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._connection = _connection(settings)
        self._bucket_seen = False
        self._shows_unfinished = True

    def __repr__(self) -> str:
        return f"S3Store({self.uri})"

    def now(self) -> datetime:
        def date(client: Any) -> datetime:
            try:
                answer = client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _status(error) not in (403, 404):
                    raise
                answer = error.response
            value = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            return parsedate_to_datetime(value).astimezone(UTC) if value else datetime.now(UTC)

        return self._call("bucket check", "", date)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            answer = self._call("head", key, lambda client: client.head_object(**self._target(key)))
        except NotFound:
            self._check_bucket()
            return None
        return _info(key, answer, answer["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        found: list[ObjectInfo] = []
        token: str | None = ""
        while token is not None:
            items, token = self._list_page(prefix, token)
            found += items
        # Not every server lists in the order of the keys.
        return iter(sorted(found, key=lambda info: info.key))

    def _list_page(self, prefix: str, token: str) -> tuple[Sequence[ObjectInfo], str | None]:
        request = {"Bucket": self.bucket, "Prefix": self._prefix + prefix}
        if token:
            request["ContinuationToken"] = token
        answer = self._call("list", prefix, lambda client: _with_zones(client.list_objects_v2(**request)))
        if "IsTruncated" not in answer:
            raise _no_s3()
        found = [
            ObjectInfo(key, item["Size"], _plain(item["ETag"]), item["LastModified"])
            for item in answer.get("Contents", ())
            # A key ending in a slash is a console's idea of a directory.
            if (key := item["Key"].removeprefix(self._prefix)) and not key.endswith("/")
        ]
        return found, answer.get("NextContinuationToken") if answer["IsTruncated"] else None

    def read(self, key: str, *, if_match: str | None = None, limit: int | None = None) -> bytes:
        if limit is not None:
            with self._open(key, if_match) as source:
                return io.BufferedReader(source, _BLOCK).read(limit)

        def fetch() -> tuple[bytes, str, str | None]:
            with self._open(key, if_match) as source:
                data = source.readall()
                recorded = source.info.digest
                return data, "" if recorded is None else digest_of(data, like=recorded), recorded

        return self._whole(key, fetch)

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        with self._open(key, if_match) as source:
            yield cast("BinaryIO", io.BufferedReader(source, _BLOCK))

    def download(
        self,
        key: str,
        path: Path,
        *,
        if_match: str | None = None,
        digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ObjectInfo:
        info = self.head(key)
        if info is None:
            raise meaning(self._request("download", key), Answer(404, ""))
        if if_match is not None and info.etag != if_match:
            raise changed(self._request("download", key), "its etag differs")

        def fetch(offset: int, length: int, target: Target) -> None:
            self._fetch_range(key, info.etag, offset, length, target)

        wanted = info.digest if digest is None else digest

        def fill() -> tuple[str, str, str | None]:
            found = fetch_ranges(fetch, unfinished, info.size, like=wanted, progress=progress)
            return found, found, wanted

        with file_error(path), temporary(path) as unfinished:
            found = self._whole(key, fill)
            publish(unfinished, path)
        return replace(info, digest=found)

    def write(self, key: str, data: bytes) -> ObjectInfo:
        return self._put("write", key, data)

    def upload(self, path: Path, key: str, *, progress: Callable[[int], None] | None = None) -> ObjectInfo:
        advance = progress or (lambda done: None)
        with open(path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            if size <= _SINGLE_PUT:
                data = source.read(size + 1)
                if len(data) != size:
                    raise file_changed(path)
                info = self._put("upload", key, data)
                advance(size)
                return self._verified(key, info, proven=True)
            before = _stamp(path)
            try:
                info, proven = self._put_parts(key, source, size, advance)
            except StorageError:
                if _stamp(path) != before:
                    raise file_changed(path) from None
                raise
        if info.size != size:
            raise file_changed(path)
        return self._verified(key, info, proven=proven, beat=lambda: advance(size))

    def create(self, key: str, data: bytes) -> ObjectInfo:
        try:
            return self._put("create", key, data, IfNoneMatch="*")
        except PreconditionFailed:
            raise AlreadyExists(
                "AlreadyExists", f"{self._name(key)} exists already and is never overwritten."
            ) from None

    def replace(self, key: str, data: bytes, *, if_match: str | None) -> ObjectInfo:
        condition = {"IfNoneMatch": "*"} if if_match is None else {"IfMatch": f'"{if_match}"'}
        try:
            return self._put("replace", key, data, **condition)
        except NotFound as error:  # AWS answers 404 to If-Match on a key that does not exist
            if error.reason == "ObjectNotFound":
                raise changed(self._request("replace", key), "it does not exist") from None
            raise

    def delete(self, keys: Iterable[str]) -> None:
        # One request a key: the batch request is missing or different on several servers.
        def remove(key: str) -> None:
            self._call("delete", key, lambda client: client.delete_object(**self._target(key)))

        wanted = [check_key(key) for key in keys]
        if wanted:
            with ThreadPoolExecutor(min(8, len(wanted)), "delete") as pool:
                for _ in pool.map(remove, wanted):
                    pass

    def end_unfinished(self, prefix: str, wanted: Callable[[str], bool]) -> None:
        if not self._shows_unfinished:
            return
        try:
            for key, upload in [*self._unfinished(check_prefix(prefix))]:
                if key.startswith(prefix) and wanted(key):
                    self._end(key, upload)
        except StorageError as error:
            if error.reason not in _NOT_FOR_US:
                raise
            self._shows_unfinished = False
            _log.info("what killed processes have begun to upload is left to a lifecycle rule of the bucket: %s", error)

    def _unfinished(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Keys and names of multipart uploads that are neither completed nor aborted."""
        request = {"Bucket": self.bucket, "Prefix": self._prefix + prefix}
        while True:
            answer = self._call("list of unfinished uploads", prefix, partial(_list_uploads, request))
            for item in answer.get("Uploads", ()):
                yield item["Key"].removeprefix(self._prefix), item["UploadId"]
            if not answer.get("IsTruncated") or not answer.get("NextKeyMarker"):
                return
            request |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer.get("NextUploadIdMarker", "")}

    def _end(self, key: str, upload: str) -> None:
        request = {**self._target(key), "UploadId": upload}
        with suppress(NotFound):  # it has been completed or aborted since
            self._call("end of an unfinished upload", key, lambda client: client.abort_multipart_upload(**request))

    def _put(self, operation: str, key: str, data: bytes, **condition: str) -> ObjectInfo:
        """One PutObject, with the digest beside the data. A conditional one recognises its own earlier try."""
        self._check_bucket()
        md5, digest, nonce = _md5(data), digest_of(data), secrets.token_hex(8)
        request = {
            **self._target(key),
            "Body": data,
            "ContentMD5": base64.b64encode(md5).decode(),
            "Metadata": {_DIGEST: digest, _NONCE: nonce},
            **condition,
        }
        tries = 0

        def put(client: Any) -> Any:
            nonlocal tries
            tries += 1
            return client.put_object(**request)

        try:
            answer = self._call(operation, key, put)
        except PreconditionFailed:
            # A first try whose answer was lost may have succeeded; the second then finds the key taken by ourselves.
            found = self._written_by(nonce, key) if tries > 1 else None
            if found is None:
                raise
            return found
        info = ObjectInfo(key, len(data), _etag(answer), None, digest)
        if info.etag != md5.hex():
            self._read_back(info)
        return info

    def _written_by(self, nonce: str, key: str) -> ObjectInfo | None:
        answer = self._call("head", key, lambda client: client.head_object(**self._target(key)))
        return _info(key, answer, answer["ContentLength"]) if answer["Metadata"].get(_NONCE) == nonce else None

    def _put_parts(
        self, key: str, source: BinaryIO, size: int, progress: Callable[[int], None]
    ) -> tuple[ObjectInfo, bool]:
        """A multipart upload; returns what was sent, with the etag that most servers make of it, and whether the
        store has shown for every part that it received these bytes."""
        self._check_bucket()
        upload, crc = self._begin_parts(key)
        whole, stopped, arrived = Hasher(), threading.Event(), list[int]()

        def send(number: int, part: FilePart) -> _Sent:
            sent = self._send_part(key, {**upload, "PartNumber": number}, part, crc=crc)
            arrived.append(part.size)
            return sent

        parts = read_parts(source, part_size(size), whole=whole, each=Crc32 if crc else _new_md5, stopped=stopped)
        try:
            sent = send_parts(send, parts, beat=lambda: progress(sum(arrived)), stop=stopped.set)
            progress(sum(arrived))
            etag = _etag_of_parts([part.listed["ETag"] for part in sent])
            listed = [{"PartNumber": number, **part.listed} for number, part in enumerate(sent, 1)]
            self._complete(key, {**upload, "MultipartUpload": {"Parts": listed}}, etag)
        except BaseException:
            with suppress(StorageError):  # the first error is the one to tell
                self._call("upload", key, lambda client: client.abort_multipart_upload(**upload))
            raise
        info = ObjectInfo(key, sum(part.size for part in sent), etag, None, whole.digest())
        return info, all(part.proven for part in sent)

    def _begin_parts(self, key: str) -> tuple[dict[str, Any], bool]:
        """Start a multipart upload; returns the upload, and whether the store will check the CRC-32 of its parts.

        Some stores refuse the question, others do not understand it and say nothing.
        """
        target, crc = self._target(key), self._connection.checks_crc
        asked = {**target, "ChecksumAlgorithm": "CRC32"} if crc else target
        try:
            answer = self._call("upload", key, lambda client: client.create_multipart_upload(**asked))
        except StorageError as error:
            if not crc or error.reason not in ("RequestRefused", "Unsupported"):
                raise
            self._connection.checks_crc = False
            return self._begin_parts(key)
        return {**target, "UploadId": answer["UploadId"]}, answer.get("ChecksumAlgorithm") == "CRC32"

    def _send_part(self, key: str, request: dict[str, Any], part: FilePart, *, crc: bool) -> "_Sent":
        """One part with its CRC-32, which the answer repeats, or with its MD5, of which most servers make its etag."""
        checksum = base64.b64encode(part.checksum).decode()
        check = {"ChecksumCRC32" if crc else "ContentMD5": checksum}
        answer = self._call("upload", key, lambda client: client.upload_part(**request, Body=part.body(), **check))
        etag = str(answer["ETag"])
        if crc:
            return _Sent({"ETag": etag, **check}, part.size, proven=answer.get("ChecksumCRC32") == checksum)
        return _Sent({"ETag": etag}, part.size, proven=_plain(etag) == part.checksum.hex())

    def _complete(self, key: str, request: dict[str, Any], expected: str) -> None:
        try:
            self._call("upload", key, lambda client: client.complete_multipart_upload(**request))
        except NotFound:
            # A repeated completion finds the upload gone when the first one's answer was lost.
            found = self.head(key)
            if found is None or found.etag != expected:
                raise

    def _verified(
        self, key: str, sent: ObjectInfo, *, proven: bool, beat: Callable[[], None] = lambda: None
    ) -> ObjectInfo:
        """What the store holds, compared with what was sent: by size and etag where the store has proven what that
        stands for, else read back."""
        found = self.head(key)
        if found is None:
            raise meaning(self._request("upload", key), Answer(404, ""))
        if found.size != sent.size:
            raise mismatch(self._name(key), wanted=f"{sent.size} bytes", found=f"{found.size} bytes")
        info = replace(found, digest=sent.digest)
        if not proven or found.etag != sent.etag:
            self._read_back(info, beat)
        return info

    def _read_back(self, info: ObjectInfo, beat: Callable[[], None] = lambda: None) -> None:
        """Encrypted and some foreign stores have etags of their own; only the bytes can prove the upload then."""

        def fetch() -> tuple[None, str, str | None]:
            return None, hash_object(self, info, like=info.digest, beat=beat), info.digest

        self._whole(info.key, fetch)

    def _whole(self, key: str, fetch: Callable[[], tuple[T, str, str | None]]) -> T:
        """What fetch() gives beside its digest and the recorded one, as soon as these agree. Raises Damaged.

        Bytes that are damaged on their way arrive in another form the next time; what comes wrong in the same form
        twice is what the store holds.
        """
        seen: set[str] = set()
        while True:
            result, found, recorded = fetch()
            if recorded is None or found == recorded:
                return result
            if found in seen or len(seen) == _MOST_DAMAGED:
                raise mismatch(self._name(key), wanted=recorded, found=found)
            seen.add(found)

    def _open(self, key: str, if_match: str | None) -> "_Stream":
        return _Stream(self, key, if_match)

    def _get(self, client: Any, key: str, etag: str | None, offset: int, end: int | None = None) -> Any:
        """GetObject of bytes `offset` to before `end`, of the version `etag` alone where it is given."""
        request: dict[str, Any] = self._target(key)
        if etag is not None:
            request["IfMatch"] = f'"{etag}"'
        if offset or end is not None:
            request["Range"] = f"bytes={offset}-{'' if end is None else end - 1}"
        return client.get_object(**request)

    def _fetch_range(self, key: str, etag: str, offset: int, length: int, target: Target) -> None:
        """One range, going on behind the last byte that arrived whenever the connection breaks."""
        position, end = offset, offset + length

        def step(client: Any) -> None:
            nonlocal position
            with closing(self._get(client, key, etag, position, end)["Body"]) as body:
                for moved in _poured(body, target, position, end - position):
                    position += moved
                while position < end:
                    block = body.read(min(BLOCK, end - position))
                    if not block:
                        raise IncompleteReadError(actual_bytes=position - offset, expected_bytes=length)
                    target.write(position, block)
                    position += len(block)

        self._call("download", key, step, progress=lambda: position)

    def _check_bucket(self) -> None:
        """Raise BucketNotFound before a write: some servers would make the bucket, and so hide a typing error."""
        if self._bucket_seen:
            return
        try:
            self._call("bucket check", "", lambda client: client.head_bucket(Bucket=self.bucket))
        except AccessDenied as error:
            if error.reason != "AccessDenied":  # an identity may write objects without seeing the bucket
                raise
        self._bucket_seen = True

    def _target(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self._prefix + check_key(key)}

    def _name(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def _request(self, operation: str, key: str) -> Request:
        return self._connection.request(operation, self._name(key), self.bucket)

    def _call(
        self, operation: str, key: str, function: Callable[[Any], T], *, progress: Callable[[], int] = lambda: 0
    ) -> T:
        request = self._request(operation, key)
        try:
            result = self._connection.call(request, function, progress)
        except StorageError as error:
            if operation not in ("head", "bucket check") or error.reason not in ("AccessDenied", "RequestRefused"):
                raise
            # The answer to HEAD has no body and so no code: ask for one. This also renews expired credentials.
            self._connection.call(request, lambda client: client.list_objects_v2(Bucket=self.bucket, MaxKeys=1))
            result = self._connection.call(request, function, progress)
        if operation not in ("bucket check", "delete"):
            self._bucket_seen = True
        return result


@dataclass(frozen=True)
class _Sent:
    """A part that the store has: how the completion lists it, and whether the store has told our checksum of it."""

    listed: dict[str, str]
    size: int
    proven: bool


class _Stream(io.RawIOBase):
    """One version of an object read from beginning to end, over as many connections as it takes."""

    def __init__(self, store: S3Store, key: str, if_match: str | None) -> None:
        super().__init__()
        self._store, self._key = store, key
        self._etag, self._body, self._position = if_match, None, 0
        self._body, self.info = store._call("read", key, self._first)

    def _first(self, client: Any) -> tuple[Any, ObjectInfo]:
        answer = self._store._get(client, self._key, self._etag, 0)
        return answer["Body"], _info(self._key, answer, answer["ContentLength"])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.info.size - self._position)
        if wanted <= 0:
            return 0
        data = self._store._call("read", self._key, lambda client: self._next(client, wanted))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _next(self, client: Any, wanted: int) -> bytes:
        try:
            if self._body is None:
                answer = self._store._get(client, self._key, self.info.etag, self._position)
                self._body = answer["Body"]
            data: bytes = self._body.read(wanted)
            if not data:
                raise IncompleteReadError(actual_bytes=self._position, expected_bytes=self.info.size)
            return data
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def close(self) -> None:
        self._drop()
        super().close()


class Connection:
    """A client of one endpoint, and the one loop that repeats what failed."""

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._endpoint = _checked_endpoint(settings.endpoint)
        self._credentials = settings.credentials_name or str(settings.credentials_dir or "the SDK's credential chain")
        # What accepts connections and never answers is found out as soon as what refuses them.
        self._first_timeout = min(settings.read_timeout, settings.connect_deadline)
        self._lock = threading.Lock()
        self._client: Any = None
        self._session: Any = None
        self._pid = 0
        self._answered = False
        self.checks_crc = True  # until the store refuses CRC-32 as a checksum of parts
        self._trusted_until: dict[str, float] = {}

    def request(self, operation: str, uri: str, bucket: str) -> Request:
        """Describe a request for error messages."""
        return Request(operation, uri, bucket, self._endpoint or "AWS", self._credentials)

    def call(self, request: Request, function: Callable[[Any], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Run function(client) until it succeeds or fails for good.

        `progress` is a number that grows while data arrives; the deadline counts from the last growth. Raises
        StorageError.
        """
        started, tries, renewed, reached = time.monotonic(), 0, False, progress()
        while True:
            try:
                result = function(self._connected(request))
            except ClientError as error:
                self._note_answer()
                answer = _answer(error)
                if answer.code in EXPIRED and not renewed:
                    renewed = True
                    self._forget_client()
                    continue
                if answer.status == 407:
                    raise self._not_through(request, str(answer)) from None
                if not answer.temporary:
                    raise meaning(request, self._told(answer)) from None
                failure: StorageError = unavailable(request, str(answer))
            except (BotoCoreError, ResponseParserError, ValueError) as error:
                failure = self._transport_failure(request, error)
            else:
                self._note_answer()
                return result
            if progress() > reached:
                started, tries, reached = time.monotonic(), 0, progress()
            limit = self._settings.deadline if self._answered else self._settings.connect_deadline
            delay = random.uniform(0, min(_LONGEST_DELAY, _FIRST_DELAY * 2**tries))
            if time.monotonic() + delay - started > limit:
                raise failure from None
            time.sleep(delay)
            tries += 1

    def _connected(self, request: Request) -> Any:
        with self._lock:
            # A forked child must not share its parent's sockets.
            if self._client is None or self._pid != os.getpid():
                self._check_authority(request)
                try:
                    self._client = self._make_client()
                except ValueError as error:
                    raise _invalid_endpoint(self._endpoint or "", "it is no URL") from error
                except BotoCoreError:
                    raise without_credentials(request) from None
                self._pid = os.getpid()
            return self._client

    def _check_authority(self, request: Request) -> None:
        """The SDK would say of a missing file, and of one without a certificate, that a handshake failed."""
        path = self._settings.ca_file
        if path is None:
            return
        name = f"{path.name} of {self._settings.ca_name}" if self._settings.ca_name else str(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError:
            raise without_authority(request, name, "holds no certificate") from None
        except FileNotFoundError:
            raise without_authority(request, name, "is missing") from None
        except OSError as error:
            raise without_authority(request, name, f"cannot be read ({error.strerror})") from None

    def _note_answer(self) -> None:
        if not self._answered:
            self._answered = True
            if self._first_timeout < self._settings.read_timeout:
                self._forget_client()

    def _forget_client(self) -> None:
        with self._lock:
            self._client = None

    def _make_client(self) -> Any:
        settings = self._settings
        self._session = session = Session()
        session.register_component("data_loader", _LOADER)
        if settings.credentials_dir is not None:
            provider = _FileProvider(settings.credentials_dir)
            session.register_component("credential_provider", CredentialResolver([provider]))
        style = settings.addressing
        if style == "auto":
            style = "path" if self._endpoint else "virtual"
        config = Config(
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout if self._answered else self._first_timeout,
            retries={"total_max_attempts": 1},
            max_pool_connections=32,
            tcp_keepalive=True,
            s3={"addressing_style": style},
            # Checksums are chosen here: the SDK's own need a second encoding of the body, unknown to many servers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # An endpoint out of the environment would pass by what the profile allows.
            ignore_configured_endpoint_urls=True,
            user_agent_extra="finetune-operator",
        )
        client = session.create_client(
            "s3",
            region_name=settings.region or session.get_config_variable("region") or "us-east-1",
            endpoint_url=self._endpoint,
            verify=str(settings.ca_file) if settings.ca_file else None,
            config=config,
        )
        _move_files_by_kernel(client)
        client.meta.events.register("before-send.s3", self._refuse_link_local)
        client.meta.events.register("before-sign.s3.UploadPart", _leave_body_unsigned)
        return client

    def _refuse_link_local(self, request: Any, **_: Any) -> None:
        """Resolve where a request goes: the metadata services of clouds hand out credentials to whoever asks."""
        parts = urlsplit(request.url)
        host = parts.hostname or ""
        if self._trusted_until.get(host, 0.0) > time.monotonic():
            return
        try:
            found = socket.getaddrinfo(host, parts.port or 443, type=socket.SOCK_STREAM)
        except OSError:
            if get_environ_proxies(request.url):  # a proxy knows names of its own; to ask in vain may take seconds
                self._trusted_until[host] = time.monotonic() + _RESOLVED_FOR
            return  # the connection itself will tell
        for item in found:
            address = ip_address(str(item[4][0]).partition("%")[0])
            if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
                address = address.ipv4_mapped
            if address.is_link_local or address in _METADATA:
                raise _invalid_endpoint(f"{parts.scheme}://{parts.netloc}", f"{address} is a link-local address")
        self._trusted_until[host] = time.monotonic() + _RESOLVED_FOR

    def _transport_failure(self, request: Request, error: Exception) -> StorageError:
        """What a failure without a usable answer amounts to; raises it where repeating cannot help."""
        if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
            raise without_credentials(request) from None
        if isinstance(error, ParamValidationError):
            detail = " ".join(str(error).split())
            raise StorageError("InvalidUri", f"The {request} cannot be sent: {detail}.", environment=False) from None
        if isinstance(error, SSLError) and (detail := _refused_certificate(error)):
            raise untrusted(request, detail) from None
        if isinstance(error, HTTPClientError) and isinstance(error.kwargs.get("error"), StorageError | Stopped):
            raise error.kwargs["error"] from None  # of the file that was to be sent
        if isinstance(error, ProxyConnectionError):
            return self._not_through(request, _cause(error))
        if isinstance(error, EndpointConnectionError | ConnectTimeoutError | ConnectError):
            return unreachable(request, _cause(error))
        # The SDK lets numbers and dates that it cannot read pass through as ValueError.
        if isinstance(error, HTTPClientError | IncompleteReadError | ResponseParserError | ValueError):
            if not self._answered:
                return unreachable(request, _cause(error))
            return unavailable(request, _cause(error))
        raise StorageError(
            "RequestFailed", f"The {request} failed in the SDK ({type(error).__name__}).", environment=True
        ) from error

    def _not_through(self, request: Request, detail: str) -> StorageError:
        parts = urlsplit(self._connected(request).meta.endpoint_url)
        proxy = urlsplit(get_environ_proxies(parts.geturl()).get(parts.scheme, ""))
        return not_through(request, f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}", detail)

    def _told(self, answer: Answer) -> Answer:
        """The answer as it may be shown: servers quote what they were sent."""
        message = " ".join(answer.message.split())[:200].rstrip(".")
        for secret in self._secrets():
            message = message.replace(secret, "***")
        return replace(answer, message=message)

    def _secrets(self) -> list[str]:
        credentials = self._session.get_credentials() if self._session is not None else None
        if credentials is None:
            return []
        with suppress(BotoCoreError):
            frozen = credentials.get_frozen_credentials()
            return [value for value in (frozen.secret_key, frozen.token, frozen.access_key) if value]
        return []


def _connection(settings: StorageSettings) -> Connection:
    """Stores with the same credential files share one client; the SDK's own chain is asked anew by each store."""
    return Connection(settings) if settings.credentials_dir is None else _shared_connection(settings)


_shared_connection = lru_cache(maxsize=16)(Connection)


class _FileCredentials(Credentials):  # type: ignore[misc]
    """Credentials in a directory of files, read again whenever one of them has changed, as a mounted Secret does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: tuple[object, ...] = ()
        self._frozen = ReadOnlyCredentials(None, None, None)
        super().__init__("", "", method="files")

    def get_frozen_credentials(self) -> Any:
        """Called by the SDK for every request that it signs."""
        paths = [self._directory / name for name in _FileProvider.FILES]
        seen = tuple(_stamp(path) for path in paths)
        if seen != self._seen:
            access, secret, token = (_text(path) for path in paths)
            if not access or not secret:
                raise NoCredentialsError
            self._frozen, self._seen = ReadOnlyCredentials(access, secret, token or None), seen
        return self._frozen


class _FileProvider:
    """The SDK's interface for a source of credentials."""

    FILES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    METHOD = "files"
    CANONICAL_NAME = None

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> _FileCredentials:
        return _FileCredentials(self._directory)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _checked_endpoint(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
    except ValueError:
        raise _invalid_endpoint(endpoint, "it is no URL") from None
    if parts.username or parts.password:
        raise _invalid_endpoint(f"{parts.scheme}://...@{parts.hostname}", "credentials do not belong there")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise _invalid_endpoint(endpoint, "it is no http:// or https:// address")
    return endpoint.rstrip("/")


def _invalid_endpoint(endpoint: str, detail: str) -> StorageError:
    return StorageError(
        "EndpointRefused",
        f"The endpoint {endpoint} is refused because {detail}: set the address of the S3 server itself.",
        environment=False,
    )


def _answer(error: ClientError) -> Answer:
    told, meta = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    return Answer(
        _status(error), str(told.get("Code", "")), str(told.get("Message", "")), str(meta.get("RequestId") or "")
    )


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _cause(error: Exception) -> str:
    """A transport error in a few words; the SDK's own text may quote a whole signed URL."""
    text = str(getattr(error, "kwargs", {}).get("error", error))
    if tunnel := re.search(r"Tunnel connection failed: (\d+)", text):
        return f"HTTP {tunnel[1]}"
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("resolve", "its name does not resolve"),
        ("Name or service not known", "its name does not resolve"),
        ("No route", "no route to it"),
        ("unreachable", "no route to it"),
        ("onnect timeout", "no connection within the time limit"),
        ("Read timed out", "no answer within the time limit"),
        ("Read timeout", "no answer within the time limit"),
        ("SSL", "the TLS handshake failed"),
        ("reset", "the connection was reset"),
        ("closed", "the connection was closed"),
    ):
        if sign in text:
            return words
    return type(error).__name__


def _refused_certificate(error: Exception) -> str:
    """What is wrong with a certificate, in OpenSSL's words; empty where something else is."""
    found = re.search(r"certificate verify failed: (.*?)[.']* \(_ssl\.c|(hostname '.*?' doesn't match)", str(error))
    return "" if found is None else found[1] or f"{found[2]} it"


def _with_zones(answer: Any) -> Any:
    """A listing. Raises ValueError, as for one that cannot be read, where a time has lost its zone on its way.

    Nothing vouches for the bytes of a listing.
    """
    for item in answer.get("Contents", ()):
        if item["LastModified"].tzinfo is None:
            raise ValueError(f"the time of {item['Key']} has no zone")
    return answer


def _info(key: str, answer: Any, size: int) -> ObjectInfo:
    return ObjectInfo(
        key, int(size), _etag(answer), answer.get("LastModified"), answer.get("Metadata", {}).get(_DIGEST)
    )


def _etag(answer: Any) -> str:
    if "ETag" not in answer:
        raise _no_s3()
    return _plain(answer["ETag"])


def _no_s3() -> StorageError:
    """The error for a web server that says 200 to everything."""
    return StorageError(
        "NotAnS3Server",
        "What answered at the endpoint is no S3 server: set the endpoint to the S3 server's own address.",
        environment=False,
    )


def _list_uploads(request: dict[str, Any], client: Any) -> Any:
    return client.list_multipart_uploads(**request)


def _plain(etag: str) -> str:
    return etag.strip('"')


class _Connection(AWSHTTPConnection):  # type: ignore[misc]
    """Plain HTTP that lets the kernel send the parts of a file, and receive them: they are not copied through this
    process."""

    response_class = Response

    def request(self, method: str, url: str, body: Any = None, *args: Any, **kwargs: Any) -> None:
        super().request(method, url, [body] if isinstance(body, FileBody) else body, *args, **kwargs)

    def send(self, data: Any) -> Any:
        if not isinstance(data, FileBody):
            return super().send(data)
        if not self._response_received:  # the store may have refused it by now
            send_file(data, self.sock)
        return None


class _Pool(AWSHTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _Connection


def _poured(body: Any, target: Target, offset: int, length: int) -> Iterator[int]:
    """What `Response.pour` moves of an answer's body, nothing of one that is encrypted. The SDK does not tell what it
    reads from: it is dug out of two of its layers."""
    response = getattr(getattr(body, "_raw_stream", None), "_fp", None)
    if isinstance(response, Response):
        try:
            yield from response.pour(target, offset, length)
        except Disconnected as error:
            raise ResponseStreamingError(error=error) from None


def _move_files_by_kernel(client: Any) -> None:
    """The SDK has no option for it: what it makes its connections of is replaced, for plain HTTP, to a proxy, too."""
    session = client._endpoint.http_session
    # Managers of proxies are made when they are first used, out of the session's own.
    session._pool_classes_by_scheme["http"] = _Pool


def _leave_body_unsigned(request: Any, **_: Any) -> None:
    """Spare a part a SHA-256 of its own: its checksum is a signed header, and the file's digest is kept with it."""
    config = request.context["client_config"]
    request.context["client_config"] = config.merge(Config(s3={**config.s3, "payload_signing_enabled": False}))


def _etag_of_parts(etags: Sequence[str]) -> str:
    """What most servers call an object made of parts with these etags; empty where they are no MD5 digests."""
    try:
        sums = b"".join(bytes.fromhex(_plain(etag)) for etag in etags)
    except ValueError:
        return ""
    return f"{_md5(sums).hex()}-{len(etags)}"


def _md5(data: bytes) -> bytes:
    """What Content-MD5 and most etags are made of."""
    return _new_md5(data).digest()


def _new_md5(data: bytes = b"") -> Checksum:
    """A checksum against accidents, not against attackers."""
    return hashlib.md5(data, usedforsecurity=False)
