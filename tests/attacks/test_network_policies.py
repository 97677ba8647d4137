"""NetworkPolicies, read as a policy engine reads them: what pods may not reach, and who may not reach them."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from graft.api import AdapterDeployment, FineTuneJob
from graft.manifests.network import CLOSED, egress, serving_policy, training_policy
from graft.settings import Images, Network, Settings, Storage
from worlds import pods as made

POLICIES = made.policies()
METADATA = [
    "169.254.169.254",  # AWS, Google Cloud, Azure, Oracle, OpenStack, DigitalOcean, Hetzner, IBM, Huawei
    "169.254.170.2",  # AWS: credentials of a task
    "169.254.170.23",  # AWS: credentials of a pod
    "169.254.169.253",  # AWS: DNS of the VPC
    "169.254.0.23",  # Tencent Cloud
    "169.254.42.42",  # Scaleway
    "168.63.129.16",  # Azure's WireServer
    "100.100.100.200",  # Alibaba Cloud
    "192.0.0.192",  # Oracle Cloud Classic
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd00:ec2::253",
    "fd20:ce::254",
    "fd00:c1::a9fe:a9fe",
    "fd00:42::42",
    "fd00:a9fe:a9fe::1",
    "fe80::a9fe:a9fe",
    "64:ff9b::a9fe:a9fe",  # 169.254.169.254 behind NAT64
    "64:ff9b::a83f:8110",  # 168.63.129.16 behind NAT64
]
PORTS = (53, 80, 443, 1338, 6443, 7070, 8000, 8080, 32526)


def reaches(policy: made.Manifest, address: str, port: int, protocol: str = "TCP") -> bool:
    """Return whether a policy lets its pods connect to an address that is no pod's."""
    target = ip_address(address)
    for rule in policy.get("egress", []):
        named = rule.get("ports")
        if named is not None and not any((item["protocol"], item["port"]) == (protocol, port) for item in named):
            continue
        if "to" not in rule:
            return True
        for peer in rule["to"]:
            block = peer.get("ipBlock")
            if block is None or target.version != ip_network(block["cidr"]).version:
                continue
            inside = target in ip_network(block["cidr"])
            if inside and not any(target in ip_network(item) for item in block.get("except", [])):
                return True
    return False


def reaches_pod(policy: made.Manifest, namespace: str, labels: dict[str, str], port: int) -> bool:
    """Return whether a policy lets its pods connect to a pod of another namespace."""
    for rule in policy.get("egress", []):
        named = rule.get("ports")
        if named is not None and port not in {item["port"] for item in named}:
            continue
        for peer in rule.get("to", [{"namespaceSelector": {}}]):
            if "namespaceSelector" not in peer:
                continue
            there = {"kubernetes.io/metadata.name": namespace}
            of_namespace = peer["namespaceSelector"].get("matchLabels", {}).items() <= there.items()
            if of_namespace and peer.get("podSelector", {}).get("matchLabels", {}).items() <= labels.items():
                return True
    return False


def settings(**changes: Any) -> Settings:
    images = Images(trainer="r/t:1", engine="r/e:1", agent="r/a:1", vllm="r/v:1")
    return Settings(namespace="graft-system", images=images, **changes)


@pytest.mark.parametrize("name", POLICIES)
def test_no_pod_reaches_a_clouds_metadata(name: str) -> None:
    """A container asks its cloud for the node's credentials, at any cloud's address -> every policy closes them all."""
    policy = POLICIES[name]
    reached = [(item, port) for item in METADATA for port in PORTS if reaches(policy, item, port)]
    assert reached == []


@pytest.mark.parametrize("name", POLICIES)
def test_everything_is_denied_that_is_not_named(name: str) -> None:
    """A flow that nobody thought of -> the policy selects its pods for both directions, and every rule names peers."""
    policy = POLICIES[name]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["podSelector"]["matchLabels"]
    assert all(rule.get("to") for rule in policy.get("egress", []))


