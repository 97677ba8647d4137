"""The dataset's files: from s3://, hf://datasets/, pvc:// or configMap:// to the work folder, with their digest."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from graft.artifacts.layout import split_s3_uri
from graft.artifacts.sources import SourceError, pvc_path
from graft.artifacts.store import CHUNK, S3Store, StoreError
from graft.contracts import Reason

from graft_trainer.failures import Failure
from graft_trainer.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")


def download_dataset(
    uri: str, target: Path, *, role: str, store: S3Store, settings: Settings, hf_endpoint: str | None
) -> str:
    """Copy the file at `uri` to `target`; its sha256:… digest. Failure when it is not there or may not be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scheme = uri.partition("://")[0]
    if scheme == "s3":
        bucket, key = split_s3_uri(uri)
        try:
            return patiently(lambda: _write(store.chunks(key, bucket), target), settings.storage_patience)
        except StoreError as error:
            raise _dataset_failure(error, role, uri) from error
    if scheme == "hf":
        return _write(_chunks(_from_hub(uri, role, settings, hf_endpoint)), target)
    path = _mounted(uri, scheme, role, settings)
    if not path.is_file():
        raise _missing(role, uri, "there is no such file")
    try:
        return _write(_chunks(path), target)
    except PermissionError as error:
        raise _missing(role, uri, f"it may not be read by the pod's user: {error}") from error


def patiently(call: Callable[[], T], patience: float) -> T:
    """`call`, again while the store does not answer, for `patience` seconds. What the last try raised otherwise."""
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            return call()
        except StoreError as error:
            if error.trouble != "unavailable" or time.monotonic() + pause > deadline:
                raise
            log.warning("the store did not answer, trying again in %.0f s: %s", pause, error)
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def split_dataset_uri(uri: str) -> tuple[str, str, str]:
    """(org/name, revision, path) of hf://datasets/org/name[@revision]/path. A revision refs/a/b has three segments."""
    organisation, name, rest = uri.removeprefix("hf://datasets/").split("/", 2)
    name, _, revision = name.partition("@")
    if revision == "refs":
        kind, which, rest = rest.split("/", 2)
        revision = f"refs/{kind}/{which}"
    return f"{organisation}/{name}", revision or "main", rest


def _mounted(uri: str, scheme: str, role: str, settings: Settings) -> Path:
    if scheme == "pvc":
        try:
            return pvc_path(uri, settings.pvc_dir)
        except SourceError as error:
            raise _missing(role, uri, str(error)) from error
    if scheme == "configMap":
        name, _, key = uri.removeprefix("configMap://").partition("/")
        return settings.configmap_dir / name / key
    raise _missing(role, uri, "the scheme is not known")


def _from_hub(uri: str, role: str, settings: Settings, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo, revision, path = split_dataset_uri(uri)
    try:
        return Path(
            hf_hub_download(
                repo,
                path,
                repo_type="dataset",
                revision=revision,
                endpoint=endpoint,
                token=settings.hf_token() or False,
                local_dir=settings.work_dir / "hub" / role,
            )
        )
    except LocalEntryNotFoundError as error:  # the Hub did not answer and there is no copy
        raise _hub_down(role, uri, error) from error
    except EntryNotFoundError as error:
        raise _missing(role, uri, "the repository has no such file at this revision") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status >= 500 or status == 429:
            raise _hub_down(role, uri, error) from error
        raise _missing(role, uri, f"not there, or it needs a token: {error}") from error


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _write(chunks: Iterable[bytes], target: Path) -> str:
    hasher = hashlib.sha256()
    with target.open("wb") as stream:
        for chunk in chunks:
            hasher.update(chunk)
            stream.write(chunk)
    return "sha256:" + hasher.hexdigest()


def _missing(role: str, uri: str, why: str) -> Failure:
    return Failure(
        Reason.DATASET_UNAVAILABLE,
        f"dataset.{role}: {uri} cannot be read: {why}",
        f"Put the file there or correct dataset.{role}.uri, and make sure that the job's namespace may read it.",
    )


def _hub_down(role: str, uri: str, error: Exception) -> Failure:
    return Failure(
        Reason.STORAGE_UNAVAILABLE,
        f"dataset.{role}: {uri}: the Hub did not answer: {error}",
        "Check that the Hugging Face endpoint is reachable from the job's namespace; the Job tries again.",
    )


def _dataset_failure(error: StoreError, role: str, uri: str) -> Exception:
    if error.trouble == "missing":
        return _missing(role, uri, "there is no such object")
    if error.trouble == "denied":
        return _missing(role, uri, f"the key in the Secret graft-storage may not read it ({error})")
    return error
