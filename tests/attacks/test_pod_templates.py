"""Specs that ask for other pods' places: priority, sandboxes, reserved nodes, the address that the autoscaler calls. And specs that
would weaken their own pods: pod templates, engine arguments and chat templates. tests/worlds/fields/hints.py has what the API
server refuses."""

import re
from typing import Any

import pytest
from graft.api import AdapterDeployment, FineTuneJob
from graft.api.deploymentstatus import ServingSizing
from graft.api.engineargs import REFUSED, SWITCHES, VALUES
from graft.api.meta import Placement
from graft.api.patterns import CHAT_TEMPLATE, ENGINE_ARG, ENV_NAME, MOUNTS
from graft.api.podtemplate import RESERVED_ANNOTATION, RESERVED_ENV, RESERVED_LABEL, PodTemplate
from graft.contracts.message import BaseModelRef
from graft.manifests.podtemplate import both, merge
from graft.manifests.scaling import autoscaler
from graft.manifests.serving import serving_deployment
from graft.manifests.training import Shape, training_job
from graft.reconcile.adapterdeployment import autoscaling
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.scheduling import forbidden
from graft.settings import Allowed, Images, PlatformTemplate, Settings
from pydantic import ValidationError
from worlds.reconciling import MemoryKube

IMAGES = Images(trainer="t", engine="e", agent="a", vllm="v")
SETTINGS = Settings(namespace="graft-system", images=IMAGES)
META = {"name": "one", "namespace": "shop", "uid": "u-1"}
BASE = BaseModelRef(name="tiny", uri="s3://graft/models/tiny", digest="sha256:" + "a" * 64)


def job_pod(template: dict[str, Any], settings: Settings = SETTINGS) -> dict[str, Any]:
    spec = {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/a.jsonl"}}, "method": {"lora": {}},
        "output": {"adapter": "a"}, "podTemplate": template,
    }  # fmt: skip
    job = FineTuneJob.model_validate({"metadata": META, "spec": spec})
    return dict(training_job(job, BASE, settings, Shape())["spec"]["template"])


def serving_pod(settings: Settings = SETTINGS, engine: str = "vllm", **fields: Any) -> dict[str, Any]:
    spec = {"baseModel": "tiny", "adapters": ["a@latest"]} | fields
    deployment = AdapterDeployment.model_validate({"metadata": META, "spec": spec})
    sizing = ServingSizing.model_validate({"engine": engine})
    return dict(serving_deployment(deployment, BASE, settings, sizing, 1)["spec"]["template"])


def containers(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]}


@pytest.mark.parametrize(
    "name",
    [
        "AWS_PROFILE", "AWS_ENDPOINT_URL", "GRAFT_CALLERS", "HF_TOKEN", "HF_ENDPOINT", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH",
        "PYTHONSTARTUP", "PATH", "HOME", "NVIDIA_VISIBLE_DEVICES", "HTTPS_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
        "KUBERNETES_SERVICE_HOST", "VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE", "NCCL_NET_PLUGIN", "CUDA_INJECTION64_PATH", "TRITON_CACHE_DIR",
        "OPENSSL_CONF", "OMP_TOOL_LIBRARIES", "CC", "BASH_ENV", "TMPDIR", "MASTER_ADDR", "WORLD_SIZE", "SSLKEYLOGFILE", "POD_NAME",
        "MATPLOTLIBRC", "MPLBACKEND", "MPLCONFIGDIR", "NLTK_DATA",
        # glibc removes these for programs with more rights than their caller (sysdeps/generic/unsecvars.h): they open files, or
        # lead names of hosts elsewhere. LOCALDOMAIN would make the store's name one of another domain.
        "GCONV_PATH", "GETCONF_DIR", "GLIBC_TUNABLES", "HOSTALIASES", "LD_AUDIT", "LD_DEBUG", "LD_PROFILE", "LOCALDOMAIN", "LOCPATH",
        "MALLOC_ARENA_MAX", "NIS_PATH", "NLSPATH", "RESOLV_ADD_TRIM_DOMAINS", "RESOLV_HOST_CONF", "RESOLV_MULTI",
        "RESOLV_OVERRIDE_TRIM_DOMAINS", "RESOLV_SPOOF_CHECK", "RES_OPTIONS", "TZDIR",
    ],
)  # fmt: skip
def test_a_variable_that_leads_a_program_elsewhere_is_reserved(name: str) -> None:
    """A spec sets a variable of a path, a host, a plugin, a secret or a device -> the API server refuses the name."""
    assert re.search(RESERVED_ENV, name)


