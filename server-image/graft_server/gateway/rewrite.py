"""The engine's answers in the client's words (PURE): its model name, and whose adapter answered.

A plain answer gets a `graft` object. A stream gets it in its first chunk only; every chunk carries the client's model name. A stream
that broke can go on with another replica's answer to the same request, as far as that one says again what was said already.
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


class Differs(Exception):
    """Another replica's answer is not the one that was begun."""


class StreamRewriter:
    """Server-sent events, line by line as they arrive: what is complete is passed on at once."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._rest = b""
        self._first = True
        self._passing = False  # the rest of an overlong line
        self._said = ""  # the text that was passed on
        self._again: str | None = None  # the part of it that the replica which took over has yet to say again
        self._dropped = False  # the line before was not passed on: nor is the blank line that ends its event
        self._only_text = True
        self._open = False  # the blank line that ends the last event has not come
        self.done = False  # data: [DONE] was seen

    @property
    def can_begin_again(self) -> bool:
        """Whether what was passed on is whole lines of one choice's text."""
        return self._only_text and not self._passing and not self.done

    def begin_again(self) -> bytes:
        """What is fed from now on is the same answer from its beginning. The end of the event that was passed on last."""
        self._rest = b""
        self._again = None if self._first else self._said
        return self.gap()

    def gap(self) -> bytes:
        """What ends the event that was passed on last, where its blank line has not come."""
        was_open, self._open = self._open, False
        return b"\n" if was_open else b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now; an incomplete last line waits for its end."""
        if self._passing:
            end = data.find(b"\n")
            if end < 0:
                return data
            self._passing = False
            return data[: end + 1] + self.feed(data[end + 1 :])
        *lines, self._rest = (self._rest + data).split(b"\n")
        made = [line for line in map(self._line, lines) if line is not None]
        if made:
            self._open = bool(made[-1].strip())
        passed = b"".join(line + b"\n" for line in made)
        if len(self._rest) > LINE_LIMIT:
            self._passing = True
            passed, self._rest = passed + self._rest, b""
        return passed

    def rest(self) -> bytes:
        """What is left at the end of the stream."""
        left, self._rest = self._rest, b""
        return (self._line(left) or b"") if left else b""

    def _line(self, line: bytes) -> bytes | None:
        """The line as it is passed on; None: not at all."""
        if not line.startswith(b"data:"):
            return None if self._dropped and not line.strip() else line
        self._dropped = False
        value = line[5:].strip()
        if value == DONE:
            if self._again:
                raise Differs
            self.done = True
            return line
        try:
            event = json.loads(value)
        except (ValueError, RecursionError):
            return line
        if not isinstance(event, dict) or "error" in event:
            return line
        if not self._follow(event):
            self._dropped = True
            return None
        self._words.rename(event)
        if self._first:
            self._first = False
            event["graft"] = self._words.graft
        return b"data: " + _dump(event) + (b"\r" if line.endswith(b"\r") else b"")

    def _follow(self, event: dict[str, Any]) -> bool:
        """Take note of the event's text, and cut off what was passed on before. Whether anything is left of the event."""
        choices = event.get("choices") or []
        if not choices:
            return not self._again
        choice = choices[0] if isinstance(choices, list) and isinstance(choices[0], dict) else {}
        part = choice["delta"] if isinstance(choice.get("delta"), dict) else choice
        name = "content" if part is not choice else "text"
        text = part.get(name) or ""
        others = {key for key, value in part.items() if value and key not in _PLAIN}
        self._only_text &= len(choices) == 1 and isinstance(text, str) and not choice.get("index") and not others
        if self._again is None:
            self._said += text if isinstance(text, str) else ""
            return True
        known = min(len(text), len(self._again))
        if text[:known] != self._again[:known]:
            raise Differs
        left, self._again = text[known:], self._again[known:]
        if self._again:
            if choice.get("finish_reason"):
                raise Differs
            return False
        if not left and not choice.get("finish_reason"):
            return False
        self._again = None
        self._said += left
        part[name] = left
        return True


# Of a choice or its delta: what a stream of plain text holds.
_PLAIN = frozenset({"index", "text", "content", "role", "finish_reason", "stop_reason", "delta"})


def error_event(error: dict[str, Any]) -> bytes:
    """The last event of a stream that broke. No [DONE] follows, so no client takes the answer for complete."""
    return b"data: " + _dump(error) + b"\n\n"


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
