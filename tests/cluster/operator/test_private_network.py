"""A platform behind a proxy, whose store and hub have certificates of a private authority: the operator and a training pod as
whole processes, with what the chart and the operator give their containers.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed.controlplane import control_plane, free_port
from testbed.quickstart import MODEL, QUICKSTART
from testbed.simulated import add_nodes
from worlds.cluster.api import Api, Object
from worlds.cluster.operator_process import ACCOUNT, BUCKET, SYSTEM
from worlds.cluster.tenant import API, BASE, Tenant
from worlds.cluster.tenants import CONFIG, make_namespace
from worlds.networks.private import (
    HUB,
    STORE,
    certificates,
    secured_hub,
    secured_store,
    the_proxy,
    values,
    variables,
)
from worlds.upgrade.release import Installation, present

SHOP = "shop"
ROOT = "root-key"


def container(pod: Object, name: str) -> Object:
    return next(item for item in [*pod.get("initContainers", []), *pod["containers"]] if item["name"] == name)


def train(tenant: Tenant, pod: Object, keys: Path, folder: Path) -> None:
    """Run both containers of a training pod, with its files and its variables."""
    for name in ("storage", "work"):
        (folder / name).mkdir()
    tenant.mount_storage(folder / "storage")
    (folder / "job.json").write_text(tenant.get("ConfigMap", "run-job")["data"]["job.json"])
    files = {
        "GRAFT_JOB_FILE": folder / "job.json", "GRAFT_STORAGE_DIR": folder / "storage", "GRAFT_WORK_DIR": folder / "work",
        "GRAFT_TERMINATION_FILE": folder / "termination",
    }  # fmt: skip
    for name in ("prepare", "train"):
        given = variables(container(pod["spec"], name), keys)
        given |= {key: str(path) for key, path in files.items()} | {"POD_NAME": pod["metadata"]["name"]}
        kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
        command = [sys.executable, "-m", "graft_trainer", name]
        done = subprocess.run(command, env=kept | given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_job_is_tuned_and_published_behind_a_proxy(tmp_path: Path) -> None:
    for name in ("keys", "state", "run"):
        (tmp_path / name).mkdir()
    keys = certificates(tmp_path / "keys")
    with (
        control_plane() as plane,
        secured_store(keys, tmp_path / "state") as server,
        secured_hub(keys, json.dumps(CONFIG).encode()) as hub,
        the_proxy(server, hub) as proxy,
    ):
        add_nodes(plane, 1)
        api = Api(plane.server, plane.state / "pki")
        folder = server.secret_dir(BUCKET)
        direct = S3Store(replace(StorageConfig.from_dir(folder), ca_file=str(keys / "ca.crt")))
        direct.create_bucket()
        for path in MODEL.iterdir():
            direct.upload(f"models/{BASE}/{path.name}", path)
        direct.upload(f"{SHOP}/datasets/train.jsonl", QUICKSTART / "data/train.jsonl")

        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
        tenant = make_namespace(api, direct, SHOP)
        root = {"access-key-id": server.access_key, "secret-access-key": server.secret_key}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": ROOT, "namespace": SYSTEM}}
        api.create(secret | {"stringData": root})
        external = {"endpoint": f"https://{STORE}", "adminUrl": f"https://{STORE}", "existingSecret": ROOT}
        given = values(proxy) | {
            "objectStore": {"embedded": {"enabled": False}, "external": external},
            "huggingface": {"endpoint": f"https://{HUB}"}, "tenantNamespaces": [SHOP],
        }  # fmt: skip
        installation = Installation(plane, api, tmp_path, free_port())
        installation.upgrade(present(), *(f"--set-json={key}={json.dumps(value)}" for key, value in given.items()))
        operator = installation.operator(present())
        deployment = api.get("Deployment", SYSTEM, ACCOUNT)
        assert deployment is not None
        operator.environment |= variables(container(deployment["spec"]["template"]["spec"], "operator"), keys)
        operator.environment |= present().environment
        try:
            operator.start()
            for name, source in ((BASE, f"s3://{BUCKET}/models/{BASE}"), ("theirs", "hf://org/model")):
                api.create({
                    "apiVersion": API, "kind": "BaseModel", "metadata": {"name": name}, "spec": {"source": source},
                })  # fmt: skip
                ready = lambda name=name: _ready(api, name)  # noqa: E731
                tenant.wait(
                    ready, f"BaseModel {name} is Ready", explain=lambda name=name: str(api.get("BaseModel", None, name))
                )
            tenant.job("run", training={"maxSteps": 2}, evaluation={"maxSamples": 0})
            train(tenant, tenant.get("Pod", pod := tenant.running_pod("run")), keys, tmp_path / "run")
            tenant.end_pod(pod)
            tenant.until("FineTuneJob", "run", "Succeeded", "Published")
            tenant.until("Adapter", "support-1.0.0", "Ready", "Verified")
            assert set(proxy.asked) == {f"{STORE}:443", f"{HUB}:443"}
        finally:
            operator.stop()


def _ready(api: Api, name: str) -> bool:
    found = api.get("BaseModel", None, name) or {}
    conditions = found.get("status", {}).get("conditions", [])
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
