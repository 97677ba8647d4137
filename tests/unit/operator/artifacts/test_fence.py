"""The store of an operator that does not lead: it reads, and refuses what would change something."""

from collections.abc import Callable, Iterator

import pytest
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from testbed.objectstore import S3Server, s3_server

KEY = "adapters/shop/a/1.0.0/manifest.json"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_who_does_not_lead_changes_nothing_in_the_store(server: S3Server) -> None:
    leads = True
    store = S3Store(StorageConfig.from_dir(server.secret_dir("bucket")), may_write=lambda: leads)
    identity = VersityIdentity(store, server.endpoint, "cluster/graft-system", models=None)
    store.create_bucket()
    store.put(KEY, b"{}")
    leads = False
    writes: list[Callable[[], object]] = [
        lambda: store.put(KEY, b"new"),
        lambda: store.copy(KEY, "adapters/shop/a/1.0.0/copy", 2),
        lambda: store.copy(KEY, "adapters/shop/a/1.0.0/copy", 2**30),
        lambda: store.delete(KEY),
        lambda: store.delete_prefix("adapters/shop/"),
        lambda: identity._admin("/create-user", "<Account/>"),
    ]
    for write in writes:
        with pytest.raises(StoreError, match="another operator leads"):
            write()
    identity.users()
    assert store.get(KEY) == b"{}" and store.folders("adapters/") == ["shop"]
