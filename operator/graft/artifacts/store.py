"""The S3 store: the few calls that Graft makes. Each error says what kind of trouble occurred, and so who must fix it.

The calls are synchronous (boto3), and the operator makes them in a thread. The credentials come from a folder of files,
a mounted Secret, never from the environment.
"""

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from graft.artifacts.access import Access
from graft.artifacts.storage import StorageConfig, StoreError, patiently, refused, trouble_of

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Report = Callable[[int, int], None]  # bytes done, bytes in all
PATIENCE = 180.0  # seconds for which a pod retries while the store is unavailable
CHUNK = 8 * 1024 * 1024  # bytes
PART = 32 * 1024 * 1024  # bytes in a part of a streamed upload; S3 allows 10,000 parts of at least 5 MiB
ONE_COPY = 64 * 1024 * 1024  # bytes that one request copies; larger objects are copied in parallel parts
RANGE = 16 * 1024 * 1024  # bytes in a range of a download; if a connection breaks, only its range is downloaded again
STREAMS = 8  # parallel connections of a download
CONNECTIONS = 32  # that are kept for the next request
PIECE = 256 * 1024  # bytes that each connection holds in memory
MOST_OBJECTS = 10_000  # in a listing that is held in memory; a model of 300 shards is the largest folder that is known
SMALL_OBJECT = 8 * 1024 * 1024  # bytes of a JSON document; larger objects are not read into memory


def _silent(what: str, error: BotoCoreError) -> StoreError:
    return StoreError("unavailable", f"{what}: {error}", answered=False)


def retried(method: Callable[Concatenate["S3Store", P], T]) -> Callable[Concatenate["S3Store", P], T]:
    """Retry a method of S3Store while its error may pass, for the store's own `patience`. Only this and `download`
    retry."""

    @wraps(method)
    def call(store: "S3Store", /, *arguments: P.args, **named: P.kwargs) -> T:
        found = patiently(lambda: method(store, *arguments, **named), store.patience, passes=store.access.passes)
        store.access.accepted = True
        return found

    return call


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    size: int
    etag: str


