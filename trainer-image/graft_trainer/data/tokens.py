"""From examples to tokens: what the model reads, and which of it is learned.

A causal model reads prompt and answer as one text; of chat and instruction only the assistant's tokens are learned, of
text everything. A seq2seq model reads the prompt with its encoder and learns the answer with its decoder. It knows
nothing about the dataset's files, models or training.
"""

import logging
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, overload

import numpy as np
from graft.contracts.progress import Reason

from graft_trainer.data.conversation import ids_of, render, tokenise_conversations
from graft_trainer.data.dataset import Example
from graft_trainer.run.failures import Failure

if TYPE_CHECKING:
    from torch import Tensor

    Code = np.ndarray[tuple[int], np.dtype[np.int32]]

log = logging.getLogger(__name__)
Task = Literal["causal", "seq2seq"]
IGNORED = -100  # the label of a token that is not learned, as torch's cross entropy has it
TOGETHER = 256  # examples that the tokenizer is given at once, and whose texts are in memory


class Tokenised:
    """One example. causal: ids and labels of equal length, a label is the id where it is learned, else IGNORED.
    seq2seq: the ids are the encoder's, the labels the decoder's, each with its own length.

    Kept as `code`, int32: the id of a token that is learned, the complement (~id, below 0) of one that is not; of seq2seq
    the encoder's tokens and then the decoder's. Two lists of ints would take ten times as much.
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
        """(input ids, labels)."""
        code = self.code
        if self.task == "seq2seq":
            return ~code[code < 0], code[code >= 0]
        return np.where(code < 0, ~code, code), np.where(code < 0, np.int32(IGNORED), code)

    @property
    def tokens(self) -> int:
        """What the model reads: of seq2seq both sides."""
        return len(self.code)

    @property
    def learned(self) -> int:
        """Labels that the loss is a mean over. The first token of a causal model is never predicted, so it does not count."""
        return int(np.count_nonzero(self.code[self.task == "causal" :] >= 0))

    @property
    def largest(self) -> int:
        """The largest id."""
        return int(max(self.code.max(), ~self.code.min()))


class TokenFile(Sequence[Tokenised]):
    """Examples in a file that is mapped into memory: their codes one after another, then how many tokens each has, all
    int32. The kernel keeps of it what there is room for, once for all processes of a pod: tokens are no reason to run out
    of memory, however many they are."""

    def __init__(self, path: Path, examples: int, task: Task) -> None:
        numbers = np.asarray(np.memmap(path, np.int32, "r"))
        self.codes = numbers[: len(numbers) - examples]
        self.ends = np.cumsum(numbers[len(self.codes) :], dtype=np.int64)
        self.path = path
        self.task = task
        self.file: IO[bytes] | None = None

    @classmethod
    def write(cls, items: Iterable[Tokenised], task: Task, folder: Path | None) -> "TokenFile | None":
        """A new file in `folder`, which goes with this object; None when there are no items."""
        file = tempfile.NamedTemporaryFile(prefix="tokens-", dir=folder)  # noqa: SIM115 - it is open as long as this lives
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


@dataclass(frozen=True)
class Tokenisation:
    """The examples that are left, with what happened to the others."""

    examples: Sequence[Tokenised]
    truncated: int  # cut to max_length, the dropped ones included
    dropped: int  # cut so short that nothing to learn was left

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(item.tokens for item in self.examples)


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    role: str,
    task: Task = "causal",
    folder: Path | None = None,
) -> Tokenisation:
    """Tokenise and cut; of seq2seq each side to `max_length`. The tokens go to a file in `folder`.

    Failure(DatasetInvalid) when nothing is left, or the chat template refuses an example; Failure(ConfigurationInvalid) for
    text and a seq2seq model.
    """
    truncated = dropped = 0

    def items() -> Iterator[Tokenised]:
        nonlocal truncated, dropped
        for begin in range(0, len(examples), TOGETHER):
            for item, cut in _tokenise(list(examples[begin : begin + TOGETHER]), tokenizer, max_length, task):
                truncated += cut
                if item.learned:
                    yield item
                else:
                    dropped += 1

    kept = TokenFile.write(items(), task, folder)
    if kept is None:
        raise Failure(
            Reason.DATASET_INVALID,
            f"dataset.{role}: none of the {len(examples)} examples has anything to learn within {max_length} tokens",
            "Raise training.maxLength, or shorten the prompts.",
        )
    if truncated or dropped:
        log.warning("dataset.%s: %d examples cut to %d tokens, %d dropped", role, truncated, max_length, dropped)
    return Tokenisation(kept, truncated, dropped)


def _tokenise(
    examples: Sequence[Example], tokenizer: Any, max_length: int, task: Task
) -> Iterator[tuple[Tokenised, bool]]:
    """(the example, whether it was cut) of each."""
    if task == "seq2seq":
        for example in examples:
            source, target = tokenise_pair(example, tokenizer)
            cut = max(len(source), len(target)) > max_length
            yield Tokenised(_cut(source, max_length, tokenizer), target[:max_length], task), cut
        return
    for ids, learned in tokenise_together(examples, tokenizer):
        code = np.asarray(ids[:max_length], np.int32)
        yield Tokenised.of(np.where(learned[:max_length], code, ~code), task), len(ids) > max_length


def tokenise_one(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is learned), not cut."""
    return tokenise_together([example], tokenizer)[0]


