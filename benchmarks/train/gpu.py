"""Run the benchmark steps on a GPU, with random weights in the shape of Llama 2 7B.

Every variant uses bf16, torch's attention kernels, the fused optimizer and Liger's kernels. It needs CUDA with 40 GB,
and a temporary folder with 14 GB in memory.
"""

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.train import steps
from benchmarks.train.recipe import Recipe
from benchmarks.train.runs import World
from benchmarks.train.shapes import SEVEN, make

EXAMPLES, WORDS = 512, 300  # an example has about 1,000 tokens of the quickstart's tokenizer
STEPS, BATCH, LENGTH = 40, 4, 1024


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Return the results of steps.measure."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU")
    data = world.folder / "long.jsonl"
    write_examples(data)
    recipe = Recipe(
        model=str(make(world.folder / "seven", SEVEN, dtype="bfloat16")),
        data=str(data),
        max_steps=STEPS,
        learning_rate=2e-4,
        per_device_train_batch_size=BATCH,
        max_length=LENGTH,
        precision="bf16",
        gpu=True,
        liger=True,
    )
    return steps.measure(world, recipe, rounds, name="train-steps-gpu")


def write_examples(path: Path) -> None:
    """Write conversations of random words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(2000)]
    with path.open("w") as lines:
        for _ in range(EXAMPLES):
            question, answer = " ".join(draw.choices(words, k=20)), " ".join(draw.choices(words, k=WORDS))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")
