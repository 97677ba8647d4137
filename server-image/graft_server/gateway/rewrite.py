"""The engine's answers in the client's words (PURE): its model name, and whose adapter answered.

A plain answer gets a `graft` object. A stream gets it in its first chunk only; every chunk carries the client's model name.
"""

import json
from typing import Any

LINE_LIMIT = 1 << 20  # a line longer than this is passed on as it is
DONE = b"[DONE]"


TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")


class Words:
    """What is put in: the name the client asked for, the `graft` object, and the tokens of earlier steps."""

    def __init__(self, model: str, graft: dict[str, Any], spent: dict[str, int] | None = None) -> None:
        self.model = model
        self.graft = graft
        self.spent = spent or {}

    def rename(self, event: dict[str, Any]) -> None:
        """The client's name of the model, and all tokens that the answer took."""
        event["model"] = self.model
        usage = event.get("usage")
        if self.spent and isinstance(usage, dict):
            event["usage"] = add_usage(usage, self.spent)


def add_usage(usage: dict[str, Any], spent: dict[str, int]) -> dict[str, Any]:
    """OpenAI's usage object with the counts of another one added."""
    return usage | {name: int(usage.get(name) or 0) + spent.get(name, 0) for name in TOKENS}


def rewrite_answer(body: bytes, words: Words) -> bytes:
    """A complete JSON answer. ValueError when it is none."""
    answer = json.loads(body)
    if not isinstance(answer, dict):
        raise ValueError("the engine's answer is no JSON object")
    words.rename(answer)
    answer["graft"] = words.graft
    return _dump(answer)


class StreamRewriter:
    """Server-sent events, line by line as they arrive: what is complete is passed on at once."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._rest = b""
        self._first = True
        self._passing = False  # the rest of an overlong line
        self.done = False  # data: [DONE] was seen

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now; an incomplete last line waits for its end."""
        if self._passing:
            end = data.find(b"\n")
            if end < 0:
                return data
            self._passing = False
            return data[: end + 1] + self.feed(data[end + 1 :])
        *lines, self._rest = (self._rest + data).split(b"\n")
        passed = b"".join(self._line(line) + b"\n" for line in lines)
        if len(self._rest) > LINE_LIMIT:
            self._passing = True
            passed, self._rest = passed + self._rest, b""
        return passed

    def rest(self) -> bytes:
        """What is left at the end of the stream."""
        left, self._rest = self._rest, b""
        return self._line(left) if left else b""

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:"):
            return line
        value = line[5:].strip()
        if value == DONE:
            self.done = True
            return line
        try:
            event = json.loads(value)
        except (ValueError, RecursionError):
            return line
        if not isinstance(event, dict) or "error" in event:
            return line
        self._words.rename(event)
        if self._first:
            self._first = False
            event["graft"] = self._words.graft
        return b"data: " + _dump(event) + (b"\r" if line.endswith(b"\r") else b"")


def error_event(error: dict[str, Any]) -> bytes:
    """The last event of a stream that broke. No [DONE] follows, so no client takes the answer for complete."""
    return b"data: " + _dump(error) + b"\n\n"


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
