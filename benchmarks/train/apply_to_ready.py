"""Compare the time from `kubectl apply` of a job until its Adapter is Ready with that of the plain script, which
includes a copy of its files to the same store.

Run python -m benchmarks.train.apply_to_ready [--rounds N] [--keep] as root. It uses a cluster of the testbed. The
difference is the cost of the platform: scheduling, the checks of prepare, evaluation, publishing and verifying.
"""

import argparse
import base64
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed import demo, packages, product, quickstart
from testbed.binaries import build
from testbed.cluster import Cluster
from testbed.quickstart import QUICKSTART, SHOP, SYSTEM, Access
from testbed.shell import Failed, say

from benchmarks.train.recipe import REPOSITORY, Recipe
from benchmarks.train.results import show, spread, write

RECIPE = replace(Recipe(), max_steps=150)  # as in the quickstart
PATIENCE = 900.0  # seconds to wait for a job


@dataclass(frozen=True)
class Applied:
    """The seconds from the apply to each stage, in order, and to Ready."""

    stages: dict[str, float]
    ready: float


def applied(access: Access, number: int, folder: Path) -> Applied:
    """Apply a job with the recipe, and wait until its Adapter is Ready."""
    name = f"bench-{number}"
    job: dict[str, Any] = yaml.safe_load((QUICKSTART / "20-finetunejob.yaml").read_text())
    job["metadata"]["name"] = job["spec"]["output"]["adapter"] = name
    del job["spec"]["dataset"]["eval"]
    job["spec"]["evaluation"] = {"maxSamples": 0, "baselines": []}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    begin = time.monotonic()
    stages: dict[str, float] = {}
    access.kubectl("apply", "-f", str(path))
    while (passed := time.monotonic() - begin) < PATIENCE:
        status = access.get("finetunejob", name).get("status", {})
        stages.setdefault(status.get("stage", "Waiting"), round(passed, 2))
        if status.get("stage") in {"Failed", "Rejected"}:
            break
        if reference := status.get("adapterRef"):
            adapter = access.get("adapter", reference["name"])
            if quickstart.condition(adapter, "Ready").get("status") == "True":
                return Applied(stages, time.monotonic() - begin)
        time.sleep(0.1)
    raise Failed(f"{name} is not Ready after {passed:.0f} s: {stages}\n{quickstart.explain(access, SHOP)}")


def scripted(store: S3Store, number: int, folder: Path) -> float:
    """Return the seconds of the plain script, including the copy of its saved files to the store."""
    out = folder / f"out-{number}"
    RECIPE.write(folder / "recipe.json")
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train.plain", folder / "recipe.json", folder / f"clock-{number}", out],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Failed(done.stdout + done.stderr)
    for path in sorted(out.iterdir()):
        if path.is_file():
            store.upload(f"{SHOP}/scripts/{number}/{path.name}", path)
    return time.monotonic() - begin


def cluster_with_product() -> tuple[Cluster, Access]:
    """Create a new cluster, and install the chart and the quickstart's files on it."""
    packages.install(packages.NODE)
    product.beside(lambda: build(["kube", "pause", "coredns", "helm", "versitygw"]), product.build)
    cluster = Cluster("bench")
    cluster.down()
    cluster.up()
    product.load(cluster.node)
    access = quickstart.testbed_access(cluster.kubeconfig)
    quickstart.install(access, demo.testbed_values())
    quickstart.upload(access)
    for name in ("00-namespace.yaml", "10-basemodel.yaml"):
        access.kubectl("apply", "-f", str(QUICKSTART / name))
    return cluster, access


def measure(access: Access, rounds: int) -> dict[str, Any]:
    """Measure the job and the script in turn. Return the results. Round 0 does not count, because the node uses the
    image for the first time."""
    secret = access.get("secret", "graft-store-key", SYSTEM)["data"]
    key, value = (base64.b64decode(secret[name]).decode() for name in ("access-key-id", "secret-access-key"))
    ready: list[Applied] = []
    script: list[float] = []
    with access.forward("graft-store", 7070) as endpoint, tempfile.TemporaryDirectory() as folder:
        store = S3Store(StorageConfig(endpoint, "us-east-1", "graft", "", key, value))
        for number in range(rounds + 1):
            found = applied(access, number, Path(folder))
            seconds = scripted(store, number, Path(folder))
            say(
                f"    round {number}/{rounds}: Ready after {found.ready:.1f} s {found.stages}, script and copy {seconds:.1f} s"
            )
            if number:
                ready.append(found)
                script.append(seconds)
    overhead = [one.ready - other for one, other in zip(ready, script, strict=True)]
    result = {
        "recipe": vars(RECIPE),
        "readySeconds": [one.ready for one in ready],
        "stageSeconds": [one.stages for one in ready],
        "scriptSeconds": script,
        "overheadSeconds": statistics.median(overhead),
    }
    write("train-apply-to-ready", result)
    show(
        f"From apply to Ready ({rounds} rounds)",
        [
            ("apply to Ready, s", spread([one.ready for one in ready])),
            ("script and copy, s", spread(script)),
            ("overhead, s", spread(overhead)),
        ],
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train.apply_to_ready", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--keep", action="store_true", help="keep the cluster afterwards")
    arguments = parser.parse_args()
    cluster, access = cluster_with_product()
    try:
        measure(access, arguments.rounds)
    finally:
        if not arguments.keep:
            cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
