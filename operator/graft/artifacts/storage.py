"""The object store's address and key, the errors of its calls, and their retries.

The credentials come from a mounted Secret, one file per key, never from the environment. Or a token of the pod's service
account is exchanged for temporary ones (AssumeRoleWithWebIdentity), as in AWS's IRSA.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleWithWebIdentityCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    DeferredRefreshableCredentials,
)
from botocore.exceptions import ClientError
from botocore.utils import FileWebIdentityTokenLoader

log = logging.getLogger(__name__)
T = TypeVar("T")
# The key is right, but too old, or signed by a clock that is wrong. The same call succeeds with the next key or the next clock.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "RequestTimeTooSkewed", "TokenRefreshRequired"}
)
# The store does not know the key, or the key has another secret there: somebody has replaced it.
REPLACED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch"})
Trouble = Literal["missing", "bucket", "denied", "full", "exists", "large", "unavailable"]


class StoreError(Exception):
    """A call to the store failed. `trouble` says why: missing (the object), bucket (it does not exist, so nothing is known
    about its objects), denied, full, exists, large (the object has more bytes than its reader accepts), or unavailable (a
    retry may succeed). `answered` is False if the store sent no answer at all. `code`: S3's code of the error, or ""."""

    def __init__(self, trouble: Trouble, message: str, *, answered: bool = True, code: str = "") -> None:
        super().__init__(message)
        self.trouble = trouble
        self.answered = answered
        self.code = code


def unavailable(error: StoreError) -> bool:
    """Return whether a retry of the call may succeed (PURE)."""
    return error.trouble == "unavailable"


@dataclass(frozen=True)
class StorageConfig:
    """The store's address and key. `prefix` is the tenant's part of the bucket and ends in /."""

    endpoint: str
    region: str
    bucket: str
    prefix: str
    access_key_id: str
    secret_access_key: str
    session_token: str | None = None
    ca_file: str | None = None
    # Without a key: the role of the cloud that the pod assumes with the token of its service account.
    role_arn: str | None = None
    token_file: str | None = None
    sts_endpoint: str | None = None  # None: AWS's endpoint of the region

    @classmethod
    def from_dir(cls, folder: str | Path, given: Mapping[str, str] | None = None) -> "StorageConfig":
        """Read a mounted Secret: files endpoint, region, bucket, prefix, access-key-id, secret-access-key[,
        session-token, ca.crt]. Or role-arn[, sts-endpoint] and token instead of a key.

        `given` has entries that are not in the folder.
        """
        root = Path(folder)

        def text(name: str, default: str | None = None) -> str:
            if given is not None and name in given:
                return given[name]
            path = root / name
            if not path.exists():
                if default is None:
                    raise StoreError("denied", f"the storage Secret has no key {name}")
                return default
            return path.read_text().strip()

        ca, role, token = root / "ca.crt", text("role-arn", ""), root / "token"
        if role and not token.exists():
            raise StoreError(
                "denied",
                "the storage Secret has role-arn, but the pod has no token for it. Set objectStore.credentials: webIdentity in the "
                "chart's values, or give a key",
            )
        return cls(
            endpoint=text("endpoint", ""),
            region=text("region", "us-east-1"),
            bucket=text("bucket"),
            prefix=text("prefix", ""),
            access_key_id=text("access-key-id", "" if role else None),
            secret_access_key=text("secret-access-key", "" if role else None),
            session_token=text("session-token", "") or None,
            ca_file=str(ca) if ca.exists() and ca.stat().st_size else None,
            role_arn=role or None,
            token_file=str(token) if role else None,
            sts_endpoint=text("sts-endpoint", "") or None,
        )


class _Role(CredentialProvider):
    """The only provider of a session: temporary keys for a role, which botocore renews before they expire."""

    METHOD = "assume-role-with-web-identity"

    def __init__(self, fetch: Callable[[], Any]) -> None:
        super().__init__()
        self._fetch = fetch

    def load(self) -> Any:
        return DeferredRefreshableCredentials(method=self.METHOD, refresh_using=self._fetch)


def client_of(storage: StorageConfig, config: Config) -> Any:
    """Return a client of S3 with the key of `storage`, or with temporary keys for its role, which are renewed in time."""
    maker: Any = boto3  # its shared session keeps what it has read about S3
    key: dict[str, str | None] = {
        "aws_access_key_id": storage.access_key_id,
        "aws_secret_access_key": storage.secret_access_key,
        "aws_session_token": storage.session_token,
    }
    if storage.role_arn is not None and storage.token_file is not None:
        session = botocore.session.Session()

        def sts(service: str, **more: Any) -> Any:
            return session.create_client(service, storage.region, endpoint_url=storage.sts_endpoint, **more)

        fetcher = AssumeRoleWithWebIdentityCredentialFetcher(
            client_creator=sts,
            web_identity_token_loader=FileWebIdentityTokenLoader(storage.token_file),
            role_arn=storage.role_arn,
        )
        session.register_component("credential_provider", CredentialResolver([_Role(fetcher.fetch_credentials)]))
        maker, key = boto3.Session(botocore_session=session), {}
    return maker.client(
        "s3",
        endpoint_url=storage.endpoint or None,
        region_name=storage.region,
        verify=storage.ca_file,
        config=config,
        **key,
    )


def trouble_of(error: ClientError) -> Trouble:
    """Return the trouble that the store's error answer describes (PURE)."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return "bucket"
    if code in {"NoSuchKey", "NotFound", "404"} or status == 404:  # a HEAD has no code, so it may be the bucket, too
        return "missing"
    if code in {"QuotaExceeded", "XMinioStorageFull", "EntityTooLarge", "InsufficientStorage"} or status == 507:
        return "full"
    if status == 412 or code in {"PreconditionFailed", "ConditionalRequestConflict"}:
        return "exists"
    if (status in {401, 403} and code not in EXPIRED) or code == "InvalidIdentityToken":
        return "denied"
    return "unavailable"


def refused(what: str, error: ClientError) -> StoreError:
    """Return the error for an error answer of the store about `what`, without the words of the library (PURE)."""
    found = error.response.get("Error", {})
    said = ": ".join(str(part) for part in (found.get("Code"), found.get("Message")) if part)
    text = f"{what}: the store answered {error.operation_name} with {said or 'an error'}"
    return StoreError(trouble_of(error), text, code=str(found.get("Code") or ""))


def patiently(
    call: Callable[[], T],
    patience: float,
    pause: Callable[[float], object] = time.sleep,
    passes: Callable[[StoreError], bool] = unavailable,
) -> T:
    """Call `call`, and retry while the error `passes`, until `patience` seconds after the first such error.

    The pauses between retries grow from 1 s to 15 s. Raises the error of the last call.
    """
    deadline, seconds = None, 1.0
    while True:
        try:
            return call()
        except StoreError as error:
            now = time.monotonic()
            deadline = now + patience if deadline is None else deadline
            if not passes(error) or now + seconds > deadline:
                raise
            what = "is unavailable" if unavailable(error) else "refuses the key, which may be replaced just now"
            log.warning("the store %s, retrying in %.0f s: %s", what, seconds, error)
        pause(seconds)
        seconds = min(2 * seconds, 15.0)
