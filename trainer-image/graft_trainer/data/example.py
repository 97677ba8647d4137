"""One example of a dataset, as all later steps read it."""

from dataclasses import dataclass, replace
from typing import Any

from graft_trainer.data.messages import Message

Tool = dict[str, Any]  # in OpenAI's form: {"type": "function", "function": {"name": …}}


@dataclass(frozen=True, slots=True)
class Example:
    """One line: a conversation, a prompt with its answer, or a text. Exactly one of the three is set."""

    line: int
    messages: tuple[Message, ...] | None = None  # see messages.py; the last one is an answer to learn
    prompt: str | None = None
    answer: str | None = None  # the expected answer; of a conversation, the last message
    text: str | None = None
    asked: tuple[str, str] | None = None  # (instruction, input) that filled the template of the prompt
    tools: tuple[Tool, ...] | None = None  # the tools that a conversation's chat template gets
    unread: frozenset[str] = frozenset()  # fields of the line that nothing reads

    def with_unread(self, fields: set[str]) -> "Example":
        """Return the example with the names of the fields that nothing reads."""
        return replace(self, unread=frozenset(fields)) if fields else self
