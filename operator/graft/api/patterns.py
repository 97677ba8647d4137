"""The patterns of the texts in a spec, and for each pattern a sentence.

The CustomResourceDefinitions have no bare patterns. A value of the wrong form is answered with the sentence of its pattern, by
the API server (graft.crdgen makes CEL rules) and by the operator (graft.contracts.message).
"""

# Patterns of names. A name becomes part of a path, a label or a file's name, so no other characters are allowed.
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"  # at most 63 characters
DNS_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"  # at most 253 characters
DNS_NAME_OR_EMPTY = rf"^$|{DNS_NAME}"
# At most 253 characters, so that the part before the / is short enough, too.
LABEL_KEY = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
LABEL_KEY_OR_EMPTY = rf"^$|{LABEL_KEY}"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"  # at most 63 characters
UID = r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
SEMVER = r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$"
# The part after the @ in an entry of AdapterDeployment.spec.adapters, except `latest`.
VERSION_RANGE = r"^\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2}$"
SHA256 = r"^sha256:[0-9a-f]{64}$"
SHA256_LENGTH = 71  # characters
HEX_SHA256 = r"^[0-9a-f]{64}$"
# A time of RFC 3339 with its zone: without one, it would be another time for each reader. Of the days that no calendar has,
# only 29 February of some years matches.
_DAY = r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|[12][0-9]))"
_HOUR = r"([01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"^[1-9][0-9]{{3}}-{_DAY}T{_HOUR}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR})$"
KEY_NAME = r"^[^\x00-\x1f\x7f]+$"  # a key in a file of the user: any text without control characters

# Of a user or a group, as the cluster's authentication names them. Spaces at the edges would make two names look alike.
SUBJECT = r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$"

# Patterns of URIs. No part of a path may be .., which would lead out of the folder.
_PART = r"([^/\s.][^/\s]*|\.([^/\s.][^/\s]*)?|\.\.[^/\s]+)"
_PATH = rf"{_PART}(/+{_PART})*"
_HF_PART = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_HF = rf"{_HF_PART}/{_HF_PART}(@{_HF_PART}(/{_HF_PART})*)?"
_CLAIM = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
MODEL_URI = rf"^(hf://{_HF}|s3://{_BUCKET}/[^\s]+|pvc://{_CLAIM}(/+({_PATH}/*)?)?)$"
DATASET_URI = rf"^(hf://datasets/{_HF}/{_PATH}|s3://{_BUCKET}/[^\s]+|pvc://{_CLAIM}/+{_PATH}|configMap://{_CLAIM}/[A-Za-z0-9._-]+)$"
IMPORT_URI = rf"^(hf://{_HF}|s3://{_BUCKET}/[^\s]+/)$"
ARTIFACT_URI = r"^s3://[^/\s]+/[^\s]+/$"
# A version to publish, and an entry of AdapterDeployment.spec.adapters.
NEW_VERSION = r"^auto$|" + SEMVER
ADAPTER_REF = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?@(latest|\^?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){0,2})$"
MODEL_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"  # the second part of a route's name
PROMETHEUS_URL = r"^https?://[^\s]+$"
PARSER_NAME = r"^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?$"
# A template always has a block. A text without one could be read as the path of a file.
CHAT_TEMPLATE = r"\{[{%]"
ENGINE_ARG = r"^--[a-z0-9]+(-[a-z0-9]+)*(=[^\x00-\x1f\x7f]*)?$"
CLASS_NAME = r"^[A-Za-z_][A-Za-z0-9_.]*$"
MODULE_NAME = r"^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$"
TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
METRIC_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.,:+/-]*$"
DURATION = r"^[1-9][0-9]{0,5}[smhd]$"
ENV_NAME = r"^[A-Z][A-Z0-9_]*$"
MOUNTS = r"^/mnt/volumes/[a-z0-9]([-a-z0-9_.]*[a-z0-9])?$"
# No amount is negative. Kubernetes accepts only whole exponents, although the pattern of its own schema allows others.
QUANTITY = r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"
QUANTITY_LENGTH = 32  # characters

