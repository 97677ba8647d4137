"""From examples to tokens: what the model reads, and which of it is learned.

A causal model reads prompt and answer as one text; of chat and instruction only the assistant's tokens are learned, of
text everything. A seq2seq model reads the prompt with its encoder and learns the answer with its decoder. It knows
nothing about files, models or training.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graft.contracts import Reason

from graft_trainer.dataset import Example, Message
from graft_trainer.failures import Failure

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Task = Literal["causal", "seq2seq"]
IGNORED = -100  # the label of a token that is not learned, as torch's cross entropy has it
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokenised:
    """One example. causal: ids and labels of equal length, a label is the id where it is learned, else IGNORED.
    seq2seq: the ids are the encoder's, the labels the decoder's, each with its own length."""

    input_ids: list[int]
    labels: list[int]
    task: Task = "causal"

    @property
    def tokens(self) -> int:
        """What the model reads: of seq2seq both sides."""
        return len(self.input_ids) + (len(self.labels) if self.task == "seq2seq" else 0)

    @property
    def learned(self) -> int:
        """Labels that the loss is a mean over. The first token of a causal model is never predicted, so it does not count."""
        predicted = self.labels[1:] if self.task == "causal" else self.labels
        return sum(label != IGNORED for label in predicted)


@dataclass(frozen=True)
class Tokenisation:
    """The examples that are left, with what happened to the others."""

    examples: list[Tokenised]
    truncated: int  # cut to max_length, the dropped ones included
    dropped: int  # cut so short that nothing to learn was left

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(item.tokens for item in self.examples)


def tokenise(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, role: str, task: Task = "causal"
) -> Tokenisation:
    """Tokenise and cut; of seq2seq each side to `max_length`. Failure(DatasetInvalid) when nothing is left, or the chat
    template refuses an example; Failure(ConfigurationInvalid) for text and a seq2seq model."""
    kept: list[Tokenised] = []
    truncated = dropped = 0
    for example in examples:
        if task == "seq2seq":
            source, target = tokenise_pair(example, tokenizer)
            truncated += max(len(source), len(target)) > max_length
            item = Tokenised(_cut(source, max_length, tokenizer), target[:max_length], task)
        else:
            ids, learned = tokenise_one(example, tokenizer)
            truncated += len(ids) > max_length
            labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
            item = Tokenised(ids[:max_length], labels[:max_length])
        if item.learned:
            kept.append(item)
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


def tokenise_pair(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(the encoder's ids, the decoder's labels), neither cut. The answer ends with the token that ends a generation."""
    if example.text is not None:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "dataset.format is text, and the base model is seq2seq: it learns answers to prompts",
            "Use dataset.format instruction or chat, or a causal base model.",
        )
    answer = _ids(tokenizer(text_target=example.answer))
    end = _end(tokenizer)
    return prompt_ids(example, tokenizer, "seq2seq"), answer if answer[-1:] == end else answer + end


def prompt_ids(example: Example, tokenizer: Any, task: Task = "causal") -> list[int]:
    """What the model is given to answer the example, of seq2seq the encoder's input; not for text."""
    if example.messages is not None and task == "seq2seq" and not tokenizer.chat_template:
        return _ids(tokenizer(_plain(example)))
    if example.messages is None:
        return _ids(tokenizer(example.prompt))
    text = _render(example, example.messages[:-1], tokenizer, prompt=True)
    return _ids(tokenizer(text, add_special_tokens=False))


def _plain(example: Example) -> str:
    """The prompt as plain text, for a seq2seq model without a chat template: what was asked, and nothing around it."""
    before = (example.messages or ())[:-1]
    if any(message["role"] in {"assistant", "tool"} for message in before):
        raise Failure(
            Reason.DATASET_INVALID,
            f"line {example.line}: a conversation of several turns, and the base model has no chat template to tell them apart",
            "Use conversations of one question and one answer, dataset.format instruction, or a base model with a chat template.",
        )
    return "\n\n".join(str(message.get("content") or "") for message in before)


def _cut(ids: list[int], max_length: int, tokenizer: Any) -> list[int]:
    """At most `max_length` ids; where the tokenizer ends an input with a token of its own (T5), a cut one has it, too."""
    if len(ids) <= max_length:
        return ids
    end = [token for token in ids[-1:] if token in tokenizer.all_special_ids]
    return ids[: max_length - len(end)] + end


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

    def __call__(self, examples: Sequence[Any]) -> "dict[str, Tensor]":
        """Of Tokenised examples: input_ids and attention_mask (examples, longest input), labels (examples, longest labels).
        The model of a seq2seq task makes the decoder's input from the labels."""
        self.tokens += sum(item.tokens for item in examples)
        return {
            "input_ids": self._fill([item.input_ids for item in examples], self.pad),
            "attention_mask": self._fill([[1] * len(item.input_ids) for item in examples], 0),
            "labels": self._fill([item.labels for item in examples], IGNORED),
        }

    def _fill(self, rows: list[list[int]], value: int) -> "Tensor":
        import torch  # takes seconds to load, and prepare only tokenises

        width = -(-max(map(len, rows)) // self.multiple) * self.multiple
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])
