"""Base models at their sources: describe a model, identify it by a digest or commit, and download it.

hf:// is read with huggingface_hub and s3:// with the store. pvc:// is a folder that the pod has mounted. Only
safetensors weights and the files that transformers needs beside them are downloaded, never pickles.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from graft.artifacts.layout import SIGNATURE, split_s3_uri
from graft.artifacts.listing import listing
from graft.artifacts.storage import StoreError
from graft.artifacts.store import MOST_OBJECTS, ObjectInfo, Report, S3Store
from graft.bounded import Limits, OutOfBounds, parse_json

CONFIG = "config.json"
# Of config.json and adapter_config.json, from hubs, buckets and claims. The largest known files have about 100 KB.
CONFIG_LIMITS = Limits(size=1024 * 1024, depth=16, values=50_000)
TOKENIZER_LIMITS = Limits(
    size=8 * 1024 * 1024, depth=16, values=300_000
)  # tokenizer_config.json; that of Gemma 3 has 1.2 MB
WEIGHTS = ".safetensors"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
COMMIT = re.compile(r"[0-9a-f]{40}")
MODEL_FILES = (WEIGHTS, ".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm")
DISK_FULL = (ENOSPC, EDQUOT)


class SourceError(Exception):
    """A model cannot be read from its source. `transient`: the source did not answer, and a retry may succeed."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class WeightsError(SourceError):
    """The source has no complete weights in the files that transformers reads."""


@dataclass(frozen=True)
class Description:
    """The model at a source: its identity (digest for s3://, commit for hf://), config.json and size.

    `latest` is the commit to which the revision of an hf:// source refers now, "" if the revision is gone. It differs from
    `revision` if the source has moved on since it was pinned.
    """

    digest: str | None
    revision: str | None
    config: dict[str, Any]
    size_bytes: int | None
    license: str | None = None
    latest: str | None = None


def split_hf_uri(uri: str) -> tuple[str, str]:
    """Return (org/name, revision) of hf://org/name[@revision]. The default revision is main."""
    repo, _, revision = uri.removeprefix("hf://").partition("@")
    return repo, revision or "main"


def split_pvc_uri(uri: str) -> tuple[str, str]:
    """Return (claim, path) of pvc://claim[/path]."""
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path


def pvc_path(uri: str, root: Path) -> Path:
    """Return the folder of pvc://claim/path below `root`, which has the mounts. Raises SourceError if it is outside the
    claim."""
    claim, path = split_pvc_uri(uri)
    base = (root / claim).resolve()
    full = (base / path).resolve()
    if not full.is_relative_to(base):
        raise SourceError(f"the path of {uri} is outside its claim")
    return full


def s3_files(store: S3Store, uri: str) -> tuple[str, str, list[ObjectInfo]]:
    """Return (bucket, prefix, model files) below an s3:// folder.

    Raises SourceError if there is no model, or if the store does not answer.
    """
    bucket, key = split_s3_uri(uri)
    prefix = key.rstrip("/") + "/"
    try:
        # A published version can be the model. Its signature is left out, because it is written later and again for
        # each new key.
        files = [
            item
            for item in listing(store, prefix, bucket)
            if item.key.endswith(MODEL_FILES) and item.key != prefix + SIGNATURE
        ]
    except StoreError as error:
        raise SourceError(str(error), transient=error.trouble == "unavailable") from error
    names = {item.key.removeprefix(prefix) for item in files}
    if CONFIG not in names:
        raise SourceError(f"there is no config.json below {uri}")
    used_files(names, uri)
    return bucket, prefix, files


def used_files(names: Collection[str], where: str) -> set[str]:
    """Return the files of a model that transformers reads (PURE).

    Many folders have the same weights twice, for example Mistral's consolidated.safetensors or the folder `original` beside
    the shards. Raises WeightsError if there are no complete weights in the names that transformers uses.
    """
    weights = {name for name in names if name.endswith(WEIGHTS)}
    rest = set(names) - weights
    if WHOLE in weights:
        return rest - {INDEX} | {WHOLE}  # transformers prefers it; vLLM would look for the shards of the index
    if not weights:
        raise WeightsError(f"{where} has no safetensors weights")
    shards = {name: match for name in weights if (match := SHARD.fullmatch(name))}
    if not shards:
        raise WeightsError(
            f"{where} has no {WHOLE} and no shards such as model-00001-of-00002.safetensors, only {', '.join(sorted(weights)[:3])}. "
            "Save the model with transformers (save_pretrained)"
        )
    if INDEX not in rest:
        raise WeightsError(
            f"{where} has shards but no {INDEX}, which says which shard has which weight. Upload it, or save the model again "
            "with transformers (save_pretrained)"
        )
    total = max(int(match[2]) for match in shards.values())
    found = {int(match[1]) for match in shards.values() if int(match[2]) == total}
    if missing := [number for number in range(1, min(total, len(found) + 4) + 1) if number not in found]:
        first = f"model-{missing[0]:05}-of-{total:05}{WEIGHTS}"
        raise WeightsError(f"{where} lacks {total - len(found)} of {total} shards, the first is {first}")
    return rest | {name for name, match in shards.items() if int(match[2]) == total}


