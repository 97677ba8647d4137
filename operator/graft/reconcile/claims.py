"""Which namespace belongs to which Tenant, and what its Tenant lets it use (PURE).

A Tenant claims namespaces by name and by label. Of several Tenants that claim a namespace, the oldest has it. This module
does not know what a Tenant keeps in its namespaces.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from graft.artifacts.layout import why_reserved

# No workload of a team belongs in them, and a default deny there would stop the cluster.
SYSTEM = frozenset({"kube-system", "kube-public", "kube-node-lease"})
Labels = Mapping[str, str]


class Space(NamedTuple):
    """What a Tenant must know of a namespace."""

    name: str
    uid: str
    labels: Labels
    leaving: bool  # it is being deleted


def space_of(raw: Mapping[str, Any]) -> Space:
    """Return the facts of a namespace."""
    metadata = raw["metadata"]
    return Space(
        metadata["name"], metadata.get("uid", ""), metadata.get("labels") or {}, bool(metadata.get("deletionTimestamp"))
    )


@dataclass(frozen=True)
class Claim:
    """The namespaces that one Tenant asks for, and what it lets them use."""

    tenant: str
    since: str  # creationTimestamp of the Tenant
    names: frozenset[str]
    match_labels: tuple[tuple[str, str], ...]
    expressions: tuple[tuple[str, str, frozenset[str]], ...]  # key, operator, values
    base_models: frozenset[str] | None = None  # None: all
    training_jobs: int | None = None  # at the same time; None: any number
    gpus: int | None = None  # of the training jobs together; None: any number
    inherits: frozenset[str] = frozenset()  # namespaces that take over the files of an earlier one of their name
    limits: tuple[tuple[str, int], ...] = ()  # of its clients: field of spec.limits, amount

    @property
    def age(self) -> tuple[str, str]:
        """Sorts the oldest Tenant first. Of two that were created in the same second, the names decide."""
        return self.since, self.tenant

    def covers(self, namespace: str, labels: Labels) -> bool:
        """Return whether the Tenant asks for a namespace with this name and these labels."""
        return namespace in self.names or self.selects(labels)

    @property
    def limits_jobs(self) -> bool:
        """Whether the Tenant has a quota for training jobs."""
        return self.training_jobs is not None or self.gpus is not None

    def lets_use(self, base_model: str) -> bool:
        """Return whether the Tenant may use a base model. The base model may still refuse the namespace."""
        return self.base_models is None or base_model in self.base_models

    def selects(self, labels: Labels) -> bool:
        """Return whether the selector matches. A Tenant without a selector selects nothing."""
        if not self.match_labels and not self.expressions:
            return False
        return all(labels.get(key) == value for key, value in self.match_labels) and all(
            _meets(labels, *expression) for expression in self.expressions
        )


def _meets(labels: Labels, key: str, operator: str, values: frozenset[str]) -> bool:
    """Return whether labels meet one requirement, as Kubernetes' own selectors do. NotIn is met without the label, too."""
    match operator:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return False


def claim_of(raw: Mapping[str, Any]) -> Claim:
    """Return what a Tenant asks for."""
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    asked = spec.get("namespaces") or {}
    selector, models, quotas = asked.get("selector") or {}, spec.get("baseModels"), spec.get("quotas") or {}
    return Claim(
        metadata["name"],
        str(metadata.get("creationTimestamp") or ""),
        frozenset(asked.get("names") or ()),
        tuple(sorted((selector.get("matchLabels") or {}).items())),
        tuple(
            (item["key"], item["operator"], frozenset(item.get("values") or ()))
            for item in selector.get("matchExpressions") or ()
        ),
        None if models is None else frozenset(models),
        quotas.get("trainingJobs"),
        quotas.get("gpus"),
        frozenset(asked.get("inherit") or ()),
        tuple(sorted((spec.get("limits") or {}).items())),
    )


def why_never(namespace: str, operator_namespace: str) -> str | None:
    """Return why a namespace cannot belong to a Tenant, or None."""
    if namespace in SYSTEM:
        return "it is Kubernetes' own"
    if namespace == operator_namespace:
        return "the operator runs in it"
    return why_reserved(namespace)


def holders(claims: Iterable[Claim], spaces: Iterable[Space], operator_namespace: str) -> dict[str, Claim]:
    """Return the Tenant of each namespace that has one."""
    # By what a namespace must have: a platform may have thousands of namespaces and hundreds of Tenants.
    by_name: dict[str, list[Claim]] = {}
    by_label: dict[tuple[str, str], list[Claim]] = {}
    others: list[Claim] = []
    for item in claims:
        for name in item.names:
            by_name.setdefault(name, []).append(item)
        if item.match_labels:
            by_label.setdefault(item.match_labels[0], []).append(item)
        elif item.expressions:
            others.append(item)
    found: dict[str, Claim] = {}
    for name, _, labels, _ in spaces:
        asking = [*by_name.get(name, ()), *others]
        for pair in labels.items():
            asking += by_label.get(pair, ())
        if asking and (has := holder(asking, name, labels, operator_namespace)) is not None:
            found[name] = has
    return found


def holder(claims: Iterable[Claim], namespace: str, labels: Labels, operator_namespace: str) -> Claim | None:
    """Return the Tenant that has a namespace: the oldest one that asks for it. None: the namespace has no Tenant."""
    if why_never(namespace, operator_namespace) is not None:
        return None
    return min((item for item in claims if item.covers(namespace, labels)), key=lambda item: item.age, default=None)
