"""Measure the time from an Adapter's condition Ready to the first token that a running deployment answers with it.

Each round measures, one shortly after the other:
  attach    a new version of an adapter that is served as @latest: from the moment that a watch sees its condition Ready
            to the first token of the new version through the gateway
  unchecked the same for a version without a record of its effect, so that the agent compares nothing after the load
  bare      a GET of the version's weights and the load by safetensors, nothing else: the least cost of moving the bytes
  restart   the pod's engine and agent start again with an empty disk: from their start to the first token through the
            gateway
The API server, operator, object store, agent, engine and gateway are real. The kubelet is the one of
tests/cluster/loopback.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch
import urllib3
from graft.artifacts.manifest import Effect
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed.controlplane import ControlPlane, control_plane
from testbed.faults import Fault, faulty_proxy
from testbed.objectstore import S3Server, s3_server
from testbed.shell import REPOSITORY, Failed, wait_for
from transformers import AutoModelForCausalLM, LlamaConfig
from worlds.cluster.api import Api
from worlds.cluster.loopback import PLACEMENT, LoopbackNode, loopback_node
from worlds.cluster.operator_process import BUCKET, OperatorProcess, install_rights, new_operator
from worlds.cluster.serving_stack import adapter_manifest, gateway, make_real_base, upload_version, write_kubeconfig
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import bind
from worlds.engine import recorded_effect

from benchmarks.serve.adapters import TINY, make_adapters
from benchmarks.train.results import ratio, show, spread, verdict, write

MOST_OVER_BARE, MOST_OVER_RESTART = 1.2, 0.05
PATIENCE = 180.0  # seconds


@dataclass(frozen=True)
class Size:
    """The size of a base model and of its adapters."""

    name: str
    hidden: int | None  # None: the tiny model of the examples
    rank: int
    layers: int = 1
    bytes_per_second: float | None = None  # the store's bandwidth per connection; None: not limited


# "large" has one wide layer, so an adapter has 100 MB, which is usual for a model with 7 billion parameters. An adapter
# of "larger" has the size that is usual for 70 billion parameters. "remote" limits the store to about the bandwidth of
# one connection to S3. The bounds are checked for "large", whose store is on the same machine, and for "remote". If
# less than a fifth of the disk is free, the agents do not download expected versions ahead of time.
SIZES = (
    Size("small", None, 16),
    Size("large", 2048, 512),
    Size("larger", 2048, 512, layers=4),
    Size("remote", 2048, 512, bytes_per_second=50e6),
)
HELD = ("large", "remote")


def make_base(size: Size, folder: Path) -> Path:
    if size.hidden is None:
        return TINY
    shutil.copytree(TINY, folder)
    tiny = json.loads((TINY / "config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny["vocab_size"], hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=256, eos_token_id=2, bos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Client:
    """A client of one model through the gateway. It sends no request before the gateway lists the version, because
    earlier requests would keep the engine busy."""

    def __init__(self, url: str, model: str) -> None:
        self.address, self.model = urlsplit(url).netloc, model

    def first_token(self, version: str) -> float:
        """Wait until the version is listed, then send a request. Return the time of its first token (monotonic
        seconds)."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._listed(version) and (at := self._ask(version)) is not None:
                return at
            time.sleep(0.005)
        raise Failed(f"{self.model} has not answered with version {version} within {PATIENCE:.0f} s")

    def _listed(self, version: str) -> bool:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            connection.request("GET", f"/v1/models/{self.model}")
            found = json.loads(connection.getresponse().read()).get("graft", {})
            return found.get("version") == version and found.get("state") == "available"
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _ask(self, version: str) -> float | None:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        body = {"model": self.model, "prompt": "What do you sell?", "max_tokens": 1, "stream": True, "temperature": 0}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                return None
            line = answer.readline()
            at = time.monotonic()
            if not line.startswith(b"data: {"):
                return None
            found = json.loads(line[6:]).get("graft", {}).get("version")
            answer.read()
            return at if found == version else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def ready_at(api: Api, namespace: str, name: str) -> float:
    """Watch until the Adapter is Ready. Return the time at which Ready was seen (monotonic seconds)."""
    certificates = {name: str(api.pki / f"admin.{end}") for name, end in (("cert_file", "crt"), ("key_file", "key"))}
    pool = urllib3.PoolManager(ca_certs=str(api.pki / "ca.crt"), **certificates)
    path = f"/apis/graft.dev/v1alpha1/namespaces/{namespace}/adapters?watch=true&fieldSelector=metadata.name%3D{name}"
    answer = pool.request("GET", api.server + path, preload_content=False, timeout=PATIENCE)
    rest = b""
    try:
        for data in answer.stream(amt=None):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                conditions = json.loads(line)["object"].get("status", {}).get("conditions", [])
                if any(item["type"] == "Ready" and item["status"] == "True" for item in conditions):
                    return time.monotonic()
    finally:
        answer.close()
    raise Failed(f"the watch ended before {name} was Ready")


