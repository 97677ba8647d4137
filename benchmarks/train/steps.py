"""Compare the steps per second of the training pod, with progress and checkpoints, with those of a plain script of
transformers and peft, and of trl's SFTTrainer. The runs have the same recipe, seed and machine, and the variants take
turns."""

import statistics
from typing import Any

from benchmarks.train.recipe import Recipe
from benchmarks.train.results import ratio, show, spread, verdict, write
from benchmarks.train.runs import Timeline, World, difference

LEAST = 0.98
# The largest allowed difference of two loss curves. In bf16, trl rounds the adapter too.
CLOSE = {"fp32": 1e-4, "bf16": 1e-2}


def measure(world: World, recipe: Recipe, rounds: int, name: str = "train-steps") -> dict[str, Any]:
    """Run all variants `rounds` times. Return the results."""
    world.provide(recipe)
    variants = {
        "graft": lambda: world.pod(recipe, save_steps=max(1, recipe.max_steps // 3), leave=recipe.gpu),
        "transformers + peft": lambda: world.plain(recipe, "benchmarks.train.plain"),
        "trl": lambda: world.plain(recipe, "benchmarks.train.plain_trl"),
    }
    found: dict[str, list[Timeline]] = {variant: [] for variant in variants}
    for number in range(rounds):
        # Each variant runs first in turn, so that warm caches or a hot machine do not always affect the same one.
        order = list(variants)[number % 3 :] + list(variants)[: number % 3]
        for variant in order:
            found[variant].append(variants[variant]())
            print(
                f"  round {number + 1}/{rounds}  {variant}: {found[variant][-1].steps_per_second:.3f} steps/s",
                flush=True,
            )
    speeds = {variant: [run.steps_per_second for run in runs] for variant, runs in found.items()}
    cpu = {variant: [run.cpu_per_step for run in runs] for variant, runs in found.items()}
    others = [variant for variant in variants if variant != "graft"]
    ratios = {variant: ratio(speeds["graft"], speeds[variant]) for variant in others}
    apart = {
        variant: max(difference(*pair) for pair in zip(found["graft"], found[variant], strict=True))
        for variant in others
    }
    result = {
        "recipe": vars(recipe),
        "stepsPerSecond": speeds,
        "cpuSecondsPerStep": cpu,
        "peakBytes": {variant: [run.peak_bytes for run in runs] for variant, runs in found.items()},
        "medians": {variant: statistics.median(values) for variant, values in speeds.items()},
        "ratios": ratios,
        "largestLossDifference": apart,
        "met": all(value >= LEAST for value in ratios.values())
        and all(value <= CLOSE[recipe.precision] for value in apart.values()),
    }
    write(name, result)
    rows = [(f"{variant}, steps/s", spread(values)) for variant, values in speeds.items()]
    rows += [(f"{variant}, CPU seconds a step", spread(values)) for variant, values in cpu.items()]
    for variant in others:
        rows.append((f"graft / {variant}", verdict(ratios[variant], LEAST, least=True)))
        rows.append(
            (
                f"losses, graft and {variant}",
                f"differ by at most {apart[variant]:.2e}, required: at most {CLOSE[recipe.precision]:.0e}",
            )
        )
    show(f"Steps per second ({recipe.method}, {recipe.max_steps} steps, {rounds} rounds)", rows)
    return result
