"""The rewriting of the engine's answers (PURE): the client's model name, and a `graft` object that names the adapter.

A plain answer gets both. In a stream, every chunk gets the model name. Only the first chunk gets the `graft` object.
A broken stream can continue with another replica's answer to the same request. That answer must first repeat the text
that was already passed on.
"""

import json
from collections.abc import Mapping
from typing import Any

from graft.bounded import Limits, OutOfBounds, parse_json

LINE_LIMIT = 256 * 1024  # bytes; a longer line is passed on unchanged
SAID_LIMIT = 256 * 1024  # characters; a longer stream is not continued by another replica
PIECES = 256  # of text; then they are joined, because a short string needs much more memory than its characters
MOST_TOKENS = 10**12
ANSWER = Limits(16 * 1024 * 1024, depth=64, values=1_000_000)
DONE = b"[DONE]"

TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")


class Words:
    """The inserted values: the client's model name, the `graft` object, and the tokens of earlier steps."""

    def __init__(self, model: str, graft: dict[str, Any], spent: dict[str, int] | None = None) -> None:
        self.model = model
        self.graft = graft
        self.spent = spent or {}
        self.used: dict[str, int] = {}  # the engine's newest counts of this answer's tokens, without earlier steps

    def rename(self, event: dict[str, Any]) -> None:
        """Set the client's model name, note the tokens in `usage`, and add those of earlier steps to it."""
        event["model"] = self.model
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.used = {name: token_count(usage.get(name)) for name in TOKENS}
            if self.spent:
                event["usage"] = add_usage(usage, self.spent)


def add_usage(usage: dict[str, Any], spent: dict[str, int]) -> dict[str, Any]:
    """Return OpenAI's usage object with the counts of another one added. A count that is not a number counts as 0."""
    return usage | {name: token_count(usage.get(name)) + spent.get(name, 0) for name in TOKENS}


def token_count(value: Any) -> int:
    """Return an engine's count of tokens, or 0 if the value is not a count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else 0


def rewrite_answer(body: bytes, words: Words, limits: Limits = ANSWER) -> bytes:
    """Rewrite a complete JSON answer. Raises OutOfBounds if the body exceeds the limits or is not a JSON object."""
    answer = parse_json(body, limits, "the engine's answer")
    if not isinstance(answer, dict):
        raise OutOfBounds("the engine's answer is not a JSON object")
    words.rename(answer)
    answer["graft"] = words.graft
    return _dump(answer)


class Differs(Exception):
    """Another replica's answer differs from the text that was already passed on."""


class StreamRewriter:
    """The rewriter of one stream of server-sent events. It passes each line on as soon as the line is complete.

    `repeatable`: another replica may continue the stream, so its text is kept. `asked`: the stream_options of the
    client. The engine always counts tokens, so counts that the client has not asked for are removed.
    """

    def __init__(self, words: Words, *, repeatable: bool = True, asked: Mapping[str, Any] | None = None) -> None:
        self._words = words
        self._repeatable = repeatable
        asked = asked or {}
        self._counts_at_end = bool(asked.get("include_usage"))
        self._counts_always = self._counts_at_end and bool(asked.get("continuous_usage_stats"))
        self._rest = b""
        self._first = True
        self._passing = False  # inside a line longer than LINE_LIMIT
        self._said = ""  # the text passed on so far, up to SAID_LIMIT, without the newest pieces
        self._newest: list[str] = []
        self._again: str | None = None  # the part of it that the replica that took over must still repeat
        self._dropped = False  # the line before was dropped, so the blank line after it is dropped too
        self._only_text = True
        self._open = False  # the blank line that ends the last event was not passed on yet
        self.done = False  # data: [DONE] was seen

    @property
    def can_begin_again(self) -> bool:
        """Return whether another replica can continue: only whole lines with the text of one choice were passed on."""
        return self._repeatable and self._only_text and not self._passing and not self.done

    @property
    def pending(self) -> int:
        """Return the bytes of an incomplete line, which wait for its end."""
        return len(self._rest)

    def begin_again(self) -> bytes:
        """Expect the same answer again, from its beginning. Return the bytes that end the last event passed on."""
        self._rest = b""
        self._join()
        self._again = None if self._first else self._said
        return self.gap()

    def gap(self) -> bytes:
        """Return the blank line that ends the last event, or nothing if that line was passed on already."""
        was_open, self._open = self._open, False
        return b"\n" if was_open else b""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that can be passed on now. An incomplete last line waits for its end."""
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
        """Return the remaining bytes at the end of the stream."""
        left, self._rest = self._rest, b""
        return (self._line(left) or b"") if left else b""

    def _line(self, line: bytes) -> bytes | None:
        """Return the line to pass on, or None to drop it."""
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
        if isinstance(event.get("usage"), dict):
            if not event.get("choices") and not self._counts_at_end:
                self._dropped = True
                return None
            if event.get("choices") and not self._counts_always:
                del event["usage"]
        if self._first:
            self._first = False
            event["graft"] = self._words.graft
        return b"data: " + _dump(event) + (b"\r" if line.endswith(b"\r") else b"")

    def _follow(self, event: dict[str, Any]) -> bool:
        """Record the event's text, and cut off the part passed on before. Return whether to pass the event on."""
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices:
            return not self._again
        choice = choices[0] if isinstance(choices[0], dict) else {}
        part = choice["delta"] if isinstance(choice.get("delta"), dict) else choice
        name = "content" if part is not choice else "text"
        text = part.get(name) or ""
        others = {key for key, value in part.items() if value and key not in _PLAIN}
        self._only_text &= len(choices) == 1 and isinstance(text, str) and not choice.get("index") and not others
        if self._again is None:
            if isinstance(text, str):
                self._say(text)
            return True
        if not isinstance(text, str):
            raise Differs
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
        self._say(left)
        part[name] = left
        return True

    def _say(self, text: str) -> None:
        """Record text that is passed on. Of a stream without end, no text is kept."""
        if not self._repeatable:
            return
        self._newest.append(text)
        if len(self._newest) >= PIECES or len(text) > PIECES:
            self._join()

    def _join(self) -> None:
        self._said += "".join(self._newest)
        self._newest = []
        if len(self._said) > SAID_LIMIT:
            self._said, self._repeatable = "", False


# The keys that a choice or its delta has in a stream of plain text.
_PLAIN = frozenset({"index", "text", "content", "role", "finish_reason", "stop_reason", "delta"})


def error_event(error: dict[str, Any]) -> bytes:
    """Return the last event of a broken stream. No [DONE] follows, so clients see that the answer is incomplete."""
    return b"data: " + _dump(error) + b"\n\n"


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
