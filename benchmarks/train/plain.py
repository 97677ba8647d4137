"""The plain script: transformers' Trainer and peft, used as in their documentation.

python -m benchmarks.train.plain RECIPE.json CLOCK.jsonl OUTPUT [SAVE_STEPS SECRET]

With SAVE_STEPS it saves a checkpoint every SAVE_STEPS steps, and uploads it before it continues. SECRET is a folder
with the same files as the mounted Secret graft-storage.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
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

from benchmarks.train.clock import StepClock
from benchmarks.train.recipe import TARGETS, Recipe


class Upload(TrainerCallback):
    """Upload each checkpoint synchronously after it is saved, as users of the plain script would do."""

    def __init__(self, secret: str) -> None:
        from graft.artifacts.storage import StorageConfig
        from graft.artifacts.store import S3Store

        self.store = S3Store(StorageConfig.from_dir(secret))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.store.upload(f"bench/plain/{folder.name}/{path.relative_to(folder)}", path)


def main(recipe: Recipe, clock: str, output: str, save_steps: int | None, secret: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)

    def tokenise(line: str) -> dict[str, list[int]]:
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = encoded["input_ids"][: recipe.max_length]
        learned = encoded["assistant_masks"][: recipe.max_length]
        labels = [token if learn else -100 for token, learn in zip(ids, learned, strict=True)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    with Path(recipe.data).open() as lines:
        examples = [tokenise(line) for line in lines if line.strip()]

    set_seed(recipe.seed)
    dtype = torch.bfloat16 if recipe.precision == "bf16" and recipe.method == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=dtype)
    if recipe.method == "lora":
        model = get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha, target_modules=TARGETS),
        )
    saving = (
        {"save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 2}
        if save_steps
        else {"save_strategy": "no"}
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=output, **recipe.training_arguments(), **saving),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if recipe.gpu else None),
        callbacks=[*([Upload(secret)] if secret else []), StepClock(clock)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    recipe_file, clock_file, folder, *rest = sys.argv[1:]
    main(
        Recipe.read(recipe_file),
        clock_file,
        folder,
        int(rest[0]) if rest else None,
        rest[1] if rest else None,
    )
