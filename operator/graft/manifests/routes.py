"""Build an AdapterDeployment's part of the gateway's table: a ConfigMap in the operator's namespace."""

import hashlib

from graft.api import AdapterDeployment, Resource
from graft.contracts.gateway import ROUTES_COMPONENT, ROUTES_KEY, Routes
from graft.manifests.metadata import Manifest, labels
from graft.settings import Settings


def routes_name(deployment: Resource) -> str:
    """Return a name that is unique over all namespaces and has at most 63 characters."""
    full = f"{deployment.metadata.namespace}/{deployment.metadata.name}"
    return f"routes-{deployment.metadata.name[:40]}-{hashlib.sha256(full.encode()).hexdigest()[:10]}"


def routes_config_map(deployment: AdapterDeployment, routes: Routes, settings: Settings) -> Manifest:
    """Return the ConfigMap.

    Owner references do not work across namespaces, so the AdapterDeployment's finalizer deletes it.
    """
    return routes_identity(deployment, settings) | {"data": {ROUTES_KEY: routes.json_text()}}


def routes_identity(deployment: AdapterDeployment, settings: Settings) -> Manifest:
    """Return the ConfigMap without its data. The gateway finds it by its labels."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": routes_name(deployment),
            "namespace": settings.namespace,
            "labels": labels(deployment, ROUTES_COMPONENT) | {"graft.dev/namespace": deployment.metadata.namespace},
        },
    }
