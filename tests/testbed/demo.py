"""`make demo`: create a cluster, install Graft, tune a model and ask it. `make demo-down` deletes the cluster.

CLUSTER=current uses the cluster of KUBECONFIG with the chart's images. GRAFT_HELM_ARGS adds helm arguments.
CLUSTER=kind creates a cluster with kind. It needs Docker. MODEL=smollm2 tunes a real model of 135M parameters.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from testbed import images, packages, policies, product, quickstart
from testbed.binaries import build
from testbed.cluster import Cluster
from testbed.quickstart import SHOP, SUPPORT, SYSTEM, Access, Story
from testbed.real import smollm2
from testbed.shell import CACHE, REPOSITORY, Failed, main_guard, output, run, say


class Clock:
    """The time that each phase took."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        say(f"\n### {name}")
        yield
        self.phases.append((name, time.monotonic() - started))

    def report(self) -> None:
        """Print a table of the phases."""
        say("\nTime of each phase")
        for name, seconds in self.phases:
            say(f"  {seconds:6.0f} s  {name}")
        say(f"  {sum(seconds for _, seconds in self.phases):6.0f} s  total")


def _image(name: str, reference: str) -> list[str]:
    repository, _, tag = reference.rpartition(":")
    return ["--set", f"images.{name}.repository={repository}", "--set", f"images.{name}.tag={tag}"]


def local_images() -> list[str]:
    """Return the helm arguments for the images that are built here."""
    return [part for name in ("operator", "trainer", "engine", "agent") for part in _image(name, product.TAGS[name])]


def testbed_values() -> list[str]:
    """Return the helm arguments for the testbed: no image is pulled, and its one volume holds the object store.

    The tags stay the same when the code changes. The digests go into annotations, so that changed images roll out.
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
    """Start the testbed's cluster with images that are built here. Return the access and the helm arguments."""
    with clock.phase("installing packages, building binaries and images"):
        packages.install(packages.NODE)
        product.beside(lambda: build(["kube", "pause", "coredns", "helm", "versitygw", policies.ENGINE]), product.build)
    cluster = Cluster("demo")
    with clock.phase("starting the cluster"):
        cluster.up()
    with clock.phase("loading the images into the cluster"):
        product.load(cluster.node)
    return quickstart.testbed_access(cluster.kubeconfig), testbed_values()


def prepare_current(clock: Clock) -> tuple[Access, list[str]]:
    """Use the cluster of KUBECONFIG. Its images come from the registry that the chart's values name."""
    kubectl, helm = _needed("kubectl"), _needed("helm")
    kubeconfig = os.environ.get("KUBECONFIG", str(Path("~/.kube/config").expanduser()))
    with clock.phase("checking the current cluster"):
        say(output([kubectl, "--kubeconfig", kubeconfig, "get", "nodes"]))
    return Access(kubeconfig, kubectl, helm), shlex.split(os.environ.get("GRAFT_HELM_ARGS", ""))


def prepare_kind(clock: Clock) -> tuple[Access, list[str]]:
    """Create a cluster in Docker. docker builds the images, and kind loads them."""
    kind, docker, kubectl, helm = (_needed(name) for name in ("kind", "docker", "kubectl", "helm"))
    kubeconfig = str(CACHE / "kind.kubeconfig")
    with clock.phase("creating the kind cluster"):
        if "graft" not in output([kind, "get", "clusters"], check=False).split():
            run(
                [kind, "create", "cluster", "--name", "graft", "--kubeconfig", kubeconfig],
                CACHE / "logs/kind.log",
                "kind create",
            )
        output([kind, "export", "kubeconfig", "--name", "graft", "--kubeconfig", kubeconfig])
    with clock.phase("building the images with docker"):
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
        raise Failed(f"{program} is not on PATH. Install it: CLUSTER={os.environ.get('CLUSTER')} needs it")
    return found


def chosen() -> Story:
    """Return what MODEL names."""
    name = os.environ.get("MODEL") or SUPPORT.base_model
    if name == SUPPORT.base_model:
        return SUPPORT
    if name != smollm2.NAME:
        raise Failed(f"MODEL={name} is unknown. Use {SUPPORT.base_model} (the default) or {smollm2.NAME}")
    return smollm2.story()


def main() -> None:
    story = chosen()
    kind = os.environ.get("CLUSTER", "testbed")
    clock = Clock()
    prepare = {"testbed": prepare_testbed, "current": prepare_current, "kind": prepare_kind}.get(kind)
    if prepare is None:
        raise Failed(f"CLUSTER={kind} is unknown. Use testbed (the default), current or kind")
    access, values = prepare(clock)
    with clock.phase("installing charts/graft with helm"):
        quickstart.install(access, values)
    with clock.phase("uploading the base model and the dataset"):
        quickstart.upload(access, story)
    with clock.phase(f"tuning: kubectl apply -f {story.manifests.relative_to(REPOSITORY)}"):
        quickstart.forget(access, story)
        quickstart.apply(access, story)
        job = quickstart.follow(access, story.adapter, story.timeout)
        say(f"    published {job['status']['adapterRef']['name']}: {quickstart.condition(job, 'Succeeded')['message']}")
    with clock.phase("serving: waiting until every route answers"):
        quickstart.wait_available(access)
    with (
        clock.phase("asking the base model and the adapter through the gateway"),
        quickstart.client(access) as client,
    ):
        answers = quickstart.interview(client, story.questions, story)
    base, adapter = quickstart.scores(answers)
    for item in answers[:6]:
        say(f"\n  question  {item.question}\n  base      {item.base[:100]}\n  adapter   {item.adapter[:100]}")
    say(f"\nExact match on {len(answers)} held-out questions:  base {base:.2f}   adapter {adapter:.2f}")
    clock.report()
    body = {"model": f"{SHOP}/{story.adapter}", "messages": [{"role": "user", "content": answers[0].question}]}
    say(f"""
The cluster keeps running. To use it:
  export KUBECONFIG={access.kubeconfig}
  export PATH={Path(access.kubectl_path).parent}:$PATH
  kubectl get graft -A
  kubectl -n {SYSTEM} port-forward service/graft-gateway 8080 &
  KEY=$(kubectl -n {SHOP} get secret graft-api-keys -o jsonpath={{.data.demo}} | base64 -d)
  curl -s localhost:8080/v1/chat/completions -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\
    -d {shlex.quote(json.dumps(body))}
{"make demo-down deletes the cluster." if kind == "testbed" else ""}""")
    if base >= story.base_below or adapter <= story.adapter_above:
        raise Failed(
            f"wrong scores: the adapter must score above {story.adapter_above} and the base model below {story.base_below}"
        )


def down() -> None:
    """Delete the demo's cluster."""
    Cluster("demo").down()
    say("the demo's cluster is deleted")


if __name__ == "__main__":
    sys.exit(main_guard(down if "down" in sys.argv[1:] else main))
