"""Reading a dataset: its formats, templates and split, and the messages about invalid lines."""

import io
import json
import tracemalloc
from typing import Any

import pytest
from graft.api.recipe import Dataset
from graft.contracts.progress import Reason
from graft_trainer.data.dataset import Reading, check_template, held_out_size, read_examples, split, vary
from graft_trainer.data.formats import fill
from graft_trainer.run.download import split_dataset_uri
from graft_trainer.run.failures import Failure

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"train": {"uri": "s3://bucket/train.jsonl"}} | fields)


def read(text: str | bytes, limit: int | None = None, **fields: Any) -> Any:
    return reading(text, limit, **fields).examples


def reading(text: str | bytes, limit: int | None = None, most: int | None = None, **fields: Any) -> Reading:
    data = text.encode() if isinstance(text, str) else text
    return read_examples(
        io.BytesIO(data),
        dataset(**fields),
        role="train",
        uri="s3://bucket/train.jsonl",
        limit=limit,
        most=most,
    )


def refused(text: str | bytes, **fields: Any) -> Failure:
    with pytest.raises(Failure) as caught:
        read(text, **fields)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert "s3://bucket/train.jsonl" in caught.value.message
    assert caught.value.remedy
    return caught.value


def chat(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [', "not JSON"),
        ("[1, 2]", "a JSON list, not an object"),
        (b'{"messages": "\xff"}', "not UTF-8 (byte 15 of the line is 0xff)"),
        ('{"message": []}', "there is no field messages (fields: message)"),
        (chat(), "must be a list of messages that is not empty"),
        (chat("Hi"), "messages[0] is a text, not an object"),
        (chat(USER, {"role": "bot", "content": "x"}), 'messages[1].role is "bot", not one of system, developer, user'),
        (chat(USER, {"role": "assistant", "content": "  "}), "messages[1].content is empty"),
        (chat(USER, {"role": "assistant"}), "messages[1].content is missing"),
        (
            chat(USER, {"role": "assistant", "content": ["x"]}),
            "messages[1].content[0] is a text, not a part with type and text",
        ),
        (chat(USER, ANSWER, USER), "the last message is from user, not from assistant"),
        (chat(ANSWER), "there is no user message before the answer"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "unpaired surrogate"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number_and_problem(line: str | bytes, problem: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    failure = refused(GOOD.encode() + b"\n\n" + raw + b"\n")
    assert "1 of 2 lines is invalid" in failure.message
    assert "line 3: " in failure.message
    assert problem in failure.message


def test_many_invalid_lines_are_counted_and_the_first_are_shown() -> None:
    failure = refused("\n".join([GOOD] + ["nonsense"] * 12))
    assert "12 of 13 lines are invalid" in failure.message
    assert "line 2: " in failure.message and "line 6: " in failure.message and "line 7" not in failure.message
    assert "and 7 more" in failure.message


def test_with_on_invalid_skip_invalid_lines_are_left_out_and_counted() -> None:
    found = reading("\n".join(["nonsense", GOOD, *["[]"] * 7, GOOD]), onInvalid="skip")
    assert [example.line for example in found.examples] == [2, 10]
    assert (found.total, found.invalid) == (2, 8)
    assert [problem.split(":")[0] for problem in found.problems] == ["line 1", "line 3", "line 4", "line 5", "line 6"]


def test_a_file_without_a_valid_line_is_refused_with_and_without_skip() -> None:
    failure = refused("\n".join(["nonsense"] * 3), onInvalid="skip")
    assert "3 of 3 lines are invalid: line 1: not JSON" in failure.message
    assert "onInvalid" not in failure.remedy
    assert "dataset.onInvalid" in refused("nonsense").remedy


def test_the_limit_counts_examples_and_not_skipped_lines() -> None:
    text = "\n".join([GOOD, "nonsense", GOOD, GOOD])
    assert [example.line for example in read(text, limit=2, onInvalid="skip")] == [1, 3]


def test_of_a_large_file_a_sample_is_kept_and_all_examples_are_counted() -> None:
    found = reading("\n".join([GOOD] * 500), most=50)
    lines = [example.line for example in found.examples]
    assert (len(lines), found.total) == (50, 500)
    assert lines == sorted(set(lines))
    assert min(lines) < 100 and max(lines) > 400
    assert list(reading("\n".join([GOOD] * 50), most=50).examples) == list(read("\n".join([GOOD] * 50)))


def test_an_empty_file_is_invalid() -> None:
    assert "no examples" in refused("\n \n").message


def test_lines_after_the_limit_are_not_checked() -> None:
    assert [item.line for item in read(f"{GOOD}\n{GOOD}\nnonsense", limit=2)] == [1, 2]


def test_a_byte_order_mark_and_windows_line_ends_are_accepted() -> None:
    assert len(read(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")) == 1


def test_columns_are_renamed() -> None:
    line = json.dumps({"q": "2+2?", "a": "4"})
    (example,) = read(line, format="instruction", columns={"instruction": "q", "output": "a"})
    assert example.messages == ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})
    failure = refused(line, format="instruction", columns={"instruction": "q"})
    assert "there is no field output (fields: a, q)" in failure.message


def test_a_template_makes_the_prompt_and_leaves_other_braces_alone() -> None:
    line = json.dumps({"instruction": "Add {input}", "input": "1, 2", "output": "3"})
    (example,) = read(line, format="instruction", templates=['{"ask": "{instruction}", "on": "{input}"}\n'])
    assert example.prompt == '{"ask": "Add {input}", "on": "1, 2"}\n'
    assert (example.answer, example.messages) == ("3", None)
    assert fill("{instruction}|{input}", "a", "") == "a|"


TEMPLATES = ["Q: {instruction}", "{instruction}?", "Do this: {instruction} {input}"]


def asked(count: int) -> list[str]:
    return [json.dumps({"instruction": f"task {number}", "output": "done"}) for number in range(count)]


def test_each_training_example_gets_one_of_the_templates_by_seed_and_line() -> None:
    examples = read("\n".join(asked(300)), format="instruction", templates=TEMPLATES)
    assert all(example.prompt.startswith("Q: ") for example in examples)  # the template of held-out examples
    varied = list(vary(examples, TEMPLATES, seed=1))
    shares = [sum(example.prompt.startswith(start) for example in varied) for start in ("Q: ", "task", "Do this: ")]
    assert sum(shares) == 300 and min(shares) > 60
    assert list(vary(examples, TEMPLATES, seed=1)) == varied
    assert list(vary(examples, TEMPLATES, seed=2)) != varied
    # The prompt of a line does not depend on the lines that other processes have or that were skipped.
    assert list(vary(examples[1::2], TEMPLATES, seed=1)) == varied[1::2]
    lines = asked(300)
    lines[3] = "nonsense"
    skipped = read("\n".join(lines), format="instruction", templates=TEMPLATES, onInvalid="skip")
    assert list(vary(skipped, TEMPLATES, seed=1)) == varied[:3] + varied[4:]


def test_a_single_template_is_used_for_every_example() -> None:
    examples = read("\n".join(asked(5)), format="instruction", templates=TEMPLATES[:1])
    assert list(vary(examples, TEMPLATES[:1], seed=1)) == list(examples)


def test_the_texts_of_a_file_do_not_stay_in_memory() -> None:
    record = chat({"role": "user", "content": "Hi " * 500}, ANSWER)
    data = io.BytesIO("\n".join([record] * 2000).encode())
    tracemalloc.start()
    try:
        found = read_examples(data, dataset(), role="train", uri="s3://bucket/train.jsonl", limit=None).examples
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 2000 and peak < 200_000, "the peak must be far below the 3 million bytes of the file"


@pytest.mark.parametrize(("template", "part"), [("Q: {question}", "{question}"), ("Answer!", "no {instruction}")])
def test_a_template_that_cannot_be_filled_is_refused(template: str, part: str) -> None:
    with pytest.raises(Failure) as caught:
        check_template(template)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert part in caught.value.message


def test_text_must_not_be_empty() -> None:
    assert "line 2: text is empty" in refused('{"text": "a"}\n{"text": " "}', format="text").message
    assert "text is a number" in refused('{"text": 1}', format="text").message


def test_the_split_follows_the_seed_and_leaves_examples_on_both_sides() -> None:
    examples = read("\n".join([GOOD] * 20))
    train, held = map(list, split(examples, 0.2, seed=1))
    assert (len(train), len(held)) == (16, 4)
    assert sorted(train + held, key=lambda example: example.line) == list(examples)
    assert [*map(list, split(examples, 0.2, seed=1))] == [train, held]
    assert [*map(list, split(examples, 0.2, seed=2))] != [train, held]
    assert [len(part) for part in split(examples[:2], 0.01, seed=1)] == [1, 1]
    assert (held_out_size(20, 0.2), held_out_size(2, 0.01)) == (4, 1)
    with pytest.raises(Failure, match="at least 2 examples"):
        split(examples[:1], 0.5, seed=1)


def test_dataset_uris_of_the_hub_are_split_into_repository_revision_and_path() -> None:
    assert split_dataset_uri("hf://datasets/a/b/x/train.jsonl") == ("a/b", "main", "x/train.jsonl")
    assert split_dataset_uri("hf://datasets/a/b@v1/train.jsonl") == ("a/b", "v1", "train.jsonl")
    assert split_dataset_uri("hf://datasets/a/b@refs/pr/3/t.jsonl") == ("a/b", "refs/pr/3", "t.jsonl")
