"""Plan what an AdapterDeployment loads, and where its routes lead (PURE).

The order of a change: load -> reported as loaded -> shift traffic -> drain -> unload. An adapter's engine name contains
its digest. So the old and the new version have different names and can be loaded side by side:
- `wanted` lists the versions that the entries resolve to now, and the versions that routes still lead to.
- A route moves to the new version when every ready replica that must have it has loaded it. It also moves if no replica
  has loaded the old version and at least one has loaded the new version. While no pod runs and none is planned, it
  moves at once.
- A version that no route leads to leaves `wanted`. Then the agents drain and unload it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from graft.api import Adapter, AdapterDeployment
from graft.api.adapterdeployment import Route
from graft.api.meta import Condition
from graft.artifacts.layout import in_tenants_part
from graft.contracts.agent import AdapterState, Residency, Wanted, WantedAdapter, engine_name
from graft.contracts.gateway import Backend, RouteEntry, Routes, RouteTarget
from graft.contracts.message import BaseModelRef
from graft.reconcile.adapter.compatibility import fits, is_put_away
from graft.reconcile.adapter.versions import matches, parse
from graft.status import find


@dataclass(frozen=True)
class Resolution:
    """What an entry of spec.adapters resolves to."""

    ref: str
    adapter: Adapter | None
    reason: str = ""
    message: str = ""
    restoring: Adapter | None = None  # what it will resolve to, once the compressed files are restored

    @property
    def name(self) -> str:
        return self.ref.partition("@")[0]


@dataclass(frozen=True)
class ReplicaView:
    """One serving pod. Its address and readiness come from the API, its loaded adapters from its agent."""

    pod: str
    address: str
    ready: bool
    residency: Residency | None
    tls: bool = False  # whether its engine listens with TLS
    unfit: frozenset[str] = frozenset()  # engine names of adapters that do not fit the base model of this pod

    @property
    def certificate(self) -> str | None:
        """Return the SHA-256 of the engine's certificate, if it has TLS and its agent has reported."""
        return self.residency.certificate if self.tls and self.residency else None

    @property
    def reachable(self) -> bool:
        """Return whether gateways can send requests to it."""
        return self.ready and bool(self.address) and (not self.tls or self.certificate is not None)

    def in_state(self, state: AdapterState) -> frozenset[str]:
        """Return the adapters that the agent reports in a state, without the unfit ones."""
        adapters = self.residency.adapters if self.residency else []
        return frozenset(item.engine_name for item in adapters if item.state == state) - self.unfit

    def has(self, engine_model: str) -> bool:
        """Return whether the replica can answer a request for the adapter."""
        states = {item.engine_name: item.state for item in (self.residency.adapters if self.residency else [])}
        return engine_model not in self.unfit and states.get(engine_model) in {"Loaded", "Draining"}


def resolve(
    deployment: AdapterDeployment, adapters: list[Adapter], base: BaseModelRef | None = None
) -> list[Resolution]:
    """Return the newest version that satisfies each entry and fits the base model.

    If its files are not known, only its name counts.
    """
    base = base or BaseModelRef(name=deployment.spec.base_model, uri="")
    return [_resolve_one(ref, deployment, adapters, base) for ref in deployment.spec.adapters]


