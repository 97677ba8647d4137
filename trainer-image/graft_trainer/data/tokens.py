"""Turn examples into tokens and labels: what the model reads, and which tokens the loss covers.

A causal model reads prompt and answer as one text. For `chat` and `instruction`, the loss covers only the assistant's
tokens; for `text`, it covers all tokens. A seq2seq model reads the prompt with its encoder, and the loss covers the
answer of its decoder. The module knows nothing about the dataset's files, models or training.
"""

import logging
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
from graft.contracts.progress import Reason
from graft.controltokens import read_texts

from graft_trainer.data.context import check_pair, plain_prompt
from graft_trainer.data.conversation import Piece, prompt_tokens, tokenise_conversations
from graft_trainer.data.example import Example
from graft_trainer.data.lines import BadLine
from graft_trainer.data.unusable import Unusable
from graft_trainer.run.failures import Failure

if TYPE_CHECKING:
    from torch import Tensor

    Code = np.ndarray[tuple[int], np.dtype[np.int32]]

log = logging.getLogger(__name__)
Task = Literal["causal", "seq2seq"]
IGNORED = -100  # label of a token that the loss does not cover, as in torch's cross entropy
TOGETHER = 256  # examples per call of the tokenizer; only their texts are in memory


class Tokenised:
    """The tokens of one example. causal: ids and labels have equal length; a label is the id if the loss covers the
    token, else IGNORED. seq2seq: the ids are the encoder's and the labels are the decoder's, each with its own length.

    Stored as `code`, int32: the id of a token that the loss covers, and the complement (~id, below 0) for any other
    token. For seq2seq, the encoder's tokens come first, then the decoder's. Two lists of ints would take ten times as
    much memory.
    """

    __slots__ = ("code", "task")

    def __init__(self, input_ids: Sequence[int], labels: Sequence[int], task: Task = "causal") -> None:
        ids, targets = np.asarray(input_ids, np.int32), np.asarray(labels, np.int32)
        if task == "seq2seq":
            self.code = np.concatenate([~ids, targets])
        else:
            self.code = np.where(targets == IGNORED, ~ids, targets)
        self.task = task

    @classmethod
    def of(cls, code: "Code", task: Task) -> "Tokenised":
        made = cls.__new__(cls)
        made.code, made.task = code, task
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenised) and self.task == other.task and np.array_equal(self.code, other.code)

    __hash__ = None  # type: ignore[assignment]

    @property
    def input_ids(self) -> list[int]:
        return self.arrays()[0].tolist()

    @property
    def labels(self) -> list[int]:
        return self.arrays()[1].tolist()

    def arrays(self) -> tuple["Code", "Code"]:
        """Return (input ids, labels)."""
        code = self.code
        if self.task == "seq2seq":
            return ~code[code < 0], code[code >= 0]
        return np.where(code < 0, ~code, code), np.where(code < 0, np.int32(IGNORED), code)

    @property
    def tokens(self) -> int:
        """The number of tokens that the model reads; for seq2seq, of both sides."""
        return len(self.code)

    @property
    def learned(self) -> int:
        """The number of labels that the loss averages over. A causal model never predicts the first token: it does not
        count."""
        return int(np.count_nonzero(self.code[self.task == "causal" :] >= 0))

    @property
    def largest(self) -> int:
        """The largest token id."""
        return int(max(self.code.max(), ~self.code.min()))


class TokenFile(Sequence[Tokenised]):
    """Examples in a file that is mapped into memory: the codes of all examples, then the number of tokens of each, all
    int32. The kernel keeps as much of the file in memory as fits, once for all processes of a pod. So no number of
    tokens makes a pod run out of memory."""

    def __init__(self, path: Path, examples: int, task: Task) -> None:
        numbers = np.asarray(np.memmap(path, np.int32, "r"))
        self.codes = numbers[: len(numbers) - examples]
        self.ends = np.cumsum(numbers[len(self.codes) :], dtype=np.int64)
        self.path = path
        self.task = task
        self.file: IO[bytes] | None = None

    @classmethod
    def write(cls, items: Iterable[Tokenised], task: Task, folder: Path | None) -> "TokenFile | None":
        """Write a new file in `folder`. The file is deleted together with this object. Return None if there are no
        items."""
        file = tempfile.NamedTemporaryFile(prefix="tokens-", dir=folder)  # noqa: SIM115 - it stays open with the object
        lengths = array("i")
        for item in items:
            file.write(item.code.tobytes())
            lengths.append(item.tokens)
        file.write(lengths.tobytes())
        file.flush()
        if not lengths:
            return None
        made = cls(Path(file.name), len(lengths), task)
        made.file = file
        return made

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Tokenised: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokenised]: ...
    def __getitem__(self, index: int | slice) -> Tokenised | list[Tokenised]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        end = self.ends[index]
        begin = self.ends[index - 1] if index % len(self) else 0
        return Tokenised.of(self.codes[begin:end], self.task)


