"""The reference: a plain script of transformers and peft that trains and measures the same as a FineTuneJob.

python -m real.plain RECIPE.json OUTPUT writes the adapter and result.json to OUTPUT. It knows nothing of Graft.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class StepTimes(TrainerCallback):
    """Record the end of each step: wall-clock time and processor time of the process, in seconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wall.append(time.monotonic())
        self.cpu.append(time.process_time())


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def split(tokenizer: Any, example: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the answer with its end token."""
    *before, answer = example["messages"]
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True)["input_ids"]
    return prompt, [*tokenizer(answer["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def features(tokenizer: Any, example: dict[str, Any]) -> dict[str, list[int]]:
    prompt, answer = split(tokenizer, example)
    ids = prompt + answer
    labels = [-100] * len(prompt) + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@torch.inference_mode()
def eval_loss(model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> float:
    """Return the cross entropy over all tokens of the answers, in nats per token."""
    losses = []
    for example in examples:
        prompt, answer = split(tokenizer, example)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return float(torch.cat(losses).mean())


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Return the share of greedy answers that equal the right one, and the answers."""
    answers = []
    for example in examples:
        prompt, right = split(tokenizer, example)
        found = model.generate(torch.tensor([prompt]), max_new_tokens=2 * len(right) + 8, do_sample=False)
        answers.append(tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True).strip())
    rights = [example["messages"][-1]["content"] for example in examples]
    return sum(one == other for one, other in zip(answers, rights, strict=True)) / len(rights), answers


def main(recipe: dict[str, Any], output: Path) -> None:
    torch.set_num_threads(recipe["threads"])
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    set_seed(recipe["seed"])
    model = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe["rank"],
            lora_alpha=recipe["alpha"],
            target_modules="all-linear",
        ),
    )
    times = StepTimes()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "trainer"),
            max_steps=recipe["steps"],
            per_device_train_batch_size=recipe["batch"],
            learning_rate=recipe["learningRate"],
            lr_scheduler_type="cosine",
            warmup_steps=recipe["warmupSteps"],
            weight_decay=0.0,
            optim="adamw_torch",
            use_cpu=True,
            seed=recipe["seed"],
            data_seed=recipe["seed"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10,
        ),
        train_dataset=[features(tokenizer, example) for example in lines(recipe["train"])],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[times],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    result: dict[str, Any] = {"wall": times.wall, "cpu": times.cpu}
    if recipe["heldOut"] is not None:
        examples = lines(recipe["heldOut"])
        result["exactMatch"], result["answers"] = exact_match(model, tokenizer, examples)
        result["evalLoss"] = eval_loss(model, tokenizer, examples)
        with model.disable_adapter():
            result["baseEvalLoss"] = eval_loss(model, tokenizer, examples)
    model.save_pretrained(output)
    (output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
