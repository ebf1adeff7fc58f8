"""What an S3 server's error answer means: the reason, the sentence, the remedy. Pure; knows no SDK."""

from dataclasses import dataclass

from .base import AccessDenied, NotFound, PreconditionFailed, StorageError, Unavailable, Unreachable

# RequestTimeout is S3's 408, told as a 400; a 409 asks a conditional write that met another to come again.
_RETRIED_CODES = {
    *("RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "SlowDown"),
    *("BadDigest", "IncompleteBody"),  # what was sent did not arrive as it was
}
_RETRIED_STATUS = {408, 429, 500, 502, 503, 504, 507, 509}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key id is unknown there",
    "InvalidClientTokenId": "the access key id is unknown there",
    "UnrecognizedClientException": "the access key id is unknown there",
    "SignatureDoesNotMatch": "the secret access key does not belong to the access key id",
    "InvalidToken": "the session token is not valid",
    "InvalidSecurity": "the credentials are not valid",
}
_ACTIONS = {
    "read": "s3:GetObject",
    "download": "s3:GetObject",
    "head": "s3:GetObject",
    "list": "s3:ListBucket",
    "bucket check": "s3:ListBucket",
    "delete": "s3:DeleteObject",
    "list of unfinished uploads": "s3:ListBucketMultipartUploads",
    "end of an unfinished upload": "s3:AbortMultipartUpload",
}
_CONDITIONAL = {"create", "replace"}


@dataclass(frozen=True)
class Request:
    """What was asked for: the store's method, the object's URI, the endpoint, whose credentials."""

    operation: str
    uri: str
    bucket: str
    endpoint: str
    credentials: str

    def __str__(self) -> str:
        return f"{self.operation} of {self.uri} at {self.endpoint}"


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    code: str
    message: str = ""
    request_id: str = ""

    def __str__(self) -> str:
        code = f" {self.code}" if self.code and self.code != str(self.status) else ""
        request = f", request {self.request_id}" if self.request_id else ""
        return f"HTTP {self.status}{code}{request}"

    @property
    def temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in _RETRIED_STATUS or self.code in _RETRIED_CODES


def meaning(request: Request, answer: Answer) -> StorageError:
    """The error that an answer amounts to."""
    return (
        _about_identity(request, answer)
        or _about_objects(request, answer)
        or _about_server(request, answer)
        or StorageError(
            "RequestRefused",
            f"The {request} was refused ({answer}){': ' + answer.message if answer.message else ''}.",
            environment=False,
        )
    )


def _about_identity(request: Request, answer: Answer) -> StorageError | None:
    code = answer.code
    if code in _BAD_CREDENTIALS:
        return AccessDenied(
            "InvalidCredentials",
            f"The {request} was refused because {_BAD_CREDENTIALS[code]} ({answer}): correct AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY in {request.credentials}.",
        )
    if code in EXPIRED:
        return AccessDenied(
            "CredentialsExpired",
            f"The {request} was refused because the credentials have expired ({answer}): renew those in "
            f"{request.credentials}.",
        )
    if code == "RequestTimeTooSkewed":
        return AccessDenied(
            "ClockSkewed",
            f"The {request} was refused because the clocks here and there differ ({answer}): set the clock.",
        )
    if code == "AuthorizationHeaderMalformed":
        return StorageError(
            "WrongRegion",
            f"The {request} was refused ({answer}): set the storage's region to that of the bucket.",
            environment=False,
        )
    if answer.status in (401, 403):
        action = _ACTIONS.get(request.operation, "s3:PutObject")
        hint = (
            " (without s3:ListBucket a missing object is reported as denied, too)" if action == "s3:GetObject" else ""
        )
        return AccessDenied(
            "AccessDenied",
            f"The {request} was denied ({answer}): allow {action} on {request.uri} to the identity in "
            f"{request.credentials}{hint}.",
        )
    return None


def _about_objects(request: Request, answer: Answer) -> StorageError | None:
    if answer.code == "NoSuchBucket" or (answer.status == 404 and request.operation == "bucket check"):
        return NotFound(
            "BucketNotFound",
            f"The bucket {request.bucket} does not exist at {request.endpoint} ({request.operation}, {answer}): "
            "create it or correct the URI.",
        )
    if answer.status == 404:
        return NotFound(
            "ObjectNotFound",
            f"The {request} failed because there is no such object ({answer}): upload it or correct the URI.",
        )
    if answer.status in (304, 412):
        return changed(request, str(answer))
    if answer.status == 416:
        return changed(request, f"{answer}, it is shorter than it was")
    return None


def _about_server(request: Request, answer: Answer) -> StorageError | None:
    if answer.status == 501 or (answer.code == "NotImplemented"):
        reason = "ConditionalWritesUnsupported" if request.operation in _CONDITIONAL else "Unsupported"
        return StorageError(
            reason,
            f"The {request} is not implemented there ({answer}): use a server with conditional PutObject.",
            environment=False,
        )
    if 300 <= answer.status < 400:
        return StorageError(
            "RedirectRefused",
            f"The {request} was answered with a redirect ({answer}), which is never followed: "
            "set the endpoint and region of the bucket itself.",
            environment=False,
        )
    if answer.temporary or answer.status >= 500:
        return unavailable(request, str(answer))
    return None


def changed(request: Request, detail: str) -> PreconditionFailed:
    """The error for an object of another version than the one asked for."""
    return PreconditionFailed(
        "ObjectChanged",
        f"The {request} failed because the object is not the version that was asked for ({detail}): "
        "it was replaced or deleted since.",
    )


def unavailable(request: Request, detail: str) -> Unavailable:
    """The error for a server that answers, but not usefully."""
    return Unavailable(
        "StoreUnavailable", f"The {request} did not succeed within its deadline ({detail}): look after the server."
    )


def unreachable(request: Request, detail: str) -> Unreachable:
    """The error for an endpoint where nothing answers."""
    return Unreachable(
        "EndpointUnreachable",
        f"The {request} found the endpoint unreachable ({detail}): correct the endpoint or start its server.",
    )


def untrusted(request: Request, detail: str) -> Unreachable:
    """The error for a server whose certificate is not accepted; `detail` is what OpenSSL says of it."""
    remedy = "correct the endpoint to a name that it bears, or have it renewed"
    if "issuer" in detail or "self" in detail:
        remedy = (
            "put its authority's certificate, as ca.crt, into the ConfigMap that storage.caConfigMap names; outside a "
            "cluster AWS_CA_BUNDLE names the file"
        )
    return Unreachable(
        "CertificateNotTrusted",
        f"The {request} was not sent because the certificate there is not trusted ({detail}): {remedy}.",
    )


def without_authority(request: Request, file: str, detail: str) -> Unreachable:
    """The error for a file of certificates that cannot be used."""
    return Unreachable(
        "CertificateAuthorityMissing",
        f"The {request} was not sent because {file} {detail}: put the certificate of the authority there, in PEM.",
    )


def not_through(request: Request, proxy: str, detail: str) -> Unreachable:
    """The error for a proxy that refuses, or is not there."""
    return Unreachable(
        "ProxyRefused",
        f"The {request} did not get through the proxy {proxy} ({detail}): correct HTTP_PROXY or "
        "HTTPS_PROXY, or name the endpoint's host in NO_PROXY.",
    )


def without_credentials(request: Request) -> AccessDenied:
    """The error for credentials that are not there."""
    return AccessDenied(
        "CredentialsMissing",
        f"The {request} has no credentials: provide AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in "
        f"{request.credentials}.",
    )
