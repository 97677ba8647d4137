"""python -m benchmarks.serve [mix|ready|memory|keys]… [--rounds N]: measure serving as ratios to references.

The results are written to build/bench/ as JSON. The exit code is 1 if a bound is missed.
"""

import argparse
import importlib
import sys

NAMES = ("mix", "ready", "memory", "keys")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (default: 5)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}")
    results = []
    for name in arguments.names or NAMES:
        print(f"==> {name}", flush=True)
        results.append(importlib.import_module(f"benchmarks.serve.{name}").measure(arguments.rounds))
    return 0 if all(result["met"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
