"""evaluate: measure the version, and the models it is compared with, on the held-out examples and the suites.

gates.plan decides which model is measured on what, from evaluation.baselines, the gates and the roles of the suites.
gates also defines the names of the metrics, and docs/evaluation.md explains them. evalLoss is in nats per token that
the loss covers.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from graft.api.evaluation import Suite
from graft.artifacts.sources import SourceError
from graft.artifacts.storage import StoreError
from graft.report.document import Precision
from peft import PeftModel

from graft_trainer.data.tokens import Tokenised
from graft_trainer.evaluation import gates
from graft_trainer.evaluation.calls import METRIC, UnknownFormat, written
from graft_trainer.evaluation.current import NotComparable, current_version
from graft_trainer.evaluation.few_shot import Shot, draw
from graft_trainer.evaluation.gates import HELD_OUT, Who, prefixed
from graft_trainer.evaluation.generate import stop_tokens
from graft_trainer.evaluation.measure import MEASURED_AT_ONCE, Measured, Questions, measure
from graft_trainer.evaluation.subject import NAMES, Meter, Subject
from graft_trainer.evaluation.suites import (
    Task,
    chat_prompts,
    main_metric,
    metrics_of,
    read_suite,
    suite_lines,
    task_of,
)
from graft_trainer.model.loss import log_likelihoods, loss_of
from graft_trainer.run.failures import Failure, explain
from graft_trainer.run.run import Run
from graft_trainer.train import Trained

log = logging.getLogger(__name__)
SAMPLES = 5  # answers of each set that the report shows
# The subjects of a turn share a model.
TURNS: tuple[tuple[Who, ...], ...] = (("adapter",), ("base", "fewShot"), ("current",))
# The log warns of more forgetting than this. The unit of perplexity is a share of the base model's perplexity.
LARGE = {"score": 0.05, "loss": 0.1, "perplexity": 0.1}


@dataclass(frozen=True)
class SuiteResult:
    """The results of one suite.

    `metrics`: subject (adapter, base, fewShot, current) -> metric (without the suite's name) -> value. `main`: the
    suite's main metric, from which forgetting is computed. `samples`: see Evaluated.
    """

    name: str
    role: Literal["task", "forgetting"]
    kind: str  # answers, choices, text or lmEval
    size: int  # number of tasks
    main: str
    metrics: dict[Who, dict[str, float]]
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluated:
    """All scores by their published name (see gates), and the conclusions from them.

    `samples`: a few held-out questions, each {prompt, expected, answer, base/answer?, fewShot/answer?, current/answer?}.
    `rejected`: one message for each missed gate. If there are any, the version is published as Rejected.
    `missing`: one message for each measurement that was not possible, with the reason.
    """

    metrics: dict[str, float]
    samples: list[dict[str, str]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    suites: list[SuiteResult] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0  # duration of the evaluation
    precision: dict[str, Precision] = field(default_factory=dict)  # of the scores, by their published names


@dataclass
class _Set:
    """One set to measure on: the held-out examples for their loss, the same for their answers, or a suite."""

    name: str
    what: str  # for the log
    questions: Questions
    tokens: Sequence[Tokenised] | None = None  # for the loss as training computes it, without few-shot examples
    suite: Suite | None = None
    found: dict[Who, Measured] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.questions.tasks[0].kind if self.questions.tasks else "lmEval"

    def asked_of(self, plan: dict[str, list[Who]]) -> list[Who]:
        """Return the subjects to measure on this set. Texts have no questions, so fewShot is left out for them."""
        return [who for who in plan[self.name] if who != "fewShot" or self.kind != "text"]


def evaluate(run: Run, trained: Trained) -> Evaluated:
    """Measure the version and the models it is compared with.

    A missed gate and a measurement that is not possible are results, not failures. Training is complete, and another
    attempt would give the same model.
    """
    started = time.monotonic()
    evaluation = run.job.evaluation
    plan = gates.plan(evaluation, has_current=run.job.current is not None)
    sets = [*_held_out(run, trained), *_suites(run, trained)]
    meter = Meter(run.progress, sum(len(item.questions.tasks) * len(item.asked_of(plan)) for item in sets))
    shots = draw(trained.train_examples, evaluation.few_shot_examples, run.job.training.seed)
    metrics = {"trainLoss": round(trained.train_loss, 5)} if trained.train_loss is not None else {}
    missing: dict[tuple[Who, str], str] = {}
    for turn in TURNS:
        work = [(who, item) for who in turn for item in sets if who in item.asked_of(plan)]
        if not work:
            continue
        with _spared(work, missing), _subject(run, trained, turn[0]) as subject:
            for who, item in work:
                with _spared([(who, item)], missing):
                    _measure(run, trained, replace(subject, who=who), item, shots, meter)
                    metrics |= _published(item, who)
                    run.progress.update(metrics=_finite(metrics))
        if turn == TURNS[0] and math.isfinite(loss := metrics.get("evalLoss", math.nan)):
            # The last point of the held-out curve.
            run.progress.event(step=trained.resolved.max_steps, evalLoss=loss)
            run.progress.update(eval_loss=loss)
    suites = [_result(item, item.suite) for item in sets if item.suite is not None and "adapter" in item.found]
    metrics |= _forgetting(suites)
    rejected = gates.check(evaluation.gates or (), metrics, missing)
    for problem in rejected:
        log.warning("gate missed: %s", problem)
    told = [f"{NAMES[who]}, {name or 'held-out examples'}: {why}" for (who, name), why in missing.items()]
    run.progress.update(metrics=_finite(metrics), rejected=rejected or None, missing=told or None, eta_seconds=0)
    samples = [sample for item in sets if item.suite is None and item.tokens is None for sample in _samples(item)]
    return Evaluated(metrics, samples, rejected, suites, told, time.monotonic() - started, _precision(sets))


@contextmanager
def _spared(work: Sequence[tuple[Who, _Set]], missing: dict[tuple[Who, str], str]) -> Iterator[None]:
    """Continue if a part of `work` cannot be measured, because memory runs out or a library fails on a task.

    Adds (subject, set) -> reason to `missing`. Raises Failures, and errors of the storage and of files, because a retry
    may succeed.
    """
    try:
        yield
    except (Failure, StoreError, SourceError, OSError):
        raise
    except Exception as error:
        why = str(error) if isinstance(error, (NotComparable, UnknownFormat)) else explain(error).message
        missing |= {(who, item.name): why for who, item in work if who not in item.found}
        log.warning("not measured: %s: %s", ", ".join(f"{NAMES[who]}, {item.what}" for who, item in work), why)
        log.info("the traceback:", exc_info=error)


def _held_out(run: Run, trained: Trained) -> list[_Set]:
    if trained.held_out is None:
        return []
    evaluation = run.job.evaluation
    tasks = [task_of(example) for example in trained.held_out_examples]
    answered = [task for task in tasks if task.text is not None or task.calls or task.answers[0].strip()]
    losses = Questions(answered or tasks, ["loss"], evaluation.max_new_tokens, whole=True)
    sets = [_Set(HELD_OUT, "held-out loss", losses, tokens=trained.held_out.examples)]
    chosen = [task for task in answered if task.text is None][: evaluation.max_samples]
    if words := [task for task in chosen if not task.calls]:
        answers = Questions(words, ["exactMatch"], evaluation.max_new_tokens, short=True)
        sets.append(_Set(HELD_OUT, "held-out answers", answers))
    if calling := [task for task in chosen if task.calls]:
        sets.append(_Set(HELD_OUT, "held-out calls", Questions(calling, [METRIC], evaluation.max_new_tokens)))
    return sets


def _suites(run: Run, trained: Trained) -> list[_Set]:
    sets = []
    for suite in run.job.evaluation.suites or ():
        tasks: list[Task] = []
        if suite.lm_eval is None:
            with (run.settings.dataset_dir / "suites" / f"{suite.name}.jsonl").open("rb") as stream:
                tasks = read_suite(suite_lines(stream), suite, run.job.dataset, trained.task)
            if chat_prompts(run.job.dataset) and trained.tokenizer.chat_template:
                tasks = [task.as_chat() for task in tasks]
        metrics = metrics_of(suite, tasks[0].kind) if tasks else ()
        sets.append(_Set(suite.name, suite.name, Questions(tasks, metrics, suite.max_new_tokens), suite=suite))
    return sets


@contextmanager
def _subject(run: Run, trained: Trained, who: Who) -> Iterator[Subject]:
    stop, virtual = stop_tokens(trained), trained.resolved.virtual_tokens or 0
    tuned = Subject("adapter", trained.model, trained.tokenizer, trained.task, trained.context, stop, virtual)
    if who == "adapter":
        yield tuned
    elif who == "current":
        assert run.job.current is not None  # noqa: S101 - gates.plan checked it
        with current_version(run, trained, run.job.current, tuned) as subject:
            yield subject
    else:
        with trained.base_model() as base:
            # For an encoder-decoder, peft's own generate adds the soft prompt even if the adapter is disabled.
            plain = base.get_base_model() if isinstance(base, PeftModel) else base
            yield replace(tuned, model=plain, virtual_tokens=0)


def _measure(run: Run, trained: Trained, subject: Subject, item: _Set, shots: Sequence[Shot], meter: Meter) -> None:
    who, batch = subject.who, trained.resolved.per_device_train_batch_size
    meter.begin(who, item.what, len(item.questions.tasks))
    if item.suite is not None and item.suite.lm_eval is not None:
        from graft_trainer.evaluation.lmeval import measure_task  # takes seconds to import

        item.found[who] = measure_task(subject, item.suite, run.settings.dataset_dir / "suites", meter)
    elif item.tokens is not None and who != "fewShot":
        found = log_likelihoods(subject.model, item.tokens, subject.pad, max(batch, MEASURED_AT_ONCE), meter)
        loss, error = loss_of(found)
        errors = {"loss": error} if error is not None else {}
        item.found[who] = Measured({"loss": round(loss, 5)}, size=len(found), errors=errors)
    else:
        count = run.job.evaluation.few_shot_examples if who == "fewShot" else 0
        item.found[who] = measure(subject, item.questions, batch, meter, shots, count)
    meter.end()
    text = ", ".join(f"{name} {value:g}" for name, value in item.found[who].metrics.items())
    log.info("%s, %s: %s", NAMES[who], item.what, text)


def _published(item: _Set, who: Who) -> dict[str, float]:
    """Return the scores of `who` under their published names."""
    return {_name(item, who, name): value for name, value in item.found[who].metrics.items()}


def _name(item: _Set, who: Who, metric: str) -> str:
    """Return the published name of a score."""
    if item.suite is None:
        return prefixed(who, "evalLoss" if metric == "loss" else metric)
    return prefixed(who, f"{item.suite.name}/{metric}")


def _precision(sets: Sequence[_Set]) -> dict[str, Precision]:
    """Return how exact each score is, by its published name."""
    return {
        _name(item, who, metric): Precision(n=found.size, standard_error=_finite(found.errors).get(metric))
        for item in sets
        for who, found in item.found.items()
        for metric in found.metrics
    }


def _result(item: _Set, suite: Suite) -> SuiteResult:
    metrics = {who: found.metrics for who, found in item.found.items()}
    adapter = item.found["adapter"]
    if item.questions.tasks:
        main: str = main_metric(suite, item.questions.tasks[0].kind)
    else:
        main = next((name for name in ("acc", "exact_match", *adapter.metrics) if name in adapter.metrics), "")
    size = len(item.questions.tasks) or adapter.size
    return SuiteResult(suite.name, suite.role, item.kind, size, main, metrics, _samples(item))


def _samples(item: _Set) -> list[dict[str, str]]:
    """Return SAMPLES answers, the worst first: they show what is still to be done."""
    if "adapter" not in item.found or not item.found["adapter"].answers:
        return []
    graded, tasks, found = item.found["adapter"].graded, item.questions.tasks, []
    worst = sorted(range(len(tasks)), key=lambda index: graded.values[index] if graded else 0)
    for index in worst[:SAMPLES]:
        right = "\n".join(filter(None, (tasks[index].answers[0], written(tasks[index].calls))))
        sample = {"prompt": tasks[index].question, "expected": right}
        sample |= {prefixed(who, "answer"): one.answers[index] for who, one in item.found.items()}
        if graded is not None:
            missed = sum(value == 0 for value in graded.values)
            sample |= {
                "metric": graded.metric,
                "score": f"{graded.values[index]:.4g}",
                "missed": f"{missed} of {len(tasks)}",
            }
        found.append(sample)
    return found


def _forgetting(suites: Sequence[SuiteResult]) -> dict[str, float]:
    """Return forgetting/<suite> for each suite with the role forgetting: how much worse the version is than the base
    model."""
    result = {}
    for suite in suites:
        if suite.role != "forgetting" or not suite.main or "base" not in suite.metrics:
            continue
        base, value = suite.metrics["base"][suite.main], suite.metrics["adapter"][suite.main]
        forgotten = round(gates.gain(f"{suite.name}/{suite.main}", base, value), 5)
        result[f"{gates.FORGETTING}/{suite.name}"] = forgotten
        kind = next((name for name in ("perplexity", "loss") if suite.main.endswith(name)), "score")
        if forgotten > LARGE[kind] * (base if kind == "perplexity" else 1):
            log.warning(
                "forgetting: %s/%s is %g for the base model and %g for the new version. Fewer steps, a lower learning rate or "
                "general examples in the training data reduce forgetting",
                suite.name,
                suite.main,
                base,
                value,
            )
    return result


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """Remove values that are not finite, because JSON has no NaN."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
