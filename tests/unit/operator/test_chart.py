"""The Helm chart: it renders and refuses typos. Its pods meet Pod Security `restricted`. Its roles have few rights."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from graft.artifacts.storage import StorageConfig
from graft.contracts.agent import TRUSTED_KEYS
from graft.contracts.apikeys import API_KEYS_SECRET
from graft.contracts.enginekeys import GATEWAY_KEYS, SENDS_KEYS
from graft.crdgen import ROOT
from graft.kinds import KINDS
from graft.manifests.metadata import labels
from graft.reconcile.shared import uninstall
from graft.settings import Allowed, AllowedTaint, Settings, Signing
from worlds.cluster.chart import CHART, Manifest, helm, run, template

__all__ = ["helm", "template"]  # fixtures
EXTERNAL = {
    "objectStore": {
        "bucket": "ml-adapters",
        "region": "eu-central-1",
        "credentials": "provided",
        "embedded": {"enabled": False},
        "external": {"endpoint": "https://s3.example.com", "existingSecret": "graft-s3"},
    }
}
EVERYTHING = {
    "tenantNamespaces": ["team-a", "team-b"],
    "imagePullSecrets": ["registry"],
    "gateway": {
        "replicas": 3,
        "trustedProxies": ["10.0.0.0/8", "fd00::/8"],
        "ingress": {"enabled": True, "host": "llm.example.com", "className": "nginx", "tlsSecret": "llm-tls"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example.com"]},
    },
    "operator": {
        "replicas": 2,
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"operator": "Exists"}],
        "priorityClassName": "high",
    },
    "objectStore": {"embedded": {"persistence": {"storageClass": "fast"}, "nodeSelector": {"pool": "storage"}}},
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {}}],
        "metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
        "storeFrom": [{"podSelector": {"matchLabels": {"app": "upload"}}}],
    },
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
    },
}


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    found = [item for item in manifests if item["kind"] == kind and item["metadata"]["name"] == name]
    assert len(found) == 1, (
        f"expected one {kind} {name}, found {[(item['kind'], item['metadata']['name']) for item in manifests]}"
    )
    return found[0]


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the pod templates by the name of their workload."""
    return {
        item["metadata"]["name"]: item["spec"]["template"]
        for item in manifests
        if item["kind"] in {"Deployment", "StatefulSet", "DaemonSet", "Job"}
    }


def rules(manifests: list[Manifest]) -> list[tuple[str, str, Manifest]]:
    """Return every RBAC rule, with the kind and the name of its role."""
    return [
        (item["kind"], item["metadata"]["name"], rule)
        for item in manifests
        if item["kind"] in {"Role", "ClusterRole"}
        for rule in item["rules"]
    ]


def operator_settings(manifests: list[Manifest]) -> Settings:
    data = find(manifests, "ConfigMap", "graft-config")["data"]
    return Settings.model_validate_json(data["config.json"])


@pytest.mark.parametrize("values", [{}, EXTERNAL, EVERYTHING], ids=["default", "external", "everything"])
def test_helm_lint_finds_nothing(helm: str, tmp_path: Path, values: Manifest) -> None:
    done = run(helm, "lint", str(CHART), "--strict", values=values, tmp=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_defaults_are_valid_and_name_every_field_of_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)

    def unlisted(node: Manifest, value: Any, path: str) -> list[str]:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        if "properties" not in node:
            return []
        assert node["additionalProperties"] is False, path
        missing = [f"{path}.{name}" for name in node["properties"] if name not in value and name != "global"]
        return missing + [
            entry for name in value for entry in unlisted(node["properties"][name], value[name], f"{path}.{name}")
        ]

    assert unlisted(schema, values, "") == [], "these fields are in the schema but not in values.yaml"


@pytest.mark.parametrize(
    "typo",
    [
        {"tenantNamespace": ["a"]},
        {"gateway": {"replica": 2}},
        {"images": {"operator": {"digest": "latest"}}},
        {"objectStore": {"embedded": {"persistance": {"enabled": False}}}},
        {"objectStore": {"credentials": "isue"}},
        {"tenantNamespaces": ["Team_A"]},
    ],
    ids=str,
)
def test_a_typo_is_refused(helm: str, tmp_path: Path, typo: Manifest) -> None:
    done = run(helm, "template", "graft", str(CHART), values=typo, tmp=tmp_path)
    assert done.returncode != 0
    assert "don't meet the specifications of the schema" in done.stderr


