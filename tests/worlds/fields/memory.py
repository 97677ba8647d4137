"""The operator's decisions about one resource, on an API server and a store in memory.

Nothing else runs: no kubelet, no controller of Kubernetes. Everything has the same names and UIDs in each world, so that
the children of two worlds can be compared.
"""

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

from graft.api import FineTuneJob
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.store import ObjectInfo
from graft.contracts.mounts import STORAGE_SECRET
from graft.manifests.adapter import ADAPTER_LABEL, adapter
from graft.manifests.metadata import FINALIZER, OWNER_UID
from graft.manifests.scaling import SCALED_AT
from graft.placement.facts import facts_of
from graft.reconcile import apikey
from graft.reconcile.adapter.adapter import reconcile as reconcile_adapter
from graft.reconcile.adapterdeployment.adapterdeployment import reconcile as reconcile_deployment
from graft.reconcile.basemodel import reconcile as reconcile_base_model
from graft.reconcile.finetunejob.finetunejob import reconcile as reconcile_job
from graft.reconcile.shared.access import SECRET_KEYS
from graft.reconcile.shared.admission import admit
from graft.reconcile.shared.context import Context
from graft.reconcile.tenant import reconcile as reconcile_tenant
from graft.settings import Images, Settings

from worlds.fields.hints import DEPLOYMENT, JOB, NAMESPACE, PREFIX
from worlds.fields.schema import CLUSTER_WIDE, KEY, Spec
from worlds.fields.tries import manifest
from worlds.placement import TINY, gpu_node, node
from worlds.reconciling import BUCKET, MemoryKube, MemoryStore, Object, context, publish

SETTINGS = Settings(
    namespace="graft-system",
    images=Images(trainer="t", engine="e", agent="a", vllm="v"),
    prometheus_url="http://prometheus:9090",
    vllm_int4=True,
    tenants_enabled=True,
    huggingface_endpoint="http://127.0.0.1:9",  # nothing answers
    allowed={"priorityClasses": ["*"], "runtimeClasses": ["*"], "tolerations": [{"key": "*"}], "podAnnotations": ["*"]},  # type: ignore[arg-type]
)
THEN = "2026-01-01T00:00:00Z"


async def _reconcile_api_key(ctx: Context, namespace: str, name: str) -> float | None:
    """Reconcile an ApiKey, whose key is the same in all worlds."""
    with mock.patch.object(apikey, "new_api_key", lambda: f"graft_{'k' * 43}"):
        return await apikey.reconcile(ctx, namespace, name)


RECONCILERS = {
    "BaseModel": reconcile_base_model,
    "FineTuneJob": reconcile_job,
    "Adapter": reconcile_adapter,
    "AdapterDeployment": reconcile_deployment,
    "Tenant": reconcile_tenant,
    "ApiKey": _reconcile_api_key,
}
CHILDREN = (
    "Job", "ConfigMap", "Service", "NetworkPolicy", "Deployment", "ServiceAccount", "Role", "RoleBinding",
    "PodDisruptionBudget", "HorizontalPodAutoscaler", "ScaledObject", "Adapter",
)  # fmt: skip
SERVERS = {"managedFields", "creationTimestamp", "uid"}  # metadata that the API server sets
MOST = 12  # reconciles until a resource rests


