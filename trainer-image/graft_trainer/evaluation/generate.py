"""Generate a model's greedy answers, in batches of prompts with similar lengths."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig

from graft_trainer.data.chat import answer_stops
from graft_trainer.evaluation.subject import Meter, Subject
from graft_trainer.model.batches import in_batches
from graft_trainer.train import Trained

GENERATED_AT_ONCE = 32  # answers; halved each time memory runs out


def generate(
    subject: Subject,
    prompts: Sequence[list[int]],
    longest: Sequence[int],
    meter: Meter | None = None,
    *,
    special_tokens: bool = False,
) -> list[str]:
    """Return the answers, in the order of the prompts. A prompt that is too long for the model is cut.

    `longest`: the limit of new tokens for each prompt. A batch uses the largest limit of its prompts. With
    `special_tokens`, the texts have the special tokens before the end: some formats of calls consist of them.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    subject.model.eval()

    def answer(chosen: Sequence[int]) -> None:
        new = at_most(subject, max(longest[index] for index in chosen))
        room = subject.room
        if room is not None and subject.task == "causal":
            room -= new
        cut = [subject.cut(prompts[index], room) for index in chosen]
        texts = _generate_batch(subject, cut, new, special_tokens=special_tokens)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text

    in_batches(order, GENERATED_AT_ONCE, answer, meter)
    return answers


def at_most(subject: Subject, new: int) -> int:
    """Return the limit of new tokens if up to `new` are requested. At least half of a short context remains for the
    question."""
    return new if subject.room is None else min(new, max(1, subject.room // 2))


def _generate_batch(subject: Subject, prompts: list[list[int]], new: int, *, special_tokens: bool) -> list[str]:
    pad, width = subject.pad, max(len(prompt) for prompt in prompts)
    causal = subject.task == "causal"
    # A causal model continues from the last token, so its prompts are padded on the left. An encoder's are padded on
    # the right.
    ids = torch.tensor([_fill(prompt, pad, width, left=causal) for prompt in prompts])
    mask = torch.tensor([_fill([1] * len(prompt), 0, width, left=causal) for prompt in prompts])
    arguments = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=subject.stop or None, pad_token_id=pad, use_cache=True
    )
    if subject.task == "seq2seq":
        arguments.decoder_start_token_id = subject.model.config.decoder_start_token_id
    with torch.inference_mode():
        output = generate_ids(subject, ids.to(subject.model.device), mask.to(subject.model.device), arguments)
    if special_tokens:
        ends = {*subject.stop, pad}
        rows = [list(takewhile(lambda token: token not in ends, row)) for row in output.tolist()]
        return [str(text) for text in subject.tokenizer.batch_decode(rows)]
    return [str(text) for text in subject.tokenizer.batch_decode(output, skip_special_tokens=True)]


def generate_ids(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, **arguments: Any
) -> torch.Tensor:
    """Return the generated tokens: (batch, new tokens). For seq2seq, the decoder's start token comes first.

    Causal prompts must be padded on the left.
    """
    model = subject.model
    if subject.virtual_tokens:
        # peft puts the virtual tokens before the padding of a causal prompt, so the positions of the prompt depend on
        # the padding. Then an answer would depend on the other prompts in the batch. Here the virtual tokens come after
        # the padding.
        words, mask = _with_virtual_tokens(subject, ids, mask)
        return model.get_base_model().generate(
            inputs_embeds=words, attention_mask=mask, generation_config=config, **arguments
        )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **arguments)
    return output[:, ids.shape[1] :] if subject.task == "causal" else output


def _with_virtual_tokens(subject: Subject, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (embeddings, mask) with the virtual tokens before each row's first token that is not padding."""
    model, count = subject.model, subject.virtual_tokens
    words = model.get_base_model().get_input_embeddings()(ids)
    virtual = model.get_prompt(batch_size=1)[0, :count].to(words)
    starts = mask.argmax(dim=1).tolist()
    rows = [torch.cat([row[:start], virtual, row[start:]]) for row, start in zip(words, starts, strict=True)]
    marks = [
        torch.cat([row[:start], row.new_ones(count), row[start:]]) for row, start in zip(mask, starts, strict=True)
    ]
    return torch.stack(rows), torch.stack(marks)


def stop_tokens(trained: Trained) -> list[int]:
    """Return the ids that end an answer: those of the base model, and the token that ends the answers of training."""
    value = trained.model.generation_config.eos_token_id if trained.model.generation_config else None
    own = value if isinstance(value, list) else [value] if value is not None else []
    # An engine refuses the id of a token that the model does not have.
    known = range(trained.model.config.get_text_config().vocab_size)
    return sorted(token for token in {*own, *answer_stops(trained.tokenizer)} if token in known)


def _fill(row: list[int], value: int, width: int, *, left: bool) -> list[int]:
    padding = [value] * (width - len(row))
    return padding + row if left else row + padding
