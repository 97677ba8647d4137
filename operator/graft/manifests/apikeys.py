"""Build the Secret with the API keys of a namespace, and the ConfigMap that tells the gateways of one ApiKey."""

import base64
import hashlib
from collections.abc import Mapping

from graft.api.meta import Resource
from graft.contracts.apikeys import API_KEY_COMPONENT, API_KEYS_SECRET, GRANT_KEY, Grant
from graft.contracts.usage import USAGE_COMPONENT, USAGE_CONFIGMAP
from graft.manifests.metadata import COMPONENT, Manifest, labels
from graft.settings import Settings


def api_keys_secret(namespace: str) -> Manifest:
    """Return the Secret without entries."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": API_KEYS_SECRET,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", COMPONENT: "api-keys"},
        },
    }


def encoded(entries: Mapping[str, str]) -> dict[str, str]:
    """Return entries of a Secret as its `data`."""
    return {name: base64.b64encode(text.encode()).decode() for name, text in entries.items()}


def usage_config_map(settings: Settings) -> Manifest:
    """Return the ConfigMap in which gateways record what keys have used, without its entries."""
    labels = {"app.kubernetes.io/managed-by": "graft", COMPONENT: USAGE_COMPONENT}
    metadata = {"name": USAGE_CONFIGMAP, "namespace": settings.namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def grant_name(key: Resource) -> str:
    """Return a name that is unique over all namespaces and has at most 63 characters.

    The hash is so long that nobody finds a name that overwrites the grant of another namespace.
    """
    full = f"{key.metadata.namespace}/{key.metadata.name}"
    return f"key-{key.metadata.name[:40]}-{hashlib.sha256(full.encode()).hexdigest()[:16]}"


def grant_config_map(key: Resource, grant: Grant, settings: Settings) -> Manifest:
    """Return the ConfigMap, in the operator's namespace. The finalizer of the ApiKey deletes it."""
    place = {"graft.dev/namespace": key.metadata.namespace}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": grant_name(key),
            "namespace": settings.namespace,
            "labels": labels(key, API_KEY_COMPONENT) | place,
        },
        "data": {GRANT_KEY: grant.json_text()},
    }
