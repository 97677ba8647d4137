"""What the operator follows in the cluster, and which resources are reconciled when something changes (PURE).

A rule may wake too many resources, and never too few: the resync would wait for minutes. It does not know how a resource
is reconciled.
"""

from collections.abc import Callable, Iterable
from typing import Any

from graft.cache.cache import Change, Source
from graft.cache.objects import Objects
from graft.contracts.gateway import DEMAND_CONFIGMAP
from graft.kube import Manifest
from graft.manifests.adapter import JOB_UID
from graft.manifests.metadata import OWNER_UID
from graft.reconcile.adapter import retention, versions
from graft.reconcile.adapter.facts import adapter_label, version_of
from graft.reconcile.adapterdeployment import scaling
from graft.reconcile.apikey import turn_of
from graft.reconcile.claims import Claim, Space, claim_of, holder, space_of
from graft.reconcile.finetunejob.facts import facts_of, output_adapter
from graft.reconcile.shared.ownership import Key, claimed_owner

# ScaledObjects are not followed, because the kind may not exist in the cluster. The next reconcile corrects them.
CHILDREN = (
    "Job",
    "Pod",
    "Deployment",
    "ReplicaSet",
    "ConfigMap",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Service",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "HorizontalPodAutoscaler",
)
RUNS = {"Job", "Pod"}  # of these, events have the whole object: each change is read
OWNERS = {"BaseModel", "FineTuneJob", "Adapter", "AdapterDeployment", "ApiKey", "Tenant"}
DEMAND = "demand"
# Kinds whose reconcile says by what it returns whether another one follows, so its own writes wake it not again.
STEADY = {"FineTuneJob", "Adapter"}
# Seconds in which changes of the children of a job, or of its Adapter, cause one reconcile. The Job controller itself
# gathers the changes of pods for 1 s.
BATCH = 0.2
# What siblings and users of a version do not depend on.
OWN_STATUS = {"usedBy", "lastUsedTime", "observedGeneration", "compatibility", "prunedAfter", "conditions"}


def deployment_says(raw: Manifest) -> frozenset[retention.Said]:
    """Return the strings in the spec and the status of an AdapterDeployment."""
    return frozenset(retention.said(raw.get("spec")) | retention.said(raw.get("status")))


def sources(operator_namespace: str) -> list[Source]:
    """Return what the operator follows.

    Any user can set the children's labels on objects of any size. So lists have only their metadata.
    """
    return [
        Source("BaseModel"),
        Source("FineTuneJob", group=output_adapter, facts=facts_of),
        Source("Adapter", group=adapter_label, facts=version_of),
        Source("AdapterDeployment", facts=deployment_says),
        Source("ApiKey", facts=turn_of, optional=True),
        Source("Node"),
        Source("Tenant", facts=claim_of, optional=True),  # CustomResourceDefinitions of an earlier version lack it
        # Tenants select namespaces by label. Few users may write a namespace.
        Source("Namespace", listed=False, watched=False, every_label=True, facts=space_of),
        *(Source(kind, labels={OWNER_UID: None}, listed=False, watched=kind in RUNS) for kind in CHILDREN),
        # Any user can set labels on a ConfigMap. Only this one, in the operator's namespace, counts.
        Source("ConfigMap", name=DEMAND, only=(operator_namespace, DEMAND_CONFIGMAP)),
    ]


def belongs(source: Source, item: Manifest, operator_namespace: str) -> bool:
    """Return whether an object that carries our labels is held. Every user can set labels."""
    if not source.labels:
        return True
    if OWNER_UID not in (item["metadata"].get("labels") or {}):
        return False
    return claimed_owner(source.kind, item, operator_namespace) is not None


def is_over(key: Key, objects: Callable[[str], Objects]) -> bool:
    """Return whether a resource is a job that has ended and needs no further reconcile."""
    kind, namespace, name = key
    if kind != "FineTuneJob":
        return False
    facts = objects(kind).facts((namespace, name))
    return facts is not None and not facts.active


