"""What the schema cannot say: specs in which a field is allowed, and values that mean something.

A field is put into the first spec of its kind that the API server accepts with it. A new field that needs neither has no
line here.
"""

from fnmatch import fnmatchcase
from typing import Any

from worlds.fields.schema import Field, Schema, Spec, fields, put, spec_of
from worlds.fields.values import minimal, valid
from worlds.reconciling import MemoryStore, publish

NAMESPACE = "fields"
JOB: Spec = {
    "baseModel": "tiny",
    "dataset": {"train": {"uri": f"s3://graft/{NAMESPACE}/datasets/train.jsonl"}},
    "method": {"lora": {}},
    "output": {"adapter": "support"},
}
DATA = f"s3://graft/{NAMESPACE}/datasets/more.jsonl"
SUITE: Spec = {"name": "cases", "uri": DATA}
HARNESS: Spec = {"name": "cases", "lmEval": {"task": "own", "definition": DATA, "data": DATA}}
VERSION: Spec = {"adapter": "support", "version": "2.0.0", "baseModel": "tiny", "method": "lora"}
PREFIX = f"{NAMESPACE}/adapters/support/2.0.0/"
ARTIFACT = {"uri": f"s3://graft/{PREFIX}", "digest": publish(MemoryStore(), PREFIX, "support", "2.0.0")}
PARENTS: Any = [{"adapter": "support@1.0.0"}, {"adapter": "sales@1.0.0"}]
COMPOSED = VERSION | {"compose": {"parents": PARENTS}}
DEPLOYMENT: Spec = {"baseModel": "tiny", "adapters": ["support@1.0.0", "sales@1.0.0"]}
SCALED: Spec = {"maxReplicas": 3, "target": {"cpuPercent": 50}}
CPU = {"requests": {"cpu": "1"}}
GPU = {"limits": {"memory": "2Gi", "nvidia.com/gpu": 1}}
AMOUNTS = ["1", 2, "1.5", "100m", "1e3", "+1", "1.", ".5", "0", "1Ei"]
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
VOLUME = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
VOLUMES: Any = [{"name": "work", "emptyDir": {}}, {"name": "more", "emptyDir": {}}]
MOUNTS: Any = [{"name": "work", "mountPath": "/mnt/volumes/work"}]
EXPRESSIONS: Any = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
NODES: Any = {
    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [EXPRESSIONS]},
    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": EXPRESSIONS}],
}
TEMPLATES: list[Spec] = [
    {"podTemplate": {"volumes": VOLUMES}},
    {"podTemplate": {"volumes": VOLUMES, "volumeMounts": MOUNTS}},
    {"podTemplate": {"volumes": [{"name": "texts", "configMap": {"name": "texts"}}]}},
    {"podTemplate": {"affinity": {"nodeAffinity": NODES}}},
]
TAINT = {"key": "pool", "effect": "NoExecute"}

