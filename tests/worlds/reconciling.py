"""An API server and an object store in memory, to reconcile one resource without either of them."""

import copy
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from graft.api.adapter import Adapter
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestFile, ManifestJob, digest
from graft.artifacts.signing import generate, read_keys
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import ObjectInfo
from graft.kube import KubeError, owned_by
from graft.manifests.adapter import ADAPTER_LABEL
from graft.manifests.metadata import FINALIZER
from graft.reconcile.shared.context import Context
from graft.settings import Images, Settings

BUCKET = "graft"
SETTINGS = Settings(namespace="graft-system", images=Images(trainer="t", engine="e", agent="a"))
Object = dict[str, Any]


class MemoryKube:
    """The objects of an API server. `events` holds the reason and the message of each Event."""

    def __init__(self, *objects: Object) -> None:
        self.objects = {self._key(item): item for item in objects}
        self.events: list[tuple[str, str]] = []

    @staticmethod
    def _key(item: Object) -> tuple[str, str | None, str]:
        return item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return self.objects.get((kind, namespace, name))

    async def list(
        self,
        kind: str,
        namespace: str | None = None,
        labels: dict[str, str] | None = None,
        *,
        owner: str | None = None,
        **_: Any,
    ) -> list[Object]:
        return [
            item
            for (of, where, _), item in self.objects.items()
            if of == kind
            and namespace in {None, where}
            and (labels or {}).items() <= item["metadata"].get("labels", {}).items()
            and (owner is None or owned_by(item, owner))
        ]

    async def ensure(self, *manifests: Object) -> None:
        self.objects |= {self._key(item): item for item in manifests}

    async def create(self, manifest: Object) -> Object:
        made = manifest | {"metadata": manifest["metadata"] | {"resourceVersion": "1"}}
        self.objects[self._key(manifest)] = made
        return made

    async def put(self, *manifests: Object) -> None:
        await self.ensure(*manifests)

    async def apply_status(
        self,
        kind: str,
        api_version: str,
        namespace: str | None,
        name: str,
        uid: str,
        status: Object,
        *,
        resource_version: str,
    ) -> None:
        if resource_version != (self.objects[kind, namespace, name]["metadata"].get("resourceVersion") or ""):
            raise KubeError(409, "Conflict", "the object has been modified")
        self.objects[kind, namespace, name]["status"] = status

    async def merge_patch(self, kind: str, namespace: str | None, name: str, patch: Object) -> Object:
        metadata = self.objects[kind, namespace, name]["metadata"]
        merged = {part: metadata.get(part, {}) | patch["metadata"].pop(part, {}) for part in ("labels", "annotations")}
        metadata.update(patch["metadata"] | merged)
        return self.objects[kind, namespace, name]

    async def event(self, regarding: Object, name: str, reason: str, message: str, at: str, *, warning: bool) -> None:
        self.events.append((reason, message))

    async def count_event(self, regarding: Object, name: str, count: int, at: str) -> None:
        self.events.append(("count", str(count)))


class Killed(BaseException):
    """The operator ends."""


class MortalKube(MemoryKube):
    """`writes` holds every write in order. The operator is killed before the write with the number `killed`, and writes
    nothing until `start`.

    `named`: the Events by name, with the reason or how often it happened.
    """

    def __init__(self, *objects: Object) -> None:
        super().__init__(*objects)
        self.writes: list[str] = []
        self.named: dict[str, Any] = {}
        self.killed: int | None = None

    def _write(self, what: str) -> None:
        if len(self.writes) == self.killed:
            raise Killed
        self.writes.append(what)

    def start(self) -> None:
        """Start the operator again. It is not killed any more."""
        self.killed = None

    async def events_of(self, namespace: str, uid: str) -> list[Object]:
        return []

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return copy.deepcopy(await super().get(kind, namespace, name))  # a reconcile knows only what it has read

    async def put(self, *manifests: Object) -> None:
        for manifest in manifests:
            self._write(f"{manifest['kind']} {manifest['metadata']['name']}")
            await super().ensure(manifest)

    async def create(self, manifest: Object) -> None:
        self._write(f"{manifest['kind']} {manifest['metadata']['name']}")
        manifest["metadata"]["uid"] = f"uid-{manifest['metadata']['name']}"
        await super().create(manifest)

    async def apply_status(self, *arguments: Any, **options: Any) -> None:
        self._write("status")
        await super().apply_status(*arguments, **options)

    async def merge_patch(self, kind: str, namespace: str | None, name: str, patch: Object) -> Object:
        self._write("patch")
        return copy.deepcopy(await super().merge_patch(kind, namespace, name, patch))

    async def event(self, regarding: Object, name: str, reason: str, *_: Any, **__: Any) -> None:
        self._write("event")
        self.named.setdefault(name, reason)

    async def count_event(self, regarding: Object, name: str, count: int, at: str) -> None:
        self._write("count")
        self.named[name] = count