def is_echo(change: Change) -> bool:
    """Return whether a change leaves as it is what a user asks for: the spec, and whether the resource shall exist.

    The API server then keeps the generation. While a resource is reconciled, such a change is what its reconcile has
    written.
    """
    before, after = change.before, change.after
    if change.kind not in STEADY or before is None or after is None:
        return False
    return (before.uid, before.generation) == (after.uid, after.generation)


def first(objects: Callable[[str], Objects]) -> list[Key]:
    """Return what is reconciled after a start, the most urgent first. Jobs that have ended are left out."""
    return [
        *_all(objects, "BaseModel"),
        *_all(objects, "Tenant"),
        *_all(objects, "AdapterDeployment"),
        *_all(objects, "ApiKey"),
        *jobs(objects),
        *_all(objects, "Adapter"),
    ]


def awaited(objects: Callable[[str], Objects], key: Key) -> bool:
    """Return whether a user waits for the first result of a resource.

    No operator has reconciled its present spec, or the reconcile that would have made its first Job was cut off.
    """
    kind, namespace, name = key
    held = objects(kind).get(namespace, name)
    if held is None:
        return False
    if kind == "FineTuneJob" and held.facts.active and not objects("Job").places(owner=held.uid):
        return True
    raw = objects(kind).unpack(held)
    return bool((raw.get("status") or {}).get("observedGeneration") != raw["metadata"].get("generation"))


def jobs(objects: Callable[[str], Objects], base_model: str | None = None) -> list[Key]:
    """Return the jobs that have not ended. `base_model`: only those that use it."""
    held = objects("FineTuneJob")
    return [
        ("FineTuneJob", *place)
        for place in held.places()
        if (facts := held.facts(place)) is not None and facts.active and base_model in {None, facts.base_model}
    ]


def at_work(namespace: str, objects: Callable[[str], Objects]) -> bool:
    """Return whether pods of a namespace use its storage key, or may start at any time: it has serving pods, a job that
    has started and not ended, or the Job of a version. So it had a key, and the operator may follow it."""
    if objects("Deployment").places(namespace):
        return True
    runs, children = objects("FineTuneJob"), objects("Job")
    started = [held for place in runs.places(namespace) if (held := runs.get(*place)) is not None and held.facts.active]
    adapters = objects("Adapter")
    made = [held for place in adapters.places(namespace) if (held := adapters.get(*place)) is not None]
    return any(children.places(owner=held.uid) for held in [*started, *made])


def patience(source: Source, kind: str) -> float:
    """Return the seconds for which further changes may arrive before a resource of a kind that one concerns is
    reconciled. Routes follow the pods of a deployment at once."""
    of_job = kind == "FineTuneJob" and source.kind == "Adapter"
    return BATCH if of_job or (source.kind in CHILDREN and kind != "AdapterDeployment") else 0.0


def concerned(source: Source, change: Change, objects: Callable[[str], Objects], operator_namespace: str) -> list[Key]:
    """Return the other resources that are reconciled when an object changes."""
    if source.name == DEMAND:
        return _demanded(change, objects)
    if source.kind in CHILDREN:
        return _owner(change, objects, operator_namespace)
    old, new = change.old, change.new
    namespace, name = change.place
    if source.kind == "Namespace":
        asking = _asking(objects, *(held.facts for held in (change.before, change.after) if held is not None))
        return asking + (_users(objects, name) if asking else [])
    if source.kind == "Tenant":
        return _of_tenant(change, objects)
    if source.kind == "FineTuneJob":
        return _next_in_line(change, objects, operator_namespace)
    if source.kind == "BaseModel" and _differ(old, new, _contents):
        return jobs(objects, name) + _all(objects, "AdapterDeployment") + _all(objects, "Adapter")
    if source.kind == "Adapter" and _differ(old, new, _for_others):
        found = [item for item in (old, new) if item is not None]
        users = [key for item in found for key in _related(item, namespace, objects)]
        return users + _siblings(change, objects)
    if source.kind == "AdapterDeployment":
        before, after = (held.facts if held is not None else frozenset() for held in (change.before, change.after))
        # Also versions that the deployment no longer names or uses: the targets of rollbacks depend on them.
        return _versions(objects, namespace, adapters_in(before ^ after))
    return []