@pytest.mark.parametrize(
    "name", ["NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"]
)  # fmt: skip
def test_settings_of_libraries_are_allowed(name: str) -> None:
    """No attack: what people tune in their pods."""
    assert not re.search(RESERVED_ENV, name) and re.search(ENV_NAME, name)
    assert not re.search(ENV_NAME, name.lower()), "http_proxy has lower-case letters"


@pytest.mark.parametrize(
    "key",
    [
        "graft.dev/owner-uid", "app.kubernetes.io/managed-by", "batch.kubernetes.io/job-name", "kueue.x-k8s.io/queue-name", "job-name",
        "pod-template-hash", "controller-uid", "app.kubernetes.io/component", "pod-security.kubernetes.io/enforce",
    ],
)  # fmt: skip
def test_labels_that_select_pods_are_reserved(key: str) -> None:
    """A spec sets a label that NetworkPolicies, Services or controllers select -> the API server refuses the key."""
    assert re.search(RESERVED_LABEL, key) and not re.search(RESERVED_LABEL, "example.com/team")


def test_graft_s_labels_win_even_over_a_reserved_one() -> None:
    """An older CRD without the rule stores a reserved label -> the pod keeps Graft's own."""
    taken = {"graft.dev/owner-uid": "other", "app.kubernetes.io/managed-by": "me", "team": "a"}
    labels = job_pod({"labels": taken})["metadata"]["labels"]
    assert labels["graft.dev/owner-uid"] == "u-1" and labels["app.kubernetes.io/managed-by"] == "graft"
    assert labels["team"] == "a"


@pytest.mark.parametrize(
    "key", ["graft.dev/base-model", "container.apparmor.security.beta.kubernetes.io/train", "seccomp.security.alpha.kubernetes.io/pod"]
)  # fmt: skip
def test_annotations_that_change_isolation_are_reserved(key: str) -> None:
    """A spec sets AppArmor to unconfined, or Graft's own annotation -> the API server refuses the key."""
    assert re.search(RESERVED_ANNOTATION, key)


@pytest.mark.parametrize("key", ["k8s.v1.cni.cncf.io/networks", "iam.amazonaws.com/role", "sidecar.istio.io/inject"])
def test_annotations_need_the_platform_team(key: str) -> None:
    """A spec asks for another network, a role of the cloud or a sidecar -> refused, and the message names the chart's value."""
    spec = FineTuneJob.model_validate({"metadata": META, "spec": {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/a.jsonl"}}, "method": {"lora": {}},
        "output": {"adapter": "a"}, "podTemplate": {"annotations": {key: "x"}},
    }}).spec  # fmt: skip

    def told(*allowed: str) -> str:
        found = forbidden(spec, Allowed(pod_annotations=list(allowed)), template=spec.pod_template)
        return "" if found is None else found.message

    assert f"spec.podTemplate.annotations: {key} is not allowed" in told()
    assert "tenants.allowedPodAnnotations" in told("example.com/*")
    assert told(key) == told(key.rpartition("/")[0] + "/*") == told("*") == ""


