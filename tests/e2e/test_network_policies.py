"""NetworkPolicies, enforced by a policy engine: real pods try the flows of one table, under default deny.

Every flow that must be refused has a flow to the same target that must pass. So each target answers, and a refusal is the
policy's.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from testbed import quickstart
from testbed.cluster import Cluster
from testbed.node import IPV6
from testbed.quickstart import SHOP, SYSTEM, Access
from testbed.shell import wait_for
from worlds.cluster import flows
from worlds.cluster.flows import DROPPED, OPEN, Flow, Namespace, Pod

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
LAB = "lab"  # another tenant, which trains
ELSEWHERE = "elsewhere"  # a namespace without Graft and without policies
HUB = "203.0.113.10"  # an address of the internet
PORTS = (53, 80, 443, 5432, 8000)  # at which the addresses outside and the pod `other` answer
METADATA_IPV4 = [
    "169.254.169.254",  # AWS, Google Cloud, Azure, Oracle, OpenStack and others
    "169.254.170.2",  # AWS: credentials of a task
    "169.254.170.23",  # AWS: credentials of a pod
    "168.63.129.16",  # Azure's WireServer
    "100.100.100.200",  # Alibaba Cloud
    "192.0.0.192",  # Oracle Cloud Classic
]
METADATA_IPV6 = [
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fd00:c1::a9fe:a9fe",
    "fd00:42::42",
    "fd00:a9fe:a9fe::1",
    "64:ff9b::a9fe:a9fe",  # 169.254.169.254 behind NAT64
]
METADATA = [*METADATA_IPV4, *(METADATA_IPV6 if IPV6 else [])]
GRAFT = ("operator", "gateway", "store", "serving", "trainer")  # the kinds of Graft's pods


def allow(source: str, *targets: tuple[str, int], protocol: str = "TCP") -> list[Flow]:
    return [Flow(source, name, port, True, protocol) for name, port in targets]


def deny(source: str, *targets: tuple[str, int], protocol: str = "TCP") -> list[Flow]:
    return [Flow(source, name, port, False, protocol) for name, port in targets]


API, ENGINE, AGENT, S3, IDENTITY = ("api", 443), ("serving", 8000), ("serving", 8081), ("store", 7070), ("store", 7071)
GATEWAY, OPERATOR, RENDEZVOUS, KUBELET = ("gateway", 8080), ("operator", 9090), ("rank 0", 29500), ("node", 10250)
METRICS = ("gateway", 9090)
INTERNET, PLAIN, DATABASE = (HUB, 443), (HUB, 80), ("other", 5432)
OVER_IPV6 = [("other over IPv6", 443)] if IPV6 else []
ADDRESSES = [(address, port) for address in METADATA for port in (53, 80, 443)]
TABLE = [
    *allow("operator", API, S3, IDENTITY, INTERNET),
    *deny("operator", ENGINE, AGENT, GATEWAY, RENDEZVOUS, KUBELET, PLAIN, DATABASE, ("other", 8000), ("other", 443)),
    *allow("gateway", API, ENGINE),
    *deny(
        "gateway", AGENT, S3, IDENTITY, OPERATOR, RENDEZVOUS, KUBELET, PLAIN, DATABASE, ("other", 8000), ("other", 443)
    ),
    *deny("store", API, ENGINE, AGENT, GATEWAY, OPERATOR, RENDEZVOUS, KUBELET, INTERNET, PLAIN, DATABASE),
    # The agent needs the API server. The engine is in the same pod, but has no token.
    *allow("serving", API, S3, INTERNET),
    *deny(
        "serving",
        GATEWAY,
        METRICS,
        IDENTITY,
        OPERATOR,
        RENDEZVOUS,
        KUBELET,
        PLAIN,
        DATABASE,
        ("other", 8000),
        ("other", 443),
    ),
    *allow("trainer", S3, RENDEZVOUS, INTERNET),
    *deny("trainer", API, ENGINE, AGENT, GATEWAY, IDENTITY, OPERATOR, KUBELET, PLAIN, DATABASE, ("other", 443)),
    # A neighbour in the same namespace, another one with the gateway's labels in its own, and the pod that may scrape.
    *deny("bystander", ENGINE, AGENT, S3, IDENTITY, OPERATOR, RENDEZVOUS),
    *deny("impostor", ENGINE, AGENT, S3, IDENTITY, OPERATOR, METRICS, RENDEZVOUS),
    *allow("impostor", GATEWAY),
    *allow("scraper", AGENT, OPERATOR, METRICS),
    *deny("scraper", ENGINE, IDENTITY, S3, RENDEZVOUS),
    # The kubelet's probes come from the node.
    *allow("node", ENGINE, AGENT, S3, GATEWAY),
    # A pod without policies reaches everything that has none: the controls of the rows above and below.
    *allow("other", API, GATEWAY, KUBELET, INTERNET, PLAIN, *ADDRESSES),
    *allow("impostor", DATABASE, ("other", 443), ("other", 8000), *OVER_IPV6),
    *[flow for name in GRAFT for flow in deny(name, *ADDRESSES, *OVER_IPV6)],
    *[flow for name in GRAFT if name != "store" for flow in allow(name, ("dns", 53), protocol="UDP")],
    *deny("store", ("dns", 53), protocol="UDP"),
    *allow("other", ("169.254.169.254", 53), protocol="UDP"),
    *[flow for name in GRAFT for flow in deny(name, ("169.254.169.254", 53), protocol="UDP")],
]
Sources = dict[str, Pod | Namespace]


def the_pod(access: Access, namespace: str, selector: str, container: str) -> Pod:
    """Return the one running pod that a selector names. Wait until its container runs."""
    found: list[str] = []

    def runs() -> bool:
        pods = json.loads(access.kubectl("get", "pods", "-n", namespace, "-l", selector, "-o", "json"))["items"]
        found[:] = [
            pod["metadata"]["name"]
            for pod in pods
            if not pod["metadata"].get("deletionTimestamp")
            and any(item["name"] == container and "running" in item["state"] for item in pod["status"].get("containerStatuses", []))
        ]  # fmt: skip
        return len(found) == 1

    wait_for(runs, 240, f"one pod {selector} runs", lambda: quickstart.explain(access, namespace))
    return Pod(access, namespace, found[0], container)


def job(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    """Return a small variant of the quickstart's job."""
    manifest = yaml.safe_load((quickstart.QUICKSTART / "20-finetunejob.yaml").read_text())
    manifest["metadata"] = {"name": name, "namespace": namespace}
    manifest["spec"] |= {"output": {"adapter": name}, "evaluation": {"maxSamples": 0}} | spec
    return dict(manifest)


