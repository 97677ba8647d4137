"""Decide whether a live object must be applied again (PURE).

Server-side apply removes a field that the last manifest had and the new manifest lacks. This module decides whether to
apply at all. Two questions have to be answered, because a comparison of the fields in the manifest cannot see a removal:
is the live object made from this manifest (a digest in an annotation), and does it still have the values of this
manifest (somebody may have changed them).
"""

import hashlib
import json
from typing import Any

APPLIED = "graft.dev/applied"  # annotation of a child: the digest of the manifest that was applied last
# Lists to which others may add items, with the key of an item. Webhooks add sidecars, volumes and variables, and the
# API server merges these lists by the same keys. Every other list is compared as a whole.
SHARED_LISTS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "ownerReferences": "uid",
}
# What changes in an object without a change of its contents.
VOLATILE = ("managedFields", "resourceVersion", "generation")


def stamped(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the annotation that holds its digest."""
    metadata = manifest["metadata"]
    annotations = (metadata.get("annotations") or {}) | {APPLIED: _digest(manifest)}
    return manifest | {"metadata": metadata | {"annotations": annotations}}


def covers(live: Any, wanted: Any) -> bool:
    """Return whether a live object has every field of a manifest with the same value.

    Fields that the manifest does not name do not count. An empty list or object in the manifest requires that the live
    one is empty or absent. A difference in notation, for example 1000m and 1, counts as a difference.
    """
    if wanted is None:
        return True
    if wanted in ({}, []):
        return not live
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(_covers_field(key, live.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(live, list) and len(live) == len(wanted) and all(map(covers, live, wanted))
    return bool(live == wanted)


def _covers_field(key: str, live: Any, wanted: Any) -> bool:
    shared = SHARED_LISTS.get(key)
    if shared is None or not isinstance(wanted, list):
        return covers(live, wanted)
    found = {item.get(shared): item for item in live or [] if isinstance(item, dict)}
    return all(covers(found.get(item.get(shared)), item) for item in wanted)


def contents(live: dict[str, Any]) -> str:
    """Return a digest of an object without its status and without the metadata that each write changes."""
    metadata = {key: value for key, value in live["metadata"].items() if key not in VOLATILE}
    return _digest({key: value for key, value in live.items() if key != "status"} | {"metadata": metadata})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
