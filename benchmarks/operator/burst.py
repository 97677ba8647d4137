"""Many FineTuneJobs at once: in one namespace with one adapter, over 50 namespaces, and by a bare client.

The bare client (bare.py) watches FineTuneJobs and makes the same writes for each, without a read or a decision.
"""

import asyncio
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from testbed.shell import tail, wait_for
from worlds.cluster.api import Object

from benchmarks.operator.bed import Bed, Cost, bed, counts, module
from benchmarks.operator.goals import Goal
from benchmarks.operator.wire import Arrivals, Wire, together
from benchmarks.train.results import ratio

NAMESPACES = 50
LONGEST = 90.0  # seconds of one burst, after which the rate is that of the Jobs that exist
TEMPLATE = "template-of-the-bench"


def measure(options: dict[str, int]) -> list[Goal]:
    """Return the goals of bursts."""
    with bed() as made:
        return asyncio.run(_measure(made, options["rounds"], options["jobs"]))


async def _measure(made: Bed, rounds: int, jobs: int) -> list[Goal]:
    spread = [f"many-{number}" for number in range(NAMESPACES)]
    async with Wire(made.plane.server, made.plane.state / "pki") as wire:
        for name in ["one", *spread]:
            made.tenant(name)
        await _run(made, wire, "keys", ["one", *spread], NAMESPACES + 1)  # issues the keys
        plan = await _plan(made, wire)
        found: dict[str, list[dict[str, float]]] = {"bare": [], "one": [], "many": []}
        for number in range(rounds):
            found["bare"].append(await _bare(made, wire, plan, f"b{number}", jobs))
            found["one"].append(await _run(made, wire, f"o{number}", ["one"], jobs))
            found["many"].append(await _run(made, wire, f"m{number}", spread, jobs))
            print(
                f"  round {number + 1}/{rounds}: " + ", ".join(f"{k} {v[-1]['rate']:.1f}/s" for k, v in found.items())
            )
    rates = {name: [each["rate"] for each in its] for name, its in found.items()}
    detail = {"jobs": jobs, "rounds": found, "writes of the bare client": plan["writes"]}
    middle = {name: statistics.median(its) for name, its in rates.items()}
    return [
        Goal("burst, one namespace / bare client", ratio(rates["one"], rates["bare"]), 0.8, least=True, detail=detail),
        Goal("burst, one namespace / 50 namespaces", ratio(rates["one"], rates["many"]), 0.9, least=True),
        Goal("burst, one namespace", middle["one"], unit="Jobs/s"),
        Goal("burst, 50 namespaces", middle["many"], unit="Jobs/s"),
        Goal("burst, bare client", middle["bare"], unit="Jobs/s"),
        Goal("burst, CPU per job", statistics.median(each["cpu"] for each in found["one"]), unit="ms"),
    ]


async def _create(made: Bed, wire: Wire, name: str, namespaces: list[str], jobs: int) -> list[Object]:
    manifests = [made.queued(namespaces[number % len(namespaces)], f"{name}-{number:04d}") for number in range(jobs)]
    return await together([partial(wire.create, manifest) for manifest in manifests])


async def _burst(made: Bed, wire: Wire, name: str, namespaces: list[str], jobs: int, cost: Cost) -> dict[str, float]:
    """Create the jobs. Return the rate of their Jobs per second, and the CPU time of the process per job in ms."""
    arrivals = Arrivals(wire)
    await arrivals.opened.wait()
    cpu, began = cost.cpu(), time.monotonic()
    uids = [item["metadata"]["uid"] for item in await _create(made, wire, name, namespaces, jobs)]
    seen = await arrivals.of(uids, LONGEST - (time.monotonic() - began))
    arrivals.stop()
    over = max(seen, default=time.monotonic()) if len(seen) == jobs else time.monotonic()
    return {
        "rate": len(seen) / (over - began),
        "jobs": len(seen),
        "cpu": 1000 * (cost.cpu() - cpu) / max(len(seen), 1),
    }


