"""The recipe of the benchmarks. The pod gets it as job.json, and the plain scripts get it as arguments of the same
libraries."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "examples/tiny-llama/model"
DATA = REPOSITORY / "examples/quickstart/data/train.jsonl"
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]  # all-linear of a Llama


@dataclass(frozen=True)
class Recipe:
    """One recipe. The names are those of transformers' TrainingArguments, and the defaults are the quickstart's
    values."""

    model: str = str(MODEL)
    data: str = str(DATA)
    method: Literal["full", "lora"] = "lora"
    rank: int = 16
    alpha: int = 32
    max_steps: int = 120
    learning_rate: float = 0.004
    warmup_ratio: float = 0.03
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_length: int = 128
    seed: int = 42
    precision: Literal["fp32", "bf16"] = "fp32"
    gpu: bool = False
    liger: bool = False

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.max_steps)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> "Recipe":
        return cls(**json.loads(Path(path).read_text()))

    def training_arguments(self) -> dict[str, Any]:
        """Return the arguments for transformers' TrainingArguments and its subclasses."""
        return {
            "max_steps": self.max_steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.warmup_steps,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "optim": "adamw_torch_fused" if self.gpu else "adamw_torch",
            "bf16": self.precision == "bf16",
            "use_cpu": not self.gpu,
            "use_liger_kernel": self.liger,
            "seed": self.seed,
            "data_seed": self.seed,
            "logging_steps": 1,
            "logging_first_step": True,
            "report_to": [],
            "disable_tqdm": True,
        }

    def job(self, number: int, save_steps: int | None) -> dict[str, Any]:
        """Return job.json for the run with this number, as the operator writes it. World.provide() puts the files in
        place."""
        low_rank = {"rank": self.rank, "alpha": self.alpha, "targetModules": "all-linear"}
        return {
            "job": {"name": "bench", "namespace": "bench", "uid": f"run-{number}"},
            "tenant": "bench",
            "baseModel": {"name": "bench", "uri": "pvc://model"},
            "dataset": {"train": {"uri": "s3://graft/bench/train.jsonl"}},
            "method": {"lora": low_rank} if self.method == "lora" else {"full": {}},
            "training": {
                "maxSteps": self.max_steps,
                "learningRate": self.learning_rate,
                "warmupRatio": self.warmup_ratio,
                "perDeviceTrainBatchSize": self.per_device_train_batch_size,
                "gradientAccumulationSteps": self.gradient_accumulation_steps,
                "maxLength": self.max_length,
                "precision": self.precision,
                "gradientCheckpointing": False,
                "useLigerKernel": self.liger,
                "loggingSteps": 1,
                "seed": self.seed,
            }
            | ({"saveSteps": save_steps} if save_steps else {}),
            "evaluation": {"maxSamples": 0, "baselines": []},
            "output": {"adapter": "bench", "version": f"1.0.{number}"},
            "recipe": "sha256:bench",
        }
