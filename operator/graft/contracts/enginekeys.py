"""Between operator, gateway and agent: the keys with which gateways and agents call engines (PURE).

Engines learn only the SHA-256 of a key. Every key has 256 random bits, so its SHA-256 is no secret.
An agent makes its own key, which never leaves its pod. The gateways' keys come from the Secret GATEWAY_KEYS in the
operator's namespace. Each of its entries is a root key, from which HMAC makes one key per AdapterDeployment. So an engine
that is taken over learns the key of its own deployment only, and no Secret is needed in tenants' namespaces.
"""

import binascii
import hashlib
import hmac
import secrets
from base64 import b64decode
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

GATEWAY_KEYS = "graft-gateway-keys"  # Secret, in the operator's namespace
SENDS_KEYS = "graft.dev/sends-keys"  # annotation of gateways' pods; gateways of earlier releases lack it
MOST_KEYS = 8
SHORTEST, LONGEST = 32, 1024  # bytes of a root key
DOMAIN = b"graft.dev/gateway-key/v1\n"

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # a SHA-256 in hexadecimal digits


class RootKeysInvalid(ValueError):
    """The Secret's keys are invalid. The message names the entry, never its content."""


def new_key() -> str:
    """Return a new key, of 256 random bits."""
    return secrets.token_urlsafe(32)


def root_keys(data: Mapping[str, str]) -> dict[str, bytes]:
    """Return the root keys of the Secret's `data`, by name. The last by name is the newest. Raises RootKeysInvalid."""
    if not 0 < len(data) <= MOST_KEYS:
        raise RootKeysInvalid(f"the Secret has {len(data)} entries, it must have 1 to {MOST_KEYS}")
    found = {}
    for name, text in sorted(data.items()):
        try:
            key = b64decode(text, validate=True).strip()
        except (binascii.Error, ValueError) as error:
            raise RootKeysInvalid(f"{name} is not valid base64") from error
        if not SHORTEST <= len(key) <= LONGEST:
            raise RootKeysInvalid(f"{name} has {len(key)} bytes, it must have {SHORTEST} to {LONGEST}")
        found[name] = key
    return found


def deployment_key(root: bytes, uid: str) -> str:
    """Return the key of the gateways for the AdapterDeployment with this UID."""
    return hmac.new(root, DOMAIN + uid.encode(), hashlib.sha256).hexdigest()


def fingerprint(key: str) -> str:
    """Return what an engine or a gateway knows of a key: its SHA-256. A client's header may be no valid text."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
