"""Run tasks of lm-evaluation-harness on a model that is already loaded."""

import copy
import gc
import logging
import math
from pathlib import Path
from typing import Any

import torch
from graft.api.evaluation import Suite
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import GenerationConfig

from graft_trainer.evaluation.generate import at_most, generate_ids
from graft_trainer.evaluation.lmeval_tasks import load_task
from graft_trainer.evaluation.measure import Measured
from graft_trainer.evaluation.subject import Meter, Subject
from graft_trainer.run.failures import out_of_memory

log = logging.getLogger(__name__)
AT_ONCE = 16  # requests; halved each time memory runs out
NO_METRICS = ("alias", "name", "sample_len", "samples")  # entries of the results that are not metrics


class LoadedModel(HFLM):  # type: ignore[misc]
    """HFLM for a subject. It reports its progress, keeps answers within the context, and supports virtual tokens."""

    def __init__(self, subject: Subject, suite: Suite, batch: int, meter: Meter) -> None:
        super().__init__(
            pretrained=subject.model,
            backend=subject.task,
            tokenizer=copy.deepcopy(subject.tokenizer),  # the harness changes its padding
            max_length=subject.room,
            batch_size=batch,
        )
        self.subject = subject
        self.suite = suite
        self.meter = meter

    @property
    def max_gen_toks(self) -> int:
        return at_most(self.subject, self.suite.max_new_tokens)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self.meter.begin(self.subject.who, self.suite.name, len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self.meter.begin(self.subject.who, self.suite.name, len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self.meter.begin(self.subject.who, self.suite.name, len(requests))
        for request in requests:
            asked = request.args[1].get("max_gen_toks")
            if asked is not None:
                request.args[1]["max_gen_toks"] = at_most(self.subject, asked)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *arguments, **more)
        self.meter.step(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        self.meter.step(len(context))
        if not self.subject.virtual_tokens:
            found: torch.Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            return found
        mask = kwargs["attention_mask"]
        config = GenerationConfig(
            max_new_tokens=max_length - context.shape[1],
            do_sample=bool(kwargs.get("do_sample")),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.subject.stop or None,
        )
        criteria = stop_sequences_criteria(self.tokenizer, stop, 0, len(context))
        new = generate_ids(self.subject, context, mask, config, stopping_criteria=criteria)
        return torch.cat([context, new], dim=1) if self.subject.task == "causal" else new


def measure_task(subject: Subject, suite: Suite, folder: Path, meter: Meter) -> Measured:
    """Return the harness's metrics for a suite's task, for example acc. See plain_metrics for their names.

    If the name stands for several tasks and has no score of its own, return the mean over the tasks.
    """
    assert suite.lm_eval is not None  # noqa: S101 - the caller checked it
    name, tasks = load_task(suite, folder)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") != 0:  # 0: the task's own prompts contain examples already
            task.set_config("num_fewshot", suite.lm_eval.few_shot)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    batch = AT_ONCE
    while True:
        try:
            found = evaluate(
                LoadedModel(subject, suite, batch, meter),
                tasks,
                limit=suite.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
            break
        except Exception as error:
            if not out_of_memory(error) or batch == 1:
                raise
        batch //= 2
        log.warning("memory ran out, continuing with %d requests at once", batch)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    results = found["results"]
    metrics = plain_metrics([results[name]]) if name in results else {}
    metrics = metrics or plain_metrics([results[task] for task in tasks["tasks"]])
    if not metrics:
        log.warning("%s: the tasks of %s have no metric in common", suite.name, name)
    size = sum(counts["effective"] for counts in found["n-samples"].values())
    # The mean over several tasks has no error of its own in the harness.
    errors = standard_errors(results[next(iter(tasks["tasks"]))]) if len(tasks["tasks"]) == 1 else {}
    return Measured(metrics, size=size, errors={name: value for name, value in errors.items() if name in metrics})


def standard_errors(scores: dict[str, Any]) -> dict[str, float]:
    """Return the harness's standard errors by the names that plain_metrics gives to their metrics (PURE)."""
    metrics = [name.partition(",")[0] for name in scores if "_stderr" not in name]
    found = {}
    for entry, value in scores.items():
        if "_stderr" in entry and isinstance(value, int | float) and math.isfinite(value):
            name = entry.replace("_stderr", "", 1)
            metric = name.partition(",")[0]
            found[metric if metrics.count(metric) == 1 else name] = float(value)
    return found


def plain_metrics(scores: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each number that all `scores` have, without standard errors (PURE).

    The harness's names have the form metric,filter. The filter is removed if the metric has only one.
    """
    names = [
        name
        for name, value in scores[0].items()
        if isinstance(value, int | float) and name not in NO_METRICS and "_stderr" not in name
        if all(isinstance(other.get(name), int | float) for other in scores)
    ]
    metrics = [name.partition(",")[0] for name in names]
    means = {name: math.fsum(float(score[name]) for score in scores) / len(scores) for name in names}
    return {
        metric if metrics.count(metric) == 1 else name: round(means[name], 5)
        for name, metric in zip(names, metrics, strict=True)
    }
