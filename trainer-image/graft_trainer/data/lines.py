"""Lines of JSON Lines files that users give: each is bounded before it is parsed. This module knows no format."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

from graft.bounded import Limits, OutOfBounds, check_json

# One example. The longest contexts of today's models have 1,000,000 tokens, about 5 MB of text.
LINE = Limits(size=16 * 1024 * 1024, depth=64, values=100_000)
EXCERPT = 100  # characters that a message shows of an invalid line
REASON = 500  # characters of the reason in a message


# Why a line cannot be used.
Trouble = Literal["format", "templateRefuses", "notRendered", "noEnd", "controlTokens", "nothingToLearn", "tooLong"]


class BadLine(Exception):
    """A line cannot be used. The message says what is wrong with it.

    `remedy` says what to do if the format of the line is correct.
    """

    def __init__(self, why: str, trouble: Trouble = "format", remedy: str = "") -> None:
        super().__init__(why if len(why) <= REASON else why[:REASON] + "…")
        self.trouble = trouble
        self.remedy = remedy


def bounded_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in bytes, line) of a file. Of a line that is longer than LINE, only the first bytes are returned.

    They are one more than LINE allows, so that the line is found to be too long.
    """
    begin = stream.tell()
    while line := stream.readline(LINE.size + 1):
        size, rest = len(line), line
        while len(rest) > LINE.size and not rest.endswith(b"\n"):
            rest = stream.readline(LINE.size + 1)
            size += len(rest)
        yield begin, line
        begin += size


def record_of(raw: bytes) -> dict[str, Any]:
    """Return the object in a line. Raises BadLine."""
    try:
        check_json(raw, LINE, "it")
        text = raw.decode()
    except OutOfBounds as error:
        raise BadLine(str(error)) from error
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})") from error
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise BadLine("a number has too many digits") from error
    if not isinstance(record, dict):
        raise BadLine(f"a JSON {kind_of(record)}, not an object")
    if "\\u" in text:  # an escape can encode half a character (a surrogate), which no tokenizer accepts
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadLine("an unpaired surrogate escape (\\ud800 to \\udfff)") from error
    return record


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type."""
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def excerpt(raw: bytes) -> str:
    """Return the beginning of a line, for a message."""
    text = raw[: 8 * EXCERPT].decode(errors="replace").strip()
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def shown(value: Any) -> str:
    """Return a JSON value as text, cut, for a message."""
    return excerpt(json.dumps(value, ensure_ascii=False).encode())
