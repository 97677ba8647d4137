"""The object store's address and key, the errors of its calls, and their retries.

The credentials come from a mounted Secret, one file per key, never from the environment.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from botocore.exceptions import ClientError

log = logging.getLogger(__name__)
T = TypeVar("T")
# The key is right, but too old, or signed by a clock that is wrong. The same call succeeds with the next key or the next clock.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "RequestTimeTooSkewed", "TokenRefreshRequired"}
)
Trouble = Literal["missing", "denied", "full", "exists", "large", "unavailable"]


class StoreError(Exception):
    """A call to the store failed. `trouble` says why: missing, denied, full, exists, large (the object has more bytes than
    its reader accepts), or unavailable (a retry may succeed). `answered` is False if the store sent no answer at all."""

    def __init__(self, trouble: Trouble, message: str, *, answered: bool = True) -> None:
        super().__init__(message)
        self.trouble = trouble
        self.answered = answered


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

    @classmethod
    def from_dir(cls, folder: str | Path) -> "StorageConfig":
        """Read a mounted Secret: files endpoint, region, bucket, prefix, access-key-id, secret-access-key[,
        session-token, ca.crt]."""
        root = Path(folder)

        def text(name: str, default: str | None = None) -> str:
            path = root / name
            if not path.exists():
                if default is None:
                    raise StoreError("denied", f"the storage Secret has no key {name}")
                return default
            return path.read_text().strip()

        ca = root / "ca.crt"
        return cls(
            endpoint=text("endpoint", ""),
            region=text("region", "us-east-1"),
            bucket=text("bucket"),
            prefix=text("prefix", ""),
            access_key_id=text("access-key-id"),
            secret_access_key=text("secret-access-key"),
            session_token=text("session-token", "") or None,
            ca_file=str(ca) if ca.exists() and ca.stat().st_size else None,
        )


def trouble_of(error: ClientError) -> Trouble:
    """Return the trouble that the store's error answer describes (PURE)."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in {"NoSuchKey", "NoSuchBucket", "NotFound", "404"} or status == 404:
        return "missing"
    if code in {"QuotaExceeded", "XMinioStorageFull", "EntityTooLarge", "InsufficientStorage"} or status == 507:
        return "full"
    if status == 412 or code in {"PreconditionFailed", "ConditionalRequestConflict"}:
        return "exists"
    if status in {401, 403} and code not in EXPIRED:
        return "denied"
    return "unavailable"


def patiently(call: Callable[[], T], patience: float, pause: Callable[[float], object] = time.sleep) -> T:
    """Call `call`, and retry while the store is unavailable, until `patience` seconds after the first such error.

    The pauses between retries grow from 1 s to 15 s. Raises the error of the last call.
    """
    deadline, seconds = None, 1.0
    while True:
        try:
            return call()
        except StoreError as error:
            now = time.monotonic()
            deadline = now + patience if deadline is None else deadline
            if error.trouble != "unavailable" or now + seconds > deadline:
                raise
            log.warning("the store is unavailable, retrying in %.0f s: %s", seconds, error)
        pause(seconds)
        seconds = min(2 * seconds, 15.0)
