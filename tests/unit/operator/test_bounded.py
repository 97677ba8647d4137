"""JSON from less trusted writers. A text that exceeds a bound is refused before it costs memory."""

import json
import subprocess
import sys
import tracemalloc

import pytest
from graft.bounded import Limits, OutOfBounds, check_json, parse_json

LIMITS = Limits(size=1000, depth=4, values=10)


def parsed(text: str | bytes, limits: Limits = LIMITS) -> object:
    return parse_json(text if isinstance(text, bytes) else text.encode(), limits, "the message")


def test_json_within_the_bounds_is_parsed() -> None:
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
        ("[1e999]", "a number is too large"),
        (r'{"a": "\ud800"}', "half a character"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_invalid_json_and_json_beyond_the_bounds_are_refused(text: str | bytes, why: str) -> None:
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


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b"a" * 8_000_000 + b'"',  # one long text
        b'"' + b"\\n" * 4_000_000 + b'"',  # one long text of escapes
        b'"' + b"a" * 8_000_000,  # a text that does not end
        b'"' + b'\\"' * 4_000_000,  # 4,000,000 possible starts of a text, and no end
    ],
)
def test_long_texts_cost_linear_time_and_no_memory(text: bytes) -> None:
    """A child process measures its own peak memory. The stack of the regular expression is outside of Python's heap."""
    program = (
        "import resource, sys, time; from graft.bounded import Limits, check_json; data = sys.stdin.buffer.read();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before, began = peak(), time.process_time();"
        "check_json(data, Limits(10_000_000), 'the request'); print(peak() - before, time.process_time() - began)"
    )
    done = subprocess.run([sys.executable, "-c", program], input=text, capture_output=True, check=True, timeout=60)
    kilobytes, seconds = done.stdout.split()
    assert int(kilobytes) < 10_000
    assert float(seconds) < 5
