"""The agent is killed with SIGKILL at each request that it makes and at each change on its disk.

The next agent must load every wanted adapter. No partial adapter may be loaded, and no other files may remain.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.contracts.agent import WANTED_KEY, Residency, Wanted, WantedAdapter
from graft_server.agent.storage.folders import UNCHECKED_FILE
from testbed.faults import FaultyProxy, faulty_proxy
from testbed.objectstore import S3Server
from testbed.shell import REPOSITORY, tail
from worlds.serving import TRUSTED, FakeEngine, FakeKube, MemoryStore, eventually, listening

BUCKET = "bucket"
MIB = 1 << 20
FILES = {"adapter_config.json", "adapter_model.safetensors", "manifest.digest", UNCHECKED_FILE}


class Zygote:
    """The process that forks the agents."""

    def __init__(self, kubeconfig: Path) -> None:
        script = REPOSITORY / "tests" / "worlds" / "cluster" / "agent_zygote.py"
        self.kubeconfig = kubeconfig  # the client reads the path at its import, and the content at each start
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        )

    def start(self, **order: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def kill(pid: int) -> None:
    """Send SIGKILL. Do nothing if the process has not started or has ended."""
    if pid == 0:
        return
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def gone(pid: int) -> bool:
    if pid == 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote") / "kubeconfig")
    yield made
    made.end()


@pytest.fixture(scope="module")
def versions(s3: S3Server) -> dict[str, WantedAdapter]:
    """Put three versions into the real store. Return them: name -> version."""
    store = S3Store(StorageConfig(s3.endpoint, "us-east-1", BUCKET, "", s3.access_key, s3.secret_key))
    store.create_bucket()
    memory = MemoryStore()
    made = {name: memory.publish(f"crash-{name}", size=MIB) for name in ("old", "a", "b")}
    for key, data in memory.objects.items():
        store.put(key, data)
    return made


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3.endpoint) as proxy:
        yield proxy


class CheckedEngine(FakeEngine):
    """An engine that checks the files of each adapter before it loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: list[str] = []

    async def _load(self, request: web.Request) -> web.Response:
        self._look(Path((await request.json())["lora_path"]))
        return await super()._load(request)

    def _look(self, folder: Path) -> None:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()} if folder.is_dir() else {}
        if set(sizes) != FILES or sizes["adapter_model.safetensors"] < MIB:
            self.broken.append(f"{folder.name}: {sizes}")


