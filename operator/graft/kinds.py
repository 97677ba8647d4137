"""The kinds that Graft reads and writes: their API paths, and the check of what the API server answers (PURE).

Names come from specs that any user may write. The API server decodes %2F and reads a path part by part, so quoting
alone does not keep a name in its collection: a name with a slash is refused, as the API server refuses it in an object.
This module sends no request.
"""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

LONGEST_NAME = 253  # characters of a name in Kubernetes
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LISTS = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PARTIAL = "PartialObjectMetadata"
META_VERSION = "meta.k8s.io/v1"


class ImpossibleName(ValueError):
    """A name that no object can have. A path or a selector with it would mean something else."""


class WrongAnswer(ValueError):
    """The API server answered with another object than the one that was asked for."""


@dataclass(frozen=True)
class Kind:
    """The API path of a kind."""

    api_version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the path of the collection, of an object or of its subresource. Without a namespace: of all namespaces.

        Raises ImpossibleName if a part is empty, is . or .., or has a slash, a percent sign or a control character.
        """
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        parts = [self.plural]
        if self.namespaced and namespace is not None:
            parts = ["namespaces", path_part(namespace), self.plural]
        elif self.namespaced and name is not None:
            raise ImpossibleName(f"{self.plural}: an object of this kind has a namespace, and none was given")
        if name is not None:
            parts.append(path_part(name))
        if subresource is not None:
            parts.append(path_part(subresource))
        return "/".join([root, *parts])


def path_part(text: str) -> str:
    """Return one part of a path, quoted. Raises ImpossibleName if no object can have this name."""
    if (
        not 0 < len(text) <= LONGEST_NAME
        or text in {".", ".."}
        or set(text) & {"/", "%", "\\"}
        or not text.isprintable()
    ):
        raise ImpossibleName(f"no object of Kubernetes can have the name {text[:LONGEST_NAME]!r}")
    return quote(text, safe="")


def selector(labels: dict[str, str | None]) -> str:
    """Return a label selector. A label with the value None matches any value.

    Raises ImpossibleName if a value is not a valid label value: a comma in it would begin another condition.
    """
    for value in labels.values():
        if value is not None and not LABEL_VALUE.fullmatch(value):
            raise ImpossibleName(f"no label of Kubernetes can have the value {value[:LONGEST_NAME]!r}")
    return ",".join(key if value is None else f"{key}={value}" for key, value in labels.items())


def check_object(kind: str, namespace: str | None, name: str | None, answer: Any) -> None:
    """Check that an answer is the object that was asked for. `name` None: any object of the kind and namespace.

    Raises WrongAnswer, which quotes nothing of the answer except its kind.
    """
    wanted = KINDS[kind]
    found = answer if isinstance(answer, dict) else {}
    metadata = found.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    told = (found.get("apiVersion"), found.get("kind"))
    # The items of a list of a built-in kind have neither apiVersion nor kind. The list has them.
    right = {(wanted.api_version, kind), (META_VERSION, PARTIAL)} | (set() if name is not None else {(None, None)})
    if told not in right:
        raise WrongAnswer(
            f"asked for {_what(kind, namespace, name)}, the API server answered with a {str(told[1])[:63]}"
        )
    place = namespace if wanted.namespaced else None
    if (
        not isinstance(metadata.get("name"), str)
        or (name is not None and metadata["name"] != name)
        or (place is not None and metadata.get("namespace") != place)
    ):
        raise WrongAnswer(f"asked for {_what(kind, namespace, name)}, the API server answered with another {kind}")


def check_list(kind: str, namespace: str | None, page: Any) -> None:
    """Check that an answer is a list of objects of the kind and namespace. Raises WrongAnswer."""
    wanted, found = KINDS[kind], page if isinstance(page, dict) else {}
    told = (found.get("apiVersion"), found.get("kind"))
    if told not in {(wanted.api_version, f"{kind}List"), (META_VERSION, f"{PARTIAL}List")}:
        raise WrongAnswer(
            f"asked for {_what(kind, namespace, None)}, the API server answered with a {str(told[1])[:63]}"
        )
    for item in found.get("items") or []:
        check_object(kind, namespace, None, item)


def _what(kind: str, namespace: str | None, name: str | None) -> str:
    place = f" in namespace {namespace}" if namespace and KINDS[kind].namespaced else ""
    return f"{kind} {name}{place}" if name is not None else f"a list of {kind}{place}"


KINDS: dict[str, Kind] = {
    "BaseModel": Kind("graft.dev/v1alpha1", "basemodels", namespaced=False),
    "Tenant": Kind("graft.dev/v1alpha1", "tenants", namespaced=False),
    "FineTuneJob": Kind("graft.dev/v1alpha1", "finetunejobs"),
    "Adapter": Kind("graft.dev/v1alpha1", "adapters"),
    "AdapterDeployment": Kind("graft.dev/v1alpha1", "adapterdeployments"),
    "ApiKey": Kind("graft.dev/v1alpha1", "apikeys"),
    "Job": Kind("batch/v1", "jobs"),
    "Deployment": Kind("apps/v1", "deployments"),
    "ReplicaSet": Kind("apps/v1", "replicasets"),
    "Pod": Kind("v1", "pods"),
    "Service": Kind("v1", "services"),
    "Node": Kind("v1", "nodes", namespaced=False),
    "ConfigMap": Kind("v1", "configmaps"),
    "Secret": Kind("v1", "secrets"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "Namespace": Kind("v1", "namespaces", namespaced=False),
    "Lease": Kind("coordination.k8s.io/v1", "leases"),
    "Event": Kind("v1", "events"),
    "Role": Kind("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": Kind("autoscaling/v2", "horizontalpodautoscalers"),
    "ScaledObject": Kind("keda.sh/v1alpha1", "scaledobjects"),
    "NetworkPolicy": Kind("networking.k8s.io/v1", "networkpolicies"),
}
