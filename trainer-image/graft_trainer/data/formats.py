"""The formats of a line (PURE): which fields an example is made of, and which fields are refused.

docs/datasets.md documents every field. A field that nothing reads is counted. A field that would change what the model
learns makes the line invalid if it has an effect.
"""

from collections.abc import Callable
from typing import Any

from graft.api.recipe import Columns, Dataset
from graft.prompttemplates import fill

from graft_trainer.data.example import Example
from graft_trainer.data.lines import BadLine, kind_of, shown
from graft_trainer.data.messages import LEARN, Message, checked, conversation, tools_of, unread_fields, with_system

Record = dict[str, Any]
CONVERSATIONS = ("messages", "conversations")
SYSTEM = ("system", "system_prompt")
PREFERENCE = "preference pairs are for DPO and its like. Write the better answer as the assistant's message"
MEDIA = "only text is read"
RENDERING = "the same arguments would have to come with every request. Remove the field"
TOKENS = "Graft tokenises the texts itself. Give the texts"
# Fields of a line that would change what the model reads or learns, and why they are refused.
REFUSED = {
    "chosen": PREFERENCE, "rejected": PREFERENCE, "kto_tag": PREFERENCE,
    "image": MEDIA, "images": MEDIA, "video": MEDIA, "videos": MEDIA, "audio": MEDIA, "audios": MEDIA,
    "documents": RENDERING, "chat_template": RENDERING, "chat_template_kwargs": RENDERING,
    "input_ids": TOKENS, "labels": TOKENS,
    "weight": "a weight is a field of a message, 0 or 1. Remove the line, or repeat it",
    "loss_weight": "all lines have the same weight. Remove the line, or repeat it",
}  # fmt: skip


def parser_of(spec: Dataset) -> Callable[[int, Record], Example]:
    """Return the function that makes an example of a line's object. It raises BadLine."""
    columns = spec.columns or Columns()
    template = spec.templates[0] if spec.templates else None

    def parse(line: int, record: Record) -> Example:
        if spec.format == "chat":
            example, read = _chat(line, record, columns)
        elif spec.format == "instruction":
            example, read = _instruction(line, record, columns, template)
        else:
            name = columns.text or "text"
            example, read = Example(line, text=_string(record, name)), {name}
        unread = {name for name, value in record.items() if name not in read and not _neutral(value)}
        for name in sorted(unread & REFUSED.keys()):
            if name != "weight" or isinstance(record[name], bool) or record[name] != 1:
                raise BadLine(f"{name}: {REFUSED[name]}")
        if "label" in unread and isinstance(record["label"], bool) and "prompt" in record:
            raise BadLine(f"label: {PREFERENCE}")
        return example.with_unread(unread | example.unread)

    return parse


def has_format(record: Record, spec: Dataset) -> bool:
    """Return whether a line of a suite looks like a line of the dataset."""
    columns = spec.columns or Columns()
    if spec.format == "chat":
        pair = isinstance(record.get("prompt"), list) and "completion" in record
        return pair or any(name in record for name in ([columns.messages] if columns.messages else CONVERSATIONS))
    if spec.format == "instruction":
        names = _names(record, columns)
        return names["instruction"] in record and names["output"] in record
    return (columns.text or "text") in record and not {"prompt", "messages"} & record.keys()


def _chat(line: int, record: Record, columns: Columns) -> tuple[Example, set[str]]:
    pair = (
        not columns.messages and isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list)
    )
    if pair and "messages" not in record:
        names = {"prompt", "completion"}
        messages = (
            *_unlearned(conversation(record["prompt"], "prompt")),
            *conversation(record["completion"], "completion"),
        )
        unread = unread_fields(record["prompt"], "prompt") | unread_fields(record["completion"], "completion")
    else:
        column = columns.messages or _first(record, *CONVERSATIONS)
        names, values = {column}, _field(record, column)
        messages, unread = conversation(values, column), unread_fields(values, column)
    messages = _with_system(record, messages)
    messages = checked(messages)
    example = Example(line, messages=messages, answer=messages[-1]["content"], tools=_tools(record))
    return example.with_unread(unread), {*names, *SYSTEM, "tools", "functions"}


def _instruction(line: int, record: Record, columns: Columns, template: str | None) -> tuple[Example, set[str]]:
    names = _names(record, columns)
    instruction, answer = _string(record, names["instruction"]), _string(record, names["output"])
    further = record.get(names["input"])
    further = "" if further is None else further
    if not isinstance(further, str):
        raise BadLine(f"{names['input']} is a {kind_of(further)}, not a text")
    read = {*names.values(), *SYSTEM, "history", "tools", "functions"}
    if template is not None:
        for name in (*SYSTEM, "history", "tools", "functions"):
            if not _neutral(record.get(name)):
                raise BadLine(
                    f"{name}: spec.dataset.templates have no place for it. Remove the field, or the templates"
                )
        asked = (instruction, further)
        return Example(line, prompt=fill(template, *asked), answer=answer, asked=asked), read
    question = f"{instruction}\n\n{further}" if further.strip() else instruction
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    messages = _with_system(record, (*_history(record.get("history")), *turns))
    return Example(line, messages=messages, answer=answer, tools=_tools(record)), read


def _names(record: Record, columns: Columns) -> dict[str, str]:
    """Return the names of the fields of an instruction in this line."""
    return {
        "instruction": columns.instruction or _first(record, "instruction", "prompt"),
        "input": columns.input or _first(record, "input", "context"),
        "output": columns.output or _first(record, "output", "completion", "response"),
    }


def _history(value: Any) -> list[Message]:
    """Return the earlier turns of an Alpaca line. Their answers are learned too, as in LLaMA-Factory."""
    if _neutral(value):
        return []
    if not isinstance(value, list):
        raise BadLine(f"history is a {kind_of(value)}, not a list of pairs (question, answer)")
    messages: list[Message] = []
    for index, pair in enumerate(value):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) and one.strip() for one in pair)
        ):
            raise BadLine(f"history[{index}] is {shown(pair)}, not a pair (question, answer) of texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _with_system(record: Record, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    for name in SYSTEM:
        messages = with_system(messages, record.get(name), name)
    return messages


def _tools(record: Record) -> tuple[dict[str, Any], ...] | None:
    return tools_of(record.get("tools"), record.get("functions"))


def _unlearned(messages: tuple[Message, ...]) -> list[Message]:
    return [message | {LEARN: False} if message["role"] == "assistant" else message for message in messages]


def _neutral(value: Any) -> bool:
    """Return whether a value says nothing. Exports of tables fill absent fields with such values."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _first(record: Record, *names: str) -> str:
    """Return the first name that the record has, or the first of all."""
    return next((name for name in names if name in record), names[0])


def _field(record: Record, name: str) -> Any:
    if name not in record:
        found = ", ".join(sorted(record)[:8]) or "none"
        raise BadLine(f"there is no field {name} (fields: {found})")
    return record[name]


def _string(record: Record, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise BadLine(f"{name} is a {kind_of(value)}, not a text")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    return value