class Rig:
    """A running deployment with one replica."""

    def __init__(self, tenant: Tenant, node: LoopbackNode, client: Client, base: str, store: S3Store) -> None:
        self.tenant, self.node, self.client, self.base, self.store = tenant, node, client, base, store
        self.version = ""

    def upload(self, folder: Path, number: int, rank: int, effect: Effect | None) -> tuple[str, str, str]:
        version = f"1.0.{number}"
        uri, digest = upload_version(
            self.tenant.store, self.tenant.name, folder, "bench", version, rank, self.base, effect
        )
        return version, uri, digest

    def attach(self, version: str, uri: str, digest: str) -> float:
        """Attach a version. Return the seconds from Ready to the first token."""
        name = f"bench-{version}"
        seen: list[float] = []
        watching = threading.Thread(
            target=lambda: seen.append(ready_at(self.tenant.api, self.tenant.name, name)), daemon=True
        )
        watching.start()
        self.tenant.api.create(adapter_manifest(self.tenant, uri, digest, "bench", version, self.base))
        first = self.client.first_token(version)
        watching.join(10)
        self.version = version
        return first - seen[0]

    def bare(self, uri: str) -> float:
        """Return the seconds for the GET of the weights and their load."""
        key = uri.removeprefix(f"s3://{BUCKET}/") + "adapter_model.safetensors"
        began = time.monotonic()
        data = self.store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        tensors = safetensors.torch.load(data)
        assert tensors
        return time.monotonic() - began

    def restart(self) -> float:
        """Restart the containers with an empty disk. Return the seconds from their start to the first token."""
        (pod,) = self.node.of(self.tenant.name)
        before = (pod.engine.since, pod.agent.since)
        for container in (pod.agent, pod.engine):
            container.signal(signal.SIGKILL)
        for path in (pod.folder / "adapters").iterdir():
            shutil.rmtree(path)
        wait_for(lambda: pod.engine.since > before[0] and pod.agent.since > before[1], 30, "the containers start again")
        return self.client.first_token(self.version) - min(pod.engine.since, pod.agent.since)


@contextlib.contextmanager
def rig(plane: ControlPlane, api: Api, store: S3Store, size: Size, folder: Path) -> Iterator[Rig]:
    """Yield a deployment of this size that answers with version 1.0.0."""
    tenant = Tenant(api, f"bench-{size.name}", store)
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": tenant.name}})
    bind(tenant)
    model = make_base(size, folder / "base")
    base = make_real_base(api, store, f"bench-{size.name}", model)
    agents = folder / "agents.kubeconfig"

    def spawn(program: str, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", f"graft_server.{program}", *arguments],
                env=os.environ | environment | {"KUBECONFIG": str(agents), "HF_HUB_OFFLINE": "1"},
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            ).pid  # fmt: skip

    (first,) = make_adapters(model, folder / "first", 1, size.rank)
    uri, digest = upload_version(store, tenant.name, first, "bench", "1.0.0", size.rank, base)
    api.create(adapter_manifest(tenant, uri, digest, "bench", "1.0.0", base))
    with loopback_node(api, folder / "pods", model, spawn) as node:
        spec = {"baseModel": base, "adapters": ["bench@latest"], "limits": {"maxLoraRank": 512}, **PLACEMENT}
        # With 0 replicas first, the account's token exists before the first agent needs it.
        api.create(tenant.resource("AdapterDeployment", "chat", spec | {"replicas": 0}))
        tenant.wait(lambda: api.get("ServiceAccount", tenant.name, "chat-agent"), "the agent has a service account")
        write_kubeconfig(plane, agents, api.token(tenant.name, "chat-agent"))
        api.patch("AdapterDeployment", tenant.name, "chat", {"spec": {"replicas": 1}})
        with gateway(plane, api, folder, node.address()) as url:
            made = Rig(tenant, node, Client(url, f"{tenant.name}/bench"), base, tenant.store)
            made.client.first_token("1.0.0")
            made.version = "1.0.0"
            yield made
        api.delete("AdapterDeployment", tenant.name, "chat")