@pytest.mark.parametrize("source", made.objects())
def test_every_pod_has_a_policy(source: str) -> None:
    """A pod that was forgotten is attacked or scans the cluster -> each pod of Graft, hooks too, is selected by a
    policy of its namespace."""
    items = made.objects()[source]
    selectors = [
        (item["metadata"]["namespace"], item["spec"]["podSelector"]["matchLabels"])
        for item in items
        if item["kind"] == "NetworkPolicy"
    ]
    templates = [item for item in items if "template" in (item.get("spec") or {}) and item["kind"] != "HTTPRoute"]
    for item in templates:
        labels = item["spec"]["template"]["metadata"]["labels"]
        namespace = item["metadata"]["namespace"]
        assert any(space == namespace and chosen.items() <= labels.items() for space, chosen in selectors), item["kind"]


@pytest.mark.parametrize("name", [name for name in POLICIES if not name.startswith("chart")])
def test_a_pod_of_a_tenant_reaches_no_other_service_of_the_cluster(name: str) -> None:
    """A compromised engine or training pod scans the cluster -> only DNS answers in other namespaces."""
    policy = POLICIES[name]
    for port in (22, 80, 2379, 3306, 5432, 6379, 7071, 8000, 8080, 8081, 9090, 10250):
        assert not reaches_pod(policy, "other", {"app": "database"}, port), port
        assert not reaches(policy, "10.0.0.7", port), port
    assert reaches_pod(policy, "kube-system", {"k8s-app": "kube-dns"}, 53)
    assert reaches(policy, "203.0.113.9", 443)


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith(("finetunejob", "adapter-"))])
def test_a_training_pod_does_not_reach_the_api_server(name: str) -> None:
    """A training pod talks to the API server without a token -> the port is closed (where it is not 443)."""
    assert not reaches(POLICIES[name], "203.0.113.9", 6443)


def test_the_gateway_reaches_engines_and_nothing_else_in_the_cluster() -> None:
    """The gateway is taken over and scans the cluster -> only serving pods at the engine's port, DNS and the API
    server."""
    gateway = POLICIES["chart/graft-gateway"]
    engine = {"app.kubernetes.io/managed-by": "graft", "graft.dev/component": "serving"}
    assert reaches_pod(gateway, "shop", engine, 8000)
    assert not reaches_pod(gateway, "shop", engine, 8081)
    assert not reaches_pod(gateway, "shop", {"app": "database"}, 8000)
    assert not reaches_pod(gateway, "graft-system", {"app.kubernetes.io/component": "store"}, 7070)
    assert reaches(gateway, "203.0.113.9", 6443) and not reaches(gateway, "203.0.113.9", 80)


@pytest.mark.parametrize("source", ["chart", "chart-external-store"])
def test_the_operator_reaches_the_api_server_stores_and_the_hub_only(source: str) -> None:
    """The operator is taken over and scans the cluster -> DNS, the API server, the hub, the embedded store."""
    operator = POLICIES[f"{source}/graft-operator"]
    assert [port for port in range(1, 10000) if reaches(operator, "203.0.113.9", port)] == [53, 443, 5353, 6443]
    for port in (22, 80, 443, 2379, 5432, 8000, 8080, 8081, 9090, 10250):
        assert not reaches_pod(operator, "other", {"app": "database"}, port), port
    stores = [
        rule["ports"] for rule in operator["egress"] if any(peer.keys() == {"podSelector"} for peer in rule["to"])
    ]
    tcp = [{"protocol": "TCP", "port": port} for port in ("s3", "admin")]
    assert stores == ([tcp] if source == "chart" else [])


