"""report.json as models: what the trainer writes, the page shows and `graft compare` reads.

Schema version 2; documents of version 1, which lack most of the optional parts, are read, too. Bytes, seconds, nats per token and
shares from 0 to 1 throughout.
"""

from typing import Any

from pydantic import Field, field_validator

from graft.api.evaluation import Gate
from graft.contracts.job import JobIdentity
from graft.contracts.message import BaseModelRef, Message
from graft.contracts.progress import DatasetStatistics

SCHEMA_VERSION = 2


class ReportJob(JobIdentity):
    """The run."""

    attempt: str = ""
    resumed_from: int | None = None  # step of the checkpoint that the last attempt went on from
    checkpoints: int = 0  # complete ones that the run had; they go once the version is published
    halvings: int = 0  # attempts that ran out of memory


class DatasetUse(Message):
    """What was learned from and measured with."""

    digests: dict[str, str] = Field(default_factory=dict)
    train: int = 0
    truncated: int = 0
    dropped: int = 0
    held_out: int = 0
    statistics: DatasetStatistics | None = None


class SuiteUse(Message):
    """A suite that was measured; its scores are the metrics <name>/…"""

    name: str
    role: str = "task"  # or forgetting
    size: int = 0  # tasks in it
    main: str = ""  # the metric that stands for it


class EvaluationUse(Message):
    """What was asked of the version; in words the gates that it missed, and what could not be measured and why."""

    suites: list[SuiteUse] = Field(default_factory=list)
    gates: list[Gate] = Field(default_factory=list)
    rejected: list[str] = Field(default_factory=list)
    missing: list[str] = Field(default_factory=list)


class Environment(Message):
    """What it ran on."""

    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    threads: int | None = None
    world_size: int = 1
    image: str = ""


class Resources(Message):
    """What the run took, and what the version takes to serve."""

    peak_memory_bytes: int | None = None  # of one GPU, or of the process without one
    tokens_per_second: float | None = None
    published_bytes: int | None = None  # the version's weights
    base_bytes: int | None = None  # the base model's weights as they are stored
    quantized_bytes: int | None = None  # the base model's weights as qlora holds them


class MatrixUpdate(Message):
    """What training changed in one matrix."""

    name: str
    kind: str  # the last part of the name, such as q_proj
    layer: int | None = None  # number of the block; None outside of the blocks
    shape: list[int]  # [outputs, inputs]; of a soft prompt [vectors, dimensions]
    singular_values: list[float]  # the largest, in falling order
    norm: float  # Frobenius norm of the update
    relative_norm: float | None = None  # over the base matrix's norm
    effective_rank: float  # Roy & Vetterli 2007
    exact: bool = True  # whether the effective rank is that of all singular values, and not of the largest alone


class UpdateAnalysis(Message):
    """The matrices that were analysed, in the model's order, of `total` that were trained."""

    matrices: list[MatrixUpdate] = Field(default_factory=list)
    total: int = 0
    rank: int | None = None  # of the low-rank update, the most that an effective rank can be


class LayerSimilarity(Message):
    """Linear CKA of base and tuned hidden states behind one layer; layer 0 is the embeddings."""

    part: str  # decoder, or encoder
    layer: int
    cka: float


class RepresentationAnalysis(Message):
    """How far the hidden states moved."""

    layers: list[LayerSimilarity] = Field(default_factory=list)
    examples: int = 0
    tokens: int = 0  # of the decoder; those that were compared


class Latency(Message):
    """Medians over the runs, one request at a time."""

    prefill_seconds: float  # until the first token
    seconds_per_token: float  # of each further token


class LatencyAnalysis(Message):
    """Base model, adapter beside it (unmerged) and adapter added to its weights (merged), measured in turn."""

    variants: dict[str, Latency] = Field(default_factory=dict)  # base, unmerged, merged; full: base, tuned
    runs: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


class Analysis(Message):
    """What the update is and does; a part is absent where `notes` say why."""

    update: UpdateAnalysis | None = None
    representation: RepresentationAnalysis | None = None
    latency: LatencyAnalysis | None = None
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0


class Report(Message):
    """report.json."""

    schema_version: int = SCHEMA_VERSION
    job: ReportJob
    adapter: str
    version: str
    base_model: BaseModelRef
    task: str = "causal"
    method: str
    recipe: str = ""
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    target_modules: list[str] = Field(default_factory=list)
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    dataset: DatasetUse = Field(default_factory=DatasetUse)
    evaluation: EvaluationUse = Field(default_factory=EvaluationUse)
    metrics: dict[str, float] = Field(default_factory=dict)
    samples: list[dict[str, str]] = Field(default_factory=list)
    loss_curve: list[dict[str, float]] = Field(default_factory=list)
    tokens: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    resources: Resources = Field(default_factory=Resources)
    analysis: Analysis | None = None
    environment: Environment = Field(default_factory=Environment)
    created_at: str = ""

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if not 1 <= value <= SCHEMA_VERSION:
            raise ValueError(f"report schema version {value} is not known here; upgrade Graft")
        return value

    @property
    def trainable_share(self) -> float | None:
        """Trained over all parameters of the tuned model."""
        if not self.trainable_parameters or not self.total_parameters:
            return None
        return self.trainable_parameters / self.total_parameters
