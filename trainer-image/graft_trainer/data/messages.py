"""The messages and tools of a line (PURE): OpenAI's and ShareGPT's fields become what chat templates expect.

A template expects roles, contents that are texts, calls whose arguments are objects, and tools in OpenAI's form. What a
field means is documented in docs/datasets.md. A field that this module cannot read, and that would change what the model
learns, makes the line invalid. This module knows no files and no templates.
"""

import json
from collections.abc import Sequence
from typing import Any

from graft.bounded import OutOfBounds, parse_json
from graft.toolcalls import tool_for_template

from graft_trainer.data.lines import LINE, BadLine, kind_of, shown

Message = dict[str, Any]  # role, content, tool_calls and so on; LEARN is False if the loss must not cover it
LEARN = "learn"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MEANS = {"developer": "system", "function": "tool"}  # OpenAI's newer name of system, and its older name of tool
SPEAKERS = {  # ShareGPT's `from`
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
CALLERS = ("function_call", "tool_call")  # the value of such a turn is a call, or a list of calls
FLAGS = ("train", "training", "loss")  # of axolotl and ms-swift: true or false, as weight 1 or 0
# Fields of a message that change what the model reads or learns, with the values that have no effect.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (), "image": (), "images": (), "video": (), "videos": (), "audios": (), "train_detail": (),
    "training_detail": (), "loss_scale": (1,), "prefix": (False,),
}  # fmt: skip


READ = {
    "role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "refusal", "weight", *FLAGS, *REFUSED,
}  # fmt: skip


