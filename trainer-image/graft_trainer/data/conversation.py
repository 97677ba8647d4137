"""Tokenise conversations. The loss covers only the assistant's turns.

Marks of the chat template show where these turns are. If the template has no marks, the position of a turn is found
from the text that the turn adds to the rendered conversation.
"""

import re
from collections.abc import Sequence
from typing import Any

from graft.contracts.progress import Reason

from graft_trainer.data.example import Example, Tool
from graft_trainer.data.messages import LEARN, Message
from graft_trainer.run.failures import Failure

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Spans = list[tuple[int, int]]  # (first character, one past the last) in a text


def tokenise_conversations(examples: Sequence[Example], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Return (token ids, whether the loss covers each token) of each example, not truncated.

    Raises Failure(DatasetInvalid) if the chat template refuses an example.
    """
    if tokenizer.is_fast and GENERATION_MARK.search(_template(tokenizer)):
        marked = [None if _has_unlearned(example) else _by_marks(example, tokenizer) for example in examples]
    else:
        marked = [None] * len(examples)
    rest = [example for example, found in zip(examples, marked, strict=True) if found is None]
    texts = [render(example, example.messages or (), tokenizer, prompt=False) for example in rest]
    spans = [_answer_spans(example, text, tokenizer) for example, text in zip(rest, texts, strict=True)]
    masked = iter(_masks(texts, spans, tokenizer))
    return [next(masked) if found is None else found for found in marked]


def _by_marks(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]] | None:
    """Return the tokens with the template's own marks of the assistant's turns, or None if the template marks
    nothing."""
    try:
        encoded = tokenizer.apply_chat_template(
            _for_template(example.messages or ()),
            tools=_tools(example),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:
        raise _refused(example, error) from error
    ids, mask = ids_of(encoded), [bool(value) for value in encoded["assistant_masks"]]
    return (ids, mask) if any(mask) else None


def _answer_spans(example: Example, text: str, tokenizer: Any) -> Spans:
    """Return the characters of the assistant's turns in the rendered text. A turn's characters are those that it adds
    to the rendering of the turns before it."""
    messages = example.messages or ()
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0 or not message.get(LEARN, True):
            continue
        before = render(example, messages[:index], tokenizer, prompt=True, strict=False)
        after = render(example, messages[: index + 1], tokenizer, prompt=False, strict=False)
        if before is not None and after is not None and text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
    if spans and spans[-1][1] >= len(text.rstrip()):
        return spans
    # The template renders a turn differently if other turns follow it. Only the last answer can be found then.
    start = text.rfind(str(messages[-1].get("content") or "").strip())
    if start < 0:
        raise Failure(
            Reason.DATASET_INVALID,
            f"line {example.line}: the base model's chat template changes the text of the answer, so the answer cannot be found "
            "in the rendered conversation",
            "Set spec.dataset.format to instruction and set spec.dataset.templates, or use a base model with a simple chat template.",
        )
    return [(start, len(text))]


def _masks(texts: list[str], spans: list[Spans], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    if not texts or not tokenizer.is_fast:
        return [_mask_by_pieces(text, own, tokenizer) for text, own in zip(texts, spans, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    learned = map(_learned, texts, spans, encoded["offset_mapping"])
    return list(zip(encoded["input_ids"], learned, strict=True))


def _learned(text: str, spans: Spans, offsets: list[tuple[int, int]]) -> list[bool]:
    """Return whether each token begins within a span. `offsets` are the first and the end character of each token."""
    inside = bytearray(len(text))
    for begin, end in spans:
        inside[begin:end] = b"\1" * (end - begin)
    return [start < stop and inside[start] == 1 for start, stop in offsets]


def _mask_by_pieces(text: str, spans: Spans, tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    position = 0
    for begin, end in [*spans, (len(text), len(text))]:
        for piece, learn in ((text[position:begin], False), (text[begin:end], True)):
            tokens = ids_of(tokenizer(piece, add_special_tokens=False)) if piece else []
            ids += tokens
            learned += [learn] * len(tokens)
        position = end
    return ids, learned


def render(example: Example, messages: Sequence[Message], tokenizer: Any, *, prompt: bool, strict: bool = True) -> Any:
    try:
        return tokenizer.apply_chat_template(
            _for_template(messages), tools=_tools(example), tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        if not strict:
            return None
        raise _refused(example, error) from error


def _for_template(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in message.items() if name != LEARN} for message in messages]


def _tools(example: Example) -> list[Tool] | None:
    return list(example.tools) if example.tools else None


def _has_unlearned(example: Example) -> bool:
    return any(not message.get(LEARN, True) for message in example.messages or ())


def _refused(example: Example, error: Exception) -> Failure:
    return Failure(
        Reason.DATASET_INVALID,
        f"line {example.line}: the base model's chat template refuses the conversation: {error}",
        "Use the roles in the order that the model's chat template expects: usually system first, then user and assistant in turn.",
    )


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return str(template.get("default", "")) if isinstance(template, dict) else template or ""


def ids_of(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])
