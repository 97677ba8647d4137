"""prepare: every check that needs no GPU, the cheapest checks first.

It runs as an init container without a GPU and imports no torch. So a job with a mistake fails within seconds, before it
takes a GPU. Only the check of the method on the model without weights needs torch. The preflight runs it in a process of
its own. The downloaded files are in the work folder that prepare shares with train.
"""

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.api.evaluation import Suite
from graft.artifacts.publishing import CLAIM
from graft.artifacts.sources import fetch
from graft.artifacts.storage import StoreError
from graft.contracts.job import JobFile
from graft.contracts.progress import DatasetStatistics, Reason

from graft_trainer.data import lengths
from graft_trainer.data.chat import writes_date
from graft_trainer.data.context import unused
from graft_trainer.data.dataset import check_template
from graft_trainer.data.example import Example
from graft_trainer.data.lines import BadLine
from graft_trainer.data.read import Data, read_data
from graft_trainer.data.repeats import repeated
from graft_trainer.data.shown import show
from graft_trainer.data.tokens import Task, failure_of, tokenise_one, tokenise_pair, usable
from graft_trainer.data.unusable import Unusable
from graft_trainer.evaluation import gates
from graft_trainer.evaluation.calls import advise, check_calls, unreadable_calls
from graft_trainer.evaluation.lmeval_prefetch import prefetch
from graft_trainer.evaluation.suites import Task as SuiteTask
from graft_trainer.evaluation.suites import chat_prompts, check_data, needs_chat_template, read_suite, suite_lines
from graft_trainer.model.basemodel import (
    check_base_model,
    check_data_fits,
    context_of,
    has_chat_template,
    load_config,
    load_tokenizer,
    stored_quantization,
)
from graft_trainer.model.trial import try_method
from graft_trainer.recipe.resolve import Device, check_packing, check_sharding, limits
from graft_trainer.run.download import download_file, tell
from graft_trainer.run.earlier import already_published
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Prepared, Run

log = logging.getLogger(__name__)
SAMPLE = 50_000  # examples of a file, if a sample is enough
CHARACTERS = 50_000_000  # of a sample; tokenising them takes half a minute on one core
SHOWN = 3  # examples that the log and the report show
SHOWN_LINES = 5
SHOWN_FIELDS = 16


def preflight(run: Run) -> None:
    """Run the checks of prepare in a pod without GPUs, before the Job that needs them.

    The base model's weights are not downloaded.
    """
    prepare(run, weights=False)


def prepare_container(run: Run) -> None:
    """Run prepare. Write its result to a file in the work folder, for train's container."""
    if (prepared := prepare(run)) is not None:
        prepared.write(run.settings.prepared_file)


def prepare(run: Run, *, weights: bool = True) -> Prepared | None:
    """Check the dataset, the suites, the base model and the access, and download the files to the work folder.

    Return what train starts from, or None if an earlier attempt has published the version.
    """
    job, settings, name = run.job, run.settings, run.job.base_model.name
    run.progress.stage("Preparing")
    if already_published(run):
        log.info("%s %s was published by an earlier attempt: nothing to do", job.output.adapter, job.output.version)
        return None

    check_spec(job)
    check_publishing(run)
    digests = download_dataset(run)
    # The pod of the preflight has read every line. A pod that holds GPUs reads a sample again.
    most = SAMPLE if weights and job.preflight else None
    data = read_data(job.dataset, settings.dataset_dir, job.training.seed, most=most)
    log.info("dataset: %d examples to train on, %d held out", data.examples, data.held_out_examples)
    suites, tasks = download_suites(run)

    folder = fetch(
        job.base_model.uri,
        job.base_model.digest,
        settings.base_model_dir,
        store=run.store,
        pvc_root=settings.pvc_dir,
        hf_endpoint=job.hf_endpoint,
        hf_token=settings.hf_token(),
        report=tell(f"base model {name}"),
        weights=weights,
    )
    mounted = job.base_model.uri.startswith("pvc://")
    config = check_base_model(folder, name, job.task, weights=weights or mounted, method=job.method.name)
    log.info("base model %s: %s", name, ", ".join(config.get("architectures") or [config["model_type"]]))
    check_data_fits(folder, name, job.dataset, job.task)
    conversations = [suite for suite, found in tasks.items() if needs_chat_template(found)]
    if conversations and job.task == "causal" and not has_chat_template(folder, name):
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{name} has no chat template, but spec.evaluation.suites {', '.join(conversations)} need one",
            "Use prompt instead of messages in the lines of these suites, or use a chat model as the base model.",
        )
    if not weights:
        # In the other pods, train finds the same mistakes when it has loaded the model. The trial imports torch a second
        # time: 7 s of a CPU and 0.8 GiB.
        trial = try_method(folder, name, job.task, job.method)
        run.progress.update(target_modules=trial.targets or None, unreached=trial.unreached)
    statistics = measure_lengths(run, folder, data, tasks)
    run.progress.update(dataset=statistics)
    quantized = stored_quantization(config) is not None
    return Prepared(str(folder), digests | suites, statistics.model_dump(mode="json"), quantized)


