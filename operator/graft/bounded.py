"""Bounds on JSON from less trusted writers, checked before memory is spent on it.

Every program of Graft reads such JSON. The operator reads a training pod's progress, the gateway reads a client's
request, and the agent reads an engine's answer. Ten megabytes of brackets become a gigabyte of Python objects, so the
text is checked first: its bytes, its depth and the number of its values. This module knows no messages. LIMITS in the
contract of a message has its limits.
"""

import json
import math
import re
from typing import Any, NamedTuple, NoReturn

# A string is skipped as a whole, so that brackets and commas in it do not count. The repeats are possessive, and the closing
# quote is optional: no text makes the search step back, so its time is linear and it needs no memory.
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)
HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # a surrogate; it is valid only as one of a pair


class OutOfBounds(ValueError):
    """JSON that is larger than its reader accepts, or that is not JSON at all."""


class Limits(NamedTuple):
    """The most that a reader accepts."""

    size: int  # bytes
    depth: int = 16  # of nested objects and arrays
    values: int = 20_000  # in all objects and arrays


def check_json(data: bytes, limits: Limits, what: str) -> None:
    """Raise OutOfBounds if `data` exceeds the limits. `what` names it in the message. It costs no memory."""
    if len(data) > limits.size:
        raise OutOfBounds(f"{what} has {len(data)} bytes, more than {limits.size}")
    depth, values, strings = 0, 1, 0
    for token in TOKEN.finditer(data):
        first = data[token.start()]
        if first in b"[{":
            depth += 1
            values += 1
        elif first in b"]}":
            depth -= 1
        elif first == 0x2C:  # a comma
            values += 1
        else:
            strings += 1  # at most a key and a value per comma; more are invalid JSON, but cost time
        if depth > limits.depth:
            raise OutOfBounds(f"{what} is nested deeper than {limits.depth} levels")
        if depth < 0:
            raise OutOfBounds(f"{what} is not valid JSON: it closes more brackets than it opens")
        if values > limits.values or strings > 2 * limits.values:
            raise OutOfBounds(f"{what} has more than {limits.values} values")


def parse_json(data: bytes, limits: Limits, what: str, *, constants: bool = False) -> Any:
    """Return the value of UTF-8 JSON within the limits. Raises OutOfBounds.

    NaN, Infinity, numbers of thousands of digits and halves of surrogate pairs are refused: what is accepted can be written
    as JSON again. With `constants`, NaN and Infinity are accepted: Python writes them, for example in config.json.
    """
    check_json(data, limits, what)
    strict: dict[str, Any] = {} if constants else {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        value = json.loads(data.decode(), **strict)
        if HALF_CHARACTER.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise OutOfBounds(f"{what} is not valid JSON: {_first_line(error)}") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("a number is too large")
    return number


def _first_line(error: Exception) -> str:
    """Return the parser's message without the text that it quotes: the text may be another user's secret."""
    if isinstance(error, UnicodeError):
        return "it is not UTF-8, or it has half a character (a surrogate without its pair)"
    return str(error).partition("\n")[0][:200]