def _parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in pieces of PART bytes.

    The last piece may be smaller. If there are no bytes, the only piece is empty.
    """
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > PART:
            yield bytes(buffer[:PART])
            del buffer[:PART]
    yield bytes(buffer)


def _pieces(key: str, body: Any, size: int) -> Iterator[bytes]:
    try:
        yield from body.iter_chunks(size)
    except (BotoCoreError, OSError) as error:
        raise StoreError("unavailable", f"{key}: {error}") from error


class S3Store:
    """One bucket, accessed with one key.

    While the store is unavailable, each call is retried for `patience` seconds. The operator uses 0, because its
    reconciles retry. A pod uses PATIENCE, because it has nothing else to do.
    """

    def __init__(
        self,
        config: StorageConfig,
        *,
        attempts: int = 5,
        timeout: float = 20,
        patience: float = 0.0,
        may_write: Callable[[], bool] = lambda: True,
        folder: Path | None = None,
        accepted: bool = False,
    ) -> None:
        """Open the bucket of `config`. botocore applies `attempts` and `timeout` (seconds) to each request.

        `may_write` is asked before each request that changes something, so also between the parts of a copy. `folder`
        and `accepted`: see Access.
        """
        self.may_write = may_write
        self.patience = patience
        how = Config(
            retries={"mode": "standard", "max_attempts": attempts},
            connect_timeout=min(5, timeout),
            read_timeout=timeout,
            max_pool_connections=CONNECTIONS,
            s3={"addressing_style": "path"},
            signature_version="s3v4",
        )
        self.access = Access(config, how, self._before_send, folder, accepted=accepted)

    @property
    def config(self) -> StorageConfig:
        """Return the address and the key that are used now."""
        return self.access.config

    @property
    def client(self) -> Any:
        return self.access.client

    def _before_send(self, request: Any, **_: Any) -> None:
        if request.method not in {"GET", "HEAD"} and not self.may_write():
            raise StoreError("unavailable", "another operator leads now, so this one writes nothing")

    def _call(self, operation: str, key: str, bucket: str | None = None, **arguments: Any) -> Any:
        bucket = bucket or self.config.bucket
        try:
            return getattr(self.client, operation)(Bucket=bucket, Key=key, **arguments)
        except ClientError as error:
            raise refused(f"s3://{bucket}/{key}", error) from error
        except BotoCoreError as error:
            raise _silent(f"s3://{bucket}/{key}", error) from error

    def create_bucket(self) -> None:
        """Create the bucket if it does not exist."""
        try:
            self.client.head_bucket(Bucket=self.config.bucket)
        except ClientError as error:
            if trouble_of(error) != "missing":
                raise refused(f"bucket {self.config.bucket}", error) from error
            try:
                self.client.create_bucket(Bucket=self.config.bucket)
            except ClientError as second:
                raise refused(f"bucket {self.config.bucket}", second) from second
        except BotoCoreError as error:
            raise _silent(f"bucket {self.config.bucket}", error) from error

    @retried
    def get(self, key: str, bucket: str | None = None, *, most: int = SMALL_OBJECT) -> bytes:
        """Return the bytes of an object of at most `most` bytes.

        Raises StoreError, "large" if the object has more. Its size is checked before its content is read.
        """
        response = self._call("get_object", key, bucket)
        if (size := response["ContentLength"]) > most:
            raise StoreError(
                "large", f"{key} has {size} bytes. This is larger than the {most} bytes that are read of it"
            )
        try:
            return bytes(response["Body"].read())
        except (BotoCoreError, OSError) as error:
            raise StoreError("unavailable", f"{key}: {error}") from error

    @retried
    def head(self, key: str, bucket: str | None = None) -> ObjectInfo:
        """Return the size and the ETag of an object."""
        response = self._call("head_object", key, bucket)
        return ObjectInfo(key=key, size=response["ContentLength"], etag=response["ETag"].strip('"'))

    @retried
    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Write a small object. With `if_absent`, raises StoreError("exists") if the object exists."""
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        self._call("put_object", key, Body=data, ChecksumAlgorithm="SHA256", **condition)

    @retried
    def check_write(self, key: str) -> None:
        """Raise StoreError if `key` may not be written. Nothing is written: an upload in parts is started and
        aborted."""
        upload = self._call("create_multipart_upload", key)["UploadId"]
        self._call("abort_multipart_upload", key, UploadId=upload)

    @retried
    def upload(self, key: str, path: Path) -> None:
        """Write a file of any size, with checksums. A large file is written in parts."""
        try:
            self.client.upload_file(str(path), self.config.bucket, key, ExtraArgs={"ChecksumAlgorithm": "SHA256"})
        except ClientError as error:
            raise refused(key, error) from error
        except Exception as error:  # S3UploadFailedError wraps a ClientError in its message only
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ClientError):
                raise refused(key, cause) from error
            raise StoreError("unavailable", f"{key}: {error}") from error

    def upload_stream(self, key: str, chunks: Iterable[bytes]) -> None:
        """Write an object of any size from a stream of bytes, in parts with checksums.

        If the source raises an error, no object is created. Unfinished earlier uploads to the key are aborted first.
        """
        self._clear_uploads(key)
        upload = self._call("create_multipart_upload", key, ChecksumAlgorithm="SHA256")["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            for number, data in enumerate(_parts(chunks), start=1):
                sent = self._call(
                    "upload_part", key, UploadId=upload, PartNumber=number, Body=data, ChecksumAlgorithm="SHA256"
                )
                kept = {name: sent[name] for name in ("ETag", "ChecksumSHA256") if name in sent}
                parts.append(kept | {"PartNumber": number})
            self._call("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(StoreError):  # the next upload aborts it
                self._call("abort_multipart_upload", key, UploadId=upload)
            raise

    def _clear_uploads(self, key: str) -> None:
        try:
            found = self.client.list_multipart_uploads(Bucket=self.config.bucket, Prefix=key).get("Uploads", [])
        except ClientError as error:
            if trouble_of(error) == "denied":
                return  # a key that may write may lack the right to list uploads; the bucket's own rules remove them
            raise refused(f"uploads to {key}", error) from error
        except BotoCoreError as error:
            raise _silent(f"uploads to {key}", error) from error
        for item in found:
            if item["Key"] == key:
                self._call("abort_multipart_upload", key, UploadId=item["UploadId"])

    @retried
    def copy(self, source: str, key: str, size: int) -> None:
        """Copy an object of `size` bytes within the store. A large object is copied in parts."""
        bucket = self.config.bucket
        if size <= ONE_COPY:  # boto's copy would ask for the size again, and start three thread pools
            self._call("copy_object", key, CopySource={"Bucket": bucket, "Key": source})
            return
        try:
            self.client.copy({"Bucket": bucket, "Key": source}, bucket, key)
        except ClientError as error:
            raise refused(f"copying {source} to s3://{bucket}/{key}", error) from error
        except BotoCoreError as error:
            raise _silent(f"copying {source} to s3://{bucket}/{key}", error) from error

    def chunks(self, key: str, bucket: str | None = None, *, etag: str | None = None) -> Iterator[bytes]:
        """Yield the bytes of an object of any size in chunks. With `etag`, raises StoreError if the object has another."""
        response = self._call("get_object", key, bucket)
        with contextlib.closing(response["Body"]) as body:
            if etag is not None and response["ETag"].strip('"') != etag:
                raise StoreError("unavailable", f"{key} was replaced by another object meanwhile")
            yield from _pieces(key, body, CHUNK)

    def download(
        self,
        item: ObjectInfo,
        path: Path,
        bucket: str | None = None,
        *,
        report: Report = lambda done, total: None,
    ) -> None:
        """Download an object of any size to a file. The file appears when it is complete, never in part.

        STREAMS ranges are downloaded at once. Each range is retried by itself. `report` is called by one thread at a
        time; after a retry its first number, the bytes done, can be smaller than before. Raises StoreError, "missing"
        if the object is no longer the one that `item` describes. Raises OSError for an error of the disk.
        """
        # boto's download_file would restart the whole file after an outage that outlasts botocore's own retries.
        partial = path.with_name(path.name + ".partial")
        stopped, lock, done = threading.Event(), threading.Lock(), 0

        def came(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                report(done, item.size)

        def take(start: int) -> None:
            call, passes = lambda: self._take(item, bucket, partial, start, stopped, came), self.access.passes
            patiently(call, self.patience, stopped.wait, passes)

        pool = ThreadPoolExecutor(STREAMS, "download")
        try:
            partial.write_bytes(b"")
            for part in as_completed([pool.submit(take, start) for start in range(0, item.size, RANGE)]):
                part.result()
            partial.rename(path)
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            partial.unlink(missing_ok=True)

    def _take(
        self,
        item: ObjectInfo,
        bucket: str | None,
        path: Path,
        start: int,
        stopped: threading.Event,
        came: Callable[[int], None],
    ) -> None:
        """Write one range of an object to its place in the file."""
        if stopped.is_set():
            return
        size, done = min(RANGE, item.size - start), 0
        # A small object is requested without a range, so that botocore checks the stored checksum.
        which = {"Range": f"bytes={start}-{start + size - 1}"} if size < item.size else {}
        response = self._call("get_object", item.key, bucket, **which)
        with contextlib.closing(response["Body"]) as body, path.open("r+b") as file:
            if response["ETag"].strip('"') != item.etag:
                raise StoreError("missing", f"{item.key} has been replaced by another object")
            if response["ContentLength"] != size:
                raise StoreError("unavailable", f"{item.key}: got {response['ContentLength']} bytes, expected {size}")
            file.seek(start)
            try:
                for piece in _pieces(item.key, body, PIECE):
                    if stopped.is_set():
                        return
                    file.write(piece)
                    done += len(piece)
                    came(len(piece))
            except StoreError:
                came(-done)
                raise

    def sha256(self, key: str, bucket: str | None = None) -> tuple[str, int]:
        """Return (hex SHA-256, size in bytes) of an object, computed from its content."""
        hasher, size = hashlib.sha256(), 0
        for chunk in self.chunks(key, bucket):
            hasher.update(chunk)
            size += len(chunk)
        return hasher.hexdigest(), size

    def objects(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        """Yield all objects below a prefix. They are listed in pages of 1000."""
        for page in self._pages(bucket or self.config.bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                yield ObjectInfo(key=item["Key"], size=item["Size"], etag=item["ETag"].strip('"'))

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below a prefix that ends in /.

        Raises StoreError, "large" if there are more than MOST_OBJECTS folders and objects.
        """
        found, count = list[str](), 0
        for page in self._pages(self.config.bucket, Prefix=prefix, Delimiter="/"):
            entries = page.get("CommonPrefixes", [])
            found += [entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in entries]
            count += len(entries) + len(page.get("Contents", []))
            if count > MOST_OBJECTS:
                raise StoreError("large", f"there are more than {MOST_OBJECTS} objects below {prefix}")
        return found

    def _pages(self, bucket: str, **query: str) -> Iterator[dict[str, Any]]:
        page = self._page(bucket, query)
        yield page
        while token := page.get("NextContinuationToken"):
            page = self._page(bucket, query | {"ContinuationToken": token})
            yield page

    @retried
    def _page(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        try:
            return dict(self.client.list_objects_v2(Bucket=bucket, **query))
        except ClientError as error:
            raise refused(f"listing s3://{bucket}/{query['Prefix']}", error) from error
        except BotoCoreError as error:
            raise _silent(f"listing s3://{bucket}/{query['Prefix']}", error) from error

    @retried
    def delete(self, key: str) -> None:
        """Delete one object. It is no error if the object does not exist."""
        self._call("delete_object", key)

    def delete_prefix(self, prefix: str, stopped: Callable[[], bool] = lambda: False) -> int:
        """Delete everything below a prefix that ends in /, until `stopped` returns True. Return the number of deleted objects.

        manifest.json is deleted first: without it, a half-deleted version does not count as a version.
        """
        if not prefix.endswith("/") or prefix.count("/") < 2:
            raise ValueError(f"refusing to delete below {prefix!r}")
        # Two passes over the listing: a tenant may have any number of objects, so the keys are not collected.
        manifests = [item.key for item in self.objects(prefix) if item.key.endswith("/manifest.json")]
        for key in manifests:
            self.delete(key)
        count = len(manifests)
        for item in self.objects(prefix):
            if stopped():
                break
            self.delete(item.key)
            count += 1
        return count
