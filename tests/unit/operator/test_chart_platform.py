"""The chart as platform teams use it: GitOps without a cluster, as a subchart, on OpenShift, behind a proxy, with roles of a cloud."""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.artifacts.storage import StorageConfig, StoreError
from graft.contracts.mounts import AGENT_PORT
from graft.manifests.metadata import labels
from graft.settings import Settings
from worlds.cluster.chart import CHART, Manifest, Template, helm, run, template

__all__ = ["helm", "template"]  # fixtures
ROLES = {
    "objectStore": {
        "credentials": "webIdentity",
        "embedded": {"enabled": False},
        "webIdentity": {"roleArn": "arn:aws:iam::1:role/graft", "stsEndpoint": "http://minio.minio:9000"},
    }
}
SCRAPED = {"networkPolicy": {"metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]}}


def of_kind(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {item["metadata"]["name"]: item for item in manifests if item["kind"] == kind}


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the specs of all pods by the name of their workload."""
    made = {
        item["metadata"]["name"]: item["spec"]["template"]["spec"]
        for item in manifests
        if "template" in item.get("spec", {})
    }
    return made | {name: item["spec"] for name, item in of_kind(manifests, "Pod").items()}


def settings(manifests: list[Manifest]) -> Settings:
    return Settings.model_validate_json(of_kind(manifests, "ConfigMap")["graft-config"]["data"]["config.json"])


def test_two_renderings_without_a_cluster_are_equal_and_hold_no_key(template: Template) -> None:
    """Argo CD renders again and again: a key of the template would be another one each time."""
    first = template()
    assert first == template()
    assert not of_kind(first, "Secret")
    env = {item["name"]: item.get("value") for item in pods(first)["graft-operator"]["containers"][0]["env"]}
    assert env["GRAFT_STORE_KEY"] == "graft-store-key"
    (store,) = pods(first)["graft-store"]["containers"]
    assert store["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "graft-store-key"
    rules = of_kind(first, "Role")["graft-operator"]["rules"]
    assert {
        "apiGroups": [""],
        "resources": ["secrets"],
        "resourceNames": ["graft-store-key"],
        "verbs": ["get"],
    } in rules


def test_without_vllm_only_its_image_may_be_left_out(template: Template, helm: str, tmp_path: Path) -> None:
    assert settings(template()).images.vllm.startswith("docker.io/vllm/vllm-openai:")
    assert settings(template({"images": {"vllm": {"repository": ""}}})).images.vllm == ""
    refused = run(helm, "template", "graft", str(CHART), values={"images": {"agent": {"repository": ""}}}, tmp=tmp_path)
    assert refused.returncode != 0 and "/images/agent/repository" in refused.stderr


def test_an_existing_key_is_mounted_and_nothing_is_created(template: Template) -> None:
    made = template({"objectStore": {"embedded": {"existingSecret": "mine"}}})
    operator = pods(made)["graft-operator"]
    assert "GRAFT_STORE_KEY" not in {item["name"] for item in operator["containers"][0]["env"]}
    (volume,) = (item for item in operator["volumes"] if item["name"] == "storage")
    assert {"secret": {"name": "mine"}} in volume["projected"]["sources"]


def blanks(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key."""
    if not isinstance(values, dict):
        return []
    return [found for key, child in values.items() for found in [(*path, key), *blanks(child, (*path, key))]]


def test_a_key_without_a_value_is_refused_by_name() -> None:
    """`huggingface:` with nothing behind it removes the defaults below. helm checks the rest against the schema."""
    import jsonschema

    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for *parents, key in blanks(defaults):
        if {"resources", "labels"} & set(parents):
            continue  # a container needs no limits, and labels are free
        left = copy.deepcopy(defaults)
        place = left
        for name in parents:
            place = place[name]
        del place[key]
        with pytest.raises(jsonschema.ValidationError, match=f"'{key}' is a required property"):
            jsonschema.validate(left, schema)


def test_helm_refuses_a_key_without_a_value(helm: str, tmp_path: Path) -> None:
    done = run(
        helm,
        "template",
        "graft",
        str(CHART),
        values={"huggingface": None, "signing": {"secretName": None}},
        tmp=tmp_path,
    )
    assert done.returncode != 0 and "huggingface" in done.stderr and "secretName" in done.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_another_chart_switches_it_on_and_off(helm: str, tmp_path: Path, enabled: bool) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(CHART, parent / "charts" / "graft")
    dependency = {"name": "graft", "version": "0.1.0", "condition": "graft.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    values = {"graft": {"enabled": enabled, "tenantNamespaces": ["a"]}, "global": {"x": 1}}
    done = run(helm, "template", "platform", str(parent), values=values, tmp=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("platform-graft-operator" in done.stdout) is enabled


def test_without_a_fixed_user_the_cluster_chooses(template: Template) -> None:
    """OpenShift's restricted-v2 refuses a pod that names a user outside of the namespace's range."""
    made = template({"podSecurity": {"fixedUser": False}})
    for name, pod in pods(made).items():
        assert "runAsUser" not in str(pod) and "fsGroup'" not in str(pod), name
        assert pod["securityContext"]["runAsNonRoot"] is True
    assert settings(made).run_as_user is None
    fixed = template({"podSecurity": {"runAsUser": 1000680000}})
    assert {pod["securityContext"]["fsGroup"] for pod in pods(fixed).values()} == {1000680000}
    assert settings(fixed).run_as_user == 1000680000


def test_every_pod_gets_the_proxy_and_the_certificate_authorities(template: Template) -> None:
    proxy = {"httpsProxy": "http://proxy.example.com:3128", "noProxy": [".internal"]}
    made = template({"proxy": proxy, "trustedCA": {"configMap": "ca", "key": "bundle.pem"}})
    found = settings(made)
    templates = {"training": found.training_pods, "serving": found.serving_pods}
    everywhere = {name: pod for name, pod in pods(made).items() if name not in {"graft-store", "graft-test"}}
    for name, pod in everywhere.items():
        (container,) = pod["containers"]
        env = {item["name"]: item.get("value") for item in container["env"]}
        assert env["HTTPS_PROXY"] == "http://proxy.example.com:3128" and "HTTP_PROXY" not in env, name
        assert env["NO_PROXY"].split(",") == [
            "localhost", "127.0.0.1", "::1", ".svc", ".cluster.local", "$(KUBERNETES_SERVICE_HOST)", ".internal"
        ]  # fmt: skip
        assert {env[key] for key in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")} == {
            "/etc/graft-ca/ca.crt"
        }
        for given in templates.values():
            assert {item["name"]: item["value"] for item in given.env}.items() <= env.items()
            assert given.volumes[0]["configMap"]["items"] == [{"key": "bundle.pem", "path": "ca.crt"}]
            assert given.volume_mounts[0]["mountPath"] == "/etc/graft-ca"
        assert any(item["name"] == "trusted-ca" for item in pod["volumes"]), name
    assert found.network.proxies == ["http://proxy.example.com:3128"]
    egress = of_kind(made, "NetworkPolicy")["graft-operator"]["spec"]["egress"]
    assert any({"protocol": "TCP", "port": 3128} in rule.get("ports", []) for rule in egress)


def test_components_take_what_people_add_to_pods(template: Template) -> None:
    more = {
        "podLabels": {"team": "a"}, "podAnnotations": {"note": "b"}, "env": [{"name": "TZ", "value": "UTC"}],
        "volumes": [{"name": "more", "emptyDir": {}}], "volumeMounts": [{"name": "more", "mountPath": "/more"}],
        "affinity": {"nodeAffinity": {}}, "priorityClassName": "high",
    }  # fmt: skip
    spread = {
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]
    }
    given = {"env": [{"name": "TZ", "value": "UTC"}], "labels": {"team": "a"}}
    made = template({
        "operator": more | spread, "gateway": more | spread, "objectStore": {"embedded": more},
        "training": {"podTemplate": given}, "serving": {"podTemplate": given, "serviceAccount": {"annotations": {"a": "b"}}},
    })  # fmt: skip
    found = pods(made)
    for name in ("graft-operator", "graft-gateway", "graft-store"):
        pod = found[name]
        (container,) = pod["containers"]
        assert {"name": "TZ", "value": "UTC"} in container["env"]
        assert {"name": "more", "mountPath": "/more"} in container["volumeMounts"]
        assert {"name": "more", "emptyDir": {}} in pod["volumes"]
        assert pod["priorityClassName"] == "high" and "nodeAffinity" in pod["affinity"]
        if name != "graft-store":
            assert pod["topologySpreadConstraints"] == spread["topologySpreadConstraints"]
    found_settings = settings(made)
    assert found_settings.training_pods.labels == {"team": "a"} == found_settings.serving_pods.labels
    assert found_settings.serving_account_annotations == {"a": "b"}


def test_roles_of_a_cloud_replace_keys(template: Template, helm: str, tmp_path: Path) -> None:
    made = template(ROLES)
    operator = pods(made)["graft-operator"]
    (volume,) = (item for item in operator["volumes"] if item["name"] == "storage")
    config, token = volume["projected"]["sources"]
    assert token["serviceAccountToken"] == {"audience": "sts.amazonaws.com", "expirationSeconds": 3600, "path": "token"}
    data = of_kind(made, "ConfigMap")["graft-config"]["data"]
    for item in config["configMap"]["items"]:
        (tmp_path / item["path"]).write_text(data[item["key"]])
    with pytest.raises(StoreError, match="no token"):
        StorageConfig.from_dir(tmp_path)
    (tmp_path / "token").write_text("t")
    found = StorageConfig.from_dir(tmp_path)
    assert (found.role_arn, found.sts_endpoint) == ("arn:aws:iam::1:role/graft", "http://minio.minio:9000")
    assert settings(made).storage.web_identity_audience == "sts.amazonaws.com"
    without = run(
        helm,
        "template",
        "graft",
        str(CHART),
        values={"objectStore": ROLES["objectStore"] | {"webIdentity": {}}},
        tmp=tmp_path,
    )
    assert "objectStore.webIdentity.roleArn is needed" in without.stderr


def test_the_pod_monitor_selects_the_agents_of_all_namespaces(template: Template, helm: str, tmp_path: Path) -> None:
    assert not of_kind(template(), "PodMonitor")
    monitor = of_kind(template(SCRAPED | {"metrics": {"podMonitor": {"enabled": True}}}), "PodMonitor")[
        "graft-serving"
    ]["spec"]

    class Owner:
        class metadata:
            name, uid = "a", "u"

    assert monitor["namespaceSelector"] == {"any": True} and AGENT_PORT
    assert monitor["selector"]["matchLabels"].items() <= labels(Owner(), "serving").items()  # type: ignore[arg-type]
    assert {(item["port"], item["path"]) for item in monitor["podMetricsEndpoints"]} == {
        ("agent", "/metrics"), ("agent", "/engine/metrics")
    }  # fmt: skip
    closed = run(
        helm, "template", "graft", str(CHART), values={"metrics": {"podMonitor": {"enabled": True}}}, tmp=tmp_path
    )
    assert "metrics.podMonitor.enabled needs networkPolicy.metricsFrom" in closed.stderr


def test_helm_test_reaches_the_gateway(template: Template) -> None:
    made = template({"networkPolicy": {"gatewayFrom": [{"namespaceSelector": {}}]}})
    pod = of_kind(made, "Pod")["graft-test"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    compile(pod["spec"]["containers"][0]["command"][2], "test", "exec")
    component = {"app.kubernetes.io/component": "test"}
    assert component.items() <= pod["metadata"]["labels"].items()
    (rule,) = of_kind(made, "NetworkPolicy")["graft-gateway"]["spec"]["ingress"]
    assert any(component.items() <= peer.get("podSelector", {}).get("matchLabels", {}).items() for peer in rule["from"])


def test_services_are_dual_stack_where_the_cluster_is(template: Template) -> None:
    made = template(SCRAPED | {"metrics": {"serviceMonitor": {"enabled": True}}})
    services = of_kind(made, "Service")
    assert len(services) == 5
    assert {item["spec"]["ipFamilyPolicy"] for item in services.values()} == {"PreferDualStack"}


def test_the_last_words_of_every_container_are_kept(template: Template) -> None:
    for name, pod in pods(template()).items():
        for container in pod["containers"]:
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", name


def test_the_chart_has_what_hubs_of_charts_show() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {"home", "icon", "keywords", "maintainers", "sources", "kubeVersion", "description"} <= chart.keys()
    kinds = {item["kind"] for item in yaml.safe_load(chart["annotations"]["artifacthub.io/crds"])}
    assert kinds == {"BaseModel", "FineTuneJob", "Adapter", "AdapterDeployment", "Tenant"}
    assert chart["annotations"]["artifacthub.io/license"] == "Apache-2.0"


def test_every_value_is_explained() -> None:
    table = (CHART.parents[1] / "docs" / "values.md").read_text()
    assert [line for line in table.splitlines() if line.startswith("| `") and line.endswith("|  |")] == []


def test_lint(helm: str) -> None:
    done = subprocess.run([helm, "lint", str(CHART), "--strict"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
