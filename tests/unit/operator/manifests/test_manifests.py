"""Golden tests of the manifest builders: a resource goes in, Kubernetes objects come out.

GRAFT_UPDATE_GOLDEN=1 rewrites the expected outputs.
"""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.api import Adapter, AdapterDeployment, FineTuneJob
from graft.api.basemodel import BaseModelStatus
from graft.api.deploymentstatus import ServingSizing
from graft.contracts.agent import Wanted, WantedAdapter
from graft.contracts.message import BaseModelRef
from graft.manifests import adapterjob, agent, network, scaling, serving, training
from graft.placement import engine
from graft.placement.facts import facts_of
from graft.settings import Images, Settings
from worlds.placement import LLAMA_2, gpu_node

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = Settings(
    namespace="graft-system",
    images=Images(trainer="r/trainer:1", engine="r/engine:1", agent="r/agent:1", vllm="r/vllm:1"),
    image_pull_secrets=["registry"],
)
BASES = {
    "tiny": BaseModelRef(name="tiny", uri="s3://graft/models/tiny", digest="sha256:" + "a" * 64),
    "big": BaseModelRef(name="big", uri="pvc://weights/llama"),
    "llama-7b": BaseModelRef(name="llama-7b", uri="hf://meta-llama/Llama-2-7b-hf@" + "c" * 40, digest="c" * 40),
    "llama-70b": BaseModelRef(name="llama-70b", uri="s3://graft/models/llama-70b", digest="sha256:" + "b" * 64),
}
FACTS = {"llama-7b": facts_of(LLAMA_2["7B"]), "llama-70b": facts_of(LLAMA_2["70B"])}
NODES = [
    gpu_node("l4", "NVIDIA-L4", 23034, gpus=2),
    gpu_node("a100", "NVIDIA-A100-SXM4-80GB", 81920, gpus=8),
]


def build(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    base = BASES[manifest["spec"]["baseModel"]]
    if manifest["kind"] == "FineTuneJob":
        job = FineTuneJob.model_validate(manifest)
        shape = training.Shape(resources=job.spec.resources, nodes=job.spec.nodes or 1)
        file = training.job_file(job, base, "1.0.0", "sha256:recipe", SETTINGS, shape=shape)
        peers = [training.peers_service(job)] if shape.nodes > 1 else []
        return [
            training.config_map(job, file),
            network.training_policy(job, SETTINGS),
            *peers,
            *([training.preflight_job(job, base, SETTINGS)] if shape.gpus else []),
            training.training_job(job, base, SETTINGS, shape),
        ]
    if manifest["kind"] == "Adapter":
        adapter = Adapter.model_validate(manifest)
        facts = BaseModelStatus.model_validate(
            {"sizeBytes": 2_000_000_000, "facts": {"hiddenSize": 2048, "intermediateSize": 8192}}
        )
        return [
            adapterjob.config_map(adapter, adapterjob.version_file(adapter, base, facts, "causal", SETTINGS)),
            adapterjob.policy(adapter, SETTINGS),
            adapterjob.job(adapter, base, SETTINGS, adapterjob.resources(adapter, facts, 40_000_000)),
        ]
    deployment = AdapterDeployment.model_validate(manifest)
    wanted = Wanted(
        base_model=base.name,
        max_lora_rank=deployment.spec.limits.max_lora_rank,
        adapters=[
            WantedAdapter(
                engine_name="shop--support-1.0.0--aaaaaaaaaaaa",
                adapter="support-1.0.0",
                uri="s3://graft/shop/adapters/support/1.0.0/",
                digest="sha256:" + "a" * 64,
            )
        ],
    )
    return [
        agent.service_account(deployment, SETTINGS),
        agent.role(deployment),
        agent.role_binding(deployment),
        agent.wanted_config_map(deployment, wanted),
        agent.residency_config_map(deployment),
        network.serving_policy(deployment, SETTINGS),
        serving.serving_deployment(deployment, base, SETTINGS, sizing(deployment), deployment.spec.replicas),
        *([scaling.disruption_budget(deployment)] if scaling.can_have_several(deployment) else []),
        *(
            [mover]
            if (mover := scaling.autoscaler(deployment, "http://prometheus.monitoring:9090")) is not None
            else []
        ),
    ]


def sizing(deployment: AdapterDeployment) -> ServingSizing:
    """Place the deployment as the operator does, on a cluster with L4s and A100s."""
    facts = FACTS.get(deployment.spec.base_model)
    return engine.serving(facts, deployment.spec, task="causal", nodes=NODES, vllm=True, int4=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "input").glob("*.yaml")))