# kind -> specs, the plainest first. Each further one allows a field that CEL rules refuse in the ones before it.
SPECS: dict[str, list[Spec]] = {
    "BaseModel": [{"source": "s3://graft/models/tiny"}],
    "FineTuneJob": [
        JOB,
        JOB | {"method": {"qlora": {}}},
        JOB | {"method": {"full": {}}},
        JOB | {"method": {"promptTuning": {}}},
        JOB | {"dataset": JOB["dataset"] | {"format": "instruction"}},
        JOB | {"evaluation": {"suites": [HARNESS]}},
        JOB | {"resources": CPU},
        *(JOB | template for template in TEMPLATES),
    ],
    "Adapter": [
        VERSION | {"artifact": ARTIFACT},
        COMPOSED,
        VERSION | {"compose": {"parents": PARENTS, "method": "svd"}},
        VERSION | {"compose": {"parents": PARENTS, "method": "dareTies", "density": 0.5}},
        VERSION | {"compose": {"parents": PARENTS, "into": "base"}, "method": "full"},
        VERSION | {"import": {"uri": f"s3://graft/{NAMESPACE}/imports/one/"}},
    ],
    "Tenant": [{"namespaces": {"names": [NAMESPACE]}}, {"namespaces": {"selector": {"matchLabels": {"zone": "a"}}}}],
    "AdapterDeployment": [
        DEPLOYMENT,
        DEPLOYMENT | {"routes": [{"model": "chat"}]},
        DEPLOYMENT | {"autoscaling": SCALED},
        DEPLOYMENT | {"autoscaling": SCALED | {"maxReplicas": 1000}},
        DEPLOYMENT | {"autoscaling": SCALED | {"minReplicas": 0}, "strategy": "serverless"},
        *(DEPLOYMENT | template for template in TEMPLATES),
        DEPLOYMENT | {"engine": "vllm"},
    ],
    "ApiKey": [{}, {"sha256": ["0" * 64]}],
}
# Path below spec -> values that a rule or the world demands. With a *, all paths that end so. The generated values of
# these fields are tried too, and may be refused.
VALUES: dict[str, list[Any]] = {
    "namespaces": [{"names": [NAMESPACE]}, {"selector": {"matchLabels": {"team": "b"}}}],
    "baseModels": [["tiny"], ["small"]],
    "baseModels[]": ["tiny", "small"],
    "namespaces.names": [[NAMESPACE], ["other"]],
    "namespaces.names[]": [NAMESPACE, "other"],
    "namespaces.selector": [{"matchLabels": {"team": "b"}}, EXPRESSIONS],
    "namespaces.selector.matchExpressions[].key": ["zone", "other"],
    "namespaces.selector.matchLabels": [{"team": "b"}, {"team": "a", "zone": "a"}],
    "baseModel": ["tiny", "small"],
    "method": [{"lora": {}}, {"qlora": {}}, {"full": {}}, {"promptTuning": {}}],
    "evaluation.suites": [[SUITE], [SUITE, HARNESS | {"name": "other"}]],
    "evaluation.suites[]": [SUITE, HARNESS],
    "evaluation.gates": [[{"metric": "exactMatch", "min": 0.5}], [{"metric": "loss", "max": 2.0}]],
    "evaluation.gates[]": [{"metric": "exactMatch", "min": 0.5}],
    "evaluation.suites[].lmEval": [HARNESS["lmEval"], {"task": "arc_easy"}],
    "*retention": [{"unusedFor": "30d"}, {"compressAfter": "30d"}],
    "*tolerations": [[TAINT], [{"operator": "Exists"}, TAINT | {"value": "a"}]],
    "*tolerations[]": [TAINT, {"operator": "Exists"}],
    "*tolerations[].key": ["pool"],
    "*tolerations[].effect": ["NoExecute"],
    "*resources": [CPU, GPU],
    "*resources.requests": [{"cpu": "1"}, {"cpu": "500m", "memory": 1073741824, "ephemeral-storage": "1.5Gi"}],
    "*resources.limits": [{"memory": "1Gi"}, GPU["limits"], {"nvidia.com/gpu": "2e0"}, {"nvidia.com/gpu": "+1."}],
    "*requests{}": AMOUNTS,
    "*limits{}": AMOUNTS,
    "nodes": [2, 1],
    "*matchExpressions": [
        [{"key": "zone", "operator": "In", "values": ["a"]}],
        [{"key": "zone", "operator": "Exists"}],
    ],
    "*matchExpressions[]": [
        {"key": "zone", "operator": "NotIn", "values": ["a", "b"]},
        {"key": "z", "operator": "Exists"},
    ],
    "*matchExpressions[].operator": ["In", "NotIn"],
    "*matchExpressions[].values": [["a"], ["a", "b"]],
    "*topologySpreadConstraints": [[SPREAD], [SPREAD | {"labelSelector": {"matchLabels": {"a": "b"}}, "maxSkew": 2}]],
    "*topologySpreadConstraints[]": [SPREAD],
    "*topologySpreadConstraints[].whenUnsatisfiable": ["DoNotSchedule", "ScheduleAnyway"],
    "podTemplate.volumes": [[VOLUME], [{"name": "work", "emptyDir": {}}, VOLUME]],
    "podTemplate.volumes[]": [VOLUME, {"name": "work", "emptyDir": {"medium": "Memory"}}],
    "podTemplate.volumeMounts": [[{"name": "work", "mountPath": "/mnt/volumes/a"}], []],
    "podTemplate.volumeMounts[]": [{"name": "work", "mountPath": "/mnt/volumes/a"}],
    "podTemplate.volumeMounts[].name": ["work", "more"],
    "podTemplate.env[].name": ["OMP_NUM_THREADS", "NCCL_DEBUG"],
    "podTemplate.annotations": [{"example.com/a": "b"}],
    "engineArgs": [["--enforce-eager"], ["--seed=7", "--max-num-batched-tokens=8192"]],
    "engineArgs[]": ["--enforce-eager", "--stream-interval=2"],
    "compose": [{"parents": PARENTS}],
    "compose.parents": [PARENTS, [*PARENTS, {"adapter": "tone@1.0.0", "weight": -0.5}]],
    "compose.parents[]": [{"adapter": "support@latest"}],
    "compose.parents[].adapter": ["support@latest", "tone@1.0.0"],
    "baseVersions": ["^1", "1.2.0", "2"],
    "adapters": [["support@1.0.0"], ["support@^1", "sales@latest", "tone@1"]],
    "adapters[]": ["support@latest", "support@1.0"],
    "limits.adapterBytesPerReplica": [2097152, "2Mi", "1.5Gi", "+1e9"],
    "routes": [[{"model": "chat"}], [{"model": "a", "adapter": "support"}, {"model": "b", "adapter": "sales"}]],
    "routes[].adapter": ["support", "sales"],
    "routes[].sequence": [["support", "sales"], ["sales", "support", "sales", "support"]],
    "routes[].sequence[]": ["sales", "support"],
    "expiresAt": ["2036-12-31T00:00:00Z", "2026-01-01T12:00:00.5+01:00"],
    "allowedNamespaces": [[NAMESPACE], ["other", NAMESPACE], ["other"]],
    "allowedNamespaces[]": [NAMESPACE, "other"],
    "autoscaling": [SCALED, {"maxReplicas": 1}],
    "autoscaling.target": [{"cpuPercent": 50}, {"requestsPerReplica": 4}],
}


