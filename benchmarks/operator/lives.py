"""Whole lives of FineTuneJobs, from creation to the verified Adapter. The benchmark plays users and training pods."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from worlds.cluster.tenant import Tenant

from benchmarks.operator.bed import Bed, counts

PLAYERS = 6  # lives at the same time
VERSIONS = 10  # of each adapter
LIVES = "lives"  # the namespace


def play(tenant: Tenant, name: str, adapter: str) -> None:
    """Play one life. Return once the Adapter is verified."""
    tenant.until("Adapter", tenant.trained(name, adapter), "Ready", "Verified")


def batch(made: Bed, first: int, number: int) -> dict[str, Any]:
    """Play lives, and return their cost: CPU time of the operator in ms, reads and writes, each per life."""
    tenant, cost = made.tenant(LIVES), made.cost
    made.audit.skip()
    before = cost.cpu()
    with ThreadPoolExecutor(PLAYERS) as players:
        lives = [
            players.submit(play, tenant, f"life-{index:05d}", f"a{index // VERSIONS:04d}")
            for index in range(first, first + number)
        ]
        for life in lives:
            life.result()
    made.settled()
    requests = made.audit.take()
    return {
        "cpu": 1000 * (cost.cpu() - before) / number,
        "reads": sum(not one.writes for one in requests) / number,
        "writes": sum(one.writes for one in requests) / number,
        "by resource": {what: count / number for what, count in counts(requests).items()},
    }
