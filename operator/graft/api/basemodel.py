"""BaseModel: a model that jobs tune and deployments serve. It is a cluster-wide resource."""

from typing import Literal

from pydantic import Field

from graft.api.meta import Conditions, Resource, Schema, Status, rules
from graft.api.patterns import CLASS_NAME, DNS_LABEL, MODEL_URI, SEMVER


class ModelFacts(Schema):
    """Properties of the model. Graft reads them from config.json unless spec.facts gives them."""

    parameters: int | None = Field(default=None, ge=1, description="Number of parameters.")
    task: Literal["causal", "seq2seq"] | None = Field(
        default=None, description="Kind of language model that config.json describes. It must agree with spec.task."
    )
    layers: int | None = Field(
        default=None, ge=1, description="Number of transformer blocks. For seq2seq models: blocks of the decoder."
    )
    encoder_layers: int | None = Field(
        default=None, ge=1, description="Number of transformer blocks of the encoder. seq2seq models only."
    )
    hidden_size: int | None = Field(default=None, ge=1, description="Width of the hidden states (the residual stream).")
    intermediate_size: int | None = Field(
        default=None, ge=1, description="Inner width of the MLP. For mixtures of experts: of one expert."
    )
    gated_mlp: bool | None = Field(
        default=None, description="Whether the MLP has a gate. It then has three matrices instead of two."
    )
    heads: int | None = Field(default=None, ge=1, description="Number of attention heads.")
    kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="Number of key and value heads. If it is below heads, several attention heads share each.",
    )
    head_dim: int | None = Field(default=None, ge=1, description="Width of one attention head.")
    experts: int | None = Field(
        default=None, ge=1, description="Number of experts in each block. Mixtures of experts only."
    )
    experts_per_token: int | None = Field(
        default=None, ge=1, description="Number of experts that process each token. Mixtures of experts only."
    )
    vocab_size: int | None = Field(default=None, ge=1, description="Number of tokens in the vocabulary.")
    tied_embeddings: bool | None = Field(
        default=None, description="Whether the output head shares its weights with the token embeddings."
    )
    architecture: str | None = Field(
        default=None,
        pattern=CLASS_NAME,
        max_length=128,
        description="Name of the transformers class, for example LlamaForCausalLM.",
    )
    dtype: str | None = Field(
        default=None, max_length=128, description="Data type of the weights, for example bfloat16."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Longest sequence that the model supports, in tokens."
    )
    license: str | None = Field(default=None, max_length=256, description="Licence of the weights.")


class BaseModelSpec(Schema):
    """Where the model is, what it is, and which namespaces may use it."""

    source: str = Field(
        pattern=MODEL_URI,
        max_length=1024,
        description="Folder of the model in Hugging Face's layout: hf://org/name@revision, s3://bucket/path or pvc://claim/path. "
        "A pvc:// claim must exist in the namespace of each job and deployment. Only safetensors weights are read.",
    )
    task: Literal["causal", "seq2seq"] = Field(
        default="causal",
        description="Kind of language model. causal (Llama, Qwen): continues a text. seq2seq (T5): reads a text with an encoder "
        "and writes the answer with a decoder.",
    )
    version: str | None = Field(
        default=None,
        pattern=SEMVER,
        max_length=32,
        description="Semantic version that you give to the files at the source. baseVersions of an Adapter refers to it.",
    )
    facts: ModelFacts | None = Field(
        default=None,
        description="Facts that replace those from config.json. For pvc:// sources they are the only facts.",
    )
    allowed_namespaces: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=5000,
        description="Names of the namespaces whose jobs and deployments may use the model. All namespaces when absent.",
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": DNS_LABEL, "maxLength": 63},
        },
    )


class BaseModelStatus(Status):
    """What the operator found at the source."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the operator last handled."
    )
    stage: str | None = Field(default=None, description="Summary of the conditions: Ready or Unavailable.")
    revision: str | None = Field(
        default=None,
        description="Commit that hf://…@revision referred to when it was first resolved. Jobs and deployments use exactly this "
        "commit until spec.source changes.",
    )
    source: str | None = Field(
        default=None, description="The spec.source that was resolved. A changed spec.source is resolved again."
    )
    digest: str | None = Field(
        default=None,
        description="sha256:… of the names, sizes and ETags of the files in object storage. It changes when a file changes.",
    )
    size_bytes: int | None = Field(default=None, description="Size of the model's files in bytes.")
    facts: ModelFacts | None = Field(default=None, description="The facts that Graft uses.")
    conditions: Conditions


class BaseModel(Resource):
    """A model that jobs tune and deployments serve."""

    spec: BaseModelSpec
    status: BaseModelStatus = Field(default_factory=lambda: BaseModelStatus(conditions=[]))


CRD = {
    "kind": "BaseModel",
    "plural": "basemodels",
    "shortNames": ["bm"],
    "scope": "Cluster",
    "columns": [
        ("Stage", "string", ".status.stage", 0),
        ("Parameters", "integer", ".status.facts.parameters", 0),
        ("Context", "integer", ".status.facts.contextLength", 0),
        ("Version", "string", ".spec.version", 0),
        ("Source", "string", ".spec.source", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Digest", "string", ".status.digest", 1),
        ("Message", "string", ".status.conditions[?(@.type=='Ready')].message", 1),
    ],
    "rules": rules(
        (
            "self.metadata.name.size() <= 63",
            "metadata.name must be at most 63 characters, because it becomes a label value",
        ),
    ),
}
