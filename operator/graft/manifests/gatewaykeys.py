"""Build the Secret with the root keys of the gateways."""

import base64
from collections.abc import Mapping

from graft.contracts.enginekeys import GATEWAY_KEYS
from graft.manifests.metadata import COMPONENT, Manifest
from graft.settings import Settings


def gateway_keys_secret(settings: Settings, keys: Mapping[str, bytes]) -> Manifest:
    """Return the Secret. `keys`: the root keys by name. The last by name is the newest."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": GATEWAY_KEYS,
            "namespace": settings.namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", COMPONENT: "gateway-keys"},
        },
        "data": {name: base64.b64encode(key).decode() for name, key in keys.items()},
    }
