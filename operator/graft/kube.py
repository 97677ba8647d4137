"""The objects of the Kubernetes API: get, list, watch, apply, status, delete, events. connection.py sends the requests.

Every path part is quoted and checked (kinds.py). Each answer is checked for kind, name and namespace before it is used.
Answers are bounded (connection.py). Lists are read page by page, and only the objects that the caller asked for are
held.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from graft import connection
from graft.applied import contents, covers, stamped
from graft.connection import JSON, TIMEOUT, TOO_LARGE, Connection, KubeError
from graft.kinds import (
    KINDS,
    METADATA_LISTS,
    METADATA_ONLY,
    ImpossibleName,
    Kind,
    WrongAnswer,
    check_list,
    check_object,
    path_part,
    selector,
)
from graft.work.together import together

__all__ = ["FIELD_MANAGER", "KINDS", "Kind", "Kube", "KubeError", "Manifest", "controller_of", "owned_by"]

log = logging.getLogger(__name__)
FIELD_MANAGER = "graft-operator"
WATCH_SECONDS = 240  # after which the server ends a watch
PAGE = 200  # objects in one answer
MOST_UNLIKE = 10_000  # objects; each costs about 200 bytes
LARGEST_LIST = 32 * 2**20  # bytes of the objects of one namespace that a list holds
Manifest = dict[str, Any]
Place = tuple[str, str]  # namespace and name


class Page(NamedTuple):
    """A part of a list, the version of the whole list, and the bytes of the part."""

    items: list[Manifest]
    version: str
    size: int


class Kube:
    """The objects of one API server."""

    def __init__(self, api: Any, write_seconds: Callable[[], float] = lambda: TIMEOUT) -> None:
        self._connection = Connection(api, write_seconds)
        # The cache sets both. It takes the answer of each read and write, and `ensure` reads the live objects from it.
        self.answered: Callable[[str, Manifest], None] = lambda kind, answer: None
        self.live: Callable[[str, str | None, str], Awaitable[Manifest | None]] = self.get
        # UID -> contents of a live object that differs from its manifest even after it was applied
        self._unlike: dict[str, str] = {}

    @classmethod
    async def connect(cls, write_seconds: Callable[[], float] = lambda: TIMEOUT, *, most: int = 64) -> "Kube":
        """Connect with the pod's service account, or with KUBECONFIG outside a cluster. `write_seconds`: see Connection.
        `most`: connections at the same time."""
        return cls(await connection.connect(most), write_seconds)

    async def close(self) -> None:
        await self._connection.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: dict[str, Any] | None = None,
        content_type: str = JSON,
    ) -> Manifest:
        """Send one request, and retry while the server is busy, restarting or unreachable. Raises KubeError with the
        server's answer."""
        data = await self._connection.answer(method, path, body, query, content_type=content_type)
        return dict(connection.parse(data))

    async def get(self, kind: str, namespace: str | None, name: str) -> Manifest | None:
        """Return the object, or None if it does not exist. No object has a name that Kubernetes does not allow."""
        try:
            answer = await self.request("GET", KINDS[kind].path(namespace, name))
            check_object(kind, namespace, name, answer)
        except ImpossibleName:
            return None
        except WrongAnswer as error:
            raise KubeError(0, "WrongAnswer", str(error)) from error
        except KubeError as error:
            if error.status == 404:
                return None
            raise
        return self._told(kind, answer)

    async def events_of(self, namespace: str, uid: str) -> list[Manifest]:
        """Return the Events about an object, oldest first."""
        query = {"fieldSelector": f"involvedObject.uid={path_part(uid)}"}
        path = f"/api/v1/namespaces/{path_part(namespace)}/events"
        items = [
            item
            async for page, _ in self._pages(path, query)
            for item in page.get("items") or []
            if (item.get("involvedObject") or {}).get("uid") == uid
        ]
        return sorted(items, key=lambda item: str(item["metadata"]["creationTimestamp"]))

    async def list(
        self,
        kind: str,
        namespace: str | None = None,
        labels: dict[str, str] | None = None,
        *,
        owner: str | None = None,
        metadata_only: bool = False,
    ) -> list[Manifest]:
        """Return all objects with these labels. They are read from etcd, not from a cache.

        With `owner`, only objects that the object with this UID controls are held, because any user can set labels.
        managedFields are left out, and with `metadata_only` everything but the metadata. Raises KubeError if the
        objects of one namespace have more than LARGEST_LIST bytes.
        """
        items: list[Manifest] = []
        held = 0
        async for page in self.pages(kind, namespace, labels or {}, metadata_only=metadata_only):
            kept = [item for item in page.items if owner is None or owned_by(item, owner)]
            items += kept
            held += page.size * len(kept) // max(len(page.items), 1)
            if namespace is not None and held > LARGEST_LIST:
                text = f"the {KINDS[kind].plural} of namespace {namespace} have more than {LARGEST_LIST >> 20} MiB. Delete some"
                raise KubeError(0, TOO_LARGE, text)
        return items

    async def pages(
        self,
        kind: str,
        namespace: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        *,
        only: Place | None = None,
        metadata_only: bool = False,
    ) -> AsyncIterator[Page]:
        """Yield the objects with these labels page by page, all as they were at one version. A label with the value None
        matches any value. `only`: namespace and name of a single object. managedFields are left out.
        """
        path, query = _selected(kind, namespace, labels, only)
        async for page, size in self._pages(path, query, METADATA_LISTS if metadata_only else JSON):
            _check_list(kind, only[0] if only else namespace, page)
            items = [_slim(item) for item in page.get("items") or []]
            yield Page(items, str(page["metadata"].get("resourceVersion", "")), size)

    async def _pages(self, path: str, query: dict[str, Any], accept: str = JSON) -> AsyncIterator[tuple[Manifest, int]]:
        """Yield the pages of a list with their bytes. A page that is too large is asked for again with fewer objects."""
        query = query | {"limit": PAGE}
        while True:
            try:
                data = await self._connection.answer("GET", path, query=query, accept=accept)
            except KubeError as error:
                if error.reason != TOO_LARGE or query["limit"] == 1:
                    raise
                query["limit"] = max(1, query["limit"] // 8)
                continue
            page = connection.parse(data)
            yield page, len(data)
            token = page.get("metadata", {}).get("continue")
            if not token:
                return
            query["continue"] = token

    async def events(
        self,
        kind: str,
        version: str,
        labels: Mapping[str, str | None] | None = None,
        *,
        only: Place | None = None,
        metadata_only: bool = False,
    ) -> AsyncIterator[Manifest]:
        """Yield the events after a version: {"type": ADDED, MODIFIED, DELETED, BOOKMARK or ERROR, "object": ...}. The server
        ends the watch after WATCH_SECONDS. Raises KubeError if it refuses the watch.
        """
        path, query = _selected(kind, None, labels, only)
        accept = METADATA_ONLY if metadata_only else JSON
        query = query | {"resourceVersion": version}
        async for event in self._connection.stream(path, query, WATCH_SECONDS, accept):
            if event["type"] not in {"ERROR", "BOOKMARK"}:
                check_object(kind, only[0] if only else None, None, event["object"])
                _slim(event["object"])
            yield event

    async def apply(self, manifest: Manifest, *, manager: str = FIELD_MANAGER) -> Manifest:
        """Set the fields in the manifest by server-side apply. Other fields stay unchanged."""
        metadata = manifest["metadata"]
        path = KINDS[manifest["kind"]].path(metadata.get("namespace"), metadata["name"])
        query = {"fieldManager": manager, "force": "true"}
        return self._told(
            manifest["kind"], await self.request("PATCH", path, manifest, query, "application/apply-patch+yaml")
        )

    async def ensure(self, *manifests: Manifest) -> None:
        """Make the live objects equal to these manifests, in order. Fields that earlier manifests had are removed.

        Fields of other managers stay. If nothing differs, nothing is written, and the reads run in parallel.
        """
        live = await asyncio.gather(*(self._live(manifest) for manifest in manifests))
        for manifest, found in zip(map(stamped, manifests), live, strict=True):
            if found is None or not self._is_applied(found, manifest):
                answer = await self.apply(manifest)
                if not covers(answer, manifest):
                    if len(self._unlike) >= MOST_UNLIKE:
                        self._unlike.clear()
                    self._unlike[answer["metadata"]["uid"]] = contents(answer)

    async def put(self, *manifests: Manifest) -> None:
        """Apply these manifests, which do not depend on each other, in parallel and without reading the live objects.

        The first error is raised after all writes have ended. `ensure` finds later that nothing differs.
        """
        await together(*(self.apply(stamped(manifest)) for manifest in manifests))

    def _is_applied(self, live: Manifest, manifest: Manifest) -> bool:
        """Return whether applying the manifest, with its digest, would change nothing.

        The API server may write a value in another notation, and a webhook may insist on another value. Such an object
        is applied again only after it has changed.
        """
        if covers(live, manifest):
            return True
        same_manifest = covers(live["metadata"].get("annotations"), manifest["metadata"]["annotations"])
        return same_manifest and self._unlike.get(live["metadata"]["uid"]) == contents(live)

    async def _live(self, manifest: Manifest) -> Manifest | None:
        metadata = manifest["metadata"]
        return await self.live(manifest["kind"], metadata.get("namespace"), metadata["name"])

    def _told(self, kind: str, answer: Manifest) -> Manifest:
        """Pass on what the API server answered about one object."""
        # Who owns spec.replicas of a Deployment is in its managedFields.
        self.answered(kind, answer if kind == "Deployment" else _slim(answer))
        return answer

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object whose spec is immutable. If it already exists with the same owner, it gets the labels again by
        which it is found. With another owner, KubeError with status 409 is raised. Return the object as it is then."""
        metadata = manifest["metadata"]
        path = KINDS[manifest["kind"]].path(metadata.get("namespace"))
        try:
            answer = await self.request("POST", path, manifest, {"fieldManager": FIELD_MANAGER})
            return self._told(manifest["kind"], answer)
        except KubeError as error:
            if error.status != 409:
                raise
            existing = await self.get(manifest["kind"], metadata.get("namespace"), metadata["name"])
            ours = [item["uid"] for item in metadata.get("ownerReferences", [])]
            if existing is None or not any(owned_by(existing, uid) for uid in ours):
                raise
            labels = metadata.get("labels", {})
            if covers(existing["metadata"].get("labels"), labels):
                return existing
            patch = {"metadata": {"uid": existing["metadata"]["uid"], "labels": labels}}
            return (
                await self.merge_patch(manifest["kind"], metadata.get("namespace"), metadata["name"], patch) or existing
            )

    async def apply_status(
        self,
        kind: str,
        api_version: str,
        namespace: str | None,
        name: str,
        uid: str,
        status: Manifest,
        *,
        resource_version: str,
    ) -> None:
        """Replace the status fields that this operator owns.

        Raises KubeError with status 404 or 409 if the resource was deleted, created again with another UID, or changed
        since `resource_version`.
        """
        metadata = {"name": name, "uid": uid, "resourceVersion": resource_version}
        metadata |= {"namespace": namespace} if namespace else {}
        body = {"apiVersion": api_version, "kind": kind, "metadata": metadata, "status": status}
        path = KINDS[kind].path(namespace, name, "status")
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        self._told(kind, await self.request("PATCH", path, body, query, "application/apply-patch+yaml"))

    async def merge_patch(self, kind: str, namespace: str | None, name: str, patch: Manifest) -> Manifest | None:
        """Send a JSON merge patch. Return the object as it is then, or None if it does not exist."""
        try:
            path, query = KINDS[kind].path(namespace, name), {"fieldManager": FIELD_MANAGER}
            answer = await self.request("PATCH", path, patch, query, "application/merge-patch+json")
            return self._told(kind, answer)
        except KubeError as error:
            if error.status != 404:
                raise
            return None

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

    async def event(self, regarding: Manifest, name: str, reason: str, message: str, at: str, *, warning: bool) -> None:
        """Write a Kubernetes Event with this name. If it exists, nothing happens. If it is refused, for example because
        the namespace is being deleted, this is only logged."""
        metadata = regarding["metadata"]
        namespace = metadata.get("namespace") or "default"
        body = {
            # Not events.k8s.io/v1, which refuses lastTimestamp: kubectl describe and --sort-by=.lastTimestamp sort by it.
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": _micro(at),
            "firstTimestamp": at,
            "lastTimestamp": at,
            "source": {"component": "graft.dev/operator"},
            "reportingComponent": "graft.dev/operator",
            "reportingInstance": os.environ.get("HOSTNAME", "graft-operator")[:128],
            "action": "Reconcile",
            "reason": reason,
            "message": message[:1000],
            "type": "Warning" if warning else "Normal",
            "involvedObject": {
                "apiVersion": regarding["apiVersion"],
                "kind": regarding["kind"],
                "name": metadata["name"],
                # The API server refuses an Event outside the namespace of its object. Cluster-wide objects have none.
                "namespace": metadata.get("namespace"),
                "uid": metadata.get("uid"),
            },
        }
        try:
            await self.request("POST", KINDS["Event"].path(namespace), body)
        except KubeError as error:
            if error.status != 409:
                log.warning("cannot write the Event %s for %s: %s", reason, metadata["name"], error)

    async def count_event(self, regarding: Manifest, name: str, count: int, at: str) -> None:
        """Write how often an Event has happened, and when for the last time. Without the Event, nothing happens."""
        namespace = regarding["metadata"].get("namespace") or "default"
        series = {"count": count, "lastObservedTime": _micro(at)}
        patch = {"series": series, "count": count, "lastTimestamp": at}
        try:
            await self.merge_patch("Event", namespace, name, patch)
        except KubeError as error:
            log.warning("cannot count the Event %s: %s", name, error)


def _micro(at: str) -> str:
    """Return a time of whole seconds in the notation of Events (PURE)."""
    return at.replace("Z", ".000000Z")


def controller_of(item: Manifest) -> str | None:
    """Return the UID of the controller in the ownerReferences of an object. Labels alone prove nothing."""
    references = item["metadata"].get("ownerReferences") or []
    return next((str(found["uid"]) for found in references if found.get("controller")), None)


def owned_by(item: Manifest, uid: str) -> bool:
    """Return whether the controller of an object has this UID."""
    return controller_of(item) == uid


def _selected(
    kind: str, namespace: str | None, labels: Mapping[str, str | None] | None, only: Place | None
) -> tuple[str, dict[str, Any]]:
    """Return the path and the query of some objects of a kind (PURE)."""
    query: dict[str, Any] = {"labelSelector": selector(dict(labels))} if labels else {}
    if only is not None:
        query["fieldSelector"] = f"metadata.name={path_part(only[1])}"
    return KINDS[kind].path(only[0] if only is not None else namespace), query


def _check_list(kind: str, namespace: str | None, page: Manifest) -> None:
    try:
        check_list(kind, namespace, page)
    except WrongAnswer as error:
        raise KubeError(0, "WrongAnswer", str(error)) from error


def _slim(item: Manifest) -> Manifest:
    """Return an object of a list without two long lists that Graft does not use: its managedFields, and the images on a
    node.
    """
    item["metadata"].pop("managedFields", None)
    (item.get("status") or {}).pop("images", None)
    return item