class Sized(NamedTuple):
    """A sequence, cut to maxLength, with its lengths before the cut, in tokens."""

    item: Tokenised
    whole: int  # for seq2seq, both sides together
    longest: int  # what maxLength limits: for seq2seq the longer side, else the whole


@dataclass(frozen=True)
class Tokenisation:
    """The sequences of the examples that remain, and which examples were truncated or left out."""

    examples: Sequence[Tokenised]
    truncated: int  # sequences cut to max_length
    unusable: Unusable  # the examples that are left out

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(item.tokens for item in self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(item.tokens for item in self.examples)


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    role: str,
    task: Task = "causal",
    folder: Path | None = None,
    skip: bool = False,
) -> Tokenisation:
    """Tokenise the examples and cut them to `max_length`; for seq2seq, cut each side. The tokens are written to a file
    in `folder`.

    Raises Failure(DatasetInvalid) if an example cannot be used; with `skip`, only if no example remains. Raises
    Failure(ConfigurationInvalid) if the format is text and the model is seq2seq.
    """
    truncated, unusable = 0, Unusable(role, max_length)

    def items() -> Iterator[Tokenised]:
        nonlocal truncated
        for _, found in usable(examples, tokenizer, max_length, task, unusable):
            for one in found:
                truncated += one.longest > max_length
                yield one.item

    kept = TokenFile.write(items(), task, folder)
    unusable.check(len(examples), skip=skip)
    assert kept is not None  # noqa: S101 - check raised if no example remains
    if truncated:
        log.warning("dataset.%s: %d sequences were cut to %d tokens", role, truncated, max_length)
    return Tokenisation(kept, truncated, unusable)


def usable(
    examples: Sequence[Example], tokenizer: Any, max_length: int, task: Task, unusable: Unusable
) -> Iterator[tuple[Example, list[Sized]]]:
    """Yield each example with its sequences.

    Examples that cannot be used are added to `unusable`: the template refuses them, or the loss covers none of their
    tokens within `max_length`.
    """
    for begin in range(0, len(examples), TOGETHER):
        together = list(examples[begin : begin + TOGETHER])
        for example, found in zip(together, _tokenise(together, tokenizer, max_length, task), strict=True):
            if isinstance(found, BadLine):
                unusable.add(example.line, found)
            elif learned := [one for one in found if one.item.learned]:
                yield example, learned
            else:
                unusable.add(example.line, _too_long(found, max_length))


def _too_long(found: list[Sized], max_length: int) -> BadLine:
    longest = max(one.longest for one in found)
    if longest <= max_length:
        return BadLine("the answer has no token", "nothingToLearn", "Give the line an answer.")
    return BadLine(
        f"the answer begins after the {max_length} tokens of spec.training.maxLength: the example has {longest} tokens",
        "tooLong",
        "Raise spec.training.maxLength, or shorten the prompts.",
    )


def _tokenise(examples: Sequence[Example], tokenizer: Any, max_length: int, task: Task) -> list[list[Sized] | BadLine]:
    """Return the sequences of each example, or why it cannot be used."""
    if task == "seq2seq":
        return [_sized_pair(example, tokenizer, max_length) for example in examples]
    return [
        found if isinstance(found, BadLine) else [_sized(ids, learned, max_length) for ids, learned in found]
        for found in tokenise_together(examples, tokenizer)
    ]


def _sized(ids: list[int], learned: list[bool], max_length: int) -> Sized:
    code = np.asarray(ids[:max_length], np.int32)
    item = Tokenised.of(np.where(learned[:max_length], code, ~code), "causal")
    return Sized(item, len(ids), len(ids))


def _sized_pair(example: Example, tokenizer: Any, max_length: int) -> list[Sized] | BadLine:
    try:
        source, target = tokenise_pair(example, tokenizer)
    except BadLine as error:
        return error
    item = Tokenised(_cut(source, max_length, tokenizer), target[:max_length], "seq2seq")
    return [Sized(item, len(source) + len(target), max(len(source), len(target)))]


def tokenise_one(example: Example, tokenizer: Any) -> list[Piece]:
    """Return the sequences of an example, each (token ids, whether the loss covers each token), not cut. Only a
    conversation can have several.

    Raises Failure(DatasetInvalid) if the example cannot be used.
    """
    found = tokenise_together([example], tokenizer)[0]
    if isinstance(found, BadLine):
        raise failure_of(example, found) from found
    return found


