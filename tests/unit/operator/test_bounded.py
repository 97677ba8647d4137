"""JSON from less trusted writers: what exceeds its bounds is refused before memory is spent."""

import json
import tracemalloc

import pytest
from graft.bounded import Limits, OutOfBounds, check_json, parse_json

LIMITS = Limits(size=1000, depth=4, values=10)


def parsed(text: str | bytes, limits: Limits = LIMITS) -> object:
    return parse_json(text if isinstance(text, bytes) else text.encode(), limits, "the message")


def test_what_is_within_the_bounds_is_read() -> None:
    assert parsed('{"a": [1, 2.5, "b", null, true]}') == {"a": [1, 2.5, "b", None, True]}
    assert parsed(r'{"a": "\ud83d\ude00 [[[[[[ ,,,,,,,,,,,,,,"}') == {"a": "😀 [[[[[[ ,,,,,,,,,,,,,,"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps("x" * 1000), "the message has 1002 bytes, more than 1000"),
        ("[[[[[1]]]]]", "nested deeper than 4 levels"),
        (json.dumps(list(range(11))), "more than 10 values"),
        (json.dumps({str(number): 1 for number in range(11)}), "more than 10 values"),
        ("[[],[],[],[],[],[]]", "more than 10 values"),
        ("[" * 900, "nested deeper than 4 levels"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("NaN", "NaN is not a number of JSON"),
        (r'{"a": "\ud800"}', "half a character"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_what_is_not_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(OutOfBounds, match=why):
        parsed(text)


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(OutOfBounds, match="not valid JSON"):
        parsed("9" * 5000, Limits(size=10_000))


@pytest.mark.parametrize("text", [b"[" * 8_000_000, b"[{}," * 2_000_000, b'{"a":' * 1_600_000, b"1," * 4_000_000])
def test_an_attack_costs_no_memory(text: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(OutOfBounds):
            check_json(text, Limits(size=10_000_000, depth=16, values=20_000), "the request")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
