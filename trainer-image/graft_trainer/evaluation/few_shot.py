"""Few-shot examples in the prompt (Brown et al. 2020): they show what the base model can do without training (PURE)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graft_trainer.data.conversation import unlearned
from graft_trainer.data.example import Example
from graft_trainer.data.messages import Message
from graft_trainer.evaluation.suites import Task, task_of


@dataclass(frozen=True)
class Shot:
    """One solved example: the turns of its conversation, and the same as a question with its answer."""

    turns: tuple[Message, ...]
    question: str
    answer: str


def draw(train: Sequence[Example], count: int, seed: int) -> list[Shot]:
    """Draw `count` + 1 different questions from the training examples with `seed`. The extra one is needed because a
    task never gets its own question as an example. Return fewer if there are not enough, and none for texts."""
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible draw
    shots: dict[str, Shot] = {}
    for index in order:
        task = task_of(train[index])
        if len(shots) > count:
            break
        if task.text is None and (task.answers[0].strip() or task.calls) and task.question not in shots:
            shots[task.question] = _shot(task)
    return list(shots.values())


def put_before(task: Task, shots: Sequence[Shot], count: int, fits: Callable[[Task], bool]) -> tuple[Task, int]:
    """Return (the task with solved examples before its question, their number): at most `count`, and only as many as
    fit.

    In a conversation the examples are earlier turns, after the system message. In a plain prompt they are text,
    separated by blank lines.
    """
    chosen = [shot for shot in shots if shot.question != task.question][:count]
    while chosen:
        shown = _conversation(task, chosen) if task.messages is not None else _plain(task, chosen)
        if fits(shown):
            return shown, len(chosen)
        chosen.pop()
    return task, 0


def _shot(task: Task) -> Shot:
    answer = task.answers[0]
    before = task.messages if task.messages is not None else ({"role": "user", "content": task.prompt},)
    turns = tuple(message for message in before if message["role"] != "system")
    turns = (*turns, task.final or {"role": "assistant", "content": answer})
    return Shot(unlearned(turns), task.question, answer)


def _conversation(task: Task, shots: Sequence[Shot]) -> Task:
    messages = task.messages or ()
    system = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    return replace(task, messages=(*system, *(turn for shot in shots for turn in shot.turns), *rest))


def _plain(task: Task, shots: Sequence[Shot]) -> Task:
    solved = [f"{shot.question}{'' if shot.question[-1:].isspace() else ' '}{shot.answer}" for shot in shots]
    return replace(task, prompt="\n\n".join([*solved, task.prompt or ""]))
