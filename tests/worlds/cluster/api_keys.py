"""What a user does with API keys in a test: ask for one, and read it."""

import base64
from typing import Any

from graft.contracts.apikeys import API_KEYS_SECRET

from worlds.cluster.tenant import Tenant


def ask_for(tenant: Tenant, name: str, **spec: Any) -> None:
    tenant.api.create(tenant.resource("ApiKey", name, spec))


def key_of(tenant: Tenant, name: str) -> str:
    secret = tenant.get("Secret", API_KEYS_SECRET)
    return base64.b64decode(secret["data"][name]).decode()
