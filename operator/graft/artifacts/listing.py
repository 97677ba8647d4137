"""Listings that are held in memory. A tenant may have any number of objects below a prefix, so they are bounded."""

from itertools import islice

from graft.artifacts.storage import StoreError
from graft.artifacts.store import MOST_OBJECTS, ObjectInfo, S3Store


def listing(store: S3Store, prefix: str, bucket: str | None = None) -> list[ObjectInfo]:
    """Return all objects below a prefix. Raises StoreError, "large" if there are more than MOST_OBJECTS."""
    found = list(islice(store.objects(prefix, bucket), MOST_OBJECTS + 1))
    if len(found) > MOST_OBJECTS:
        raise StoreError("large", f"there are more than {MOST_OBJECTS} objects below {prefix}")
    return found
