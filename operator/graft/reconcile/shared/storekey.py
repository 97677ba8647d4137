"""The root key of the embedded object store. The operator makes it, so that the chart renders the same without a cluster."""

import base64
import binascii
import logging
import secrets

from graft.kube import Kube, KubeError
from graft.manifests.metadata import COMPONENT, Manifest

log = logging.getLogger(__name__)
ACCESS_KEY, SECRET_KEY = "access-key-id", "secret-access-key"
ROOT = "graft-root"  # the owner of the bucket. It stays the same if the key is made again
EXISTS = 409


def root_key_secret(namespace: str, name: str) -> Manifest:
    """Return the Secret with a new key."""
    data = {ACCESS_KEY: ROOT, SECRET_KEY: secrets.token_urlsafe(30)}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "graft", COMPONENT: "store"},
        },
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }


async def root_key(kube: Kube, namespace: str, name: str) -> dict[str, str]:
    """Return the entries of the Secret, and create it if it does not exist. The store's pod starts after that.

    Raises KubeError, or ValueError if the Secret is incomplete.
    """
    found = await kube.get("Secret", namespace, name)
    if found is None:
        try:
            await kube.create(root_key_secret(namespace, name))
            log.info("created the Secret with the root key of the object store", extra={"secret": name})
        except KubeError as error:
            if error.status != EXISTS:  # another operator was first
                raise
        found = await kube.get("Secret", namespace, name)
    data = (found or {}).get("data") or {}
    try:
        return {key: base64.b64decode(data[key], validate=True).decode() for key in (ACCESS_KEY, SECRET_KEY)}
    except (KeyError, binascii.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"Secret {namespace}/{name} must have the entries {ACCESS_KEY} and {SECRET_KEY}. Delete it, and restart the operator "
            "and the store: the operator creates it again"
        ) from error
