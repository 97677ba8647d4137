"""A node whose serving pods really serve: engine and agent of each pod run as processes on the pod's own loopback address.

This module plays the kubelet as far as serving pods need it. It starts the containers of the pod's spec, restarts them when
they end, probes them, and writes readiness and address into the pod's status. When a pod is deleted, it waits for the preStop
pause, sends SIGTERM, and deletes the pod's object last. There is no sandbox: mounted files are in a folder per pod, and the
base model is not downloaded.
"""

from __future__ import annotations

import base64
import os
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graft.contracts.mounts import AGENT_PORT, CALLERS_FILE, ENGINE_PORT
from testbed.processes import start_time
from testbed.shell import wait_for

from worlds.cluster.api import MERGE, Api, Object, Refused

NODE = "loopback"
TAINT = "graft.dev/loopback"
# With these fields of its spec, a deployment gets its pods onto this node. No other pods run here.
PLACEMENT = {
    "nodeSelector": {"kubernetes.io/hostname": NODE},
    "tolerations": [{"key": TAINT, "operator": "Exists"}],
}
HEARTBEAT = 10.0  # seconds
LOOK_EVERY = 0.2  # seconds
PROBE_EVERY = 0.5  # seconds; the pods' own probes have longer periods, but the order of events is the same

# program, arguments, environment with the container's IMAGE, log -> process id
Start = Callable[[str, list[str], dict[str, str], Path], int]


class Container:
    """One process, identified by its pid and its start time."""

    def __init__(self, start: Callable[[], int]) -> None:
        self._start = start
        self.restarts = -1
        self.pid = 0
        self.since = 0.0  # seconds of the monotonic clock
        self._born: str | None = None
        self.start()

    def start(self) -> None:
        self.since = time.monotonic()
        self.pid = self._start()
        self._born = start_time(self.pid)
        self.restarts += 1

    @property
    def alive(self) -> bool:
        return self._born is not None and start_time(self.pid) == self._born

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class LoopbackPod:
    """One pod and its containers."""

    def __init__(self, api: Api, pod: Object, address: str, folder: Path, model: Path, start: Start) -> None:
        self.api, self.pod, self.address, self.folder = api, pod, address, folder
        self.name, self.namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        self.ready = False
        self.deleted = threading.Event()
        self.over = threading.Event()
        self._abandoned = False
        self._told: tuple[bool, int] | None = None
        folder.mkdir(parents=True)
        (folder / "adapters").mkdir()
        self._write_secret()
        containers = {item["name"]: item for item in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]}
        uid = pod["metadata"]["uid"]
        engine = _with(
            _arguments(containers["engine"]),
            {
                "--model": str(model),
                "--host": address,
                "--port": str(ENGINE_PORT),
                "--callers": str(folder / "engine-access" / CALLERS_FILE),
            },
        )
        agent = _with(
            _arguments(containers["agent"]),
            {
                "--engine-url": f"http://{address}:{ENGINE_PORT}",
                "--listen-address": address,
                "--port": str(AGENT_PORT),
                "--adapters-dir": str(folder / "adapters"),
                "--storage-dir": str(folder / "storage"),
                "--engine-dir": str(folder / "engine-access"),
            },
        )
        identity = {"POD_NAME": self.name, "POD_NAMESPACE": self.namespace, "POD_UID": uid}
        self._pause = containers["engine"]["lifecycle"]["preStop"]["sleep"]["seconds"]
        image = {name: {"IMAGE": item["image"]} for name, item in containers.items()}
        updating = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self.agent = Container(lambda: start("agent", agent, identity | image["agent"], folder / "agent.log"))
        self.engine = Container(lambda: start("engine", engine, updating | image["engine"], folder / "engine.log"))
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def _write_secret(self) -> None:
        """Write the storage Secret as the kubelet mounts it."""
        secret = self.api.get("Secret", self.namespace, "graft-storage")
        assert secret is not None
        (self.folder / "storage").mkdir()
        for key, value in secret["data"].items():
            (self.folder / "storage" / key).write_bytes(base64.b64decode(value))

    def _run(self) -> None:
        try:
            while not self.deleted.wait(PROBE_EVERY):
                for container in (self.agent, self.engine):
                    if not container.alive:
                        self.ready = False
                        self._tell()
                        container.start()
                self.ready = self._answers(ENGINE_PORT, "/health") and self._answers(AGENT_PORT, "/readyz")
                self._tell()
            if self._abandoned:
                return
            self.ready = False
            self._tell()
            time.sleep(self._pause)
            self.engine.signal(signal.SIGTERM)
            self._ended(self.engine, 60)
        finally:
            self._kill()
            self.over.set()
        self._call("DELETE", f"/api/v1/namespaces/{self.namespace}/pods/{self.name}", {"gracePeriodSeconds": 0})

    def _call(self, method: str, path: str, body: Object) -> None:
        """Call the API about this pod. The pod may no longer exist, if it was deleted without a grace period."""
        try:
            self.api.call(method, path, body, MERGE if method == "PATCH" else "application/json")
        except Refused as error:
            if error.status != 404:
                raise

    def abandon(self) -> None:
        """End the processes. Do not delete the pod's object."""
        self._abandoned = True
        self.deleted.set()
        self._thread.join(10)
        self._kill()

    def _kill(self) -> None:
        for container in (self.agent, self.engine):
            container.signal(signal.SIGKILL)
            self._ended(container, 10)

    def _ended(self, container: Container, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while container.alive and time.monotonic() < deadline:
            time.sleep(0.05)

    def _answers(self, port: int, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}:{port}{path}", timeout=5) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def _tell(self) -> None:
        """Write the pod's status if it changed."""
        ready = "True" if self.ready else "False"
        new = {
            "phase": "Running",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "conditions": [
                {"type": kind, "status": status, "lastTransitionTime": _now()}
                for kind, status in (
                    ("PodScheduled", "True"),
                    ("Initialized", "True"),
                    ("ContainersReady", ready),
                    ("Ready", ready),
                )
            ],
        }
        told = (self.ready, self.engine.restarts)
        if self._told != told:
            path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}/status"
            self._call("PATCH", path, {"status": new})
            self._told = told