def _asking(objects: Callable[[str], Objects], *states: Space) -> list[Key]:
    """Return the Tenants that ask for a namespace, by its name or by its labels, before or after a change. None if nothing
    has changed on which a Tenant depends."""
    if len(states) == 2 and states[0] == states[1]:
        return []
    held = objects("Tenant")
    claims = {place: held.facts(place) for place in held.places()}
    return [
        ("Tenant", *place)
        for place, claim in claims.items()
        if any(claim.covers(state.name, state.labels) for state in states)
    ]


def _of_tenant(change: Change, objects: Callable[[str], Objects]) -> list[Key]:
    """Return what depends on a Tenant: in the namespaces that it asks for, or has asked for until now, the other Tenants that
    ask for them, and what may use less or more now."""
    claims = [held.facts for held in (change.before, change.after) if held is not None]
    if len(set(claims)) == 1 and len(claims) == 2:
        return []
    namespaces = objects("Namespace")
    found: dict[Key, None] = {}
    for place in namespaces.places():
        space = namespaces.facts(place)
        if any(claim.covers(space.name, space.labels) for claim in claims):
            found |= dict.fromkeys(_asking(objects, space) + _users(objects, space.name))
    found.pop(("Tenant", *change.place), None)
    return list(found)


def _next_in_line(change: Change, objects: Callable[[str], Objects], operator_namespace: str) -> list[Key]:
    """Return the job that is next in the line for a Tenant's quota, if a job has ended or has left the line.

    When it starts, it leaves the line, too, so the one after it is next. Thousands of jobs may wait.
    """
    before, after = (held.facts if held is not None else None for held in (change.before, change.after))
    left = before is not None and not before.over and (after is None or after.over or before.waits > after.waits)
    tenants, spaces, held = objects("Tenant"), objects("Namespace"), objects("FineTuneJob")
    claims = [tenants.facts(place) for place in tenants.places()] if left else []
    if not any(claim.limits_jobs for claim in claims):
        return []
    of: dict[str, Claim | None] = {}

    def tenant(namespace: str) -> Claim | None:
        if namespace not in of:
            space = spaces.facts(("", namespace))
            of[namespace] = holder(claims, namespace, space.labels if space else {}, operator_namespace)
        return of[namespace]

    mine = tenant(change.place[0])
    if mine is None or not mine.limits_jobs:
        return []
    line = {place: facts for place in held.places() if (facts := held.facts(place)).waits and tenant(place[0]) == mine}
    line.pop(change.place, None)
    return [("FineTuneJob", *place) for place in sorted(line, key=lambda place: line[place].turn)[:1]]


def _users(objects: Callable[[str], Objects], namespace: str) -> list[Key]:
    """Return what depends on the Tenant of a namespace: jobs that have not ended, versions, deployments and API keys."""
    jobs = objects("FineTuneJob")
    active = [place for place in jobs.places(namespace) if jobs.facts(place).active]
    others = [
        (kind, *place)
        for kind in ("AdapterDeployment", "Adapter", "ApiKey")
        for place in objects(kind).places(namespace)
    ]
    return [*others, *(("FineTuneJob", *place) for place in active)]


def _related(raw: Manifest, namespace: str, objects: Callable[[str], Objects]) -> list[Key]:
    """Return whom a version concerns: its job, its parents, and the deployments that name its adapter."""
    job = str(((raw.get("spec") or {}).get("job") or {}).get("name") or "")
    facts = objects("FineTuneJob").facts((namespace, job)) if JOB_UID in (raw["metadata"].get("labels") or {}) else None
    made = facts is not None and facts.active
    adapter = str(raw["spec"].get("adapter"))
    # A parent that a composition waits for may be Archived. Its reconcile restores it.
    parents = {ref.partition("@")[0] for ref in retention.composing([raw]) if "@" in ref}
    deployments = objects("AdapterDeployment")
    users = [
        ("AdapterDeployment", *place)
        for place in deployments.places(namespace)
        if adapter in adapters_in(deployments.facts(place) or frozenset())
    ]
    return [("FineTuneJob", namespace, job)] * made + _versions(objects, namespace, parents) + users


