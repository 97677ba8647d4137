"""Measure one model on one set of tasks: its answers, the likelihood of the right answers, and the scores of both."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from graft.api.evaluation import Metric

from graft_trainer.data.tokens import prompt_ids
from graft_trainer.evaluation.calls import METRIC, call_scores
from graft_trainer.evaluation.few_shot import Shot, put_before
from graft_trainer.evaluation.generate import at_most, generate
from graft_trainer.evaluation.scores import SCORES, accuracy, standard_error, task_scores
from graft_trainer.evaluation.subject import Meter, Subject, tokenised
from graft_trainer.evaluation.suites import Task
from graft_trainer.model.loss import log_likelihoods, loss_of

log = logging.getLogger(__name__)
MEASURED_AT_ONCE = 8  # examples in a batch for likelihoods, at least; halved each time memory runs out


@dataclass(frozen=True)
class Questions:
    """Tasks with the metrics to compute for them.

    `short`: an answer is cut off if it is much longer than the right one. Such an answer is no exact match anyway, and
    the base model often does not stop by itself. Use `short` for exactMatch only, because it changes the other scores.
    """

    tasks: Sequence[Task]
    metrics: Sequence[Metric]
    max_new_tokens: int
    short: bool = False
    whole: bool = False  # the loss covers all answers of a conversation, as in training, not only the last


@dataclass(frozen=True)
class Graded:
    """The first metric of the answers, and its value for each answer in the tasks' order, from 0 to 1."""

    metric: str
    values: list[float]


@dataclass
class Measured:
    """The scores of a model: the metrics by name, and its answers in the tasks' order if any were generated."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    size: int = 0  # number of tasks
    graded: Graded | None = None
    errors: dict[str, float] = field(default_factory=dict)  # standard errors of the metrics, where the spread is known


def measure(
    subject: Subject, questions: Questions, batch: int, meter: Meter, shots: Sequence[Shot] = (), count: int = 0
) -> Measured:
    """Return the model's scores, with up to `count` of the `shots` before each question."""
    tasks = _with_shots(subject, questions, shots, count) if count else questions.tasks
    measured = Measured()
    for step in (_generation, _calls, _losses, _choices):
        meter.again()
        step(subject, questions, tasks, measured, max(batch, MEASURED_AT_ONCE), meter)
    metrics: dict[str, float] = {name: measured.metrics[name] for name in questions.metrics}
    errors = {name: error for name, error in measured.errors.items() if name in metrics}
    return Measured(metrics, measured.answers, len(tasks), measured.graded, errors)


def _generation(
    subject: Subject, questions: Questions, tasks: Sequence[Task], measured: Measured, batch: int, meter: Meter
) -> None:
    wanted = [name for name in questions.metrics if name in SCORES]
    if not wanted:
        return
    prompts = [prompt_ids(task.example(), subject.tokenizer, subject.task) for task in tasks]
    longest = [_longest(subject, questions, task) for task in tasks]
    measured.answers = generate(subject, prompts, longest, meter)
    rights = [task.answers for task in tasks]
    for name in wanted:
        values = task_scores(name, measured.answers, rights)
        measured.metrics[name] = round(statistics.fmean(values), 4)
        if name == wanted[0]:
            measured.graded = Graded(name, values)
        if (error := standard_error(values)) is not None:
            measured.errors[name] = error


def _calls(
    subject: Subject, questions: Questions, tasks: Sequence[Task], measured: Measured, batch: int, meter: Meter
) -> None:
    if METRIC not in questions.metrics:
        return
    prompts = [prompt_ids(task.example(), subject.tokenizer, subject.task) for task in tasks]
    measured.answers = generate(subject, prompts, [questions.max_new_tokens] * len(tasks), meter, special_tokens=True)
    values = call_scores(measured.answers, questions.tasks, subject.tokenizer)
    measured.metrics[METRIC] = round(statistics.fmean(values), 4)
    measured.graded = Graded(METRIC, values)


def _longest(subject: Subject, questions: Questions, task: Task) -> int:
    if not questions.short:
        return questions.max_new_tokens
    right = max(len(subject.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in task.answers)
    return min(questions.max_new_tokens, 2 * right + 8)


def _losses(
    subject: Subject, questions: Questions, tasks: Sequence[Task], measured: Measured, batch: int, meter: Meter
) -> None:
    wanted = [name for name in questions.metrics if name in ("loss", "perplexity")]
    if not wanted:
        return
    examples = [one for task in tasks for one in tokenised(task.example(earlier=questions.whole), subject)]
    found = log_likelihoods(subject.model, examples, subject.pad, batch, meter)
    loss, error = loss_of(found)
    values = {"loss": round(loss, 5), "perplexity": round(math.exp(min(loss, 700.0)), 5)}
    measured.metrics |= {name: values[name] for name in wanted}
    if error is not None:
        measured.errors |= {"loss": error, "perplexity": error * values["perplexity"]}  # by the derivative of exp


def _choices(
    subject: Subject, questions: Questions, tasks: Sequence[Task], measured: Measured, batch: int, meter: Meter
) -> None:
    if "accuracy" not in questions.metrics:
        return
    examples = [one for task in tasks for choice in task.choices for one in tokenised(task.example(choice), subject)]
    found = iter(log_likelihoods(subject.model, examples, subject.pad, batch, meter))
    means = [[value / max(1, tokens) for value, tokens in (next(found) for _ in task.choices)] for task in tasks]
    right = [task.choices.index(task.answers[0]) for task in tasks]
    measured.metrics["accuracy"] = round(accuracy(means, right), 4)


def _with_shots(subject: Subject, questions: Questions, shots: Sequence[Shot], count: int) -> list[Task]:
    """Return the tasks, each with as many examples before its question as fit in the model's context."""
    generated = any(name in SCORES or name == METRIC for name in questions.metrics)

    def fits(task: Task) -> bool:
        if subject.room is None:
            return True
        prompt = len(prompt_ids(task.example(), subject.tokenizer, subject.task))
        if subject.task == "seq2seq":
            return prompt <= subject.room
        answers = [len(subject.tokenizer(text)["input_ids"]) for text in (task.choices or task.answers[:1])]
        new = at_most(subject, _longest(subject, questions, task)) if generated else 0
        return prompt + max([new, *answers]) <= subject.room

    chat = bool(subject.tokenizer.chat_template)
    tasks = questions.tasks if chat else [task.as_plain() for task in questions.tasks]
    shown = [put_before(task, shots, count, fits) for task in tasks]
    fewer = sum(number < count for _, number in shown)
    if fewer:
        mean = sum(number for _, number in shown) / len(shown)
        log.warning(
            "fewShot: %d of %d questions get fewer than %d examples, because the context or the training data is too small: "
            "%.1f on average",
            fewer,
            len(shown),
            count,
            mean,
        )
    return [task for task, _ in shown]
