"""The answers for clients in OpenAI's shapes, whole and streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft_server.engine.sampling import TokenLogprob
from graft_server.engine.text import REPLACEMENT

LOWEST = -9999.0  # JSON has no infinity
LONGEST_CHARACTER = 4  # tokens: a character has at most 4 bytes


def model_card(
    name: str, root: str, created: int, parent: str | None = None, max_model_len: int | None = None
) -> dict[str, Any]:
    """Return an entry of /v1/models."""
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "graft",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the token counts of a whole request."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def token_id(token: int, before: Sequence[int] = ()) -> str:
    """Return a token by its id, as vLLM writes it. Several tokens may have one text, but each has its own id."""
    return f"token_id:{token}"


class TokenTexts:
    """The text of single tokens inside a longer text. At a text's start, a tokenizer may drop the leading space.

    A token can be a part of a character. As in vLLM, the last token of the character has its text, and the others have
    none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer.encode("a", add_special_tokens=False))[:1]
        self._skipped = len(self._decode([]))

    def __call__(self, token: int, before: Sequence[int] = ()) -> str:
        """Return the token's text after the tokens `before`, of which the last few are enough."""
        text = self._decode([token])[self._skipped :]
        if not text.endswith(REPLACEMENT):
            return text
        for size in range(1, len(before) + 1):
            near = list(before[-size:])
            whole = self._decode([*near, token])
            if not whole.endswith(REPLACEMENT):
                while near and self._decode(near).endswith(REPLACEMENT):
                    near.pop()
                return whole[len(self._decode(near)) if near else self._skipped :]
        return ""

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *ids])) if self._before or ids else ""


@dataclass
class Choice:
    """One answer, or a piece of one. `logprobs` is None if none were requested."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)  # of tools, in OpenAI's form


@dataclass
class Shapes:
    """The answers of one request. `chat` selects between the two APIs."""

    chat: bool
    request_id: str
    model: str
    token_text: Callable[[int, Sequence[int]], str]
    _created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # by choice: characters of the tokens reported so far
    _before: dict[int, list[int]] = field(default_factory=dict)  # by choice: the last tokens reported so far

    def answer(self, choices: Sequence[Choice], counts: Mapping[str, int]) -> dict[str, Any]:
        """Return the whole answer."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, [self._choice(index, choice) for index, choice in enumerate(choices)], counts)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the first chunk of a choice in a chat stream, which holds the role. Return None for completions."""
        return self._chunk(index, {"role": "assistant", "content": ""}, Choice()) if self.chat else None

    def chunk(self, index: int, piece: Choice) -> dict[str, Any]:
        """Return the chunk for a piece of a choice."""
        if self.chat:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.calls:
                delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(piece.calls)]
            return self._chunk(index, delta, piece)
        return self._body("text_completion", [self._choice(index, piece)], None)

    def counts(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return the last chunk, with the token counts and without choices."""
        return self._body("chat.completion.chunk" if self.chat else "text_completion", [], counts)

    def _chunk(self, index: int, delta: Mapping[str, Any], piece: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(index, piece)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return self._body("chat.completion.chunk", [choice], None)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        said = {"message": message} if self.chat else {"text": choice.text}
        logprobs = self._logprobs(index, choice)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, index: int, choice: Choice) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        if self.chat:
            return {"content": [self._chat_logprob(entry, before) for entry, before in self._reported(index, choice)]}
        offset = self._offsets.get(index, 0)
        reported = self._reported(index, choice)
        tokens = [self.token_text(entry.token, before) for entry, before in reported]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "text_offset": offsets,
            "token_logprobs": [None if entry.logprob is None else _finite(entry.logprob) for entry in choice.logprobs],
            "tokens": tokens,
            "top_logprobs": [self._top(entry, before) for entry, before in reported],
        }

    def _reported(self, index: int, choice: Choice) -> list[tuple[TokenLogprob, list[int]]]:
        """Return the piece's log-probabilities, each with the tokens before it."""
        found, before = [], self._before.get(index, [])
        for entry in choice.logprobs or ():
            found.append((entry, before))
            before = [*before, entry.token][-LONGEST_CHARACTER:]
        self._before[index] = before
        return found

    def _top(self, entry: TokenLogprob, before: Sequence[int]) -> dict[str, float] | None:
        """Return the likeliest tokens and the chosen one, by text. Of two tokens with one text, the likelier counts."""
        if entry.logprob is None:
            return None
        pairs = [*entry.top, (entry.token, entry.logprob)]
        pairs.sort(key=lambda pair: pair[1])
        return {self.token_text(token, before): _finite(logprob) for token, logprob in pairs}

    def _chat_logprob(self, entry: TokenLogprob, before: Sequence[int]) -> dict[str, Any]:
        top = [self._named(token, logprob, before) for token, logprob in entry.top]
        return {**self._named(entry.token, entry.logprob or 0.0, before), "top_logprobs": top}

    def _named(self, token: int, logprob: float, before: Sequence[int]) -> dict[str, Any]:
        text = self.token_text(token, before)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _body(
        self, kind: str, choices: Sequence[Mapping[str, Any]], counts: Mapping[str, int] | None
    ) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_id}"
        head = {"id": name, "created": self._created, "object": kind, "model": self.model}
        return {**head, "choices": choices, "usage": counts}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