def test_the_built_objects_equal_the_golden_files(name: str) -> None:
    objects = build(yaml.safe_load((GOLDEN / "input" / f"{name}.yaml").read_text()))
    text = yaml.safe_dump_all(objects, sort_keys=True, width=140)
    output = GOLDEN / "output" / f"{name}.yaml"
    if os.environ.get("GRAFT_UPDATE_GOLDEN"):
        output.write_text(text)
    assert list(yaml.safe_load_all(output.read_text())) == list(yaml.safe_load_all(text))


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item["spec"]["template"]["spec"] for item in objects if "template" in item.get("spec", {})]


@pytest.mark.parametrize("name", sorted(path.stem for path in (GOLDEN / "input").glob("*.yaml")))
def test_every_pod_meets_pod_security_restricted(name: str) -> None:
    for pod in pods(build(yaml.safe_load((GOLDEN / "input" / f"{name}.yaml").read_text()))):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            # What ended a container is shown in conditions.
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
            assert not [item for item in container["env"] if "secret" in str(item).lower()], (
                "secrets are mounted as files"
            )


def test_only_the_agent_has_the_api_token() -> None:
    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-vllm.yaml").read_text())
    (pod,) = pods(build(manifest))
    holders = [
        container["name"]
        for container in [*pod["initContainers"], *pod["containers"]]
        if any(mount["name"] == "api" for mount in container["volumeMounts"])
    ]
    assert holders == ["agent"]


def test_attaching_an_adapter_does_not_change_the_pod_template() -> None:
    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-vllm.yaml").read_text())
    before = pods(build(manifest))
    manifest["spec"]["adapters"].append("product@latest")
    assert pods(build(manifest)) == before


def test_another_base_model_or_limit_changes_the_pod_template() -> None:
    """Kubernetes replaces the pods when their template changes."""
    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-transformers.yaml").read_text())
    deployment = AdapterDeployment.model_validate(manifest)

    def template(base: BaseModelRef, **spec: Any) -> Any:
        changed = AdapterDeployment.model_validate(manifest | {"spec": manifest["spec"] | spec})
        return serving.serving_deployment(changed, base, SETTINGS, sizing(changed), 1)["spec"]["template"]

    base = BASES["tiny"]
    same = template(base)
    assert template(base, replicas=3, autoscaling={"minReplicas": 0, "maxReplicas": 1}) == same
    assert template(base.model_copy(update={"digest": "sha256:" + "f" * 64})) != same
    assert template(base.model_copy(update={"uri": "hf://org/tiny@" + "f" * 40})) != same
    assert template(base, limits={"maxLoras": 3}) != same
    assert "replicas" not in serving.serving_deployment(deployment, base, SETTINGS, sizing(deployment), None)["spec"]


def test_the_grace_period_is_long_enough_for_the_engine_to_drain() -> None:
    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-vllm-70b.yaml").read_text())
    (pod,) = pods(build(manifest))
    (container,) = pod["containers"]
    drain = int(container["command"][container["command"].index("--shutdown-timeout") + 1])
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert drain == 600 and pod["terminationGracePeriodSeconds"] > asleep + drain


@pytest.mark.parametrize("name", ["adapterdeployment-transformers", "adapterdeployment-vllm"])
def test_engines_listen_with_the_certificate_that_the_agent_makes_if_tls_is_on(name: str) -> None:
    deployment = AdapterDeployment.model_validate(yaml.safe_load((GOLDEN / "input" / f"{name}.yaml").read_text()))
    base = BASES[deployment.spec.base_model]

    def made(*, tls: bool) -> dict[str, Any]:
        settings = SETTINGS.model_copy(update={"engine_tls": tls})
        manifest = serving.serving_deployment(deployment, base, settings, sizing(deployment), 1)
        return dict(manifest["spec"]["template"])

    plain, pod = made(tls=False), made(tls=True)
    assert (serving.has_tls(plain), serving.has_tls(pod)) == (False, True)
    (engine,) = pod["spec"]["containers"]
    agent = pod["spec"]["initContainers"][-1]
    flags = dict(pairwise(engine["command"]))
    assert (flags["--ssl-certfile"], flags["--ssl-keyfile"]) == (
        "/access/tls.crt",
        "/access/tls.key",
    )
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert engine[probe]["httpGet"]["scheme"] == "HTTPS"
    assert dict(pairwise(agent["command"]))["--engine-url"] == "https://127.0.0.1:8000"
    mounts = {item["mountPath"]: item for item in engine["volumeMounts"]}
    assert mounts["/access"]["readOnly"] is True