class MemoryStore:
    """The objects of a bucket. `requests` holds every request, `read` the bytes that were sent for each key.

    While `gate` is not set, a read of a large file waits.
    """

    def __init__(self) -> None:
        self.config = StorageConfig("http://s3", "r", BUCKET, "", "root", "secret")
        self.objects_: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.read: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.reading: list[str] = []  # large files that are read now

    def _find(self, what: str, key: str, bucket: str | None) -> bytes:
        self.requests.append((what, f"{bucket or BUCKET}/{key}"))
        if bucket not in {None, BUCKET} or key not in self.objects_:
            raise StoreError("missing", f"{key} does not exist")
        return self.objects_[key]

    def get(self, key: str, bucket: str | None = None, *, most: int = 1 << 23) -> bytes:
        if len(data := self._find("get", key, bucket)) > most:
            raise StoreError("large", f"{key} has {len(data)} bytes")
        return data

    def head(self, key: str, bucket: str | None = None) -> ObjectInfo:
        data = self._find("head", key, bucket)
        return ObjectInfo(key, len(data), hashlib.md5(data).hexdigest())

    def chunks(self, key: str, bucket: str | None = None, *, etag: str | None = None) -> Iterator[bytes]:
        data = self._find("read", key, bucket)
        if etag not in {None, hashlib.md5(data).hexdigest()}:
            raise StoreError("unavailable", f"{key} was replaced")
        self.reading.append(key)
        assert self.gate.wait(30)
        self.reading.remove(key)
        self.read[key] = self.read.get(key, 0) + len(data)
        yield data

    def folders(self, prefix: str) -> list[str]:
        return sorted({key.removeprefix(prefix).split("/")[0] for key in self.objects_ if key.startswith(prefix)})

    def put(self, key: str, data: bytes, **_: Any) -> None:
        self.requests.append(("put", key))
        self.objects_[key] = data

    def copy(self, source: str, key: str, size: int) -> None:
        self.put(key, self._find("copy", source, None))

    def delete(self, key: str) -> None:
        self.requests.append(("delete", key))
        self.objects_.pop(key, None)


def context(kube: MemoryKube, store: MemoryStore) -> Context:
    """The operator's context, with keys to sign with."""
    found = Context(kube, SETTINGS, store, None)  # type: ignore[arg-type]
    found.keys = read_keys({"a.key": generate()})
    return found


def publish(store: MemoryStore, prefix: str, adapter: str = "support", version: str = "1.0.0") -> str:
    """Put the files of a version below a prefix. Return the digest of its manifest."""
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": prefix.encode() * 100}
    listed = [ManifestFile(name=n, size=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in files.items()]
    manifest = Manifest(
        adapter=adapter, version=version, method="lora", base_model=ManifestBaseModel(name="tiny", uri="s3://b/m"),
        job=ManifestJob(name="j", namespace="shop", uid="u", attempt="a"), recipe="r", hyperparameters={}, files=listed,
        metrics={"exactMatch": 0.73}, rank=8, created_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    for name, data in files.items():
        store.objects_[prefix + name] = data
    store.objects_[prefix + "manifest.json"] = manifest.to_bytes()
    return digest(manifest.to_bytes())


def adapter(uri: str, digest: str, namespace: str = "shop", name: str = "support", **status: Any) -> Object:
    """An Adapter with files that somebody has published, as the API server returns it."""
    raw = {
        "apiVersion": "graft.dev/v1alpha1", "kind": "Adapter",
        "metadata": {
            "name": f"{name}-1.0.0", "namespace": namespace, "uid": f"uid-{namespace}-{name}", "generation": 1,
            "finalizers": [FINALIZER], "labels": {ADAPTER_LABEL: name},
        },
        "spec": {
            "adapter": name, "version": "1.0.0", "baseModel": "tiny", "method": "lora", "deletionPolicy": "Delete",
            "artifact": {"uri": uri, "digest": digest},
        },
        "status": status or {},
    }  # fmt: skip
    Adapter.model_validate(raw)
    return raw


def ready(raw: Object) -> Object:
    """The condition Ready, or {}."""
    return next((item for item in raw.get("status", {}).get("conditions", []) if item["type"] == "Ready"), {})
