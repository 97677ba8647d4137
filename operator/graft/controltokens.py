"""Control tokens in users' words (PURE): they stay words, in training and in the engine.

A tokenizer turns the text `<|im_end|>` into a control token, whoever wrote it. So the words of a message could end a turn
or begin another role's. Here every control token in the words gets a mark before the chat template renders them. The
marks are removed when the rendered text is tokenised, and the marked control tokens are tokenised as words. This module
needs no library: a tokenizer of transformers is an argument.
"""

import re
from collections.abc import Sequence
from typing import Any

# Unicode reserves these code points for a program's own use. They are never part of a text.
MARK = "\ufdd0"  # follows the first character of a control token that is a word
RESERVED = re.compile("[\ufdd0-\ufdef]")
Tokens = tuple[list[int], list[tuple[int, int]]]  # (ids, first and end character of each) of a text without marks


class ControlTokenError(ValueError):
    """A text cannot be tokenised safely. The message says why."""


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of the tokenizer's control tokens, the longest first. None if it has none.

    They are the tokens that the tokenizer marks as special. Other added tokens, such as Qwen3's `<think>`, are text.
    """
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    found |= {str(token) for token in tokenizer.all_special_tokens}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None


def mark(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """Return the value with a mark in every control token of its texts, the keys of objects included.

    Raises ControlTokenError if a text has a character that is reserved for such marks.
    """
    if isinstance(value, str):
        if RESERVED.search(value):
            raise ControlTokenError("a text has a character from U+FDD0 to U+FDEF, which Unicode reserves")
        return pattern.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", value) if pattern else value
    if isinstance(value, dict):
        return {mark(key, pattern): mark(one, pattern) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(one, pattern) for one in value]
    return value


def unmarked(text: str) -> str:
    """Return the text without marks."""
    return text.replace(MARK, "")


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """Return the tokens of rendered texts, without those that the tokenizer adds around a text. Marked control tokens
    are tokenised as words. The offsets are those of the text without marks; a tokenizer that knows none gives (0, 0).

    Raises ControlTokenError if the tokenizer knows a control token only as one token.
    """
    clean = [unmarked(text) for text in texts]
    if not clean:
        return []
    if not tokenizer.is_fast:
        pieces = [_by_pieces(tokenizer, text) for text in texts]
        return [(ids, [(0, 0)] * len(ids)) for ids in pieces]
    found = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)
    encoded = zip(texts, clean, found["input_ids"], found["offset_mapping"], strict=True)
    return [
        _with_words(tokenizer, text, plain, ids, offsets) if MARK in text else (list(ids), list(offsets))
        for text, plain, ids, offsets in encoded
    ]


def encode_one(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of one rendered text. See encode."""
    return encode(tokenizer, [text])[0][0]


def read_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts that a causal model continues: with the tokens that the tokenizer adds before a text, but
    without an end token that it adds after it. Such a token would end the answer before it begins."""
    found = tokenizer(list(texts), return_special_tokens_mask=True)
    return [_before(ids, added) for ids, added in zip(found["input_ids"], found["special_tokens_mask"], strict=True)]


def _before(ids: list[int], added: list[int]) -> list[int]:
    count = len(ids)
    while count and added[count - 1]:
        count -= 1
    return list(ids[:count]) if count else list(ids[:1])  # of an empty text, the token that begins one


def _with_words(tokenizer: Any, text: str, plain: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Replace each marked control token by the tokens of its words."""
    marked = {found.start() - 1 - count for count, found in enumerate(re.finditer(MARK, text))}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    made: list[int] = []
    places: list[tuple[int, int]] = []
    for token, (begin, end) in zip(ids, offsets, strict=True):
        if token in special and any(place in marked for place in range(begin, end)):
            words = _as_words(tokenizer, plain[begin:end], token)
            made += words
            places += [(begin, end)] * len(words)
        else:
            made.append(token)
            places.append((begin, end))
    return made, places


def _as_words(tokenizer: Any, word: str, token: int) -> list[int]:
    # After a line break, so that SentencePiece does not add the space that it adds at the beginning of a text.
    before = _plain(tokenizer, "\n")
    ids = _plain(tokenizer, "\n" + word)
    ids = ids[len(before) :] if before and ids[: len(before)] == before else _plain(tokenizer, word)
    if token in ids:
        raise ControlTokenError(f"the tokenizer has no words for the control token {word!r}")
    return ids


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text in which no added token is recognised."""
    if not tokenizer.is_fast:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    # Not encode(split_special_tokens=True): that changes the tokenizer, which other threads are using.
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for part in parts for token in backend.model.tokenize(part)]


def _by_pieces(tokenizer: Any, text: str) -> list[int]:
    """Tokenise with a tokenizer that knows no offsets: a text is cut at its marks, so no control token is whole."""
    return [
        token
        for piece in text.split(MARK)
        if piece
        for token in tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]
