"""Stand-ins for the services around the agent and the gateway: a Kubernetes API, an engine and an object store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestFile, ManifestJob, digest
from graft.artifacts.signing import Keys, Statement, generate, published_keys, read_keys, sign
from graft.artifacts.storage import StorageConfig, StoreError
from graft.contracts.agent import WantedAdapter, engine_name
from graft_server.agent.storage.objects import Stream
from kubernetes.aio.client import ApiClient, Configuration

NAMESPACE = "team-a"
KEYS = read_keys({"2026-01-01.key": generate()})  # the signing key of the operator
TRUSTED = {"graft-trusted-keys": published_keys(KEYS.public)}


async def eventually(check: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until the check returns a true value. Return that value."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"the check did not succeed within {seconds} s: {check}"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def listening(app: web.Application, port: int = 0, **options: Any) -> AsyncIterator[str]:
    """Serve an application on a local port. Yield its address as host:port."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1, **options)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        host, real = runner.addresses[0][:2]
        yield f"{host}:{real}"
    finally:
        await runner.cleanup()


def break_off(request: web.Request) -> None:
    """Break the connection of a request off, as a server that dies does."""
    assert request.transport is not None
    request.transport.abort()


class FakeKube:
    """An API server with the ConfigMaps of one namespace: LIST, WATCH, GET and server-side apply.

    It can fail as a real server does.
    """

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.watchers: list[asyncio.Queue[dict[str, Any] | None]] = []
        self.lists = 0
        self.patches: list[dict[str, Any]] = []
        self.down = False
        self.expired_watches = 0  # the number of watches to refuse with 410

    def app(self) -> web.Application:
        app = web.Application()
        path = "/api/v1/namespaces/{namespace}/configmaps"
        app.router.add_get(path, self._list)
        app.router.add_get(path + "/{name}", self._get)
        app.router.add_patch(path + "/{name}", self._apply)
        app.router.add_get("/api/v1/namespaces/{namespace}/secrets", self._list)
        return app

    def client(self, address: str) -> ApiClient:
        return ApiClient(Configuration(host=f"http://{address}"))

    def put(
        self, name: str, data: dict[str, str], labels: dict[str, str] | None = None, *, silent: bool = False
    ) -> None:
        self.version += 1
        old = self.items.get(name)
        uid = old["metadata"]["uid"] if old else f"uid-{self.version}"
        meta = {"name": name, "uid": uid, "labels": labels or {}, "resourceVersion": str(self.version)}
        self.items[name] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        if not silent:
            self._send("MODIFIED" if old else "ADDED", self.items[name])

    def delete(self, name: str) -> None:
        self.version += 1
        self._send("DELETED", self.items.pop(name))

    def end_watches(self, error: int | None = None) -> None:
        """End all watches. If `error` is given, send an ERROR event with this code before."""
        for queue in self.watchers:
            if error:
                queue.put_nowait({"type": "ERROR", "object": {"kind": "Status", "code": error, "message": "gone"}})
            queue.put_nowait(None)

    def _send(self, kind: str, item: dict[str, Any]) -> None:
        for queue in self.watchers:
            queue.put_nowait({"type": kind, "object": item})

    def _matches(self, request: web.Request, item: dict[str, Any]) -> bool:
        meta = item["metadata"]
        if field := request.query.get("fieldSelector"):
            return field == f"metadata.name={meta['name']}"
        if label := request.query.get("labelSelector"):
            key, _, value = label.partition("=")
            return meta["labels"].get(key) == value
        return True

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if self.down:
            return _status(500, "etcd is away")
        if request.query.get("watch") == "true":
            return await self._watch(request)
        self.lists += 1
        items = [item for item in self.items.values() if self._matches(request, item)]
        return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if self.expired_watches:
            self.expired_watches -= 1
            return _status(410, "too old resource version")
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.watchers.append(queue)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        try:
            await response.prepare(request)
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while event := await queue.get():
                    if event["type"] == "ERROR" or self._matches(request, event["object"]):
                        await response.write(json.dumps(event).encode() + b"\n")
        except TimeoutError:
            pass
        finally:
            self.watchers.remove(queue)
        return response

    async def _get(self, request: web.Request) -> web.Response:
        if self.down:
            return _status(500, "etcd is away")
        item = self.items.get(request.match_info["name"])
        return web.json_response(item) if item else _status(404, "not found")

    async def _apply(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/apply-patch+yaml"
        assert request.query["force"] == "true"
        body = json.loads(await request.read())
        item = self.items.get(request.match_info["name"])
        if item is None or item["metadata"]["uid"] != body["metadata"]["uid"]:
            return _status(409, "uid mismatch")
        self.patches.append({"manager": request.query["fieldManager"], "data": body["data"]})
        self.put(item["metadata"]["name"], {**item["data"], **body["data"]})
        return web.json_response(self.items[item["metadata"]["name"]])


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


def safetensors(seed: str, rank: int = 8, size: int = 1280) -> bytes:
    """Return a safetensors file with a LoRA matrix of one module. Its bytes depend on the seed."""
    inputs = max(1, size // (4 * rank))
    data = (hashlib.sha256(seed.encode()).digest() * (rank * inputs // 8 + 1))[: rank * inputs * 4]
    name = "base_model.model.layers.0.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [rank, inputs], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def signed(wanted: WantedAdapter, keys: Keys = KEYS, **fields: str) -> WantedAdapter:
    """Return the adapter with the signature of the operator. `fields` change the signed statement."""
    name, _, version = wanted.adapter.rpartition("-")
    statement = {
        "namespace": NAMESPACE,
        "adapter": name,
        "version": version,
        "uri": wanted.uri,
        "digest": wanted.digest,
    }
    return wanted.model_copy(update={"signature": sign(keys, Statement(**statement | fields))})


class MemoryStore:
    """The object store as the agent sees it, kept in a dict."""

    config = StorageConfig("", "us-east-1", "bucket", f"{NAMESPACE}/", "id", "secret")

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.unavailable: set[str] = set()  # keys whose requests fail
        self.cut: set[str] = set()  # keys whose download breaks halfway
        self.slow = 0.0  # seconds per chunk
        self.reads: list[str] = []
        self.starts: list[tuple[str, int]] = []  # file name and first byte of each download

    def _at(self, key: str, bucket: str | None) -> bytes:
        self.reads.append(key)
        assert bucket == self.config.bucket
        if key in self.unavailable:
            raise StoreError("unavailable", f"{key}: the store is away")
        if key not in self.objects:
            raise StoreError("missing", f"{key} is missing")
        return self.objects[key]

    def get(self, key: str, bucket: str | None = None, *, most: int = 1 << 23) -> bytes:
        if len(data := self._at(key, bucket)) > most:
            raise StoreError("large", f"{key} has {len(data)} bytes")
        return data

    def stream(self, key: str, bucket: str, start: int = 0) -> Stream:
        data = self._at(key, bucket)
        self.starts.append((key.rpartition("/")[2], start))
        return Stream(start, len(data), self._chunks(key, data, start))

    def _chunks(self, key: str, data: bytes, start: int) -> Generator[bytes, None, None]:
        end = start + (len(data) - start) // 2 if key in self.cut else len(data)
        step = max(64, (end - start) // 20)
        for first in range(start, end, step):
            if self.slow:
                time.sleep(self.slow)
            yield data[first : min(end, first + step)]
        if key in self.cut:
            raise StoreError("unavailable", f"{key}: the connection was cut")

    def publish(
        self,
        name: str,
        *,
        rank: int | None = 8,
        config: dict[str, Any] | None = None,
        files: dict[str, bytes] | None = None,
        size: int = 1280,
        fields: dict[str, Any] | None = None,
    ) -> WantedAdapter:
        """Put a version into the store. Return it as a wanted adapter of the operator. `fields` change its manifest."""
        prefix = f"{NAMESPACE}/adapters/{name}/1.0.0/"
        document = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
        files = files or {
            "adapter_config.json": json.dumps({**document, "surprise": 1, **(config or {})}).encode(),
            "adapter_model.safetensors": safetensors(name, rank or 8, size),
        }
        manifest = Manifest(
            adapter=name,
            version="1.0.0",
            method="lora",
            base_model=ManifestBaseModel(name="base", uri="s3://bucket/models/base/"),
            job=ManifestJob(name=name, namespace=NAMESPACE, uid="u", attempt="a"),
            recipe="r",
            hyperparameters={},
            rank=rank,
            target_modules=["q_proj"],
            files=[
                ManifestFile(name=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())
                for key, data in files.items()
            ],
            created_at="2026-01-01T00:00:00Z",
        ).model_copy(update=fields or {})
        for key, data in files.items():
            self.objects[prefix + key] = data
        self.objects[prefix + "manifest.json"] = manifest.to_bytes()
        sha = digest(manifest.to_bytes())
        resource = f"{name}-1.0.0"
        return signed(
            WantedAdapter(
                engine_name=engine_name(NAMESPACE, resource, sha),
                adapter=resource,
                uri=f"s3://bucket/{prefix}",
                digest=sha,
            )
        )


class FakeEngine:
    """An engine with vLLM's contract for models, adapters and completions. It can fail as vLLM does."""

    def __init__(self, base: str = "base") -> None:
        self.base = base
        self.adapters: dict[str, str] = {}
        self.healthy = True
        self.flat_errors = False
        self.refuse: dict[str, tuple[int, str]] = {}  # name of a refused adapter -> status, message
        self.unknown_status = 404  # status for an unload of an unknown name; older engines answer 400
        self.keep: set[str] = set()  # names whose unload fails
        self.forget_answer: set[str] = set()  # names whose load succeeds, but whose answer is lost
        self.hang: set[str] = set()  # names whose load gets no answer and has no effect
        self.awake = asyncio.Event()  # while it is not set, probes get no answer
        self.awake.set()
        self.running: list[str] = []
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Callable[[web.Request, dict[str, Any]], Any] | None = None
        self.cancelled = 0
        self.start_time = 1000.0

    def restart(self) -> None:
        self.adapters.clear()
        self.start_time += 1

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 25)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        return app

    def error(self, status: int, message: str, kind: str = "BadRequest", param: str | None = None) -> web.Response:
        error = {"message": message, "type": kind, "param": param, "code": status}
        return web.json_response({"object": "error", **error} if self.flat_errors else {"error": error}, status=status)

    async def _health(self, _: web.Request) -> web.Response:
        await self.awake.wait()
        return web.Response(status=200 if self.healthy else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        running = ",".join(self.running)
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{model_name="base"}} {len(self.running)}',
            "# TYPE vllm:lora_requests_info gauge",
            'vllm:lora_requests_info{max_lora="4",running_lora_adapters="old--one--000000000000",'
            'waiting_lora_adapters=""} 5.0',
            f'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{running}",'
            f'waiting_lora_adapters=""}} {time.time()}',
            "# TYPE process_start_time_seconds gauge",
            f"process_start_time_seconds {self.start_time}",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _models(self, _: web.Request) -> web.Response:
        cards = [{"id": self.base, "root": "/models/base", "parent": None}]
        cards += [{"id": name, "root": path, "parent": self.base} for name, path in self.adapters.items()]
        return web.json_response({"object": "list", "data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        self.calls.append(f"load {name}")
        if name in self.hang:
            await asyncio.Event().wait()
        if name in self.refuse:
            return self.error(*self.refuse[name])
        if name in self.adapters:
            return self.error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        self.adapters[name] = path
        if name in self.forget_answer:
            self.forget_answer.remove(name)
            break_off(request)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if name in self.keep:
            return self.error(500, "unload failed", "InternalServerError")
        if self.adapters.pop(name, None) is None:
            return self.error(self.unknown_status, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        try:
            if self.answer is not None:
                made: web.StreamResponse = await self.answer(request, body)
                return made
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if body["model"] != self.base and body["model"] not in self.adapters:
            return self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        return web.json_response({"id": "c1", "model": body["model"], "choices": [{"text": "hi"}]})
