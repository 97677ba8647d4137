"""The children of a resource in a test, without what differs between two resources with the same spec."""

import json
import re

from graft.applied import APPLIED
from graft.manifests.metadata import OWNER_UID
from graft.manifests.scaling import SCALED_AT
from graft.manifests.training import JOB_FILE_DIGEST

from worlds.cluster.api import Object
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import Tenant

CHILDREN = (
    "Deployment",
    "Job",
    "ConfigMap",
    "Service",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "HorizontalPodAutoscaler",
)
# In the JSON text of a ConfigMap: each deployment has keys of its own, and each job its time.
OWN = re.compile(r'\\"gatewayKeys\\":\[[^]]*\]|\\"createdAt\\":\\"[^"]*\\"')
POD, ADDRESS = re.compile(r"\bNAME-[a-z0-9]+-[a-z0-9]{5}\b"), re.compile(r"\b\d+(?:\.\d+){3}:\d+\b")
DIGESTS = {APPLIED, SCALED_AT, JOB_FILE_DIGEST}  # annotations: of what has the names of its resource, and a time
# In the metadata and the spec of a Job: set by the API server and the Job controller.
CONTROLLERS = re.compile(r'"(?:batch\.kubernetes\.io/|)(?:controller-uid|job-name)": "[^"]*",? ?')


def outcome(tenant: Tenant, name: str, kind: str = "AdapterDeployment") -> dict[str, Object]:
    """Return whether the operator accepts a resource, and if so, what it wants of each child.

    The names are the same for every resource. A resource that is not accepted keeps the children that it had.
    """
    owner = tenant.get(kind, name)
    said = tenant.condition(kind, name, "Accepted")
    said = {key: text.replace(name, "NAME") for key, text in said.items() if key in {"status", "reason", "message"}}
    if said.get("status") != "True":
        return {"Accepted": said}
    labels = f"{OWNER_UID}={owner['metadata']['uid']}"
    found = {
        child + item["metadata"]["name"].removeprefix(name): _wanted(item, owner)
        for child in CHILDREN
        for item in tenant.api.list(child, tenant.name, labels)
        if not item["metadata"].get("deletionTimestamp")
    }
    for routes in tenant.api.list("ConfigMap", SYSTEM, labels):
        found["routes"] = _wanted(routes, owner)
    return found | {"Accepted": said}


def _wanted(item: Object, owner: Object) -> Object:
    """Return what is wanted of one child, with UID and NAME instead of those of its owner."""
    meta, name = item["metadata"], owner["metadata"]["name"]
    notes = {key: text for key, text in (meta.get("annotations") or {}).items() if key.startswith("graft.dev/")}
    notes = {key: text for key, text in notes.items() if key not in DIGESTS}
    shown = {"labels": meta.get("labels"), "annotations": notes, "owners": meta.get("ownerReferences")}
    rest = {key: value for key, value in item.items() if key not in {"metadata", "status"}}
    text = json.dumps({"metadata": shown} | rest).replace(owner["metadata"]["uid"], "UID")
    text = CONTROLLERS.sub("", OWN.sub("", text)).replace(", }", "}")
    text = re.sub(rf"\b{re.escape(name)}\b", "NAME", text)
    return dict(json.loads(ADDRESS.sub("ADDRESS", POD.sub("POD", text))))


def reconciled(tenant: Tenant, name: str, kind: str = "AdapterDeployment") -> None:
    """Wait until the status is about the present spec."""

    def done() -> bool:
        found = tenant.api.get(kind, None if kind == "BaseModel" else tenant.name, name)
        assert found is not None
        return bool(found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"])

    tenant.wait(done, f"the operator has reconciled {name}")