def _arguments(container: Object) -> list[str]:
    """Return the arguments of a container whose command is `python -m <module> …`."""
    command = [*container["command"], *container.get("args", [])]
    assert command[:2] == ["python", "-m"], command
    return [str(word) for word in command[3:]]


def _with(arguments: list[str], values: dict[str, str]) -> list[str]:
    """Return the arguments with the values of these flags replaced."""
    left, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word in values:
            skip = True
        else:
            left.append(word)
    return left + [word for pair in values.items() for word in pair]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class LoopbackNode:
    """The node and its kubelet. One test uses it at a time."""

    def __init__(self, api: Api, folder: Path, model: Path, start: Start) -> None:
        self._api, self._folder, self._model, self._start = api, folder, model, start
        self._net = f"127.{random.randint(1, 250)}.{random.randint(1, 250)}"  # other test runs on this machine use other networks
        self._next = 1
        self.pods: dict[str, LoopbackPod] = {}  # by UID
        self.troubles: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loopback kubelet", daemon=True)

    def address(self) -> str:
        """Return a loopback address that is not used yet."""
        self._next += 1
        return f"{self._net}.{self._next}"

    def of(self, namespace: str) -> list[LoopbackPod]:
        """Return the pods of a namespace that have not ended."""
        return [pod for pod in list(self.pods.values()) if pod.namespace == namespace and not pod.over.is_set()]

    def named(self, name: str) -> LoopbackPod:
        return next(pod for pod in self.pods.values() if pod.name == name)

    def open(self) -> None:
        room = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "500"}
        self._api.create({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE, "kubernetes.io/os": "linux"}},
            "spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}]},
        })  # fmt: skip
        self._heartbeat({"capacity": room, "allocatable": room})
        self._thread.start()
        wait_for(self._schedulable, 30, "the loopback node is schedulable")

    def _schedulable(self) -> bool:
        node = self._api.call("GET", f"/api/v1/nodes/{NODE}")
        return [taint["key"] for taint in node["spec"].get("taints", [])] == [TAINT]

    def close(self) -> None:
        """End all processes and delete the node. The pods are deleted with their namespace or owner."""
        self._end.set()
        self._thread.join(20)
        for pod in self.pods.values():
            pod.abandon()
        self._api.call("DELETE", f"/api/v1/nodes/{NODE}")

    def _heartbeat(self, more: Object | None = None) -> None:
        now = _now()
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
        self._api.call(
            "PATCH", f"/api/v1/nodes/{NODE}/status", {"status": {"conditions": [ready], **(more or {})}}, MERGE
        )

    def _run(self) -> None:
        beaten = time.monotonic()
        while not self._end.wait(LOOK_EVERY):
            if time.monotonic() - beaten > HEARTBEAT:
                self._heartbeat()
                beaten = time.monotonic()
            try:
                self._look()
            except Exception as error:
                self.troubles.append(repr(error))
                raise

    def _look(self) -> None:
        listed = self._api.call("GET", f"/api/v1/pods?fieldSelector=spec.nodeName%3D{NODE}")["items"]
        there: dict[str, Any] = {pod["metadata"]["uid"]: pod for pod in listed}
        for uid, pod in there.items():
            if uid not in self.pods and not pod["metadata"].get("deletionTimestamp"):
                folder = self._folder / pod["metadata"]["name"]
                self.pods[uid] = LoopbackPod(self._api, pod, self.address(), folder, self._model, self._start)
            elif uid in self.pods and pod["metadata"].get("deletionTimestamp"):
                self.pods[uid].deleted.set()
        for uid, running in self.pods.items():
            if uid not in there:
                running.deleted.set()


@contextmanager
def loopback_node(api: Api, folder: Path, model: Path, start: Start) -> Iterator[LoopbackNode]:
    """Run the node during the block. End all its processes and delete it afterwards."""
    node = LoopbackNode(api, folder, model, start)
    node.open()
    try:
        yield node
    finally:
        node.close()
