"""Churn for a long time, and check that nothing grows: `python -m benchmarks.operator.soak --minutes 60`.

Users create, change and delete jobs and deployments beside 1,000 kept jobs. During the warm-up, the first third, the
operator is killed again and again. Later, and until the end, the operator, the API server or the store does not answer
for some seconds, one after the other. The operator's own metrics are sampled every few seconds, and the time from the
creation of a job to its Job at each job.

The samples after the warm-up, all of one process, are judged in blocks. A block's value is its median, so short peaks
do not count. The growth is the slope of Theil and Sen over the blocks times the judged time. The upper end of its 95 %
interval must stay below a bound: so a leak fails the run, and so does noise that could hide one. The result is
build/bench/soak.json.
"""

import argparse
import os
import random
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from scipy.stats import theilslopes
from testbed.shell import Failed, meanwhile, tail, wait_for
from worlds.cluster.api import Refused
from worlds.cluster.fleet import Fleet

from benchmarks.operator.bed import PATIENCE, Bed, bed, stopped
from benchmarks.operator.copies import fill
from benchmarks.operator.goals import Goal, verdicts
from benchmarks.operator.lives import LIVES, VERSIONS, batch, play
from benchmarks.train.results import show, write

KEPT = 1000  # jobs
CHURNING = 4  # users at the same time
THINKING = 1.0  # seconds between two actions of a user
EVERY = 2.0  # seconds between two samples
SILENCE = (5.0, 15.0)  # seconds for which a part does not answer
PAUSE = 30.0  # seconds between two silences
SEED = 7
BLOCKS = 20  # of the judged time, at most
SHORTEST = 60.0  # seconds of a block: bookmarks come about every minute, and the age of a watch rises in between
FEWEST = 8  # blocks with samples
# name of the metric -> what is shown, and by how much its blocks may grow: a share of their median, or an amount.
GROWTH = {
    "process_resident_memory_bytes": ("memory, MiB", 0.08, 0.0),
    "process_open_fds": ("file descriptors", 0.1, 5.0),
    "graft_asyncio_tasks": ("tasks", 0.1, 10.0),
    "graft_watch_age_seconds": ("watch age, s", 0.0, 60.0),
    "graft_queue_age_seconds": ("queue age, s", 0.0, 2.0),
}
MIB = 2**20
# Seconds. After the API server was silent, a watch may get no bookmark any more. Then it is opened again after 100 s, and
# the first bookmark comes up to 75 s later. A silent store may hold a reconcile until its deadline.
MOST = {"watch age, s": 180.0, "queue age, s": 60.0, "create to Job, s": 60.0}


class Samples:
    """What the operator shows about itself: measure -> (seconds since the start, value)."""

    def __init__(self, made: Bed) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}
        self._made = made
        self.began = time.monotonic()

    def take(self) -> None:
        """Take one sample, unless the operator does not answer."""
        port = self._made.operator.metrics_port
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return  # it was killed, or it is stopped
        values = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        for metric, (what, _, _) in GROWTH.items():
            found = [float(value) for name, _, value in values if name.partition("{")[0] == metric]
            self.add(what, max(found) / (MIB if metric.endswith("_bytes") else 1))

    def add(self, what: str, value: float) -> None:
        self.found.setdefault(what, []).append((time.monotonic() - self.began, value))

    def since(self, what: str, began: float) -> list[tuple[float, float]]:
        return [(at, value) for at, value in self.found.get(what, []) if at >= began]


