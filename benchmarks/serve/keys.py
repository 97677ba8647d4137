"""Compare streams through the gateway with and without keys, and with TLS.

Each side has a gateway of its own and an engine that streams tokens without a model (tokens.py). The rounds are interleaved.
The client is this process. CPU time is that of gateway and engine together, for each token.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from aiohttp import web
from graft.contracts.enginekeys import GATEWAY_KEYS, deployment_key, fingerprint, new_key
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.mounts import CALLERS_FILE, CERTIFICATE_FILE, PRIVATE_KEY_FILE
from graft_server.agent.engine.access import Access
from testbed.controlplane import free_port
from testbed.shell import tail, wait_for
from worlds.serving import FakeKube, listening

from benchmarks.train.results import show, spread, verdict, write

MOST = 1.1  # CPU time per token with keys, compared with none
TOKENS, REQUESTS = 2000, 5  # of one round
UID = "uid-of-the-deployment"
BASE = "tiny"
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Side:
    """One gateway in front of one engine."""

    name: str
    processes: list[int]  # ids
    port: int  # of the gateway

    def cpu(self) -> float:
        """Return the seconds of CPU time that gateway and engine have used."""
        lines = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in self.processes]
        return sum(int(fields[11]) + int(fields[12]) for fields in lines) / TICK

    def round(self) -> dict[str, float]:
        """Stream answers one after the other. Return CPU seconds per token and the median latencies in seconds."""
        first, whole, tokens, before = [], [], 0, self.cpu()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps(
            {
                "model": "team-a/base",
                "prompt": "What do you sell?",
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "stream": True,
            }
        )
        for _ in range(REQUESTS):
            began = time.perf_counter()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            line = answer.readline()
            first.append(time.perf_counter() - began)
            tokens += line.count(b"data: {") + answer.read().count(b"data: {")
            whole.append(time.perf_counter() - began)
        connection.close()
        assert tokens >= TOKENS * REQUESTS
        return {
            "cpuPerToken": (self.cpu() - before) / tokens,
            "firstToken": statistics.median(first),
            "answer": statistics.median(whole),
        }


@contextmanager
def side(name: str, folder: Path, *, keys: bool, tls: bool = False, path: str | None = None) -> Iterator[Side]:
    """Start an engine and a gateway. `path`: PYTHONPATH of another checkout whose gateway runs."""
    folder.mkdir()
    root, engine_port, port = new_key().encode(), free_port(), free_port()
    access = Access(folder / "access", tls=tls)
    access.admit([fingerprint(deployment_key(root, UID))])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "KUBECONFIG": str(folder / "kubeconfig")}
    environment |= {} if path is None else {"PYTHONPATH": path}
    flags = ["--callers", str(folder / "access" / CALLERS_FILE)] if keys else []
    if tls:
        flags += ["--ssl-certfile", str(folder / "access" / CERTIFICATE_FILE)]
        flags += ["--ssl-keyfile", str(folder / "access" / PRIVATE_KEY_FILE)]
    kube = FakeKube()
    table = Routes(
        namespace="team-a", deployment="dep", uid=UID if keys else None, base_model=BASE,
        routes=[RouteEntry(model="team-a/base", targets=[RouteTarget(engine_model=BASE)])],
        backends=[
            Backend(pod="p", address=f"127.0.0.1:{engine_port}", loaded=[BASE], certificate=access.certificate)
        ],
    )  # fmt: skip
    kube.put("routes", {ROUTES_KEY: table.json_text()}, {"graft.dev/component": "routes"})
    kube.put(GATEWAY_KEYS, {"a.key": base64.b64encode(root).decode()})
    with ExitStack() as stack:
        address = stack.enter_context(_listening(kube.app()))
        cluster = {"name": "c", "cluster": {"server": f"http://{address}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "c"}}
        (folder / "kubeconfig").write_text(
            json.dumps({
                "apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [cluster], "contexts": [context], "users": [{"name": "c", "user": {"token": "t"}}],
            })
        )  # fmt: skip
        engine = stack.enter_context(
            _process(["benchmarks.serve.tokens", "--port", str(engine_port), *flags], os.environ, folder / "engine.log")
        )
        gateway = ["graft_server.gateway", "--namespace", "graft-system", "--port", str(port)]
        process = stack.enter_context(_process(gateway, environment, folder / "gateway.log"))
        made = Side(name, [process.pid, engine.pid], port)
        wait_for(lambda: _ready(made), 120, f"{name} answers", lambda: tail(folder / "engine.log"))
        yield made


def _ready(made: Side) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{made.port}/readyz", timeout=5):
            return made.round()["answer"] > 0
    except (OSError, AssertionError):
        return False


@contextmanager
def _process(arguments: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "-m", *arguments], env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(90)


@contextmanager
def _listening(app: web.Application) -> Iterator[str]:
    """Serve an application on a local port, for callers without an event loop. Yield its address as host:port."""
    loop, stop, found = asyncio.new_event_loop(), asyncio.Event(), Queue[str]()

    async def serve() -> None:
        async with listening(app) as address:
            found.put(address)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        yield found.get(timeout=30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def compare(sides: list[Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return side -> measure -> one value per round. In each round, every side has its turn."""
    found: dict[str, dict[str, list[float]]] = {each.name: {} for each in sides}
    for number in range(rounds):
        for each in sides if number % 2 == 0 else reversed(sides):
            for what, value in each.round().items():
                found[each.name].setdefault(what, []).append(value)
        print(f"  round {number + 1}/{rounds}", flush=True)
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Measure all sides. Return the results."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        sides = [
            stack.enter_context(side("no keys", folder / "none", keys=False)),
            stack.enter_context(side("keys", folder / "keys", keys=True)),
            stack.enter_context(side("keys and TLS", folder / "tls", keys=True, tls=True)),
        ]
        found = compare(sides, rounds)
    middle = {name: {what: statistics.median(values) for what, values in its.items()} for name, its in found.items()}
    value = middle["keys"]["cpuPerToken"] / middle["no keys"]["cpuPerToken"]
    result = {"tokens": TOKENS, "requests": REQUESTS, "rounds": found, "ratio": value, "met": value <= MOST}
    write("serve-keys", result)
    rows = [
        (f"{name}: {text}", spread([each * scale for each in its[what]]))
        for name, its in found.items()
        for what, text, scale in (
            ("cpuPerToken", "CPU of gateway and engine per token, µs", 1e6),
            ("firstToken", "first token, ms", 1e3),
            ("answer", f"answer of {TOKENS} tokens, ms", 1e3),
        )
    ]
    rows.append(("CPU per token, keys / no keys", verdict(value, MOST, least=False)))
    show(f"streams of {TOKENS} tokens ({rounds} rounds of {REQUESTS})", rows)
    return result
