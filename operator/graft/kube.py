"""The only code that talks to the Kubernetes API: get, list, apply, status, delete, events.

It uses the generic calls of the official async client, with plain dicts. Every call has a timeout. It is retried on
429, 5xx and broken connections, and honours Retry-After. Retries are safe because all calls are idempotent: server-side
apply, and deletes with a UID precondition.
"""

import asyncio
import json
import logging
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from graft import metrics

log = logging.getLogger(__name__)

FIELD_MANAGER = "graft-operator"
TIMEOUT = aiohttp.ClientTimeout(total=20, connect=5)
ATTEMPTS = 5
WATCH_SECONDS = 240  # after which the server ends a watch
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """The API path of a kind."""

    api_version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        scope = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return "/".join(part for part in (f"{root}{scope}/{self.plural}", name, subresource) if part)


KINDS: dict[str, Kind] = {
    "BaseModel": Kind("graft.dev/v1alpha1", "basemodels", namespaced=False),
    "FineTuneJob": Kind("graft.dev/v1alpha1", "finetunejobs"),
    "Adapter": Kind("graft.dev/v1alpha1", "adapters"),
    "AdapterDeployment": Kind("graft.dev/v1alpha1", "adapterdeployments"),
    "Job": Kind("batch/v1", "jobs"),
    "Deployment": Kind("apps/v1", "deployments"),
    "Pod": Kind("v1", "pods"),
    "Service": Kind("v1", "services"),
    "Node": Kind("v1", "nodes", namespaced=False),
    "ConfigMap": Kind("v1", "configmaps"),
    "Secret": Kind("v1", "secrets"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "Namespace": Kind("v1", "namespaces", namespaced=False),
    "Event": Kind("events.k8s.io/v1", "events"),
    "Role": Kind("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": Kind("autoscaling/v2", "horizontalpodautoscalers"),
    "ScaledObject": Kind("keda.sh/v1alpha1", "scaledobjects"),
    "NetworkPolicy": Kind("networking.k8s.io/v1", "networkpolicies"),
}


class KubeError(Exception):
    """A call that failed, with the API server's answer. status is 0 if there was no answer."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Kube:
    """A connection to one API server."""

    def __init__(self, api: Any) -> None:
        self._api = api

    @classmethod
    async def connect(cls) -> "Kube":
        """Connect with the pod's service account, or with KUBECONFIG outside a cluster."""
        configuration = client.Configuration()
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = 64
        return cls(client.ApiClient(configuration))

    async def close(self) -> None:
        await self._api.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, Any] | None = None,
        content_type: str | None = None,
    ) -> Manifest:
        """Send one request, and retry while the server is busy, restarting or unreachable. Raises KubeError with the
        server's answer."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                status, headers, data = await self._once(method, path, body, query, content_type)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failure, wait = KubeError(0, "Unreachable", f"{method} {path}: {error!r}"), None
            else:
                if status < 300:
                    return json.loads(data) if data else {}
                failure = _error(status, data, method, path)
                if status != 429 and status < 500:
                    raise failure
                wait = headers.get("Retry-After")
            if attempt == ATTEMPTS:
                raise failure
            pause = float(wait) if wait and wait.isdigit() else 0.2 * 2**attempt
            await asyncio.sleep(min(pause, 10) * random.uniform(0.5, 1))  # noqa: S311 - jitter
        raise AssertionError("unreachable")

    async def _once(
        self, method: str, path: str, body: Any, query: dict[str, Any] | None, content_type: str | None
    ) -> tuple[int, Any, bytes]:
        headers = {"Accept": "application/json", "Content-Type": content_type or "application/json"}
        parameters = list((query or {}).items())
        serialized = await self._api.param_serialize(
            method, path, query_params=parameters, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        response = await self._api.call_api(*serialized, _request_timeout=TIMEOUT)
        data = await response.read()
        return response.status, response.headers, data

    async def get(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """Return the object, or None if it does not exist."""
        try:
            return await self.request("GET", KINDS[kind].path(namespace, name))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def events_of(self, namespace: str, uid: str) -> list[Manifest]:
        """Return the Events about an object, oldest first."""
        query = {"fieldSelector": f"involvedObject.uid={uid}"}
        items = (await self.request("GET", f"/api/v1/namespaces/{namespace}/events", query=query)).get("items", [])
        return sorted(items, key=lambda item: str(item["metadata"]["creationTimestamp"]))

    async def list(
        self, kind: str, namespace: str | None = None, labels: dict[str, str] | None = None
    ) -> list[Manifest]:
        """Return all objects with these labels. They are read from etcd, not from a cache."""
        query: dict[str, Any] = {"limit": 500}
        if labels:
            query["labelSelector"] = ",".join(f"{key}={value}" for key, value in labels.items())
        items: list[Manifest] = []
        while True:
            page = await self.request("GET", KINDS[kind].path(namespace), query=query)
            items += page.get("items", [])
            token = page.get("metadata", {}).get("continue")
            if not token:
                return items
            query["continue"] = token

    async def watch(self, kind: str, labels: dict[str, str | None]) -> AsyncIterator[Manifest | None]:
        """Yield the changes of all objects with these labels, without end. A label with the value None matches any
        value. The objects are listed first, then watched, and listed again after an error. None is yielded when a watch
        opens or ends without an error, so a caller can tell a silent watch from a broken one."""
        selector = ",".join(key if value is None else f"{key}={value}" for key, value in labels.items())
        pause = 0.5
        while True:
            try:
                page = await self.request("GET", KINDS[kind].path(), query={"labelSelector": selector})
                for item in page.get("items", []):
                    yield {"type": "LISTED", "object": item}
                version = page["metadata"]["resourceVersion"]
                yield None
                async for event in self._stream(KINDS[kind].path(), selector, version):
                    if event is not None and event["type"] == "ERROR":
                        raise KubeError(
                            int(event["object"].get("code", 0)), "Expired", str(event["object"].get("message"))
                        )
                    pause = 0.5
                    yield event
            except (KubeError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                log.info("the watch of %s ended and is opened again: %s", kind, error)
                metrics.WATCH_RESTARTS.labels(kind).inc()
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
                pause = min(pause * 2, 30)

    async def _stream(self, path: str, selector: str, version: str) -> AsyncIterator[Manifest | None]:
        """Yield events after `version`. The server ends a watch after WATCH_SECONDS. It is then opened again at the
        last version that was seen."""
        while True:
            query = {
                "labelSelector": selector,
                "watch": "true",
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": WATCH_SECONDS,
            }
            serialized = await self._api.param_serialize(
                "GET", path, query_params=list(query.items()), header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
            )  # fmt: skip
            timeout = aiohttp.ClientTimeout(total=WATCH_SECONDS + 30, connect=5)
            response = await self._api.call_api(*serialized, _request_timeout=timeout)
            raw = response.response
            async with raw:
                if raw.status != 200:
                    raise _error(raw.status, await raw.read(), "WATCH", path)
                async for line in raw.content:
                    event = json.loads(line)
                    if event["type"] != "ERROR":
                        version = event["object"]["metadata"]["resourceVersion"]
                    yield None if event["type"] == "BOOKMARK" else event
            yield None

    async def apply(self, manifest: Manifest, *, manager: str = FIELD_MANAGER) -> Manifest:
        """Set the fields in the manifest by server-side apply. Other fields stay unchanged."""
        metadata = manifest["metadata"]
        path = KINDS[manifest["kind"]].path(metadata.get("namespace"), metadata["name"])
        return await self.request(
            "PATCH", path, manifest, {"fieldManager": manager, "force": "true"}, "application/apply-patch+yaml"
        )

    async def ensure(self, *manifests: Manifest) -> None:
        """Apply, in order, the manifests that differ from the live object in a field that they name. If nothing
        differs, nothing is written, and the reads run in parallel."""
        live = await asyncio.gather(*(self._live(manifest) for manifest in manifests))
        for manifest, found in zip(manifests, live, strict=True):
            if found is None or not covers(found, manifest):
                await self.apply(manifest)

    async def _live(self, manifest: Manifest) -> Manifest | None:
        metadata = manifest["metadata"]
        return await self.get(manifest["kind"], metadata.get("namespace"), metadata["name"])

    async def create(self, manifest: Manifest) -> None:
        """Create an object whose spec is immutable. If it already exists with the same owner, nothing happens. With
        another owner, KubeError with status 409 is raised."""
        metadata = manifest["metadata"]
        path = KINDS[manifest["kind"]].path(metadata.get("namespace"))
        try:
            await self.request("POST", path, manifest, {"fieldManager": FIELD_MANAGER})
        except KubeError as error:
            if error.status != 409:
                raise
            existing = await self.get(manifest["kind"], metadata.get("namespace"), metadata["name"])
            owners = {item["uid"] for item in (existing or {}).get("metadata", {}).get("ownerReferences", [])}
            if not owners & {item["uid"] for item in metadata.get("ownerReferences", [])}:
                raise

    async def apply_status(
        self, kind: str, api_version: str, namespace: str | None, name: str, uid: str, status: Manifest
    ) -> None:
        """Replace the status fields that this operator owns. A resource that was deleted, or created again with another
        UID, is left unchanged."""
        metadata = {"name": name, "uid": uid} | ({"namespace": namespace} if namespace else {})
        body = {"apiVersion": api_version, "kind": kind, "metadata": metadata, "status": status}
        path = KINDS[kind].path(namespace, name, "status")
        try:
            await self.request(
                "PATCH", path, body, {"fieldManager": FIELD_MANAGER, "force": "true"}, "application/apply-patch+yaml"
            )
        except KubeError as error:
            if error.status not in {404, 409}:
                raise
            log.debug("cannot write the status of %s %s/%s: %s", kind, namespace, name, error)

    async def merge_patch(self, kind: str, namespace: str | None, name: str, patch: Manifest) -> None:
        """Send a JSON merge patch. A missing object (404) is ignored."""
        try:
            await self.request(
                "PATCH", KINDS[kind].path(namespace, name), patch, content_type="application/merge-patch+json"
            )
        except KubeError as error:
            if error.status != 404:
                raise

    async def delete(
        self, kind: str, namespace: str | None, name: str, uid: str | None = None, propagation: str = "Background"
    ) -> None:
        """Delete the object with this UID. If it does not exist, or has another UID, nothing happens."""
        options: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self.request("DELETE", KINDS[kind].path(namespace, name), options)
        except KubeError as error:
            if error.status not in {404, 409}:
                raise

    async def event(self, regarding: Manifest, reason: str, message: str, at: str, *, warning: bool) -> None:
        """Write a Kubernetes Event. If it is refused, for example because the namespace is being deleted, this is only
        logged."""
        metadata = regarding["metadata"]
        namespace = metadata.get("namespace") or "default"
        name = f"{metadata['name'][:200]}.{random.getrandbits(64):016x}"
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": at.replace("Z", ".000000Z"),
            "reportingController": "graft.dev/operator",
            "reportingInstance": os.environ.get("HOSTNAME", "graft-operator")[:128],
            "action": "Reconcile",
            "reason": reason,
            "note": message[:1000],
            "type": "Warning" if warning else "Normal",
            "regarding": {
                "apiVersion": regarding["apiVersion"],
                "kind": regarding["kind"],
                "name": metadata["name"],
                "namespace": metadata.get("namespace"),
                "uid": metadata.get("uid"),
            },
        }
        try:
            await self.request("POST", KINDS["Event"].path(namespace), body)
        except KubeError as error:
            log.warning("cannot write the Event %s for %s: %s", reason, metadata["name"], error)


def covers(live: Any, wanted: Any) -> bool:
    """Return whether a live object has every field of a manifest with the same value. A difference in notation only
    costs one apply without effect."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            covers(live.get(key), value) for key, value in wanted.items() if value not in ({}, [], None)
        )
    if isinstance(wanted, list):
        return isinstance(live, list) and len(live) == len(wanted) and all(map(covers, live, wanted))
    return bool(live == wanted)


def _error(status: int, data: bytes, method: str, path: str) -> KubeError:
    try:
        answer = json.loads(data)
        return KubeError(
            status, str(answer.get("reason", "")), str(answer.get("message", data.decode(errors="replace")))
        )
    except ValueError:
        return KubeError(status, "", f"{method} {path}: {status} {data[:300].decode(errors='replace')}")
