"""Clients send requests without pause while the deployment changes.

Adapters are added, changed and removed, an engine is killed, a pod is deleted, and all pods are rolled. Only the kubelet
is simulated. API server, operator, object store, agents, engines and gateway are real processes.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.controlplane import ControlPlane
from testbed.load import GONE, Load, under_load
from testbed.shell import tail
from transformers import AutoModelForCausalLM
from worlds.cluster.api import Api
from worlds.cluster.fleet import Fleet
from worlds.cluster.fork_server import ForkServer
from worlds.cluster.loopback import PLACEMENT, LoopbackNode, LoopbackPod, loopback_node
from worlds.cluster.serving_stack import BASE, MODEL, gateway, make_real_base, publish_version, write_kubeconfig
from worlds.cluster.tenant import Tenant
from worlds.engine import expected, make_adapter

PROMPT = "What do you sell?"
TOKENS = 16
BODY = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "seed": 1}


@pytest.fixture
def fork_server(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path / "agents.kubeconfig")
    yield server
    server.end()


@pytest.fixture
def node(api: Api, tmp_path: Path, fork_server: ForkServer) -> Iterator[LoopbackNode]:
    with loopback_node(api, tmp_path / "pods", MODEL, fork_server.start) as node:
        yield node
        assert node.troubles == []


def in_float32(folder: Path) -> Path:
    """Copy the tiny model with 32-bit weights. Return the folder."""
    shutil.copytree(MODEL, folder)
    AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").save_pretrained(folder)
    return folder


class Story:
    """One deployment under load, and the answers that its clients expect."""

    def __init__(self, tenant: Tenant, node: LoopbackNode, load: Load, fleet: Fleet) -> None:
        self.tenant, self.node, self.load, self.fleet = tenant, node, load, fleet

    def model(self, route: str) -> str:
        return f"{self.tenant.name}/{route}"

    def until(self, predicate: object, what: str, seconds: float = 240) -> None:
        """Wait until the predicate holds. Fail at the first failed request."""

        def there() -> object:
            assert not self.load.failures, self.load.failures[:3]
            assert self.node.troubles == []
            return predicate()  # type: ignore[operator]

        self.tenant.wait(there, what, seconds, lambda: str(self.fleet.status()))

    def until_answered(self, route: str, version: str, number: int = 5) -> None:
        """Wait until a version has answered `number` requests that began after this call."""
        since = time.monotonic()
        answers = self.load.answers
        self.until(lambda: answers(self.model(route), since)[version] >= number, f"version {version} answers {route}")

    def until_serving(self) -> None:
        """Wait until the rollout is complete and every route is served."""

        def settled() -> bool:
            seen = {
                kind: self.fleet.tenant.condition("AdapterDeployment", self.fleet.name, kind)
                for kind in ("Available", "Progressing")
            }
            return seen["Available"].get("reason") == "Serving" and seen["Progressing"].get("reason") == "Complete"

        self.until(settled, "the rollout is complete")

    def pods(self) -> list[LoopbackPod]:
        return self.node.of(self.tenant.name)


@pytest.mark.timeout(900)  # seconds; it takes two minutes on an idle machine
def test_no_request_fails_while_everything_changes(
    tenant: Tenant, node: LoopbackNode, plane: ControlPlane, tmp_path: Path
) -> None:
    make_real_base(tenant.api, tenant.store)
    folders = {
        name: make_adapter(MODEL, tmp_path / name, seed)
        for seed, name in enumerate(("support-1.0.0", "support-1.0.1", "sales-1.0.0"))
    }
    reference = in_float32(tmp_path / "reference")  # the engine computes in float32, too
    right = {name: expected(reference, folder, PROMPT, TOKENS) for name, folder in folders.items()}
    assert len(set(right.values())) == 3
    publish_version(tenant, folders["support-1.0.0"], "support", "1.0.0")
    publish_version(tenant, folders["sales-1.0.0"], "sales", "1.0.0")

    fleet = Fleet(tenant, "chat")
    write = {"baseModel": BASE, "drainSeconds": 1, **PLACEMENT}
    fleet.deploy(["support@latest"], replicas=2, **write)
    tenant.wait(
        lambda: tenant.api.get("ServiceAccount", tenant.name, "chat-agent"), "the agents' service account exists"
    )
    write_kubeconfig(plane, tmp_path / "agents.kubeconfig", tenant.api.token(tenant.name, "chat-agent"))

    with gateway(plane, tenant.api, tmp_path, node.address()) as url, under_load(Load(url, BODY)) as load:
        story = Story(tenant, node, load, fleet)
        story.until_serving()
        load.expect(story.model("support"), {"1.0.0": right["support-1.0.0"]})
        story.until_answered("support", "1.0.0")

        # An adapter is attached.
        fleet.change(adapters=["support@latest", "sales@1.0.0"])
        story.until_serving()
        load.expect(story.model("sales"), {"1.0.0": right["sales-1.0.0"]})
        story.until_answered("sales", "1.0.0")

        # A new version is published.
        load.expect(story.model("support"), {v: right[f"support-{v}"] for v in ("1.0.0", "1.0.1")})
        publish_version(tenant, folders["support-1.0.1"], "support", "1.0.1")
        story.until_answered("support", "1.0.1", number=1)
        load.expect(story.model("support"), {"1.0.1": right["support-1.0.1"]})
        story.until_answered("support", "1.0.1")
        story.until(
            lambda: fleet.wanted_names() == ["sales-1.0.0", "support-1.0.1"], "the old version is no longer wanted"
        )

        # An engine is killed with SIGKILL in the middle of streams. Another replica takes the streams over.
        load.streamed = 1.0
        story.until(lambda: load.streams > load.clients / 2, "streams run in both pods")
        victim = story.pods()[0]
        victim.engine.signal(signal.SIGKILL)
        story.until(lambda: victim.engine.restarts == 1, "the engine was started again")
        load.streamed = 0.5
        story.until(lambda: victim.ready, "the pod is ready again")
        story.until_serving()

        # A pod is deleted.
        leaving = story.pods()[1]
        tenant.api.delete("Pod", tenant.name, leaving.name)
        story.until(leaving.over.is_set, "the processes of the deleted pod have ended")
        story.until_serving()

        # A changed limit rolls the deployment: every pod is replaced.
        before = {pod.name for pod in story.pods()}
        fleet.change(limits={"maxNumSeqs": 12})
        story.until(
            lambda: len(story.pods()) == 2 and not before & {pod.name for pod in story.pods()}, "all pods are new"
        )
        story.until_serving()
        story.until_answered("sales", "1.0.0")
        story.until_answered("support", "1.0.1")

        # An adapter is detached.
        load.expect(story.model("sales"), {"1.0.0": right["sales-1.0.0"], GONE: ""})
        fleet.change(adapters=["support@latest"])
        story.until_answered("sales", GONE, number=1)
        load.expect(story.model("sales"), {GONE: ""})
        story.until_answered("sales", GONE)
        story.until_serving()
        story.until_answered("support", "1.0.1")

    assert load.failures == [], tail(tmp_path / "gateway.log")
    assert len(load.outcomes) > 100
