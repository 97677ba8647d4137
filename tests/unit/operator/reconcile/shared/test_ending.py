"""The files of a deleted resource: a deletion that was stopped is not taken for a complete one."""

from collections.abc import Callable

from graft.api import Adapter
from graft.reconcile.shared import ending
from graft.reconcile.shared.context import SOON
from worlds.reconciling import MemoryKube, MemoryStore, adapter, context
from worlds.serving import eventually


class SlowStore(MemoryStore):
    """Deletes until it is stopped, the first time. The second time it deletes all."""

    def __init__(self) -> None:
        super().__init__()
        self.deletions: list[str] = []

    def delete_prefix(self, prefix: str, stopped: Callable[[], bool] = lambda: False) -> int:
        self.deletions.append(prefix)
        while len(self.deletions) == 1 and not stopped():
            pass
        return 0


async def test_a_stopped_deletion_starts_again() -> None:
    store, raw = SlowStore(), adapter("s3://graft/shop/adapters/support/1.0.0/", "sha256:" + "0" * 64)
    ctx, resource = context(MemoryKube(raw), store), Adapter.model_validate(raw)
    uid, prefixes = resource.metadata.uid, ["shop/adapters/support/1.0.0/"]

    def done() -> bool:
        transfer = ctx.transfers.find(uid)
        return transfer is not None and transfer.done

    assert ending.delete(ctx, resource, prefixes) == SOON
    await eventually(lambda: store.deletions)
    assert not ctx.transfers.forget(uid), "it runs, and was asked to stop"
    await eventually(done)
    assert ending.delete(ctx, resource, prefixes) == SOON, "files may be left"
    assert ending.delete(ctx, resource, prefixes) == SOON
    await eventually(done)
    assert ending.delete(ctx, resource, prefixes) is None
    assert store.deletions == prefixes * 2
