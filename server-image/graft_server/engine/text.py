"""The conversion of tokens to text, one at a time. No character is split, and no stop string reaches the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Last prompt tokens, decoded with the answer: some tokenizers drop the space before a text's first word.
CONTEXT_TOKENS = 5
MAX_HELD_TOKENS = 8  # an unfinished character has at most 4 bytes; after more tokens, the bytes are not UTF-8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one sequence as it grows.

    `push` and `finish` return final text; their concatenation is the whole answer. When a stop string is found,
    `stopped` becomes true. Neither the stop string nor the text after it is returned.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = (), *, special_tokens: bool = False
    ) -> None:
        """With `special_tokens`, the text has them: some formats of calls consist of them."""
        self.stopped = False
        self._skip = not special_tokens
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._read = len(self._ids)  # ids before this index have become text
        self._stop = tuple(stop)
        self._hold = max((len(text) for text in stop), default=1) - 1  # characters that may begin a stop string
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token. Return the text that can no longer be part of a stop string."""
        self._ids.append(token)
        return self._release(self._decode(final=False), self._hold)

    def finish(self) -> str:
        """Return the text that was held back. Call it once, after the last token."""
        return "" if self.stopped else self._release(self._decode(final=True), 0)

    def _decode(self, final: bool) -> str:
        known = self._text(self._ids[: self._read])
        text = self._text(self._ids)
        unfinished = text.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD_TOKENS
        if len(text) <= len(known) or (unfinished and not final):
            return ""
        # These ids are the next call's context, because a token's text may depend on the token before it.
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip)) if ids else ""

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
