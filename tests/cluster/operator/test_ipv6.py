"""Clusters with IPv6 addresses: one with IPv6 only, and one whose Services may have both families."""

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.contracts.mounts import ENGINE_PORT
from testbed.controlplane import SERVICE_CIDR_IPV6, ControlPlane, control_plane, free_port
from testbed.simulated import add_nodes
from worlds.cluster import front_door
from worlds.cluster.api import MERGE, Api, Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import BUCKET, SYSTEM, from_chart
from worlds.cluster.serving_stack import gateway
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import make_base_model, make_namespace
from worlds.upgrade.release import Installation, present

LOOPBACK = "::1"
PODS = "fd00:244::/56"


def families(service: Object) -> set[int]:
    """Return the IP versions of a Service's addresses."""
    return {ipaddress.ip_address(item).version for item in service["spec"]["clusterIPs"]}


def test_services_of_the_chart_have_both_families_in_a_dual_stack_cluster(tenant: Tenant) -> None:
    for item in from_chart({"Service"}):
        item["metadata"]["namespace"] = tenant.name
        assert families(tenant.api.create(item)) == {4, 6}, item["metadata"]["name"]


def test_the_gateways_service_has_the_families_that_the_values_ask_for(tenant: Tenant) -> None:
    (service,) = (
        item
        for item in from_chart(
            {"Service"}, gateway__service__ipFamilyPolicy="SingleStack", gateway__service__ipFamilies="{IPv6}"
        )
        if item["metadata"]["name"] == "graft-gateway"
    )
    service["metadata"]["namespace"] = tenant.name
    assert families(tenant.api.create(service)) == {6}


@pytest.fixture
def ipv6() -> Iterator[ControlPlane]:
    """Run a control plane that has no IPv4 address: API server, Services and pods."""
    first = str(next(ipaddress.ip_network(SERVICE_CIDR_IPV6).hosts()))
    network = {"service_cidr": SERVICE_CIDR_IPV6, "kubernetes_ip": first, "pod_cidr": PODS}
    with control_plane(address=LOOPBACK, **network) as plane:
        add_nodes(plane, 1)
        yield plane


def test_a_cluster_with_ipv6_only_tunes_and_serves(ipv6: ControlPlane, tmp_path: Path) -> None:
    api = Api(ipv6.server, ipv6.state / "pki")
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
    make_namespace(api, None, "shop")  # type: ignore[arg-type]
    installation = Installation(ipv6, api, tmp_path, free_port())
    installation.upgrade(
        present(), "--set=tenantNamespaces={shop}", f"--set=networkPolicy.closed={{{PODS}}}",
        "--set=objectStore.embedded.existingSecret=root",
    )  # fmt: skip
    for service in api.list("Service", SYSTEM):
        assert families(service) == {6}
    root = {"access-key-id": "graft-root", "secret-access-key": "not-a-secret-of-anybody"}
    api.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "root", "namespace": SYSTEM}, "stringData": root}
    )
    server = installation.store()
    operator = installation.operator(present())
    operator.environment["POD_IPS"] = LOOPBACK
    try:
        operator.start()
        tenant = Tenant(api, "shop", S3Store(StorageConfig.from_dir(server.secret_dir(BUCKET))))
        tenant.wait(lambda: BUCKET in str(tenant.store.client.list_buckets()["Buckets"]), "the bucket exists")
        make_base_model(api, tenant.store, BASE)
        tenant.trained("first")
        fleet = Fleet(tenant, "desk")
        (pod,) = fleet.serve(["support@1.0.0"], engine="transformers")
        assert ipaddress.ip_address(pod["status"]["podIP"]) in ipaddress.ip_network(PODS)
        command = next(item["command"] for item in pod["spec"]["containers"] if item["name"] == "engine")
        assert command[command.index("--host") + 1] == "::"
        blocks = [
            peer["ipBlock"]
            for policy in api.list("NetworkPolicy", "shop")
            for rule in policy["spec"].get("egress", [])
            for peer in rule.get("to", [])
            if "ipBlock" in peer
        ]
        assert any(block["cidr"] == "::/0" and PODS in block["except"] for block in blocks)
        # The address of a simulated pod leads nowhere, so the pod gets the one on which an engine answers.
        address = {"podIP": LOOPBACK, "podIPs": [{"ip": LOOPBACK}]}
        path = f"/api/v1/namespaces/shop/pods/{pod['metadata']['name']}/status"
        api.call("PATCH", path, {"status": address}, MERGE)
        routed = f"[{LOOPBACK}]:{ENGINE_PORT}"
        tenant.wait(lambda: routed in fleet.routes().json_text(), "the routes name the address in brackets")
        with front_door.engine(LOOPBACK, ENGINE_PORT), gateway(ipv6, api, tmp_path, LOOPBACK) as url:
            answer = front_door.FrontDoor(url).ask("shop/support")
        assert answer.status == 200, answer.data
    finally:
        operator.stop()
        server.stop()
