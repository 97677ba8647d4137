"""A widely used script: trl's SFTTrainer with a peft configuration.

python -m benchmarks.train.plain_trl RECIPE.json CLOCK.jsonl OUTPUT
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.train.clock import StepClock
from benchmarks.train.recipe import TARGETS, Recipe


def main(recipe: Recipe, clock: str, output: str) -> None:
    set_seed(recipe.seed)
    dtype = "bfloat16" if recipe.precision == "bf16" and recipe.method == "lora" else "float32"
    arguments = SFTConfig(
        output_dir=output,
        save_strategy="no",
        max_length=recipe.max_length,
        assistant_only_loss=True,
        activation_checkpointing=False,
        pad_to_multiple_of=8 if recipe.gpu else None,
        **recipe.training_arguments(),
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha, target_modules=TARGETS)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(recipe.model, dtype=dtype),
        args=arguments,
        train_dataset=load_dataset("json", data_files=recipe.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(recipe.model),
        peft_config=adapter if recipe.method == "lora" else None,
        callbacks=[StepClock(clock)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(Recipe.read(sys.argv[1]), *sys.argv[2:4])
