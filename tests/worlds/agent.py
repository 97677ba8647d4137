"""The agent of a serving pod, in the test process beside a stand-in for the engine. The store is a dict or real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from graft.artifacts.manifest import Effect
from graft.contracts.agent import WANTED_KEY, Residency, ResidentAdapter, Wanted, WantedAdapter
from graft_server.agent.agent import Agent
from graft_server.agent.engine.access import Access
from graft_server.agent.engine.client import EngineClient
from graft_server.agent.storage.objects import Storage
from graft_server.agent.storage.trust import Trust

from worlds.serving import NAMESPACE, TRUSTED, FakeEngine, MemoryStore, eventually, listening


class Pod:
    """An engine, a store and an agent that can be restarted."""

    def __init__(self, adapters_dir: Path, storage: Storage | None = None) -> None:
        self.dir = adapters_dir
        self.storage = storage
        self.engine = FakeEngine()
        self.store = MemoryStore()
        self.wanted = Wanted(base_model="base", max_lora_rank=16, drain_seconds=0)
        self.told: list[Residency] = []
        self.cache_bytes: int | None = 1 << 30
        self.load_seconds = 20.0
        self.namespace = NAMESPACE
        self.access: Access | None = None  # None: the engine answers everybody
        # The ConfigMap with the trusted keys. None means that the agent has not read it yet.
        self.trusted: dict[str, dict[str, str]] | None = TRUSTED
        self.agent: Agent = None  # type: ignore[assignment]

    def publish(self, folder: Path, name: str, rank: int | None, effect: Effect | None = None) -> WantedAdapter:
        """Put an adapter that peft has saved into the store. Return it as a wanted adapter."""
        files = {key: (folder / key).read_bytes() for key in ("adapter_config.json", "adapter_model.safetensors")}
        return self.store.publish(name, rank=rank, files=files, fields={"effect": effect})

    def want(self, *adapters: WantedAdapter, **fields: Any) -> None:
        self.wanted = self.wanted.model_copy(update={"adapters": list(adapters), **fields})
        self.agent.want({"x": {WANTED_KEY: self.wanted.json_text()}})

    async def start(self, session: aiohttp.ClientSession, url: str, base_model_name: str = "base") -> None:
        self.agent = Agent(
            pod="pod-1",
            pod_uid="uid-1",
            adapters_dir=self.dir,
            base_model_name=base_model_name,
            engine=EngineClient(session, url, self.access, load_seconds=self.load_seconds),
            access=self.access,
            open_store=self.storage or (lambda: self.store),  # type: ignore[arg-type, return-value]
            storage_changed=self.storage.changed if self.storage else lambda: False,
            publish=self.told.append,
            cache_bytes=self.cache_bytes,
            poll_seconds=0.05,
            trust=Trust(self.namespace),
        )
        if self.trusted is not None:
            self.agent.trusted_keys(self.trusted)
        self.task = asyncio.create_task(self.agent.run())

    async def kill(self) -> None:
        self.agent.stop()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def one(self, adapter: WantedAdapter) -> ResidentAdapter | None:
        listed = self.told[-1].adapters if self.told else []
        return next((item for item in listed if item.engine_name == adapter.engine_name), None)

    async def state(self, adapter: WantedAdapter, state: str) -> ResidentAdapter:
        def reached() -> ResidentAdapter | None:
            item = self.one(adapter)
            return item if item and item.state == state else None

        found: ResidentAdapter = await eventually(reached)
        return found

    async def ready(self, expected: bool = True) -> str | None:
        async def asked() -> bool:
            return (await self.agent.not_ready() is None) == expected

        await eventually(asked)
        return await self.agent.not_ready()


@asynccontextmanager
async def serving(tmp_path: Path, **fields: Any) -> AsyncIterator[tuple[Pod, aiohttp.ClientSession, str]]:
    """Run an agent. `fields` are attributes of the Pod that are set before the agent starts."""
    pod = Pod(tmp_path / "adapters", fields.pop("storage", None))
    for name, value in fields.items():
        setattr(pod, name, value)
    async with listening(pod.engine.app()) as address, aiohttp.ClientSession() as session:
        await pod.start(session, f"http://{address}")
        try:
            yield pod, session, f"http://{address}"
        finally:
            await pod.kill()