def check_spec(job: JobFile) -> None:
    """Raise Failure for mistakes that are visible in the job alone, before anything is downloaded."""
    for template in job.dataset.templates or []:
        check_template(template)
    check_packing(job)
    check_sharding(job, job.pods.nodes * job.pods.processes_per_node)
    has_held_out = job.dataset.eval is not None or job.dataset.eval_split is not None
    if failure := gates.unknown(job.evaluation, has_held_out, held_out_answers=job.dataset.format != "text"):
        raise failure


def check_publishing(run: Run) -> None:
    """Raise Failure(StorageDenied) if the key may not publish the version.

    Otherwise this would fail after hours of training.
    """
    key = run.prefix + CLAIM
    try:
        run.store.check_write(key)
    except StoreError as error:
        if error.trouble != "denied":
            raise
        raise Failure(
            Reason.STORAGE_DENIED,
            f"the version could not be published, because the key in the Secret graft-storage has no permission to write it: {error}",
            f"Allow this key to write below {run.prefix} (s3:PutObject and s3:AbortMultipartUpload).",
        ) from error


def download_dataset(run: Run) -> dict[str, str]:
    """Download the dataset's files. Return their digests by role."""
    dataset, digests = run.job.dataset, {}
    for role, source in (("train", dataset.train), ("eval", dataset.eval)):
        if source is not None:
            digests[role] = _download(run, source.uri, run.settings.dataset_dir / f"{role}.jsonl", f"dataset.{role}")
    return digests


def download_suites(run: Run) -> tuple[dict[str, str], dict[str, list[SuiteTask]]]:
    """Download the suites and check every line.

    Return (digests of their files, tasks of each suite that is a JSONL file, by its name).
    """
    digests: dict[str, str] = {}
    tasks: dict[str, list[SuiteTask]] = {}
    folder = run.settings.dataset_dir / "suites"
    for suite in run.job.evaluation.suites or ():
        field, key = f"evaluation.suites[{suite.name}]", f"suite/{suite.name}"
        if suite.uri is not None:
            path = folder / f"{suite.name}.jsonl"
            digests[key] = _download(run, suite.uri, path, field)
            with path.open("rb") as stream:
                tasks[suite.name] = read_suite(suite_lines(stream), suite, run.job.dataset, run.job.task)
            log.info("%s: %d tasks", field, len(tasks[suite.name]))
        elif suite.lm_eval is not None and suite.lm_eval.definition and suite.lm_eval.data:
            path = folder / f"{suite.name}.yaml"
            digests[key] = _download(run, suite.lm_eval.definition, path, f"{field}.lmEval.definition", jsonl=False)
            path = folder / f"{suite.name}.data.jsonl"
            digests[f"{key}/data"] = _download(run, suite.lm_eval.data, path, f"{field}.lmEval.data")
            with path.open("rb") as stream:
                check_data(suite_lines(stream), suite)
    prefetch(run.job.evaluation.suites or [], folder, run.job.hf_endpoint, run.settings.hf_token())
    return digests, tasks


def _download(run: Run, uri: str, path: Path, field: str, *, jsonl: bool = True) -> str:
    digest = download_file(
        uri, path, field=field, store=run.store, settings=run.settings, hf_endpoint=run.job.hf_endpoint, jsonl=jsonl
    )
    log.info("%s: %s, %d bytes, %s", field, uri, path.stat().st_size, digest)
    return digest


