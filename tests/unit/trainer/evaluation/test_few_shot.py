"""Few-shot examples in the prompt: which are shown and how. A question never sees its own answer."""

from graft_trainer.data.example import Example
from graft_trainer.evaluation.few_shot import draw, put_before
from graft_trainer.evaluation.suites import Task, task_of


def chat(question: str, answer: str, system: str | None = None) -> Example:
    before = [{"role": "system", "content": system}] if system else []
    messages = (*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(1, messages=messages, answer=answer)


TRAIN = [chat(f"question {index % 8}", f"answer {index % 8}", "Be brief.") for index in range(40)]


def test_the_seed_draws_examples_of_different_questions() -> None:
    shots = draw(TRAIN, 3, seed=7)
    assert len({shot.question for shot in shots}) == len(shots) == 4  # one more than requested, as a spare
    assert draw(TRAIN, 3, seed=7) == shots
    assert any(draw(TRAIN, 3, seed=seed) != shots for seed in range(5))
    assert len(draw(TRAIN, 32, seed=7)) == 8  # there are only 8 different questions


def test_a_task_is_never_shown_its_own_question() -> None:
    shots = draw(TRAIN, 8, seed=7)
    for index in range(8):
        task = Task(1, messages=({"role": "user", "content": f"question {index}"},), answers=("?",))
        shown, count = put_before(task, shots, 7, lambda _: True)
        assert count == 7
        assert [message["content"] for message in shown.messages or ()].count(f"question {index}") == 1


def test_in_a_conversation_examples_are_turns_after_the_system_message() -> None:
    task = task_of(chat("new", "?", "Be brief."))
    shown, _ = put_before(task, draw(TRAIN, 2, seed=7), 2, lambda _: True)
    roles = [message["role"] for message in shown.messages or ()]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert (shown.messages or ())[-1]["content"] == "new"
    assert shown.answers == ("?",)


def test_before_a_plain_prompt_examples_are_text() -> None:
    train = [Example(1, prompt="Q: a\nA: ", answer="one"), Example(2, prompt="Q: b?", answer="two")]
    shots = sorted(draw(train, 2, seed=1), key=lambda shot: shot.question)
    shown, _ = put_before(Task(3, prompt="Q: c\nA: ", answers=("x",)), shots, 2, lambda _: True)
    assert shown.prompt == "Q: a\nA: one\n\nQ: b? two\n\nQ: c\nA: "


def test_only_as_many_examples_as_fit_are_shown() -> None:
    shots = draw(TRAIN, 4, seed=7)
    task = Task(1, prompt="new", answers=("x",))
    shown, count = put_before(task, shots, 4, lambda shown: len(shown.prompt or "") < 50)
    assert 0 < count < 4 and len(shown.prompt or "") < 50
    assert put_before(task, shots, 4, lambda _: False) == (task, 0)


def test_format_text_gives_no_few_shot_examples() -> None:
    assert draw([Example(1, text="once")], 4, seed=1) == []
