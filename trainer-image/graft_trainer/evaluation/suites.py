"""Read the lines of suites (PURE): the valid forms of a line, its task, and the metrics for each kind of task.

Both prepare and train read the suites' files with this code.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

from graft.api.evaluation import Metric, Suite
from graft.api.recipe import Dataset
from graft.contracts.progress import Reason
from graft.toolcalls import Call, calls_of

from graft_trainer.data.conversation import unlearned
from graft_trainer.data.example import Example, Tool
from graft_trainer.data.formats import has_format, parser_of
from graft_trainer.data.lines import BadLine, bounded_lines, excerpt, record_of
from graft_trainer.data.messages import Message, conversation, tools_of
from graft_trainer.run.failures import Failure

Kind = Literal["answers", "calls", "choices", "text"]
MOST_TASKS = 100_000  # of a suite; they are held in memory. The largest known, HellaSwag, has 40,000
SHOWN = 5  # bad lines that a message shows; it counts all of them
ALLOWED: dict[Kind, tuple[Metric, ...]] = {
    "answers": ("exactMatch", "f1", "rouge1", "rouge2", "rougeL", "loss", "perplexity"),
    "calls": ("toolCallAccuracy", "loss", "perplexity"),
    "choices": ("accuracy", "exactMatch", "f1", "rouge1", "rouge2", "rougeL", "loss", "perplexity"),
    "text": ("loss", "perplexity"),
}
DEFAULTS: dict[Kind, tuple[Metric, ...]] = {
    "answers": ("exactMatch", "f1", "rougeL", "loss"),
    "calls": ("toolCallAccuracy", "loss"),
    "choices": ("accuracy",),
    "text": ("loss", "perplexity"),
}
MAIN: dict[Kind, Metric] = {"answers": "f1", "calls": "toolCallAccuracy", "choices": "accuracy", "text": "loss"}
SHAPES = (
    '{"prompt": "…", "answer": "…"} (or messages instead of prompt, or a list answers instead of answer), '
    '{"prompt": "…", "choices": ["…", "…"], "label": 0}, or the dataset\'s own format'
)


@dataclass(frozen=True)
class Task:
    """One question with its right answers: a conversation or a prompt to answer, or a text to predict.

    `answers`: each of them is right, and the loss covers the first. For a multiple choice, it has only the right
    choice. If the right answer calls tools, `final` is the message with the calls.
    """

    line: int
    messages: tuple[Message, ...] | None = None  # before the answer
    prompt: str | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # for a multiple choice; answers[0] is one of them
    text: str | None = None
    final: Message | None = None
    tools: tuple[Tool, ...] | None = None  # that the chat template gets

    @property
    def calls(self) -> list[Call]:
        """The calls of the right answer."""
        return list(calls_of(self.final or {}))

    @property
    def kind(self) -> Kind:
        if self.text is not None:
            return "text"
        if self.final is not None:
            return "calls"
        return "choices" if self.choices else "answers"

    def example(self, answer: str | None = None, *, earlier: bool = False) -> Example:
        """Return the task as an example of a dataset, with the given answer. The default is the first right answer.

        The loss covers this answer. With `earlier`, it also covers the answers before it that are learned in training.
        """
        if self.text is not None:
            return Example(self.line, text=self.text)
        final = self.final if answer is None else None
        answer = self.answers[0] if answer is None else answer
        if self.messages is None:
            return Example(self.line, prompt=self.prompt, answer=answer)
        before = self.messages if earlier else unlearned(self.messages)
        messages = (*before, final or {"role": "assistant", "content": answer})
        return Example(self.line, messages=messages, answer=answer, tools=self.tools)

    def as_chat(self) -> "Task":
        """Return the task with its plain prompt turned into a message of the user."""
        if self.prompt is None:
            return self
        return replace(self, prompt=None, messages=({"role": "user", "content": self.prompt},))

    def as_plain(self) -> "Task":
        """Return the task with its conversation turned into a plain prompt, for a model without a chat template."""
        if self.messages is None:
            return self
        contents = (str(message.get("content") or "") for message in self.messages)
        return replace(self, messages=None, prompt="\n\n".join(contents))

    @property
    def question(self) -> str:
        """The question as plain text."""
        return self.prompt if self.prompt is not None else str((self.messages or ({},))[-1].get("content", ""))


def task_of(example: Example) -> Task:
    """Return an example of a dataset as a task. The right answer is the last answer of the example."""
    if example.text is not None:
        return Task(example.line, text=example.text)
    answers = (example.answer or "",)
    if example.messages is not None:
        *before, last = example.messages
        final = last if last.get("tool_calls") else None
        return Task(example.line, messages=tuple(before), answers=answers, final=final, tools=example.tools)
    return Task(example.line, prompt=example.prompt, answers=answers)


def chat_prompts(dataset: Dataset) -> bool:
    """Return whether plain prompts go through the chat template. They do if the dataset's own examples do."""
    return dataset.format == "chat" or (dataset.format == "instruction" and not dataset.templates)


