"""Calls of tools in answers: the format in which a chat template writes them, and the share of right calls (PURE).

The formats are those of graft.toolcalls, which the engine for CPUs reads, too. This module runs no model.
"""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

from graft.api.evaluation import Evaluation, Metric, Suite
from graft.contracts.progress import Reason
from graft.toolcalls import PARSERS, Call, parser_for, same_calls

from graft_trainer.data.conversation import answer_text
from graft_trainer.data.example import Example
from graft_trainer.evaluation.gates import HELD_OUT, split_name
from graft_trainer.evaluation.suites import Task, metrics_of, task_of
from graft_trainer.run.failures import Failure

log = logging.getLogger(__name__)
METRIC: Metric = "toolCallAccuracy"
RENDERED = 100  # answers from which the format is found
SEARCHED = 10_000  # training examples among which a call is looked for, for the advice


class UnknownFormat(Exception):
    """No parser reads the calls as the chat template writes them. The message says so."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template writes calls of tools in a format that Graft cannot read. The formats that it reads are those "
            f"of vLLM's parsers {', '.join(PARSERS)}"
        )


def format_of(tasks: Sequence[Task], tokenizer: Any) -> str | None:
    """Return the name of the parser that reads the right answers of these tasks as the chat template writes them."""
    asked = islice((task for task in tasks if task.calls), RENDERED)
    rendered = [(answer_text(task.example(), tokenizer), task.calls) for task in asked]
    return parser_for(rendered) if rendered else None


def call_scores(answers: Sequence[str], tasks: Sequence[Task], tokenizer: Any) -> list[float]:
    """Return 1 for each answer whose calls equal the right ones (names, arguments and order), else 0.

    Raises UnknownFormat.
    """
    name = format_of(tasks, tokenizer)
    if name is None:
        raise UnknownFormat
    found = [PARSERS[name].parse(answer).calls for answer in answers]
    return [float(same_calls(calls, task.calls)) for calls, task in zip(found, tasks, strict=True)]


def written(calls: Sequence[Call]) -> str:
    """Return calls as text, for the report."""
    return "\n".join(
        f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})" for call in calls
    )


def check_calls(evaluation: Evaluation, held_out: Sequence[Example], tokenizer: Any) -> None:
    """Raise Failure(ConfigurationInvalid) if a gate needs calls in held-out examples, and they cannot be measured."""
    gated = {split_name(gate.metric)[1:] for gate in evaluation.gates or ()}
    if (HELD_OUT, METRIC) not in gated:
        return
    tasks = [task for task in map(task_of, islice(held_out, evaluation.max_samples)) if task.calls]
    if not tasks:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"spec.evaluation.gates: {METRIC} cannot be measured: none of the first {evaluation.max_samples} held-out examples "
            "ends with calls of tools",
            "Remove the gate, or add held-out examples whose last message has tool_calls.",
        )
    if format_of(tasks, tokenizer) is None:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"spec.evaluation.gates: {METRIC} cannot be measured: {UnknownFormat()}",
            "Remove the gate, or use a base model whose chat template writes calls in one of these formats.",
        )


def unreadable_calls(suite: Suite, tasks: Sequence[Task], tokenizer: Any) -> Failure | None:
    """Return Failure(ConfigurationInvalid) if a suite's calls cannot be measured."""
    if tasks[0].kind != "calls" or METRIC not in metrics_of(suite, "calls") or format_of(tasks, tokenizer) is not None:
        return None
    return Failure(
        Reason.CONFIGURATION_INVALID,
        f"{METRIC} cannot be measured: {UnknownFormat()}",
        "Set the suite's metrics to loss and perplexity, or use a base model whose chat template writes calls in one of these formats.",
    )


def advise(train: Sequence[Example], tokenizer: Any) -> None:
    """Log the parser that serves the calls of the training examples, if they have any."""
    example = next((one for one in islice(train, SEARCHED) if task_of(one).calls), None)
    if example is None:
        return
    name = format_of([task_of(example)], tokenizer)
    if name is None:
        log.warning("dataset.train has calls of tools: %s. %s is not measured", UnknownFormat(), METRIC)
    else:
        log.info("dataset.train has calls of tools: spec.toolCallParser of an AdapterDeployment is %s", name)
