"""Checkpoints in the object store: list them, download them, and write new ones in a thread.

An attempt writes only below its own prefix, so two attempts of a run cannot overwrite each other's files. The next
attempt resumes from the checkpoint with the most steps.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graft.artifacts.layout import checkpoint_prefix
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo, S3Store
from graft.artifacts.versions import file_sha256
from graft.contracts.progress import CheckpointRef, Reason
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graft_trainer.checkpoints.checkpoint import (
    Checkpoint,
    Receipt,
    complete,
    data_name,
    pack,
    receipt_name,
    surplus,
    unpack,
)
from graft_trainer.checkpoints.host_copy import HostCopy
from graft_trainer.run.failures import Failure
from graft_trainer.run.progress import now

log = logging.getLogger(__name__)
PEERS = 60.0  # seconds that rank 0 waits for the receipts of the other ranks


class CheckpointStore:
    """The checkpoints of one run, for one rank of one attempt."""

    def __init__(
        self,
        store: S3Store,
        root: str,
        attempt: str,
        of: str,
        folder: Path,
        *,
        upload: Callable[[str, Path], None],
        limit: int,
    ) -> None:
        """`root` is the run's prefix. `of` is the identity that a checkpoint must have. `folder` holds temporary files.

        `upload` uploads a file to a key during training. `limit` is the number of complete checkpoints to keep.
        """
        self.store = store
        self.root = root
        self.attempt = attempt
        self.of = of
        self.folder = folder
        self.upload = upload
        self.limit = limit
        self._receipts: dict[tuple[str, str], bytes] = {}

    def complete(self) -> list[Checkpoint]:
        """Return the complete checkpoints of the run, oldest first. Raises StoreError."""
        return complete(self.store.objects(self.root), self.root, self._read)

    def usable(self, world_size: int) -> list[Checkpoint]:
        """Return the checkpoints that `world_size` ranks can resume from, newest first.

        Log why the others are not used.
        """
        found = []
        for checkpoint in reversed(self.complete()):
            if checkpoint.of != self.of:
                log.warning("checkpoint %s is not used: it belongs to another recipe", checkpoint.prefix)
            elif not checkpoint.final and checkpoint.world_size != world_size:
                log.warning(
                    "checkpoint %s is not used: %d processes wrote it, but now there are %d",
                    checkpoint.prefix,
                    checkpoint.world_size,
                    world_size,
                )
            else:
                found.append(checkpoint)
        return found

    def fetch(self, checkpoint: Checkpoint, rank: int) -> Path | None:
        """Download the file of one rank. Return its path, or None if the file does not match its receipt.

        Raises StoreError. Raises Failure(PeerLost) if the file was deleted: another attempt has newer checkpoints, or
        has published the version.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        receipt = checkpoint.receipts[rank]
        path = self.folder / f"resume-{os.getpid()}-{data_name(rank)}"  # the pod's processes share the folder
        key = self.root + checkpoint.prefix + data_name(rank)
        try:
            self.store.download(self.store.head(key), path)
        except StoreError as error:
            if error.trouble != "missing":
                raise
            raise Failure(
                Reason.PEER_LOST,
                f"Another pod of the run deleted the checkpoint {checkpoint.prefix} while this pod was reading it",
                "No action is needed. The Job resumes from the newest checkpoint that exists.",
            ) from error
        if (path.stat().st_size, file_sha256(path)) == (receipt.size, receipt.sha256):
            return path
        path.unlink()
        log.error("checkpoint %s is not used: %s does not match its receipt", checkpoint.prefix, key)
        return None

    def write(self, path: Path, step: int, rank: int, world_size: int, *, final: bool) -> None:
        """Upload a file and then its receipt. Raises StoreError."""
        prefix = self.root + checkpoint_prefix(self.attempt, step, final=final)
        receipt = Receipt(
            step=step,
            rank=rank,
            world_size=world_size,
            final=final,
            of=self.of,
            size=path.stat().st_size,
            sha256=file_sha256(path),
            created_at=now(),
        )
        self.upload(prefix + data_name(rank), path)
        self.store.put(prefix + receipt_name(rank), receipt.json_text().encode())

    def prune(self) -> list[Checkpoint]:
        """Delete the checkpoints that are older than the newest `limit` complete ones. Return the complete ones that
        remain.

        Raises StoreError.
        """
        objects = list(self.store.objects(self.root))
        whole = complete(objects, self.root, self._read)
        keys = surplus(objects, self.root, whole, self.of, self.limit)
        for key in keys:
            self.store.delete(key)
        gone = {key.rpartition("/")[0] + "/" for key in keys}
        return [checkpoint for checkpoint in whole if self.root + checkpoint.prefix not in gone]

    def wrote(self, step: int, found: list[Checkpoint]) -> bool:
        """Return whether `found` contains this attempt's checkpoint of that step."""
        return any((one.attempt, one.step) == (self.attempt, step) for one in found)

    def _read(self, item: ObjectInfo) -> bytes:
        if (item.key, item.etag) not in self._receipts:
            self._receipts[item.key, item.etag] = self.store.get(item.key, most=Receipt.limits.size)
        return self._receipts[item.key, item.etag]


