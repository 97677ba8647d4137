"""Ended jobs that users keep: 10,000 with their Jobs, ConfigMaps, NetworkPolicies and Pods, and 1,000 verified Adapters.

Measured are memory, requests without work, restarts, and how long a new job takes beside a cluster with 100 kept jobs.
"""

import asyncio
import statistics
import subprocess
import time
from contextlib import ExitStack
from typing import Any

from testbed.shell import tail, wait_for

from benchmarks.operator.bed import Bed, Cost, bed, counts, module
from benchmarks.operator.copies import fill
from benchmarks.operator.goals import Goal
from benchmarks.operator.lives import LIVES, VERSIONS, batch
from benchmarks.operator.wire import Arrivals, Wire

FEW = 100  # kept jobs of the small cluster
BATCHES = 5  # of lives
LISTED = ("FineTuneJob", "Adapter", "AdapterDeployment", "BaseModel", "Job", "Pod", "ConfigMap", "NetworkPolicy")
GAP = 5.0  # seconds without requests, after which a restart has converged
HEALTHY = 300.0  # seconds to wait for the probe after a restart


def measure(options: dict[str, int]) -> list[Goal]:
    """Return the goals with kept jobs."""
    with ExitStack() as stack:
        large = stack.enter_context(bed())
        goals = _calm(large, options["rounds"])
        goals += _lives(large, options["lives"])
        small = stack.enter_context(bed())
        batch(small, 0, 1)
        for made, number in ((small, FEW), (large, options["kept"])):
            made.operator.stop()
            fill(made, number, max(number // VERSIONS, 1))
        small.operator.start()
        _say(f"{options['kept']} kept jobs")
        goals += _restarts(large, options["rounds"])
        goals += _noop(large, options["kept"])
        goals += _idle(large, options["idle"])
        goals += _new_jobs(small, large, options["rounds"])
    return goals


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def _latencies(made: Bed, name: str, count: int) -> list[float]:
    """Create jobs one after the other. Return the seconds from creation to Job of each. The jobs are deleted."""

    async def run() -> list[float]:
        found = []
        async with Wire(made.plane.server, made.plane.state / "pki") as wire:
            arrivals = Arrivals(wire)
            await arrivals.opened.wait()
            for number in range(count):
                began = time.monotonic()
                job = await wire.create(made.queued(LIVES, f"{name}-{number}", "new"))
                seen = await arrivals.of([job["metadata"]["uid"]], 60)
                found.append((seen[0] if seen else time.monotonic()) - began)
                await asyncio.to_thread(made.delete_job, LIVES, f"{name}-{number}")
            arrivals.stop()
        return found

    return asyncio.run(run())


def _calm(made: Bed, rounds: int) -> list[Goal]:
    _latencies(made, "warm", 2)  # the namespace's key is issued
    found = [1000 * value for value in _latencies(made, "calm", 10 * rounds)]
    _say(f"create to Job: {statistics.median(found):.1f} ms")
    return [Goal("create to Job, idle, median", statistics.median(found), 25, "ms", detail={"all": found})]


def _lives(made: Bed, lives: int) -> list[Goal]:
    size = max(lives // BATCHES, 1)
    found: list[dict[str, Any]] = [batch(made, number * size, size) for number in range(BATCHES)]
    middle = {what: statistics.median(each[what] for each in found) for what in ("cpu", "reads", "writes")}
    _say(f"{size * BATCHES} lives: {middle}")
    return [
        Goal("CPU per finished job", middle["cpu"], 25, "ms", detail={"batches": found}),
        Goal("reads per finished job", middle["reads"]),
        Goal("writes per finished job", middle["writes"]),
    ]


def _list_everything(made: Bed) -> float:
    """Return the seconds in which a bare client reads and parses everything, page by page."""

    async def run() -> float:
        began = time.monotonic()
        async with Wire(made.plane.server, made.plane.state / "pki") as wire:
            for kind in LISTED:
                async for _ in wire.pages(kind):
                    pass
        return time.monotonic() - began

    return asyncio.run(run())


def _restart(made: Bed, number: int) -> dict[str, float]:
    """Kill and start the operator, and create a job meanwhile. Return seconds and MiB."""
    listed = _list_everything(made)
    began = time.time()
    made.operator.kill9()
    made.audit.skip()

    async def run() -> tuple[float, float]:
        async with Wire(made.plane.server, made.plane.state / "pki") as wire:
            arrivals = Arrivals(wire)
            await arrivals.opened.wait()
            job = await wire.create(made.queued(LIVES, f"meanwhile-{number}", "new"))
            made.operator.launch()
            await asyncio.to_thread(
                wait_for, made.operator.healthy, HEALTHY, "the operator is healthy", lambda: tail(made.operator.log)
            )
            healthy = time.monotonic()
            seen = await arrivals.of([job["metadata"]["uid"]], 300)
            arrivals.stop()
            return healthy, seen[0] if seen else time.monotonic()

    healthy, seen = asyncio.run(run())
    converged = made.settled(GAP, reads=True) - began
    requests = made.audit.take()
    now, most = made.cost.memory()
    found = {
        "list": listed, "converged": converged, "job": max(seen - healthy, 0.0), "healthy": healthy - time.monotonic() + time.time() - began,
        "reads": sum(not one.writes for one in requests), "writes": sum(one.writes for one in requests),
        "memory": now, "peak": most, "cpu": made.cost.cpu(),
    }  # fmt: skip
    made.delete_job(LIVES, f"meanwhile-{number}")  # the garbage collector's time is not the operator's
    made.settled(GAP, reads=True)
    _say("restart: " + ", ".join(f"{what} {value:.1f}" for what, value in found.items()))
    return found


def _restarts(made: Bed, rounds: int) -> list[Goal]:
    made.operator.launch()
    made.settled(GAP, 600, reads=True)
    found = [_restart(made, number) for number in range(rounds)]
    ratio = statistics.median(each["converged"] / each["list"] for each in found)
    peak = statistics.median(each["peak"] for each in found)
    return [
        Goal("kill -9 to converged / one LIST of everything", ratio, 3, detail={"rounds": found}),
        Goal("job created meanwhile, after healthy", statistics.median(each["job"] for each in found), 1, "s"),
        Goal("memory with kept jobs, peak", peak, 256, "MiB"),
        Goal("memory with kept jobs, after the start", statistics.median(each["memory"] for each in found), unit="MiB"),
    ]


def _noop(made: Bed, kept: int) -> list[Goal]:
    """Return the memory of a kopf operator that does nothing."""
    ready, log = made.plane.state / "noop.ready", made.plane.state / "noop.log"
    environment = {"KUBECONFIG": str(made.plane.kubeconfig), "NOOP_OBJECTS": str(kept), "NOOP_READY": str(ready)}
    process: subprocess.Popen[bytes] = module("noop", environment=environment, log=log)
    try:
        wait_for(ready.exists, 300, "the no-op operator has seen all jobs", lambda: tail(log))
        now, most = Cost(process.pid).memory()
    finally:
        process.terminate()
        process.wait(60)
    return [Goal("memory of a no-op kopf operator, peak", most, unit="MiB", detail={"after the start": now})]


def _idle(made: Bed, seconds: int) -> list[Goal]:
    made.settled(GAP, reads=True)
    made.audit.skip()
    before = made.cost.cpu()
    time.sleep(seconds)  # what is measured is the time itself
    requests, used = made.audit.take(), made.cost.cpu() - before
    writes = sum(one.writes for one in requests)
    return [
        Goal("idle, requests", len(requests) / seconds, 1, "1/s", detail={"seconds": seconds, "all": counts(requests)}),
        Goal("idle, writes", writes, 0),
        Goal("idle, CPU", 100 * used / seconds, unit="%"),
    ]


def _new_jobs(small: Bed, large: Bed, rounds: int) -> list[Goal]:
    found: dict[str, list[float]] = {"few": [], "many": []}
    _latencies(small, "warm", 2)
    for number in range(rounds):
        for what, made in (("few", small), ("many", large)):
            found[what] += _latencies(made, f"new-{number}", 20)
    late = {what: statistics.quantiles(values, n=100)[98] for what, values in found.items()}
    middle = {what: statistics.median(values) for what, values in found.items()}
    detail = {"seconds": found, "median": middle, "p99": late}
    _say(f"new jobs: median {middle}, p99 {late}")
    return [
        Goal("new job with many kept / with few, p99", late["many"] / late["few"], 1.5, detail=detail),
        Goal("new job with many kept / with few, median", middle["many"] / middle["few"]),
    ]
