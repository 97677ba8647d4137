"""What a FineTuneJob measures, against what, and what the result must reach."""

from typing import Literal

from pydantic import Field

from graft.api.meta import DATASET_URI, DNS_LABEL, Schema, rules

Metric = Literal["exactMatch", "f1", "rouge1", "rouge2", "rougeL", "loss", "perplexity", "accuracy"]
Baseline = Literal["zeroShot", "fewShot"]


class LmEval(Schema):
    """A task of EleutherAI's lm-evaluation-harness."""

    task: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$",
        max_length=128,
        description="Name of the task, for example arc_easy; its data comes from the Hugging Face endpoint.",
    )
    definition: str | None = Field(
        default=None,
        pattern=DATASET_URI,
        max_length=1024,
        description="The task's own YAML, where it is not one of the harness's. Tags such as !function, which run code, are refused.",
    )
    data: str | None = Field(
        default=None,
        pattern=DATASET_URI,
        max_length=1024,
        description="With definition: the JSONL file of the task's test split.",
    )
    few_shot: int = Field(default=0, ge=0, le=64, description="Examples before each question.")

    model_config = Schema.model_config | {
        "json_schema_extra": rules(("has(self.definition) == has(self.data)", "give definition and data, or neither"))
    }


class Suite(Schema):
    """Tasks that are measured after training: JSONL lines, or a task of lm-eval.

    Lines are {prompt or messages, answer or answers} or, for multiple choice, {prompt or messages, choices, label}; lines in the
    dataset's own format are understood, too.
    """

    name: str = Field(pattern=DNS_LABEL, max_length=40, description="Prefix of its metrics: <name>/<metric>.")
    uri: str | None = Field(
        default=None, pattern=DATASET_URI, max_length=1024, description="A JSONL file, as in dataset.train.uri."
    )
    lm_eval: LmEval | None = Field(default=None, description="A task of lm-eval instead of a file.")
    role: Literal["task", "forgetting"] = Field(
        default="task",
        description="task: what the adapter is for. forgetting: what it should not unlearn; the report shows the loss against the base.",
    )
    metrics: list[Metric] | None = Field(
        default=None,
        min_length=1,
        description="What is computed; when absent accuracy for multiple choice, exactMatch, f1, rougeL and loss for the others.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first so many lines.")
    max_new_tokens: int = Field(default=128, ge=1, le=8192, description="Longest generated answer, in tokens.")

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.uri) != has(self.lmEval)", "give uri (a JSONL file) or lmEval (a task), and not both"),
            ("!(has(self.lmEval) && has(self.metrics))", "an lm-eval task brings its own metrics"),
        )
    }


class Gate(Schema):
    """What a metric must reach; a version that misses one is published as Rejected and never served."""

    metric: str = Field(
        min_length=1,
        max_length=200,
        description="A name in status.metrics, for example exactMatch, evalLoss or <suite>/rougeL.",
    )
    min: float | None = Field(default=None, description="The least value.")
    max: float | None = Field(default=None, description="The greatest value.")
    min_gain: float | None = Field(
        default=None,
        description="How much better than `over` it must be; 0 allows no loss. Of losses and perplexities lower is better.",
    )
    over: Literal["base", "fewShot", "current"] = Field(
        default="base",
        description="For minGain: the base model, the base model with examples in its prompt, or the adapter's newest version. "
        "Where there is no version yet, current passes.",
    )

    model_config = Schema.model_config | {
        "json_schema_extra": rules(
            ("has(self.min) || has(self.max) || has(self.minGain)", "give at least one of min, max and minGain")
        )
    }


class Evaluation(Schema):
    """What is measured: loss and exact match on the held-out examples, and the suites, for the adapter and its baselines."""

    max_samples: int = Field(
        default=200, ge=0, description="Held-out examples to generate answers for; 0 measures the loss only."
    )
    max_new_tokens: int = Field(default=128, ge=1, le=8192, description="Longest generated answer, in tokens.")
    baselines: list[Baseline] = Field(
        default=["zeroShot"],
        description="What the adapter is compared with: the base model as it is (metrics base/…), and with examples of the training "
        "data in its prompt (fewShot/…).",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    few_shot_examples: int = Field(default=4, ge=1, le=32, description="Examples in the prompt of fewShot.")
    suites: list[Suite] | None = Field(
        default=None,
        max_length=32,
        description="What is measured beside the held-out examples.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    gates: list[Gate] | None = Field(
        default=None,
        max_length=32,
        description="What the metrics must reach.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
