"""Held-out examples that are also in the training data: a model can answer them from memory."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from graft_trainer.data.example import Example


def repeated(train: Iterable[Example], held_out: Sequence[Example]) -> list[int]:
    """Return the line numbers of the held-out examples that the training data has, too, with the same words."""
    found: dict[bytes, list[int]] = {}
    for example in held_out:
        found.setdefault(_digest(example), []).append(example.line)
    seen = {digest for example in train if (digest := _digest(example)) in found}
    return sorted(line for digest in seen for line in found[digest])


def _digest(example: Example) -> bytes:
    # Of an instruction, not the prompt: several templates may make different prompts of it.
    asked = example.asked or example.prompt
    words = [example.messages, asked, example.answer, example.text]
    return hashlib.blake2b(json.dumps(words, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).digest()
