"""What a FineTuneJob measures, which baselines it compares with, and which scores the result must reach."""

from typing import Literal

from pydantic import Field

from graft.api.meta import Schema, rules
from graft.api.patterns import DATASET_URI, DNS_LABEL, METRIC_NAME, TASK_NAME

Metric = Literal[
    "exactMatch", "f1", "rouge1", "rouge2", "rougeL", "loss", "perplexity", "accuracy", "toolCallAccuracy"
]  # fmt: skip
Baseline = Literal["zeroShot", "fewShot"]


class LmEval(Schema):
    """A task of EleutherAI's lm-evaluation-harness."""

    task: str = Field(
        pattern=TASK_NAME,
        max_length=128,
        description="Name of the task, for example arc_easy. Its data is downloaded from the Hugging Face endpoint.",
    )
    definition: str | None = Field(
        default=None,
        pattern=DATASET_URI,
        max_length=1024,
        description="URI of the YAML definition, for a task that is not part of the harness. It also needs data. Tags that run "
        "code, such as !function, are refused.",
    )
    data: str | None = Field(
        default=None,
        pattern=DATASET_URI,
        max_length=1024,
        description="URI of the JSONL file with the task's test split, for a task with definition.",
    )
    few_shot: int = Field(default=0, ge=0, le=64, description="Number of examples before each question.")

    model_config = Schema.model_config | {
        "json_schema_extra": rules(("has(self.definition) == has(self.data)", "give definition and data, or neither"))
    }


class Suite(Schema):
    """Tasks that are measured after training: a JSONL file, or a task of lm-eval.

    A line is {prompt or messages, answer or answers} or, for multiple choice, {prompt or messages, choices, label}.
    Lines in the dataset's own format are accepted too.
    """

    name: str = Field(
        pattern=DNS_LABEL, max_length=40, description="Name of the suite. Its metrics are named <name>/<metric>."
    )
    uri: str | None = Field(
        default=None,
        pattern=DATASET_URI,
        max_length=1024,
        description="JSONL file, with the same kinds of URI as dataset.train.uri.",
    )
    lm_eval: LmEval | None = Field(default=None, description="Task of lm-evaluation-harness, instead of a file.")
    role: Literal["task", "forgetting"] = Field(
        default="task",
        description="task: what the adapter is trained for. forgetting: what the model should not get worse at. For such a "
        "suite, the metric forgetting/<name> shows how much worse than the base model the version is.",
    )
    metrics: list[Metric] | None = Field(
        default=None,
        min_length=1,
        description="Metrics to compute. When absent: accuracy for multiple choice; exactMatch, f1, rougeL and loss for answers; "
        "loss and perplexity for texts; toolCallAccuracy and loss for calls of tools.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Use only this many lines from the start of the file, or questions of the lm-eval task. All when absent.",
    )
    max_new_tokens: int = Field(default=128, ge=1, le=8192, description="Longest generated answer, in tokens.")

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.uri) != has(self.lmEval)", "give uri (a JSONL file) or lmEval (a task), and not both"),
            (
                "!(has(self.lmEval) && has(self.metrics))",
                "metrics is not allowed with lmEval: the task defines its own metrics",
            ),
        )
    }


class Gate(Schema):
    """What a metric must reach. A version that misses a gate is published as Rejected and never served."""

    metric: str = Field(
        pattern=METRIC_NAME,
        max_length=200,
        description="Name of a metric in status.metrics, for example exactMatch, evalLoss or <suite>/rougeL.",
    )
    min: float | None = Field(default=None, description="Lowest value that passes the gate.")
    max: float | None = Field(default=None, description="Highest value that passes the gate.")
    min_gain: float | None = Field(
        default=None,
        description="How much better the metric must be than the same metric of `over`. 0 means at least as good. For losses and "
        "perplexities, lower is better.",
    )
    over: Literal["base", "fewShot", "current"] = Field(
        default="base",
        description="What minGain compares with. base: the base model. fewShot: the base model with examples in its prompt. "
        "current: the adapter's newest Ready version. If there is no version yet, a gate over current passes.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.min) || has(self.max) || has(self.minGain)", "give at least one of min, max and minGain")
        )
    }


class Evaluation(Schema):
    """What is measured for the new version and its baselines: loss and exact match on held-out examples, and the
    suites."""

    max_samples: int = Field(
        default=200, ge=0, description="Number of held-out examples to generate answers for. 0 measures only the loss."
    )
    max_new_tokens: int = Field(default=128, ge=1, le=8192, description="Longest generated answer, in tokens.")
    baselines: list[Baseline] = Field(
        default=["zeroShot"],
        description="What the new version is compared with. zeroShot: the base model as it is (metrics base/…). fewShot: the "
        "base model with training examples in its prompt (metrics fewShot/…).",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    few_shot_examples: int = Field(
        default=4, ge=1, le=32, description="Number of training examples in the prompt of the baseline fewShot."
    )
    suites: list[Suite] | None = Field(
        default=None,
        max_length=32,
        description="Tasks to measure besides the held-out examples.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    gates: list[Gate] | None = Field(
        default=None,
        max_length=32,
        description="Scores that the version must reach. A version that misses one is published as Rejected and never served.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
