"""How long no operator works when the leader of two ends: by SIGTERM, by kill -9, and during a rolling upgrade.

Jobs are created every STEP seconds meanwhile. The value is the longest time from the creation of one of them to its Job.
"""

import asyncio
import json
import signal
import statistics
import time
from collections.abc import Callable

from testbed.shell import tail, wait_for
from worlds.cluster.operator_process import RIGHTS, OperatorProcess, from_chart, new_operator

from benchmarks.operator.bed import Bed, bed
from benchmarks.operator.goals import Goal
from benchmarks.operator.wire import Arrivals, Wire

STEP = 0.5  # seconds between two jobs
CALM = 10.0  # seconds of a comparison without a hand-over
LONGEST = 60.0  # seconds
NAMESPACE = "handover"


class Candidates:
    """The operators that elect a leader."""

    def __init__(self, made: Bed) -> None:
        self.made = made
        self.running: list[OperatorProcess] = []
        self._started = 0

    def start(self, number: int = 1) -> None:
        """Start operators, and wait until their probes answer: from then on they can take over."""
        for _ in range(number):
            self._started += 1
            folder = self.made.plane.state / f"candidate-{self._started}"
            folder.mkdir()
            one = new_operator(folder, self.made.operator.kubeconfig, self.made.s3)
            one.environment = {"GRAFT_LEASE": "graft-operator"}
            one.launch()
            self.running.append(one)
        for one in self.running:
            wait_for(one.healthy, LONGEST, "the operator is healthy", lambda log=one.log: tail(log))  # type: ignore[misc]

    def leader(self) -> OperatorProcess:
        """Wait until an operator leads. Return it."""

        def leading() -> list[OperatorProcess]:
            return [one for one in self.running if one.process is not None and one.leads()]

        wait_for(leading, LONGEST, "an operator leads", lambda: "\n".join(tail(one.log) for one in self.running))
        return leading()[0]

    def end_leader(self, number: signal.Signals) -> float:
        """End the leader. Return the seconds from the signal until another operator says that it leads."""
        one = self.leader()
        self.running.remove(one)
        began = time.monotonic()
        one.end(number)
        self.leader()
        return time.monotonic() - began

    def roll(self) -> float:
        """Replace both operators as the chart's Deployment does: a new one first, then an old one ends. Return seconds."""
        began = time.monotonic()
        for _ in range(2):
            self.start()
            self.end_leader(signal.SIGTERM)
        return time.monotonic() - began


def measure(options: dict[str, int]) -> list[Goal]:
    """Return the goals of hand-overs."""
    with bed() as made:
        manifest = made.plane.state / "rights-of-two.json"
        rights = from_chart(RIGHTS, operator__replicas="2")
        manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": rights}))
        made.plane.kubectl("apply", "-f", str(manifest))
        made.operator.stop()
        candidates = Candidates(made)
        try:
            candidates.start(2)
            found = asyncio.run(_rounds(candidates, options["rounds"]))
        finally:
            for one in candidates.running:
                one.kill9()
        made.operator.start()  # the bed stops it
    return [
        _goal("hand-over by SIGTERM, longest wait of a new job", found["term"], 5),
        _goal("hand-over after kill -9, longest wait of a new job", found["kill"], 20),
        _goal("rolling upgrade of two operators, longest wait of a new job", found["roll"], 5),
        _goal("no hand-over, longest wait of a new job", found["calm"], None),
    ]


def _goal(name: str, rounds: list[tuple[float, float]], bound: float | None) -> Goal:
    """Return the median of the rounds. `detail` has all of them."""
    waits = [round(wait, 2) for wait, _ in rounds]
    detail = {
        "waits": waits,
        "largest": max(waits),
        "seconds until another leads": [round(led, 2) for _, led in rounds],
    }
    return Goal(name, statistics.median(waits), bound, "s", detail=detail)


def _nothing() -> float:
    time.sleep(CALM)  # what is measured is the time itself
    return 0.0


async def _rounds(candidates: Candidates, rounds: int) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {"term": [], "kill": [], "roll": []}
    made = candidates.made
    async with Wire(made.plane.server, made.plane.state / "pki") as wire:
        arrivals = Arrivals(wire)
        await arrivals.opened.wait()
        await asyncio.to_thread(candidates.leader)
        await _during(made, wire, arrivals, "warm", lambda: 0.0)  # the key is issued
        found["calm"] = [await _during(made, wire, arrivals, "calm", _nothing)]
        for number in range(rounds):
            for what, how in (("term", signal.SIGTERM), ("kill", signal.SIGKILL)):
                name = f"{what}-{number}"
                found[what].append(
                    await _during(made, wire, arrivals, name, lambda how=how: candidates.end_leader(how))  # type: ignore[misc]
                )
                await asyncio.to_thread(candidates.start)
            found["roll"].append(await _during(made, wire, arrivals, f"roll-{number}", candidates.roll))
            print(
                f"  round {number + 1}/{rounds}: " + ", ".join(f"{k} {v[-1][0]:.1f} s" for k, v in found.items()),
                flush=True,
            )
            await wire.delete_jobs(NAMESPACE)
        arrivals.stop()
    return found


async def _during(
    made: Bed, wire: Wire, arrivals: Arrivals, name: str, act: Callable[[], float]
) -> tuple[float, float]:
    """Create jobs during an act and a second longer. Return the longest wait, and what the act returns (seconds)."""
    created: dict[str, float] = {}
    acting = asyncio.create_task(asyncio.to_thread(act))
    last = float("inf")
    while time.monotonic() < last:
        at = time.monotonic()
        job = await wire.create(made.queued(NAMESPACE, f"{name}-{len(created)}"))
        created[job["metadata"]["uid"]] = at
        await asyncio.sleep(max(0.0, STEP - (time.monotonic() - at)))
        if acting.done():
            last = min(last, time.monotonic() + 1)
    missing = len(created) - len(await arrivals.of(created, LONGEST))
    if missing:
        raise RuntimeError(f"{name}: {missing} of {len(created)} jobs have no Job after {LONGEST:.0f} s")
    return max(arrivals.at[uid] - at for uid, at in created.items()), await acting
