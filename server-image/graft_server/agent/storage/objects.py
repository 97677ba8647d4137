"""A version's objects, read from any byte on, from the store that the mounted Secret describes."""

import re
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError
from graft.artifacts.store import S3Store, StorageConfig, StoreError

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason

READ_BYTES = 128 * 1024  # small, so that a slow transfer that is not wanted any more ends soon
STALL_SECONDS = 20.0  # without a byte: the connection is given up
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
    """Bytes of an object of `total` bytes, from byte `start` on: 0 where the store gives no ranges."""

    start: int
    total: int
    chunks: Generator[bytes, None, None]


class Objects(S3Store):
    """The store, for reading. It tries once: the agent resumes where a transfer ended, and backs off per adapter."""

    def __init__(self, config: StorageConfig, *, stall_seconds: float = STALL_SECONDS) -> None:
        super().__init__(config, attempts=0, timeout=stall_seconds)  # botocore counts retries

    def stream(self, key: str, bucket: str, start: int = 0) -> Stream:
        """The object from byte `start` on. StoreError now or while it is read, "missing" where it ends before `start`."""
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
    """The store that the mounted Secret describes. The Secret may change under a running pod, so it is read each time."""

    def __init__(self, folder: Path, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._folder = folder
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()  # boto3 makes one client at a time
        self._open: tuple[StorageConfig, Objects] | None = None
        self._seen: StorageConfig | None = None

    def __call__(self) -> Objects:
        """The open store. AdapterError where the Secret describes none."""
        with self._lock:
            try:
                config = StorageConfig.from_dir(self._folder)
                if self._open is None or self._open[0] != config:
                    self._open = (config, Objects(config, stall_seconds=self._stall_seconds))
            except (StoreError, BotoCoreError, OSError, ValueError) as error:
                raise AdapterError(AdapterReason.CREDENTIALS_INVALID, f"the storage Secret: {error}") from error
            return self._open[1]

    def changed(self) -> bool:
        """Whether the Secret says something else than at the last look. Reads a few small files."""
        before = self._seen
        try:
            self._seen = StorageConfig.from_dir(self._folder)
        except (StoreError, OSError, ValueError):
            return False  # nothing better to try with
        return before is not None and before != self._seen


def corrupted(error: StoreError) -> bool:
    """Whether the bytes that came are not those that the store's own checksum is of."""
    return isinstance(error.__cause__, FlexibleChecksumError)


def interrupted(error: StoreError) -> bool:
    """Whether the transfer broke off, and not because the store said no: it may go on where it ended."""
    return error.trouble == "unavailable" and not isinstance(error.__cause__, ClientError) and not corrupted(error)


def code_of(error: StoreError) -> str:
    """S3's error code, empty where the store did not answer."""
    cause = error.__cause__
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, ClientError) else ""


def explained(error: StoreError) -> AdapterError:
    """What a failed call means for the adapter."""
    code, text = code_of(error), str(error)
    if corrupted(error):
        return AdapterError(AdapterReason.DIGEST_MISMATCH, text)
    if code in CREDENTIAL_CODES:
        return AdapterError(
            AdapterReason.CREDENTIALS_INVALID, f"the store does not take the key of the storage Secret: {text}"
        )
    if code in THROTTLE_CODES:
        return AdapterError(AdapterReason.STORAGE_THROTTLED, text, retry_after=_retry_after(error))
    if error.trouble == "missing":
        return AdapterError(AdapterReason.FILE_MISSING, f"not in storage: {text}")
    if error.trouble == "denied" and error.__cause__ is None:  # S3Store reads no document of such a size
        return AdapterError(AdapterReason.MANIFEST_INVALID, text)
    if error.trouble == "denied":
        return AdapterError(AdapterReason.STORAGE_DENIED, text)
    return AdapterError(AdapterReason.STORAGE_UNAVAILABLE, text, retry_after=_retry_after(error))


def _retry_after(error: StoreError) -> float | None:
    cause = error.__cause__
    if not isinstance(cause, ClientError):
        return None
    text = cause.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(text) if text.isdigit() else None  # as a date it is not used by any store known