def test_an_external_store_without_its_key_is_refused(helm: str, tmp_path: Path) -> None:
    values = {"objectStore": {"embedded": {"enabled": False}, "credentials": "provided"}}
    done = run(helm, "template", "graft", str(CHART), values=values, tmp=tmp_path)
    assert "objectStore.external.existingSecret is needed" in done.stderr


def test_issuing_keys_needs_a_store_with_an_admin_url(helm: str, tmp_path: Path) -> None:
    values = {"objectStore": {"embedded": {"enabled": False}, "external": {"existingSecret": "s"}}}
    done = run(helm, "template", "graft", str(CHART), values=values, tmp=tmp_path)
    assert "needs objectStore.external.adminUrl" in done.stderr


@pytest.mark.parametrize("values", [{}, EXTERNAL, EVERYTHING], ids=["default", "external", "everything"])
def test_every_pod_meets_pod_security_restricted(template: Any, values: Manifest) -> None:
    found = pods(template(values))
    assert {"graft-operator", "graft-gateway", "graft-uninstall"} <= set(found)
    for name, pod in found.items():
        spec = pod["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert all(
            set(volume) <= {"name", "configMap", "secret", "emptyDir", "projected", "persistentVolumeClaim"}
            for volume in spec.get("volumes", [])
        ), name
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert "privileged" not in security, name
            assert {"requests", "limits"} <= set(container["resources"]), name


def test_only_the_third_party_store_has_a_key_in_its_environment(template: Any) -> None:
    for name, pod in pods(template(EVERYTHING)).items():
        for container in pod["spec"]["containers"]:
            secret = [
                entry["name"] for entry in container.get("env", []) if "secretKeyRef" in entry.get("valueFrom", {})
            ]
            assert not secret or name == "graft-store", name


def test_the_operator_binds_members_of_tenants_to_three_roles_and_only_if_tenants_are_enabled(template: Any) -> None:
    """Everything else in the roles stays as it is without Tenants."""
    without, with_tenants = (rules(template({"tenants": {"enabled": value}})) for value in (False, True))
    more = [rule for rule in with_tenants if rule not in without]
    named = ["graft-view", "graft-edit", "graft-admin"]
    assert [(kind, name) for kind, name, _ in more] == [("ClusterRole", "graft-tenant")] * 2
    assert [(rule["resources"], rule.get("resourceNames"), rule["verbs"]) for *_, rule in more] == [
        (["clusterroles"], named, ["bind"]),
        (["namespaces"], None, ["patch"]),
    ]
    assert [rule for rule in without if rule not in with_tenants] == []
    assert not operator_settings(template()).tenants_enabled
    settings = operator_settings(template({"tenants": {"enabled": True}}))
    assert settings.tenants_enabled
    assert [settings.member_cluster_roles[role] for role in ("view", "edit", "admin")] == named


@pytest.mark.parametrize("values", [{}, EXTERNAL, EVERYTHING], ids=["default", "external", "everything"])
def test_no_role_has_a_wildcard_or_reads_all_secrets_of_the_cluster(template: Any, values: Manifest) -> None:
    manifests = template(values)
    for kind, name, rule in rules(manifests):
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"], name
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), name
        if "secrets" in rule["resources"]:
            named = {
                ("ClusterRole", "graft-tenant"): [["graft-storage"], [API_KEYS_SECRET]],
                ("ClusterRole", "graft-admin"): [["graft-storage", API_KEYS_SECRET]],
                ("Role", "graft-operator"): [["graft-signing"], ["graft-store-key"], [GATEWAY_KEYS]],
                ("Role", "graft-gateway"): [[GATEWAY_KEYS]],
            }
            assert rule["verbs"] == ["create"] or rule["resourceNames"] in named[kind, name]
            assert name != "graft-gateway" or rule["verbs"] == ["get", "list", "watch"]
    for item in manifests:
        if item["kind"] == "ClusterRoleBinding":
            assert item["roleRef"]["name"] in {"graft-operator", "graft-uninstall"}
        if item["kind"] in {"ClusterRoleBinding", "RoleBinding"}:
            everybody = {"Group"} if item["metadata"]["name"] == "graft-trusted-keys" else {"ServiceAccount"}
            assert {subject["kind"] for subject in item["subjects"]} == everybody


