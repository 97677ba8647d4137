"""An empty bucket of a real S3 server."""

import contextlib
from collections.abc import Iterator

from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed.objectstore import s3_server


@contextlib.contextmanager
def empty_bucket() -> Iterator[S3Store]:
    """Run a server during the block. Yield its bucket, opened with the root key."""
    with s3_server() as server:
        store = S3Store(StorageConfig.from_dir(server.secret_dir("bucket")))
        store.create_bucket()
        yield store