def for_template(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without the field that only Graft reads."""
    return [{name: value for name, value in message.items() if name != LEARN} for message in messages]


def conversation(values: Any, where: str) -> tuple[Message, ...]:
    """Return the messages of a list in OpenAI's form (role, content) or in ShareGPT's (from, value).

    Raises BadLine. `where` names the list in the message.
    """
    if not isinstance(values, list) or not values:
        raise BadLine(f"{where} must be a list of messages that is not empty")
    found = [_message(value, f"{where}[{index}]") for index, value in enumerate(values)]
    if any(isinstance(value, dict) and value.get("role") == "developer" for value in values):
        return _with_one_system(found)
    return tuple(found)


def checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation to train on: up to the last message that is learned. Raises BadLine if there is none."""
    last = messages[-1]["role"]
    if last != "assistant":
        raise BadLine(f"the last message is from {last}, not from assistant: there is no answer to train on")
    if all(message["role"] in {"assistant", "system"} for message in messages):
        raise BadLine("there is no user message before the answer")
    learned = [at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get(LEARN, True)]
    if not learned:
        raise BadLine("weight is 0 for every answer: there is no answer to train on")
    return tuple(messages[: learned[-1] + 1])


def with_system(messages: Sequence[Message], system: Any, name: str) -> tuple[Message, ...]:
    """Return the messages with the system message that another field of the line has."""
    if system in (None, ""):
        return tuple(messages)
    if not isinstance(system, str):
        raise BadLine(f"{name} is a {kind_of(system)}, not a text")
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and own != [system]:
        raise BadLine(f"{name} and the messages both have a system message. Keep one of them")
    return tuple(messages) if own else ({"role": "system", "content": system}, *messages)


def tools_of(tools: Any, functions: Any) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a line in OpenAI's form, or None. They can be given as JSON text, and as `functions`, the
    older name."""
    tools, functions = _decoded(tools, "tools"), _decoded(functions, "functions")
    if tools and functions:
        raise BadLine("has both tools and functions. Keep tools")
    where, found = ("tools", tools) if tools else ("functions", functions)
    if not found:
        return None
    if not isinstance(found, list):
        raise BadLine(f"{where} is a {kind_of(found)}, not a list")
    return tuple(_tool(tool, f"{where}[{index}]") for index, tool in enumerate(found))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise BadLine(f"{where} is a {kind_of(value)}, not an object with role and content")
    for name, neutral in REFUSED.items():
        if value.get(name) not in (None, [], "", *neutral):
            raise BadLine(f"{where}.{name} is not supported: only text is read, and each message is learned or not")
    if "from" in value and "role" not in value:
        return _of_sharegpt(value, where)
    role = value.get("role")
    if role not in ROLES:
        raise BadLine(f"{where}.role is {shown(role)}, not one of {', '.join(ROLES)}")
    message: Message = {"role": MEANS.get(role, role), "content": ""}
    calls = _calls_of(value, where)
    if calls and role != "assistant":
        raise BadLine(f"{where}.tool_calls: only the assistant calls tools, and the role is {role}")
    message["content"] = _content(value, where, empty=bool(calls) or message["role"] == "tool")
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if value.get(name) is not None:
            if not isinstance(value[name], str):
                raise BadLine(f"{where}.{name} is a {kind_of(value[name])}, not a text")
            message[name] = value[name]
    read = {*message, *FLAGS, *REFUSED, "tool_calls", "function_call", "weight", "refusal", LEARN}
    # Templates may read further fields, such as reasoning_content.
    message |= {name: one for name, one in value.items() if name not in read and one is not None}
    return message | _flag(value, message["role"], where)


def _of_sharegpt(value: dict[str, Any], where: str) -> Message:
    speaker = value["from"]
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadLine(f"{where}.from is {shown(speaker)}, not one of {', '.join(SPEAKERS)}")
    message: Message = {"role": role, "content": ""}
    if speaker in CALLERS:
        calls = _decoded(value.get("value"), f"{where}.value")
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_call(call, f"{where}.value") for call in calls]
    else:
        message["content"] = _content(value, where, key="value", empty=role == "tool")
    return message | _flag(value, role, where)


def unread_fields(values: Sequence[Any], where: str) -> set[str]:
    """Return the fields of messages that only a chat template may read, as `messages[].name`. It gets those of OpenAI's
    messages, and not those of ShareGPT's."""
    turns = [value for value in values if isinstance(value, dict)]
    return {f"{where}[].{name}" for turn in turns for name, one in turn.items() if name not in READ and one is not None}


def _content(value: dict[str, Any], where: str, *, key: str = "content", empty: bool) -> str:
    content = value.get(key)
    if content in (None, "") and isinstance(value.get("refusal"), str):  # OpenAI: the assistant declines
        content = value["refusal"]
    if isinstance(content, list) and content:
        # Joined as vLLM and Graft's engine join the parts of a request.
        content = "\n".join(_part(part, f"{where}.{key}[{index}]") for index, part in enumerate(content))
    if content in (None, []) and empty:
        return ""
    if not isinstance(content, str):
        problem = f"is a {kind_of(content)}, not a text" if key in value else "is missing"
        raise BadLine(f"{where}.{key} {problem}")
    if not content.strip() and not empty:
        raise BadLine(f"{where}.{key} is empty")
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise BadLine(f"{where} is a {kind_of(part)}, not a part with type and text")
    kind = part.get("type")
    text = part.get(kind) if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise BadLine(f"{where} has the type {shown(kind)}: only parts of the type text, with a text, are supported")
    return text


def _calls_of(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls, older = _decoded(value.get("tool_calls"), f"{where}.tool_calls"), value.get("function_call")
    if calls and older:
        raise BadLine(f"{where} has both tool_calls and function_call. Keep tool_calls")
    if older:
        return [_call(older, f"{where}.function_call")]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadLine(f"{where}.tool_calls is a {kind_of(calls)}, not a list")
    return [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(value: Any, where: str) -> dict[str, Any]:
    """Return a call in OpenAI's form, with its arguments as an object."""
    if not isinstance(value, dict):
        raise BadLine(f"{where} is a {kind_of(value)}, not a call with name and arguments")
    if value.get("type") not in (None, "function"):
        raise BadLine(f"{where}.type is {shown(value['type'])}, not function")
    function = value.get("function", value)
    where = f"{where}.function" if "function" in value else where
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadLine(f"{where} has no name of a tool")
    if "arguments" not in function and "parameters" in function:
        raise BadLine(f"{where} has parameters. The field must be named arguments")
    arguments = _decoded(function.get("arguments"), f"{where}.arguments")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadLine(f"{where}.arguments is a {kind_of(arguments)}, not an object, and not JSON text of an object")
    _check_numbers(arguments, f"{where}.arguments")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if value.get("id") is None:
        return call
    if not isinstance(value["id"], str):
        raise BadLine(f"{where}.id is a {kind_of(value['id'])}, not a text")
    return {"id": value["id"]} | call


def _tool(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadLine(f"{where} is a {kind_of(value)}, not a tool")
    if value.get("type") not in (None, "function") and "function" in value:
        raise BadLine(f"{where}.type is {shown(value['type'])}, not function")
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadLine(
            f"{where} has no name: it must be {{type: function, function: {{name, description, parameters}}}}"
        )
    _check_numbers(function, where)
    return tool_for_template({name: one for name, one in function.items() if name != "type"})


def _check_numbers(value: Any, where: str) -> None:
    """Raise BadLine for NaN and Infinity, which Python's reader accepts: no client could send or read them."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise BadLine(f"{where} has NaN or an infinite number, which are not JSON") from error


def _decoded(value: Any, where: str) -> Any:
    """Return the value, or the value of its JSON text. Empty text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value.encode(), LINE, where)
    except OutOfBounds as error:
        raise BadLine(str(error)) from error


def _flag(value: dict[str, Any], role: str, where: str) -> dict[str, bool]:
    """Return {LEARN: False} if a field says that the loss must not cover the message, else nothing."""
    said = {}
    if (weight := value.get("weight")) is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise BadLine(f"{where}.weight is {shown(weight)}, not 0 or 1")
        said["weight"] = weight == 1
    for name in FLAGS:
        if (flag := value.get(name)) is not None:
            if not isinstance(flag, bool):
                raise BadLine(f"{where}.{name} is {shown(flag)}, not true or false")
            said[name] = flag
    if len(set(said.values())) > 1:
        raise BadLine(f"{where}: {' and '.join(said)} contradict each other")
    if role != "assistant":
        if any(said.values()):
            raise BadLine(f"{where}.{next(iter(said))}: only messages of the assistant can be learned")
        return {}
    return {LEARN: False} if False in said.values() else {}


def _with_one_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with one system message, the first. vLLM merges them too if a request has a developer's."""
    system = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    return (system[0] | {"content": "\n\n".join(message["content"] for message in system)}, *rest)
