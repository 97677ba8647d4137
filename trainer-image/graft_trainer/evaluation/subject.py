"""A model that the evaluation measures, and the progress of the evaluation."""

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

from graft_trainer.data.example import Example
from graft_trainer.data.tokens import IGNORED, Tokenised, pad_token, tokenise_one, tokenise_pair
from graft_trainer.evaluation.gates import Who
from graft_trainer.run.progress import ProgressReporter

log = logging.getLogger(__name__)
TELL = 5.0  # seconds between lines of the log
NAMES: dict[Who, str] = {
    "adapter": "adapter",
    "base": "base model",
    "fewShot": "base model with examples",
    "current": "current version",
}


@dataclass(frozen=True)
class Subject:
    """A model, with the data that is needed to measure it."""

    who: Who
    model: Any
    tokenizer: Any
    task: Literal["causal", "seq2seq"]
    room: int | None  # tokens; causal: question and answer together, seq2seq: each; None: no limit
    stop: list[int]  # ids that end an answer
    virtual_tokens: int = 0  # trained vectors before the input; if above 0, the model must be peft's

    @property
    def pad(self) -> int:
        return pad_token(self.tokenizer)

    def cut(self, prompt: list[int], room: int | None) -> list[int]:
        """Return the prompt, cut to at most `room` tokens. A causal prompt keeps its end, because the answer follows
        it. A seq2seq prompt keeps its beginning, which has the instruction, and the token that ends an input."""
        if room is None or len(prompt) <= room:
            return prompt
        return prompt[-room:] if self.task == "causal" else prompt[: room - 1] + prompt[-1:]


class Meter:
    """The progress of the evaluation: a log line every few seconds, and the remaining time in progress.json."""

    def __init__(self, progress: ProgressReporter, total: int) -> None:
        self._progress = progress
        self._total = total  # examples to measure in all, counted once per subject
        self._done = 0
        self._started = self._told = time.monotonic()
        self._what, self._size, self._at = "", 0, 0

    def begin(self, who: Who, what: str, size: int) -> None:
        """Start the measurement of `size` examples of `what`."""
        self._what, self._size, self._at = f"{NAMES[who]}, {what}", size, 0

    def step(self, count: int) -> None:
        """Count `count` more examples in the current pass. There can be several passes over the same examples."""
        self._at = min(self._size, self._at + count)
        now = time.monotonic()
        if now - self._told >= TELL:
            self._told = now
            log.info("%s: %d of %d", self._what, self._at, self._size)
            self._tell(self._done + self._at, now)

    def again(self) -> None:
        """Start another pass over the same examples."""
        self._at = 0

    def end(self) -> None:
        """Count all examples of the measurement as done."""
        self._done += self._size
        self._tell(self._done, time.monotonic())

    def _tell(self, done: int, now: float) -> None:
        if 0 < done <= self._total:
            left = (now - self._started) / done * (self._total - done)
            self._progress.update(eta_seconds=round(left))


def tokenised(example: Example, subject: Subject) -> list[Tokenised]:
    """Return the sequences of the example, cut to the model's context, with the labels for its loss. They are those of
    training: see tokens.tokenise_one. A cut keeps the end, where the answer is, but the beginning of a text."""
    room = subject.room
    if subject.task == "seq2seq":
        source, target = tokenise_pair(example, subject.tokenizer)
        return [Tokenised(subject.cut(source, room), target[:room], "seq2seq")]
    made = []
    for ids, mask in tokenise_one(example, subject.tokenizer):
        labels = [token if learn else IGNORED for token, learn in zip(ids, mask, strict=True)]
        kept = slice(None) if room is None else slice(room) if example.text is not None else slice(-room, None)
        made.append(Tokenised(ids[kept], labels[kept]))
    return made
