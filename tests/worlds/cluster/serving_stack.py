"""Serving with real processes in a test: the tiny base model, adapters of random weights, kubeconfigs and the gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from graft.artifacts import layout, sources
from graft.artifacts.manifest import Effect, Manifest, ManifestBaseModel, ManifestJob
from graft.artifacts.store import S3Store
from graft.artifacts.versions import describe_files
from graft.contracts.addresses import host_port
from graft.contracts.mounts import GATEWAY_PORT
from testbed.controlplane import ControlPlane
from testbed.shell import REPOSITORY, tail, wait_for

from worlds.buckets import publish
from worlds.cluster.api import Api, Object
from worlds.cluster.operator_process import BUCKET, SYSTEM
from worlds.cluster.tenant import API, Tenant

MODEL = REPOSITORY / "examples/tiny-llama/model"
BASE = "tiny-llama"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def make_real_base(api: Api, store: S3Store, name: str = BASE, folder: Path = MODEL) -> str:
    """Upload a model and create its BaseModel. Return its name. The default is the tiny model of the examples."""
    for path in folder.iterdir():
        store.upload(f"models/{name}/{path.name}", path)
    if api.get("BaseModel", None, name) is None:
        spec = {"source": f"s3://{BUCKET}/models/{name}"}
        api.create({"apiVersion": API, "kind": "BaseModel", "metadata": {"name": name}, "spec": spec})
    return name


def upload_version(
    store: S3Store,
    tenant: str,
    folder: Path,
    adapter: str,
    version: str,
    rank: int,
    base: str = BASE,
    effect: Effect | None = None,
) -> tuple[str, str]:
    """Put a version into the store. Return its URI and the digest of its manifest. Agents compare the `effect`."""
    files = {name: folder / name for name in FILES}
    model = f"s3://{BUCKET}/models/{base}"
    made = Manifest(
        adapter=adapter, version=version, method="lora",
        base_model=ManifestBaseModel(name=base, uri=model, digest=sources.describe(model, store, None).digest),
        job=ManifestJob(name=f"{adapter}-{version}", namespace=tenant, uid=f"{adapter}-{version}", attempt="1"),
        recipe="random", hyperparameters={}, rank=rank, target_modules=["q_proj"], files=describe_files(files),
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), effect=effect,
    )  # fmt: skip
    prefix = layout.adapter_prefix(tenant, adapter, version)
    return layout.s3_uri(BUCKET, prefix), publish(store, prefix, files, made)


def adapter_manifest(tenant: Tenant, uri: str, digest: str, adapter: str, version: str, base: str = BASE) -> Object:
    """Return the Adapter of a version that is in the store."""
    spec = {
        "adapter": adapter, "version": version, "baseModel": base, "method": "lora",
        "artifact": {"uri": uri, "digest": digest},
    }  # fmt: skip
    return tenant.resource("Adapter", f"{adapter}-{version}", spec)


def publish_version(tenant: Tenant, folder: Path, adapter: str, version: str, rank: int = 4) -> str:
    """Put a version into the store and create its Adapter. Return the Adapter's name."""
    uri, digest = upload_version(tenant.store, tenant.name, folder, adapter, version, rank)
    tenant.api.create(adapter_manifest(tenant, uri, digest, adapter, version))
    return f"{adapter}-{version}"


def write_kubeconfig(plane: ControlPlane, path: Path, token: str) -> Path:
    """Write a kubeconfig of a service account. Return its path."""
    cluster = {"server": plane.server, "certificate-authority": str(plane.state / "pki/ca.crt")}
    path.write_text(
        json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "graft",
            "clusters": [{"name": "graft", "cluster": cluster}],
            "contexts": [{"name": "graft", "context": {"cluster": "graft", "user": "graft"}}],
            "users": [{"name": "graft", "user": {"token": token}}],
        })
    )  # fmt: skip
    return path


# Clients need no key. The port is free on all addresses.
OPEN = {"GRAFT_GATEWAY_AUTHENTICATION": "none", "GRAFT_GATEWAY_METRICS_PORT": "9191"}


@contextmanager
def gateway(
    plane: ControlPlane, api: Api, folder: Path, address: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """Run the gateway as a process with the chart's rights. Yield its URL."""
    kubeconfig = write_kubeconfig(plane, folder / "gateway.kubeconfig", api.token(SYSTEM, "graft-gateway"))
    log = folder / "gateway.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "graft_server.gateway", "--namespace", SYSTEM, "--listen-address", address],
            env={**os.environ, "KUBECONFIG": str(kubeconfig), **OPEN, **environment}, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    url = f"http://{host_port(address, GATEWAY_PORT)}"

    def ready() -> bool:
        assert process.poll() is None, f"the gateway ended unexpectedly. The last lines of its log:\n{tail(log)}"
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_for(ready, 180, "the gateway is ready", lambda: tail(log))
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
