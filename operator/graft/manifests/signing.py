"""Build the Secret with the operator's signing key and the ConfigMap with the public keys that the agents trust."""

import base64

from graft.artifacts.signing import PRIVATE, Keys, published_keys
from graft.contracts.agent import TRUSTED_KEYS
from graft.manifests.metadata import COMPONENT, Manifest
from graft.settings import Settings


def signing_secret(settings: Settings, day: str, pem: bytes) -> Manifest:
    """Return the Secret with a first key.

    The key is named by the day (2026-11-25), so that later keys sort after it.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": settings.signing.secret,
            "namespace": settings.namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", COMPONENT: "signing"},
        },
        "data": {f"{day}{PRIVATE}": base64.b64encode(pem).decode()},
    }


def trusted_keys_config_map(settings: Settings, keys: Keys) -> Manifest:
    """Return the ConfigMap with one entry per key that verifies signatures."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": TRUSTED_KEYS,
            "namespace": settings.namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", COMPONENT: "trusted-keys"},
        },
        "data": published_keys(keys.public),
    }
