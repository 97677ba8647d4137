"""The messages of a chat: their bounds, and their fields that reach an engine (PURE).

An engine downloads the pictures whose addresses it gets, and it loads tensors that a message contains. So only text, and
media that the message itself contains, are passed on.
"""

import json
from collections.abc import Mapping
from typing import Any

from graft_server.gateway.errors import bad_request

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_NAME = 256  # characters of a role, a name or an id
MAX_TOOL_CALLS = 256  # of one message

TEXT_PARTS = {"text": "text", "refusal": "refusal"}  # type of the part -> key of its text
MEDIA_PARTS = ("image_url", "audio_url", "video_url")
STRINGS = ("role", "name", "tool_call_id")
TEXTS = ("refusal", "reasoning", "reasoning_content")


def size(value: Any, most: int) -> int:
    """Return the number of characters of a value as JSON. The number is exact up to `most`. A larger number only means:
    more than `most`.

    It does not recurse: the reader of the request has bounded the depth, and this walk stops at `most`.
    """
    total, left = 0, [value]
    while left and total <= most:
        one = left.pop()
        if isinstance(one, dict):
            total += 2 + sum(len(name) + 4 for name in one)
            left += one.values()
        elif isinstance(one, list):
            total += 2 + len(one)
            left += one
        else:
            total += len(one) + 2 if isinstance(one, str) else len(json.dumps(one))
    return total


def check(value: Any) -> str | None:
    """Return what the list of messages must be, or None if it is valid. `passed_on` checks each message."""
    if isinstance(value, list) and len(value) <= MAX_MESSAGES:
        return None
    return f"a list of at most {MAX_MESSAGES} messages"


def passed_on(messages: list[Any]) -> list[dict[str, Any]]:
    """Return the messages as the engine gets them. Raises ApiError 400 that names the message and its field."""
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, "an object")
    passed: dict[str, Any] = {}
    for name, value in message.items():
        if name in STRINGS:
            if value is not None and not (isinstance(value, str) and len(value) <= MAX_NAME):
                raise _wrong(f"{where}.{name}", f"a string of at most {MAX_NAME} characters")
        elif name in TEXTS:
            if value is not None and not isinstance(value, str):
                raise _wrong(f"{where}.{name}", "a string")
        elif name == "content":
            value = _content(value, f"{where}.content")
        elif name == "tool_calls":
            value = _tool_calls(value, f"{where}.tool_calls")
        elif name == "function_call":
            value = None if value is None else _called(value, f"{where}.function_call")
        elif isinstance(value, (dict, list)):
            continue  # SDKs repeat parts of answers here, such as annotations and audio; no template reads them
        passed[name] = value  # templates may read further fields of a message
    return passed


def _content(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > MAX_PARTS:
        raise _wrong(where, f"a string, or a list of at most {MAX_PARTS} parts")
    return [_part(part, f"{where}[{at}]") for at, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in TEXT_PARTS:
        if not isinstance(part.get(TEXT_PARTS[kind]), str):
            raise _wrong(f"{where}.{TEXT_PARTS[kind]}", "a string")
        return {"type": kind, TEXT_PARTS[kind]: part[TEXT_PARTS[kind]]}
    if kind in MEDIA_PARTS:
        media = part.get(kind)
        url = media.get("url") if isinstance(media, dict) else None
        if not (isinstance(url, str) and url[:5].lower() == "data:"):
            raise _wrong(f"{where}.{kind}.url", "a data: URL, because engines download nothing for clients")
        detail = {"detail": media["detail"]} if media.get("detail") in ("auto", "low", "high") else {}
        return {"type": kind, kind: {"url": url, **detail}}
    if kind == "input_audio":
        audio = part.get(kind)
        if not (
            isinstance(audio, dict)
            and isinstance(audio.get("data"), str)
            and isinstance(audio.get("format"), str)
            and audio["format"].isalnum()
            and len(audio["format"]) <= 16
        ):
            raise _wrong(f"{where}.{kind}", 'an object {"data": "<base64>", "format": "wav"}')
        return {"type": kind, kind: {"data": audio["data"], "format": audio["format"]}}
    allowed = ", ".join([*TEXT_PARTS, *MEDIA_PARTS, "input_audio"])
    raise _wrong(f"{where}.type", f"one of {allowed}")


def _tool_calls(calls: Any, where: str) -> Any:
    if calls is None:
        return None
    if not isinstance(calls, list) or len(calls) > MAX_TOOL_CALLS:
        raise _wrong(where, f"a list of at most {MAX_TOOL_CALLS} calls")
    passed = []
    for at, call in enumerate(calls):
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            raise _wrong(f"{where}[{at}]", 'an object {"id": "…", "type": "function", "function": {…}}')
        if not (call.get("id") is None or (isinstance(call["id"], str) and len(call["id"]) <= MAX_NAME)):
            raise _wrong(f"{where}[{at}].id", f"a string of at most {MAX_NAME} characters")
        function = _called(call.get("function"), f"{where}[{at}].function")
        passed.append({**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function})
    return passed


def _called(function: Any, where: str) -> Mapping[str, Any]:
    """Return the name and the arguments of a call. OpenAI's clients send the arguments as JSON text."""
    if (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and len(function["name"]) <= MAX_NAME
        and isinstance(function.get("arguments"), (str, dict, type(None)))
    ):
        return {name: function[name] for name in ("name", "arguments") if name in function}
    raise _wrong(where, 'an object {"name": "…", "arguments": "…"}')


def _wrong(where: str, wanted: str) -> Exception:
    return bad_request(f"{where}: it must be {wanted}.", "messages")
