"""The state that a user sees, in a form in which two runs can be compared.

UIDs, digests, times and the names of pods differ from run to run, so they are replaced. Everything else must be equal.
"""

import json
import re
from typing import Any

from graft.artifacts.store import S3Store

from worlds.cluster.api import Api, Object
from worlds.cluster.operator_process import BUCKET, SYSTEM

OURS = ("FineTuneJob", "Adapter", "AdapterDeployment")
CHILDREN = (
    "Job", "Deployment", "ConfigMap", "Secret", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount", "Service",
    "PodDisruptionBudget", "HorizontalPodAutoscaler",
)  # fmt: skip
# The API server and other controllers write these. `resourceVersion` and `generation` count writes, and a write that is
# repeated after a crash is no fault.
METADATA = ("labels", "annotations", "finalizers")
# They reserve the version of a job that starts at its first reconcile. The version of one that had to wait is reserved in
# its status, and so is it in the end for both.
RESERVATION = {"graft.dev/version", "graft.dev/recipe"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
SIGNATURE = re.compile(r"[A-Za-z0-9+/]{86}==")
# Digests and hashes, but no numbers, which JSON writes behind a space or a bracket.
HEX = re.compile(r"(?<![\d. \[])\b[0-9a-f]{9,}\b|\b(?=\d*[a-f])[0-9a-f]{9,}\b")


def snapshot(api: Api, store: S3Store, namespace: str) -> dict[str, Any]:
    """Return what exists for a namespace: "<kind> <name>" -> metadata, content and status, and what the store has."""
    items: list[Object] = []
    for kind in (*OURS, *CHILDREN):
        found = api.list(kind, namespace)
        items += [
            item | {"kind": kind} for item in found if item["metadata"]["name"] not in {"kube-root-ca.crt", "default"}
        ]
    routes = api.list("ConfigMap", SYSTEM, f"graft.dev/component=routes,graft.dev/namespace={namespace}")
    items += [item | {"kind": "routes"} for item in routes]
    pods = api.list("Pod", namespace)
    state: dict[str, Any] = {f"{item['kind']} {item['metadata']['name']}": _seen(item) for item in items}
    state["pods"] = sorted(_of_pod(pod) for pod in pods)
    state["stored"] = [item.key for item in store.objects(f"{namespace}/")]
    policy = store.client.get_bucket_policy(Bucket=BUCKET)["Policy"]
    state["rights in the bucket"] = f"Own{namespace}" in policy
    owned = [(item["metadata"]["uid"], f"UID of {item['kind']} {item['metadata']['name']}") for item in items]
    owned += [(pod["metadata"]["name"], f"POD of {_of_pod(pod)}") for pod in pods]
    owned += [(f"{pod['status']['podIP']}:", "IP OF POD:") for pod in pods if pod["status"].get("podIP")]
    return _general(state, dict(owned), namespace)


def _of_pod(pod: Object) -> str:
    labels = pod["metadata"].get("labels") or {}
    return f"{labels.get('graft.dev/owner')} {labels.get('graft.dev/component')} {pod['status'].get('phase')}"


def _seen(item: Object) -> Object:
    metadata = item["metadata"]
    found: Object = {key: metadata.get(key) or {} for key in METADATA}
    found["annotations"] = {key: text for key, text in found["annotations"].items() if key not in RESERVATION}
    found["owners"] = metadata.get("ownerReferences") or []
    if item["kind"] == "Secret":
        return found | {"keys": sorted(item.get("data") or {})}
    if item["kind"] in {*OURS, "Job"}:
        found["status"] = item.get("status")
    rest = {key: value for key, value in item.items() if key not in {"metadata", "status", "apiVersion", "kind"}}
    if item["kind"] == "ConfigMap" or item["kind"] == "routes":
        rest["data"] = {
            key: json.loads(text) if text.startswith(("{", "[")) else text for key, text in rest.get("data", {}).items()
        }
    return found | rest


def _general(state: dict[str, Any], names: dict[str, str], namespace: str) -> dict[str, Any]:
    text = json.dumps(state, sort_keys=True)
    for old, new in sorted(names.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(old, new)
    text = SIGNATURE.sub("SIGNATURE", text)
    text = HEX.sub("HEX", UUID.sub("UUID", TIME.sub("TIME", text.replace(namespace, "NAMESPACE"))))
    state = dict(json.loads(text))
    state["stored"] = sorted(state["stored"])
    for item in state.values():
        if isinstance(item, dict) and isinstance(item.get("status"), dict):
            status = item["status"]
            status.pop("observedGeneration", None)  # current() checks it
            for key in ("conditions",):
                status[key] = sorted(status.get(key) or [], key=lambda found: str(found["type"]))
                for found in status[key]:
                    found.pop("observedGeneration", None)
    return state


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Return where two states differ, one line each."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(set(expected) | set(found))
        return [line for key in keys for line in differences(expected.get(key), found.get(key), f"{path}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = zip(expected, found, strict=True)
        return [line for number, pair in enumerate(pairs) for line in differences(*pair, f"{path}/{number}")]
    return (
        [] if expected == found else [f"{path}: {str(expected)[:300]} without faults, {str(found)[:300]} with faults"]
    )


def outdated(api: Api, namespace: str) -> list[str]:
    """Return the resources whose status is of an older generation than their spec."""
    return [
        f"{kind} {item['metadata']['name']}"
        for kind in OURS
        for item in api.list(kind, namespace)
        if (item.get("status") or {}).get("observedGeneration") != item["metadata"]["generation"]
    ]


def events(api: Api, namespace: str) -> set[str]:
    """Return the Events of a namespace about our kinds: "<kind> <name> <reason>"."""
    found = api.list("CoreEvent", namespace)
    about = [(item["involvedObject"], item["reason"]) for item in found]
    return {f"{item['kind']} {item['name']} {reason}" for item, reason in about if item["kind"] in OURS}