class CheckpointWriter:
    """Writes checkpoints in a separate thread during training, one at a time.

    Training waits only for the copy to host memory. No checkpoint is taken while another one is being written, so
    memory holds at most one copy. If a checkpoint cannot be written, the error is logged, and the next checkpoint is
    written as usual.
    """

    def __init__(
        self,
        checkpoints: CheckpointStore,
        rank: int,
        world_size: int,
        report: Callable[[list[CheckpointRef]], None],
    ) -> None:
        self.checkpoints = checkpoints
        self.rank = rank
        self.world_size = world_size
        self.report = report  # called in the thread, with the complete checkpoints of the run
        self.error: Exception | None = None  # of the last checkpoint
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, state: dict[str, Any]) -> None:
        """Start to allocate host memory for copies of this state, in the thread."""
        self._begin(self._reserve, _tensors(state)[1])

    def take(self, state: dict[str, Any], step: int, *, final: bool = False, copy: bool = True) -> float:
        """Wait for the previous checkpoint, copy the state, and start to write it. Return the seconds that the copy
        took.

        Set `copy` to False only if the state does not change until it is written. The state's "watch" is JSON that may
        be long. It must not change any more.
        """
        self.wait()
        begin = time.monotonic()
        packed, tensors = _tensors(state)
        copies, rest = self._copy(tensors) if copy else tensors, {"packed": packed, "watch": state["watch"]}
        self._begin(self._write, copies, rest, step, final)
        return time.monotonic() - begin

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # otherwise the thread uses the first GPU and takes memory on it
            work(*arguments)

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _reserve(self, tensors: dict[str, Tensor]) -> None:
        try:
            self._copy.reserve(tensors)
        except Exception as error:
            log.warning("memory for checkpoints could not be allocated before the first one: %s", error)

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, tensors: dict[str, Tensor], rest: dict[str, Any], step: int, final: bool) -> None:
        here, began = self.checkpoints, time.monotonic()
        path = here.folder / data_name(self.rank)
        try:
            here.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"state": json.dumps(rest)})
            size = path.stat().st_size
            here.write(path, step, self.rank, 1 if final else self.world_size, final=final)
            self.error = None
            log.info("checkpoint of step %d: %.1f MB in %.1f s", step, size / 1e6, time.monotonic() - began)
        except Exception as error:
            # Every error is only logged: training must continue even if a checkpoint fails.
            self.error = error
            log.warning(
                "the checkpoint of step %d could not be written, training continues and the next one will be tried: %s",
                step,
                error,
            )
        finally:
            path.unlink(missing_ok=True)
            if final:
                self._copy = HostCopy()  # frees the memory of the copy for the evaluation
        if self.rank == 0 and self.error is None:
            try:
                self._report_and_prune(step)
            except Exception as error:
                log.warning("older checkpoints could not be listed and deleted: %s", error)

    def _report_and_prune(self, step: int) -> None:
        """Wait up to PEERS seconds for the other ranks.

        Report the complete checkpoints, and again after old ones are deleted.
        """
        deadline = time.monotonic() + PEERS
        while not self.checkpoints.wrote(step, found := self.checkpoints.complete()):
            if time.monotonic() > deadline:
                log.warning("the checkpoint of step %d is not complete: not every rank has written its part", step)
                break
            time.sleep(0.2)
        self.report([checkpoint.ref() for checkpoint in found])
        self.report([checkpoint.ref() for checkpoint in self.checkpoints.prune()])


def _tensors(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return a state without its "watch": as JSON, and the tensors that the JSON names."""
    tensors: dict[str, Tensor] = {}
    packed = pack({name: value for name, value in state.items() if name != "watch"}, "state", tensors)
    return packed, tensors


def read_state(path: Path, load: Callable[[Callable[[str], Tensor]], Callable[[dict[str, Any]], Any]]) -> Any:
    """Read the state from a file. `load` makes unpack's callback from the function that reads one tensor."""
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["state"])
        return unpack(rest["packed"], load(file.get_tensor)) | {"watch": rest["watch"]}
