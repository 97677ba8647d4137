"""A separate process uploads checkpoints: its files, its errors and its end. Checkpoints are also downloaded."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft_trainer.checkpoints.store import CheckpointStore
from graft_trainer.run import upload
from graft_trainer.run.upload import NICENESS, upload_apart
from testbed.faults import Fault, faulty_proxy
from testbed.shell import wait_for
from worlds.buckets import empty_bucket


@pytest.fixture(scope="module")
def storage() -> Iterator[StorageConfig]:
    with empty_bucket() as store:
        yield store.config


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A store that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        yield server


def config_of(server: socket.socket) -> StorageConfig:
    port = server.getsockname()[1]
    return StorageConfig(f"http://127.0.0.1:{port}", "us-east-1", "bucket", "", "an-id", "a-secret-key")


def uploads_of(parent: int) -> list[int]:
    """Return the ids of the processes that upload for the process `parent`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            if state(folder)[1] == str(parent) and "graft_trainer.run.upload" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found


def state(folder: Path) -> list[str]:
    """Return the fields of /proc/<id>/stat after the command: the letter of the state, the parent, and more."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def ended(process: int) -> bool:
    try:
        return state(Path(f"/proc/{process}"))[0] == "Z"  # a zombie: its parent may not have waited for it yet
    except OSError:
        return True


def test_a_large_file_arrives_unchanged(storage: StorageConfig, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(os.urandom(1000) * 20_000)  # large enough for an upload in parts
    upload_apart(S3Store(storage), "runs/part", path)
    assert b"".join(S3Store(storage).chunks("runs/part")) == path.read_bytes()


def test_a_checkpoint_is_downloaded_over_a_connection_that_breaks(storage: StorageConfig, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(os.urandom(1000) * 40_000)
    with faulty_proxy(storage.endpoint) as proxy:
        store = S3Store(dataclasses.replace(storage, endpoint=proxy.endpoint), attempts=1, timeout=1, patience=10)
        run = CheckpointStore(store, "shop/runs/1/", "pod-0", "recipe", tmp_path / "back", upload=store.upload, limit=1)
        run.write(path, 4, 0, 1, final=False)
        (checkpoint,) = run.usable(1)
        proxy.inject(Fault("rank-0000.safetensors", times=4, cut_at=2_000_000))
        back = run.fetch(checkpoint, 0)
        assert back is not None and back.read_bytes() == path.read_bytes()


def test_only_large_files_are_uploaded_by_a_separate_process(
    storage: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[str] = []
    monkeypatch.setattr(upload, "upload_apart", lambda store, key, path: apart.append(key))
    for name, size in (("small", upload.LARGE - 1), ("large", upload.LARGE)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        upload.upload_beside(S3Store(storage), f"runs/{name}", tmp_path / name)
    assert apart == ["runs/large"]
    assert S3Store(storage).head("runs/small").size == upload.LARGE - 1


def test_an_error_in_the_upload_process_is_raised_in_the_training_process(
    storage: StorageConfig, tmp_path: Path
) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"x")
    wrong = dataclasses.replace(storage, secret_access_key="not-it")
    with pytest.raises(StoreError, match=r"runs/part: .*SignatureDoesNotMatch") as denied:
        upload_apart(S3Store(wrong), "runs/part", path)
    assert denied.value.trouble == "denied"
    with pytest.raises(StoreError, match="NoSuchBucket") as missing:
        upload_apart(S3Store(dataclasses.replace(storage, bucket="another")), "runs/part", path)
    assert missing.value.trouble == "bucket"


def test_a_killed_upload_process_is_a_failed_upload_and_shows_no_secret(silent: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"x")
    seen: list[str] = []

    def look_and_kill() -> None:
        wait_for(lambda: uploads_of(os.getpid()), 20, "the upload begins")
        (process,) = uploads_of(os.getpid())
        seen.extend(Path(f"/proc/{process}/{name}").read_text() for name in ("cmdline", "environ"))
        os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=look_and_kill)
    thread.start()
    with pytest.raises(StoreError, match="runs/part: the process that uploads it was killed by signal 9") as failed:
        upload_apart(S3Store(config_of(silent)), "runs/part", path)
    thread.join()
    assert failed.value.trouble == "unavailable"
    assert "runs/part" in seen[0] and "PATH" in seen[1] and "a-secret-key" not in "".join(seen)


def test_the_upload_process_ends_with_the_training_process_and_not_before(
    silent: socket.socket, tmp_path: Path
) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"x")
    code = (
        "from pathlib import Path; from graft.artifacts.storage import StorageConfig; from graft.artifacts.store import S3Store; "
        "from graft_trainer.run.upload import upload_apart; "
        f"upload_apart(S3Store(StorageConfig(**{dataclasses.asdict(config_of(silent))!r})), 'runs/part', Path({str(path)!r}))"
    )
    lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)  # the tests may run with a low priority themselves
    training = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: uploads_of(training.pid), 20, "the upload begins")
        (upload,) = uploads_of(training.pid)
        wait_for(
            lambda: os.getpriority(os.PRIO_PROCESS, upload) == lower,
            20,
            "the upload process has lowered its priority",
        )
        os.kill(upload, signal.SIGTERM)  # as if sent to the whole process group
        os.kill(upload, signal.SIGINT)
        silent.accept()
        assert uploads_of(training.pid) == [upload]
    finally:
        training.kill()
        training.wait()
    wait_for(lambda: ended(upload), 10, "the upload process has ended")
