"""Read a version's objects, from any byte offset, from the store that the mounted Secret describes."""

import re
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason

READ_BYTES = 128 * 1024  # small, so that a slow transfer stops soon when its version is no longer wanted
STALL_SECONDS = 20.0  # without a byte, after which the connection is closed
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
CREDENTIAL_CODES = frozenset(
    {
        "AccessKeyDisabled",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "InvalidTokenId",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
THROTTLE_CODES = frozenset({"RequestLimitExceeded", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"})


@dataclass(frozen=True)
class Stream:
    """The bytes of an object of `total` bytes, from byte `start` on. `start` is 0 if the store has no ranges."""

    start: int
    total: int
    chunks: Generator[bytes, None, None]


class Objects(S3Store):
    """The store, for reading. Requests are not retried here: the agent resumes transfers, and backs off per adapter."""

    def __init__(self, config: StorageConfig, *, stall_seconds: float = STALL_SECONDS) -> None:
        super().__init__(config, attempts=0, timeout=stall_seconds)  # botocore counts only the retries

    def stream(self, key: str, bucket: str, start: int = 0) -> Stream:
        """Return the object from byte `start` on. Raises StoreError, here or while the chunks are read.

        If the object ends before `start`, code_of() of the error is InvalidRange.
        """
        wanted = {"Range": f"bytes={start}-"} if start else {}
        response = self._call("get_object", key, bucket, **wanted)
        total = int(response["ContentLength"])
        first = 0
        if match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.get("ContentRange") or ""):
            first, total = int(match[1]), int(match[2])
        return Stream(first, total, self._read(key, response["Body"]))

    def _read(self, key: str, body: object) -> Generator[bytes, None, None]:
        try:
            yield from body.iter_chunks(READ_BYTES)  # type: ignore[attr-defined]
        except (BotoCoreError, OSError) as error:
            raise StoreError("unavailable", f"{key}: {error}") from error
        finally:
            body.close()  # type: ignore[attr-defined]


class Storage:
    """The store that the mounted Secret describes. The Secret may change while the pod runs, so every call reads it."""

    def __init__(self, folder: Path, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._folder = folder
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()  # boto3 cannot create two clients at the same time
        self._open: tuple[StorageConfig, Objects] | None = None
        self._seen: StorageConfig | None = None

    def __call__(self) -> Objects:
        """Return the open store. Raises AdapterError if the Secret does not describe a store."""
        with self._lock:
            try:
                config = StorageConfig.from_dir(self._folder)
                if self._open is None or self._open[0] != config:
                    self._open = (config, Objects(config, stall_seconds=self._stall_seconds))
            except (StoreError, BotoCoreError, OSError, ValueError) as error:
                raise AdapterError(
                    AdapterReason.CREDENTIALS_INVALID, f"cannot use the storage Secret: {error}"
                ) from error
            return self._open[1]

    def changed(self) -> bool:
        """Return whether the Secret has changed since the last call. This reads a few small files."""
        before = self._seen
        try:
            self._seen = StorageConfig.from_dir(self._folder)
        except (StoreError, OSError, ValueError):
            return False  # the Secret is not usable, so a retry would fail again
        return before is not None and before != self._seen


def corrupted(error: StoreError) -> bool:
    """Return whether the received bytes do not match the store's own checksum."""
    return isinstance(error.__cause__, FlexibleChecksumError)


def interrupted(error: StoreError) -> bool:
    """Return whether the transfer was interrupted without an error answer of the store. Then it can be resumed."""
    return error.trouble == "unavailable" and not isinstance(error.__cause__, ClientError) and not corrupted(error)


def code_of(error: StoreError) -> str:
    """Return S3's error code, or an empty string if the store did not answer."""
    cause = error.__cause__
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, ClientError) else ""


def explained(error: StoreError) -> AdapterError:
    """Return the AdapterError for a failed call to the store."""
    code, text = code_of(error), str(error)
    if corrupted(error):
        return AdapterError(AdapterReason.DIGEST_MISMATCH, text)
    if code in CREDENTIAL_CODES:
        return AdapterError(
            AdapterReason.CREDENTIALS_INVALID, f"the store rejects the key of the storage Secret: {text}"
        )
    if code in THROTTLE_CODES:
        return AdapterError(AdapterReason.STORAGE_THROTTLED, text, retry_after=_retry_after(error))
    if error.trouble == "missing":
        return AdapterError(AdapterReason.FILE_MISSING, f"not in storage: {text}")
    if error.trouble == "large":
        return AdapterError(AdapterReason.MANIFEST_INVALID, text)
    if error.trouble == "denied":
        return AdapterError(AdapterReason.STORAGE_DENIED, text)
    return AdapterError(AdapterReason.STORAGE_UNAVAILABLE, text, retry_after=_retry_after(error))


def _retry_after(error: StoreError) -> float | None:
    cause = error.__cause__
    if not isinstance(cause, ClientError):
        return None
    text = cause.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(text) if text.isdigit() else None  # no known store sends a date