def measure_lengths(run: Run, folder: Path, data: Data, suites: Mapping[str, Sequence[SuiteTask]]) -> DatasetStatistics:
    """Tokenise the dataset with the base model's tokenizer, and check every example and every task that was read.

    Log the statistics and return them.
    """
    # If torch is installed, transformers imports it. That takes seconds and ten times the memory. Tokenizers work
    # without it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    job, name = run.job, run.job.base_model.name
    tokenizer = load_tokenizer(folder, name, job.job.created_at)
    context = context_of(load_config(folder, name))
    # prepare runs without a GPU. train checks the limits that depend on one.
    longest = limits(job, Device("cuda", bf16=True), context).max_length
    how: Any = {"task": job.task, "skip": job.dataset.on_invalid == "skip"}
    how["most"] = CHARACTERS if data.sampled else None
    found, unusable = lengths.measure(data.train, tokenizer, longest, role="train", **how)
    reasons = Counter(data.reasons) + unusable.counts
    if data.held_out:
        reasons += lengths.measure(data.held_out, tokenizer, longest, role="eval", **how)[1].counts
    if tokenizer.chat_template:
        advise(data.train, tokenizer)
        check_calls(job.evaluation, data.held_out, tokenizer)
    check_suites(run, tokenizer, suites)
    statistics = lengths.describe(
        found,
        examples=data.examples - (0 if data.sampled else unusable.total),
        held_out=data.held_out_examples,
        invalid=sum(reasons.values()),
    )
    statistics.unread_fields = dict(list(unused(data.unread, data.train, tokenizer).items())[:SHOWN_FIELDS])
    again = repeated(data.train, data.held_out)
    statistics.repeated = len(again)
    statistics.invalid_reasons = dict(reasons)
    statistics.learned = examples_shown(data.train, tokenizer, longest, job.task, unusable)
    if job.dataset.format != "text" and writes_date(tokenizer) and job.job.created_at:
        statistics.prompt_date = job.job.created_at[:10]
    report_statistics(statistics, again, sampled=len(found.whole) if statistics.sampled else None)
    prompt = job.method.prompt_tuning
    taken = prompt.virtual_tokens if prompt is not None and job.task == "causal" else 0
    if warning := lengths.advice(found, longest, None if context is None else context - taken):
        log.warning("dataset.train: %s", warning)
    return statistics


def examples_shown(
    examples: Sequence[Example], tokenizer: Any, max_length: int, task: Task, unusable: Unusable
) -> list[str]:
    """Return the text of the first examples, with marks around what the loss covers."""
    first = [example for example in examples[: SHOWN + unusable.total] if example.line not in unusable.lines][:SHOWN]
    found = usable(first, tokenizer, max_length, task, Unusable("train", max_length))
    return [f"line {example.line}: {show(one.item, tokenizer)}" for example, made in found for one in made][:SHOWN]


def report_statistics(statistics: DatasetStatistics, again: Sequence[int], sampled: int | None) -> None:
    """Log what was found in the data."""
    log.info(
        "dataset: %d tokens; tokens per example: mean %.1f, median %d, 95th percentile %d, longest %d%s",
        statistics.tokens,
        statistics.mean_tokens,
        statistics.median_tokens,
        statistics.p95_tokens,
        statistics.max_tokens,
        f" (measured on a sample of {sampled})" if sampled is not None else "",
    )
    if statistics.unread_fields:
        counts = ", ".join(f"{name} ({lines} lines)" for name, lines in statistics.unread_fields.items())
        log.warning("neither Graft nor the chat template reads the fields %s", counts)
    for text in statistics.learned:
        log.info("the loss covers what is between ⟦ and ⟧: %s", text)
    if statistics.prompt_date is not None:
        log.warning(
            "the chat template writes the date of the day. Every prompt of this job has %s, the day of its creation. A server "
            "writes the date of each request",
            statistics.prompt_date,
        )
    if again:
        lines = ", ".join(map(str, again[:SHOWN_LINES]))
        log.warning(
            "%d held-out examples are also in the training data, so their scores are too good (lines %s%s). Remove them from "
            "one of the two",
            len(again),
            lines,
            ", …" if len(again) > SHOWN_LINES else "",
        )


def check_suites(run: Run, tokenizer: Any, suites: Mapping[str, Sequence[SuiteTask]]) -> None:
    """Raise Failure if the chat template cannot render a task of a suite, or writes its calls in an unknown format."""
    for suite in run.job.evaluation.suites or ():
        if suite.name not in suites:
            continue
        tasks = list(suites[suite.name])
        if chat_prompts(run.job.dataset) and tokenizer.chat_template:
            tasks = [task.as_chat() for task in tasks]
        if tokenizer.chat_template and (failure := unreadable_calls(suite, tasks, tokenizer)):
            raise _of_suite(suite, failure)
        for task in tasks:
            for answer in task.choices or (None,):
                example = task.example(answer)
                try:
                    if run.job.task == "seq2seq":
                        tokenise_pair(example, tokenizer)
                    else:
                        tokenise_one(example, tokenizer)
                except BadLine as error:
                    raise _of_suite(suite, failure_of(example, error)) from error
                except Failure as error:
                    raise _of_suite(suite, error) from error


def _of_suite(suite: Suite, failure: Failure) -> Failure:
    where = f"spec.evaluation.suites {suite.name} ({suite.uri})"
    return Failure(failure.reason, f"{where}: {failure.message}", failure.remedy)
