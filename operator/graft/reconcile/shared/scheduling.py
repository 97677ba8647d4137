"""Check what a spec asks the scheduler and the nodes for against the platform team's lists (PURE).

The operator creates the pods. So without these lists, everybody who may write a spec could preempt the pods of others,
and run on nodes that taints keep free.
"""

from graft.api.meta import Placement, Toleration
from graft.reconcile.shared.access import Trouble
from graft.settings import EVERY, Allowed, AllowedTaint

SYSTEM = "system-"  # Kubernetes reserves these PriorityClasses for its own components


def forbidden(placement: Placement, allowed: Allowed, path: str = "spec") -> Trouble | None:
    """Return which field of a spec the lists do not allow, and what to do, or None. `path` is where the fields are."""
    priority, runtime = placement.priority_class_name, placement.runtime_class_name
    if priority and not _priority_allowed(priority, allowed.priority_classes):
        return _trouble(f"{path}.priorityClassName: {priority}", "the PriorityClass", "tenants.allowedPriorityClasses")
    if runtime and not {runtime, EVERY} & set(allowed.runtime_classes):
        return _trouble(f"{path}.runtimeClassName: {runtime}", "the RuntimeClass", "tenants.allowedRuntimeClasses")
    for number, toleration in enumerate(placement.tolerations or []):
        if not any(_covers(entry, toleration) for entry in allowed.tolerations):
            key = toleration.key or "every taint"
            return _trouble(f"{path}.tolerations[{number}]: {key}", "the taint", "tenants.allowedTolerations")
    return None


def _priority_allowed(name: str, classes: list[str]) -> bool:
    return name in classes or (EVERY in classes and not name.startswith(SYSTEM))


def _covers(entry: AllowedTaint, toleration: Toleration) -> bool:
    """Return whether the taints that a toleration matches are all taints of the entry."""
    if entry.key not in {EVERY, toleration.key}:
        return False
    value = None if toleration.operator == "Exists" else toleration.value or ""
    return entry.value in {None, value} and entry.effect in {None, toleration.effect}


def _trouble(what: str, kind: str, value: str) -> Trouble:
    return Trouble(
        "SchedulingForbidden",
        f"{what} is not allowed for tenants. Remove the field, or ask your platform team to add {kind} to {value} in the values "
        f"of Graft's chart",
    )
