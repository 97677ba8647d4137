"""What is applied equals what is wanted: what leaves a spec leaves the pods, and what is changed by hand is repaired."""

import json
import re
from typing import Any

import pytest
from graft.api.adapterdeployment import AdapterDeploymentSpec, Autoscaling, EngineLimits
from graft.api.meta import Placement
from graft.applied import APPLIED
from graft.kube import FIELD_MANAGER
from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import OperatorProcess
from worlds.cluster.settled import settled
from worlds.cluster.tenant import Tenant

CHILDREN = (
    "Deployment",
    "ConfigMap",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "HorizontalPodAutoscaler",
)
MEMORY = {"requests": {"cpu": "100m", "memory": "300Mi"}}
BARE: dict[str, Any] = {"replicas": 0, "engine": "transformers", "resources": MEMORY}
SCALED = {"minReplicas": 1, "maxReplicas": 3, "target": {"cpuPercent": 50}}
# For each field of the spec, a value that changes a child. What is not optional, or changes no child, has None.
SPECS: dict[str, dict[str, Any] | None] = {
    "base_model": None,
    "adapters": None,
    "routes": None,
    "engine": None,
    "strategy": None,
    "drain_seconds": None,
    "limits": {"limits": {"maxLoras": 4, "adaptersPerReplica": 2, "adapterBytesPerReplica": "1Gi"}},
    "replicas": {"replicas": 2},
    "autoscaling": {"replicas": 1, "autoscaling": SCALED},
    "quantization": {"quantization": "int4"},
    "tool_call_parser": {"toolCallParser": "hermes"},
    "chat_template": {"chatTemplate": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    "engine_args": None,  # only vLLM has them: tests/cluster/fields
    "pod_template": {
        "podTemplate": {
            "labels": {"team": "a"},
            "affinity": {
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "kubernetes.io/hostname"}]
                }
            },
            "topologySpreadConstraints": [
                {"maxSkew": 2, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
            ],
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
            "volumes": [{"name": "work", "emptyDir": {}}],
            "volumeMounts": [{"name": "work", "mountPath": "/mnt/volumes/work"}],
        }
    },
    "resources": {"resources": MEMORY | {"limits": {"cpu": "1", "memory": "2Gi", "nvidia.com/gpu": "1"}}},
    "shutdown_seconds": {"shutdownSeconds": 77},
    "node_selector": {"nodeSelector": {"kubernetes.io/os": "linux", "pool": "gpu"}},
    "tolerations": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
    "priority_class_name": {"priorityClassName": "patient"},
    "runtime_class_name": {"runtimeClassName": "nvidia"},
}
LIMITS: dict[str, Any] = {
    "max_loras": 3,
    "max_lora_rank": 32,
    "max_model_len": 32,
    "max_num_seqs": 3,
    "adapters_per_replica": 2,
    "adapter_bytes_per_replica": "1Gi",
}


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


def sweep() -> list[Any]:
    """Return the specs to set and to take back, one per optional field."""
    assert set(SPECS) == set(AdapterDeploymentSpec.model_fields) | set(Placement.model_fields), (
        "a field is missing here"
    )
    assert set(LIMITS) == set(EngineLimits.model_fields), "a limit is missing here"
    found = [pytest.param(spec, id=name) for name, spec in SPECS.items() if spec is not None]
    found += [pytest.param({"limits": {camel(key): value}}, id=f"limits.{key}") for key, value in LIMITS.items()]
    return found