def metrics_of(suite: Suite, kind: Kind) -> tuple[Metric, ...]:
    """Return the metrics to compute for a suite of JSONL lines, in the spec's order."""
    return tuple(suite.metrics or DEFAULTS[kind])


def main_metric(suite: Suite, kind: Kind) -> Metric:
    """Return the suite's main metric: the first in the spec, or the default of the kind.

    For forgetting with answers, the default is the loss. It shows forgetting long before the answers become wrong. And
    if the base model never answers in the expected form, only the loss shows it.
    """
    if suite.metrics:
        return suite.metrics[0]
    return "loss" if kind == "answers" and suite.role == "forgetting" else MAIN[kind]


def read_suite(
    lines: Iterable[bytes], suite: Suite, dataset: Dataset, model: Literal["causal", "seq2seq"] = "causal"
) -> list[Task]:
    """Return the tasks of a suite's JSONL file, at most the first `limit`, for a model of the kind `model`.

    One invalid line makes the whole suite invalid, because its scores must be comparable. Raises
    Failure(DatasetInvalid) with the invalid lines and their number, or if the file is empty. Raises
    Failure(ConfigurationInvalid) if the lines do not support the suite's metrics or the model.
    """
    tasks: list[Task] = []
    bad: list[str] = []
    count = seen = 0
    for number, raw in enumerate(lines, start=1):
        content = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not content.strip():
            continue
        if suite.limit is not None and seen >= suite.limit:
            break
        if seen >= MOST_TASKS:
            raise Failure(
                Reason.CONFIGURATION_INVALID,
                f"spec.evaluation.suites {suite.name} ({suite.uri}) has more than {MOST_TASKS} lines",
                f"Set the suite's limit to at most {MOST_TASKS}, or use a smaller file.",
            )
        seen += 1
        try:
            task = _task(number, record_of(content), dataset)
            if tasks and task.kind != tasks[0].kind:
                raise BadLine(
                    f"has {task.kind}, but line {tasks[0].line} has {tasks[0].kind}; all lines of a suite must have the same kind"
                )
            tasks.append(task)
        except BadLine as error:
            count += 1
            if len(bad) < SHOWN:
                bad.append(f"line {number}: {error} — {excerpt(content)}")
    where = f"spec.evaluation.suites {suite.name} ({suite.uri})"
    if count:
        more = f"; and {count - len(bad)} more" if count > len(bad) else ""
        raise Failure(
            Reason.DATASET_INVALID,
            f"{where}: {count} of {seen} lines {'is' if count == 1 else 'are'} invalid: {'; '.join(bad)}{more}",
            f"Correct these lines. Each line must be {SHAPES}.",
        )
    if not tasks:
        raise Failure(
            Reason.DATASET_INVALID,
            f"{where} has no lines: the file is empty",
            "Put one JSON object per line into the file, or correct the URI.",
        )
    kind = tasks[0].kind
    if wrong := [name for name in suite.metrics or () if name not in ALLOWED[kind]]:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}: lines with {kind} do not support the metrics {', '.join(wrong)}",
            f"Set the suite's metrics to some of {', '.join(ALLOWED[kind])}, or remove them.",
        )
    if kind == "text" and model == "seq2seq":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}: the lines have text, but the base model is seq2seq, and such a model can only answer prompts",
            "Give the lines a prompt and an answer, or use a causal base model.",
        )
    return tasks


