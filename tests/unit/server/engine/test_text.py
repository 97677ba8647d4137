"""Tokens become text without broken characters, and sampling follows its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graft_server.engine.sampling import Sampler, Sampling, TokenLogprob
from graft_server.engine.shapes import Choice, Shapes, TokenTexts
from graft_server.engine.text import TextStream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def by_bytes() -> Any:
    """Return a tokenizer whose tokens are single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def streamed(tokenizer: Any, text: str, *stop: str) -> list[str]:
    stream = TextStream(tokenizer, tokenizer.encode("prompt"), stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 and 🙂🙂", "é", " leading space", "a\nb"])
def test_characters_are_never_split(by_bytes: Any, text: str) -> None:
    pieces = streamed(by_bytes, text)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_are_not_text_do_not_delay_the_answer(by_bytes: Any) -> None:
    stream = TextStream(by_bytes, [])
    broken = by_bytes.encode("é")[0]
    pieces = [stream.push(broken) for _ in range(20)]
    assert any(pieces)
    assert "".join([*pieces, stream.finish()]) == "\N{REPLACEMENT CHARACTER}" * 20


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one EN", ["END"], "one EN"),
        ("ENEND", ["END"], "EN"),
        ("first second", ["second", "first"], ""),
        ("abcdef", ["bcdefgh", "cd"], "ab"),
        ("日本語。次", ["。"], "日本語"),
    ],
)
def test_stop_strings_end_the_text(by_bytes: Any, text: str, stop: list[str], wanted: str) -> None:
    assert "".join(streamed(by_bytes, text, *stop)) == wanted


def draws(logits: list[float], count: int = 300, **sampling: Any) -> set[int]:
    sampler = Sampler(Sampling(seed=1, **sampling))
    return {sampler.pick(torch.tensor(logits)).token for _ in range(count)}


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    logits = [0.0, 2.0, 1.0, 1.9]
    assert draws(logits, temperature=0.0) == {1}
    assert draws(logits) == {0, 1, 2, 3}
    assert draws(logits, top_k=2) == {1, 3}
    assert draws(logits, top_p=1e-9) == {1}
    assert draws(logits, top_p=0.5) == {1, 3}
    assert draws(logits, top_p=0.85) == {1, 2, 3}
    assert draws(logits, temperature=1e-3) == {1}


def test_a_logit_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a number"):
        draws([0.0, float("nan")])


def test_the_last_token_of_a_character_has_its_text_and_its_bytes(by_bytes: Any) -> None:
    """As in vLLM: one byte of a character has no text, and never the replacement character."""
    shapes = Shapes(True, "id", "m", TokenTexts(by_bytes))
    text = "aé😀b"
    ids = by_bytes.encode(text, add_special_tokens=False)
    assert len(ids) == 8, "each byte is one token"
    pieces = [Choice(logprobs=[TokenLogprob(token, -1.0, ((token, -1.0),))]) for token in ids]
    entries = [shapes.chunk(0, piece)["choices"][0]["logprobs"]["content"][0] for piece in pieces]
    assert [entry["token"] for entry in entries] == ["a", "", "é", "", "", "", "😀", "b"]
    assert [entry["bytes"] for entry in entries] == [list(entry["token"].encode()) for entry in entries]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    whole = Choice(logprobs=[TokenLogprob(token, -1.0) for token in ids])
    report = Shapes(False, "id", "m", TokenTexts(by_bytes)).answer([whole], {})["choices"][0]["logprobs"]
    assert "".join(report["tokens"]) == text and report["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
