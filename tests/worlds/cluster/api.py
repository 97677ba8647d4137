"""The Kubernetes API for the tests: plain calls over one connection, much faster than one kubectl per call."""

import json
from pathlib import Path
from typing import Any

import urllib3
from graft.kube import KINDS, Kind

Object = dict[str, Any]
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
ALL_KINDS = KINDS | {
    "ReplicaSet": Kind("apps/v1", "replicasets"),
    "CoreEvent": Kind("v1", "events"),
    "StatefulSet": Kind("apps/v1", "statefulsets"),
}


class Refused(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """One identity at one API server."""

    def __init__(self, server: str, pki: Path, token: str | None = None, user: str | None = None) -> None:
        """`user`: the administrator impersonates this user, as `kubectl --as` does."""
        self.server, self.pki = server, pki
        identity = {} if token else {"cert_file": str(pki / "admin.crt"), "key_file": str(pki / "admin.key")}
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._headers |= {"Impersonate-User": user} if user else {}
        self._pool = urllib3.PoolManager(ca_certs=str(pki / "ca.crt"), timeout=30.0, retries=2, **identity)

    def as_token(self, token: str) -> "Api":
        """Return access to the same server with another identity."""
        return Api(self.server, self.pki, token)

    def as_user(self, user: str) -> "Api":
        """Return access to the same server as a person with this name, and no group but system:authenticated."""
        return Api(self.server, self.pki, user=user)

    def text(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> str:
        headers = self._headers | {"Content-Type": content_type}
        data = None if body is None else json.dumps(body).encode()
        answer = self._pool.request(method, self.server + path, body=data, headers=headers)
        text = answer.data.decode()
        if answer.status >= 300:
            try:
                raise Refused(answer.status, json.loads(text).get("message", text))
            except ValueError:
                raise Refused(answer.status, text) from None
        return text

    def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Object:
        return dict(json.loads(self.text(method, path, body, content_type)))

    def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """Return the object, or None if it does not exist."""
        try:
            return self.call("GET", ALL_KINDS[kind].path(namespace, name))
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: str, namespace: str | None = None, labels: str = "") -> list[Object]:
        query = f"?labelSelector={labels}" if labels else ""
        return list(self.call("GET", ALL_KINDS[kind].path(namespace) + query)["items"])

    def create(self, manifest: Object) -> Object:
        """Create an object in the namespace of its metadata."""
        kind = ALL_KINDS[manifest["kind"]]
        return self.call("POST", kind.path(manifest["metadata"].get("namespace")), manifest)

    def apply(self, manifest: Object, manager: str) -> Object:
        """Apply an object with server-side apply."""
        metadata = manifest["metadata"]
        path = ALL_KINDS[manifest["kind"]].path(metadata.get("namespace"), metadata["name"])
        return self.call("PATCH", f"{path}?fieldManager={manager}&force=true", manifest, APPLY)

    def patch(self, kind: str, namespace: str | None, name: str, patch: Object) -> Object:
        return self.call("PATCH", ALL_KINDS[kind].path(namespace, name), patch, MERGE)

    def patch_status(self, kind: str, namespace: str, name: str, status: Object) -> Object:
        path = ALL_KINDS[kind].path(namespace, name, "status")
        return self.call("PATCH", path, {"status": status}, STRATEGIC)

    def delete(self, kind: str, namespace: str | None, name: str) -> None:
        """Delete an object. It is no error if the object does not exist."""
        try:
            self.call("DELETE", ALL_KINDS[kind].path(namespace, name), {"propagationPolicy": "Background"})
        except Refused as error:
            if error.status != 404:
                raise

    def token(self, namespace: str, account: str) -> str:
        """Return a token of a service account."""
        path = ALL_KINDS["ServiceAccount"].path(namespace, account, "token")
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 86400}}
        return str(self.call("POST", path, body)["status"]["token"])