def suite_lines(stream: BinaryIO) -> Iterable[bytes]:
    """Return the lines of a suite's file for read_suite, each bounded."""
    return (line for _, line in bounded_lines(stream))


def check_data(lines: Iterable[bytes], suite: Suite) -> None:
    """Check the data of a user's own lm-eval task: every line is a JSON object within the bounds.

    The harness reads it with a library that ends the process at some nested lines. Raises Failure(DatasetInvalid).
    """
    for number, raw in enumerate(lines, start=1):
        content = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        try:
            if content.strip():
                record_of(content)
        except BadLine as error:
            raise Failure(
                Reason.DATASET_INVALID,
                f"spec.evaluation.suites {suite.name}: lmEval.data: line {number}: {error} — {excerpt(content)}",
                "Correct this line. Each line must be one JSON object.",
            ) from error


def needs_chat_template(tasks: Sequence[Task]) -> bool:
    """Return whether a task is a conversation. Only a model with a chat template can answer conversations."""
    return any(task.messages is not None for task in tasks)


def _task(line: int, record: dict[str, Any], dataset: Dataset) -> Task:
    if "choices" in record:
        messages, prompt = _question(record)
        choices, label = _choices(record)
        return Task(line, messages, prompt, (choices[label],), choices)
    if has_format(record, dataset) and not {"answer", "answers"} & record.keys():
        return task_of(parser_of(dataset)(line, record))
    messages, prompt = _question(record)
    tools = tools_of(record.get("tools"), record.get("functions"))
    if messages is not None and messages[-1]["role"] == "assistant" and not {"answer", "answers"} & record.keys():
        if len(messages) == 1:
            raise BadLine("there is no message before the answer")
        return task_of(Example(line, messages=messages, answer=messages[-1]["content"], tools=tools))
    return Task(line, messages, prompt, _answers(record), tools=tools)


def _question(record: dict[str, Any]) -> tuple[tuple[Message, ...] | None, str | None]:
    found = [name for name in ("prompt", "messages") if name in record]
    if len(found) != 1:
        fields = ", ".join(sorted(record)[:8]) or "none"
        raise BadLine(
            "has both prompt and messages" if found else f"has neither prompt nor messages (fields: {fields})"
        )
    if found == ["prompt"]:
        return None, _text(record["prompt"], "prompt")
    return conversation(record["messages"], "messages"), None


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    found = [name for name in ("answer", "answers") if name in record]
    if len(found) != 1:
        raise BadLine("has both answer and answers" if found else "has neither answer, answers nor choices")
    if found == ["answer"]:
        return (_text(record["answer"], "answer"),)
    return _texts(record["answers"], "answers", 1)


def _choices(record: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    choices = _texts(record["choices"], "choices", 2)
    if len(set(choices)) != len(choices):
        raise BadLine("choices has the same text twice")
    if "label" not in record:
        raise BadLine("there is no label; it must be the index (from 0) or the text of the right choice")
    label = record["label"]
    if isinstance(label, str):
        if label not in choices:
            raise BadLine(f"label {json.dumps(label, ensure_ascii=False)} is not one of the choices")
        return choices, choices.index(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise BadLine(
            f"label is {json.dumps(label)}; it must be the text of a choice or an index from 0 to {len(choices) - 1}"
        )
    return choices, label


def _texts(value: Any, name: str, least: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < least:
        raise BadLine(f"{name} must be a list of at least {least} text{'s' if least > 1 else ''}")
    return tuple(_text(item, f"{name}[{index}]") for index, item in enumerate(value))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadLine(f"{name} must be a text")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    return value
