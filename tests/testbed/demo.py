"""`make demo`: from nothing to answers of a tuned model, on a cluster of its own. `make demo-down` removes it.

CLUSTER=current uses the cluster of KUBECONFIG, with the chart's images (GRAFT_HELM_ARGS adds helm arguments);
CLUSTER=kind makes one with kind where Docker is.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from testbed import images, packages, product, quickstart
from testbed.binaries import build
from testbed.cluster import Cluster
from testbed.quickstart import SYSTEM, Access
from testbed.shell import CACHE, REPOSITORY, Failed, main_guard, output, run, say

BASE_BELOW, ADAPTER_ABOVE = 0.2, 0.9


class Clock:
    """How long each phase took."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        say(f"\n### {name}")
        yield
        self.phases.append((name, time.monotonic() - started))

    def report(self) -> None:
        """A table of the phases."""
        say("\nTime")
        for name, seconds in self.phases:
            say(f"  {seconds:6.0f} s  {name}")
        say(f"  {sum(seconds for _, seconds in self.phases):6.0f} s  in all")


def _image(name: str, reference: str) -> list[str]:
    repository, _, tag = reference.rpartition(":")
    return ["--set", f"images.{name}.repository={repository}", "--set", f"images.{name}.tag={tag}"]


def local_images() -> list[str]:
    """helm arguments for the images that are built here."""
    return [part for name in ("operator", "trainer", "engine", "agent") for part in _image(name, product.TAGS[name])]


def testbed_values() -> list[str]:
    """helm arguments for the testbed: nothing is pulled, and its one volume holds the object store.

    The tags stay the same when the code changes, so the digests go into annotations: else nothing would roll out.
    """
    persistence = "objectStore.embedded.persistence"
    rolled = {"operator": "operator", "gateway": "agent"}
    digests = [
        f"{part}.podAnnotations.graft\\.dev/image={images.Stored(product.TAGS[name]).digest}"
        for part, name in rolled.items()
    ]
    return [
        *(part for digest in digests for part in ("--set-string", digest)),
        *local_images(), *_image("store", product.VERSITYGW), "--set", "imagePullPolicy=Never",
        "--set", f"{persistence}.storageClass=testbed", "--set", f"{persistence}.size=10Gi",
    ]  # fmt: skip


def prepare_testbed(clock: Clock) -> tuple[Access, list[str]]:
    """Our own cluster, with everything built here."""
    with clock.phase("packages, binaries and images"):
        packages.install(packages.NODE)
        product.beside(lambda: build(["kube", "pause", "coredns", "helm", "versitygw"]), product.build)
    cluster = Cluster("demo")
    with clock.phase("cluster"):
        cluster.up()
    with clock.phase("loading images"):
        product.load(cluster.node)
    return quickstart.testbed_access(cluster.kubeconfig), testbed_values()


def prepare_current(clock: Clock) -> tuple[Access, list[str]]:
    """The cluster of KUBECONFIG: images come from the registry that the chart's values name."""
    kubectl, helm = _needed("kubectl"), _needed("helm")
    kubeconfig = os.environ.get("KUBECONFIG", str(Path("~/.kube/config").expanduser()))
    with clock.phase("looking at the current cluster"):
        say(output([kubectl, "--kubeconfig", kubeconfig, "get", "nodes"]))
    return Access(kubeconfig, kubectl, helm), shlex.split(os.environ.get("GRAFT_HELM_ARGS", ""))


def prepare_kind(clock: Clock) -> tuple[Access, list[str]]:
    """A cluster in Docker: images built by docker and loaded by kind."""
    kind, docker, kubectl, helm = (_needed(name) for name in ("kind", "docker", "kubectl", "helm"))
    kubeconfig = str(CACHE / "kind.kubeconfig")
    with clock.phase("kind cluster"):
        if "graft" not in output([kind, "get", "clusters"], check=False).split():
            run(
                [kind, "create", "cluster", "--name", "graft", "--kubeconfig", kubeconfig],
                CACHE / "logs/kind.log",
                "kind create",
            )
        output([kind, "export", "kubeconfig", "--name", "graft", "--kubeconfig", kubeconfig])
    with clock.phase("images with docker"):
        ml = product.TAGS["ml"]
        for name, file, target, arguments in (
            ("operator", "operator/Dockerfile", None, []),
            ("agent", "server-image/Dockerfile", "agent", []),
            ("ml", "trainer-image/Dockerfile", "ml", []),
            ("trainer", "trainer-image/Dockerfile", "trainer", []),
            ("engine", "server-image/Dockerfile", "engine", ["--build-arg", f"ML_IMAGE={ml}"]),
        ):
            aim = ["--target", target] if target else []
            tag = product.TAGS[name]
            log = CACHE / "logs" / f"docker-{name}.log"
            run(
                [docker, "build", "-f", REPOSITORY / file, "-t", tag, *aim, *arguments, REPOSITORY],
                log,
                f"docker build {name}",
            )
            if name != "ml":
                run([kind, "load", "docker-image", "--name", "graft", tag], log, f"kind load {name}")
    return Access(kubeconfig, kubectl, helm), local_images()


def _needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise Failed(f"{program} is needed for CLUSTER={os.environ.get('CLUSTER')} and is not on PATH")
    return found


def main() -> None:
    kind = os.environ.get("CLUSTER", "testbed")
    clock = Clock()
    prepare = {"testbed": prepare_testbed, "current": prepare_current, "kind": prepare_kind}.get(kind)
    if prepare is None:
        raise Failed(f"CLUSTER={kind} is not known; use testbed (the default), current or kind")
    access, values = prepare(clock)
    with clock.phase("installing charts/graft with helm"):
        quickstart.install(access, values)
    with clock.phase("uploading the base model and the dataset"):
        quickstart.upload(access)
    with clock.phase("tuning: kubectl apply -f examples/quickstart"):
        quickstart.forget(access)
        quickstart.apply(access)
        job = quickstart.follow(access)
        say(f"    published {job['status']['adapterRef']['name']}: {quickstart.condition(job, 'Succeeded')['message']}")
    with clock.phase("serving"):
        quickstart.wait_available(access)
    with clock.phase("asking base and adapter through the gateway"), access.forward("graft-gateway", 8080) as endpoint:
        answers = quickstart.interview(endpoint)
    base, adapter = quickstart.scores(answers)
    for item in answers[:6]:
        say(f"\n  question  {item.question}\n  base      {item.base[:100]}\n  adapter   {item.adapter[:100]}")
    say(f"\nExact match on {len(answers)} held-out questions:  base {base:.2f}   adapter {adapter:.2f}")
    clock.report()
    say(f"""
The cluster goes on running:
  export KUBECONFIG={access.kubeconfig}
  export PATH={Path(access.kubectl_path).parent}:$PATH
  kubectl get graft -A
  kubectl -n {SYSTEM} port-forward service/graft-gateway 8080 &
  curl -s localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "shop/support", "messages": [{{"role": "user", "content": "{answers[0].question}"}}]}}'
{"make demo-down removes it." if kind == "testbed" else ""}""")
    if base >= BASE_BELOW or adapter <= ADAPTER_ABOVE:
        raise Failed(f"the adapter should score above {ADAPTER_ABOVE} and the base model below {BASE_BELOW}")


def down() -> None:
    """Remove the demo's cluster."""
    Cluster("demo").down()
    say("the demo's cluster is gone")


if __name__ == "__main__":
    sys.exit(main_guard(down if "down" in sys.argv[1:] else main))
