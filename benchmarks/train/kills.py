"""Measure the share of useful steps when pods are killed, with a warning (SIGTERM, as on spot nodes) and without one
(SIGKILL).

The moments of the kills are drawn with a seed. The benchmark also compares the losses with those of a run without
kills.
"""

import random
import signal
import statistics
from typing import Any

from benchmarks.train.recipe import Recipe
from benchmarks.train.results import show, spread, verdict, write
from benchmarks.train.runs import Kill, World, difference

LEAST = 0.95
CLOSE = 1e-4
STEPS, KILLS = 120, 3
EVERY = 10  # steps between checkpoints for SIGKILL, which has no warning


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Kill each run KILLS times. Return the results."""
    recipe = Recipe(max_steps=STEPS)
    world.provide(recipe)
    left_alone = world.pod(recipe)
    shares: dict[str, list[float]] = {"SIGTERM": [], "SIGKILL": []}
    apart = dict.fromkeys(shares, 0.0)
    for number in range(rounds):
        for name, saved in (("SIGTERM", None), ("SIGKILL", EVERY)):
            draw = random.Random(f"{name} {number}")
            after = [draw.randint(1, STEPS // (KILLS + 1)) for _ in range(KILLS)]
            run = world.pod(recipe, saved, Kill(signal.Signals[name], after, draw))
            shares[name].append(STEPS / run.steps_done)
            apart[name] = max(apart[name], difference(run, left_alone))
            print(f"  round {number + 1}/{rounds}  {name}: {run.steps_done} steps done, {STEPS} needed", flush=True)
    value = statistics.median(shares["SIGTERM"])
    result = {
        "recipe": vars(recipe),
        "kills": KILLS,
        "usefulShare": shares,
        "stepsBetweenCheckpoints": {"SIGTERM": None, "SIGKILL": EVERY},
        "expectedShareWithSigkill": STEPS / (STEPS + KILLS * EVERY / 2),
        "largestLossDifference": apart,
        "met": value >= LEAST and max(apart.values()) <= CLOSE,
    }
    write("train-kills", result)
    show(
        f"Useful share of the steps, {KILLS} kills in {STEPS} steps ({rounds} rounds)",
        [
            ("with a warning (SIGTERM)", verdict(value, LEAST, least=True)),
            ("", spread(shares["SIGTERM"])),
            (f"without a warning (SIGKILL), a checkpoint every {EVERY} steps", spread(shares["SIGKILL"])),
            ("  expected, if each kill loses half an interval", f"{result['expectedShareWithSigkill']:.3f}"),
            (
                "losses, compared with a run without kills",
                f"differ by at most {max(apart.values()):.2e}, required: at most {CLOSE:.0e}",
            ),
        ],
    )
    return result
