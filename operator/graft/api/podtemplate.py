"""PodTemplate: what a spec, or the platform's values, add to the pods that Graft creates. The names are those of a pod.

Everybody who may write a FineTuneJob may write it. So it holds only fields that cannot weaken the isolation of a pod:
docs/security.md#pod-templates gives the reasons. The chart's values `training.podTemplate` and `serving.podTemplate` use
the same type, with more in it: see PlatformTemplate in graft.settings.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from graft.api.meta import AMOUNT, Schema, label_key, label_keys, rules
from graft.api.patterns import DNS_LABEL, DNS_NAME, ENV_NAME, LABEL_KEY, LABEL_VALUE, MOUNTS

# Labels of these domains select pods: Kubernetes's controllers, Graft's NetworkPolicies and Services, Kueue.
RESERVED_LABEL = r"^(([^/]*\.)?(kubernetes\.io|(x-)?k8s\.io|graft\.dev)/.*|job-name|controller-uid|pod-template-hash)$"
RESERVED_ANNOTATION = (
    r"^(([^/]*\.)?graft\.dev|container\.(apparmor|seccomp)\..*|(container\.)?seccomp\.security\.alpha\.kubernetes\.io)/"
)
# Names of variables that lead a program to another file, host, plugin or secret, and those that Graft, the cloud's SDKs
# and container runtimes read. NVIDIA_VISIBLE_DEVICES, for example, gives a container all GPUs of its node.
RESERVED_ENV = (
    r"^(GRAFT|AWS|HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|DATASETS|VLLM|KUBERNETES|POD|PYTHON[A-Z]*|LD|NVIDIA|OPENSSL|GLIBC"
    r"|MALLOC|XDG|RAY|TORCHELASTIC|RESOLV|NLTK)_.*$"
    r"|^(.*_)?(PATH|PATHS|PYTHONPATH|HOME|DIR|DIRECTORY|FILE|FILES|FILENAME|CACHE|ROOT|PRELOAD|PLUGIN|PLUGINS|LIB|LIBS|LIBRARY|LIBRARIES"
    r"|MODULE|MODULES|COMPILER|COMMAND|CMD|ENTRYPOINT|SHELL|STARTUP|HOST|HOSTS|HOSTNAME|ADDR|ADDRESS|ENDPOINT|ENDPOINTS|URL|URI|PORT|PROXY"
    r"|TOKEN|TOKENS|KEY|KEYS|KEYLOGFILE|SECRET|SECRETS|PASSWORD|CREDENTIALS|CERT|CERTS|CA|BUNDLE|INJECTION64|INJECTION32|OPTIONS)(_.*)?$"
    r"|^(PYTHON[A-Z0-9]*|HOME|USER|LOGNAME|SHELL|TMP|TMPDIR|TEMP|ENV|BASH_ENV|IFS|CC|CXX|CFLAGS|LDFLAGS|RANK|WORLD_SIZE|LOCAL_RANK"
    r"|LOCAL_WORLD_SIZE|GROUP_RANK|LOCALDOMAIN|HOSTALIASES|MPL[A-Z]*|MATPLOTLIB[A-Z]*|OPENBLAS_CORETYPE)$"
    r"|^.*(PATH|DIR|FILE)$"
)

EXPRESSION_RULES = (
    (
        "self.operator in ['In', 'NotIn'] ? has(self.values) && self.values.size() > 0 : "
        "self.operator in ['Gt', 'Lt'] ? has(self.values) && self.values.size() == 1 && self.values[0].matches('^[0-9]{1,9}$') : "
        "!has(self.values) || self.values.size() == 0",
        "matchExpressions: operators In and NotIn need values, Gt and Lt one whole number, Exists and DoesNotExist none",
    ),
)


LabelKey = Annotated[str, AfterValidator(label_key)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE, max_length=63)]
ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}


class _Expression(Schema):
    key: str = Field(pattern=LABEL_KEY, max_length=253, description="Key of the label.")
    values: list[LabelValue] | None = Field(
        default=None,
        max_length=16,
        description="Values to compare with, for operators In and NotIn.",
        json_schema_extra=ATOMIC,
    )


class LabelExpression(_Expression):
    """A requirement on a label."""

    model_config = Schema.model_config | {"json_schema_extra": rules(*EXPRESSION_RULES)}

    operator: Literal["Exists", "DoesNotExist", "In", "NotIn"] = Field(
        description="In or NotIn: compare with values. Exists or DoesNotExist: the key alone."
    )


class NodeExpression(_Expression):
    """A requirement on a label of a node."""

    model_config = Schema.model_config | {"json_schema_extra": rules(*EXPRESSION_RULES)}

    operator: Literal["Exists", "DoesNotExist", "In", "NotIn", "Gt", "Lt"] = Field(
        description="In or NotIn: compare with values. Exists or DoesNotExist: the key alone. Gt or Lt: compare as numbers."
    )


class LabelSelector(Schema):
    """Which objects are selected by their labels."""

    match_labels: dict[LabelKey, LabelValue] | None = Field(
        default=None,
        max_length=16,
        description="Labels that an object must have.",
        json_schema_extra=label_keys("matchLabels"),
    )
    match_expressions: list[LabelExpression] | None = Field(
        default=None, max_length=8, description="Further requirements.", json_schema_extra=ATOMIC
    )


class NodeTerm(Schema):
    """Requirements that a node must meet together."""

    match_expressions: list[NodeExpression] = Field(
        min_length=1, max_length=8, description="Requirements on the node's labels.", json_schema_extra=ATOMIC
    )


class RequiredNodes(Schema):
    """Which nodes are allowed."""

    node_selector_terms: list[NodeTerm] = Field(
        min_length=1, max_length=8, description="A node must meet one of these terms.", json_schema_extra=ATOMIC
    )


class PreferredNodes(Schema):
    """Nodes that are preferred."""

    weight: int = Field(ge=1, le=100, description="Weight among the preferences.")
    preference: NodeTerm = Field(description="Requirements that a preferred node meets.")


class NodeAffinity(Schema):
    """Which nodes the pods may or should run on."""

    required_during_scheduling_ignored_during_execution: RequiredNodes | None = Field(
        default=None, description="The pods run only on these nodes."
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredNodes] | None = Field(
        default=None, max_length=8, description="The pods run on these nodes if possible.", json_schema_extra=ATOMIC
    )


class PodTerm(Schema):
    """Pods of the same namespace, and what they must share with this pod. Pods of other namespaces cannot be selected."""

    label_selector: LabelSelector | None = Field(
        default=None, description="Which pods. When absent: the pods of this job or deployment."
    )
    topology_key: str = Field(
        pattern=LABEL_KEY,
        max_length=253,
        description="Label of nodes that defines a place, for example kubernetes.io/hostname or topology.kubernetes.io/zone.",
    )


class PreferredPods(Schema):
    """A preference for places."""

    weight: int = Field(ge=1, le=100, description="Weight among the preferences.")
    pod_affinity_term: PodTerm = Field(description="Pods, and the place.")


class PodAffinity(Schema):
    """Places that are required or preferred because of other pods there."""

    required_during_scheduling_ignored_during_execution: list[PodTerm] | None = Field(
        default=None, max_length=8, description="All of these terms must hold.", json_schema_extra=ATOMIC
    )
    preferred_during_scheduling_ignored_during_execution: list[PreferredPods] | None = Field(
        default=None, max_length=8, description="These terms hold if possible.", json_schema_extra=ATOMIC
    )


class Affinity(Schema):
    """Affinity of the pods, with the same fields as in a pod."""

    node_affinity: NodeAffinity | None = Field(default=None, description="Nodes that the pods may or should run on.")
    pod_affinity: PodAffinity | None = Field(default=None, description="Pods to be near to.")
    pod_anti_affinity: PodAffinity | None = Field(default=None, description="Pods to keep away from.")


class TopologySpreadConstraint(Schema):
    """How the pods are spread over nodes or zones."""

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'",
                "topologySpreadConstraints: minDomains is allowed only with whenUnsatisfiable DoNotSchedule",
            )
        )
    }

    max_skew: int = Field(ge=1, le=1000, description="Largest difference between the numbers of pods in two places.")
    topology_key: str = Field(
        pattern=LABEL_KEY, max_length=253, description="Label of nodes that defines a place, for example a zone."
    )
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        description="DoNotSchedule: the pod waits. ScheduleAnyway: the pod starts, and the spread is a preference."
    )
    min_domains: int | None = Field(default=None, ge=1, le=1000, description="Lowest number of places.")
    label_selector: LabelSelector | None = Field(
        default=None, description="Which pods are counted. When absent: the pods of this job or deployment."
    )


class EnvVar(Schema):
    """An environment variable."""

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                f"!self.name.matches(r'{RESERVED_ENV}')",
                "env: this name is reserved, because it can lead a program to another file, host, plugin or secret. "
                "docs/security.md#pod-templates lists reserved names. Ask your platform team to set it for all pods",
            )
        )
    }

    name: str = Field(
        pattern=ENV_NAME,
        max_length=64,
        description="Name in capital letters. Names of paths, hosts, plugins and secrets are reserved.",
    )
    value: str = Field(default="", max_length=1024, description="Value. It is used as it stands.")


class EmptyDir(Schema):
    """An empty folder that lives as long as the pod."""

    medium: Literal["Memory"] | None = Field(
        default=None, description="Memory: a tmpfs, which counts as the containers' memory. Otherwise the node's disk."
    )
    size_limit: str | int | None = Field(
        default=None,
        description="Largest size, for example 1Gi.",
        json_schema_extra=AMOUNT,
    )


class ConfigMapVolume(Schema):
    """The keys of a ConfigMap, as files."""

    name: str = Field(pattern=DNS_NAME, max_length=253, description="Name of the ConfigMap in the same namespace.")
    optional: bool | None = Field(default=None, description="Whether the pod starts without the ConfigMap.")


class ClaimVolume(Schema):
    """A PersistentVolumeClaim. It is mounted read-only."""

    claim_name: str = Field(pattern=DNS_NAME, max_length=253, description="Name of the claim in the same namespace.")


class Volume(Schema):
    """A volume of the pods."""

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "[has(self.emptyDir), has(self.configMap), has(self.persistentVolumeClaim)].filter(g, g).size() == 1",
                "volumes: give exactly one of emptyDir, configMap, persistentVolumeClaim. Other volumes could give the pods "
                "what they must not have: files of the node, tokens, or Secrets",
            )
        )
    }

    name: str = Field(pattern=DNS_LABEL, max_length=50, description="Name of the volume.")
    empty_dir: EmptyDir | None = Field(default=None, description="An empty folder.")
    config_map: ConfigMapVolume | None = Field(default=None, description="The keys of a ConfigMap, as files.")
    persistent_volume_claim: ClaimVolume | None = Field(default=None, description="A claim, read-only.")


class VolumeMount(Schema):
    """Where a container sees a volume."""

    name: str = Field(pattern=DNS_LABEL, max_length=50, description="Name of the volume in volumes.")
    mount_path: str = Field(
        pattern=MOUNTS, max_length=128, description="Folder of the container: /mnt/volumes/ and one name."
    )


class PodTemplate(Schema):
    """What is added to the pods. The names are those of a pod."""

    labels: dict[LabelKey, LabelValue] | None = Field(
        default=None,
        max_length=32,
        description="Labels of the pods. Keys of the domains kubernetes.io, k8s.io, x-k8s.io and graft.dev are reserved. The platform team "
        "may limit the keys in the chart's value tenants.allowedPodLabels.",
        json_schema_extra=rules(
            (
                f"self.all(k, k.matches(r'{LABEL_KEY}') && !k.matches(r'{RESERVED_LABEL}'))",
                "podTemplate.labels: a key must be the key of a label, and not of the domains kubernetes.io, k8s.io, x-k8s.io and graft.dev, "
                "whose labels select pods for controllers, Services and NetworkPolicies",
            )
        ),
    )
    annotations: dict[LabelKey, Annotated[str, Field(max_length=2048)]] | None = Field(
        default=None,
        max_length=32,
        description="Annotations of the pods. The platform team lists the allowed keys in the chart's value "
        "tenants.allowedPodAnnotations. By default there are none, because annotations can switch on networks, identities and "
        "sidecars of the cluster.",
        json_schema_extra=rules(
            (
                f"self.all(k, k.matches(r'{LABEL_KEY}') && !k.matches(r'{RESERVED_ANNOTATION}'))",
                "podTemplate.annotations: a key must have the form of a label's key, and must not be of the domain graft.dev, or an "
                "AppArmor or seccomp profile",
            )
        ),
    )
    affinity: Affinity | None = Field(
        default=None, description="Affinity of the pods. Graft's own preferences, for example for spot nodes, remain."
    )
    topology_spread_constraints: list[TopologySpreadConstraint] | None = Field(
        default=None,
        max_length=8,
        description="How the pods are spread. An entry replaces Graft's own for the same topologyKey and whenUnsatisfiable.",
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["topologyKey", "whenUnsatisfiable"],
        },
    )
    env: list[EnvVar] | None = Field(
        default=None,
        max_length=32,
        description="Environment variables of the containers prepare and train, or of the engine. Variables that Graft or the "
        "platform team sets have precedence.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    volumes: list[Volume] | None = Field(
        default=None,
        max_length=8,
        description="Volumes of the pods.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    volume_mounts: list[VolumeMount] | None = Field(
        default=None,
        max_length=8,
        description="Mounts of the volumes, in the same containers as env.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["mountPath"]},
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            (
                "!has(self.volumeMounts) || self.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name))",
                "podTemplate.volumeMounts: each name must be one of volumes",
            )
        )
    }
