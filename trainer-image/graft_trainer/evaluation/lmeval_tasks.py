"""Tasks of lm-evaluation-harness: check a user's own definition, and load a task with its data.

Only the harness's own code runs. A user's definition must be plain YAML. Templates are rendered in jinja's sandbox.
Metrics and datasets that bring code from the Hub are refused. This module does not import torch.
"""

import json
import logging
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from graft.api.evaluation import Suite
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure

log = logging.getLogger(__name__)
LARGEST = 256 * 1024  # bytes of a definition
DEPTH = 32  # of nested mappings and lists in a definition
ALIASES = 16  # in a definition. An alias repeats the node that it names: a few dozen nested aliases become gigabytes
FILTER_CHARS = 64  # of the name of a filter, which becomes part of a metric's name
IGNORED_KEYS = {  # the location of the data and the number of examples, which the suite sets, and labels
    "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split",
    "num_fewshot", "tag", "task_alias", "should_decontaminate",
}  # fmt: skip
KEYS = {
    "task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter",
    "fewshot_delimiter", "generation_kwargs", "metric_list", "filter_list", "repeats", "metadata",
}  # fmt: skip
METRICS = {  # the harness's own; it would download any other name as a module
    "acc", "acc_bytes", "acc_mutual_info", "acc_norm", "bits_per_byte", "bleu", "brier_score", "byte_perplexity", "chrf",
    "exact_match", "f1", "likelihood", "mcc", "perplexity", "ter", "word_perplexity",
}  # fmt: skip
GENERATION_KEYS = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens"}
TAG = re.compile(r"could not determine a constructor for the tag '([^']*)'")


def read_definition(data: bytes, suite: Suite) -> dict[str, Any]:
    """Read a user's definition of a task. Raises Failure(ConfigurationInvalid) if it could run code or read files."""
    if len(data) > LARGEST:
        raise _refused(suite, f"it has {len(data)} bytes, and the limit is {LARGEST} bytes")
    try:
        found = yaml.load(data, Loader=_Loader)  # noqa: S506 - a SafeLoader
        json.dumps(found, default=str, skipkeys=True)  # raises ValueError if a part contains itself
    except yaml.YAMLError as error:
        tag = TAG.search(str(error))
        what = f"the tag {tag.group(1)} is not allowed" if tag else f"it is not YAML: {error}"
        raise _refused(suite, what) from error
    except ValueError as error:  # yaml raises it also for a number of thousands of digits or an impossible date
        raise _refused(suite, f"it has a value that cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("task"), str):
        raise _refused(suite, "it must be a mapping with the task's name in the key task")
    if unknown := sorted(str(key) for key in found.keys() - KEYS - IGNORED_KEYS):
        raise _refused(suite, f"it has keys that are not allowed: {', '.join(unknown)}")
    if found.get("dataset_path") not in (None, "json"):
        raise _refused(
            suite, f"dataset_path is {found['dataset_path']}. Remove it, because the data comes from lmEval.data"
        )
    for metric in found.get("metric_list") or []:
        name = metric.get("metric") if isinstance(metric, dict) else None
        if not isinstance(name, str) or name not in METRICS or "hf_evaluate" in metric:
            allowed = ", ".join(sorted(METRICS))
            raise _refused(
                suite, f"metric_list has {metric}; each metric must be one of {allowed}, without hf_evaluate"
            )
        if not isinstance(metric.get("aggregation", ""), str):
            raise _refused(suite, f"the aggregation of the metric {name} must be a name")
    for item in found.get("filter_list") or []:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or not name.isprintable() or len(name) > FILTER_CHARS:
            raise _refused(
                suite, f"each entry of filter_list must have a name of at most {FILTER_CHARS} printable characters"
            )
    generation = found.get("generation_kwargs") or {}
    if not isinstance(generation, dict) or (unknown := sorted(generation.keys() - GENERATION_KEYS)):
        raise _refused(
            suite,
            f"generation_kwargs must be a mapping with only these keys: {', '.join(sorted(GENERATION_KEYS))}; "
            f"not allowed: {', '.join(unknown)}",
        )
    return {key: value for key, value in found.items() if key in KEYS}


class _Loader(yaml.SafeLoader):
    """A SafeLoader with bounds on depth and aliases."""

    depth = aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node. Raises YAMLError beyond the bounds."""
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEPTH or self.aliases > ALIASES:
            raise yaml.YAMLError(f"it is nested deeper than {DEPTH} levels, or has more than {ALIASES} aliases")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _refused(suite: Suite, why: str) -> Failure:
    return Failure(
        Reason.CONFIGURATION_INVALID,
        f"spec.evaluation.suites {suite.name}: the definition of the lm-eval task is refused: {why}",
        "Write the task with plain templates (doc_to_text, doc_to_target, doc_to_choice), or use a task of the harness.",
    )


def load_task(suite: Suite, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return (name, lm-eval's loaded tasks) of a suite, with their data.

    prepare puts a user's definition into `folder` as <suite>.yaml, and its data as <suite>.data.jsonl. The data of the
    harness's tasks comes from the Hugging Face cache. Raises Failure if the task cannot be loaded or is not supported.
    """
    assert suite.lm_eval is not None  # noqa: S101 - the caller checked it
    refuse_code()
    name = suite.lm_eval.task
    spec: Any = name
    if suite.lm_eval.definition is not None:
        spec = read_definition((folder / f"{suite.name}.yaml").read_bytes(), suite)
        spec |= {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{suite.name}.data.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "fewshot_split": "test",  # the harness never uses a question as its own example
        }
        name = spec["task"]
    try:
        tasks = _manager(own=suite.lm_eval.definition is not None).load([spec])
    except KeyError as error:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"spec.evaluation.suites {suite.name}: lm-eval has no task {name}",
            "Set lmEval.task to one of the harness's tasks, or set lmEval.definition and lmEval.data.",
        ) from error
    except Exception as error:
        raise _cannot_load(suite, name, error) from error
    for task in tasks["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False) or _lacks_metric(task):
            raise Failure(
                Reason.CONFIGURATION_INVALID,
                f"spec.evaluation.suites {suite.name}: {name} is not supported, because it runs generated code, needs images or "
                "sounds, or has metrics that are code from the Hub",
                "Choose another task.",
            )
    return name, tasks


def _lacks_metric(task: Any) -> bool:
    config = getattr(task, "config", None)
    return getattr(config, "process_results", None) is None and None in getattr(task, "_metric_fn_list", {}).values()


def _cannot_load(suite: Suite, name: str, error: Exception) -> Failure:
    text = f"spec.evaluation.suites {suite.name}: the lm-eval task {name} cannot be loaded: {type(error).__name__}: {error}"
    if suite.lm_eval is not None and suite.lm_eval.definition is not None:
        return Failure(Reason.DATASET_INVALID, text, "Correct lmEval.definition or lmEval.data so that both match.")
    return Failure(
        Reason.DATASET_UNAVAILABLE,
        text,
        "Allow the job's namespace to reach the Hugging Face endpoint, or set lmEval.definition and lmEval.data.",
    )


@cache
def _manager(*, own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not own)  # an index of the harness's own tasks takes seconds


@cache
def refuse_code() -> None:
    """Render the harness's templates in jinja's sandbox. Block the library evaluate, which runs metrics from the Hub."""
    sys.modules["evaluate"] = None  # type: ignore[assignment]
    import lm_eval.utils
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= {"regex_replace": lm_eval.utils.regex_replace}
    lm_eval.utils.env = sandbox
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