class Cell:
    """One pod. Its disk, engine and ConfigMaps survive its agent."""

    def __init__(self, root: Path, zygote: Zygote, s3: S3Server, proxy: FaultyProxy) -> None:
        self.root = root
        self.dir = root / "adapters"
        self.kube, self.engine = FakeKube(), CheckedEngine()
        self.on_request: Callable[[], None] = lambda: None
        self._zygote = zygote
        self._starts = 0
        self.pid = 0
        secret = root / "secret"
        secret.mkdir(parents=True)
        values = {
            "endpoint": proxy.endpoint,
            "bucket": BUCKET,
            "access-key-id": s3.access_key,
            "secret-access-key": s3.secret_key,
        }
        for name, value in values.items():
            (secret / name).write_text(value)
        proxy.on_request = lambda: self.on_request()

    def counted(self, app: web.Application) -> web.Application:
        @web.middleware
        async def middleware(request: web.Request, handler: Any) -> web.StreamResponse:
            self.on_request()
            answer: web.StreamResponse = await handler(request)
            return answer

        app.middlewares.append(middleware)
        return app

    def serve(self, kube: str, engine: str) -> None:
        self._addresses = (kube, engine)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://{kube}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        self._zygote.kubeconfig.write_text(json.dumps(config))

    def want(self, *adapters: WantedAdapter) -> None:
        wanted = Wanted(base_model="base", max_lora_rank=16, drain_seconds=0, adapters=list(adapters))
        self.kube.put("dep-wanted", {WANTED_KEY: wanted.json_text()})

    def start(self, kill_at: int | None = None) -> None:
        """Start the agent. Its pod UID contains the number of the start, so that its reports differ from earlier ones."""
        self._starts += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [
            *("--namespace", "team-a", "--wanted-configmap", "dep-wanted", "--residency-configmap", "dep-residency"),
            *("--pod-name", "pod-1", "--pod-uid", f"start-{self._starts}", "--base-model-name", "base"),
            *("--engine-url", f"http://{self._addresses[1]}", "--adapters-dir", str(self.dir), "--port", str(port)),
            *("--storage-dir", str(self.root / "secret"), "--cache-bytes", str(5 * MIB // 2)),
            *("--trusted-keys", "graft-system/graft-trusted-keys"),
        ]
        log = str(self.root / "agent.log")
        self.pid = self._zygote.start(arguments=arguments, log=log, kill_at=kill_at, below=str(self.dir))

    def settled(self, *adapters: WantedAdapter) -> bool:
        """Return whether the current agent reports exactly these adapters as loaded, and engine and disk agree."""
        text = self.kube.items["dep-residency"]["data"].get("pod-1")
        told = Residency.model_validate_json(text) if text else None
        names = sorted(adapter.engine_name for adapter in adapters)
        return bool(
            told
            and told.pod_uid == f"start-{self._starts}"
            and told.ready
            and sorted(item.engine_name for item in told.adapters if item.state == "Loaded") == names
            and sorted(self.engine.adapters) == names
            and sorted(path.name for path in self.dir.iterdir()) == names
        )

    async def until_settled(self, *adapters: WantedAdapter) -> None:
        try:
            await eventually(lambda: self.settled(*adapters), seconds=20)
        except AssertionError:
            there = sorted(path.name for path in self.dir.iterdir()) if self.dir.exists() else None
            raise AssertionError(f"{there}\n{sorted(self.engine.adapters)}\n{tail(self.root / 'agent.log')}") from None

    async def before(self, old: WantedAdapter) -> None:
        """Set up the state that every case starts from: a killed agent had loaded `old`, which is no longer wanted."""
        kill(self.pid)
        await eventually(lambda: gone(self.pid))
        snapshot = self.root / "before"
        if not snapshot.exists():
            self.want(old)
            self.start()
            await self.until_settled(old)
            kill(self.pid)
            await eventually(lambda: gone(self.pid))
            shutil.copytree(self.dir, snapshot)
        shutil.rmtree(self.dir)
        shutil.copytree(snapshot, self.dir)
        self.engine.adapters = {old.engine_name: str(self.dir / old.engine_name)}


@asynccontextmanager
async def cell(root: Path, zygote: Zygote, s3: S3Server, proxy: FaultyProxy) -> AsyncIterator[Cell]:
    made = Cell(root, zygote, s3, proxy)
    made.kube.put("dep-residency", {})
    made.kube.put("graft-trusted-keys", TRUSTED["graft-trusted-keys"])
    async with (
        listening(made.counted(made.kube.app())) as kube,
        listening(made.counted(made.engine.app())) as engine,
    ):
        made.serve(kube, engine)
        try:
            yield made
        finally:
            made.on_request = lambda: None
            kill(made.pid)
            await eventually(lambda: gone(made.pid))


async def sweep(made: Cell, old: WantedAdapter, new: list[WantedAdapter], start: Callable[[int], None]) -> int:
    """Kill agents at the first point, the second point and so on, until one finishes. Return the number of points."""
    for count in range(1, 200):
        await made.before(old)
        made.want(*new)
        start(count)
        await eventually(lambda: gone(made.pid) or made.settled(*new), seconds=20)
        if not gone(made.pid):
            return count - 1
        made.on_request = lambda: None
        made.start()
        await made.until_settled(*new)
        assert made.engine.broken == []
    raise AssertionError("no agent finished: each was killed at one of the first 199 points")


async def test_after_a_kill_at_any_request_the_next_agent_loads_every_wanted_adapter(
    tmp_path: Path, zygote: Zygote, s3: S3Server, proxy: FaultyProxy, versions: dict[str, WantedAdapter]
) -> None:
    async with cell(tmp_path, zygote, s3, proxy) as made:

        def start(count: int) -> None:
            left = count

            def request() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    kill(made.pid)  # the server handles the request nevertheless

            made.on_request = request
            made.start()

        assert await sweep(made, versions["old"], [versions["a"], versions["b"]], start) > 15


async def test_after_a_kill_at_any_disk_change_the_next_agent_loads_every_wanted_adapter(
    tmp_path: Path, zygote: Zygote, s3: S3Server, proxy: FaultyProxy, versions: dict[str, WantedAdapter]
) -> None:
    async with cell(tmp_path, zygote, s3, proxy) as made:
        points = await sweep(made, versions["old"], [versions["a"], versions["b"]], made.start)
        assert points > 15