def serving(access: Access) -> None:
    """Train an adapter and apply its deployment, under default deny."""
    flows.apply(access, job("flows", SHOP, training={"maxSteps": 2, "maxLength": 128}))
    quickstart.follow(access, "flows")
    deployment = yaml.safe_load((quickstart.QUICKSTART / "30-adapterdeployment.yaml").read_text())
    deployment["metadata"]["name"] = "flows"
    deployment["spec"] |= {"adapters": ["flows@latest"], "routes": [{"model": "flows", "adapter": "flows"}]}
    flows.apply(access, deployment)


def training(access: Access) -> None:
    """Start a run of another tenant on two pods, which does not end by itself."""
    tenant = list(yaml.safe_load_all((quickstart.QUICKSTART / "00-namespace.yaml").read_text()))
    tenant[0]["metadata"]["name"] = tenant[1]["metadata"]["namespace"] = LAB
    lines = (quickstart.QUICKSTART / "data" / "train.jsonl").read_text().splitlines()[:64]
    data = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "data", "namespace": LAB}}
    flows.apply(access, *tenant, flows.default_deny(LAB), data | {"data": {"train.jsonl": "\n".join(lines)}})
    endless = {"maxSteps": 100_000, "maxLength": 64, "perDeviceTrainBatchSize": 1, "gradientAccumulationSteps": 1}
    small = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}}
    dataset = {"train": {"uri": "configMap://data/train.jsonl"}}
    flows.apply(access, job("endless", LAB, training=endless, dataset=dataset, resources=small, nodes=2))