def test_the_operator_reaches_a_store_inside_and_outside_of_the_cluster() -> None:
    """The protection must not close the operator's store: its rules follow the URLs as those of other pods do."""
    external = made.EXTERNAL_STORE["objectStore"] | {
        "external": {
            "endpoint": "http://minio.storage.svc:9000",
            "adminUrl": "http://s3.example.com:7071",
            "existingSecret": "graft-s3",
        }
    }
    rendered = made.render({"objectStore": external, "huggingface": {"endpoint": "https://[fd12::1]:8443"}})
    (operator,) = [
        item["spec"]
        for item in rendered
        if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] == "graft-operator"
    ]
    assert [port for port in range(1, 10000) if reaches(operator, "203.0.113.9", port)] == [
        53,
        443,
        5353,
        6443,
        7071,
        8443,
    ]
    assert reaches_pod(operator, "storage", {"app": "any"}, 9000)
    assert not reaches_pod(operator, "other", {}, 9000)


def test_the_platform_team_closes_the_pod_network() -> None:
    """A pod connects to a pod of another tenant at port 443, which a rule for all addresses matches -> closed with
    networkPolicy.closed, in the policies of the chart and of the operator alike."""
    closed = ["10.7.0.0/16", "fd00:7::/64"]
    own = {"egress": egress(settings(network=Network(closed=closed)))}
    rendered = made.render({"networkPolicy": {"closed": closed}})
    chart = {item["metadata"]["name"]: item["spec"] for item in rendered if item["kind"] == "NetworkPolicy"}
    for policy in (own, chart["graft-operator"], chart["graft-gateway"]):
        assert reaches(policy, "203.0.113.9", 443) and reaches(policy, "2001:db8::9", 443)
        assert not reaches(policy, "10.7.3.4", 443) and not reaches(policy, "fd00:7::4", 443)
        assert not reaches(policy, "169.254.169.254", 443)
        assert reaches_pod(policy, "kube-system", {"k8s-app": "kube-dns"}, 53)
    (config,) = [item for item in rendered if item["metadata"]["name"] == "graft-config"]
    assert Settings.model_validate_json(config["data"]["config.json"]).network.closed == closed


