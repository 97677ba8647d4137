"""The lengths that prepare reports are those that train uses."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from graft_trainer.data.example import Example
from graft_trainer.data.lengths import Lengths, advice, describe, measure, quantile
from graft_trainer.data.tokens import Task, tokenise
from worlds.trainer import MARKED, UNMARKED, make_tokenizer


def examples(count: int, form: str) -> list[Example]:
    """Return examples with questions and answers of 1 to 60 characters."""
    draw = random.Random(5)
    found = []
    for line in range(1, count + 1):
        question, answer = "q" * draw.randint(1, 60), "a" * draw.randint(1, 60)
        if form == "text":
            found.append(Example(line, text=question + answer))
        elif form == "prompt":
            found.append(Example(line, prompt=question, answer=answer))
        else:
            messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            found.append(Example(line, messages=messages, answer=answer))
    return found


@pytest.mark.parametrize(
    ("form", "template", "task"),
    [
        ("chat", MARKED, "causal"),
        ("chat", UNMARKED, "causal"),
        ("prompt", None, "causal"),
        ("text", None, "causal"),
        ("chat", None, "seq2seq"),
        ("prompt", None, "seq2seq"),
    ],
)
@pytest.mark.parametrize("max_length", [16, 40, 1000])
def test_measured_lengths_equal_those_that_train_tokenises(
    form: str, template: str | None, task: Task, max_length: int
) -> None:
    tokenizer, given = make_tokenizer(template), examples(80, form)
    told, unusable = measure(given, tokenizer, max_length, role="train", task=task, skip=True)
    learned = tokenise(given, tokenizer, max_length, role="train", task=task, skip=True)
    assert told.tokens == sum(item.tokens for item in learned.examples)
    assert told.truncated == learned.truncated
    assert unusable == learned.unusable
    used = [example for example in given if example.line not in unusable.lines]
    assert list(told.whole) == [
        item.tokens for item in tokenise(used, tokenizer, 10_000, role="train", task=task).examples
    ]


def test_of_a_large_dataset_a_sample_is_measured_and_the_sum_is_scaled() -> None:
    given, tokenizer = examples(4000, "prompt"), make_tokenizer(None)
    whole = describe(measure(given, tokenizer, 100, role="train")[0], examples=4000, held_out=0, invalid=0)
    part, _ = measure(given, tokenizer, 100, role="train", most=60_000)
    assert 500 < len(part.whole) < 2000
    told = describe(part, examples=4000, held_out=7, invalid=3)
    assert (told.examples, told.held_out, told.invalid) == (4000, 7, 3)
    assert told.tokens == pytest.approx(whole.tokens, rel=0.05)
    assert told.p95_tokens == pytest.approx(whole.p95_tokens, rel=0.05)
    assert told.truncated_share == pytest.approx(whole.truncated_share, abs=0.05)


def test_the_statistics_of_known_lengths() -> None:
    sides = [*range(1, 100), 1000]
    told = describe(Lengths(sides, sides, tokens=5450, truncated=1, examples=100), examples=100, held_out=0, invalid=0)
    assert json.loads(told.json_text()) == {
        "examples": 100, "heldOut": 0, "invalid": 0, "invalidReasons": {}, "repeated": 0, "tokens": 5450, "meanTokens": 59.5, "medianTokens": 50,
        "p95Tokens": 95, "maxTokens": 1000, "truncatedShare": 0.01, "sampled": False, "learned": [], "unreadFields": {},
    }  # fmt: skip
    assert [quantile([7], share) for share in (0.0, 0.5, 1.0)] == [7, 7, 7]


def of(sides: Sequence[int], limit: int) -> Lengths:
    return Lengths(
        list(sides),
        list(sides),
        sum(min(side, limit) for side in sides),
        sum(side > limit for side in sides),
        len(sides),
    )


def test_the_advised_length_keeps_nearly_all_examples_whole() -> None:
    assert advice(of([10] * 90 + [100] * 10, 50), 50, None) is None  # up to 10 % there is no warning
    found: Any = advice(of([10] * 88 + [100] * 11 + [5000], 50), 50, 4096)
    assert found == (
        "12 % of the examples are cut to 50 tokens; the longest has 5000 tokens. "
        "Raise spec.training.maxLength to 128: then 99 % of the examples stay whole"
    )


def test_the_advised_length_is_never_above_the_context_of_the_model() -> None:
    long = of([10] * 50 + [3000] * 50, 512)
    assert "Raise spec.training.maxLength to 1024: then 50 % of the examples stay whole" in str(advice(long, 512, 1024))
    assert "Split these examples: the base model reads at most 512 tokens" in str(advice(long, 512, 512))