async def _run(made: Bed, wire: Wire, name: str, namespaces: list[str], jobs: int) -> dict[str, float]:
    """Let the operator handle a burst, then delete the jobs."""
    made.audit.skip()
    found = await _burst(made, wire, name, namespaces, jobs, made.cost)
    await asyncio.to_thread(made.settled)
    requests = made.audit.take()
    found |= {
        "reads": sum(not one.writes for one in requests) / jobs,
        "writes": sum(one.writes for one in requests) / jobs,
    }
    await wire.delete_jobs(*namespaces)
    await asyncio.to_thread(made.settled)
    return found


async def _plan(made: Bed, wire: Wire) -> Object:
    """Let the operator handle one job. Return the writes that it must make, as the bare client repeats them."""
    made.audit.skip()
    arrivals = Arrivals(wire)
    await arrivals.opened.wait()
    job = await wire.create(made.queued("one", TEMPLATE))
    await arrivals.of([job["metadata"]["uid"]], 60)
    arrivals.stop()
    await asyncio.to_thread(made.settled, 3)
    made_writes = counts([one for one in made.audit.take() if one.writes])
    uid = job["metadata"]["uid"]
    owned = [
        _bare_object(kind, item)
        for kind in ("ConfigMap", "NetworkPolicy", "Job")
        for item in made.api.list(kind, "one", f"graft.dev/owner-uid={uid}")
    ]
    events = [item for item in made.api.list("Event", "one") if item["involvedObject"].get("uid") == uid]
    status = made.api.get("FineTuneJob", "one", TEMPLATE)["status"]  # type: ignore[index]
    await wire.delete_jobs("one")
    steps = [
        {"merge": {"metadata": {"labels": {"bench": "x"}}}},  # the finalizer
        {"status": status},  # the version that is reserved
        *({"object": item} for item in owned),
        {"status": status | {"stage": "Queued"}},
        *({"object": _bare_object("Event", item)} for item in events),
    ]
    return {"name": TEMPLATE, "namespace": "one", "uid": uid, "steps": steps, "writes": made_writes}


def _bare_object(kind: str, item: Object) -> Object:
    """Return an object without what the API server or its controllers add."""
    metadata = {
        key: value for key, value in item["metadata"].items()
        if key in {"name", "namespace", "labels", "annotations", "ownerReferences", "finalizers"}
    }  # fmt: skip
    version = {
        "Job": "batch/v1",
        "ConfigMap": "v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "Event": "v1",
    }
    found = item | {"apiVersion": version[kind], "kind": kind, "metadata": metadata}
    found.pop("status", None)
    if kind == "Job":
        found["spec"] = {key: value for key, value in found["spec"].items() if key != "selector"}
        labels = found["spec"]["template"]["metadata"]["labels"]
        for key in ("controller-uid", "job-name", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name"):
            labels.pop(key, None)
            metadata.get("labels", {}).pop(key, None)
        metadata.pop("annotations", None)
    return found


async def _bare(made: Bed, wire: Wire, plan: Object, name: str, jobs: int) -> dict[str, float]:
    """Stop the operator, and let the bare client handle a burst."""
    made.operator.stop()
    with tempfile.TemporaryDirectory() as folder:
        path, ready, log = (Path(folder) / part for part in ("plan.json", "ready", "log"))
        path.write_text(
            json.dumps(plan | {"server": made.plane.server, "pki": str(made.plane.state / "pki"), "token": made.token})
        )
        process = module("bare", str(path), str(ready), log=log)
        try:

            def answers() -> bool:
                assert process.poll() is None, tail(log)
                return ready.exists()

            await asyncio.to_thread(wait_for, answers, 60, "the bare client watches", lambda: tail(log))
            found = await _burst(made, wire, name, ["one"], jobs, Cost(process.pid))
            assert process.poll() is None and found["jobs"] == jobs, tail(log)
        finally:
            process.terminate()
            process.wait(30)
    await wire.delete_jobs("one")
    made.operator.start()
    await asyncio.to_thread(made.settled)
    return found