def _resolve_one(ref: str, deployment: AdapterDeployment, adapters: list[Adapter], base: BaseModelRef) -> Resolution:
    name, _, wanted = ref.partition("@")
    candidates = [
        item
        for item in adapters
        if item.spec.adapter == name and not item.metadata.deletion_timestamp and matches(wanted, item.spec.version)
    ]
    if not candidates:
        return Resolution(
            ref,
            None,
            "AdapterMissing",
            f"{ref}: no Adapter matches this entry of spec.adapters. The operator continues when one does",
        )
    ready = [item for item in candidates if _is_ready(item) or is_put_away(item)]
    if not ready:
        newest = max(candidates, key=_number)
        why = find(newest.status.conditions, "Ready")
        return Resolution(
            ref,
            None,
            "AdapterMissing",
            f"{ref}: Adapter {newest.metadata.name} is not Ready: {why.message if why else 'it is not verified yet'}",
        )
    fitting = [item for item in ready if (fits(item, base) if base.uri else item.spec.base_model == base.name)]
    if not fitting:
        return Resolution(ref, None, "AdapterIncompatible", _misfit(ref, max(ready, key=_number), base))
    low_rank = [item for item in fitting if item.spec.method in {"lora", "qlora"}]
    if not low_rank:
        method = fitting[-1].spec.method
        return Resolution(
            ref,
            None,
            "AdapterIncompatible",
            f"{ref} was tuned with {method}. Only lora and qlora adapters can share the pods of a base model",
        )
    best = max(low_rank, key=_number)
    limit = deployment.spec.limits.max_lora_rank
    if best.status.rank is not None and best.status.rank > limit:
        return Resolution(
            ref,
            None,
            "AdapterIncompatible",
            f"{ref}: rank {best.status.rank} is above spec.limits.maxLoraRank ({limit}). Raise spec.limits.maxLoraRank",
        )
    if not is_put_away(best):
        return Resolution(ref, best)
    text = (
        f"{ref}: the compressed files of Adapter {best.metadata.name} are being restored. The operator then continues"
    )
    served = [item for item in low_rank if not is_put_away(item) and (item.status.rank or 0) <= limit]
    return Resolution(ref, max(served, key=_number, default=None), "AdapterMissing", text, restoring=best)


def _number(adapter: Adapter) -> tuple[int, int, int]:
    return parse(adapter.spec.version) or (0, 0, 0)


def _misfit(ref: str, newest: Adapter, base: BaseModelRef) -> str:
    name, tuned_on = newest.metadata.name, newest.status.base_model_digest
    if newest.spec.base_model != base.name:
        return f"{ref} was tuned on BaseModel {newest.spec.base_model}, but spec.baseModel is {base.name}. Tune a version on {base.name}"
    version = f" (version {base.version})" if base.version else ""
    return (
        f"{ref}: {name} was tuned on {tuned_on}, but BaseModel {base.name} is now {base.identity}{version}. Either tune a version on "
        f"it. Or, if {name} fits it nevertheless, set spec.version of the BaseModel and add it to spec.baseVersions of the Adapter"
    )


def _is_ready(adapter: Adapter) -> bool:
    ready: Condition | None = find(adapter.status.conditions, "Ready")
    return ready is not None and ready.status == "True"


