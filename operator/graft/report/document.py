"""The models of report.json. The trainer writes it, the page shows it, and `graft compare` reads it.

The schema version is 2. Documents of version 1 can be read too; they lack most of the optional parts. The units are
bytes, seconds, nats per token, and shares from 0 to 1.
"""

from typing import Any, ClassVar

from pydantic import Field, field_validator

from graft.api.evaluation import Gate
from graft.bounded import Limits
from graft.contracts.job import JobIdentity
from graft.contracts.message import BaseModelRef, Message
from graft.contracts.progress import DatasetStatistics

SCHEMA_VERSION = 2


class ReportJob(JobIdentity):
    """The run."""

    attempt: str = ""
    resumed_from: int | None = None  # step of the checkpoint that the last attempt resumed from
    checkpoints: int = 0  # complete checkpoints of the run; they are deleted after the version is published
    halvings: int = 0  # attempts that ran out of memory


class DatasetUse(Message):
    """The data that the run trained on and was evaluated on."""

    digests: dict[str, str] = Field(default_factory=dict)
    train: int = 0
    truncated: int = 0
    dropped: int = 0
    held_out: int = 0
    statistics: DatasetStatistics | None = None


class SuiteUse(Message):
    """A suite that was measured. Its scores are the metrics <name>/…"""

    name: str
    role: str = "task"  # or forgetting
    size: int = 0  # tasks in the suite
    main: str = ""  # the main metric of the suite


class EvaluationUse(Message):
    """The requirements on the version.

    `rejected`: the missed gates, as texts. `missing`: what could not be measured, and why.
    """

    suites: list[SuiteUse] = Field(default_factory=list)
    gates: list[Gate] = Field(default_factory=list)
    rejected: list[str] = Field(default_factory=list)
    missing: list[str] = Field(default_factory=list)


class Precision(Message):
    """How exact a score is: the number of tasks that it is a mean over, and its standard error if the spread is known."""

    n: int = 0
    standard_error: float | None = None  # in the metric's unit


class Environment(Message):
    """The software and hardware that the run used."""

    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    device: str = ""  # name of the GPU, or of the CPU if there is no GPU
    device_memory_bytes: int | None = None  # of one GPU
    threads: int | None = None
    world_size: int = 1
    image: str = ""


class Resources(Message):
    """The resources that the run used, and the sizes that matter for serving."""

    peak_memory_bytes: int | None = None  # of one GPU; without a GPU, of the process
    tokens_per_second: float | None = None
    published_bytes: int | None = None  # the version's weights
    base_bytes: int | None = None  # the base model's weights as stored
    quantized_bytes: int | None = None  # the base model's weights in 4 bits, as qlora holds them


class MatrixUpdate(Message):
    """The change of one matrix by training."""

    name: str
    kind: str  # the last part of the name, such as q_proj
    layer: int | None = None  # number of the block; None for matrices outside the blocks
    shape: list[int]  # [outputs, inputs]; for a soft prompt [vectors, dimensions]
    singular_values: list[float]  # the largest values, in descending order
    norm: float  # Frobenius norm of the update
    relative_norm: float | None = None  # divided by the norm of the base matrix
    effective_rank: float  # Roy & Vetterli 2007
    exact: bool = True  # True: computed from all singular values; False: from the largest only


class UpdateAnalysis(Message):
    """The analysed matrices, in the model's order. `total` is the number of trained matrices."""

    matrices: list[MatrixUpdate] = Field(default_factory=list)
    total: int = 0
    rank: int | None = None  # of the low-rank update; an effective rank cannot be larger


class LayerSimilarity(Message):
    """Linear CKA of base and tuned hidden states after one layer. Layer 0 is the embeddings."""

    part: str  # decoder, or encoder
    layer: int
    cka: float


class RepresentationAnalysis(Message):
    """How much training changed the hidden states."""

    layers: list[LayerSimilarity] = Field(default_factory=list)
    examples: int = 0
    tokens: int = 0  # tokens of the decoder that were compared


class Latency(Message):
    """Medians over the runs, one request at a time."""

    prefill_seconds: float  # seconds until the first token
    seconds_per_token: float  # seconds for each further token


class LatencyAnalysis(Message):
    """Latency of the base model, of the version as published (tuned), and of the version with a merged adapter
    (merged).

    The runs of the variants alternated.
    """

    variants: dict[str, Latency] = Field(default_factory=dict)  # base, tuned; for lora also merged
    runs: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


class Analysis(Message):
    """The analysis of the update. A part that could not be computed is None, and `notes` say why."""

    update: UpdateAnalysis | None = None
    representation: RepresentationAnalysis | None = None
    latency: LatencyAnalysis | None = None
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0


class Report(Message):
    """The content of report.json."""

    limits: ClassVar[Limits] = Limits(size=8 * 1024 * 1024, depth=16, values=500_000)  # curves have a value per step

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
    precision: dict[str, Precision] = Field(default_factory=dict)  # by the names of `metrics`
    samples: list[dict[str, str]] = Field(default_factory=list)
    loss_curve: list[dict[str, float]] = Field(default_factory=list)
    tokens: int = 0  # read in all steps
    learned_tokens: int | None = None  # the part of them that the loss covers
    seconds: dict[str, float] = Field(default_factory=dict)
    resources: Resources = Field(default_factory=Resources)
    analysis: Analysis | None = None
    environment: Environment = Field(default_factory=Environment)
    weights: dict[str, str] = Field(default_factory=dict)  # name of each file with weights -> its SHA-256 in hex
    # sha256:… of manifest.json. The manifest has the digest of report.json, so the file itself cannot contain it. The command
    # line adds it to what it shows.
    digest: str | None = None
    created_at: str = ""

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if not 1 <= value <= SCHEMA_VERSION:
            raise ValueError(f"this version of Graft does not know the report schema version {value}; upgrade Graft")
        return value

    @property
    def trainable_share(self) -> float | None:
        """The share of the tuned model's parameters that were trained."""
        if not self.trainable_parameters or not self.total_parameters:
            return None
        return self.trainable_parameters / self.total_parameters
