"""The two ways to a version besides training: composing it from other versions, and importing what was tuned elsewhere."""

from typing import Annotated, Literal

from pydantic import Field

from graft.api.adapterdeployment import ADAPTER_REF
from graft.api.meta import Placement, Resources, Schema, rules

# peft's words for them (add_weighted_adapter's combination_type) are in the trainer.
CompositionMethod = Literal[
    "linear", "cat", "svd", "ties", "tiesSvd", "dareLinear", "dareLinearSvd", "dareTies", "dareTiesSvd"
]
EQUAL_RANKS: frozenset[CompositionMethod] = frozenset({"linear", "ties", "dareLinear", "dareTies"})
IMPORT_URI = (
    r"^(hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\s]+/)$"
)


class ComposeParent(Schema):
    """One of the versions that are combined."""

    adapter: str = Field(
        pattern=ADAPTER_REF,
        max_length=73,
        description="adapter@1.4.2, @^1 or @latest, in this namespace. What it stands for is decided once; see status.parents.",
    )
    weight: Annotated[float, Field(ge=-100, le=100)] = Field(
        default=1.0, description="What the parent's update is multiplied with; negative takes it away."
    )


class Compose(Placement):
    """A weighted merge of LoRA updates, with peft's add_weighted_adapter."""

    parents: list[ComposeParent] = Field(
        min_length=1,
        max_length=8,
        description="The versions to combine, all of one base model; two or more, or one with into: base.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    method: CompositionMethod = Field(
        default="cat",
        description="cat: the exact weighted sum, its rank is the sum of the ranks. svd: the best approximation of that sum of "
        "rank svdRank. linear: A and B are added one by one, a rough approximation for equal ranks. ties (Yadav et al. 2023): "
        "small values are cut, signs elected. dareLinear, dareTies (Yu et al. 2024): values are dropped at random, the others "
        "scaled up. These three work on A and B and need equal ranks; their …Svd forms work on the whole update and take any.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Share of the values that are kept; needed by the ties and dare methods."
    )
    svd_rank: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="Rank of the result of svd and the …Svd methods; the parents' highest when absent.",
    )
    majority_sign: Literal["total", "frequency"] | None = Field(
        default=None,
        description="How the ties methods elect a sign: by the sum of the values (total, the default) or by their number.",
    )
    seed: int | None = Field(
        default=None, ge=0, le=2147483647, description="Of what the dare methods drop; 0 when absent."
    )
    into: Literal["adapter", "base"] = Field(
        default="adapter",
        description="adapter: the result is an adapter (method: lora). base: it is added to the base model's weights, and the "
        "version is a whole model (method: full).",
    )
    resources: Resources | None = Field(
        default=None,
        description="What the pod asks of its node; derived from the sizes of parents and base model when absent.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("self.parents.size() > 1 || self.into == 'base'", "give two parents or more, or one with into: base"),
            (
                "has(self.density) == (self.method.startsWith('ties') || self.method.startsWith('dare'))",
                "density goes with the ties and dare methods, which need it, and with no other",
            ),
            (
                "!has(self.svdRank) || self.method.lowerAscii().endsWith('svd')",
                "svdRank goes with svd and the …Svd methods",
            ),
            (
                "!has(self.majoritySign) || self.method.startsWith('ties') || self.method.startsWith('dareTies')",
                "majoritySign goes with the ties methods",
            ),
            ("!has(self.seed) || self.method.startsWith('dare')", "seed goes with the dare methods"),
        )
    }


class Import(Placement):
    """What was tuned elsewhere, copied and validated."""

    uri: str = Field(
        pattern=IMPORT_URI,
        max_length=1024,
        description="hf://org/name@revision, or s3://bucket/prefix/ that the namespace's key may read. "
        "The folder of an adapter in peft's layout, or of a whole model with method: full. Safetensors only.",
    )
    resources: Resources | None = Field(
        default=None, description="What the pod asks of its node; derived from the size of the base model when absent."
    )