def growth(samples: list[tuple[float, float]], began: float, ended: float) -> tuple[float, float, float, float]:
    """Return the growth from `began` to `ended` with the ends of its 95 % interval, and the median of all blocks.

    A block has the median of its samples. Raises Failed if too few blocks have samples.
    """
    width = max((ended - began) / BLOCKS, SHORTEST)
    blocks: dict[int, list[float]] = {}
    for at, value in samples:
        blocks.setdefault(int((at - began) // width), []).append(value)
    if len(blocks) < FEWEST:
        raise Failed(f"only {len(blocks)} blocks of {width:.0f} s have samples: the soak was too short")
    values = [statistics.median(values) for _, values in sorted(blocks.items())]
    slope, _, low, high = theilslopes(values, [width * (number + 0.5) for number in sorted(blocks)], 0.95)
    span = ended - began
    return float(slope) * span, float(low) * span, float(high) * span, statistics.median(values)


class Churn:
    """Users, and what happens to the operator. `over` ends them."""

    def __init__(self, made: Bed, samples: Samples) -> None:
        self.made = made
        self._samples = samples
        self.over = threading.Event()
        self.done: dict[str, int] = {}
        self.failed: list[str] = []
        self._chance = random.Random(SEED)

    def user(self, number: int) -> None:
        """Create, change and delete resources until the end."""
        tenant, chance, count = self.made.tenant(f"user-{number}"), random.Random(SEED + number), 0
        actions: list[Callable[[str], None]] = [self._queued, self._trained, self._deployed, self._kept]
        while not self.over.is_set():
            count += 1
            action, key = chance.choice(actions), f"{tenant.name}/job-{count}"
            try:
                action(key)
            except (Failed, Refused, AssertionError) as error:  # the others go on, and the samples are judged
                self.failed.append(f"{action.__name__.strip('_')} {key} at {time.strftime('%H:%M:%S')}: {error}")
                print(f"FAILED: {self.failed[-1]}", flush=True)
            else:
                self._count(action.__name__.strip("_"))
            self.over.wait(THINKING)

    def _queued(self, key: str) -> None:
        """A job that waits for a queue, and is deleted."""
        namespace, name = key.split("/")
        began = time.monotonic()
        self.made.api.create(self.made.queued(namespace, name))
        tenant = self.made.tenant(namespace)
        tenant.wait(
            lambda: self.made.api.get("Job", namespace, name), f"{key} has its Job",
            explain=lambda: f"{tenant.status('FineTuneJob', name)}\n{tail(self.made.operator.log)}",
        )  # fmt: skip
        self._samples.add("create to Job, s", time.monotonic() - began)
        self.made.delete_job(namespace, name)

    def _trained(self, key: str) -> None:
        """A job that publishes a version. The job and the version are deleted."""
        namespace, name = key.split("/")
        tenant = self.made.tenant(namespace)
        tenant.job(name, name)
        pod = tenant.running_pod(name)
        tenant.progress(name, pod, stage="Training", step=1, total_steps=2, percent=50)
        tenant.publish_as_trainer(name, pod)
        tenant.end_pod(pod)
        tenant.until("FineTuneJob", name, "Succeeded", "Published")
        tenant.until("Adapter", f"{name}-1.0.0", "Ready", "Verified")
        self.made.delete_job(namespace, name)
        tenant.api.delete("Adapter", namespace, f"{name}-1.0.0")
        tenant.gone("Adapter", f"{name}-1.0.0")

    def _deployed(self, key: str) -> None:
        """A deployment that is scaled, and deleted."""
        namespace, name = key.split("/")
        tenant = self.made.tenant(namespace)
        fleet = Fleet(tenant, name)
        fleet.deploy(["support@latest"], replicas=1)
        fleet.pods(1)
        fleet.change(replicas=2)
        fleet.pods(2)
        tenant.api.delete("AdapterDeployment", namespace, name)
        tenant.gone("AdapterDeployment", name)

    def _kept(self, key: str) -> None:
        """A user sets an annotation on a kept job."""
        job = f"kept-{self._chance.randrange(KEPT - 1):05d}"
        self.made.api.patch("FineTuneJob", LIVES, job, {"metadata": {"annotations": {"note": key}}})

    def storms(self, seconds: float, warm: float) -> None:
        """Kill the operator during the warm-up, and silence the parts until the end."""
        began = time.monotonic()
        parts = [self._cut_off, self._silent_server, self.made.hanging_store]
        kills = max(1, int(warm / 60))
        for number in range(kills):
            self.made.operator.kill9()
            self.made.operator.launch()
            wait_for(self.made.operator.healthy, PATIENCE, "it is healthy again", lambda: tail(self.made.operator.log))
            self._count("kill9")
            self.over.wait(max(began + warm * (number + 1) / kills - time.monotonic(), 0.1))
        number = 0
        while (left := began + seconds - time.monotonic()) > SILENCE[1]:
            part = parts[number % len(parts)]
            number += 1
            with part():
                self.over.wait(self._chance.uniform(*SILENCE))
            self._count(part.__name__.strip("_"))
            self.over.wait(min(PAUSE, left))

    def _count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    def _cut_off(self) -> AbstractContextManager[None]:
        """Stop the operator's process: its watches lag, and the servers may close its connections."""
        process = self.made.operator.process
        assert process is not None
        return stopped(process.pid)

    def _silent_server(self) -> AbstractContextManager[None]:
        """Stop the API server's process: for everybody, connections stay open and nothing answers."""
        return stopped(self.made.plane.processes.pid("kube-apiserver"))


def soak(minutes: float) -> list[Goal]:
    """Churn for some minutes. Return the goals."""
    seconds, warm = minutes * 60, minutes * 20
    with bed() as made:
        batch(made, 0, 1)
        fill(made, KEPT, KEPT // VERSIONS)
        for number in range(CHURNING):
            play(made.tenant(f"user-{number}"), "first", "support")
        samples = Samples(made)
        churn = Churn(made, samples)
        with meanwhile(lambda _: samples.take(), EVERY), ThreadPoolExecutor(CHURNING) as users:
            running = [users.submit(churn.user, number) for number in range(CHURNING)]
            try:
                churn.storms(seconds, warm)
            finally:
                ended = time.monotonic() - samples.began
                churn.over.set()
            for each in running:
                each.result()
        errors = made.operator.log.read_text(errors="replace").count('"level": "error"')
        return _judge(samples, warm, ended, churn, errors)


def _judge(samples: Samples, began: float, ended: float, churn: Churn, errors: int) -> list[Goal]:
    goals = []
    for what, share, least in GROWTH.values():
        found = samples.since(what, began)
        rise, low, high, middle = growth(found, began, ended)
        detail = {"growth": rise, "95 % from": low, "median": middle, "samples": samples.found[what]}
        goals.append(Goal(f"growth of {what}, upper end", high, max(share * middle, least), detail=detail))
    for what, bound in MOST.items():
        found = samples.since(what, began)
        goals.append(Goal(f"most {what}", max(value for _, value in found), bound, detail={"samples": found}))
    goals.append(Goal("errors in the operator's log", errors))
    goals.append(Goal("actions", sum(churn.done.values()), 1, least=True, detail=dict(churn.done)))
    goals.append(Goal("failed actions", len(churn.failed), 0, detail={"all": churn.failed}))
    return goals


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="at least 15")
    minutes = parser.parse_args().minutes
    goals = soak(minutes)
    write("soak", {"minutes": minutes, "load": os.getloadavg(), "goals": verdicts(goals)})
    show(f"soak of {minutes:g} minutes", [(goal.name, _line(goal)) for goal in goals])
    return 0 if all(goal.met is not False for goal in goals) else 1


def _line(goal: Goal) -> str:
    """Return the goal's line, with the growth itself and the median."""
    if "median" not in goal.detail:
        return goal.line()
    shown = {what: f"{goal.detail[what]:.3g}" for what in ("growth", "95 % from", "median")}
    return goal.line() + "".join(f", {what} {value}" for what, value in shown.items())


if __name__ == "__main__":
    sys.exit(main())
