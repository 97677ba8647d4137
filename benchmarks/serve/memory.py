"""Compare the memory of 100 adapters in one engine with that of 100 engines with one adapter each.

Only 3 engines (ALONE) with one adapter are measured, and their mean stands for 100. Their memory is counted in two
ways. RSS includes the pages of the libraries, as if each engine had its own node. Private pages exclude the pages that
engines on one machine share, so they are the least that 100 engines can take. The worse ratio must meet the bound. The
agent beside each engine is not counted, because it adds the same to each pod.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from testbed.controlplane import free_port
from testbed.shell import tail, wait_for

from benchmarks.serve.adapters import TINY, make_adapters
from benchmarks.train.results import show, spread, verdict, write

MOST = 0.03
ADAPTERS, RANK = 100, 16
RESIDENT = 16  # adapters that stay in memory; the others are read again when a request needs them
ALONE = 3  # engines with one adapter that run at the same time


class Engine:
    """The process of one engine."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.process = port, process

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return bytes(answer.read())

    def use(self, paths: list[Path]) -> None:
        """Load the adapters, and send one request to each of them."""
        for path in paths:
            self.post("/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)})
        for path in paths:
            self.post("/v1/completions", {"model": path.name, "prompt": "What do you sell?", "max_tokens": 8})

    def memory(self) -> dict[str, int]:
        """Return the bytes of all pages (rss), and of the pages that no other process has (private)."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return {"rss": sizes["Rss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return int(answer.status) == 200
        except OSError:
            return False


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """Start an engine with the limits of a deployment, and stop it afterwards."""
    port = free_port()
    log = folder / f"engine-{port}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "graft_server.engine", "--model", str(TINY), "--port", str(port),
             "--max-loras", "8", "--max-cpu-loras", str(RESIDENT), "--max-lora-rank", "64"],
            env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "HF_HUB_OFFLINE": "1"}, stdout=out, stderr=out,
        )  # fmt: skip
    made = Engine(port, process)
    try:
        wait_for(made.answers, 120, "the engine answers", lambda: tail(log))
        yield made
    finally:
        process.terminate()
        process.wait(30)


def measure(rounds: int) -> dict[str, Any]:
    """Measure one engine with all adapters, then several engines with one adapter each, `rounds` times. Return the
    results."""
    many: list[dict[str, int]] = []
    alone: list[list[dict[str, int]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_adapters(TINY, folder, ADAPTERS, RANK)
        size = sum(path.stat().st_size for path in paths[0].iterdir())
        for number in range(rounds):
            with engine(folder) as one:
                one.use(paths)
                many.append(one.memory())
            with ExitStack() as stack:
                engines = [stack.enter_context(engine(folder)) for _ in range(ALONE)]
                for each, path in zip(engines, paths, strict=False):
                    each.use([path])
                time.sleep(0.5)
                alone.append([each.memory() for each in engines])
            print(f"  round {number + 1}/{rounds}: {many[-1]} against {alone[-1][0]} each", flush=True)
    ratios = {
        way: [
            mine["rss"] / (sum(each[way] for each in them) / ALONE * ADAPTERS)
            for mine, them in zip(many, alone, strict=True)
        ]
        for way in ("rss", "private")
    }
    middle = {way: sorted(values)[len(values) // 2] for way, values in ratios.items()}
    value = max(middle.values())
    result = {
        "adapters": ADAPTERS, "rank": RANK, "resident": RESIDENT, "adapterBytes": size, "bytes": {"together": many, "alone": alone},
        "ratios": ratios, "ratio": value, "met": value <= MOST,
    }  # fmt: skip
    write("serve-memory", result)
    mib = [mine["rss"] / 2**20 for mine in many]
    show(
        f"{ADAPTERS} adapters of {size / 1e6:.1f} MB ({rounds} rounds)",
        [
            (f"one engine with {ADAPTERS} adapters, RSS MiB", spread(mib)),
            ("one engine with 1 adapter, RSS MiB", spread([each["rss"] / 2**20 for them in alone for each in them])),
            (
                "one engine with 1 adapter, private MiB",
                spread([each["private"] / 2**20 for them in alone for each in them]),
            ),
            (f"one engine / {ADAPTERS} engines, RSS", f"{middle['rss']:.4f}"),
            (f"one engine / {ADAPTERS} engines, private pages", f"{middle['private']:.4f}"),
            ("the worse of the two ratios", verdict(value, MOST, least=False)),
        ],
    )
    return result