def taken_back(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the merge patch that takes the fields of a spec back."""
    patch: dict[str, Any] = dict.fromkeys(spec)
    patch |= {key: BARE[key] for key in spec if key in BARE}
    if "resources" in patch:
        patch["resources"] = MEMORY | {"limits": None}
    return patch


# In the JSON text of a ConfigMap. Each deployment has keys of its own.
GATEWAY_KEYS = re.compile(r'\\"gatewayKeys\\":\[[^]]*\]')


def children(tenant: Tenant, name: str) -> dict[str, Object]:
    """Return what the operator wants of each child of a deployment, with the same names for every deployment."""
    owner = tenant.get("AdapterDeployment", name)
    found = {}
    for kind in CHILDREN:
        for item in tenant.api.list(kind, tenant.name, f"graft.dev/owner-uid={owner['metadata']['uid']}"):
            meta = item["metadata"]
            notes = {key: text for key, text in (meta.get("annotations") or {}).items() if key.startswith("graft.dev/")}
            notes.pop(APPLIED, None)
            notes.pop("graft.dev/scaled-at", None)
            shown = {"labels": meta.get("labels"), "annotations": notes, "owners": meta.get("ownerReferences")}
            rest = {key: value for key, value in item.items() if key not in {"metadata", "status"}}
            text = json.dumps({"metadata": shown} | rest)
            text = text.replace(owner["metadata"]["uid"], "UID").replace(f'"{name}', '"NAME')
            text = GATEWAY_KEYS.sub("", text)
            found[kind + meta["name"].removeprefix(name)] = json.loads(text)
    return found


def reconciled(tenant: Tenant, name: str) -> None:
    """Wait until the status is about the present spec."""

    def done() -> bool:
        found = tenant.get("AdapterDeployment", name)
        return bool(found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"])

    tenant.wait(done, f"the operator has reconciled {name}")


@pytest.fixture
def pair(tenant: Tenant) -> Tenant:
    """Return the namespace with two equal deployments: one stays as it is."""
    tenant.trained("first")
    for name in ("alike", "edited"):
        Fleet(tenant, name).deploy(["support@1.0.0"], **BARE)
        reconciled(tenant, name)
        tenant.wait(lambda name=name: "ConfigMap-wanted" in children(tenant, name), f"{name} has its children")
    return tenant


def test_what_leaves_the_spec_leaves_the_children(pair: Tenant) -> None:
    fleet = Fleet(pair, "edited")
    reconciled(pair, "alike")
    fresh = children(pair, "alike")
    assert children(pair, "edited") == fresh
    for case in sweep():
        (spec,) = case.values
        fleet.change(**spec)
        pair.wait(lambda: children(pair, "edited") != fresh, f"{case.id} reaches a child")
        reconciled(pair, "edited")
        fleet.change(**taken_back(spec))
        pair.wait(
            lambda: children(pair, "edited") == fresh,
            f"the children are those of a fresh deployment without {case.id}",
            explain=lambda: json.dumps(children(pair, "edited")),
        )


def test_an_object_of_the_version_before_loses_what_its_spec_no_longer_has(
    pair: Tenant, running: OperatorProcess
) -> None:
    """The version before applied with the same field manager, and left a removed node selector in the pods."""
    fresh = children(pair, "alike")
    running.stop()
    live = pair.get("Deployment", "edited")
    meta = {key: live["metadata"][key] for key in ("name", "namespace", "labels", "ownerReferences")}
    spec = {key: value for key, value in live["spec"].items() if key != "revisionHistoryLimit"}
    spec["template"]["spec"]["nodeSelector"] = {"pool": "gpu"}
    pair.api.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec}, FIELD_MANAGER)
    assert APPLIED not in pair.get("Deployment", "edited")["metadata"]["annotations"]
    running.start()
    pair.wait(lambda: children(pair, "edited") == fresh, "the node selector is gone")


def test_what_is_deleted_or_changed_by_hand_comes_back_at_once(pair: Tenant) -> None:
    Fleet(pair, "edited").change(replicas=2, autoscaling=SCALED)
    Fleet(pair, "alike").change(replicas=2, autoscaling=SCALED)
    pair.wait(
        lambda: {"PodDisruptionBudget", "HorizontalPodAutoscaler"} <= children(pair, "edited").keys(), "is scaled"
    )
    reconciled(pair, "edited")
    settled(pair)
    wanted = children(pair, "edited")
    for child in wanted:
        kind, _, rest = child.partition("-")
        pair.api.delete(kind, pair.name, f"edited{'-' if rest else ''}{rest}")
        # The resync comes after minutes.
        pair.wait(lambda child=child: child in children(pair, "edited"), f"{child} is there again", 10)
    changes: dict[str, Object] = {
        "Deployment": {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 400}}}},
        "ConfigMap-wanted": {"metadata": {"ownerReferences": None}, "data": {"wanted.json": "{}"}},
        "ConfigMap-residency": {"metadata": {"ownerReferences": None}},  # its data is the agents'
        "ServiceAccount-agent": {"automountServiceAccountToken": True},
        "Role-agent": {"rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]},
        "RoleBinding-agent": {"subjects": [{"kind": "ServiceAccount", "name": "someone", "namespace": pair.name}]},
        "NetworkPolicy-serving": {"spec": {"ingress": [{}], "podSelector": {"matchLabels": {"a": "b"}}}},
        "PodDisruptionBudget": {"spec": {"maxUnavailable": 0}},
        "HorizontalPodAutoscaler": {"spec": {"maxReplicas": 9}},
    }
    assert changes.keys() == wanted.keys()
    for child, patch in changes.items():
        kind, _, rest = child.partition("-")
        pair.api.patch(kind, pair.name, f"edited{'-' if rest else ''}{rest}", patch)
    pair.wait(
        lambda: children(pair, "edited") == wanted,
        "the changes by hand are repaired",
        10,
        explain=lambda: json.dumps(children(pair, "edited")),
    )


def test_other_managers_keep_what_they_set(pair: Tenant) -> None:
    """A webhook adds a sidecar, and a user writes a quantity in another notation: neither is written again and again."""
    fleet = Fleet(pair, "edited")
    fleet.change(resources={"requests": {"cpu": "1000m", "memory": "1024Mi"}})
    reconciled(pair, "edited")
    sidecar = {"name": "sidecar", "image": "s:1"}
    spec = {"template": {"spec": {"containers": [sidecar]}}}
    live = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "edited", "namespace": pair.name}}
    pair.api.apply(live | {"spec": spec}, "injector")
    before = settled(pair)
    pair.api.patch("AdapterDeployment", pair.name, "edited", {"metadata": {"annotations": {"note": "wake up"}}})
    settled(pair)
    assert pair.get("Deployment", "edited")["metadata"]["resourceVersion"] == before["Deployment edited"]
    names = [item["name"] for item in pair.get("Deployment", "edited")["spec"]["template"]["spec"]["containers"]]
    assert sorted(names) == ["engine", "sidecar"]


def test_the_sweep_knows_every_field_of_autoscaling() -> None:
    optional = {"min_replicas", "max_replicas", "target", "provider", "prometheus_url", "idle_seconds"}
    assert set(Autoscaling.model_fields) == optional
