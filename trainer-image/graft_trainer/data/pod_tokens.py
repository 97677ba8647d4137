"""Tokenise once per pod. The pod's first process tokenises with all of the pod's CPUs and writes a file, which the
pod's other processes map into memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft_trainer.data.example import Example
from graft_trainer.data.tokens import Task, TokenFile, Tokenisation, tokenise
from graft_trainer.data.unusable import Unusable
from graft_trainer.processes import distributed


def tokenise_in_pod(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    role: str,
    task: Task,
    folder: Path,
    skip: bool = False,
) -> Tokenisation:
    """Tokenise as tokenise() does. The file has a unique name, which is sent to the other processes when the file is
    complete. So no process can read a file that an earlier attempt left, or an incomplete file."""
    if distributed.joined() and distributed.local_rank() > 0:
        told = distributed.from_pod()
        file = TokenFile(folder / told["file"], told["examples"], task)
        return Tokenisation(file, told["truncated"], Unusable(role, max_length))
    with all_threads():
        found = tokenise(examples, tokenizer, max_length, role=role, task=task, folder=folder, skip=skip)
    assert isinstance(found.examples, TokenFile)  # noqa: S101 - tokenise() makes no other kind
    counts = {"examples": len(found.examples), "truncated": found.truncated}
    distributed.to_pod({"file": found.examples.path.name} | counts)
    return found


@contextmanager
def all_threads() -> Iterator[None]:
    """Switch the tokenizer's threads on, and restore the earlier setting at the end. A process that is forked later
    would not have the threads."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name, "false")
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before
