"""One example of a dataset, as all later steps read it."""

from dataclasses import dataclass, replace
from typing import Any

from graft_trainer.data.messages import Message

NAME = 64  # bytes of a field's name in a message
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
    unread: frozenset[str] = frozenset()  # fields of the line that only a chat template may read

    def with_unread(self, fields: set[str]) -> "Example":
        """Return the example with the names of the fields that only a chat template may read."""
        return replace(self, unread=frozenset(map(_named, fields))) if fields else self


def _named(field: str) -> str:
    """Return the name of a field for a message. A stranger's name can have any length and any characters."""
    text = field if field.isprintable() else ascii(field)
    return text.encode(errors="replace")[:NAME].decode(errors="ignore")
