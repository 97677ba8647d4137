"""Answers and likelihoods do not depend on the batch. Models are causal or seq2seq, with or without virtual tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_trainer.data.tokens import prompt_ids
from graft_trainer.evaluation.generate import generate
from graft_trainer.evaluation.subject import Meter, Subject, tokenised
from graft_trainer.evaluation.suites import Task
from graft_trainer.model.batches import in_batches
from graft_trainer.model.loss import log_likelihoods
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from worlds.trainer import MemoryStore, make_base, make_job, make_run, make_t5

PROMPTS = ["Hi", "What colour is the sky?", "And?", "What colour is grass in the spring?"]
KINDS = ["causal", "causal-prompt", "seq2seq", "seq2seq-prompt"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"causal": make_base(root / "llama"), "seq2seq": make_t5(root / "t5")}


def subject(folders: dict[str, Path], kind: str, room: int | None = 120) -> Subject:
    task, _, prompt = kind.partition("-")
    folder = folders[task]
    loader: Any = AutoModelForCausalLM if task == "causal" else AutoModelForSeq2SeqLM
    model = loader.from_pretrained(folder).eval()
    if task == "seq2seq":  # with its own head, the random T5 generates only padding
        model.lm_head.weight = torch.nn.Parameter(
            torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(5))
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if prompt:
        torch.manual_seed(1)
        config = PromptTuningConfig(
            task_type="CAUSAL_LM" if task == "causal" else "SEQ_2_SEQ_LM",
            num_virtual_tokens=5,
            num_transformer_submodules=1,
        )
        model = get_peft_model(model, config).eval()
    stop = [tokenizer.eos_token_id]
    return Subject("adapter", model, tokenizer, task, room, stop, virtual_tokens=5 if prompt else 0)  # type: ignore[arg-type]


def naive(of: Subject, prompt: list[int], new: int) -> str:
    """Decode greedily without a cache: one full forward pass of the tuned model per token. Return the answer."""
    answer: list[int] = []
    with torch.inference_mode():
        for _ in range(new):
            if of.task == "causal":
                logits = of.model(
                    torch.tensor([prompt + answer]), attention_mask=torch.ones(1, len(prompt + answer))
                ).logits
            else:
                # The last label has no effect: the decoder reads only the labels before it.
                labels = torch.tensor([[*answer, 0]])
                logits = of.model(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), labels=labels
                ).logits
            token = int(logits[0, -1].argmax())
            answer.append(token)
            if token in of.stop:
                break
    return str(of.tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS)
def test_batched_answers_equal_greedy_decoding_one_by_one(folders: dict[str, Path], kind: str) -> None:
    of = subject(folders, kind)
    prompts = [prompt_ids(Task(1, prompt=text, answers=("x",)).example(), of.tokenizer, of.task) for text in PROMPTS]
    answers = generate(of, prompts, [6] * len(prompts))
    assert answers == [naive(of, prompt, 6) for prompt in prompts]
    assert len(set(answers)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_do_not_depend_on_the_batch_and_equal_the_models_loss(folders: dict[str, Path], kind: str) -> None:
    of = subject(folders, kind)
    tasks = [Task(1, prompt=text, answers=("It is. " + text,)) for text in PROMPTS]
    items = [item for task in tasks for item in tokenised(task.example(), of)]
    alone = log_likelihoods(of.model, items, of.pad, 1)
    for batch in (2, 8):
        together = log_likelihoods(of.model, items, of.pad, batch)
        assert [count for _, count in together] == [item.learned for item in items]
        assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-4)
    ids, labels = torch.tensor([items[0].input_ids]), torch.tensor([items[0].labels])
    with torch.inference_mode():
        loss = of.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert -alone[0][0] / alone[0][1] == pytest.approx(float(loss), rel=1e-4)


def test_only_the_last_answer_of_a_conversation_is_measured(folders: dict[str, Path]) -> None:
    of = subject(folders, "causal")
    turns = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bbb"},
        {"role": "user", "content": "c"},
    )
    [item] = tokenised(Task(1, messages=turns, answers=("dd",)).example(), of)
    assert of.tokenizer.decode([label for label in item.labels if label != -100]) == "dd</s>"


def test_truncation_keeps_the_answer(folders: dict[str, Path]) -> None:
    of = subject(folders, "causal", room=20)
    [item] = tokenised(Task(1, prompt="?" * 50, answers=("right",)).example(), of)
    assert len(item.input_ids) == 20
    assert of.tokenizer.decode(item.input_ids).endswith("?right</s>")
    assert len(generate(of, [list(range(10, 70))], [100])) == 1
    seq2seq = subject(folders, "seq2seq", room=10)
    assert seq2seq.cut(list(range(30)), 10) == [*range(9), 29]


def test_if_memory_runs_out_the_rest_runs_in_smaller_batches() -> None:
    seen: list[list[int]] = []

    def work(chosen: Sequence[int]) -> None:
        if len(chosen) > 2:
            raise MemoryError
        seen.append(list(chosen))

    in_batches(range(7), 8, work)
    assert [index for batch in seen for index in batch] == list(range(7))
    assert max(len(batch) for batch in seen) <= 2


def test_one_example_that_does_not_fit_in_memory_is_an_error() -> None:
    def work(chosen: Sequence[int]) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        in_batches(range(4), 4, work)


def test_the_remaining_time_follows_from_the_finished_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path, MemoryStore(), make_job())
    meter = Meter(run.progress, total=10)
    meter.begin("adapter", "quiz", 10)
    meter.step(5)
    meter.end()
    assert run.progress.state.eta_seconds == 0
    run.progress.close(2)
