"""Tokens become text one at a time: characters are not cut in two and stop strings never reach the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 5  # of the prompt, decoded along: some tokenizers drop the space of a text's first word
MAX_HELD_TOKENS = 8  # an unfinished character has at most 4 bytes; beyond this the bytes are simply not UTF-8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one sequence as it grows.

    `push` and `finish` return the text that is final; their concatenation is the whole answer. Once a stop string
    was found `stopped` is true, and neither it nor what follows it is returned.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._read = len(self._ids)  # ids before this one have become text
        self._stop = tuple(stop)
        self._hold = max((len(text) for text in stop), default=1) - 1  # characters that may begin a stop string
        self._held = ""

    def push(self, token: int) -> str:
        """Adds a token and returns the text that cannot be part of a stop string any more."""
        self._ids.append(token)
        return self._release(self._decode(final=False), self._hold)

    def finish(self) -> str:
        """Returns what was held back. Call it once, after the last token."""
        return "" if self.stopped else self._release(self._decode(final=True), 0)

    def _decode(self, final: bool) -> str:
        known = self._text(self._ids[: self._read])
        text = self._text(self._ids)
        unfinished = text.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD_TOKENS
        if len(text) <= len(known) or (unfinished and not final):
            return ""
        # The ids just read are the next call's context: a token's text may depend on the one before it.
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, text: str, hold: int) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = len(self._held) - hold
        if keep <= 0:
            return ""
        text, self._held = self._held[:keep], self._held[keep:]
        return text
