"""A pod's tokens: its first process tokenises, with all of the pod's CPUs, and the others map the file that it writes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft_trainer.data.dataset import Example
from graft_trainer.data.tokens import Task, TokenFile, Tokenisation, tokenise
from graft_trainer.processes import distributed


def tokenise_in_pod(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, role: str, task: Task, folder: Path
) -> Tokenisation:
    """See tokenise(). The file has a name of its own and is told of when it is complete: no process can take one that
    another attempt has left, or half a file."""
    if distributed.joined() and distributed.local_rank() > 0:
        told = distributed.from_pod()
        file = TokenFile(folder / told["file"], told["examples"], task)
        return Tokenisation(file, told["truncated"], told["dropped"])
    with _threads():
        found = tokenise(examples, tokenizer, max_length, role=role, task=task, folder=folder)
    assert isinstance(found.examples, TokenFile)  # noqa: S101 - tokenise() makes no other
    counts = {"examples": len(found.examples), "truncated": found.truncated, "dropped": found.dropped}
    distributed.to_pod({"file": found.examples.path.name} | counts)
    return found


@contextmanager
def _threads() -> Iterator[None]:
    """The tokenizer's threads. Off again afterwards: they would be missing in what is forked from this process."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name, "false")
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before
