"""Churn for a long time, and check that nothing grows: `python -m benchmarks.operator.soak --minutes 60`.

Users create, change and delete jobs and deployments beside 1,000 kept jobs. In the first half the operator is killed
again and again, and all the time it is cut off from the cluster now and then. Its memory, its file descriptors and the
age of its watches are sampled every few seconds, and the time from the creation of a job to its Job at each job. A line
is fitted to the samples of the second half, in which the operator is not killed. Its rise must stay below a bound. The
result is build/bench/soak.json.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testbed.shell import Failed, meanwhile, tail
from worlds.cluster.fleet import Fleet

from benchmarks.operator.bed import Bed, bed
from benchmarks.operator.copies import fill
from benchmarks.operator.goals import Goal, verdicts
from benchmarks.operator.lives import LIVES, batch, play
from benchmarks.train.results import show, write

KEPT = 1000  # jobs
CHURNING = 4  # users at the same time
EVERY = 2.0  # seconds between two samples
CUT = (5.0, 20.0)  # seconds for which the operator is cut off
SETTLING = 60.0  # seconds of the second half at most that are not judged: caches fill
SEED = 7
WATCH_AGE, START = 150.0, 60.0  # seconds; bookmarks come about every minute


class Samples:
    """What the operator shows about itself: measure -> (seconds since the start, value)."""

    def __init__(self, made: Bed) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}
        self._made = made
        self.began = time.monotonic()

    def take(self) -> None:
        """Take one sample, unless the operator is down."""
        process = self._made.operator.process
        if process is None:
            return
        try:
            values = {
                "memory, MiB": self._made.cost.memory()[0],
                "file descriptors": float(sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())),
                "watch age, s": max(self._ages().values(), default=0.0),
            }
        except OSError:
            return  # it was killed meanwhile, it is cut off, or its probe fails
        for what, value in values.items():
            self.add(what, value)

    def _ages(self) -> dict[str, float]:
        """Return the ages of the watches, from the operator's probe: kind -> seconds since the last sign of life."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._made.operator.health_port}/healthz", timeout=5) as answer:
            return dict(json.load(answer)["watches"])

    def add(self, what: str, value: float) -> None:
        self.found.setdefault(what, []).append((time.monotonic() - self.began, value))

    def growth(self, what: str, since: float) -> tuple[float, float]:
        """Return by how much the fitted line rises from `since` to the end, and the median."""
        samples = [(at, value) for at, value in self.found.get(what, []) if at >= since]
        if len(samples) < 3:
            raise Failed(f"only {len(samples)} samples of {what}")
        slope = statistics.linear_regression(*zip(*samples, strict=True)).slope
        return slope * (samples[-1][0] - since), statistics.median(value for _, value in samples)


class Churn:
    """Users, and what happens to the operator. `over` ends them."""

    def __init__(self, made: Bed, samples: Samples) -> None:
        self.made = made
        self._samples = samples
        self.over = threading.Event()
        self.done: dict[str, int] = {}
        self._chance = random.Random(SEED)

    def user(self, number: int) -> None:
        """Create, change and delete resources until the end."""
        tenant, chance, count = self.made.tenant(f"user-{number}"), random.Random(SEED + number), 0
        actions: list[Callable[[str], None]] = [self._queued, self._trained, self._deployed, self._kept]
        while not self.over.is_set():
            count += 1
            action = chance.choice(actions)
            action(f"{tenant.name}/job-{count}")
            self.done[action.__name__.strip("_")] = self.done.get(action.__name__.strip("_"), 0) + 1

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

    def storms(self, minutes: float) -> None:
        """Kill the operator in the first half, and cut it off all the time. Return at the end."""
        began, half = time.monotonic(), minutes * 30
        while (passed := time.monotonic() - began) < 2 * half:
            if passed < half and self._chance.random() < 0.5:
                self.made.operator.kill9()
                self.made.operator.start()
                self.done["kills"] = self.done.get("kills", 0) + 1
            else:
                self._cut_off(self._chance.uniform(*CUT))
                self.done["cuts"] = self.done.get("cuts", 0) + 1
            self.over.wait(min(max(half / 8, 10.0), max(2 * half - (time.monotonic() - began), 0.1)))

    def _cut_off(self, seconds: float) -> None:
        """Stop the operator's process for some time: watches lag, and connections break."""
        process = self.made.operator.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            self.over.wait(seconds)
        finally:
            process.send_signal(signal.SIGCONT)


def soak(minutes: float) -> list[Goal]:
    """Churn for some minutes. Return the goals."""
    with bed() as made:
        batch(made, 0, 1)
        fill(made, KEPT)
        for number in range(CHURNING):
            play(made.tenant(f"user-{number}"), "first", "support")
        samples = Samples(made)
        churn = Churn(made, samples)
        with meanwhile(lambda _: samples.take(), EVERY), ThreadPoolExecutor(CHURNING) as users:
            running = [users.submit(churn.user, number) for number in range(CHURNING)]
            try:
                churn.storms(minutes)
            finally:
                churn.over.set()
            for each in running:
                each.result()
        errors = made.operator.log.read_text(errors="replace").count('"level": "error"')
        return _judge(samples, minutes * 60, churn.done, errors)


def _judge(samples: Samples, seconds: float, done: dict[str, int], errors: int) -> list[Goal]:
    since = seconds / 2 + min(SETTLING, seconds / 8)
    goals = []
    for what, share, least in (("memory, MiB", 0.1, 8.0), ("file descriptors", 0.1, 10.0)):
        growth, middle = samples.growth(what, since)
        bound = max(share * middle, least)
        goals.append(
            Goal(f"growth of {what}", growth, bound, detail={"median": middle, "samples": samples.found[what]})
        )
    for what, bound in (("create to Job, s", START), ("watch age, s", WATCH_AGE)):
        growth, _ = samples.growth(what, since)
        late = [value for at, value in samples.found[what] if at >= since]
        goals.append(Goal(f"most {what}", max(late), bound, detail={"samples": samples.found[what]}))
        goals.append(Goal(f"growth of {what}", growth, bound / 2))
    goals.append(Goal("errors in the operator's log", errors))
    goals.append(Goal("actions", sum(done.values()), 1, least=True, detail=dict(done)))
    return goals


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    goals = soak(minutes)
    write("soak", {"minutes": minutes, "load": os.getloadavg(), "goals": verdicts(goals)})
    show(f"soak of {minutes:g} minutes", [(goal.name, goal.line()) for goal in goals])
    return 0 if all(goal.met is not False for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
