"""The loss covers only the assistant's answers, for both ways to find them in a chat template."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from graft.contracts.progress import Reason
from graft_trainer.data.example import Example
from graft_trainer.data.tokens import (
    IGNORED,
    Collator,
    TokenFile,
    Tokenised,
    prompt_ids,
    tokenise,
    tokenise_one,
    tokenise_pair,
)
from graft_trainer.run.failures import Failure
from worlds.trainer import MARKED, UNMARKED, make_tokenizer

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
)


def learned(example: Example, tokenizer: Any) -> list[str]:
    """Return the spans that the loss covers, as text."""
    [(ids, mask)] = tokenise_one(example, tokenizer)
    stretches: list[list[int]] = []
    for index, (token, learn) in enumerate(zip(ids, mask, strict=True)):
        if learn and (index == 0 or not mask[index - 1]):
            stretches.append([])
        if learn:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["generation marks", "prefix rendering"])
def test_the_loss_covers_the_answers_and_their_end_tokens(template: str) -> None:
    tokenizer = make_tokenizer(template)
    example = Example(1, messages=TURNS, answer="See you.")
    assert learned(example, tokenizer) == ["Hello.</s>", "See you.</s>"]
    [(ids, _)] = tokenise_one(example, tokenizer)
    assert tokenizer.decode(ids) == (
        "<s><|system|>Be brief.<|user|>Hi<|assistant|>Hello.</s><|user|>Bye<|assistant|>See you.</s>"
    )


def test_generation_marks_and_prefix_rendering_give_the_same_tokens() -> None:
    example = Example(1, messages=TURNS, answer="See you.")
    assert tokenise_one(example, make_tokenizer(MARKED)) == tokenise_one(example, make_tokenizer(UNMARKED))


def test_the_prompt_of_an_answer_is_everything_before_it() -> None:
    tokenizer = make_tokenizer()
    example = Example(1, messages=TURNS, answer="See you.")
    [(ids, _)] = tokenise_one(example, tokenizer)
    prompt = prompt_ids(example, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == "See you.</s>"


def test_for_an_instruction_with_a_template_the_loss_covers_the_answer_and_its_end() -> None:
    tokenizer = make_tokenizer(None)
    assert learned(Example(1, prompt="Q: 2+2\nA: ", answer="4"), tokenizer) == ["4</s>"]


def test_for_text_the_loss_covers_everything() -> None:
    [(ids, mask)] = tokenise_one(Example(1, text="All of it."), make_tokenizer(None))
    assert all(mask) and make_tokenizer(None).decode(ids) == "All of it.</s>"


def test_truncated_examples_are_counted_and_those_without_an_answer_are_left_out() -> None:
    tokenizer = make_tokenizer(None)
    examples = [
        Example(1, prompt="short", answer="yes"),
        Example(2, prompt="short", answer="y" * 40),
        Example(3, prompt="p" * 40, answer="no"),
    ]
    result = tokenise(examples, tokenizer, 20, role="train", skip=True)
    assert (len(result.examples), result.truncated, result.unusable.lines, result.longest) == (2, 1, {3}, 20)
    assert all(len(item.input_ids) == len(item.labels) for item in result.examples)
    with pytest.raises(Failure, match="a token to train on within 20 tokens") as caught:
        tokenise(examples[2:], tokenizer, 20, role="train")
    assert caught.value.reason == Reason.DATASET_INVALID


def test_a_conversation_that_the_template_refuses_is_reported_with_its_line() -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(Failure, match=r"line 9: .*System role not supported") as caught:
        tokenise_one(Example(9, messages=TURNS, answer="x"), make_tokenizer(template))
    assert caught.value.reason == Reason.DATASET_INVALID


def test_a_batch_is_as_wide_as_its_longest_example() -> None:
    collate = Collator(pad=0)
    batch = collate([Tokenised([5, 6, 7], [IGNORED, 6, 7]), Tokenised([8], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert collate.tokens == 4
    assert Collator(pad=0, multiple=8)([Tokenised([1], [1])])["input_ids"].shape == (1, 8)


def ending_tokenizer() -> Any:
    """Return a tokenizer that adds </s> to every text, like T5's tokenizer."""
    from tokenizers import processors

    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("tokenizer", [make_tokenizer(None), ending_tokenizer()], ids=["bare", "ends by itself"])
def test_a_seq2seq_input_is_the_prompt_and_its_target_is_the_answer_with_one_end_token(tokenizer: Any) -> None:
    source, target = tokenise_pair(Example(1, prompt="Q: 2+2\nA: ", answer="4"), tokenizer)
    assert tokenizer.decode(source).removesuffix("</s>") == "Q: 2+2\nA: "
    assert tokenizer.decode(target) == "4</s>"


