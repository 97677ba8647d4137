"""From examples to tokens: what the model reads, and which of it is learned.

Of chat and instruction only the assistant's tokens are learned; of text everything. It knows nothing about files,
models or training.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graft.contracts import Reason

from graft_trainer.dataset import Example, Message
from graft_trainer.failures import Failure

log = logging.getLogger(__name__)
IGNORED = -100  # the label of a token that is not learned, as torch's cross entropy has it
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokenised:
    """One example: ids and labels of equal length; a label is the id where it is learned, else IGNORED."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Tokenisation:
    """The examples that are left, with what happened to the others."""

    examples: list[Tokenised]
    truncated: int  # cut to max_length, the dropped ones included
    dropped: int  # cut so short that nothing to learn was left

    @property
    def longest(self) -> int:
        return max(len(item.input_ids) for item in self.examples)


def tokenise(examples: Sequence[Example], tokenizer: Any, max_length: int, *, role: str) -> Tokenisation:
    """Tokenise and cut. Failure(DatasetInvalid) when nothing is left, or the chat template refuses an example."""
    kept: list[Tokenised] = []
    truncated = dropped = 0
    for example in examples:
        ids, learned = tokenise_one(example, tokenizer)
        truncated += len(ids) > max_length
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)][:max_length]
        # The first token is never predicted, so it does not count.
        if any(label != IGNORED for label in labels[1:]):
            kept.append(Tokenised(ids[:max_length], labels))
        else:
            dropped += 1
    if not kept:
        raise Failure(
            Reason.DATASET_INVALID,
            f"dataset.{role}: none of the {len(examples)} examples has anything to learn within {max_length} tokens",
            "Raise training.maxLength, or shorten the prompts.",
        )
    if truncated or dropped:
        log.warning("dataset.%s: %d examples cut to %d tokens, %d dropped", role, truncated, max_length, dropped)
    return Tokenisation(kept, truncated, dropped)


def tokenise_one(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is learned), not cut."""
    if example.text is not None:
        ids = _ids(tokenizer(example.text)) + _end(tokenizer)
        return ids, [True] * len(ids)
    if example.messages is not None:
        return _conversation(example, tokenizer)
    # Apart from each other, as at inference, where the prompt's last token cannot merge with the answer's first.
    prompt = _ids(tokenizer(example.prompt))
    answer = _ids(tokenizer(example.answer, add_special_tokens=False)) + _end(tokenizer)
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """What the model is given to answer the example; not for text."""
    if example.messages is None:
        return _ids(tokenizer(example.prompt))
    text = _render(example, example.messages[:-1], tokenizer, prompt=True)
    return _ids(tokenizer(text, add_special_tokens=False))


def _conversation(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    messages = example.messages or ()
    if tokenizer.is_fast and GENERATION_MARK.search(_template(tokenizer)):
        try:
            encoded = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise _refused(example, error) from error
        ids, mask = _ids(encoded), [bool(value) for value in encoded["assistant_masks"]]
        if any(mask):
            return ids, mask
    text = _render(example, messages, tokenizer, prompt=False)
    spans = _answer_spans(example, text, tokenizer)
    return _mask(text, spans, tokenizer)


def _answer_spans(example: Example, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where the assistant's turns are in the rendered text: what each turn adds to the rendering of those before it."""
    messages = example.messages or ()
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = _render(example, messages[:index], tokenizer, prompt=True, strict=False)
        after = _render(example, messages[: index + 1], tokenizer, prompt=False, strict=False)
        if before is not None and after is not None and text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
    if spans and spans[-1][1] >= len(text.rstrip()):
        return spans
    # A template that renders a turn differently once others follow it: the last answer can still be told.
    start = text.rfind(str(messages[-1].get("content") or "").strip())
    if start < 0:
        raise Failure(
            Reason.DATASET_INVALID,
            f"line {example.line}: the base model's chat template changes the answer, so it cannot be found in the prompt",
            "Use dataset.format instruction with dataset.templates, or a base model with a plain chat template.",
        )
    return [(start, len(text))]


def _mask(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [
            any(start < stop and begin <= start < end for begin, end in spans)
            for start, stop in encoded["offset_mapping"]
        ]
        return _ids(encoded), learned
    ids: list[int] = []
    learned = []
    position = 0
    for begin, end in [*spans, (len(text), len(text))]:
        for piece, learn in ((text[position:begin], False), (text[begin:end], True)):
            tokens = _ids(tokenizer(piece, add_special_tokens=False)) if piece else []
            ids += tokens
            learned += [learn] * len(tokens)
        position = end
    return ids, learned


def _render(example: Example, messages: Sequence[Message], tokenizer: Any, *, prompt: bool, strict: bool = True) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        if not strict:
            return None
        raise _refused(example, error) from error


def _refused(example: Example, error: Exception) -> Failure:
    return Failure(
        Reason.DATASET_INVALID,
        f"line {example.line}: the base model's chat template refuses the conversation: {error}",
        "Use the roles in the order that the model's template wants, usually system, then user and assistant in turn.",
    )


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return str(template.get("default", "")) if isinstance(template, dict) else template or ""


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def pad_token(tokenizer: Any) -> int:
    """An id to fill up with; masked everywhere, so which one does not matter."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    return 0


class Collator:
    """Examples -> a batch, filled up on the right to its longest; it counts the tokens that it has handed out."""

    def __init__(self, pad: int, multiple: int = 1) -> None:
        self.pad = pad
        self.multiple = multiple
        self.tokens = 0

    def __call__(self, examples: Sequence[Tokenised]) -> dict[str, torch.Tensor]:
        longest = max(len(item.input_ids) for item in examples)
        width = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(examples), width), self.pad, dtype=torch.long)
        labels = torch.full((len(examples), width), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, item in enumerate(examples):
            length = len(item.input_ids)
            self.tokens += length
            ids[row, :length] = torch.tensor(item.input_ids)
            labels[row, :length] = torch.tensor(item.labels)
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
