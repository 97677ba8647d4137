"""Every failure has a reason, a message and a remedy, and fits into a termination message."""

import errno
import json
from pathlib import Path

import pytest
from graft.artifacts.sources import SourceError, WeightsError
from graft.artifacts.storage import StoreError
from graft.contracts.progress import EXIT_CODES, FATAL_EXIT_CODES, FREE_EXIT_CODES, Reason
from graft_trainer.run.failures import (
    TERMINATION_LIMIT,
    Failure,
    Interrupted,
    explain,
    store_failure,
    termination_bytes,
    write_termination,
)


class OutOfMemoryError(RuntimeError):
    """Stands for torch's error of this name."""


class DistError(RuntimeError):
    """Stands for the base class of the errors of torch.distributed."""


class DistBackendError(DistError):
    """Stands for the errors of NCCL."""


class DistStoreError(DistError):
    """Stands for the errors of the store through which the ranks meet."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Failure(Reason.DATASET_INVALID, "m", "Do this."), Reason.DATASET_INVALID),
        (Interrupted(), Reason.INTERRUPTED),
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Reason.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Reason.OUT_OF_MEMORY),
        (StoreError("denied", "403"), Reason.STORAGE_DENIED),
        (StoreError("missing", "NoSuchKey"), Reason.STORAGE_DENIED),
        (StoreError("bucket", "NoSuchBucket"), Reason.STORAGE_DENIED),
        (StoreError("full", "507"), Reason.UPLOAD_FAILED),
        (StoreError("exists", "412"), Reason.VERSION_EXISTS),
        (StoreError("unavailable", "refused"), Reason.STORAGE_UNAVAILABLE),
        (SourceError("gone"), Reason.BASE_MODEL_UNAVAILABLE),
        (WeightsError("s3://b/m has no safetensors weights"), Reason.BASE_MODEL_INVALID),
        (SourceError("503", transient=True), Reason.STORAGE_UNAVAILABLE),
        (OSError(errno.ENOSPC, "No space left on device"), Reason.CONFIGURATION_INVALID),
        (KeyError("x"), Reason.INTERNAL_ERROR),
        (DistBackendError("NCCL error: unhandled cuda error, Failed to CUDA calloc"), Reason.COMMUNICATION_FAILED),
        (RuntimeError("shapes do not match"), Reason.INTERNAL_ERROR),
    ],
)
def test_each_failure_has_its_reason_and_a_remedy(error: BaseException, reason: Reason) -> None:
    failure = explain(error)
    assert failure.reason == reason
    assert failure.message
    assert failure.remedy.endswith(".")
    assert reason in EXIT_CODES


CLOSED = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]")
EXITED = DistBackendError("NCCL error: remote process exited or there was a network error, NCCL version 2.29")
NO_INTERFACE = DistBackendError("NCCL error: Bootstrap : no socket interface found")
SILENT = DistStoreError("wait timeout after 300000ms, keys: /group/0")
SLOW = RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 300000ms for recv")


@pytest.mark.parametrize(
    ("error", "trained", "follows", "reason"),
    [
        # A connection that closes during training means that a rank ended. Before training it may be the network.
        (CLOSED, True, False, Reason.PEER_LOST),
        (EXITED, True, False, Reason.PEER_LOST),
        (CLOSED, False, False, Reason.COMMUNICATION_FAILED),
        (EXITED, False, False, Reason.COMMUNICATION_FAILED),
        # These errors can happen although no other rank has ended.
        (NO_INTERFACE, False, False, Reason.COMMUNICATION_FAILED),
        (NO_INTERFACE, True, False, Reason.COMMUNICATION_FAILED),
        (SILENT, False, False, Reason.COMMUNICATION_FAILED),
        (SILENT, True, False, Reason.COMMUNICATION_FAILED),
        (SLOW, True, False, Reason.COMMUNICATION_FAILED),
        # Another rank has announced its end: the reason of the run is that rank's reason.
        (CLOSED, False, True, Reason.PEER_LOST),
        (SILENT, True, True, Reason.PEER_LOST),
        # An error that has no relation to other ranks is this rank's own.
        (MemoryError(), True, True, Reason.OUT_OF_MEMORY),
    ],
)
def test_peer_lost_is_reported_only_if_a_peer_has_ended(
    error: BaseException, trained: bool, follows: bool, reason: Reason
) -> None:
    failure = explain(error, trained=trained, follows=follows)
    assert failure.reason == reason
    assert (EXIT_CODES[reason] in FREE_EXIT_CODES) == (reason == Reason.PEER_LOST)
    assert EXIT_CODES[reason] not in FATAL_EXIT_CODES or reason == Reason.OUT_OF_MEMORY


def test_a_communication_failure_lists_what_to_check() -> None:
    failure = explain(NO_INTERFACE)
    assert "no socket interface found" in failure.message
    assert all(word in failure.remedy for word in ("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "memlock", "driver"))


def test_out_of_memory_after_the_last_step_does_not_advise_other_training_settings() -> None:
    known = {"perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 2, "maxLength": 512}
    failure = explain(MemoryError(), known)
    assert failure.reason == Reason.OUT_OF_MEMORY
    assert failure.message.startswith("Memory ran out after the last step")
    assert "evaluation.maxNewTokens" in failure.remedy and "training." not in failure.remedy


def test_out_of_memory_in_training_halves_the_micro_batch_unless_it_is_one_example() -> None:
    known = {"perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 2, "maxLength": 512}
    exceeded = explain(MemoryError(), known, training=True)
    assert exceeded.reason == Reason.MEMORY_EXCEEDED
    assert "8 examples per micro-batch" in exceeded.message
    smallest = explain(MemoryError(), known | {"perDeviceTrainBatchSize": 1}, training=True)
    assert smallest.reason == Reason.OUT_OF_MEMORY
    assert "maxLength (it was 512)" in smallest.remedy
    assert explain(MemoryError(), None, training=True).reason == Reason.OUT_OF_MEMORY


def test_a_denied_write_while_publishing_is_upload_failed() -> None:
    assert store_failure(StoreError("denied", "403"), publishing=True).reason == Reason.UPLOAD_FAILED


@pytest.mark.parametrize("character", ["x", "é", '"', "\x00", "🦙", "\udcff"])
def test_the_termination_message_is_valid_json_within_the_limit(character: str) -> None:
    failure = explain(Failure(Reason.DATASET_INVALID, character * 9000, "Do this."))
    data = termination_bytes(failure)
    assert TERMINATION_LIMIT * 0.9 < len(data) <= TERMINATION_LIMIT
    assert json.loads(data)["remedy"] == "Do this."
    assert json.loads(data)["message"].endswith("…")


def test_a_missing_termination_file_does_not_hide_the_failure(tmp_path: Path) -> None:
    write_termination(tmp_path / "no/such/folder", explain(Interrupted()))