def s3_digest(prefix: str, files: list[ObjectInfo]) -> str:
    """Return sha256:…, computed over the sorted names, sizes and ETags."""
    listing = sorted((item.key.removeprefix(prefix), item.size, item.etag) for item in files)
    return "sha256:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def describe(
    uri: str, store: S3Store | None, hf_endpoint: str | None, hf_token: str | None = None, pinned: str | None = None
) -> Description:
    """Describe the model at an hf:// or s3:// source. Raises SourceError if it cannot be read.

    `pinned` is the commit to which the revision of an hf:// source was resolved before. That commit is described, wherever
    the revision points now.
    """
    if uri.startswith("hf://"):
        return _describe_hf(uri, hf_endpoint, hf_token, pinned)
    if store is None:
        raise SourceError("no object store is configured")
    bucket, prefix, files = s3_files(store, uri)
    try:
        data = store.get(prefix + CONFIG, bucket, most=CONFIG_LIMITS.size)
    except StoreError as error:
        raise SourceError(str(error), transient=error.trouble == "unavailable") from error
    used = used_files({item.key.removeprefix(prefix) for item in files}, uri)
    size = sum(item.size for item in files if item.key.removeprefix(prefix) in used)
    return Description(s3_digest(prefix, files), None, read_config(data, uri), size)


def read_config(data: bytes, uri: str) -> dict[str, Any]:
    """Return the object in the config.json of a model. Raises SourceError if it exceeds CONFIG_LIMITS or is no object."""
    try:
        config = parse_json(data, CONFIG_LIMITS, f"{CONFIG} of {uri}", constants=True)
    except OutOfBounds as error:
        raise SourceError(str(error)) from error
    if not isinstance(config, dict):
        raise SourceError(f"{CONFIG} of {uri} is not a JSON object")
    return config