def _siblings(change: Change, objects: Callable[[str], Objects]) -> list[Key]:
    """Return the other versions of the adapter whose next step may depend on a version.

    Which version is the newest, and which would be the target of a rollback, decides about versions with a retention
    policy, and about those whose files are compressed. Other versions depend on no sibling.
    """
    held, namespace = objects("Adapter"), change.place[0]
    states = [item for item in (change.before, change.after) if item is not None]
    found = []
    for adapter in {item.group for item in states if item.group}:
        places = [place for place in held.places(namespace, group=adapter) if place != change.place]
        policy = any(facts.policy for facts in [*map(held.facts, places), *(item.facts for item in states)])
        found += [("Adapter", *place) for place in places if policy or held.facts(place).waits]
    return found


def _owner(change: Change, objects: Callable[[str], Objects], operator_namespace: str) -> list[Key]:
    child = change.new or change.old
    claimed = claimed_owner(change.kind, child, operator_namespace) if child is not None else None
    # A ReplicaSet decides which pods count, by its existence only. What changes in it, its Deployment or its pods tell.
    uids = {held.uid if held is not None else "" for held in (change.before, change.after)}
    if claimed is None or (change.kind == "ReplicaSet" and len(uids) == 1):
        return []
    key, uid = claimed
    held = objects(key[0]).get(*key[1:]) if key[0] in OWNERS else None
    return [key] if held is not None and held.uid == uid and not is_over(key, objects) else []


def _demanded(change: Change, objects: Callable[[str], Objects]) -> list[Key]:
    """Return the deployments for which a gateway has written new demand, so that a sleeping deployment starts at once."""
    before, after = ((item or {}).get("data") or {} for item in (change.old, change.new))
    news = {key: text for key, text in after.items() if before.get(key) != text}
    found = {(item.namespace, item.deployment) for item in scaling.demands(news).values()}
    held = objects("AdapterDeployment")
    return [("AdapterDeployment", *place) for place in sorted(found) if held.get(*place) is not None]


def adapters_in(said: Iterable[retention.Said]) -> set[str]:
    """Return the adapters that any of these strings could name: by name, by reference or by version."""
    found = set()
    for _, text in said:
        name, _, version = text.rpartition("-")
        found.add(name if versions.parse(version) else text.partition("@")[0])
    return found


def _versions(objects: Callable[[str], Objects], namespace: str, adapters: set[str]) -> list[Key]:
    held = objects("Adapter")
    return [("Adapter", *place) for adapter in sorted(adapters) for place in held.places(namespace, group=adapter)]


def _all(objects: Callable[[str], Objects], kind: str) -> list[Key]:
    return [(kind, *place) for place in objects(kind).places()]


def _differ(old: Manifest | None, new: Manifest | None, part: Callable[[Manifest], Any]) -> bool:
    return old is None or new is None or part(old) != part(new)


def _contents(raw: Manifest) -> tuple[Any, ...]:
    return raw.get("spec"), raw.get("status"), raw["metadata"].get("deletionTimestamp")


def _for_others(raw: Manifest) -> tuple[Any, ...]:
    """Return the part of a version on which its job, its siblings and its users depend."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    conditions = [item for item in status.get("conditions") or [] if item["type"] == "Ready"]
    ready = [(item["status"], item["reason"], item["message"]) for item in conditions]
    rest = {key: value for key, value in status.items() if key not in OWN_STATUS}
    in_use = bool(status.get("usedBy"))  # which version was used last decides about rollbacks
    return raw.get("spec"), metadata.get("deletionTimestamp"), adapter_label(raw), ready, rest, in_use
