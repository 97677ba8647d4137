"""The two ways to make a version without training: compose it from other versions, or import files that were tuned
elsewhere."""

from typing import Annotated, Literal

from pydantic import Field

from graft.api.meta import Placement, Resources, Schema, rules
from graft.api.patterns import ADAPTER_REF, IMPORT_URI

# The trainer maps these names to those of peft (combination_type of add_weighted_adapter).
CompositionMethod = Literal[
    "linear", "cat", "svd", "ties", "tiesSvd", "dareLinear", "dareLinearSvd", "dareTies", "dareTiesSvd"
]
EQUAL_RANKS: frozenset[CompositionMethod] = frozenset({"linear", "ties", "dareLinear", "dareTies"})


class ComposeParent(Schema):
    """One of the versions that are combined."""

    adapter: str = Field(
        pattern=ADAPTER_REF,
        max_length=73,
        description="Reference to an adapter in the same namespace: name@1.4.2, name@^1 or name@latest. The operator resolves it "
        "once and shows the version in status.parents.",
    )
    weight: Annotated[float, Field(ge=-100, le=100)] = Field(
        default=1.0,
        description="Factor that the parent's update is multiplied by. A negative weight subtracts the update.",
    )


class Compose(Placement):
    """A weighted merge of LoRA updates, computed by peft's add_weighted_adapter."""

    parents: list[ComposeParent] = Field(
        min_length=1,
        max_length=8,
        description="The versions to combine, all tuned on one base model. Give at least two, or one if into is base.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    method: CompositionMethod = Field(
        default="cat",
        description="How the updates are combined. cat: the exact weighted sum; its rank is the sum of the ranks. svd: the best "
        "approximation of that sum with rank svdRank. linear: A and B are summed separately, which is a rough "
        "approximation. ties (Yadav et al. 2023): small values are dropped, and only values with the majority sign "
        "are added. dareLinear, dareTies (Yu et al. 2024): random values are dropped, and the others are scaled up. "
        "linear, ties, dareLinear and dareTies work on A and B and need parents of equal rank. tiesSvd, "
        "dareLinearSvd and dareTiesSvd work on the whole update and accept any ranks.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Share of the values that are kept. Required for the ties and dare methods, and not allowed for others.",
    )
    svd_rank: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="Rank of the result for svd and the methods that end in Svd. The highest rank of the parents when absent.",
    )
    majority_sign: Literal["total", "frequency"] | None = Field(
        default=None,
        description="How the ties and dareTies methods choose the majority sign. total: by the sum of the values. frequency: by "
        "their number. total when absent.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2147483647,
        description="Seed of the random choice of values that the dare methods drop. 0 when absent.",
    )
    into: Literal["adapter", "base"] = Field(
        default="adapter",
        description="adapter: the result is an adapter (method: lora). base: the result is added to the weights of the base "
        "model, and the version is a whole model (method: full).",
    )
    resources: Resources | None = Field(
        default=None,
        description="Resources of the pod. When absent, Graft derives them from the sizes of the parents and the base model.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("self.parents.size() > 1 || self.into == 'base'", "give two parents or more, or one with into: base"),
            (
                "has(self.density) == (self.method.startsWith('ties') || self.method.startsWith('dare'))",
                "density is required for the ties and dare methods, and not allowed for others",
            ),
            (
                "!has(self.svdRank) || self.method.lowerAscii().endsWith('svd')",
                "svdRank is allowed only for svd and the methods that end in Svd",
            ),
            (
                "!has(self.majoritySign) || self.method.startsWith('ties') || self.method.startsWith('dareTies')",
                "majoritySign is allowed only for the ties and dareTies methods",
            ),
            ("!has(self.seed) || self.method.startsWith('dare')", "seed is allowed only for the dare methods"),
        )
    }


class Import(Placement):
    """Files that were tuned elsewhere. They are copied and validated."""

    uri: str = Field(
        pattern=IMPORT_URI,
        max_length=1024,
        description="Folder to import: hf://org/name@revision, or s3://bucket/prefix/ that the namespace's key may read. It "
        "holds an adapter in peft's layout or, with method: full, a whole model. Only safetensors weights are read.",
    )
    resources: Resources | None = Field(
        default=None,
        description="Resources of the pod. When absent, Graft derives them from the size of the base model.",
    )