_NAME = "must be a name of lower-case letters, digits, - and ., which starts and ends with a letter or digit"
_LABEL_KEY = (
    "must be the key of a label, for example topology.kubernetes.io/zone: a domain and a / may stand before a name of at most "
    "63 letters, digits, -, _ and ."
)
# What a value must be, for users who do not read regular expressions.
SENTENCES = {
    DNS_LABEL: "must be a name of lower-case letters, digits and -, which starts and ends with a letter or digit",
    DNS_NAME: _NAME,
    DNS_NAME_OR_EMPTY: f"{_NAME}. Leave the field out for none",
    LABEL_KEY: _LABEL_KEY,
    LABEL_KEY_OR_EMPTY: f"{_LABEL_KEY}. Leave the field out for every key",
    LABEL_VALUE: "must be the value of a label: letters, digits, -, _ and ., which starts and ends with a letter or digit",
    SUBJECT: "must be the name of a user or a group, without line breaks, and without spaces at its beginning and end",
    UID: "must be the UID of the job: `kubectl get finetunejob <job> -o jsonpath={.metadata.uid}` prints it",
    SEMVER: "must be a version of three numbers, for example 1.4.2",
    NEW_VERSION: "must be auto or a version of three numbers, for example 1.4.2",
    VERSION_RANGE: "must be a version or a range of versions, for example 1.4.2, 1.4, ^1.4 or 2",
    ADAPTER_REF: "must be <adapter>@<version>, for example support@latest, support@1.4.2 or support@^1",
    MODEL_URI: "must be hf://<org>/<name>[@<revision>], s3://<bucket>/<folder> or pvc://<claim>[/<folder>], without spaces and ..",
    DATASET_URI: "must be hf://datasets/<org>/<name>[@<revision>]/<file>, s3://<bucket>/<file>, pvc://<claim>/<file> or "
    "configMap://<name>/<key>, without spaces and ..",
    IMPORT_URI: "must be hf://<org>/<name>[@<revision>] or s3://<bucket>/<folder>/ with a / at the end, without spaces",
    ARTIFACT_URI: "must be s3://<bucket>/<folder>/ with a / at the end, without spaces",
    SHA256: "must be sha256: and 64 hexadecimal digits",
    HEX_SHA256: 'must be 64 hexadecimal digits in lower case: `printf %s "$KEY" | sha256sum` prints them',
    TIME: "must be a time with its zone, for example 2027-01-31T12:00:00Z",
    KEY_NAME: "must be the name of a field of the data, without line breaks and other control characters",
    MODEL_NAME: "must be the name of a model: letters, digits, ., _ and -, which starts and ends with a letter or digit",
    PROMETHEUS_URL: "must be an http:// or https:// URL without spaces. The field is ignored: better remove it",
    PARSER_NAME: "must be the name of one of vLLM's tool parsers, for example hermes",
    CHAT_TEMPLATE: "must be the text of a Jinja template, with {{ or {%, and not the name of a file",
    ENGINE_ARG: "must be one flag of vLLM that starts with --, for example --enforce-eager or --seed=7",
    CLASS_NAME: "must be the name of a class of transformers, for example LlamaForCausalLM",
    MODULE_NAME: "must be the name of a module of the model, for example q_proj",
    TASK_NAME: "must be the name of a task of lm-eval, for example arc_easy",
    METRIC_NAME: "must be the name of a metric, for example exactMatch, evalLoss or <suite>/rougeL",
    DURATION: "must be a whole number and a unit, for example 45s, 90m, 12h or 30d",
    ENV_NAME: "must be a name of capital letters, digits and _, which starts with a letter, for example NCCL_DEBUG",
    MOUNTS: "must be /mnt/volumes/ and one name of lower-case letters, digits, -, _ and ., for example /mnt/volumes/data",
    QUANTITY: "must be an amount that is not negative, for example 2, 500m, 1.5Gi or 20G",
}
