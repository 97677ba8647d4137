"""Decide which replica must have which adapters, write this for the agents, and report shortages in the status (PURE).

The assignment is stored in the wanted message itself. The next reconcile starts from it, so that only adapters that
must move are moved. As in every other change, an adapter leaves the gateway's routes before it is removed from a
replica.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from graft.api import Adapter, AdapterDeployment
from graft.api.quantity import binary
from graft.contracts.agent import Wanted, WantedAdapter
from graft.contracts.gateway import Backend, Routes
from graft.placement.replicaroom import Remedies, enough, remedies
from graft.placement.replicas import Capacity, Item, ReplicaPod, plan
from graft.reconcile.adapterdeployment.serving import ReplicaView

SHOWN = 5  # most adapters that a message names


def assign(
    wanted: Wanted,
    deployment: AdapterDeployment,
    resolved: Collection[WantedAdapter],
    adapters: Iterable[Adapter],
    replicas: list[ReplicaView],
    previous: Wanted | None,
) -> Wanted:
    """Return what is wanted. If not every adapter fits on each replica, it names the replicas of each adapter."""
    found = plan(
        items(wanted, resolved, adapters),
        [
            ReplicaPod(item.pod, item.ready, item.in_state("Loaded"), item.in_state("Draining"), item.unfit)
            for item in replicas
        ],
        capacity(deployment),
        _previous(wanted, previous, replicas),
    )
    homes = found.homes
    adapters_told = [
        item.model_copy(update={"pods": None if homes is None else list(homes[item.engine_name])})
        for item in wanted.adapters  # an older version that is kept names its present replicas
    ]
    assigned = None if homes is None else sorted(replica.pod for replica in replicas)
    return wanted.model_copy(update={"adapters": adapters_told, "assigned": assigned})


def capacity(deployment: AdapterDeployment) -> Capacity:
    """Return how many adapters and bytes, and which rank, one replica can hold."""
    limits = deployment.spec.limits
    return Capacity(limits.adapters_per_replica, limits.adapter_bytes, limits.max_lora_rank)


def items(wanted: Wanted, resolved: Collection[WantedAdapter], adapters: Iterable[Adapter]) -> list[Item]:
    """Return the wanted adapters in the order of spec.adapters, then the older versions that still answer."""
    known = {adapter.metadata.name: adapter.status for adapter in adapters}
    order = {item.engine_name: number for number, item in enumerate(resolved)}

    def one(item: WantedAdapter) -> Item:
        status = known.get(item.adapter)
        return Item(
            item.engine_name,
            bytes=(status.size_bytes if status else None) or 0,
            rank=(status.rank if status else None) or 0,
            leaving=item.engine_name not in order,
        )

    return [one(item) for item in sorted(wanted.adapters, key=lambda item: order.get(item.engine_name, len(order)))]


def _previous(wanted: Wanted, previous: Wanted | None, replicas: list[ReplicaView]) -> Mapping[str, Collection[str]]:
    """Return where each adapter was assigned so far. If that is not known, return where it is loaded."""
    told = {item.engine_name: item for item in (previous.adapters if previous else [])}
    return {
        item.engine_name: [
            replica.pod
            for replica in replicas
            if (
                told[item.engine_name].is_for(replica.pod)
                if item.engine_name in told
                else item.engine_name in replica.in_state("Loaded")
            )
        ]
        for item in wanted.adapters
    }


def leave_out_moved(routes: Routes, wanted: Wanted) -> Routes:
    """Return the routes without the replicas that an adapter is about to leave, if other replicas answer for it."""
    meant = {item.engine_name: item for item in wanted.adapters}

    def stays(backend: Backend, name: str) -> bool:
        item = meant.get(name)
        if item is None or item.is_for(backend.pod):
            return True
        return not any(name in other.loaded and item.is_for(other.pod) for other in routes.backends)

    backends = [
        backend.model_copy(update={"loaded": [name for name in backend.loaded if stays(backend, name)]})
        for backend in routes.backends
    ]
    return routes.model_copy(update={"backends": backends})


@dataclass(frozen=True)
class Shortage:
    """Adapters that are on too few replicas.

    `passing`: the planned replicas are enough, so the shortage ends by itself.
    """

    message: str
    passing: bool


def shortage(
    deployment: AdapterDeployment,
    wanted: Wanted,
    resolved: Collection[WantedAdapter],
    adapters: Iterable[Adapter],
    pods: Collection[str],
    planned: int,
) -> Shortage | None:
    """Return which adapters do not fit on the present replicas, and what would help.

    `planned`: the intended number of replicas.
    """
    if wanted.assigned is None:
        return None
    placed = {item.engine_name: sum(pod in pods for pod in item.pods or ()) for item in wanted.adapters}
    names = {item.engine_name: item.adapter for item in wanted.adapters}
    each = items(wanted, resolved, adapters)
    short = [item for item in each if not item.leaving and placed[item.name] < item.copies(len(pods))]
    if not short:
        return None
    there = f"{len(pods)} replica{'s' if len(pods) > 1 else ''}"
    replicas, limits = max(len(pods), planned), capacity(deployment)
    lacking = [
        f"{names[item.name]} has no room on {there}"
        if placed[item.name] == 0
        else f"{names[item.name]} is on {placed[item.name]} replica instead of {item.copies(len(pods))}"
        for item in short[:SHOWN]
    ]
    more = [f"and {len(short) - SHOWN} others"] if len(short) > SHOWN else []
    changing = " (older versions count until the new ones answer)" if any(item.leaving for item in each) else ""
    found = remedies(each, replicas, limits)
    return Shortage(
        message=f"{', '.join(lacking + more)}{changing}: {_remedy(found, deployment)}",
        passing=enough(each, replicas, limits),
    )


def _remedy(found: Remedies, deployment: AdapterDeployment) -> str:
    ways = []
    autoscaling = deployment.spec.autoscaling
    if found.replicas is not None and autoscaling is None:
        ways.append(f"spec.replicas to {found.replicas}")
    elif found.replicas is not None and autoscaling is not None:
        most = (
            f" and spec.autoscaling.maxReplicas to {found.replicas}"
            if found.replicas > autoscaling.max_replicas
            else ""
        )
        ways.append(f"spec.autoscaling.minReplicas to {found.replicas}{most}")
    if found.adapters is not None:
        ways.append(f"spec.limits.adaptersPerReplica to {found.adapters}")
    if found.bytes is not None:
        ways.append(f"spec.limits.adapterBytesPerReplica to {binary(found.bytes)}")
    if found.both is not None:
        slots, size = found.both
        ways.append(
            f"spec.limits.adaptersPerReplica to {slots} and spec.limits.adapterBytesPerReplica to {binary(size)}"
        )
    return ", or ".join([f"raise {way}" for way in ways] + ["list fewer adapters in spec.adapters"])
