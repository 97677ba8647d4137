"""The context of the answers: what the chat template leaves out of the messages and tools before them (PURE).

A template that does not know tools renders a conversation without them, and says nothing. Marks in the texts show what it
renders. conversation.py checks the answers themselves.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from graft_trainer.data.chat import Chat, at_end, chat_of
from graft_trainer.data.example import Example
from graft_trainer.data.lines import BadLine
from graft_trainer.data.messages import Message, for_template

MARK = "\ufdd5"  # see graft.controltokens: reserved code points mark places in a text
SEARCHED = 10_000  # examples among which those with a field are looked for
TRIED = 8  # examples with a field that are rendered without it
Probe = tuple[str, str, str]  # (the mark, what has it, the remedy)
TOOLS = (
    "Use a base model whose chat template knows tools. Or describe the tools in the system message, and remove tools from "
    "the lines."
)
CALLS = "Use a base model whose chat template knows calls of tools, or write the calls into the content."
CONTENT = "Use a base model whose chat template knows this role, or write the content into a message of the user."


def check_context(messages: Sequence[Message], tools: Sequence[Any] | None, chat: Chat) -> None:
    """Raise BadLine if the template leaves out a tool, a message that is not the assistant's, or a call."""
    if not tools and len(messages) <= 2 and not any(message.get("tool_calls") for message in messages):
        return  # a question and its answer
    probes: list[Probe] = []
    marked_tools = [_tool(tool, index, probes) for index, tool in enumerate(tools or ())] or None
    marked = [_message(message, index, probes) for index, message in enumerate(messages)]
    try:
        text = chat.render(marked, marked_tools, prompt=False)
    except BadLine:
        return  # the template reads the words, so marks in them change what it does
    for mark, what, remedy in probes:
        if mark not in text:
            raise BadLine(f"the base model's chat template leaves out {what}", "notRendered", remedy)


def check_pair(example: Example, tokenizer: Any) -> None:
    """Raise BadLine if a part of a conversation would reach neither the encoder nor the decoder of a seq2seq model."""
    messages = for_template(example.messages or ())
    if messages and messages[-1].get("tool_calls"):
        raise BadLine(
            f"messages[{len(messages) - 1}] calls tools, but a seq2seq model is trained on the content of the answer only",
            "notRendered",
            "Write the calls into the content, or use a causal base model.",
        )
    if example.tools and not tokenizer.chat_template:
        raise BadLine("the base model has no chat template that shows tools to it", "notRendered", TOOLS)
    if messages and tokenizer.chat_template:
        check_context(messages, example.tools, chat_of(tokenizer))


def plain_prompt(example: Example) -> str:
    """Return the prompt as plain text, for a seq2seq model without a chat template: the contents of the messages, no
    marks."""
    before = (example.messages or ())[:-1]
    if any(message["role"] in {"assistant", "tool"} for message in before):
        raise BadLine(
            "a conversation of several turns, but the base model has no chat template to separate the turns",
            "templateRefuses",
            "Use conversations of one question and one answer, set spec.dataset.format to instruction, or use a base model with a chat template.",
        )
    return "\n\n".join(str(message.get("content") or "") for message in before)


def unused(fields: Mapping[str, int], examples: Iterable[Example], tokenizer: Any) -> dict[str, int]:
    """Return those of the fields that the chat template does not use, either.

    A template uses a field of a message, `messages[].name`, if it renders a conversation differently without it.
    """
    names = {field: field.rpartition("[].")[2] for field in fields if "[]." in field and tokenizer.chat_template}
    used: set[str] = set()
    tried: Counter[str] = Counter()
    for example in islice(examples, SEARCHED):
        undecided = [field for field in names if field not in used and tried[field] < TRIED]
        if not undecided:
            break
        for field in undecided:
            if any(names[field] in message for message in example.messages or ()):
                tried[field] += 1
                used |= {field} if _uses(names[field], example, chat_of(tokenizer)) else set()
    return {field: lines for field, lines in fields.items() if field not in used}


def _uses(name: str, example: Example, chat: Chat) -> bool:
    """Return whether the template renders the example differently without a field of its messages."""
    messages = for_template(example.messages or ())
    without = [{key: value for key, value in message.items() if key != name} for message in messages]
    tools = list(example.tools) if example.tools else None
    try:
        return chat.render(messages, tools, prompt=False) != chat.render(without, tools, prompt=False)
    except BadLine:
        return True  # the template needs the field


def _tool(tool: Any, index: int, probes: list[Probe]) -> Any:
    function = tool["function"]
    mark = _mark(f"t{index}", f"tools[{index}] ({function['name']})", TOOLS, probes)
    return tool | {"function": function | {"name": function["name"] + mark}}


def _message(message: Message, index: int, probes: list[Probe]) -> Message:
    where = f"messages[{index}]"
    if message["role"] != "assistant":
        text = message["content"]
        if not text.strip():
            return message
        mark = _mark(f"m{index}", f"the content of {where}, whose role is {message['role']}", CONTENT, probes)
        return message | {"content": at_end(text, mark)}
    if not message.get("tool_calls"):
        return message
    calls = []
    for at, call in enumerate(message["tool_calls"]):
        function, what = call["function"], f"{where}.tool_calls[{at}]"
        name = function["name"] + _mark(f"n{index}.{at}", f"the name in {what}", CALLS, probes)
        arguments = function["arguments"]
        if arguments:
            first = next(iter(arguments))
            mark = _mark(f"a{index}.{at}", f"the arguments in {what}", CALLS, probes)
            arguments = {first + mark if key == first else key: value for key, value in arguments.items()}
        calls.append(call | {"function": function | {"name": name, "arguments": arguments}})
    return message | {"tool_calls": calls}


def _mark(place: str, what: str, remedy: str, probes: list[Probe]) -> str:
    mark = f"{MARK}{place}{MARK}"
    probes.append((mark, what, remedy))
    return mark
