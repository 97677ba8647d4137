"""prepare as its container runs it, against a real S3 server: it checks the key's write access and imports no torch."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.contracts.progress import EXIT_CODES, Reason
from testbed.objectstore import S3Server, s3_server
from testbed.quickstart import MODEL, QUICKSTART
from worlds.buckets import issue
from worlds.trainer import make_job

RUN_FOLDER = "team-a/runs/uid-1/"
CLAIM = RUN_FOLDER + "version.json"
RUN = "from graft_trainer.__main__ import main; code = main(['prepare']); import sys; print('TORCH', bool(sys.modules.get('torch'))); sys.exit(code)"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def root(server: S3Server) -> S3Store:
    """The bucket with a base model and datasets, opened with the root key."""
    store = S3Store(StorageConfig.from_dir(server.secret_dir("graft")))
    store.create_bucket()
    for path in MODEL.iterdir():
        store.upload(f"models/tiny/{path.name}", path)
    for name in ("train", "heldout"):
        store.upload(f"team-a/data/{name}.jsonl", QUICKSTART / f"data/{name}.jsonl")
    return store


@pytest.fixture(scope="module")
def tenant(root: S3Store, server: S3Server) -> StorageConfig:
    return issue(VersityIdentity(root, server.endpoint), "team-a")


def prepared(folder: Path, key: StorageConfig) -> subprocess.CompletedProcess[str]:
    """Run the container's command with this key. Return the finished process."""
    (folder / "storage").mkdir()
    for name, value in {
        "endpoint": key.endpoint, "region": key.region, "bucket": key.bucket, "prefix": key.prefix,
        "access-key-id": key.access_key_id, "secret-access-key": key.secret_access_key,
    }.items():  # fmt: skip
        (folder / "storage" / name).write_text(value)
    data = {
        name: {"uri": f"s3://graft/team-a/data/{file}.jsonl"}
        for name, file in (("train", "train"), ("eval", "heldout"))
    }
    job = make_job(dataset=data, baseModel={"name": "tiny", "uri": "s3://graft/models/tiny"})
    (folder / "job.json").write_text(job.json_text())
    (folder / "work").mkdir()
    paths = {"JOB_FILE": "job.json", "STORAGE_DIR": "storage", "WORK_DIR": "work", "TERMINATION_FILE": "termination"}
    environment = dict(os.environ) | {f"GRAFT_{name}": str(folder / path) for name, path in paths.items()}
    return subprocess.run(
        [sys.executable, "-c", RUN], env=environment | {"POD_NAME": "pod-1"}, capture_output=True, text=True, timeout=90
    )


def test_prepare_works_with_the_tenants_key_and_without_torch(
    tmp_path: Path, root: S3Store, tenant: StorageConfig
) -> None:
    done = prepared(tmp_path, tenant)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TORCH False" in done.stdout
    told = json.loads(root.get("team-a/runs/uid-1/pod-1/progress.json"))["dataset"]
    assert (told["examples"], told["heldOut"], told["truncatedShare"]) == (1088, 92, 0)
    assert told["maxTokens"] < 128
    # The check of the write access leaves no objects and no uploads.
    assert list(root.objects("team-a/adapters/")) == list(root.objects(CLAIM)) == []
    assert not root.client.list_multipart_uploads(Bucket="graft").get("Uploads")


def test_prepare_fails_if_the_key_cannot_write_versions(tmp_path: Path, root: S3Store, tenant: StorageConfig) -> None:
    policy = json.loads(root.client.get_bucket_policy(Bucket="graft")["Policy"])
    denied = {
        "Effect": "Deny", "Principal": {"AWS": [tenant.access_key_id]}, "Action": ["s3:PutObject"],
        "Resource": [f"arn:aws:s3:::graft/{CLAIM}"],
    }  # fmt: skip
    changed = policy | {"Statement": [*policy["Statement"], denied]}
    root.client.put_bucket_policy(Bucket="graft", Policy=json.dumps(changed))
    try:
        with pytest.raises(StoreError) as caught:
            S3Store(tenant).check_write(CLAIM)
        assert caught.value.trouble == "denied"
        done = prepared(tmp_path, tenant)
    finally:
        root.client.put_bucket_policy(Bucket="graft", Policy=json.dumps(policy))
    assert done.returncode == EXIT_CODES[Reason.STORAGE_DENIED], done.stdout + done.stderr
    failure = json.loads((tmp_path / "termination").read_text())
    assert "could not be published" in failure["message"]
    assert RUN_FOLDER in failure["remedy"]
    assert not (tmp_path / "work/dataset").exists()


def test_a_missing_bucket_is_told_from_a_missing_object(root: S3Store, server: S3Server) -> None:
    folder = server.secret_dir("none")
    try:
        with pytest.raises(StoreError) as caught:
            S3Store(StorageConfig.from_dir(folder)).check_write(CLAIM)
    finally:
        shutil.rmtree(folder)
    assert caught.value.trouble == "bucket"
