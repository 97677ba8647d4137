"""An upgrade from the version before, and the rollback, with a running job, serving pods, and clients that send requests.

helm installs the chart of each version, with its CRDs and rights. Operator, gateway, agents and the played trainer run the code
of each version. The kubelet is simulated, and the engines are stand-ins: they answer with the digest of the adapter's weights.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from safetensors.numpy import save_file
from testbed.controlplane import SERVICE_CIDR, SERVICE_CIDR_IPV6, ControlPlane, control_plane, free_port
from testbed.load import Load, under_load
from testbed.shell import tail
from testbed.simulated import add_nodes
from worlds.cluster.api import Api, Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.loopback import PLACEMENT, LoopbackNode, loopback_node
from worlds.cluster.operator_process import BUCKET, SYSTEM, OperatorProcess
from worlds.cluster.serving_stack import BASE, MODEL, gateway, make_real_base, write_kubeconfig
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import make_namespace
from worlds.upgrade.engine import digest
from worlds.upgrade.release import Installation, Release, before, present, train

BODY = {"prompt": "What do you sell?", "max_tokens": 16, "temperature": 0, "seed": 1}
SHOP = "shop"
OURS = ("FineTuneJob", "Adapter", "AdapterDeployment")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return before(tmp_path_factory.mktemp("before"))


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    """Run a control plane of its own: helm changes CRDs and roles of the whole cluster. Services may have both families."""
    with control_plane(service_cidr=f"{SERVICE_CIDR},{SERVICE_CIDR_IPV6}") as made:
        add_nodes(made, 1)
        yield made


@pytest.fixture
def api(plane: ControlPlane) -> Api:
    return Api(plane.server, plane.state / "pki")


@pytest.fixture
def node(api: Api, old: Release, tmp_path: Path) -> Iterator[LoopbackNode]:
    """Run serving pods with the code that their images name."""
    releases = {item.tag: item for item in (old, present())}

    def start(program: str, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        code = releases[environment["IMAGE"].rpartition(":")[2]].environment if program == "agent" else {}
        module = "graft_server.agent" if program == "agent" else "worlds.upgrade.engine"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=os.environ | {"KUBECONFIG": str(tmp_path / "agents.kubeconfig")} | environment | code,
                stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        threading.Thread(target=process.wait, daemon=True).start()  # no zombies
        return process.pid

    with loopback_node(api, tmp_path / "pods", MODEL, start) as node:
        yield node
    assert node.troubles == []


def fields(crd: Object) -> set[str]:
    """Return the fields of the spec that a CustomResourceDefinition declares."""
    (version,) = crd["spec"]["versions"]
    return set(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


def make_weights(folder: Path, seed: int) -> Path:
    """Save an adapter of the tiny model with random weights. Return its folder."""
    folder.mkdir()
    size = json.loads((MODEL / "config.json").read_text())["hidden_size"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": BASE}))
    layer, chance = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(seed)
    shapes = {f"{layer}.lora_A.weight": (4, size), f"{layer}.lora_B.weight": (size, 4)}
    tensors = {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def outcome(status: Object) -> Object:
    """Return what a status says, without the wording of messages and without the time of the last use."""
    conditions = {item["type"]: (item["status"], item["reason"]) for item in status.get("conditions", [])}
    rest = {key: value for key, value in status.items() if key not in {"conditions", "lastUsedTime"}}
    return rest | {"conditions": conditions}


def lost(then: object, now: object, path: str = "") -> list[str]:
    """Return the paths of values that are no longer as they were. New values are no loss."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [found for key, value in then.items() for found in lost(value, now.get(key), f"{path}.{key}")]
    return [] if then == now else [f"{path}: {then} -> {now}"]