class Bucket(MemoryStore):
    """A store that can also list."""

    def objects(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        keys = sorted(key for key in self.objects_ if key.startswith(prefix) and bucket in {None, BUCKET})
        return (self.head(key) for key in keys)

    def folders(self, prefix: str) -> list[str]:
        below = {key.removeprefix(prefix) for key in self.objects_ if key.startswith(prefix)}
        return sorted({key.partition("/")[0] for key in below if "/" in key})


class Server(MemoryKube):
    """An API server that merges what several field managers apply, as far as the operator relies on it."""

    def __init__(self, *objects: Object) -> None:
        super().__init__(*objects)
        self.applied: dict[Any, dict[str, Object]] = {}

    async def apply(self, item: Object, manager: str = "graft-operator") -> None:
        """Apply one object with server-side apply."""
        key = self._key(item)
        self.applied.setdefault(key, {})[manager] = copy.deepcopy(item)
        merged: Object = {}
        for part in self.applied[key].values():
            _merge(merged, part)
        spec = merged.get("spec", {})
        if merged["kind"] == "Deployment":
            spec.setdefault("replicas", 1)
        merged["metadata"] |= {"creationTimestamp": THEN, "uid": f"uid-{item['kind']}-{item['metadata']['name']}"}
        merged["metadata"]["managedFields"] = [
            {
                "manager": name,
                "operation": "Apply",
                "fieldsV1": {"f:spec": {f"f:{field}": {} for field in part.get("spec", {})}},
            }
            for name, part in self.applied[key].items()
        ]
        self.objects[key] = merged

    async def ensure(self, *manifests: Object) -> None:
        for item in manifests:
            await self.apply(item)

    async def create(self, item: Object) -> None:
        await self.apply(item)

    async def delete(self, kind: str, namespace: str | None, name: str, *_: Any) -> None:
        self.objects.pop((kind, namespace, name), None)
        self.applied.pop((kind, namespace, name), None)

    async def events_of(self, namespace: str, uid: str) -> list[Object]:
        return []


def _merge(into: Object, other: Object) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


class World:
    """A namespace with two base models, nodes with and without GPUs, three adapters, and the resources under test."""

    def __init__(self) -> None:
        self.store = Bucket()
        self.kube = Server(*_surroundings(self.store))
        self.context = context(self.kube, self.store)
        self.context.settings = SETTINGS
        self.ended = asyncio.Event()  # of a transfer
        self.context.wake = lambda *_: self.ended.set()
        self.context.gateway_roots = {"a.key": b"k" * 32}

    async def set(self, kind: str, spec: Spec, name: str = "one") -> Object:
        """Create a resource, or give it another spec. Reconcile it until it rests. Return it."""
        wanted = manifest(kind, copy.deepcopy(spec), name)
        key = self.kube._key(wanted)
        live = self.kube.objects.setdefault(key, wanted)
        if live is wanted:
            wanted["metadata"] |= {
                "uid": f"uid-{kind}",
                "generation": 1,
                "resourceVersion": "1",
                "creationTimestamp": THEN,
            }
        elif live["spec"] != wanted["spec"]:
            live["spec"] = wanted["spec"]
            live["metadata"]["generation"] += 1
        return await self.rest(kind, key[2])

    async def rest(self, kind: str, name: str) -> Object:
        """Reconcile a resource until nothing changes. Return it."""
        live = self.kube.objects[kind, None if kind in CLUSTER_WIDE else NAMESPACE, name]
        uid = live["metadata"]["uid"]
        for _ in range(MOST):
            before = self._all()
            self.ended.clear()
            pause = await admit(self.context, kind, RECONCILERS[kind], NAMESPACE, name)
            if (transfer := self.context.transfers.find(uid)) is not None and not transfer.done:
                await asyncio.wait_for(self.ended.wait(), 30)
            if pause != 0 and transfer is None and self._all() == before:
                observed = live.get("status", {}).get("observedGeneration")
                assert observed == live["metadata"]["generation"], f"observedGeneration of {kind} {name} is {observed}"
                return live
        raise AssertionError(f"{kind} {name} does not rest after {MOST} reconciles")

    async def use(self) -> Object:
        """Create a job and a deployment that use the BaseModel tiny. Return the job. Both replace earlier ones."""
        for kind, name in [(kind, name) for kind, _, name in self.kube.objects if kind in {"FineTuneJob", *CHILDREN}]:
            if kind != "Adapter":
                await self.kube.delete(kind, NAMESPACE, name)
        await self.set("AdapterDeployment", DEPLOYMENT)
        return await self.set("FineTuneJob", JOB)

    def _all(self) -> str:
        return json.dumps(list(self.kube.objects.values()), sort_keys=True)

    def children(self) -> Object:
        """Return the children of all resources: kind and name -> manifest."""
        found = {}
        for (kind, _, name), item in self.kube.objects.items():
            if kind in CHILDREN and OWNER_UID in item["metadata"].get("labels", {}):
                meta = {key: value for key, value in item["metadata"].items() if key not in SERVERS}
                notes = {key: text for key, text in (meta.pop("annotations", None) or {}).items() if key != SCALED_AT}
                found[f"{kind}/{name}"] = item | {"metadata": meta | ({"annotations": notes} if notes else {})}
        return copy.deepcopy(found)


def told(resource: Object) -> Object:
    """Return the status of a resource without times and signatures."""
    status = copy.deepcopy(resource.get("status", {}))
    for item in status.get("conditions", []):
        del item["lastTransitionTime"], item["observedGeneration"]
    passing = {"observedGeneration", "verifiedAt", "signature", "rotatedAt", "previousUntil"}
    return {key: value for key, value in status.items() if key not in passing}


async def made(kind: str, spec: Spec) -> Object:
    """Return what a fresh resource with a spec leads to: its children, its status, and the children of what uses it."""
    world = World()
    if kind == "Adapter" and "artifact" in spec:
        publish(world.store, PREFIX, "support", "2.0.0")
    live = await world.set(kind, spec, "tiny" if kind == "BaseModel" else "one")
    found: Object = {"status": told(live)}
    if kind == "BaseModel":
        found["job"] = told(await world.use())
    elif kind == "Tenant":
        await world.set("ApiKey", {})
        return found | world.children() | {"job": told(await world.use())}
    elif kind == "Adapter" and "artifact" in spec:
        await world.set("AdapterDeployment", DEPLOYMENT | {"adapters": [f"{spec['adapter']}@^2"]})
    elif kind == "FineTuneJob":
        if "Job/one-preflight" in world.children():  # the run follows
            found |= world.children()
            await world.kube.delete("Job", NAMESPACE, "one-preflight")
            live["status"]["checked"] = True
            await world.rest(kind, "one")
        if version := (live["status"].get("resolved") or {}).get("version"):
            job = FineTuneJob.model_validate(live)
            found["Adapter/published"] = adapter(job, _manifest(job, version), "sha256:" + "0" * 64, BUCKET)
    return found | world.children()


def _manifest(job: FineTuneJob, version: str) -> Manifest:
    base = ManifestBaseModel(name=job.spec.base_model, uri="s3://graft/models/tiny")
    return Manifest.model_construct(  # without files
        adapter=job.spec.output.adapter, version=version, method=job.spec.method.name, base_model=base,
        job=ManifestJob(name="one", namespace=NAMESPACE, uid="uid-FineTuneJob", attempt="a"), recipe="r", hyperparameters={},
        files=[], metrics={}, created_at=THEN,
    )  # fmt: skip


def _surroundings(store: MemoryStore) -> list[Object]:
    facts = facts_of(TINY, None, 4_000_000).wire()
    ready = {"type": "Ready", "status": "True", "reason": "Resolved", "message": "m", "lastTransitionTime": THEN}
    models = [
        {
            "apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel",
            "metadata": {"name": name, "uid": f"uid-{name}", "generation": 1},
            "spec": {"source": f"s3://graft/models/{name}", "version": "1.2.0"},
            "status": {"conditions": [ready | {"observedGeneration": 1}], "facts": facts, "digest": f"sha256:{name}", "sizeBytes": 4_000_000},
        }
        for name in ("tiny", "small")
    ]  # fmt: skip
    for name in ("tiny", "small"):
        store.objects_[f"models/{name}/config.json"] = json.dumps(TINY).encode()
        store.objects_[f"models/{name}/model.safetensors"] = b"weights"
    adapters = []
    for name in ("support", "sales", "tone"):
        prefix = f"{NAMESPACE}/adapters/{name}/1.0.0/"
        digest = publish(store, prefix, name)
        adapters.append({
            "apiVersion": "graft.dev/v1alpha1", "kind": "Adapter",
            "metadata": {
                "name": f"{name}-1.0.0", "namespace": NAMESPACE, "uid": f"uid-{name}", "generation": 1,
                "finalizers": [FINALIZER], "labels": {ADAPTER_LABEL: name}, "creationTimestamp": THEN,
            },
            "spec": {
                "adapter": name, "version": "1.0.0", "baseModel": "tiny", "method": "lora", "deletionPolicy": "Retain",
                "artifact": {"uri": f"s3://graft/{prefix}", "digest": digest},
            },
            "status": {
                "conditions": [ready | {"reason": "Verified", "observedGeneration": 1}], "rank": 8,
                "baseModelDigest": "sha256:tiny", "sizeBytes": 3000, "signature": {"keyId": "k", "value": "v"},
            },
        })  # fmt: skip
    keys = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORAGE_SECRET, "namespace": NAMESPACE}}
    keys["data"] = dict.fromkeys(SECRET_KEYS, "eA==")  # type: ignore[assignment]
    nodes = [node("cpu-1"), gpu_node("gpu-1", "NVIDIA-A100-SXM4-80GB", 81920, gpus=4)]
    nodes = [{"apiVersion": "v1", "kind": "Node"} | item for item in nodes]
    labels = {"zone": "a", "team": "a", KEY: "a"}
    meta = {"name": NAMESPACE, "uid": "uid-namespace", "labels": labels}
    spaces = [{"apiVersion": "v1", "kind": "Namespace", "metadata": meta}]
    return [*models, *adapters, keys, *nodes, *spaces]
