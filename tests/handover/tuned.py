"""Versions that the trainer makes, and a deployment of them: the operator's plans, the agent, real vLLM and a gateway."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from graft.api import Adapter, AdapterDeployment
from graft.artifacts.manifest import Manifest, digest
from graft.contracts.agent import Wanted
from graft.contracts.enginekeys import fingerprint
from graft.contracts.gateway import ROUTES_KEY
from graft.reconcile.adapter.adapter import observe
from graft.reconcile.adapterdeployment.serving import ReplicaView, plan_routes, resolve, wanted_adapter
from graft_server.gateway.app import Gateway
from graft_server.gateway.keys import Keys
from graft_server.gateway.settings import Settings
from graft_trainer.evaluation import measure
from graft_trainer.pipeline import train_evaluate_publish
from graft_trainer.prepare import prepare_container
from handover.real_vllm import MAX_RANK, Vllm
from worlds.agent import Pod
from worlds.serving import NAMESPACE, eventually, listening, signed
from worlds.trainer import MemoryStore, chat_lines, make_job, make_run, question_lines, quick_training

BASE, UID = "big", "uid-of-the-deployment"
TRAINING = {
    "maxSteps": 150, "learningRate": 0.01, "loggingSteps": 20, "perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A held-out example, as the trainer's evaluation asked the version."""

    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class Version:
    """A published version: its Adapter as the operator has verified it, and its objects in the store."""

    adapter: Adapter
    manifest: Manifest
    objects: dict[str, bytes]
    asked: Sequence[Asked]


def tune(base: Path, root: Path, name: str, dataset: dict[str, Any]) -> Version:
    """Prepare, train, evaluate and publish a version, and verify it as the operator does."""
    store = MemoryStore()
    lines = question_lines if dataset.get("format") == "instruction" else chat_lines
    store.kept |= {"team-a/data/train.jsonl": lines(24), "team-a/data/eval.jsonl": lines(3)}
    store.add_folder("models/tiny/", base)
    sources = {
        role: {"uri": f"s3://bucket/team-a/data/{file}.jsonl"} for role, file in (("train", "train"), ("eval", "eval"))
    }
    job = make_job(
        job={"name": name, "namespace": NAMESPACE, "uid": f"uid-{name}"},
        baseModel={"name": BASE, "uri": "s3://bucket/models/tiny"},
        dataset=sources | dataset,
        method={"lora": {"rank": MAX_RANK}},
        training=TRAINING,
        output={"adapter": name, "version": "1.0.0"},
    )
    asked: list[Asked] = []
    generate = measure.generate

    def recorded(subject: Any, prompts: list[list[int]], *arguments: Any, **more: Any) -> list[str]:
        answers = generate(subject, prompts, *arguments, **more)
        if subject.who == "adapter":
            asked.extend(map(Asked, prompts, answers))
        return answers

    run = make_run(root, store, job)
    with quick_training(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "generate", recorded)
        prepare_container(run)
        train_evaluate_publish(run)
    run.progress.close(5)
    prefix = f"{NAMESPACE}/adapters/{name}/1.0.0/"
    objects = {key: data for key, data in store.kept.items() if key.startswith(prefix)}
    return verified(objects, asked)


def verified(objects: dict[str, bytes], asked: Sequence[Asked] = ()) -> Version:
    """Return the version with the Adapter that the operator makes of a manifest."""
    (key,) = (key for key in objects if key.endswith("/manifest.json"))
    manifest = Manifest.read(objects[key])
    artifact = {"uri": f"s3://bucket/{key.removesuffix('manifest.json')}", "digest": digest(objects[key])}
    spec = {
        "adapter": manifest.adapter, "version": manifest.version, "baseModel": BASE, "method": manifest.method,
        "artifact": artifact,
    }  # fmt: skip
    name = f"{manifest.adapter}-{manifest.version}"
    adapter = Adapter.model_validate({"metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec})
    status, ready = observe(adapter, manifest)
    status = status.model_copy(update={"conditions": [ready]})
    return Version(adapter.model_copy(update={"status": status}), manifest, objects, asked)


class Deployment:
    """An AdapterDeployment with one replica, and a gateway before it."""

    def __init__(self, vllm: Vllm, pod: Pod, session: aiohttp.ClientSession, versions: Sequence[Version]) -> None:
        self.pod, self._vllm, self._session = pod, vllm, session
        self.adapters = [version.adapter for version in versions]
        self.wanted = {one.spec.adapter: signed(wanted_adapter(NAMESPACE, one)) for one in self.adapters}
        for version in versions:
            pod.store.objects |= version.objects
        keys = Keys()
        keys.update({"graft-gateway-keys": {"2026-01-01": base64.b64encode(b"x" * 32).decode()}})
        self.gateway = Gateway(session, Settings(), lambda: 0.0, keys)
        self.spec = AdapterDeployment.model_validate(
            {
                "metadata": {"name": "desk", "namespace": NAMESPACE, "uid": UID},
                "spec": {"baseModel": BASE, "adapters": [f"{one.spec.adapter}@1.0.0" for one in self.adapters]},
            }
        )
        pod.wanted = Wanted(
            base_model=BASE, max_lora_rank=64, drain_seconds=0, gateway_keys=[fingerprint(key) for key in keys.of(UID)]
        )
        self.url = ""

    async def load(self) -> None:
        """Let the agent load the versions. Wait until each is Loaded or Failed, then write the routes."""
        self.pod.want(*self.wanted.values())

        def ended() -> bool:
            found = [self.pod.one(adapter) for adapter in self.wanted.values()]
            return all(one is not None and one.state in {"Loaded", "Failed"} for one in found)

        await eventually(ended, seconds=200)
        replica = ReplicaView("pod-1", self._vllm.url.removeprefix("http://"), True, self.pod.told[-1])
        routes = plan_routes(self.spec, resolve(self.spec, self.adapters), NAMESPACE, [replica], None, None)
        self.gateway.update({"routes": {ROUTES_KEY: routes.json_text()}})

    def state(self, name: str) -> tuple[str, str | None]:
        """Return the state of an adapter and its reason."""
        found = self.pod.one(self.wanted[name])
        assert found is not None
        return found.state, found.reason

    async def post(self, path: str, adapter: str, **body: Any) -> tuple[int, Any]:
        """Send a request to the gateway. Return the status and the answer, or the list of events of a stream."""
        body = {"model": f"{NAMESPACE}/{adapter}", "temperature": 0, "max_tokens": 60, **body}
        async with self._session.post(self.url + path, json=body) as answer:
            if not body.get("stream") or answer.status != 200:
                return answer.status, await answer.json()
            lines = [line.removeprefix("data: ") for line in (await answer.text()).split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return answer.status, [json.loads(line) for line in lines[:-1]]


@asynccontextmanager
async def deployed(vllm: Vllm, folder: Path, versions: Sequence[Version]) -> AsyncIterator[Deployment]:
    """Serve the versions: run an agent beside vLLM and a gateway, and load each version that can be loaded."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        pod = Pod(folder / "adapters")
        pod.access, pod.load_seconds = vllm.access, 120.0
        made = Deployment(vllm, pod, session, versions)
        await pod.start(session, vllm.url, base_model_name=BASE)
        try:
            async with listening(made.gateway.application()) as address:
                made.url = f"http://{address}"
                await made.load()
                yield made
        finally:
            await pod.kill()
