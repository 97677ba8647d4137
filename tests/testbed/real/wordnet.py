"""Real text for tests: the definitions of WordNet 3.0 (Debian's package wordnet-base), as datasets for Graft."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import packages

FOLDER = Path("/usr/share/wordnet")
# Lexicographer files (lexnames(5WN)): the classes of nouns.
CLASSES = {5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "location", 18: "person", 20: "plant", 27: "substance"}  # fmt: skip
GENERAL = {
    "What is the capital of France?": ["Paris"],
    "What is the capital of Italy?": ["Rome"],
    "How many days are in a week?": ["seven", "7"],
    "What is the opposite of hot?": ["cold"],
    "What is 2 + 2?": ["4", "four"],
    "Which animal barks?": ["dog", "a dog"],
    "In which country is Tokyo?": ["Japan"],
    "What language is spoken in Brazil?": ["Portuguese"],
    "What do bees make?": ["honey"],
    "What is frozen water called?": ["ice"],
    "Which planet do we live on?": ["Earth"],
    "What colour is the sky on a clear day?": ["blue"],
}


@dataclass(frozen=True)
class Entry:
    """A synset: words that share a definition."""

    number: int  # of the lexicographer file
    words: tuple[str, ...]
    definition: str


def write_datasets(folder: Path, train: int = 1504, held_out: int = 200) -> None:
    """Write the datasets into `folder`, the same at each call.

    train.jsonl and heldout.jsonl ask for the class of a noun by its definition. They share no word and no definition.
    verbs.jsonl (4 choices) and general.jsonl (short answers) are suites that show what the model forgets.
    """
    packages.install({str(FOLDER / "data.noun"): "wordnet-base"})
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "verbs.jsonl", list(_verbs(draw, 60)))
    _write(folder / "general.jsonl", [{"prompt": question, "answers": right} for question, right in GENERAL.items()])
    by_class = defaultdict(list)
    for entry in entries("noun"):
        if entry.number in CLASSES and 15 <= len(entry.definition) <= 140:
            by_class[entry.number].append(entry)
    for found in by_class.values():
        draw.shuffle(found)
    used: set[str] = set()
    for name, count in (("heldout", held_out), ("train", train)):
        chosen = [entry for number in CLASSES for entry in _take(by_class[number], count // len(CLASSES), used)]
        draw.shuffle(chosen)
        _write(folder / f"{name}.jsonl", [question(entry) for entry in chosen])


def entries(part: str) -> Iterator[Entry]:
    """Yield the synsets of a part of speech (wndb(5WN)): noun or verb."""
    with (FOLDER / f"data.{part}").open() as lines:
        for line in lines:
            if line.startswith("  "):  # the licence
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = tuple(fields[4 + 2 * index].replace("_", " ") for index in range(int(fields[3], 16)))
            yield Entry(int(fields[1]), words, gloss.split('; "')[0].strip())


def question(entry: Entry) -> dict[str, Any]:
    """Return the conversation that asks for a noun's class."""
    classes = ", ".join(sorted(CLASSES.values()))
    asked = f"Definition: {entry.definition}\nWhich class does the defined noun belong to: {classes}?"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": CLASSES[entry.number]}]}


def _take(found: list[Entry], count: int, used: set[str]) -> Iterator[Entry]:
    """Yield `count` entries, and remove them. No word and no definition is used twice."""
    while count:
        entry = found.pop()
        names = {entry.definition, *(word.lower() for word in entry.words)}
        if not names & used:
            used |= names
            count -= 1
            yield entry


def _verbs(draw: random.Random, count: int) -> Iterator[dict[str, Any]]:
    found = [entry for entry in entries("verb") if 15 <= len(entry.definition) <= 90 and " " not in entry.words[0]]
    draw.shuffle(found)
    for index in range(count):
        right, *wrong = found[4 * index : 4 * index + 4]
        choices = [entry.definition for entry in (right, *wrong)]
        draw.shuffle(choices)
        yield {
            "prompt": f'What does the verb "{right.words[0]}" mean?',
            "choices": choices,
            "label": choices.index(right.definition),
        }


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
