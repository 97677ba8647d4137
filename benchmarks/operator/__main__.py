"""Measure how the operator scales, beside references in the same run. Ratios are medians of interleaved rounds.

The results are written to build/bench/operator.json: name, value, goal, met. The exit code is 1 if a goal is missed.
"""

import argparse
import importlib
import sys
import time

from benchmarks.operator.goals import Goal, save
from benchmarks.train.results import show

PARTS = ("burst", "kept", "isolation", "handover")
QUICK = {"rounds": 1, "jobs": 60, "kept": 1000, "lives": 10, "idle": 10}
WHOLE = {"rounds": 5, "jobs": 400, "kept": 10_000, "lives": 200, "idle": 60}
TEXTS = {
    "rounds": "rounds of each comparison",
    "jobs": "jobs of one burst",
    "kept": "ended jobs that are kept",
    "lives": "jobs that are played from creation to publication",
    "idle": "seconds without work",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and one round, in about 3 minutes; the values are rough"
    )
    for name, text in TEXTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: {WHOLE[name]}, quick: {QUICK[name]})")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    sizes = QUICK if arguments.quick else WHOLE
    options = {name: getattr(arguments, name) or size for name, size in sizes.items()}
    began, goals = time.monotonic(), list[Goal]()
    for part in arguments.parts or PARTS:
        print(f"==> {part} (after {time.monotonic() - began:.0f} s)", flush=True)
        goals += importlib.import_module(f"benchmarks.operator.{part}").measure(options)
        save(goals, options, began)  # what was measured so far is kept if a later part fails
    show("operator", [(goal.name, goal.line()) for goal in goals])
    return 0 if all(goal.met is not False for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
