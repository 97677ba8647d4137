"""What an AdapterDeployment should have loaded, and where its routes lead (PURE).

The order of a change: load -> seen loaded -> shift traffic -> drain -> unload. An adapter's engine name holds its digest, so old and new
version are two names and can be loaded side by side:
- `wanted` names what is resolved now, and what routes still lead to;
- a route moves to the new version when every ready replica that is to have it has it (or the old one is loaded nowhere);
- what no route leads to any more leaves `wanted`, and the agents drain and unload it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from graft.api import Adapter, AdapterDeployment
from graft.api.adapterdeployment import Route
from graft.api.meta import Condition
from graft.contracts import (
    AdapterState,
    Backend,
    Residency,
    RouteEntry,
    Routes,
    RouteTarget,
    Wanted,
    WantedAdapter,
    engine_name,
)
from graft.reconcile.versions import matches, parse
from graft.status import find


@dataclass(frozen=True)
class Resolution:
    """What an entry of spec.adapters stands for."""

    ref: str
    adapter: Adapter | None
    reason: str = ""
    message: str = ""

    @property
    def name(self) -> str:
        return self.ref.partition("@")[0]


@dataclass(frozen=True)
class ReplicaView:
    """One serving pod: from the API its address and readiness, from its agent what is loaded."""

    pod: str
    address: str
    ready: bool
    residency: Residency | None

    def in_state(self, state: AdapterState) -> frozenset[str]:
        """The adapters that its agent says are in a state."""
        adapters = self.residency.adapters if self.residency else []
        return frozenset(item.engine_name for item in adapters if item.state == state)

    def has(self, engine_model: str) -> bool:
        """Whether a request for the adapter can go there."""
        states = {item.engine_name: item.state for item in (self.residency.adapters if self.residency else [])}
        return states.get(engine_model) in {"Loaded", "Draining"}


def resolve(deployment: AdapterDeployment, adapters: list[Adapter]) -> list[Resolution]:
    """The newest Ready version that satisfies each entry."""
    return [_resolve_one(ref, deployment, adapters) for ref in deployment.spec.adapters]


def _resolve_one(ref: str, deployment: AdapterDeployment, adapters: list[Adapter]) -> Resolution:
    name, _, wanted = ref.partition("@")
    candidates = [
        item
        for item in adapters
        if item.spec.adapter == name and not item.metadata.deletion_timestamp and matches(wanted, item.spec.version)
    ]
    if not candidates:
        return Resolution(
            ref, None, "AdapterMissing", f"{ref}: there is no such Adapter; this goes on when there is one"
        )
    ready = [item for item in candidates if _is_ready(item)]
    if not ready:
        newest = max(candidates, key=lambda item: parse(item.spec.version) or (0, 0, 0))
        why = find(newest.status.conditions, "Ready")
        return Resolution(
            ref,
            None,
            "AdapterMissing",
            f"{ref}: Adapter {newest.metadata.name} is not Ready: {why.message if why else 'not verified yet'}",
        )
    fitting = [item for item in ready if item.spec.base_model == deployment.spec.base_model]
    if not fitting:
        other = ready[-1].spec.base_model
        return Resolution(
            ref, None, "AdapterIncompatible", f"{ref} was tuned on {other}, not on {deployment.spec.base_model}"
        )
    low_rank = [item for item in fitting if item.spec.method in {"lora", "qlora"}]
    if not low_rank:
        method = fitting[-1].spec.method
        return Resolution(
            ref,
            None,
            "AdapterIncompatible",
            f"{ref} was tuned by {method}: only lora and qlora share a base model's pods",
        )
    best = max(low_rank, key=lambda item: parse(item.spec.version) or (0, 0, 0))
    limit = deployment.spec.limits.max_lora_rank
    if best.status.rank is not None and best.status.rank > limit:
        return Resolution(
            ref,
            None,
            "AdapterIncompatible",
            f"{ref}: rank {best.status.rank} is above limits.maxLoraRank {limit}; raise it",
        )
    return Resolution(ref, best)


def _is_ready(adapter: Adapter) -> bool:
    ready: Condition | None = find(adapter.status.conditions, "Ready")
    return ready is not None and ready.status == "True"


def wanted_adapter(tenant: str, adapter: Adapter) -> WantedAdapter:
    """What the agents are told about a version."""
    digest = adapter.spec.artifact.digest
    return WantedAdapter(
        engine_name=engine_name(tenant, adapter.metadata.name, digest),
        adapter=adapter.metadata.name,
        uri=adapter.spec.artifact.uri,
        digest=digest,
        signature=adapter.status.signature,
    )


def plan_wanted(
    deployment: AdapterDeployment,
    resolved: list[WantedAdapter],
    previous: Wanted | None,
    routes: Routes | None,
    known: Iterable[WantedAdapter] = (),
) -> Wanted:
    """What every replica should have loaded: what is resolved, and what the gateway's table still leads to.

    `known`: all versions of the namespace. What is only kept gets its newest signature, too: else an engine that restarts after
    an old key was retired could not have it back.
    """
    signed = {item.engine_name: item for item in known if item.signature is not None}
    names = {item.engine_name for item in resolved}
    routed = {target.engine_model for entry in (routes.routes if routes else []) for target in entry.targets}
    kept = [
        signed.get(item.engine_name, item)
        for item in (previous.adapters if previous else [])
        if item.engine_name in routed and item.engine_name not in names
    ]
    return Wanted(
        base_model=deployment.spec.base_model,
        max_lora_rank=deployment.spec.limits.max_lora_rank,
        drain_seconds=deployment.spec.drain_seconds,
        adapters=sorted([*resolved, *kept], key=lambda item: item.engine_name),
    )


def effective_routes(deployment: AdapterDeployment) -> list[Route]:
    """The routes as written, or one per adapter, named as it."""
    if deployment.spec.routes is not None:
        return deployment.spec.routes
    return [Route(model=name, adapter=name) for name in (ref.partition("@")[0] for ref in deployment.spec.adapters)]


def plan_routes(
    deployment: AdapterDeployment,
    resolutions: list[Resolution],
    tenant: str,
    replicas: list[ReplicaView],
    previous: Routes | None,
    unavailable: str | None,
    told: Wanted | None = None,
) -> Routes:
    """This deployment's part of the gateway's table. `told`: what the agents were told, so where a version is to be."""
    namespace = deployment.metadata.namespace
    ready = [replica for replica in replicas if replica.ready and replica.address]
    by_name = {item.name: item for item in resolutions}
    before = {entry.model: entry for entry in (previous.routes if previous else [])}
    entries = []
    for route in effective_routes(deployment):
        model = f"{namespace}/{route.model}"
        if route.adapter is None:
            entries.append(RouteEntry(model=model, targets=[RouteTarget(engine_model=deployment.spec.base_model)]))
            continue
        old = before[model].targets[0] if model in before and before[model].targets else None
        target = _target(by_name.get(route.adapter), tenant, ready, old, told)
        entries.append(RouteEntry(model=model, targets=[target] if target else []))
    models = {target.engine_model for entry in entries for target in entry.targets}
    backends = [
        Backend(
            pod=replica.pod,
            address=replica.address,
            loaded=sorted({deployment.spec.base_model} | {name for name in models if replica.has(name)}),
        )
        for replica in sorted(ready, key=lambda item: item.pod)
    ]
    return Routes(
        namespace=namespace,
        deployment=deployment.metadata.name,
        base_model=deployment.spec.base_model,
        unavailable=unavailable,
        routes=entries,
        backends=backends,
    )


def _target(
    resolution: Resolution | None,
    tenant: str,
    ready: list[ReplicaView],
    old: RouteTarget | None,
    told: Wanted | None,
) -> RouteTarget | None:
    if resolution is None or resolution.adapter is None:
        # The entry resolves to nothing (its Adapter is being deleted, say): what answers now goes on answering.
        return old
    adapter = resolution.adapter
    wanted = wanted_adapter(tenant, adapter)
    new = RouteTarget(
        engine_model=wanted.engine_name, adapter=wanted.adapter, version=adapter.spec.version, digest=wanted.digest
    )
    if old is None or old.engine_model == new.engine_model or old.adapter is None:
        return new
    homes = [replica for replica in ready if told is None or told.is_for(new.engine_model, replica.pod)]
    if homes and all(replica.has(new.engine_model) for replica in homes):
        return new
    old_answers = any(replica.has(old.engine_model) for replica in ready)
    new_answers = any(replica.has(new.engine_model) for replica in ready)
    return old if old_answers or not new_answers else new
