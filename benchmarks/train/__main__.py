"""python -m benchmarks.train [steps|stall|kills|gpu]… [--rounds N]: measure training as ratios to references.

The results are written to build/bench/ as JSON. The exit code is 1 if a bound is missed. apply_to_ready needs a cluster
and is a separate program.
"""

import argparse
import sys

from benchmarks.train import gpu, kills, stall, steps
from benchmarks.train.recipe import Recipe
from benchmarks.train.runs import world

BENCHMARKS = {
    "steps": lambda place, rounds: steps.measure(place, Recipe(), rounds),
    "stall": stall.measure,
    "kills": kills.measure,
    "gpu": gpu.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)} (default: all but gpu)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (default: 5)")
    arguments = parser.parse_args()
    names = arguments.names or ["steps", "stall", "kills"]
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}")
    results = []
    for name in names:
        print(f"==> {name}", flush=True)
        with world() as place:
            results.append(BENCHMARKS[name](place, arguments.rounds))
    return 0 if all(result["met"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
