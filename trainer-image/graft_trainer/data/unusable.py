"""The examples of a file that cannot be used: counted by reason, and the first of them shown."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from graft.contracts.progress import Reason

from graft_trainer.data.lines import BadLine
from graft_trainer.run.failures import Failure

log = logging.getLogger(__name__)
SHOWN = 5  # lines that a message shows; the message counts all of them
MEANS = {  # BadLine.trouble -> words
    "format": "not in the format",
    "templateRefuses": "refused by the chat template",
    "notRendered": "not rendered whole by the chat template",
    "noEnd": "without an end",
    "controlTokens": "with control tokens that cannot be words",
    "nothingToLearn": "without an answer to train on",
    "tooLong": "with an answer beyond maxLength",
}


@dataclass
class Unusable:
    """The examples of the file with the role `role` (train or eval) that cannot be used."""

    role: str
    max_length: int
    counts: Counter[str] = field(default_factory=Counter)  # BadLine.trouble -> lines
    shown: list[str] = field(default_factory=list)  # the first lines, with what is wrong
    remedies: list[str] = field(default_factory=list)  # without repetition
    lines: set[int] = field(default_factory=set)

    def add(self, line: int, error: BadLine) -> None:
        """Add a line."""
        self.counts[error.trouble] += 1
        self.lines.add(line)
        if len(self.shown) < SHOWN:
            self.shown.append(f"line {line}: {error}")
        if error.remedy and error.remedy not in self.remedies:
            self.remedies.append(error.remedy)

    @property
    def total(self) -> int:
        return len(self.lines)

    def describe(self) -> str:
        """Return the counts by reason, and the first lines, as text."""
        counts = ", ".join(f"{count} {MEANS[trouble]}" for trouble, count in self.counts.most_common())
        more = f"; and {self.total - len(self.shown)} more" if self.total > len(self.shown) else ""
        return f"{counts}: {'; '.join(self.shown)}{more}"

    def check(self, examples: int, *, skip: bool) -> None:
        """Raise Failure(DatasetInvalid) if there are any; with `skip`, only if none of `examples` is left."""
        if not self.total:
            return
        if skip and self.total < examples:
            log.warning(
                "dataset.%s: %d of %d examples are left out: %s", self.role, self.total, examples, self.describe()
            )
            return
        advice = "" if skip else " Or set spec.dataset.onInvalid to skip: then these lines are left out."
        if set(self.counts) == {"tooLong"} and self.total == examples:
            raise Failure(
                Reason.DATASET_INVALID,
                f"spec.dataset.{self.role}: none of the {examples} examples has a token to train on within {self.max_length} tokens",
                " ".join(self.remedies),
            )
        are = "example cannot" if self.total == 1 else "examples cannot"
        raise Failure(
            Reason.DATASET_INVALID,
            f"spec.dataset.{self.role}: {self.total} of {examples} {are} be used, {self.describe()}",
            " ".join(self.remedies[:2]) + advice,
        )
