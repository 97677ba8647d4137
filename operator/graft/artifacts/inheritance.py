"""Which namespace the files of a tenant's part of the bucket belong to: a record with the namespace's UID.

A namespace that is made anew has another UID. The record is below adapters/, where only the operator writes. This module
issues no key, and does not know Tenants.
"""

import json

from graft.artifacts.layout import VERSIONS, tenant_prefix
from graft.artifacts.storage import StoreError
from graft.artifacts.store import S3Store
from graft.bounded import Limits, OutOfBounds, parse_json

LIMITS = Limits(size=4096, depth=2, values=16)
UNKNOWN = ""  # the UID in a record that does not exist or cannot be read


def record_key(tenant: str) -> str:
    """Return the key of the record. No adapter has such a name."""
    return f"{tenant_prefix(tenant)}{VERSIONS}.namespace.json"


def take(store: S3Store, tenant: str, uid: str, *, inherit: bool) -> bool:
    """Record that a tenant's part of the bucket belongs to the namespace with this UID. Return whether it does.

    It does not if the part has files that are not recorded as this namespace's. `inherit`: it takes them over. Raises
    StoreError.
    """
    if _recorded(store, tenant) == uid:
        return True
    if not inherit and not is_free(store, tenant, uid):
        return False
    store.put(record_key(tenant), json.dumps({"namespaceUid": uid}).encode())
    return True


def is_free(store: S3Store, tenant: str, uid: str) -> bool:
    """Return whether a tenant's part of the bucket is recorded as that of the namespace with this UID, or has no files."""
    if _recorded(store, tenant) == uid:
        return True
    return all(item.key == record_key(tenant) for item in store.objects(tenant_prefix(tenant)))


def _recorded(store: S3Store, tenant: str) -> str:
    """Return the UID in the record."""
    try:
        found = parse_json(store.get(record_key(tenant), most=LIMITS.size), LIMITS, "the record of the namespace")
    except StoreError as error:
        if error.trouble in {"missing", "large"}:
            return UNKNOWN
        raise
    except OutOfBounds:
        return UNKNOWN
    return str(found.get("namespaceUid") or UNKNOWN) if isinstance(found, dict) else UNKNOWN
