"""The suites' lines (PURE): what a line must look like, the task that it is, and which metrics tasks of its kind have.

Both prepare and train read the files with this code, as they do the dataset's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from graft.api.evaluation import Metric, Suite
from graft.api.recipe import Columns, Dataset
from graft.contracts.progress import Reason

from graft_trainer.data.dataset import BadLine, Example, Message, excerpt, parser_of, record_of
from graft_trainer.run.failures import Failure

Kind = Literal["answers", "choices", "text"]
SHOWN = 5  # bad lines that a message shows; all are counted
ASKING = ("system", "user", "assistant", "tool")
ALLOWED: dict[Kind, tuple[Metric, ...]] = {
    "answers": ("exactMatch", "f1", "rouge1", "rouge2", "rougeL", "loss", "perplexity"),
    "choices": ("accuracy", "exactMatch", "f1", "rouge1", "rouge2", "rougeL", "loss", "perplexity"),
    "text": ("loss", "perplexity"),
}
DEFAULTS: dict[Kind, tuple[Metric, ...]] = {
    "answers": ("exactMatch", "f1", "rougeL", "loss"),
    "choices": ("accuracy",),
    "text": ("loss", "perplexity"),
}
MAIN: dict[Kind, Metric] = {"answers": "f1", "choices": "accuracy", "text": "loss"}
SHAPES = (
    '{"prompt": "…", "answer": "…"} (or messages instead of prompt, answers with a list), '
    '{"prompt": "…", "choices": ["…", "…"], "label": 0}, or the dataset\'s own format'
)


@dataclass(frozen=True)
class Task:
    """One question and what is right: a conversation or a prompt that is to be answered, or a text to predict.

    `answers`: any of them is right, the loss is that of the first; of a multiple choice the right one alone.
    """

    line: int
    messages: tuple[Message, ...] | None = None  # up to the answer
    prompt: str | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a multiple choice; answers[0] is one of them
    text: str | None = None

    @property
    def kind(self) -> Kind:
        if self.text is not None:
            return "text"
        return "choices" if self.choices else "answers"

    def example(self, answer: str | None = None) -> Example:
        """The task as a line of the dataset with one of its answers, the first when none is given."""
        if self.text is not None:
            return Example(self.line, text=self.text)
        answer = self.answers[0] if answer is None else answer
        if self.messages is None:
            return Example(self.line, prompt=self.prompt, answer=answer)
        return Example(self.line, messages=(*self.messages, {"role": "assistant", "content": answer}), answer=answer)

    def as_chat(self) -> "Task":
        """The task with a plain prompt as the message of a user."""
        if self.prompt is None:
            return self
        return replace(self, prompt=None, messages=({"role": "user", "content": self.prompt},))

    def as_plain(self) -> "Task":
        """The task with a conversation as a plain prompt, as a model without a chat template is asked."""
        if self.messages is None:
            return self
        contents = (str(message.get("content") or "") for message in self.messages)
        return replace(self, messages=None, prompt="\n\n".join(contents))

    @property
    def question(self) -> str:
        """What is asked, for people."""
        return self.prompt if self.prompt is not None else str((self.messages or ({},))[-1].get("content", ""))


def task_of(example: Example) -> Task:
    """A line of the dataset as a task: the answer is what the model should say last."""
    if example.text is not None:
        return Task(example.line, text=example.text)
    answers = (example.answer or "",)
    if example.messages is not None:
        return Task(example.line, messages=example.messages[:-1], answers=answers)
    return Task(example.line, prompt=example.prompt, answers=answers)


def chat_prompts(dataset: Dataset) -> bool:
    """Whether plain prompts go through the chat template: the dataset's own examples do."""
    return dataset.format == "chat" or (dataset.format == "instruction" and not dataset.templates)


def metrics_of(suite: Suite, kind: Kind) -> tuple[Metric, ...]:
    """What is computed for a suite of JSONL lines, in the spec's order."""
    return tuple(suite.metrics or DEFAULTS[kind])


def main_metric(suite: Suite, kind: Kind) -> Metric:
    """The metric that stands for the suite: the first that the spec lists, or the kind's own.

    What was forgotten shows in the loss long before answers are wrong, and of a base model that never gives an answer in the
    expected form it shows nowhere else.
    """
    if suite.metrics:
        return suite.metrics[0]
    return "loss" if kind == "answers" and suite.role == "forgetting" else MAIN[kind]