def test_the_cpu_engine_accepts_every_flag_that_the_operator_sets() -> None:
    from graft_server.engine.settings import parse

    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-transformers.yaml").read_text())
    manifest["spec"] |= {
        "quantization": "int4",
        "engine": "transformers",
        "limits": {"maxModelLen": 64, "maxNumSeqs": 4},
        "toolCallParser": "hermes",
    }
    (pod,) = pods(build(manifest))
    command = pod["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "graft_server.engine"]
    settings = parse(command[3:])
    assert settings.tool_call_parser == "hermes"
    assert (settings.quantization, settings.shutdown_timeout, settings.max_num_seqs) == ("bitsandbytes", 120.0, 4)
    assert settings.callers == "/access/callers.json"


@pytest.mark.parametrize("name", ["a.b", "2026-11.run", "7", "x" * 40 + ".12345678.9", "a" * 50])
def test_a_run_of_several_pods_has_host_names_whatever_its_name(name: str) -> None:
    """Services, and the host names of an Indexed Job's pods, are DNS labels (RFC 1035). The names of jobs may have dots."""
    metadata = {"name": name, "namespace": "shop", "uid": "0a1b2c3d-0000-0000-0000-000000000000"}
    resources = {"requests": {"cpu": "1", "memory": "1Gi"}}
    spec = {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://bucket/d.jsonl"}}, "method": {"lora": {}},
        "output": {"adapter": "a"}, "nodes": 2, "resources": resources,
    }  # fmt: skip
    job = FineTuneJob.model_validate({"metadata": metadata, "spec": spec})
    shape = training.Shape(resources=job.spec.resources, nodes=2)
    made = training.training_job(job, BASES["tiny"], SETTINGS, shape)
    service, host = training.peers_service(job)["metadata"]["name"], f"{made['metadata']['name']}-99"
    for label in (service, host):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label) and len(label) <= 63, label
    assert training.first_host(job) == f"{made['metadata']['name']}-0.{service}.shop.svc"
    assert made["spec"]["template"]["spec"]["subdomain"] == service


def all_pods(settings: Settings) -> list[dict[str, Any]]:
    """Return a training and a serving pod template with other settings."""
    job = FineTuneJob.model_validate(yaml.safe_load((GOLDEN / "input" / "finetunejob-lora.yaml").read_text()))
    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-transformers.yaml").read_text())
    deployment = AdapterDeployment.model_validate(manifest)
    training_pod = training.training_job(job, BASES["tiny"], settings, training.Shape())
    serving_pod = serving.serving_deployment(deployment, BASES["tiny"], settings, sizing(deployment), 1)
    return [item["spec"]["template"] for item in (training_pod, serving_pod)]


def test_without_a_fixed_user_the_cluster_chooses_one() -> None:
    for pod in all_pods(SETTINGS.model_copy(update={"run_as_user": None})):
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(re.findall(r"'(\w+)'", str(pod)))
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    (_, serving_pod) = all_pods(SETTINGS.model_copy(update={"run_as_user": 1000680000}))
    (engine,) = serving_pod["spec"]["containers"]
    assert serving_pod["spec"]["securityContext"]["runAsUser"] == 1000680000
    assert engine["securityContext"]["runAsUser"] == 1000680001


def test_with_roles_of_a_cloud_only_containers_that_read_the_store_have_a_token() -> None:
    storage = SETTINGS.storage.model_copy(update={"web_identity_audience": "sts.amazonaws.com"})
    for pod in all_pods(SETTINGS.model_copy(update={"storage": storage})):
        (volume,) = (item for item in pod["spec"]["volumes"] if item["name"] == "storage")
        secret, token = volume["projected"]["sources"]
        assert secret == {"secret": {"name": "graft-storage"}}
        assert token["serviceAccountToken"]["audience"] == "sts.amazonaws.com"
        for container in [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]:
            mounted = any(mount["name"] == "storage" for mount in container["volumeMounts"])
            assert mounted is (container["name"] != "engine")


def test_annotations_of_service_accounts_are_the_platforms_and_leave_the_engine_out() -> None:
    settings = SETTINGS.model_copy(update={"serving_account_annotations": {"eks.amazonaws.com/role-arn": "arn"}})
    manifest = yaml.safe_load((GOLDEN / "input" / "adapterdeployment-transformers.yaml").read_text())
    account = agent.service_account(AdapterDeployment.model_validate(manifest), settings)
    assert account["metadata"]["annotations"] == {"eks.amazonaws.com/role-arn": "arn"}
    (_, serving_pod) = all_pods(settings)
    assert serving_pod["metadata"]["annotations"]["eks.amazonaws.com/skip-containers"] == "engine"


def test_a_proxy_has_a_way_through_the_network_policies() -> None:
    proxies = SETTINGS.network.model_copy(
        update={"proxies": ["http://proxy.example.com:3128", "http://squid.net.svc:80"]}
    )
    rules = network.egress(SETTINGS.model_copy(update={"network": proxies}))
    assert any({"protocol": "TCP", "port": 3128} in rule.get("ports", []) for rule in rules)
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "net"}}} in [
        peer for rule in rules for peer in rule.get("to", [])
    ]


def test_engines_listen_for_both_families_if_pods_have_both() -> None:
    for ipv6, host in ((True, "::"), (False, "0.0.0.0")):
        (_, pod) = all_pods(SETTINGS.model_copy(update={"ipv6": ipv6}))
        assert dict(pairwise(pod["spec"]["containers"][0]["command"]))["--host"] == host