def tuned_and_served(access: Access) -> dict[str, Pod]:
    """Start both. Wait until the deployment answers, and until two pods train together."""
    serving(access)
    training(access)
    quickstart.wait_available(access, "flows")
    wait_for(
        lambda: access.get("finetunejob", "endless", LAB).get("status", {}).get("progress", {}).get("step", 0) > 0,
        600, "two pods train together", lambda: quickstart.explain(access, LAB),
    )  # fmt: skip
    rank = "graft.dev/owner=endless,batch.kubernetes.io/job-completion-index="
    return {
        "serving": the_pod(access, SHOP, "graft.dev/owner=flows,graft.dev/component=serving", "engine"),
        "rank 0": the_pod(access, LAB, f"{rank}0", "train"),
        "trainer": the_pod(access, LAB, f"{rank}1", "train"),
    }


def neighbours(access: Access) -> dict[str, Pod]:
    """Create the pods that are not Graft's. The policies let those in guarded namespaces send to everywhere."""
    made = {"bystander": SHOP, "scraper": SYSTEM, "impostor": ELSEWHERE, "other": ELSEWHERE}
    gateway = access.get("deployment", "graft-gateway", SYSTEM)["spec"]["selector"]["matchLabels"]
    labels = {name: {"app": name} for name in made} | {"impostor": gateway}
    sends = [
        {
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "namespace": made[name]},
            "spec": {"podSelector": {"matchLabels": labels[name]}, "policyTypes": ["Egress"], "egress": [{}]},
        }
        for name in ("bystander", "scraper")
    ]  # fmt: skip
    pods = [
        flows.pod_manifest(space, name, PORTS if name == "other" else (), labels[name]) for name, space in made.items()
    ]
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ELSEWHERE}}
    flows.apply(access, space, *sends, *pods)
    for name, where in made.items():
        access.kubectl("wait", "pod", name, "-n", where, "--for=condition=Ready", "--timeout=60s")
    return {name: Pod(access, where, name, "main") for name, where in made.items()}


@pytest.fixture(scope="module")
def sources(access: Access, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    """Start all pods of the table, and listeners at the addresses outside."""
    log = tmp_path_factory.mktemp("outside") / "listener.log"
    access.kubectl("apply", "-f", str(quickstart.QUICKSTART / "10-basemodel.yaml"))
    with flows.outside(cluster.network, [HUB, *METADATA], PORTS, log):
        try:
            component = "app.kubernetes.io/component"
            store = access.get("pod", "graft-store-0", SYSTEM)["status"]["containerStatuses"][0]["containerID"]
            yield {
                **tuned_and_served(access), **neighbours(access),
                "gateway": the_pod(access, SYSTEM, f"{component}=gateway", "gateway"),
                "operator": the_pod(access, SYSTEM, f"{component}=operator", "operator"),
                "store": flows.namespace_of(cluster.node.ctr("tasks", "ls"), store.removeprefix("containerd://")),
                "node": Namespace(f"/run/netns/{cluster.network.netns}"),
            }  # fmt: skip
        finally:
            access.kubectl("delete", "networkpolicy", "bystander", "-n", SHOP, "--ignore-not-found")
            access.kubectl("delete", "networkpolicy", "scraper", "-n", SYSTEM, "--ignore-not-found")
            access.kubectl("delete", "pod", "bystander", "-n", SHOP, "--ignore-not-found")
            access.kubectl("delete", "pod", "scraper", "-n", SYSTEM, "--ignore-not-found")
            access.kubectl("delete", "adapterdeployment", "flows", "-n", SHOP, "--ignore-not-found", "--timeout=120s")
            access.kubectl("delete", "finetunejob", "flows", "-n", SHOP, "--ignore-not-found", "--timeout=120s")
            access.kubectl("delete", "adapter", "flows-1.0.0", "-n", SHOP, "--ignore-not-found", "--timeout=120s")
            access.kubectl("delete", "finetunejob", "endless", "-n", LAB, "--ignore-not-found", "--timeout=120s")
            access.kubectl("delete", "namespace", LAB, ELSEWHERE, "--ignore-not-found", "--timeout=180s")


@pytest.fixture(scope="module")
def outcomes(access: Access, cluster: Cluster, sources: Sources) -> dict[Flow, str]:
    """Try all flows. A source tries its flows again until they are as expected, for 30 s: policies need a moment."""
    other = sources["other"]
    assert isinstance(other, Pod)
    addresses = {name: pod.addresses()[0] for name, pod in sources.items() if isinstance(pod, Pod)}
    addresses |= {"other over IPv6": other.addresses()[-1], "node": cluster.network.node}
    addresses["store"] = access.get("pod", "graft-store-0", SYSTEM)["status"]["podIP"]
    addresses |= {"api": cluster.network.service(1), "dns": cluster.network.dns}
    table: dict[str, list[Flow]] = defaultdict(list)
    for flow in TABLE:
        table[flow.source].append(flow)
    found: dict[Flow, str] = {}

    def attempt(source: str) -> bool:
        mine = table[source]
        asked = [(flow.protocol, addresses.get(flow.target, flow.target), flow.port) for flow in mine]
        found.update(zip(mine, sources[source].attempt(asked), strict=True))
        return all(found[flow] == expected(flow) for flow in mine)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda source: settle(lambda: attempt(source)), table))
    return found


