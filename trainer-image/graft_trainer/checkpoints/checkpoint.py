"""What a checkpoint is (PURE): its files, when it is complete, what it is of, and which ones are kept.

Each process writes one file in safetensors, with what is no tensor as JSON in its header, and after it a receipt. A
checkpoint is complete when the receipts of all processes are there and the files are as long as they say, so nobody has to
be told that it is, and one that was cut off is never taken for whole. Nothing in it is a pickle.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graft.artifacts.layout import CHECKPOINTS, checkpoint_prefix
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo
from graft.contracts.job import JobFile
from graft.contracts.message import Message
from graft.contracts.progress import CheckpointRef
from pydantic import ValidationError

from graft_trainer.recipe.resolve import Resolved

if TYPE_CHECKING:
    from torch import Tensor

FILE = re.compile(
    rf"(?P<attempt>[^/]+)/{CHECKPOINTS}step-(?P<step>\d+)(?P<final>-final)?/rank-(?P<rank>\d+)\.(?P<kind>safetensors|json)"
)
OF_RUN = re.compile(rf"[^/]+/{CHECKPOINTS}.+")
# They may differ between the attempts of a run: how a step is divided, and what does not touch the weights.
FREE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "world_size",
    "save_steps",
    "save_total_limit",
)


class Receipt(Message):
    """What one process wrote, put beside its file once that is in the store."""

    schema_version: int = 1
    step: int
    rank: int
    world_size: int
    final: bool = False
    of: str  # identity()
    size: int
    sha256: str
    created_at: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in the store."""

    attempt: str
    step: int
    final: bool
    receipts: tuple[Receipt, ...]  # by rank

    @property
    def prefix(self) -> str:
        """Below the run's prefix."""
        return checkpoint_prefix(self.attempt, self.step, final=self.final)

    @property
    def of(self) -> str:
        return self.receipts[0].of

    @property
    def world_size(self) -> int:
        return self.receipts[0].world_size

    @property
    def age(self) -> tuple[int, bool, str]:
        """Sorts the oldest first: by steps, not by time, for two attempts at once do not share a clock."""
        return self.step, self.final, self.receipts[0].created_at

    def ref(self) -> CheckpointRef:
        return CheckpointRef(
            step=self.step,
            attempt=self.attempt,
            size_bytes=sum(receipt.size for receipt in self.receipts),
            created_at=max(receipt.created_at for receipt in self.receipts),
        )


def data_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def receipt_name(rank: int) -> str:
    return f"rank-{rank:04d}.json"


def identity(job: JobFile, resolved: Resolved, digests: Mapping[str, str], examples: int) -> str:
    """What a checkpoint is of; one of anything else is not gone on from. The examples per step count, and not how they
    are divided into micro-batches and processes."""
    values = {
        "baseModel": [job.base_model.uri, job.base_model.digest],
        "task": job.task,
        "method": job.method.model_dump(mode="json"),
        "resolved": {name: value for name, value in vars(resolved).items() if name not in FREE},
        "effectiveBatch": resolved.per_device_train_batch_size
        * resolved.gradient_accumulation_steps
        * resolved.world_size,
        "datasets": {role: digest for role, digest in digests.items() if role in ("train", "eval")},
        "dataset": job.dataset.model_dump(mode="json"),
        "examples": examples,
    }
    return "sha256:" + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def complete(objects: Iterable[ObjectInfo], root: str, read: Callable[[ObjectInfo], bytes]) -> list[Checkpoint]:
    """The complete checkpoints below the run's prefix `root`, the oldest first; `read` gives a receipt's bytes. StoreError."""
    data: dict[str, int] = {}
    receipts: dict[tuple[str, int, bool], dict[int, Receipt]] = {}
    for item in objects:
        name = item.key.removeprefix(root)
        if (match := FILE.fullmatch(name)) is None:
            continue
        if match["kind"] == "safetensors":
            data[name] = item.size
            continue
        try:
            receipt = Receipt.model_validate_json(read(item))
        except ValidationError:
            continue  # of another version of the trainer
        except StoreError as error:
            if error.trouble != "missing":
                raise
            continue  # another attempt has removed it meanwhile
        of = match["attempt"], int(match["step"]), match["final"] is not None
        receipts.setdefault(of, {})[int(match["rank"])] = receipt
    found = []
    for (attempt, step, final), by_rank in receipts.items():
        world = next(iter(by_rank.values())).world_size
        whole = Checkpoint(attempt, step, final, tuple(by_rank[rank] for rank in sorted(by_rank)))
        sizes = [data.get(whole.prefix + data_name(rank)) for rank in range(world)]
        if sorted(by_rank) == list(range(world)) and sizes == [receipt.size for receipt in whole.receipts]:
            found.append(whole)
    return sorted(found, key=lambda checkpoint: checkpoint.age)


def surplus(objects: Iterable[ObjectInfo], root: str, whole: Iterable[Checkpoint], of: str, limit: int) -> list[str]:
    """Keys that are no longer needed: all of checkpoints with fewer steps than the newest `limit` complete ones of `of`.

    Whoever decides this, and however late, at least `limit` remain: a complete checkpoint goes only where as many newer
    ones are complete, and no attempt would go on from an older one. Receipts come first, so that what is half deleted is
    no longer complete.
    """
    kept = [checkpoint for checkpoint in whole if checkpoint.of == of][-limit:]
    if len(kept) < limit:
        return []
    keys = []
    for item in objects:
        match = FILE.fullmatch(item.key.removeprefix(root))
        if match is not None and int(match["step"]) < kept[0].step:
            keys.append(item.key)
    return _receipts_first(keys)


def all_of_run(objects: Iterable[ObjectInfo], root: str) -> list[str]:
    """Keys of everything that the attempts of a run have written as checkpoints, whole or not, in the order to delete them."""
    return _receipts_first(item.key for item in objects if OF_RUN.fullmatch(item.key.removeprefix(root)))


def _receipts_first(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: (not key.endswith(".json"), key))


def pack(value: Any, name: str, tensors: "dict[str, Tensor]") -> Any:
    """`value` as JSON; its tensors go to `tensors`, named by their place. TypeError for what a checkpoint cannot hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {"$dict": [[key, pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if hasattr(value, "dtype") and hasattr(value, "detach"):
        sharded = hasattr(value, "to_local")
        tensors[name] = value.to_local() if sharded else value
        return {"$tensor": name, "device": value.device.type, "sharded": sharded}
    raise TypeError(f"a checkpoint cannot hold {name}, a {type(value).__name__}")


def unpack(value: Any, load: Callable[[dict[str, Any]], Any]) -> Any:
    """What pack() was given; `load` gives the tensor of {"$tensor": name, "device": …, "sharded": …}."""
    if isinstance(value, list):
        return [unpack(item, load) for item in value]
    if not isinstance(value, dict):
        return value
    if "$dict" in value:
        return {key: unpack(item, load) for key, item in value["$dict"]}
    if "$tuple" in value:
        return tuple(unpack(item, load) for item in value["$tuple"])
    return load(value)