def rounds_of(plane: ControlPlane, api: Api, store: S3Store, size: Size, rounds: int) -> dict[str, Any]:
    """Measure attach, unchecked, bare and restart, `rounds` times. The effect of an unchecked version is not compared after
    its load, because its manifest has no record of it."""
    found: dict[str, list[float]] = {"attach": [], "unchecked": [], "bare": [], "restart": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with rig(plane, api, store, size, folder) as made:
            model = folder / "base" if size.hidden else TINY
            paths = make_adapters(model, folder / "new", 2 * rounds, size.rank)
            sizes = sum(path.stat().st_size for path in paths[0].iterdir())
            versions = iter(enumerate(paths, start=1))
            for number in range(1, rounds + 1):
                for way in ("unchecked", "attach") if number % 2 else ("attach", "unchecked"):
                    at, path = next(versions)
                    effect = recorded_effect(model, path) if way == "attach" else None
                    version, uri, digest = made.upload(path, at, size.rank, effect)
                    found[way].append(made.attach(version, uri, digest))
                found["bare"].append(made.bare(uri))
                found["restart"].append(made.restart())
                last = ", ".join(f"{way} {values[-1]:.3f} s" for way, values in found.items())
                print(f"  {size.name} {number}/{rounds}: {last}", flush=True)
    return {"adapterBytes": sizes, "seconds": found}


def limit(upstream: str, bytes_per_second: float, port: Any) -> None:
    """Run a proxy that limits a store's bandwidth, until the process is terminated. Send its port through `port`."""
    with faulty_proxy(upstream) as proxy:
        proxy.inject(Fault(bytes_per_second=bytes_per_second))
        port.send(urlsplit(proxy.endpoint).port)
        threading.Event().wait()


@contextlib.contextmanager
def seen_through(s3: S3Server, bytes_per_second: float | None) -> Iterator[S3Server]:
    """Yield the store as the cluster and the reference see it: behind a proxy if the bandwidth is limited."""
    if bytes_per_second is None:
        yield s3
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=limit, args=(s3.endpoint, bytes_per_second, there), daemon=True)
    process.start()
    try:
        yield replace(s3, port=here.recv())
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def cluster(bytes_per_second: float | None = None) -> Iterator[tuple[ControlPlane, Api, S3Server, OperatorProcess]]:
    """Start the control plane, the store and the operator."""
    with control_plane() as plane, s3_server() as server, seen_through(server, bytes_per_second) as s3:
        plane.kubectl("apply", "-f", str(REPOSITORY / "crds"))
        plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(REPOSITORY / "crds"))
        api = Api(plane.server, plane.state / "pki")
        operator = new_operator(plane.state, install_rights(plane, api), s3)
        operator.start()
        try:
            yield plane, api, s3, operator
        finally:
            operator.stop()


def measure(rounds: int) -> dict[str, Any]:
    """Measure all sizes. Return the results."""
    sizes: dict[str, Any] = {}
    rows: list[tuple[str, str]] = []
    for size in SIZES:
        with cluster(size.bytes_per_second) as (plane, api, s3, _):
            store = S3Store(StorageConfig.from_dir(s3.secret_dir(BUCKET)))
            wait_for(
                lambda store=store: BUCKET in [item["Name"] for item in store.client.list_buckets()["Buckets"]],  # type: ignore[misc]
                30,
                "the bucket exists",
            )
            sizes[size.name] = found = rounds_of(plane, api, store, size, rounds)
            seconds = found["seconds"]
            over_bare, over_restart = (ratio(seconds["attach"], seconds[way]) for way in ("bare", "restart"))
            found |= {"overBare": over_bare, "overRestart": over_restart}
            found["overUnchecked"] = ratio(seconds["attach"], seconds["unchecked"])
            rows += [
                (
                    f"{size.name}: adapter of {found['adapterBytes'] / 1e6:.1f} MB, Ready to first token, s",
                    spread(seconds["attach"]),
                ),
                (f"{size.name}: without the check of the effect, s", spread(seconds["unchecked"])),
                (f"{size.name}: bare GET and load, s", spread(seconds["bare"])),
                (f"{size.name}: restart of the pod's containers, s", spread(seconds["restart"])),
                (f"{size.name}: Ready to first token / bare", verdict(over_bare, MOST_OVER_BARE, least=False)),
                (f"{size.name}: Ready to first token / restart", verdict(over_restart, MOST_OVER_RESTART, least=False)),
            ]
    over_bare, over_restart = ({size: sizes[size][name] for size in HELD} for name in ("overBare", "overRestart"))
    result = {
        "sizes": sizes, "overBare": over_bare, "overRestart": over_restart,
        "met": max(over_bare.values()) <= MOST_OVER_BARE and max(over_restart.values()) <= MOST_OVER_RESTART,
    }  # fmt: skip
    write("serve-ready", result)
    show(f"From Ready to the first token ({rounds} rounds)", rows)
    return result