@contextlib.contextmanager
def hub_errors(uri: str) -> Iterator[None]:
    """Convert the hub's errors to SourceError, transient if a retry may succeed. A full disk stays an OSError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    from graft.artifacts.hub import AnswerTooLarge

    try:
        yield
    except AnswerTooLarge as error:
        raise SourceError(f"{uri}: {error}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SourceError(f"{uri} does not exist, or needs a token: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        raise SourceError(f"{uri}: {error}", transient=status >= 500 or status == 429) from error
    except (OSError, HTTPError) as error:  # HTTPError is of the underlying HTTP library: there was no answer
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise SourceError(f"{uri}: {error}", transient=True) from error


def _describe_hf(uri: str, endpoint: str | None, token: str | None, pinned: str | None) -> Description:
    from huggingface_hub.errors import RevisionNotFoundError

    from graft.artifacts.hub import HfApi

    repo, revision = split_hf_uri(uri)
    api = HfApi(endpoint=endpoint, token=token or False)
    with hub_errors(uri):
        info = api.model_info(repo, revision=pinned or revision, files_metadata=True, timeout=20)
        latest = info.sha
        if pinned and not COMMIT.fullmatch(revision):
            try:
                latest = api.model_info(repo, revision=revision, timeout=20).sha
            except RevisionNotFoundError:
                latest = ""
        siblings = {file.rfilename: file.size for file in info.siblings or [] if file.rfilename.endswith(MODEL_FILES)}
        if len(siblings) > MOST_OBJECTS:
            raise SourceError(f"{uri} has more than {MOST_OBJECTS} files")
        used = used_files(siblings.keys(), uri)
        if CONFIG not in siblings:
            raise SourceError(f"{uri} has no {CONFIG}")
        path = download_config(repo, CONFIG, info.sha, siblings[CONFIG], endpoint=endpoint, token=token or False)
        config = read_config(path.read_bytes(), uri)
    license_tag = next((tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), None)
    size_bytes = sum(size or 0 for name, size in siblings.items() if name in used)
    return Description(None, info.sha, config, size_bytes, license_tag, latest)


def download_config(
    repo: str, name: str, revision: str | None, size: int | None, *, endpoint: str | None, **how: Any
) -> Path:
    """Download a config of a hub's repository, within `hub_errors`. Return its path.

    `size` is its size in the hub's listing, None if the listing has none. Raises SourceError if the file has more bytes
    than CONFIG_LIMITS allow. Its author may write any file.
    """
    from graft.artifacts.hub import hf_hub_download

    place = {"repo_id": repo, "filename": name, "revision": revision, "endpoint": endpoint, **how}
    check_config_size(hf_hub_download(**place, dry_run=True).file_size if size is None else size, name, repo)
    path = Path(hf_hub_download(**place))
    check_config_size(path.stat().st_size, name, repo)  # the hub may send another file than it lists
    return path


def check_config_size(size: int | None, name: str, where: str) -> None:
    """Raise SourceError if a config has more bytes than CONFIG_LIMITS allow, or if its size is unknown (None)."""
    if size is None or size > CONFIG_LIMITS.size:
        known = "a size that the hub does not give" if size is None else f"{size} bytes"
        raise SourceError(f"{name} of {where} has {known}, but it may have at most {CONFIG_LIMITS.size} bytes")


def fetch(
    uri: str,
    digest: str | None,
    target: Path,
    *,
    store: S3Store | None,
    pvc_root: Path,
    hf_endpoint: str | None = None,
    hf_token: str | None = None,
    report: Report = lambda done, total: None,
    weights: bool = True,
) -> Path:
    """Return a local folder with the model's files: `target`, or the mounted claim itself for pvc://.

    Without `weights` the weights are not downloaded; they must only exist at the source. For s3:// the listing must
    still have the digest that the BaseModel was resolved to. Raises SourceError otherwise, and OSError (DISK_FULL) if
    the disk is full.
    """
    if uri.startswith("pvc://"):
        folder = pvc_path(uri, pvc_root)
        if not (folder / "config.json").is_file():
            raise SourceError(f"there is no config.json at {uri}")
        return folder
    target.mkdir(parents=True, exist_ok=True)
    if uri.startswith("hf://"):
        return _fetch_hf(uri, target, hf_endpoint, hf_token, weights)
    if store is None:
        raise SourceError("no object store is configured")
    bucket, prefix, files = s3_files(store, uri)
    actual = s3_digest(prefix, files)
    if digest is not None and actual != digest:
        raise SourceError(
            f"the files below {uri} changed since the BaseModel was resolved: {actual}, expected {digest}"
        )
    used = used_files({item.key.removeprefix(prefix) for item in files}, uri)
    files = [
        item for item in files if item.key.removeprefix(prefix) in used and (weights or not item.key.endswith(WEIGHTS))
    ]
    paths = {item: _place(item, prefix, target) for item in files}
    left = [item for item in files if not (paths[item].exists() and paths[item].stat().st_size == item.size)]
    total, to_come = sum(item.size for item in files), sum(item.size for item in left)
    if to_come > (free := shutil.disk_usage(target).free):
        room = f"{to_come / 1e9:.2f} GB of {uri} must be downloaded, but only {free / 1e9:.2f} GB are free"
        raise OSError(ENOSPC, room, str(target))
    done = total - to_come
    try:
        for item in left:
            store.download(
                item,
                paths[item],
                bucket,
                report=lambda came, _: report(done + came, total),  # noqa: B023 - called before the next item
            )
            done += item.size
    except StoreError as error:
        raise SourceError(str(error), transient=error.trouble == "unavailable") from error
    return target


def _place(item: ObjectInfo, prefix: str, target: Path) -> Path:
    path = target / item.key.removeprefix(prefix)
    if not path.resolve().is_relative_to(target.resolve()):
        raise SourceError(f"the path of {item.key} is outside its folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _fetch_hf(uri: str, target: Path, endpoint: str | None, token: str | None, weights: bool) -> Path:
    from graft.artifacts.hub import HfApi, snapshot_download

    repo, revision = split_hf_uri(uri)
    with hub_errors(uri):
        api = HfApi(endpoint=endpoint, token=token or False)
        info = api.model_info(repo, revision=revision, timeout=20)
        names = {file.rfilename for file in info.siblings or [] if file.rfilename.endswith(MODEL_FILES)}
        used = [name for name in used_files(names, uri) if weights or not name.endswith(WEIGHTS)]
        return Path(
            snapshot_download(
                repo,
                revision=info.sha,
                local_dir=target,
                endpoint=endpoint,
                token=token or False,
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in sorted(used)],
            )
        )
