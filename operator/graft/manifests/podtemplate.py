"""Merge what the platform's values and a spec add into a pod template (PURE). Every pod of Graft goes through `merge`.

What Graft sets itself has precedence, then come the platform's values, then the spec.
"""

from collections.abc import Collection
from itertools import product

from graft.api.podtemplate import PodTemplate
from graft.manifests.metadata import OWNER_UID, Manifest
from graft.settings import PlatformTemplate

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
# Names of a spec's volumes begin so. Otherwise a mount could name a volume of Graft, for example that of the storage key.
USER = "user-"


def literal(text: str) -> str:
    """Return a text in which the kubelet expands no `$(VARIABLE)`."""
    return text.replace("$(", "$$(")


def merge(
    template: Manifest, platform: PlatformTemplate, user: PodTemplate | None, containers: Collection[str]
) -> Manifest:
    """Return the pod template with what the platform and the spec add. `template` is not changed.

    The platform's variables and mounts are added to every container, those of the spec only to `containers`: others hold
    the namespace's keys, and must not be led elsewhere.
    """
    given = platform.wire()
    wish = _of_user(user) if user is not None else {}
    if not given and not wish:
        return template
    metadata, spec = template["metadata"], dict(template["spec"])
    selector = {"matchLabels": {OWNER_UID: metadata["labels"][OWNER_UID]}}
    metadata = metadata | {"labels": wish.get("labels", {}) | given.get("labels", {}) | metadata["labels"]}
    annotations = wish.get("annotations", {}) | given.get("annotations", {}) | metadata.get("annotations", {})
    if annotations:
        metadata["annotations"] = annotations
    for more in (given, wish):
        if "affinity" in more:
            spec["affinity"] = both(spec.get("affinity", {}), _selecting(more["affinity"], selector))
    constraints = {
        (item["topologyKey"], item["whenUnsatisfiable"]): {"labelSelector": selector} | item
        for part in (spec, wish, given)
        for item in part.get("topologySpreadConstraints", [])
    }
    if constraints:
        spec["topologySpreadConstraints"] = list(constraints.values())
    for group in ("initContainers", "containers"):
        if group in spec:
            spec[group] = [
                _container(_container(item, given), wish if item["name"] in containers else {}) for item in spec[group]
            ]
    spec["volumes"] = [*spec["volumes"], *given.get("volumes", []), *wish.get("volumes", [])]
    return template | {"metadata": metadata, "spec": spec}


def _of_user(user: PodTemplate) -> Manifest:
    """Return the fields of a spec as those of a pod. Only empty folders are writable."""
    given = user.wire()
    writable = {item["name"] for item in given.get("volumes", []) if "emptyDir" in item}
    for item in given.get("env", []):
        item["value"] = literal(item["value"])
    for item in given.get("volumes", []):
        item["name"] = USER + item["name"]
        if "persistentVolumeClaim" in item:
            item["persistentVolumeClaim"]["readOnly"] = True
    for item in given.get("volumeMounts", []):
        if item["name"] not in writable:
            item["readOnly"] = True
        item["name"] = USER + item["name"]
    return given


def _container(container: Manifest, more: Manifest) -> Manifest:
    """Return the container with the variables and mounts whose names and paths it does not have yet."""
    added: Manifest = {}
    for field, key in (("env", "name"), ("volumeMounts", "mountPath")):
        there = container.get(field, [])
        taken = {item[key] for item in there}
        if new := [item for item in more.get(field, []) if item[key] not in taken]:
            added[field] = [*there, *new]
    return container | added if added else container


def _selecting(affinity: Manifest, selector: Manifest) -> Manifest:
    """Return the affinity. Terms about pods that select none get the selector of this job's or deployment's pods."""
    found = dict(affinity)
    for name in ("podAffinity", "podAntiAffinity"):
        if part := affinity.get(name):
            found[name] = part | {
                REQUIRED: [{"labelSelector": selector} | term for term in part.get(REQUIRED, [])],
                PREFERRED: [
                    item | {"podAffinityTerm": {"labelSelector": selector} | item["podAffinityTerm"]}
                    for item in part.get(PREFERRED, [])
                ],
            }
    return found


def both(one: Manifest, other: Manifest) -> Manifest:
    """Return the affinity that demands and prefers what both demand and prefer."""
    found: Manifest = {}
    for name in ("nodeAffinity", "podAffinity", "podAntiAffinity"):
        parts = [part[name] for part in (one, other) if part.get(name)]
        combined: Manifest = {
            key: items
            for key in (REQUIRED, PREFERRED)
            if name != "nodeAffinity" or key == PREFERRED
            if (items := [item for part in parts for item in part.get(key) or []])
        }
        required = [
            part[REQUIRED]["nodeSelectorTerms"] for part in parts if name == "nodeAffinity" and REQUIRED in part
        ]
        if required:
            # One of the terms of each part must hold, and all requirements of a term must hold together.
            combined[REQUIRED] = {
                "nodeSelectorTerms": [
                    {
                        field: items
                        for field in ("matchExpressions", "matchFields")
                        if (items := [item for term in terms for item in term.get(field) or []])
                    }
                    for terms in product(*required)
                ]
            }
        if combined:
            found[name] = combined
    return found
