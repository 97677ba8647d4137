"""What a checkpoint is (PURE): its files, when it is complete, to which run it belongs, and which ones are kept.

Each rank writes one safetensors file, whose header holds everything that is not a tensor as JSON, and then a receipt. A
checkpoint is complete if the receipts of all ranks exist and each file has the size in its receipt. So no message has
to announce a complete checkpoint, and an interrupted upload never counts as one. A checkpoint contains no pickle.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graft.artifacts.layout import CHECKPOINTS, checkpoint_prefix
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo
from graft.bounded import Limits, OutOfBounds
from graft.contracts.job import JobFile
from graft.contracts.message import Message, Name, Size, Whole
from graft.contracts.progress import CheckpointRef
from pydantic import Field

from graft_trainer.recipe.resolve import Resolved

if TYPE_CHECKING:
    from torch import Tensor

FILE = re.compile(
    rf"(?P<attempt>[^/]+)/{CHECKPOINTS}step-(?P<step>\d+)(?P<final>-final)?/rank-(?P<rank>\d+)\.(?P<kind>safetensors|json)"
)
OF_RUN = re.compile(rf"[^/]+/{CHECKPOINTS}.+")
# These values may differ between the attempts of a run: they only divide a step, or do not affect the weights.
FREE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "world_size",
    "save_steps",
    "save_total_limit",
)
MOST_RANKS = 10_000  # names of files have four digits for the rank


class Receipt(Message):
    """What one rank wrote. It is stored beside the rank's file, after the upload of that file."""

    limits: ClassVar[Limits] = Limits(4096, depth=3, values=64)

    schema_version: Whole = 1
    step: Whole
    rank: int = Field(ge=0, lt=MOST_RANKS)
    world_size: int = Field(ge=1, le=MOST_RANKS)
    final: bool = False
    of: Name  # identity()
    size: Size
    sha256: Name
    created_at: Name


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in the store."""

    attempt: str
    step: int
    final: bool
    receipts: tuple[Receipt, ...]  # by rank

    @property
    def prefix(self) -> str:
        """The folder of the checkpoint, relative to the run's prefix."""
        return checkpoint_prefix(self.attempt, self.step, final=self.final)

    @property
    def of(self) -> str:
        return self.receipts[0].of

    @property
    def world_size(self) -> int:
        return self.receipts[0].world_size

    @property
    def age(self) -> tuple[int, bool, str]:
        """The sort key, oldest first. It compares steps before times, because two parallel attempts share no clock."""
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
    """Return the digest of everything that must be equal for a resume: base model, recipe, data and examples per step.

    How a step's examples are divided into micro-batches and ranks is not part of it.
    """
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
    """Return the complete checkpoints below the run's prefix `root`, oldest first. `read` returns a receipt's bytes.

    Raises StoreError.
    """
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
            receipt = Receipt.read(read(item))
        except OutOfBounds:
            continue  # written by another version of the trainer
        except StoreError as error:
            if error.trouble not in {"missing", "large"}:
                raise
            continue  # another attempt has deleted it meanwhile, or it is no receipt
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
    """Return the keys to delete: those of checkpoints that are older than the newest `limit` complete ones of the
    identity `of`.

    At least `limit` complete checkpoints remain, even if several attempts call this, or call it late: a complete
    checkpoint is deleted only if `limit` newer ones are complete, and every attempt prefers those. The keys of receipts
    come first, so a checkpoint that is partly deleted is no longer complete.
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
    """Return the keys of all checkpoint files of a run, complete or not, in the order in which to delete them."""
    return _receipts_first(item.key for item in objects if OF_RUN.fullmatch(item.key.removeprefix(root)))


def _receipts_first(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: (not key.endswith(".json"), key))


def pack(value: Any, name: str, tensors: "dict[str, Tensor]") -> Any:
    """Return `value` as JSON and add its tensors to `tensors`, named by their path within the value.

    Raises TypeError for a type that a checkpoint cannot hold.
    """
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
    """Return the value that was given to pack().

    `load` returns the tensor of {"$tensor": name, "device": …, "sharded": …}.
    """
    if isinstance(value, list):
        return [unpack(item, load) for item in value]
    if not isinstance(value, dict):
        return value
    if "$dict" in value:
        return {key: unpack(item, load) for key, item in value["$dict"]}
    if "$tuple" in value:
        return tuple(unpack(item, load) for item in value["$tuple"])
    return load(value)
