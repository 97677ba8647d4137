"""Measure how long training waits for a checkpoint.

Graft writes and uploads it while training continues. The reference saves and uploads it before the next step.
"""

import statistics
from typing import Any

from benchmarks.train.recipe import Recipe
from benchmarks.train.results import ratio, show, spread, verdict, write
from benchmarks.train.runs import Timeline, World
from benchmarks.train.shapes import SMALL, make

MOST = 0.10
STEPS, EVERY = 24, 8


def recipe_of(world: World, *, steps: int = STEPS) -> Recipe:
    """Return the recipe: full tuning of a model with 20 million parameters."""
    folder = world.folder / "small"
    if not folder.exists():
        make(folder, SMALL)
    return Recipe(
        model=str(folder),
        method="full",
        max_steps=steps,
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        max_length=64,
    )


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Measure both variants, and a run without checkpoints, `rounds` times. Return the results."""
    recipe = recipe_of(world)
    world.provide(recipe)
    found: dict[str, list[Timeline]] = {"graft": [], "synchronous": [], "none": []}
    for number in range(rounds):
        for variant in list(found)[number % 3 :] + list(found)[: number % 3]:
            if variant == "graft":
                run = world.pod(recipe, save_steps=EVERY, leave=True)  # publishing would remove the checkpoints
            else:
                run = world.plain(recipe, "benchmarks.train.plain", EVERY if variant == "synchronous" else None)
            found[variant].append(run)
            stall = f"{statistics.median(run.stalls):.4f} s a checkpoint" if run.stalls else "no checkpoint"
            print(f"  round {number + 1}/{rounds}  {variant}: {stall}", flush=True)
    stalls = {
        variant: [statistics.median(run.stalls) for run in found[variant]] for variant in ("graft", "synchronous")
    }
    # The upload during the steps also takes cores from them, if the store's server runs on the same machine.
    slower = {
        variant: [
            (1 / with_them.steps_per_second - 1 / without.steps_per_second) * EVERY
            for with_them, without in zip(found[variant], found["none"], strict=True)
        ]
        for variant in stalls
    }
    value, size = ratio(stalls["graft"], stalls["synchronous"]), checkpoint_bytes(world)
    result = {
        "recipe": vars(recipe),
        "checkpointBytes": size,
        "stallSeconds": stalls,
        "slowerSecondsPerCheckpoint": slower,
        "ratio": value,
        "met": value <= MOST,
    }
    write("train-stall", result)
    show(
        f"Stall per checkpoint of {size / 1e6:.0f} MB ({rounds} rounds)",
        [
            ("graft, s", spread(stalls["graft"])),
            ("save and upload first, s", spread(stalls["synchronous"])),
            ("graft / save and upload first", verdict(value, MOST, least=False)),
            ("graft, extra seconds of the run per checkpoint", spread(slower["graft"])),
            ("save and upload first, extra seconds of the run per checkpoint", spread(slower["synchronous"])),
        ],
    )
    return result


def checkpoint_bytes(world: World) -> int:
    """Return the size in bytes of a checkpoint of the pod's runs."""
    files = [item for item in world.store.objects("bench/runs/") if item.key.endswith(".safetensors")]
    return max(item.size for item in files if "-final" not in item.key)