def wanted_adapter(tenant: str, adapter: Adapter) -> WantedAdapter:
    """Return the entry of a version in the wanted message."""
    digest = adapter.published.digest
    return WantedAdapter(
        engine_name=engine_name(tenant, adapter.metadata.name, digest),
        adapter=adapter.metadata.name,
        uri=adapter.published.uri,
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
    """Return what every replica should load: the resolved versions, and those that the gateway's routes still lead to.

    `known`: all versions of the namespace. A version that is only kept also gets its newest signature. Otherwise, an
    engine that restarts after an old key was retired could not load it again.
    """
    signed = {item.engine_name: item for item in known if item.signature is not None}
    names = {item.engine_name for item in resolved}
    routed = {target.engine_model for entry in (routes.routes if routes else []) for target in entry.leads_to}
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


def expected(
    deployment: AdapterDeployment, resolutions: list[Resolution], adapters: list[Adapter], tenant: str, bucket: str
) -> list[WantedAdapter]:
    """Return versions that entries will resolve to once they are verified. Agents may download their files meanwhile.

    Only versions in the tenant's own part of the bucket count, because the operator has not checked the others yet.
    """
    found = {}
    for resolution in resolutions:
        _, _, versions = resolution.ref.partition("@")
        coming = [
            item
            for item in adapters
            if item.spec.adapter == resolution.name
            and matches(versions, item.spec.version)
            and item.spec.base_model == deployment.spec.base_model
            and item.spec.method in {"lora", "qlora"}
            and not item.metadata.deletion_timestamp
            and _is_being_verified(item)
            and in_tenants_part(item.published.uri, bucket, tenant)
        ]
        newest = max(coming, key=_number, default=None)
        if newest and (resolution.adapter is None or _number(newest) > _number(resolution.adapter)):
            found[newest.metadata.name] = wanted_adapter(tenant, newest)
    return [found[name] for name in sorted(found)]


def _is_being_verified(adapter: Adapter) -> bool:
    ready = find(adapter.status.conditions, "Ready")
    return adapter.artifact is not None and not is_put_away(adapter) and (ready is None or ready.status == "Unknown")


def effective_routes(deployment: AdapterDeployment) -> list[Route]:
    """Return spec.routes, or by default one route per adapter, with the adapter's name."""
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
    *,
    stopped: bool = False,
) -> Routes:
    """Return this deployment's part of the gateway's table.

    `told`: the last wanted message, which says where a version must be. `stopped`: no pod runs and none is planned, so
    routes can lead to the new versions at once.
    """
    namespace = deployment.metadata.namespace
    ready = [replica for replica in replicas if replica.reachable]
    by_name = {item.name: item for item in resolutions}
    before = {entry.model: entry for entry in (previous.routes if previous else [])}
    entries = []
    for route in effective_routes(deployment):
        model = f"{namespace}/{route.model}"
        if route.sequence:
            earlier = before[model].steps if model in before else []
            entries.append(
                RouteEntry(
                    model=model,
                    targets=[],
                    steps=_steps(route.sequence, by_name, tenant, ready, earlier, told, stopped=stopped),
                )
            )
            continue
        if route.adapter is None:
            entries.append(RouteEntry(model=model, targets=[RouteTarget(engine_model=deployment.spec.base_model)]))
            continue
        old = before[model].targets[0] if model in before and before[model].targets else None
        target = _target(by_name.get(route.adapter), tenant, ready, old, told, stopped=stopped)
        entries.append(RouteEntry(model=model, targets=[target] if target else []))
    models = {target.engine_model for entry in entries for target in entry.leads_to}
    backends = [
        Backend(
            pod=replica.pod,
            address=replica.address,
            loaded=sorted({deployment.spec.base_model} | {name for name in models if replica.has(name)}),
            certificate=replica.certificate,
        )
        for replica in sorted(ready, key=lambda item: item.pod)
    ]
    return Routes(
        namespace=namespace,
        deployment=deployment.metadata.name,
        uid=deployment.metadata.uid,
        base_model=deployment.spec.base_model,
        unavailable=unavailable,
        routes=entries,
        backends=backends,
    )


def _steps(
    names: list[str],
    by_name: dict[str, Resolution],
    tenant: str,
    ready: list[ReplicaView],
    before: list[RouteTarget],
    told: Wanted | None,
    *,
    stopped: bool,
) -> list[RouteTarget]:
    """Return the steps of a sequence.

    Each step moves to a new version on its own. Empty if a step resolves to nothing.
    """
    steps = []
    for name in names:
        resolution = by_name.get(name)
        old = next((step for step in before if step.adapter and step.adapter.rpartition("-")[0] == name), None)
        step = _target(resolution, tenant, ready, old, told, stopped=stopped)
        if step is None:
            return []
        steps.append(step)
    return steps


def _target(
    resolution: Resolution | None,
    tenant: str,
    ready: list[ReplicaView],
    old: RouteTarget | None,
    told: Wanted | None,
    *,
    stopped: bool,
) -> RouteTarget | None:
    if resolution is None or resolution.adapter is None:
        # The entry resolves to nothing, for example because its Adapter is being deleted. The present version keeps
        # answering.
        return old
    adapter = resolution.adapter
    wanted = wanted_adapter(tenant, adapter)
    new = RouteTarget(
        engine_model=wanted.engine_name,
        adapter=wanted.adapter,
        version=adapter.spec.version,
        digest=wanted.digest,
        stop_token_ids=adapter.status.stop_token_ids or [],
        prompt_template=adapter.status.prompt_template,
    )
    if old is None or old.engine_model == new.engine_model or old.adapter is None or stopped:
        return new
    # While the pods are rolled to a new base model, the old pods cannot have the new version. Half of the pods can take
    # over.
    homes = [replica for replica in ready if told is None or told.is_for(new.engine_model, replica.pod)]
    able = [replica for replica in homes if new.engine_model not in replica.unfit]
    if able and 2 * len(able) >= len(homes) and all(replica.has(new.engine_model) for replica in able):
        return new
    old_answers = any(replica.has(old.engine_model) for replica in ready)
    new_answers = any(replica.has(new.engine_model) for replica in ready)
    return old if old_answers or not new_answers else new