SHARDED = {"training": {"sharding": "fsdp"}}
CALM = {"autoscaling": SCALED | {"minReplicas": 0}}
# Specs that break a rule which the change of a single field does not break: kind, spec, part of the message.
BREAKS: list[tuple[str, Spec, str]] = [
    ("FineTuneJob", JOB | {"dataset": JOB["dataset"] | {"eval": {"uri": DATA}, "evalSplit": 0.1}}, "not both"),
    ("FineTuneJob", JOB | {"queue": "q", "suspend": True}, "suspend must not be true if queue is set"),
    ("FineTuneJob", JOB | SHARDED | {"method": {"qlora": {}}}, "fsdp cannot be used with qlora"),
    (
        "FineTuneJob",
        JOB | {"training": {"sharding": "fsdp", "optim": "adafactor"}},
        "fsdp cannot be used with adamw8bit",
    ),
    (
        "FineTuneJob",
        JOB | {"method": {"lora": {"targetModules": "attention", "targetModuleNames": ["q_proj"]}}},
        "give targetModules (a preset) or targetModuleNames, not both",
    ),
    (
        "FineTuneJob",
        JOB | {"evaluation": {"suites": [HARNESS | {"metrics": ["f1"]}]}},
        "metrics is not allowed with lmEval",
    ),
    (
        "FineTuneJob",
        JOB | {"evaluation": {"suites": [{"name": "a", "lmEval": {"task": "own", "data": DATA}}]}},
        "give definition and data, or neither",
    ),
    ("FineTuneJob", JOB | {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1500m"}}}, "above the limit"),
    ("FineTuneJob", JOB | {"resources": {"requests": {"nvidia.com/gpu": 1}}}, "belong to limits"),
    ("FineTuneJob", JOB | {"resources": {"limits": {"nvidia.com/gpu": "1500m"}}}, "must be a whole number"),
    (
        "FineTuneJob",
        JOB | {"tolerations": [{"operator": "Exists", "value": "a"}]},
        "value is not allowed with operator",
    ),
    ("FineTuneJob", JOB | {"tolerations": [{"key": "a", "tolerationSeconds": 5}]}, "only with effect NoExecute"),
    ("FineTuneJob", JOB | {"nodeSelector": {"not a key": "a"}}, "nodeSelector: a key must be the key of a label"),
    *(
        ("FineTuneJob", JOB | {"podTemplate": wrong}, words)
        for wrong, words in (
            ({"labels": {"graft.dev/owner-uid": "a"}}, "podTemplate.labels: a key must be"),
            ({"labels": {"not a key": "a"}}, "podTemplate.labels: a key must be"),
            (
                {"topologySpreadConstraints": [SPREAD | {"labelSelector": {"matchLabels": {"not a key": "a"}}}]},
                "matchLabels: a key must be the key of a label",
            ),
            ({"annotations": {"graft.dev/base-model": "a"}}, "podTemplate.annotations: a key must have"),
            ({"env": [{"name": "AWS_PROFILE"}]}, "this name is reserved"),
            ({"volumes": [{"name": "a"}]}, "give exactly one of emptyDir"),
            ({"volumes": [VOLUME | {"emptyDir": {}}]}, "give exactly one of emptyDir"),
            (
                {"volumeMounts": [{"name": "storage", "mountPath": "/mnt/volumes/a"}]},
                "each name must be one of volumes",
            ),
            (
                {"topologySpreadConstraints": [SPREAD | {"whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}]},
                "minDomains",
            ),
        )
    ),
    ("ApiKey", {"sha256": ["0" * 64], "rotation": 1}, "rotation makes a new key"),
    ("Tenant", {"namespaces": {}}, "give names, a selector, or both"),
    ("Tenant", {"namespaces": {"selector": {}}}, "an empty selector would match every namespace"),
    (
        "Tenant",
        {"namespaces": {"names": ["a"], "selector": {"matchLabels": {}}}},
        "an empty selector would match every",
    ),
    *(
        (
            "Tenant",
            {"namespaces": {"names": ["a"]}, "members": [{"kind": kind, "name": name, "role": "view"}]},
            "must be a service account",
        )
        for kind, name in (
            ("Group", "system:masters"),
            ("Group", "system:authenticated"),
            ("Group", "system:serviceaccounts"),
            ("Group", "system:serviceaccount:a:b"),
            ("User", "system:anonymous"),
            ("User", "system:serviceaccount:a"),
        )
    ),
    ("AdapterDeployment", DEPLOYMENT | {"engineArgs": ["--trust-remote-code"]}, "--trust-remote-code is refused"),
    ("AdapterDeployment", DEPLOYMENT | {"engineArgs": ["--seed"]}, "--seed is refused"),
    ("AdapterDeployment", DEPLOYMENT | {"engineArgs": ["--enforce-eager=1"]}, "--enforce-eager is refused"),
    ("Adapter", COMPOSED | {"job": {"name": "a", "uid": "b"}}, "job is allowed only with artifact"),
    (
        "AdapterDeployment",
        DEPLOYMENT | {"routes": [{"model": "a", "adapter": "support", "sequence": ["support", "sales"]}]},
        "a route may have an adapter or a sequence, not both",
    ),
    (
        "AdapterDeployment",
        DEPLOYMENT | {"autoscaling": CALM["autoscaling"] | {"provider": "keda"}},
        "provider keda does not support minReplicas 0",
    ),
    ("AdapterDeployment", DEPLOYMENT | CALM | {"strategy": "dedicated"}, "needs strategy serverless, or strategy auto"),
]


def hinted(field: Field) -> list[Any]:
    """Return the values of the table for a field."""
    found = (values for path, values in VALUES.items() if fnmatchcase(str(field), path.replace("[", "[[]")))
    return [value for value in next(found, []) if _may_be(field.schema, value)]


def _may_be(schema: Schema, value: Any) -> bool:
    """Return whether a value has the type of a schema: fields of two kinds may have the same path."""
    types = {"object": dict, "array": list, "string": str, "integer": int}
    return "type" not in schema or isinstance(value, types[schema["type"]])


def values(field: Field) -> list[Any]:
    """Return the values to try for a field: those of the table, then those of its schema."""
    found: list[Any] = []
    for value in [*hinted(field), *valid(field.schema)]:
        if not any(value == other and type(value) is type(other) for other in found):
            found.append(value)
    return found


def example(field: Field) -> Any:
    """Return a small value of a field."""
    return (hinted(field) or [minimal(field.schema)])[0]


def with_value(kind: str, spec: Spec, field: Field, value: Any) -> Spec:
    """Return the spec of the kind with a value of the field."""
    return put(spec_of(kind), spec, field.path, value, example)


def fields_of(kind: str) -> list[Field]:
    """Return every field below spec of a kind, parents first."""
    return list(fields(spec_of(kind)))