def test_every_annotation_does_not_include_those_of_kubernetes_itself() -> None:
    """The platform team allows "*", and a spec sets an annotation of Kubernetes -> still refused, unless it is listed."""
    template = PodTemplate.model_validate({"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}})
    spec = serving_spec()
    assert forbidden(spec, Allowed(pod_annotations=["*"]), template=template) is not None
    listed = Allowed(pod_annotations=["cluster-autoscaler.kubernetes.io/safe-to-evict"])
    assert forbidden(spec, listed, template=template) is None


def serving_spec() -> Any:
    spec = {"baseModel": "tiny", "adapters": ["a@latest"]}
    return AdapterDeployment.model_validate({"metadata": META, "spec": spec}).spec


def test_the_variables_and_mounts_of_a_spec_stay_out_of_containers_with_keys() -> None:
    """A spec adds a variable and a mount to serving pods -> only the engine, which has no key, gets them."""
    template = {
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "volumes": [{"name": "x", "emptyDir": {}}],
        "volumeMounts": [{"name": "x", "mountPath": "/mnt/volumes/x"}],
    }
    for name, container in containers(serving_pod(podTemplate=template)).items():
        names = {item["name"] for item in container["env"]}
        paths = {item["mountPath"] for item in container["volumeMounts"]}
        assert ("NCCL_DEBUG" in names, "/mnt/volumes/x" in paths) == (name == "engine", name == "engine")


def test_a_mount_cannot_name_a_volume_of_graft() -> None:
    """A spec names its volume like the one of the storage key, and mounts that name -> it gets its own volume."""
    template = {
        "volumes": [{"name": "storage", "configMap": {"name": "mine"}}],
        "volumeMounts": [{"name": "storage", "mountPath": "/mnt/volumes/x"}],
    }
    pod = serving_pod(podTemplate=template)
    engine = containers(pod)["engine"]
    (mount,) = (item for item in engine["volumeMounts"] if item["mountPath"] == "/mnt/volumes/x")
    (volume,) = (item for item in pod["spec"]["volumes"] if item["name"] == mount["name"])
    assert "secret" not in volume and mount["readOnly"] is True
    # Even a mount without a volume, which the API server refuses.
    alone = job_pod({"volumeMounts": [{"name": "storage", "mountPath": "/mnt/volumes/x"}]})
    names = {item["name"] for item in alone["spec"]["volumes"]}
    assert {
        item["name"] for item in containers(alone)["train"]["volumeMounts"] if item["mountPath"] == "/mnt/volumes/x"
    } - names


@pytest.mark.parametrize(
    "volume",
    [
        {"hostPath": {"path": "/"}}, {"secret": {"secretName": "graft-storage"}}, {"projected": {"sources": []}},
        {"csi": {"driver": "x"}}, {"nfs": {"server": "x", "path": "/"}}, {"downwardAPI": {}}, {"ephemeral": {}},
    ],
)  # fmt: skip
def test_other_volumes_do_not_exist(volume: dict[str, Any]) -> None:
    """A spec adds a folder of the node, a Secret or a token -> no such field."""
    with pytest.raises(ValidationError):
        PodTemplate.model_validate({"volumes": [{"name": "x"} | volume]})


@pytest.mark.parametrize(
    "field",
    ["securityContext", "serviceAccountName", "hostNetwork", "containers", "hostAliases", "shareProcessNamespace"],
)
def test_fields_that_isolate_a_pod_do_not_exist(field: str) -> None:
    """A spec sets the identity or the isolation of a pod -> no such field."""
    with pytest.raises(ValidationError):
        PodTemplate.model_validate({field: {}})
    affinity = {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone", "namespaceSelector": {}}]}
    with pytest.raises(ValidationError):  # it would keep pods of other namespaces away
        PodTemplate.model_validate({"affinity": {"podAntiAffinity": affinity}})


@pytest.mark.parametrize("path", ["/", "/etc/graft/x", "/tmp", "/app", "/mnt/pvc/x", "/mnt/volumes/../../etc", "/mnt/volumes/a/b", "/mnt/volumes/"])  # fmt: skip
def test_a_mount_hides_no_folder_of_the_image(path: str) -> None:
    """A spec mounts its volume over programs or keys -> the API server refuses the path."""
    assert not re.search(MOUNTS, path) and re.search(MOUNTS, "/mnt/volumes/a")


def test_nothing_is_expanded_in_values_of_a_spec() -> None:
    """A spec puts $(VARIABLE) into a variable, a flag or a template -> the kubelet leaves it as it is."""
    assert "$$(HOME)" in str(job_pod({"env": [{"name": "A", "value": "$(HOME)"}]}))
    command = containers(serving_pod(chatTemplate="{{ a }}$(GRAFT_CALLERS)", engineArgs=["--seed=$(HOME)"]))["engine"][
        "command"
    ]
    assert "{{ a }}$$(GRAFT_CALLERS)" in command and "--seed=$$(HOME)" in command


def test_the_flags_of_a_spec_cannot_replace_those_of_graft() -> None:
    """An older CRD stores a refused flag -> Graft's flag of the same name comes later and counts."""
    command = containers(serving_pod(engineArgs=["--middleware=x.Y", "--load-format=pt"]))["engine"]["command"]
    assert command.index("--load-format=pt") < command.index("--load-format")
    refused = {flag for flags in REFUSED.values() for flag in flags}
    assert not refused & {*VALUES, *SWITCHES}
    assert not [arg for arg in ("--a b", "-a", "--a\n", "--A", "--a.b=c", "--a_b") if re.fullmatch(ENGINE_ARG, arg)]


@pytest.mark.parametrize("text", ["/access/callers.json", "template_llava.jinja", "../x", "{ x }"])
def test_a_chat_template_is_not_the_path_of_a_file(text: str) -> None:
    """A spec gives a path as chatTemplate, so that the engine tells the file's words to a client -> refused at apply."""
    assert not re.search(CHAT_TEMPLATE, text) and re.search(CHAT_TEMPLATE, "{% if a %}{{ b }}{% endif %}")


def test_the_platform_s_values_win_over_those_of_a_spec() -> None:
    """A spec sets what the platform team has set -> the platform's value stays."""
    platform = PlatformTemplate.model_validate({
        "labels": {"team": "ml"}, "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "pool", "operator": "In", "values": ["ml"]}]}]}}},
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
        "volumes": [{"name": "storage", "secret": {"secretName": "ca"}}],
        "volumeMounts": [{"name": "storage", "mountPath": "/etc/ca"}],
    })  # fmt: skip
    settings = SETTINGS.model_copy(update={"serving_pods": platform})
    terms = [
        {"matchExpressions": [{"key": "zone", "operator": "Exists"}]},
        {"matchExpressions": [{"key": "b", "operator": "Exists"}]},
    ]
    pod = serving_pod(settings, podTemplate={
        "labels": {"team": "other", "mine": "a"}, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}},
        "topologySpreadConstraints": [{"maxSkew": 9, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    })  # fmt: skip
    assert pod["metadata"]["labels"]["team"] == "ml" and pod["metadata"]["labels"]["mine"] == "a"
    for container in containers(pod).values():
        assert [item["value"] for item in container["env"] if item["name"] == "NCCL_DEBUG"] == ["WARN"]
        assert {"name": "platform-storage", "mountPath": "/etc/ca"} in container["volumeMounts"]
    found = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert [[item["key"] for item in term["matchExpressions"]] for term in found] == [["pool", "zone"], ["pool", "b"]]
    spread = {item["topologyKey"]: item["maxSkew"] for item in pod["spec"]["topologySpreadConstraints"]}
    assert spread == {"kubernetes.io/hostname": 1, "zone": 1}


def test_a_pod_without_a_template_is_left_as_it_is() -> None:
    template = {"metadata": {"labels": {}}, "spec": {}}
    assert merge(template, PlatformTemplate(), None, ()) is template
    assert both({}, {}) == {}


EVERYTHING = {"priorityClasses": ["*"], "runtimeClasses": ["*"], "tolerations": [{"key": "*"}]}
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists"}


def told(allowed: dict[str, Any] | None = None, **fields: Any) -> str | None:
    found = forbidden(Placement.model_validate(fields), Allowed.model_validate(allowed or {}), "spec.compose")
    assert found is None or found.reason == "SchedulingForbidden"
    return found and found.message


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        ({"priorityClassName": "system-cluster-critical"}, "priorityClassName: system", "allowedPriorityClasses"),
        ({"priorityClassName": "high"}, "priorityClassName: high", "allowedPriorityClasses"),
        ({"runtimeClassName": "host"}, "runtimeClassName: host", "allowedRuntimeClasses"),
        ({"tolerations": [GPU_TAINT, {"operator": "Exists"}]}, "tolerations[1]: every taint", "allowedTolerations"),
        ({"tolerations": [{"key": "", "operator": "Exists"}]}, "tolerations[0]: every taint", "allowedTolerations"),
        ({"tolerations": [{"key": "node-role.kubernetes.io/control-plane"}]}, "control-plane", "allowedTolerations"),
    ],
)
def test_what_the_platform_team_did_not_allow_is_refused(fields: dict[str, Any], path: str, value: str) -> None:
    """A spec asks for a priority, a runtime or a taint -> the message names the field and the value of the chart."""
    message = told(**fields)
    assert message is not None and message.startswith("spec.compose.") and path in message
    assert f"tenants.{value}" in message


def test_what_is_allowed_passes() -> None:
    """No attack: GPU nodes, the usual runtime of GPUs, and what the lists name."""
    assert told() is None
    assert told(tolerations=[GPU_TAINT], runtimeClassName="nvidia", priorityClassName="") is None
    taint = {"key": "team", "value": "red", "effect": "NoSchedule"}
    allowed = {"priorityClasses": ["batch", "system-node-critical"], "tolerations": [taint]}
    for name in allowed["priorityClasses"]:
        assert told(allowed, priorityClassName=name) is None
    assert told(allowed, tolerations=[taint | {"operator": "Equal"}]) is None


@pytest.mark.parametrize(
    "wider", [{"operator": "Exists"}, {"value": "blue"}, {"value": None}, {"effect": None}, {"effect": "NoExecute"}]
)
def test_a_toleration_that_matches_more_than_the_entry_is_refused(wider: dict[str, Any]) -> None:
    """The list allows one value and effect of a taint, and a spec tolerates more of it -> refused."""
    taint = {"key": "team", "value": "red", "effect": "NoSchedule"}
    asked = {key: value for key, value in (taint | wider).items() if value is not None}
    assert "tolerations[0]: team" in (told({"tolerations": [taint]}, tolerations=[asked]) or "")


def test_every_name_does_not_include_those_of_kubernetes_itself() -> None:
    """The platform team allows "*", and a spec asks for system-node-critical -> still refused."""
    assert told(EVERYTHING, priorityClassName="system-node-critical") is not None
    assert (
        told(EVERYTHING, priorityClassName="high", runtimeClassName="x", tolerations=[{"operator": "Exists"}]) is None
    )


async def test_no_spec_names_an_address_for_the_autoscaler() -> None:
    """A spec gives KEDA an address inside the cluster -> the field has no effect; only the chart names the Prometheus."""
    deployment = AdapterDeployment.model_validate({
        "metadata": {"name": "chat", "namespace": "shop", "uid": "u"},
        "spec": {
            "baseModel": "tiny", "adapters": ["a@latest"],
            "autoscaling": {"provider": "keda", "maxReplicas": 3, "target": {"requestsPerReplica": 2},
                            "prometheusUrl": "http://169.254.169.254/latest"},
        },
    })  # fmt: skip
    found = autoscaler(deployment, "http://prometheus:9090")
    assert found is not None and "169.254" not in str(found)
    assert found["spec"]["triggers"][0]["metadata"]["serverAddress"] == "http://prometheus:9090"
    kube = MemoryKube()
    trouble = await autoscaling.apply_guards(Context(kube, SETTINGS, None, None), deployment)  # type: ignore[arg-type]
    assert trouble is not None and trouble.reason == "PrometheusMissing"
    assert "autoscaling.prometheusUrl" in trouble.message
    assert "ScaledObject" not in {kind for kind, *_ in kube.objects}