def failure_of(example: Example, error: BadLine) -> Failure:
    """Return the failure of one example that cannot be used."""
    return Failure(Reason.DATASET_INVALID, f"line {example.line}: {error}", error.remedy or "Correct this line.")


def tokenise_together(examples: Sequence[Example], tokenizer: Any) -> list[list[Piece] | BadLine]:
    """Return the same for several examples, which must all have the same form, or why one cannot be used."""
    if examples[0].messages is not None:
        return tokenise_conversations(examples, tokenizer)
    if examples[0].text is not None:
        ends = [ids + _end(tokenizer) for ids in read_texts(tokenizer, [example.text or "" for example in examples])]
        return [[(ids, [True] * len(ids))] for ids in ends]
    # Tokenised separately, as at inference, where the prompt's last token cannot merge with the answer's first token.
    prompts = read_texts(tokenizer, [example.prompt or "" for example in examples])
    answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    ends = [ids + _end(tokenizer) for ids in answers]
    return [
        [(prompt + end, [False] * len(prompt) + [True] * len(end))] for prompt, end in zip(prompts, ends, strict=True)
    ]


def tokenise_pair(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return (the encoder's ids, the decoder's labels), not cut. The answer ends with the token that ends a generation.

    Raises Failure(ConfigurationInvalid) for a text, and BadLine if the example cannot be used.
    """
    if example.text is not None:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "spec.dataset.format is text, but the base model is seq2seq: it trains on prompts with answers",
            "Set spec.dataset.format to instruction or chat, or use a causal base model.",
        )
    check_pair(example, tokenizer)
    answer = list(tokenizer(text_target=example.answer)["input_ids"])
    end = _end(tokenizer)
    return _prompt(example, tokenizer, "seq2seq"), answer if answer[-1:] == end else answer + end


def prompt_ids(example: Example, tokenizer: Any, task: Task = "causal") -> list[int]:
    """Return the ids of the prompt; for seq2seq, the encoder's input. Not for examples of the format text.

    Raises Failure(DatasetInvalid) if the example cannot be used.
    """
    try:
        return _prompt(example, tokenizer, task)
    except BadLine as error:
        raise failure_of(example, error) from error


def _prompt(example: Example, tokenizer: Any, task: Task) -> list[int]:
    if example.messages is None:
        prompt = example.prompt or ""
        return read_texts(tokenizer, [prompt])[0] if task == "causal" else list(tokenizer(prompt)["input_ids"])
    if task == "seq2seq" and not tokenizer.chat_template:
        return list(tokenizer(plain_prompt(example))["input_ids"])
    return prompt_tokens(example, tokenizer)


def _cut(ids: list[int], max_length: int, tokenizer: Any) -> list[int]:
    """Return at most `max_length` ids. If the tokenizer ends an input with a special token (T5), the cut input has it,
    too."""
    if len(ids) <= max_length:
        return ids
    end = [token for token in ids[-1:] if token in tokenizer.all_special_ids]
    return ids[: max_length - len(end)] + end


def _end(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def pad_token(tokenizer: Any) -> int:
    """Return a token id for the padding. Any id will do, because the padding is masked everywhere."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    return 0


class Collator:
    """Turn examples into a batch, padded on the right to the longest. `tokens` counts the tokens of all batches so
    far."""

    def __init__(self, pad: int, multiple: int = 1) -> None:
        self.pad = pad
        self.multiple = multiple
        self.tokens = 0

    def __call__(self, examples: Sequence[Any]) -> "dict[str, Tensor]":
        """Return, for Tokenised examples, input_ids and attention_mask (examples, longest input) and labels (examples,
        longest labels). A seq2seq model makes the decoder's input from the labels."""
        self.tokens += sum(item.tokens for item in examples)
        ids, labels = zip(*(item.arrays() for item in examples), strict=True)
        return {
            "input_ids": self._fill(ids, self.pad),
            "attention_mask": self._fill([np.ones_like(row) for row in ids], 0),
            "labels": self._fill(labels, IGNORED),
        }

    def _fill(self, rows: "Sequence[Code]", value: int) -> "Tensor":
        import torch  # takes seconds to import, and prepare only tokenises

        width = -(-max(map(len, rows)) // self.multiple) * self.multiple
        filled = np.full((len(rows), width), value, np.int64)
        for place, row in zip(filled, rows, strict=True):
            place[: len(row)] = row
        return torch.from_numpy(filled)
