"""What one tenant's work and a store that hangs do to the other tenants."""

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from testbed.shell import wait_for
from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet

from benchmarks.operator.bed import Bed, bed
from benchmarks.operator.goals import Goal
from benchmarks.operator.lives import play
from benchmarks.operator.wire import Arrivals, Wire, together

NEIGHBOURS = 300  # jobs
TRAINING = 40  # jobs whose progress the operator reads from the store
HANGING = 10.0  # seconds that the store hangs before the routes change
LONGEST = 60.0  # seconds


def measure(options: dict[str, int]) -> list[Goal]:
    """Return the goals of isolation."""
    with bed() as made:
        goals = asyncio.run(_neighbours(made, options["rounds"]))
        return goals + _hanging_store(made)


async def _neighbours(made: Bed, rounds: int) -> list[Goal]:
    """Compare a tenant's new jobs with and without a neighbour's burst."""
    calm, meanwhile = list[float](), list[float]()
    async with Wire(made.plane.server, made.plane.state / "pki") as wire:
        arrivals = Arrivals(wire)
        await arrivals.opened.wait()

        async def one(namespace: str, name: str) -> float:
            began = time.monotonic()
            job = await wire.create(made.queued(namespace, name))
            seen = await arrivals.of([job["metadata"]["uid"]], LONGEST)
            return (seen[0] if seen else time.monotonic()) - began

        for namespace in ("quiet", "loud"):
            await one(namespace, "warm")  # the key is issued
        for number in range(rounds):
            calm += [await one("quiet", f"calm-{number}-{index}") for index in range(4)]
            names = [f"loud-{number}-{index:03d}" for index in range(NEIGHBOURS)]
            burst = asyncio.gather(together([partial(wire.create, made.queued("loud", name)) for name in names]))
            await asyncio.sleep(0.3)  # the burst is in the queue
            meanwhile.append(max([await one("quiet", f"busy-{number}-{index}") for index in range(4)]))
            await burst
            await wire.delete_jobs("quiet", "loud")
            print(f"  neighbour: {statistics.median(calm):.2f} s, meanwhile at most {meanwhile[-1]:.2f} s", flush=True)
        arrivals.stop()
    delay = statistics.median(meanwhile) - statistics.median(calm)
    detail = {"calm": calm, "the longest of each round": meanwhile}
    return [Goal(f"delay by {NEIGHBOURS} jobs of a neighbour", delay, 0.5, "s", detail=detail)]


def _hanging_store(made: Bed) -> list[Goal]:
    """Stop the store's process. Then pods of two tenants are no longer ready, and must leave the routes."""
    fleets = []
    for name in ("busy", "other"):
        tenant = made.tenant(name)
        play(tenant, "life", "support")
        fleet = Fleet(tenant, "chat")
        fleets.append((fleet, fleet.serve(["support@latest"], replicas=2)))
    busy = made.tenant("busy")
    for number in range(TRAINING):
        busy.job(f"training-{number}", f"training-{number}")
    for number in range(TRAINING):
        busy.progress(f"training-{number}", busy.running_pod(f"training-{number}"), stage="Training", step=1)
    with ThreadPoolExecutor(2) as users:
        calm = list(users.map(lambda each: _leaves(each[0], each[1][0]), fleets))
        with made.hanging_store():
            time.sleep(HANGING)  # reads of the store hang by now
            hanging = list(users.map(lambda each: _leaves(each[0], each[1][0]), fleets))
    print(f"  routes: {calm} s, while the store hangs {hanging} s", flush=True)
    detail = {"calm": calm, "hanging": hanging}
    return [
        Goal("routes while the store hangs, same tenant", hanging[0], 1, "s", detail=detail),
        Goal("routes while the store hangs, other tenant", hanging[1], 1, "s"),
    ]


def _leaves(fleet: Fleet, pod: Object) -> float:
    """Return the seconds until a pod that is no longer ready has left the routes. It is ready again afterwards."""
    name = pod["metadata"]["name"]

    def routed() -> bool:
        return name in [backend.pod for backend in fleet.routes().backends]

    wait_for(routed, LONGEST, "the pod is a backend")
    fleet.ready(pod, ready=False)
    began = time.monotonic()
    while routed() and time.monotonic() - began < LONGEST:
        time.sleep(0.02)
    passed = time.monotonic() - began
    fleet.ready(pod, ready=True)
    return passed