def expected(flow: Flow) -> str:
    return OPEN if flow.allowed else DROPPED


def settle(attempt: Callable[[], bool]) -> None:
    """Repeat an attempt until it is as expected. What it found last counts, so the end of the time is no failure."""
    deadline = time.monotonic() + 30
    while not attempt() and time.monotonic() < deadline:
        pass


def test_every_refusal_has_a_control() -> None:
    answered = {(flow.target, flow.port, flow.protocol) for flow in TABLE if flow.allowed}
    assert [str(flow) for flow in TABLE if (flow.target, flow.port, flow.protocol) not in answered] == []
    assert len(set(TABLE)) == len(TABLE)


@pytest.mark.parametrize("source", dict.fromkeys(flow.source for flow in TABLE))
def test_a_flow_passes_only_if_it_is_needed(source: str, outcomes: dict[Flow, str]) -> None:
    """Each row of the table: open if it is allowed, else dropped. An error such as "connection refused" is neither."""
    found = {str(flow): outcome for flow, outcome in outcomes.items() if flow.source == source}
    assert found == {str(flow): expected(flow) for flow in TABLE if flow.source == source}


def test_a_client_in_the_cluster_is_answered_by_the_adapter(sources: Sources) -> None:
    """Ask the adapter from a pod, by the Service's name: gateway, engine and agent work under default deny."""
    body = {"model": f"{SHOP}/flows", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    client = sources["other"]
    assert isinstance(client, Pod)
    flows.apply(client.access, yaml.safe_load((quickstart.QUICKSTART / "40-apikey.yaml").read_text()))
    key = {"Authorization": f"Bearer {quickstart.api_key(client.access)}"}
    script = (
        "import sys, json, urllib.request as r; a = r.urlopen(r.Request('http://graft-gateway.graft-system.svc.cluster.local:8080"
        "/v1/chat/completions', data=sys.argv[1].encode(), headers=json.loads(sys.argv[2])), timeout=60); "
        "print(a.headers['x-graft-adapter'])"
    )
    assert client.python(script, json.dumps(body), json.dumps(key)).strip() == "flows-1.0.0"


def test_the_policy_engine_itself_may_only_read(cluster: Cluster) -> None:
    """The engine's kubeconfig lists pods, namespaces and policies. It reads no Secrets and writes nothing."""
    kubeconfig = f"--kubeconfig={cluster.state}/pki/kube-network-policies.kubeconfig"
    for verb, kind, answer in (("list", "pods", "yes"), ("list", "secrets", "no"), ("update", "pods", "no")):
        said = cluster.plane.kubectl(kubeconfig, "auth", "can-i", verb, kind, "--all-namespaces", check=False)
        assert said.strip() == answer, (verb, kind)