def test_the_encoder_input_uses_the_chat_template_if_there_is_one_and_plain_text_otherwise() -> None:
    single = Example(1, messages=TURNS[1:3], answer="Hello.")
    whole = Example(1, messages=TURNS, answer="See you.")
    tokenizer, bare = make_tokenizer(), make_tokenizer(None)
    assert tokenizer.decode(prompt_ids(whole, tokenizer, "seq2seq")) == (
        "<s><|system|>Be brief.<|user|>Hi<|assistant|>Hello.</s><|user|>Bye<|assistant|>"
    )
    assert bare.decode(prompt_ids(single, bare, "seq2seq")) == "Hi"
    system = Example(1, messages=TURNS[:3], answer="Hello.")
    assert bare.decode(prompt_ids(system, bare, "seq2seq")) == "Be brief.\n\nHi"
    with pytest.raises(Failure, match="line 7: a conversation of several turns") as caught:
        prompt_ids(Example(7, messages=TURNS, answer="See you."), bare, "seq2seq")
    assert caught.value.reason == Reason.DATASET_INVALID


def test_both_sides_of_a_seq2seq_example_are_truncated_and_the_input_keeps_its_end_token() -> None:
    tokenizer = ending_tokenizer()
    examples = [Example(1, prompt="p" * 40, answer="yes"), Example(2, prompt="short", answer="y" * 40)]
    result = tokenise(examples, tokenizer, 20, role="train", task="seq2seq")
    assert (len(result.examples), result.truncated, result.unusable.total, result.longest) == (2, 2, 0, 26)
    first, second = result.examples
    assert tokenizer.decode(first.input_ids) == "p" * 19 + "</s>"
    assert tokenizer.decode(first.labels) == "yes</s>"
    assert tokenizer.decode(second.labels) == "y" * 20
    assert (first.tokens, first.learned) == (24, 4)


def test_text_is_refused_for_a_seq2seq_model() -> None:
    with pytest.raises(Failure, match=r"dataset\.format is text") as caught:
        tokenise([Example(1, text="All of it.")], make_tokenizer(None), 20, role="train", task="seq2seq")
    assert caught.value.reason == Reason.CONFIGURATION_INVALID


def test_a_seq2seq_batch_pads_each_side_to_its_own_width() -> None:
    collate = Collator(pad=0)
    batch = collate([Tokenised([5, 6, 7], [8], "seq2seq"), Tokenised([5], [8, 9], "seq2seq")])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, IGNORED], [8, 9]]
    assert collate.tokens == 7


FORMS = {
    "chat": lambda n: Example(
        n,
        messages=({"role": "user", "content": "q" * (n % 37 + 1)}, {"role": "assistant", "content": "a " * n}),
        answer="",
    ),
    "turns": lambda n: Example(n, messages=(*TURNS[:4], {"role": "assistant", "content": "See " * n}), answer=""),
    "prompt": lambda n: Example(n, prompt="p" * (n % 29 + 1), answer="a" * n),
    "text": lambda n: Example(n, text="tö " * n),
}


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["generation marks", "prefix rendering"])
@pytest.mark.parametrize("form", FORMS)
def test_many_examples_give_the_same_tokens_as_each_alone(form: str, template: str) -> None:
    examples, tokenizer = [FORMS[form](n) for n in range(1, 601)], make_tokenizer(template)
    result = tokenise(examples, tokenizer, 300, role="train", skip=True)
    expected = []
    for [(ids, mask)] in (tokenise_one(example, tokenizer) for example in examples):
        labels = [token if learn else IGNORED for token, learn in zip(ids, mask, strict=True)]
        if any(mask[1:300]):
            expected.append((ids[:300], labels[:300]))
    assert [(item.input_ids, item.labels) for item in result.examples] == expected
    assert [item.learned for item in result.examples] == [
        sum(label != IGNORED for label in labels[1:]) for _, labels in expected
    ]
    assert len(expected) + result.unusable.total == 600
    assert max(item.largest for item in result.examples) == max(max(ids) for ids, _ in expected)


def test_the_tokens_of_a_large_dataset_are_not_held_in_process_memory() -> None:
    examples, tokenizer = [Example(n, text="word " * 100) for n in range(2000)], make_tokenizer(None)
    tokenise(examples[:1], tokenizer, 1000, role="train")  # do the work that is done only once
    tracemalloc.start()
    try:
        result = tokenise(examples, tokenizer, 1000, role="train")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(item.tokens for item in result.examples) == 2000 * 501
    assert held / (2000 * 501) < 0.1, "the process must hold less than 0.1 bytes per token"


def test_examples_in_a_file_are_read_like_those_in_a_list(tmp_path: Path) -> None:
    made = [Tokenised([5, 6, 7], [8], "seq2seq"), Tokenised([0], [9, 0], "seq2seq"), Tokenised([4, 0], [3], "seq2seq")]
    file = TokenFile.write(made, "seq2seq", tmp_path)
    assert file is not None
    assert list(file) == made and file[-1] == made[-1] and file[-3] == made[0] and file[:2] == made[:2]
    assert list(TokenFile(file.path, 3, "seq2seq")) == made, "another process of the pod must read the same examples"
    with pytest.raises(IndexError):
        file[3]
    assert TokenFile.write([], "causal", tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [file.path.name]