def test_the_operator_writes_workloads_only_in_the_tenant_namespaces(template: Any) -> None:
    manifests = template({"tenantNamespaces": ["team-a", "team-b"]})
    bound = [
        item["metadata"]["namespace"]
        for item in manifests
        if item["kind"] == "RoleBinding" and item["roleRef"]["name"] == "graft-tenant"
    ]
    assert bound == ["team-a", "team-b"]
    for rule in find(manifests, "ClusterRole", "graft-operator")["rules"]:
        if {"", "apps", "batch"} & set(rule["apiGroups"]) and rule["resources"] != ["events"]:
            assert set(rule["verbs"]) <= {"get", "list", "watch"}, rule


def test_everybody_may_read_only_the_public_keys(template: Any) -> None:
    manifests = template(EVERYTHING)
    groups = [
        (item["kind"], item["roleRef"], subject["name"])
        for item in manifests
        if item["kind"] in {"RoleBinding", "ClusterRoleBinding"}
        for subject in item["subjects"]
        if subject["kind"] != "ServiceAccount"
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "graft-trusted-keys"}
    assert groups == [("RoleBinding", role, "system:authenticated")]
    (rule,) = find(manifests, "Role", "graft-trusted-keys")["rules"]
    assert rule == {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": [TRUSTED_KEYS],
        "verbs": ["get", "list", "watch"],
    }


@pytest.mark.parametrize("create", [True, False])
def test_the_signing_key_is_one_secret_in_the_namespace_of_the_operator(template: Any, create: bool) -> None:
    manifests = template({"signing": {"secretName": "keys", "create": create}})
    assert operator_settings(manifests).signing == Signing(secret="keys", create=create)
    role = find(manifests, "Role", "graft-operator")
    assert role["metadata"]["namespace"] == "graft-system"
    secrets = [rule for rule in role["rules"] if "secrets" in rule["resources"]]
    assert [(rule["verbs"], rule.get("resourceNames")) for rule in secrets] == [
        (["get"], ["keys"]),
        (["get"], ["graft-store-key"]),
        (["get"], [GATEWAY_KEYS]),
        (["create"], None),  # of the gateways' keys and the store's, too
    ]
    assert not [item for item in manifests if item["kind"] == "Secret" and item["metadata"]["name"] == "keys"]


def test_the_operator_may_not_write_a_storage_key_that_the_user_provides(template: Any) -> None:
    tenant = find(template(EXTERNAL), "ClusterRole", "graft-tenant")
    stored = [rule for rule in tenant["rules"] if rule.get("resourceNames") == ["graft-storage"]]
    assert [rule["verbs"] for rule in stored] == [["get"]]


def test_the_settings_of_the_operator_match_the_values_of_the_chart(template: Any) -> None:
    manifests = template({"imagePullSecrets": ["registry"], "images": {"agent": {"digest": "sha256:" + "a" * 64}}})
    settings = operator_settings(manifests)
    assert settings.namespace == "graft-system"
    assert settings.images.agent == "ghcr.io/graft-dev/agent@sha256:" + "a" * 64
    assert settings.images.trainer.startswith("ghcr.io/graft-dev/trainer:")
    assert settings.image_pull_secrets == ["registry"]
    assert settings.storage.issue_credentials and settings.storage.create_bucket
    assert settings.storage.endpoint == "http://graft-store.graft-system.svc:7070"
    assert settings.storage.admin_url == "http://graft-store-admin.graft-system.svc:7071"
    assert settings.huggingface_endpoint is None
    gateway = pods(manifests)["graft-gateway"]["metadata"]["labels"]
    assert settings.gateway_selector.items() <= gateway.items()
    assert find(manifests, "ServiceAccount", settings.operator_service_account)
    assert find(manifests, "ClusterRole", settings.tenant_cluster_role)
    service = find(manifests, "Service", "graft-gateway")
    assert settings.gateway_url == f"http://graft-gateway.graft-system.svc:{service['spec']['ports'][0]['port']}"