def tokenise_together(examples: Sequence[Example], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """The same of several, all of one form."""
    if examples[0].text is not None:
        ends = [ids + _end(tokenizer) for ids in tokenizer([example.text for example in examples])["input_ids"]]
        return [(ids, [True] * len(ids)) for ids in ends]
    if examples[0].messages is not None:
        return tokenise_conversations(examples, tokenizer)
    # Apart from each other, as at inference, where the prompt's last token cannot merge with the answer's first.
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    ends = [ids + _end(tokenizer) for ids in answers]
    return [
        (prompt + end, [False] * len(prompt) + [True] * len(end)) for prompt, end in zip(prompts, ends, strict=True)
    ]


def tokenise_pair(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(the encoder's ids, the decoder's labels), neither cut. The answer ends with the token that ends a generation."""
    if example.text is not None:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            "dataset.format is text, and the base model is seq2seq: it learns answers to prompts",
            "Use dataset.format instruction or chat, or a causal base model.",
        )
    answer = ids_of(tokenizer(text_target=example.answer))
    end = _end(tokenizer)
    return prompt_ids(example, tokenizer, "seq2seq"), answer if answer[-1:] == end else answer + end


def prompt_ids(example: Example, tokenizer: Any, task: Task = "causal") -> list[int]:
    """What the model is given to answer the example, of seq2seq the encoder's input; not for text."""
    if example.messages is not None and task == "seq2seq" and not tokenizer.chat_template:
        return ids_of(tokenizer(_plain(example)))
    if example.messages is None:
        return ids_of(tokenizer(example.prompt))
    text = render(example, example.messages[:-1], tokenizer, prompt=True)
    return ids_of(tokenizer(text, add_special_tokens=False))


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
        ids, labels = zip(*(item.arrays() for item in examples), strict=True)
        return {
            "input_ids": self._fill(ids, self.pad),
            "attention_mask": self._fill([np.ones_like(row) for row in ids], 0),
            "labels": self._fill(labels, IGNORED),
        }

    def _fill(self, rows: "Sequence[Code]", value: int) -> "Tensor":
        import torch  # takes seconds to load, and prepare only tokenises

        width = -(-max(map(len, rows)) // self.multiple) * self.multiple
        filled = np.full((len(rows), width), value, np.int64)
        for place, row in zip(filled, rows, strict=True):
            place[: len(row)] = row
        return torch.from_numpy(filled)