def test_the_store_connects_to_nothing() -> None:
    """The embedded store is taken over and sends the data elsewhere -> it has no egress at all."""
    assert POLICIES["chart/graft-store"].get("egress", []) == []


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith("adapterdeployment")])
def test_only_the_gateway_reaches_an_engine(name: str) -> None:
    """A neighbour calls the engine's load and unload routes -> only the gateway's pods of the operator's namespace are
    admitted to its port."""
    (rule,) = [rule for rule in POLICIES[name]["ingress"] if {"protocol": "TCP", "port": 8000} in rule["ports"]]
    (peer,) = rule["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "graft-system"}
    assert peer["podSelector"]["matchLabels"]


def test_the_closed_addresses_stand_in_one_place() -> None:
    """One of two lists is forgotten when a cloud is added -> the chart's list is generated from the builders' list."""
    lists = [
        peer["ipBlock"]
        for policy in POLICIES.values()
        for rule in policy.get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer and peer["ipBlock"]["cidr"] in CLOSED
    ]
    assert len(lists) > 20
    assert all(block["except"] == CLOSED[block["cidr"]] for block in lists)


@pytest.mark.parametrize(
    ("endpoint", "outside", "inside"),
    [
        ("", [443], []),
        ("https://s3.example.com", [443], []),
        ("https://s3.example.com:9443", [443, 9443], []),
        ("http://10.1.2.3:9000", [443, 9000], []),
        ("http://[fd12::1]:9000", [443, 9000], []),
        ("http://minio.storage.svc:80", [443], [("storage", 9000)]),
        ("http://minio.storage.svc.cluster.local", [443], [("storage", 9000)]),
        ("http://minio.storage:9000", [443, 9000], [("storage", 9000)]),
        ("http://graft-store.graft-system.svc:7070", [443], [("graft-system", 7070)]),
    ],
)
def test_the_protection_leaves_the_flows_that_are_needed(
    endpoint: str, outside: list[int], inside: list[tuple[str, int]]
) -> None:
    """The protection must not close the object store: its port outside of the cluster, its namespace inside."""
    policy = {"egress": egress(settings(storage=Storage(endpoint=endpoint)))}
    assert [port for port in range(1, 10000) if reaches(policy, "203.0.113.9", port)] == sorted({53, 5353, *outside})
    for namespace, port in inside:
        assert reaches_pod(policy, namespace, {"app": "any"}, port)
    assert not reaches_pod(policy, "graft-system", {"app.kubernetes.io/component": "operator"}, 9090)
    assert not reaches_pod(policy, "other", {}, 9000)


def test_what_the_platform_team_adds_is_added_and_nothing_else() -> None:
    """A DNS server with a link-local address, Prometheus, a proxy: the chart's values open exactly these."""
    proxy = {"to": [{"ipBlock": {"cidr": "10.9.9.9/32"}}], "ports": [{"protocol": "TCP", "port": 3128}]}
    network = Network(egress=[proxy], dns_servers=["169.254.25.10/32"], api_server_ports=[8443])
    policy = {"egress": egress(settings(network=network), api_server=True)}
    assert reaches(policy, "10.9.9.9", 3128) and not reaches(policy, "10.9.9.8", 3128)
    assert reaches(policy, "169.254.25.10", 53, "UDP") and not reaches(policy, "169.254.25.10", 80)
    assert not reaches(policy, "169.254.20.10", 53)
    assert reaches(policy, "203.0.113.9", 8443) and not reaches(policy, "203.0.113.9", 6443)
    rendered = made.render({"networkPolicy": {"metricsFrom": [{"podSelector": {"matchLabels": {"app": "p"}}}]}})
    (config,) = [item for item in rendered if item["metadata"]["name"] == "graft-config"]
    found = Settings.model_validate_json(config["data"]["config.json"]).network
    assert found.metrics_from == [{"podSelector": {"matchLabels": {"app": "p"}}}]
    assert found.api_server_ports == [443, 6443] and found.dns_servers == ["169.254.20.10/32"]


def test_only_what_may_scrape_reaches_the_agents() -> None:
    """A tenant labels a pod like Prometheus to reach the agents' port -> the peer means the chart's namespace. By
    default, no pod reaches it."""
    deployment = AdapterDeployment.model_validate(
        {"metadata": {"name": "desk", "namespace": "team-a", "uid": "u"}, "spec": {"baseModel": "m", "adapters": ["a"]}}
    )
    prometheus = {"podSelector": {"matchLabels": {"app": "prometheus"}}}
    elsewhere = prometheus | {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    network = Network(metrics_from=[prometheus, elsewhere])
    (rule,) = [
        rule
        for rule in serving_policy(deployment, settings(network=network))["spec"]["ingress"]
        if rule["ports"] == [{"protocol": "TCP", "port": 8081}]
    ]
    own = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "graft-system"}}}
    assert rule["from"] == [prometheus | own, elsewhere]
    (engine,) = serving_policy(deployment, settings())["spec"]["ingress"]
    assert engine["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert "ingress" not in POLICIES["chart/graft-operator"]


def test_a_monitor_that_no_policy_admits_is_refused_at_install() -> None:
    """The protection must not silence the monitoring: the chart names the value to set."""
    with pytest.raises(AssertionError, match=r"needs networkPolicy\.metricsFrom"):
        made.render({"metrics": {"serviceMonitor": {"enabled": True}}})


def test_the_pods_of_a_run_reach_each_other_and_no_other_run() -> None:
    """A training pod joins another run's rendezvous -> only pods with the run's own UID are peers, both ways."""
    job = FineTuneJob.model_validate(
        {
            "metadata": {"name": "j", "namespace": "team-a", "uid": "u1"},
            "spec": {
                "baseModel": "m",
                "dataset": {"train": {"uri": "s3://graft/x.jsonl"}},
                "method": {"lora": {}},
                "output": {"adapter": "a"},
            },
        }
    )
    policy = training_policy(job, settings())["spec"]
    own = {"podSelector": {"matchLabels": {"graft.dev/owner-uid": "u1"}}}
    assert policy["ingress"] == [{"from": [own]}]
    assert {"to": [own]} in policy["egress"]
    assert [peer for rule in policy["egress"] for peer in rule["to"] if "podSelector" in peer] == [own]
