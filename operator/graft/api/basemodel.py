"""BaseModel: a model that jobs tune and deployments serve, named once for the whole cluster."""

from typing import Literal

from pydantic import Field

from graft.api.meta import MODEL_URI, SEMVER, Conditions, Resource, Schema, Status, rules


class ModelFacts(Schema):
    """What is known about the model; found from its config.json where it is not given."""

    parameters: int | None = Field(default=None, ge=1, description="Number of parameters.")
    task: Literal["causal", "seq2seq"] | None = Field(
        default=None, description="The kind of language model that its config describes; spec.task has to agree."
    )
    layers: int | None = Field(default=None, ge=1, description="Number of transformer blocks, of a seq2seq decoder's.")
    encoder_layers: int | None = Field(default=None, ge=1, description="Blocks of the encoder; seq2seq models only.")
    hidden_size: int | None = Field(default=None, ge=1, description="Width of the residual stream.")
    intermediate_size: int | None = Field(default=None, ge=1, description="Width inside of the MLP, of one expert's.")
    gated_mlp: bool | None = Field(default=None, description="Whether the MLP has a gate: three matrices, not two.")
    heads: int | None = Field(default=None, ge=1, description="Attention heads.")
    kv_heads: int | None = Field(default=None, ge=1, description="Heads of keys and values; fewer share them.")
    head_dim: int | None = Field(default=None, ge=1, description="Width of one head.")
    experts: int | None = Field(default=None, ge=1, description="Experts of each block; mixtures of experts only.")
    experts_per_token: int | None = Field(default=None, ge=1, description="Experts that each token goes through.")
    vocab_size: int | None = Field(default=None, ge=1, description="Number of tokens in the vocabulary.")
    tied_embeddings: bool | None = Field(
        default=None, description="Whether the head shares its weights with the token embeddings."
    )
    architecture: str | None = Field(default=None, description="The transformers class, for example LlamaForCausalLM.")
    dtype: str | None = Field(default=None, description="The weights' type, for example bfloat16.")
    context_length: int | None = Field(default=None, ge=1, description="Longest sequence, in tokens.")
    license: str | None = Field(default=None, description="The licence under which the weights may be used.")


class BaseModelSpec(Schema):
    """What the model is and who may use it."""

    source: str = Field(
        pattern=MODEL_URI,
        max_length=1024,
        description="Where the model's HF folder is: hf://org/name@revision, s3://bucket/path or pvc://claim/path. "
        "A pvc:// claim is looked for in the namespace of the job or deployment. Safetensors weights only.",
    )
    task: Literal["causal", "seq2seq"] = Field(
        default="causal",
        description="The kind of language model: causal (Llama, Qwen) goes on with a text, seq2seq (T5) answers one.",
    )
    version: str | None = Field(
        default=None,
        pattern=SEMVER,
        max_length=32,
        description="Semantic version of the files at the source, yours to give; Adapters name ranges of it in baseVersions.",
    )
    facts: ModelFacts | None = Field(default=None, description="Facts to take instead of those in config.json.")
    allowed_namespaces: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Namespaces whose jobs and deployments may use the model; all when absent.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class BaseModelStatus(Status):
    """What the operator found out."""

    observed_generation: int | None = Field(default=None, description="The spec's generation that was last handled.")
    stage: str | None = Field(default=None, description="A summary of the conditions: Ready or Unavailable.")
    revision: str | None = Field(
        default=None, description="The commit that hf://…@revision stands for; jobs and deployments use exactly it."
    )
    digest: str | None = Field(
        default=None,
        description="sha256:… over the names, sizes and ETags of the files in object storage; a changed file changes it.",
    )
    size_bytes: int | None = Field(default=None, description="Size of the model's files.")
    facts: ModelFacts | None = Field(default=None, description="The facts in force.")
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
    ],
    "rules": rules(
        ("self.metadata.name.size() <= 63", "metadata.name must be at most 63 characters: it becomes a label value"),
    ),
}