def test_with_an_external_store_there_is_no_embedded_one(template: Any) -> None:
    manifests = template(EXTERNAL)
    assert not [item["metadata"]["name"] for item in manifests if "store" in item["metadata"]["name"]]
    settings = operator_settings(manifests)
    assert not settings.storage.issue_credentials and not settings.storage.create_bucket
    assert settings.storage.endpoint == "https://s3.example.com"


@pytest.mark.parametrize("values", [{}, EXTERNAL], ids=["embedded", "external"])
def test_the_operators_storage_folder_is_complete(template: Any, values: Manifest, tmp_path: Path) -> None:
    manifests = template(values)
    volumes = {volume["name"]: volume for volume in pods(manifests)["graft-operator"]["spec"]["volumes"]}
    config, *secret = volumes["storage"]["projected"]["sources"]
    data = find(manifests, "ConfigMap", config["configMap"]["name"])["data"]
    for item in config["configMap"]["items"]:
        (tmp_path / item["path"]).write_text(data[item["key"]])
    (tmp_path / "access-key-id").write_text("key")
    (tmp_path / "secret-access-key").write_text("secret")

    read = StorageConfig.from_dir(tmp_path)

    assert read.prefix == ""
    assert read.bucket == values.get("objectStore", {}).get("bucket", "graft")
    assert read.endpoint == operator_settings(manifests).storage.endpoint
    assert bool(secret) is bool(values), "the operator makes the key of the embedded store itself"