def read_suite(
    lines: Iterable[bytes], suite: Suite, dataset: Dataset, model: Literal["causal", "seq2seq"] = "causal"
) -> list[Task]:
    """The tasks of a suite's JSONL file, the first `limit` of them, for a model of that kind.

    A suite is a yardstick: one bad line refuses it. Failure(DatasetInvalid) names the bad lines and counts them;
    Failure(ConfigurationInvalid) when the lines do not have the metrics that the suite asks for.
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
        seen += 1
        try:
            task = _task(number, record_of(content), dataset)
            if tasks and task.kind != tasks[0].kind:
                raise BadLine(
                    f"has {task.kind}, line {tasks[0].line} has {tasks[0].kind}; a suite has lines of one kind"
                )
            tasks.append(task)
        except BadLine as error:
            count += 1
            if len(bad) < SHOWN:
                bad.append(f"line {number}: {error} — {excerpt(content)}")
    where = f"evaluation.suites {suite.name} ({suite.uri})"
    if count:
        more = f"; and {count - len(bad)} more" if count > len(bad) else ""
        raise Failure(
            Reason.DATASET_INVALID,
            f"{where}: {count} of {seen} lines {'is' if count == 1 else 'are'} invalid: {'; '.join(bad)}{more}",
            f"Correct these lines; each is {SHAPES}.",
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
            f"{where}: lines with {kind} have no {', '.join(wrong)}",
            f"Ask for {', '.join(ALLOWED[kind])}, or leave metrics out.",
        )
    if kind == "text" and model == "seq2seq":
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}: lines with text, and the base model is seq2seq: it answers prompts",
            "Give the lines a prompt and an answer, or use a causal base model.",
        )
    return tasks


def needs_chat_template(tasks: Sequence[Task]) -> bool:
    """Whether some task is a conversation, which only a model with a chat template can be asked."""
    return any(task.messages is not None for task in tasks)


def _task(line: int, record: dict[str, Any], dataset: Dataset) -> Task:
    if "choices" in record:
        messages, prompt = _question(record)
        choices, label = _choices(record)
        return Task(line, messages, prompt, (choices[label],), choices)
    if _own_format(record, dataset):
        task = task_of(parser_of(dataset)(line, record))
        if task.text is None and not task.answers[0].strip():
            raise BadLine("the last message has no text to compare an answer with")
        return task
    messages, prompt = _question(record)
    if messages is not None and messages[-1]["role"] == "assistant" and not {"answer", "answers"} & record.keys():
        if len(messages) == 1:
            raise BadLine("there is no message before the answer")
        return Task(line, messages[:-1], answers=(str(messages[-1]["content"]),))
    return Task(line, messages, prompt, _answers(record))


def _own_format(record: dict[str, Any], dataset: Dataset) -> bool:
    columns = dataset.columns or Columns()
    if dataset.format == "instruction":
        return {columns.instruction or "instruction", columns.output or "output"} <= record.keys()
    if dataset.format == "chat":
        return (columns.messages or "messages") in record and not {"answer", "answers"} & record.keys()
    return (columns.text or "text") in record and not {"prompt", "messages"} & record.keys()


def _question(record: dict[str, Any]) -> tuple[tuple[Message, ...] | None, str | None]:
    found = [name for name in ("prompt", "messages") if name in record]
    if len(found) != 1:
        fields = ", ".join(sorted(record)[:8]) or "none"
        raise BadLine(
            "has both prompt and messages" if found else f"has neither prompt nor messages (fields: {fields})"
        )
    if found == ["prompt"]:
        return None, _text(record["prompt"], "prompt")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadLine("messages must be a list that is not empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ASKING:
            raise BadLine(f"messages[{index}] must be an object with a role of {', '.join(ASKING)}")
        _text(message.get("content"), f"messages[{index}].content")
    return tuple(messages), None


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
        raise BadLine("there is no label, the index (from 0) or the text of the right choice")
    label = record["label"]
    if isinstance(label, str):
        if label not in choices:
            raise BadLine(f"label {json.dumps(label, ensure_ascii=False)} is none of the choices")
        return choices, choices.index(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise BadLine(
            f"label is {json.dumps(label)}, not the text of a choice or an index from 0 to {len(choices) - 1}"
        )
    return choices, label


def _texts(value: Any, name: str, least: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < least:
        raise BadLine(f"{name} must be a list of at least {least} text{'s' if least > 1 else ''}")
    return tuple(_text(item, f"{name}[{index}]") for index, item in enumerate(value))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadLine(f"{name} is not a text")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    return value