class World:
    """What a user sees of an installation."""

    def __init__(self, installation: Installation, tenant: Tenant) -> None:
        self.installation, self.tenant = installation, tenant

    def secrets(self) -> dict[str, Object]:
        api = self.tenant.api
        found = [item for namespace in (SYSTEM, SHOP) for item in api.list("Secret", namespace)]
        return {
            f"{item['metadata']['namespace']}/{item['metadata']['name']}": item.get("data", {})
            for item in found
            if item["type"] != "helm.sh/release.v1"
        }

    def statuses(self, *names: str) -> dict[str, Object]:
        found = [item for kind in OURS for item in self.tenant.api.list(kind, SHOP)]
        return {
            f"{item['kind']} {item['metadata']['name']}": outcome(item.get("status", {}))
            for item in found
            if item["metadata"]["name"] in names
        }

    def has_crds_of(self, release: Release) -> bool:
        """Return whether the API server knows the fields of a release, and no others."""
        name = "adapterdeployments.graft.dev"
        live = self.tenant.api.call("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
        return fields(live) == fields(yaml.safe_load((release.folder / "crds" / f"{name}.yaml").read_text()))

    def objects(self) -> set[str]:
        return {item.key for item in self.tenant.store.objects(f"{SHOP}/adapters/")}

    def served(self, fleet: Fleet, tag: str) -> bool:
        """Return whether the only serving pod has the images of a release, and every route is served."""
        pods = self.tenant.pods(self.tenant.get("AdapterDeployment", fleet.name))
        images = {item["image"].rpartition(":")[2] for pod in pods for item in pod["spec"]["containers"]}
        return (
            len(pods) == 1
            and images == {tag}
            and self.tenant.condition("AdapterDeployment", fleet.name, "Available").get("reason") == "Serving"
            and self.tenant.condition("AdapterDeployment", fleet.name, "Progressing").get("reason") == "Complete"
        )


@pytest.mark.timeout(900)  # seconds; it takes about one minute on an idle machine
def test_an_upgrade_and_a_rollback_lose_nothing(
    plane: ControlPlane, api: Api, node: LoopbackNode, old: Release, tmp_path: Path
) -> None:
    new = present()
    weights = [make_weights(tmp_path / f"weights-{seed}", seed) for seed in range(3)]
    right = [digest(folder) for folder in weights]

    installation = Installation(plane, api, tmp_path, free_port())
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
    make_namespace(api, None, SHOP)  # type: ignore[arg-type]
    tenants = f"--set=tenantNamespaces={{{SHOP}}}"

    with contextlib.ExitStack() as stack:

        def run(release: Release) -> OperatorProcess:
            process = installation.operator(release)
            process.start()
            stack.callback(process.stop)
            return process

        def front_door(release: Release) -> tuple[contextlib.ExitStack, Load]:
            inner = stack.enter_context(contextlib.ExitStack())
            folder = tmp_path / f"gateway-{node.address()}"
            folder.mkdir()
            url = inner.enter_context(gateway(plane, api, folder, node.address(), release.environment))
            return inner, inner.enter_context(under_load(Load(url, BODY, clients=2, pause=0.3, streamed=0)))

        # The version before: a published version, a deployment that serves it, and a job that trains.
        installation.upgrade(old, tenants)
        server = installation.store()
        stack.callback(server.stop)
        operator = run(old)
        store = S3Store(StorageConfig.from_dir(server.secret_dir(BUCKET)))
        tenant = Tenant(api, SHOP, store)
        tenant.wait(lambda: BUCKET in str(store.client.list_buckets()["Buckets"]), "the bucket exists")
        world = World(installation, tenant)
        make_real_base(api, store)
        tenant.job("first", baseModel=BASE)
        train(old, tenant, "first", tenant.running_pod("first"), weights[0], tmp_path)
        tenant.until("FineTuneJob", "first", "Succeeded", "Published")
        fleet = Fleet(tenant, "desk")
        fleet.deploy(["support@latest"], baseModel=BASE, replicas=1, drainSeconds=1, **PLACEMENT)
        tenant.wait(lambda: api.get("ServiceAccount", SHOP, "desk-agent"), "the agents have an account")
        write_kubeconfig(plane, tmp_path / "agents.kubeconfig", api.token(SHOP, "desk-agent"))
        tenant.job("second", baseModel=BASE)
        pod = tenant.running_pod("second")
        tenant.progress("second", pod, stage="Training", step=40, total_steps=100)
        tenant.wait(lambda: world.served(fleet, "before"), "the version before serves", 240)
        secrets, objects = world.secrets(), world.objects()
        statuses = world.statuses("first", "support-1.0.0", "second")
        door, load = front_door(old)
        load.expect(f"{SHOP}/support", {"1.0.0": right[0]})
        tenant.wait(lambda: load.answers(f"{SHOP}/support")["1.0.0"] > 5, "the old gateway answers")

        # The upgrade. While helm changes the CRDs, the operator of the version before still runs.
        installation.upgrade(new, tenants)
        assert world.has_crds_of(new)
        assert world.secrets() == secrets
        newer, load_new = front_door(new)
        load_new.expect(f"{SHOP}/support", {"1.0.0": right[0]})
        door.close()
        assert load.failures == []
        operator.stop()
        operator = run(new)
        tenant.wait(lambda: world.served(fleet, "present"), "the new version serves", 240, lambda: tail(operator.log))
        assert load_new.failures == []
        assert len(node.pods) == 2, "the serving pod is replaced once"
        assert [item["metadata"]["name"] for item in tenant.pods(tenant.get("FineTuneJob", "second"))] == [pod]
        assert not lost(statuses, world.statuses("first", "support-1.0.0", "second"))
        assert world.secrets() == secrets
        assert world.objects() == objects
        load_new.expect(f"{SHOP}/support", {"1.0.0": right[0], "1.0.1": right[1]})
        train(old, tenant, "second", pod, weights[1], tmp_path)
        tenant.until("FineTuneJob", "second", "Succeeded", "Published")
        assert len(tenant.status("FineTuneJob", "second")["attempts"]) == 1

        # The rollback. While helm changes the CRDs, the new operator still runs.
        tenant.job("third", baseModel=BASE)
        pod = tenant.running_pod("third")
        tenant.wait(lambda: load_new.answers(f"{SHOP}/support")["1.0.1"] > 5, "the next version answers")
        objects = world.objects()
        statuses = world.statuses("first", "second")
        installation.rollback()
        assert world.has_crds_of(old)
        assert world.secrets() == secrets
        operator.stop()
        operator = run(old)
        older, load = front_door(old)
        load.expect(f"{SHOP}/support", {"1.0.1": right[1]})
        newer.close()
        assert load_new.failures == []
        tenant.wait(lambda: world.served(fleet, "before"), "the version before serves", 240, lambda: tail(operator.log))
        assert len(node.pods) == 3, "the serving pod is replaced once more"
        assert not lost(statuses, world.statuses("first", "second"))
        train(new, tenant, "third", pod, weights[2], tmp_path)
        load.expect(f"{SHOP}/support", {"1.0.1": right[1], "1.0.2": right[2]})
        tenant.until("FineTuneJob", "third", "Succeeded", "Published")
        assert len(tenant.pods(tenant.get("FineTuneJob", "third"))) == 1
        tenant.wait(lambda: load.answers(f"{SHOP}/support")["1.0.2"] > 5, "the version of the rolled back job answers")
        assert world.secrets() == secrets
        assert objects <= world.objects()
        older.close()
        assert load.failures == []
        assert {f"{SYSTEM}/graft-store-root", f"{SYSTEM}/graft-signing", f"{SHOP}/graft-storage"} <= secrets.keys()
