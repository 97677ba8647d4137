"""Check what a spec asks the scheduler and the nodes for against the platform team's lists (PURE).

The operator creates the pods. So without these lists, everybody who may write a spec could preempt the pods of others,
run on nodes that taints keep free, and switch on what the cluster's webhooks do for certain labels and annotations.
"""

from graft.api.meta import Placement, Toleration
from graft.api.podtemplate import PodTemplate
from graft.reconcile.shared.access import Trouble
from graft.settings import EVERY, Allowed, AllowedTaint

SYSTEM = "system-"  # Kubernetes reserves these PriorityClasses for its own components


# The domains of Kubernetes. The annotation EVERY does not include them: some of them change how a pod is isolated.
KUBERNETES = ("kubernetes.io", "k8s.io", "x-k8s.io")


def forbidden(
    placement: Placement, allowed: Allowed, path: str = "spec", template: PodTemplate | None = None
) -> Trouble | None:
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
    if template is None:
        return None
    for key in template.labels or {}:
        if not _key_allowed(key, allowed.pod_labels):
            return _trouble(f"{path}.podTemplate.labels: {key}", "the key", "tenants.allowedPodLabels")
    for key in template.annotations or {}:
        if not _key_allowed(key, allowed.pod_annotations):
            return _trouble(f"{path}.podTemplate.annotations: {key}", "the key", "tenants.allowedPodAnnotations")
    return None


def _priority_allowed(name: str, classes: list[str]) -> bool:
    return name in classes or (EVERY in classes and not name.startswith(SYSTEM))


def _key_allowed(key: str, entries: list[str]) -> bool:
    domain = key.rpartition("/")[0]
    own = any(domain == name or domain.endswith(f".{name}") for name in KUBERNETES)
    return key in entries or (bool(domain) and f"{domain}/{EVERY}" in entries) or (EVERY in entries and not own)


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