def test_the_crds_are_templates_and_survive_an_uninstall(template: Any) -> None:
    originals = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / "crds").glob("*.yaml")}
    rendered = [item for item in template() if item["kind"] == "CustomResourceDefinition"]
    assert len(rendered) == len(originals)
    for item in rendered:
        assert item["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        assert item == originals[f"{item['metadata']['name']}.yaml"]
    unkept = [item for item in template({"crds": {"keep": False}}) if item["kind"] == "CustomResourceDefinition"]
    assert len(unkept) == len(originals) and not any("annotations" in item["metadata"] for item in unkept)
    assert not [item for item in template({"crds": {"install": False}}) if item["kind"] == "CustomResourceDefinition"]


def test_an_uninstall_removes_the_finalizers_after_the_operator(template: Any) -> None:
    hooks = [
        item for item in template() if item["metadata"].get("annotations", {}).get("helm.sh/hook") not in {None, "test"}
    ]
    weight = {item["kind"]: int(item["metadata"]["annotations"]["helm.sh/hook-weight"]) for item in hooks}
    assert {item["metadata"]["annotations"]["helm.sh/hook"] for item in hooks} == {"post-delete"}
    assert weight["ServiceAccount"] < weight["ClusterRoleBinding"] < weight["Job"]
    assert pods(hooks)["graft-uninstall"]["spec"]["containers"][0]["command"] == ["python", "-m", "graft", "uninstall"]


def test_an_uninstall_knows_every_kind_with_a_finalizer(template: Any) -> None:
    """A resource that keeps its finalizer could not be deleted any more, and its namespace neither."""
    folder = ROOT / "operator/graft/reconcile"
    claiming = [path.relative_to(folder) for path in folder.rglob("*.py") if "ctx.claim(" in path.read_text()]
    assert {path.parts[0].removesuffix(".py") for path in claiming} == {kind.lower() for kind in uninstall.KINDS}
    (rule,) = find(template(), "ClusterRole", "graft-uninstall")["rules"]
    assert set(rule["resources"]) == {KINDS[kind].plural for kind in uninstall.KINDS}


def test_the_network_policy_of_the_store_admits_the_pods_that_the_operator_creates(template: Any) -> None:
    from graft.api import FineTuneJob

    job = FineTuneJob.model_validate(
        {
            "metadata": {"name": "j", "namespace": "team-a"},
            "spec": {
                "baseModel": "m",
                "dataset": {"train": {"uri": "s3://graft/x.jsonl"}},
                "method": {"lora": {}},
                "output": {"adapter": "a"},
            },
        }
    )
    policy = find(template(), "NetworkPolicy", "graft-store")["spec"]
    ports = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    admitted = [peer["podSelector"]["matchLabels"] for peer in ports["s3"] if "namespaceSelector" in peer]
    assert any(selector.items() <= labels(job, "training").items() for selector in admitted)
    assert len(ports["admin"]) == 1, "only the operator may reach the identity service"
    assert "egress" not in policy and "Egress" in policy["policyTypes"]


def test_a_second_gateway_replica_gets_a_disruption_budget(template: Any) -> None:
    assert not [item for item in template() if item["kind"] == "PodDisruptionBudget"]
    assert find(template({"gateway": {"replicas": 2}}), "PodDisruptionBudget", "graft-gateway")


def test_several_operators_elect_the_one_that_works(template: Any) -> None:
    rendered = template({"operator": {"replicas": 2}})
    spec = find(rendered, "Deployment", "graft-operator")["spec"]
    assert spec["replicas"] == 2 and spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    lease = {item["name"]: item.get("value") for item in spec["template"]["spec"]["containers"][0]["env"]}[
        "GRAFT_LEASE"
    ]
    rules = [rule for rule in find(rendered, "Role", "graft-operator")["rules"] if rule["resources"] == ["leases"]]
    assert {"get", "update"} in [set(rule["verbs"]) for rule in rules if rule.get("resourceNames") == [lease]]
    assert find(rendered, "PodDisruptionBudget", "graft-operator")
    one = template({})
    spec = find(one, "Deployment", "graft-operator")["spec"]
    assert spec["strategy"] == {"type": "Recreate"}
    assert "GRAFT_LEASE" not in {item["name"] for item in spec["template"]["spec"]["containers"][0]["env"]}
    assert not [rule for rule in find(one, "Role", "graft-operator")["rules"] if rule["resources"] == ["leases"]]


def test_the_gateway_knows_the_flags_and_probes_of_the_chart(template: Any) -> None:
    from graft_server.gateway.app import Gateway
    from graft_server.gateway.settings import parse

    pod = pods(template())["graft-gateway"]["spec"]
    container = pod["containers"][0]
    assert container["command"][:3] == ["python", "-m", "graft_server.gateway"]
    settings = parse(container["command"][3:])
    assert (settings.namespace, settings.port) == ("graft-system", container["ports"][0]["containerPort"])
    assert pod["terminationGracePeriodSeconds"] > settings.shutdown_delay + settings.drain_seconds
    session: Any = None
    router = Gateway(session, settings, lambda: None).application().router
    routes = {resource.canonical for resource in router.resources()}
    assert {container[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")} <= routes


def test_optional_parts_render(template: Any) -> None:
    manifests = template(EVERYTHING)
    assert find(manifests, "Ingress", "graft-gateway")["spec"]["rules"][0]["host"] == "llm.example.com"
    assert find(manifests, "HTTPRoute", "graft-gateway")["spec"]["parentRefs"] == [{"name": "public"}]
    for component in ("operator", "gateway"):
        monitor = find(manifests, "ServiceMonitor", f"graft-{component}")
        selector = monitor["spec"]["selector"]["matchLabels"]
        services = [
            item
            for item in manifests
            if item["kind"] == "Service" and selector.items() <= item["metadata"]["labels"].items()
        ]
        named = [port["name"] for item in services for port in item["spec"]["ports"]]
        assert named.count(monitor["spec"]["endpoints"][0]["port"]) == 1


def test_the_alerts_and_the_dashboard_are_those_of_the_files(template: Any) -> None:
    rules = find(template(EVERYTHING), "PrometheusRule", "graft")
    assert rules["spec"] == yaml.safe_load((CHART / "monitoring/rules.yaml").read_text())
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    dashboard = find(template(EVERYTHING), "ConfigMap", "graft-dashboard")
    assert dashboard["data"]["graft.json"] == (CHART / "monitoring/dashboard.json").read_text()
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert not {"PrometheusRule", "ServiceMonitor"} & {item["kind"] for item in template({})}


def test_every_service_and_network_policy_selects_one_workload(template: Any) -> None:
    manifests = template(EVERYTHING)
    found = [pod["metadata"]["labels"] for pod in pods(manifests).values()]
    found += [item["metadata"]["labels"] for item in manifests if item["kind"] == "Pod"]
    for item in manifests:
        if item["kind"] == "Service":
            selector = item["spec"]["selector"]
        elif item["kind"] == "NetworkPolicy":
            selector = item["spec"]["podSelector"]["matchLabels"]
        else:
            continue
        assert sum(selector.items() <= pod.items() for pod in found) == 1, item["metadata"]["name"]


def test_the_data_of_the_store_survives_an_uninstall_unless_persistence_is_off(template: Any) -> None:
    spec = find(template(), "StatefulSet", "graft-store")["spec"]
    assert spec["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "100Gi"
    spec = find(
        template({"objectStore": {"embedded": {"persistence": {"enabled": False}}}}), "StatefulSet", "graft-store"
    )["spec"]
    assert "volumeClaimTemplates" not in spec
    assert {"name": "data", "emptyDir": {}} in spec["template"]["spec"]["volumes"]


def test_another_release_name_renames_all_objects_consistently(helm: str, tmp_path: Path) -> None:
    done = run(helm, "template", "prod", str(CHART), "--namespace", "x", values={}, tmp=tmp_path)
    manifests = [item for item in yaml.safe_load_all(done.stdout) if item]
    settings = Settings.model_validate_json(find(manifests, "ConfigMap", "prod-graft-config")["data"]["config.json"])
    assert settings.operator_service_account == "prod-graft-operator"
    assert settings.tenant_cluster_role == "prod-graft-tenant"
    assert set(pods(manifests)) == {f"prod-graft-{part}" for part in ("operator", "gateway", "store", "uninstall")}


def test_gateways_show_that_they_send_keys(template: Any) -> None:
    for values in ({}, {"gateway": {"podAnnotations": {"a": "b"}}}):
        annotations = pods(template(values))["graft-gateway"]["metadata"]["annotations"]
        assert annotations == {SENDS_KEYS: "true"} | values.get("gateway", {}).get("podAnnotations", {})


def test_engines_have_tls_if_the_chart_is_told_to(template: Any) -> None:
    assert operator_settings(template()).engine_tls is False
    assert operator_settings(template({"engineTLS": {"enabled": True}})).engine_tls is True


def test_the_gateway_may_write_only_two_configmaps(template: Any) -> None:
    from graft.contracts.gateway import DEMAND_CONFIGMAP
    from graft.contracts.usage import USAGE_CONFIGMAP

    manifests = template({"gateway": {"holdSeconds": 30}})
    writing = [rule for rule in find(manifests, "Role", "graft-gateway")["rules"] if "patch" in rule["verbs"]]
    assert [(rule["resources"], rule["resourceNames"], rule["verbs"]) for rule in writing] == [
        (["configmaps"], [DEMAND_CONFIGMAP, USAGE_CONFIGMAP], ["patch"])
    ]
    (container,) = pods(manifests)["graft-gateway"]["spec"]["containers"]
    assert container["command"][-2:] == ["--hold-seconds", "30"]
    assert any(entry["name"] == "POD_NAME" for entry in container["env"]), (
        "the keys that the gateway writes contain the name of its pod"
    )


def test_the_gateway_is_told_which_proxies_to_trust(template: Any) -> None:
    from graft_server.gateway.settings import parse

    for given in ([], ["10.0.0.0/8", "fd00::/8"]):
        deployment = find(template({"gateway": {"trustedProxies": given}}), "Deployment", "graft-gateway")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert [str(item) for item in parse(container["command"][3:]).trusted_proxies] == given


def test_tenants_may_ask_for_gpu_nodes_and_nothing_else_by_default(template: Any) -> None:
    assert operator_settings(template({})).allowed == Allowed()
    taint = {"key": "team", "value": "red", "effect": "NoSchedule"}
    tenants = {"allowedPriorityClasses": ["batch"], "allowedRuntimeClasses": [], "allowedTolerations": [taint]}
    values = {"tenants": tenants, "autoscaling": {"prometheusUrl": "http://prometheus:9090"}}
    settings = operator_settings(template(values))
    assert settings.allowed == Allowed(
        priority_classes=["batch"], runtime_classes=[], tolerations=[AllowedTaint(**taint)]
    )
    assert settings.prometheus_url == "http://prometheus:9090"
