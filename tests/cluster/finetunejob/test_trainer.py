"""The trainer's two containers as processes against a real S3 server, and the files that they leave in the bucket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.layout import adapter_prefix, attempt_prefix
from graft.artifacts.sources import describe
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import verify
from graft.contracts.job import JobFile
from graft.contracts.progress import EXIT_CODES, Progress, Reason, Termination
from testbed.objectstore import S3Server, s3_server
from testbed.shell import REPOSITORY
from worlds.buckets import play_operator

pytestmark = pytest.mark.cluster
ROOT = REPOSITORY
MODEL = ROOT / "examples/tiny-llama/model"
DATA = ROOT / "examples/quickstart/data"
BUCKET = "graft"


@dataclass
class World:
    """A bucket with the model and the data of the quickstart."""

    server: S3Server
    store: S3Store
    digest: str


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with s3_server() as server:
        store = S3Store(StorageConfig.from_dir(server.secret_dir(BUCKET)))
        store.client.create_bucket(Bucket=BUCKET)
        for path in MODEL.iterdir():
            store.upload(f"models/tiny-llama/{path.name}", path)
        for path in DATA.glob("*.jsonl"):
            store.upload(f"shop/data/{path.name}", path)
        digest = describe(f"s3://{BUCKET}/models/tiny-llama", store, None).digest
        assert digest is not None
        yield World(server, store, digest)


def job_file(world: World, uid: str, **changes: Any) -> JobFile:
    fields: dict[str, Any] = {
        "job": {"name": "helpdesk", "namespace": "shop", "uid": uid},
        "tenant": "shop",
        "baseModel": {"name": "tiny-llama", "uri": f"s3://{BUCKET}/models/tiny-llama", "digest": world.digest},
        "dataset": {
            "train": {"uri": f"s3://{BUCKET}/shop/data/train.jsonl", "limit": 200},
            "eval": {"uri": f"s3://{BUCKET}/shop/data/heldout.jsonl", "limit": 20},
        },
        "method": {"lora": {}},
        "training": {"maxSteps": 20, "learningRate": 2e-3},
        "evaluation": {"maxSamples": 8, "maxNewTokens": 24},
        "output": {"adapter": "helpdesk", "version": f"{uid}.0.0"},
        "recipe": "sha256:0",
    }
    return JobFile.model_validate(fields | changes)


class Pod:
    """The files and the environment of one attempt."""

    def __init__(self, world: World, root: Path, job: JobFile, attempt: str = "helpdesk-0") -> None:
        self.world, self.job, self.attempt = world, job, attempt
        (root / "work").mkdir()
        (root / "job.json").write_text(job.json_text())
        self.termination_file = root / "termination"
        self.environment = dict(os.environ) | {
            "POD_NAME": attempt,
            "GRAFT_JOB_FILE": str(root / "job.json"),
            "GRAFT_STORAGE_DIR": str(world.server.secret_dir(BUCKET, "shop/")),
            "GRAFT_WORK_DIR": str(root / "work"),
            "GRAFT_TERMINATION_FILE": str(self.termination_file),
            "GRAFT_STORAGE_PATIENCE": "5",
        }

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "graft_trainer", command],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        process = self.start(command)
        output, _ = process.communicate(timeout=300)
        assert self.world.server.secret_key not in output
        return process.returncode, output

    def progress(self) -> Progress | None:
        key = attempt_prefix(self.job.tenant, self.job.job.uid, self.attempt) + "progress.json"
        try:
            return Progress.model_validate_json(self.world.store.get(key))
        except StoreError:
            return None

    def termination(self) -> Termination:
        return Termination.model_validate_json(self.termination_file.read_text())


def test_preflight_checks_the_dataset_and_downloads_no_weights(world: World, tmp_path: Path) -> None:
    pod = Pod(world, tmp_path, job_file(world, "90"), "helpdesk-preflight-0")
    code, output = pod.run("preflight")
    assert code == 0, output
    progress = pod.progress()
    assert progress is not None and progress.dataset is not None
    assert (progress.dataset.examples, progress.dataset.sampled) == (200, False) and progress.dataset.max_tokens > 0
    assert not list((tmp_path / "work").rglob("*.safetensors"))

    (tmp_path / "typo").mkdir()
    typo = job_file(world, "91", dataset={"train": {"uri": f"s3://{BUCKET}/shop/data/no-such.jsonl"}})
    pod = Pod(world, tmp_path / "typo", typo, "helpdesk-preflight-1")
    code, _ = pod.run("preflight")
    assert code == EXIT_CODES[Reason.DATASET_UNAVAILABLE]
    assert "no-such.jsonl" in pod.termination().message


def test_a_run_publishes_a_version_that_the_operator_can_verify(world: World, tmp_path: Path) -> None:
    pod = Pod(world, tmp_path, job_file(world, "1"))
    begin = time.monotonic()
    code, output = pod.run("prepare")
    assert code == 0, output
    print(f"prepare: {time.monotonic() - begin:.1f} s")
    progress = pod.progress()
    assert progress is not None and progress.stage == "Preparing"

    begin = time.monotonic()
    code, output = pod.run("train")
    assert code == 0, output
    print(f"train: {time.monotonic() - begin:.1f} s\n{output}")
    progress = pod.progress()
    assert progress is not None
    assert (progress.stage, progress.step, progress.percent) == ("Succeeded", 20, 100)
    assert list(world.store.objects("shop/adapters/helpdesk/1.0.0/")) == []
    play_operator(world.store, "shop", "1")
    manifest = verify(world.store, adapter_prefix("shop", "helpdesk", "1.0.0"), progress.manifest_digest or "")
    assert manifest.metrics == progress.metrics
    assert manifest.metrics["evalLoss"] < manifest.metrics["base/evalLoss"]
    assert not pod.termination_file.exists()
    left = [item.key for item in world.store.objects("shop/runs/1/") if "/checkpoints/" in item.key]
    assert left == [] == progress.checkpoints

    # If a pod is lost after publishing, the Job's next pod finds the published version and succeeds.
    (tmp_path / "again").mkdir()
    retry = Pod(world, tmp_path / "again", pod.job, "helpdesk-1")
    assert [retry.run("prepare")[0], retry.run("train")[0]] == [0, 0]
    progress = retry.progress()
    assert progress is not None and progress.stage == "Succeeded"
    assert verify(world.store, adapter_prefix("shop", "helpdesk", "1.0.0"), progress.manifest_digest or "") == manifest

    # Another job cannot publish the same version.
    (tmp_path / "other").mkdir()
    other = Pod(world, tmp_path / "other", job_file(world, "2", output=pod.job.output))
    code, output = other.run("prepare")
    assert code == EXIT_CODES[Reason.VERSION_EXISTS], output
    assert "shop/helpdesk" in other.termination().message


def test_an_invalid_dataset_fails_at_once_and_names_the_line(world: World, tmp_path: Path) -> None:
    lines = (DATA / "train.jsonl").read_bytes().splitlines(keepends=True)[:50]
    lines[6] = b'{"messages": [{"role": "user", "content": "Hi"}]}\n'
    world.store.put("shop/data/bad.jsonl", b"".join(lines))
    pod = Pod(world, tmp_path, job_file(world, "3", dataset={"train": {"uri": f"s3://{BUCKET}/shop/data/bad.jsonl"}}))
    code, output = pod.run("prepare")
    assert code == EXIT_CODES[Reason.DATASET_INVALID], output
    failure = pod.termination()
    assert failure.reason == Reason.DATASET_INVALID
    assert "1 of 50 lines is invalid: line 7: the last message is from user" in failure.message
    progress = pod.progress()
    assert progress is not None and progress.stage == "Failed" and progress.failure == failure


def test_a_denied_key_is_reported_before_anything_is_downloaded(world: World, tmp_path: Path) -> None:
    pod = Pod(world, tmp_path, job_file(world, "4"))
    secret = tmp_path / "secret"
    secret.mkdir()
    for path in world.server.secret_dir(BUCKET, "shop/").iterdir():
        (secret / path.name).write_text("wrong-key" if path.name == "secret-access-key" else path.read_text())
    pod.environment["GRAFT_STORAGE_DIR"] = str(secret)
    code, output = pod.run("prepare")
    assert code == EXIT_CODES[Reason.STORAGE_DENIED], output
    assert pod.termination().reason == Reason.STORAGE_DENIED


def test_sigterm_in_training_ends_the_pod_within_seconds(world: World, tmp_path: Path) -> None:
    pod = Pod(world, tmp_path, job_file(world, "5", training={"maxSteps": 100_000}))
    assert pod.run("prepare")[0] == 0
    process = pod.start("train")
    deadline = time.monotonic() + 180
    while (progress := pod.progress()) is None or progress.step == 0:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODES[Reason.INTERRUPTED], output
    assert time.monotonic() - begin < 10
    progress = pod.progress()
    assert progress is not None and progress.stage == "Failed" and progress.step > 0
    assert json.loads(pod.termination_file.read_text())["reason"] == "Interrupted"
