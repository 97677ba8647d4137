"""Texts that match a regular expression, and texts that do not."""

import re
import string
from collections.abc import Iterable
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

# Characters for classes, in the order in which they are tried.
CHARACTERS = "a0" + string.printable
# Texts that most patterns of names and URIs refuse.
ODD = ("", " ", "-", "A b", "..", "s3://", "a\n", "\x00", "a/../b", "%", "é", "1.2.3.4.5")


def matching(pattern: str, longest: int | None = None) -> list[str]:
    """Return different texts that match: one for each alternative of the pattern, and one of `longest` characters."""
    check = _compiled(pattern)
    shapes = {
        re.sub("[a-z]+", "a", text): text for text in reversed(_texts(parser.parse(pattern))) if check.search(text)
    }
    found = list(reversed(shapes.values()))
    if longest is not None:
        found = [text for text in found if len(text) <= longest]
        found += [text for text in (_padded(check, item, longest) for item in reversed(found)) if text][:1]
    return list(dict.fromkeys(found))


def missing(pattern: str, longest: int | None = None) -> list[str]:
    """Return texts that the pattern refuses, of at most `longest` characters."""
    texts = [text for text in ODD if not _compiled(pattern).search(text)]
    return [text for text in texts if longest is None or len(text) <= longest]


def too_long(pattern: str, longest: int) -> list[str]:
    """Return a text of one character too many, if the pattern allows any length."""
    check = _compiled(pattern)
    longer = (_padded(check, text, longest + 1) for text in reversed(matching(pattern)))
    return [text for text in longer if text is not None][:1]


def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern with the meaning that it has at the API server, where $ does not match before a final newline."""
    return re.compile(re.sub(r"(?<!\\\\)\\$", r"\\Z", pattern))


def _padded(check: re.Pattern[str], text: str, length: int) -> str | None:
    """Return a matching text of `length` characters: `text` with one of its places filled."""
    for place in range(len(text), -1, -1):
        for filler in ("a", "0"):
            longer = text[:place] + filler * (length - len(text)) + text[place:]
            if check.search(longer):
                return longer
    return None


def _texts(parts: Iterable[Any]) -> list[str]:
    """Return texts of a parsed pattern. Each text takes another alternative at one place, and the first at all others."""
    choices = [_choices(*part) for part in parts]
    first = [choice[0] for choice in choices]
    found = ["".join(first)]
    for place, choice in enumerate(choices):
        found += ["".join([*first[:place], other, *first[place + 1 :]]) for other in choice[1:]]
    return found


def _choices(op: Any, argument: Any) -> list[str]:
    if op is ops.LITERAL:
        return [chr(argument)]
    if op is ops.AT:
        return [""]
    if op is ops.IN:
        wanted = re.compile(f"[{_class(argument)}]")
        return [next(item for item in CHARACTERS if wanted.match(item))]
    if op is ops.ANY:
        return ["a"]
    if op is ops.SUBPATTERN:
        return _texts(argument[3])
    if op is ops.BRANCH:
        return [text for branch in argument[1] for text in _texts(branch)]
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        least, most, body = argument
        texts = _texts(body)
        once = [text * max(least, 1) for text in texts] if most else []
        return ["", *once] if least == 0 else once
    raise NotImplementedError(f"{op}: teach tests/worlds/fields/patterns.py this part of a pattern")


def _class(items: Iterable[Any]) -> str:
    """Return the inside of a character class from its parsed form."""
    categories = {ops.CATEGORY_SPACE: r"\s", ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_DIGIT: r"\d"}
    text = ""
    for op, argument in items:
        if op is ops.NEGATE:
            text += "^"
        elif op is ops.LITERAL:
            text += re.escape(chr(argument))
        elif op is ops.RANGE:
            text += f"{re.escape(chr(argument[0]))}-{re.escape(chr(argument[1]))}"
        else:
            text += categories[argument]
    return text
