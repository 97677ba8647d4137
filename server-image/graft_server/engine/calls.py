"""Calls of tools in chats: as chat templates read them in messages, and as clients get them in answers.

The formats of the calls are those of graft.toolcalls. This module knows no tokens and no routes.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from graft.bounded import Limits, OutOfBounds, parse_json
from graft.toolcalls import PARSERS, Call, CallReader

from graft_server.engine.protocol import ChatRequest, bad_request
from graft_server.engine.shapes import Choice

ID_CHARACTERS = string.ascii_letters + string.digits
ARGUMENTS = Limits(1 << 20, depth=32, values=20_000)  # of one call that a client sends back as JSON text


def check_request(request: ChatRequest, parser: str | None) -> None:
    """Raise ApiError 400 if the request asks for calls that this engine cannot give."""
    if request.tool_choice not in (None, "none", "auto"):
        raise bad_request(
            'tool_choice: this engine supports "none" and "auto". It cannot force a call. Send "auto", or serve with vLLM: '
            "set spec.engine of the AdapterDeployment to vllm.",
            "tool_choice",
        )
    if request.tool_choice == "auto" and not request.tools:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if request.reads_calls and parser is None:
        raise bad_request(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set. For an '
            'AdapterDeployment, set spec.toolCallParser. Or send tool_choice: "none".',
            "tool_choice",
        )


class CallsOfChoice:
    """The words and the calls of one choice of an answer."""

    def __init__(self, parser: str, *, parallel: bool) -> None:
        self._name = parser
        self._reader = CallReader(PARSERS[parser])
        self._parallel = parallel

    def split(self, piece: Choice) -> None:
        """Leave only words in the text of a piece. The last piece gets the calls."""
        piece.text = self._reader.push(piece.text)
        if piece.finish_reason is None:
            return
        rest, calls = self._reader.finish()
        piece.text += rest
        piece.calls = [self._wire(call) for call in (calls if self._parallel else calls[:1])]
        if piece.calls:
            piece.finish_reason = "tool_calls"

    def _wire(self, call: Call) -> dict[str, Any]:
        # Mistral's chat templates accept only ids of nine letters and digits.
        short = "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))
        name = short if self._name == "mistral" else f"chatcmpl-tool-{secrets.token_hex(16)}"
        function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        return {"id": name, "type": "function", "function": function}


def for_template(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return the messages as the chat template expects them, with vLLM's rules: the arguments of calls are objects, and
    the role developer is system if the template does not know it. Then all system messages become one, the first.

    Raises ApiError 400 if a call has no function.
    """
    made = [_with_objects(message, f"messages[{at}]") for at, message in enumerate(messages)]
    if not any(message["role"] == "developer" for message in made) or any(
        f"{quote}developer{quote}" in template for quote in "\"'"
    ):
        return made
    system = [message["content"] for message in made if message["role"] in ("system", "developer")]
    rest = [message for message in made if message["role"] not in ("system", "developer")]
    return [{"role": "system", "content": "\n\n".join(text for text in system if text)}, *rest]


def _with_objects(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = dict(message)
    calls = made.get("tool_calls")
    if not calls:
        made.pop("tool_calls", None)  # templates ask whether the field is there
        return made
    if not isinstance(calls, list):
        raise bad_request(f"{where}.tool_calls: it must be a list", "messages")
    made["tool_calls"] = [_with_object(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return made


def _with_object(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise bad_request(f'{where}: it must be {{"type": "function", "function": {{…}}}}', "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments.encode(), ARGUMENTS, f"{where}.function.arguments")
        except OutOfBounds:
            # A model wrote this text in an earlier turn. To refuse it would end the conversation; vLLM reads {}, too.
            arguments = {}
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}}
