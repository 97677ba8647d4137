"""Complete training runs with real pods: evicted and resumed, spread over two pods, with every method, judged by gates."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.contracts.mounts import STORAGE_SECRET
from testbed import quickstart
from testbed.quickstart import SHOP, Access
from testbed.shell import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
Object = dict[str, Any]


@pytest.fixture(scope="module")
def shop(access: Access) -> Access:
    """Create the namespace and the base model of the quickstart."""
    for name in ("00-namespace.yaml", "10-basemodel.yaml"):
        access.kubectl("apply", "-f", str(quickstart.QUICKSTART / name))
    return access


def submit(access: Access, folder: Path, name: str, training: Object | None = None, **spec: Any) -> None:
    """Apply a small variant of the quickstart's job, whose loss curve has every step."""
    job = yaml.safe_load((quickstart.QUICKSTART / "20-finetunejob.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["output"]["adapter"] = name
    small = {"perDeviceTrainBatchSize": 8, "loggingSteps": 1, "maxLength": 128, "learningRate": 0.004}
    job["spec"]["training"] = small | (training or {})
    job["spec"]["evaluation"] = {"maxSamples": 0}
    job["spec"] |= spec
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job))
    access.kubectl("apply", "-f", str(file))


def report(access: Access, name: str) -> Object:
    """Return report.json of the version that a job published."""
    with quickstart.opened_store(access) as store:
        return dict(json.loads(store.get(f"{SHOP}/adapters/{name}/1.0.0/report.json")))


def losses(access: Access, name: str) -> list[float]:
    return [record["loss"] for record in report(access, name)["lossCurve"] if "loss" in record]


def step(access: Access, name: str) -> int:
    return int(access.get("finetunejob", name).get("status", {}).get("progress", {}).get("step", 0))


def running_pod(access: Access, name: str) -> str | None:
    """Return the name of the job's pod whose training container runs, or None."""
    pods = json.loads(access.kubectl("get", "pods", "-n", SHOP, "-l", f"graft.dev/owner={name}", "-o", "json"))["items"]
    for pod in pods:
        states = [item.get("state", {}) for item in pod["status"].get("containerStatuses", [])]
        if not pod["metadata"].get("deletionTimestamp") and any("running" in state for state in states):
            return str(pod["metadata"]["name"])
    return None


def evict(access: Access, pod: str) -> None:
    """Evict a pod, as the drain of a node or a preemption does."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": SHOP}}
    subprocess.run(
        [access.kubectl_path, "--kubeconfig", access.kubeconfig, "create", "--raw",
         f"/api/v1/namespaces/{SHOP}/pods/{pod}/eviction", "-f", "-"],
        input=json.dumps(body), text=True, check=True, capture_output=True,
    )  # fmt: skip


def replace_key(access: Access) -> None:
    """Delete the namespace's key while a job runs. Wait until there is another one, which the kubelet writes into the pod."""
    secret = lambda: access.get("secret", STORAGE_SECRET).get("metadata", {}).get("uid")  # noqa: E731
    old = secret()
    access.kubectl("delete", "secret", STORAGE_SECRET, "-n", SHOP)
    wait_for(
        lambda: secret() not in {None, old},
        10,
        "the namespace has another key",
        lambda: quickstart.explain(access, SHOP),
    )


def until_step(access: Access, name: str, least: int) -> None:
    wait_for(
        lambda: step(access, name) >= least, 300, f"{name} is at step {least}", lambda: quickstart.explain(access, SHOP)
    )


def test_an_evicted_and_suspended_run_has_the_same_losses_as_an_undisturbed_one(shop: Access, tmp_path: Path) -> None:
    """Only the key of the undisturbed run is replaced. Its pod goes on with the new one."""
    recipe = {"maxSteps": 160, "gradientAccumulationSteps": 2, "saveSteps": 20}
    method = {"lora": {"rank": 8, "dropout": 0.1}}
    submit(shop, tmp_path, "calm", recipe, method=method)
    until_step(shop, "calm", 5)
    replace_key(shop)
    attempts = quickstart.follow(shop, "calm")["status"]["attempts"]
    assert [item["reason"] for item in attempts] == ["Completed"]
    submit(shop, tmp_path, "stormy", recipe, method=method, spot=True, retries=0)
    for least in (25, 70):
        until_step(shop, "stormy", least)
        pod = running_pod(shop, "stormy")
        assert pod is not None
        evict(shop, pod)
        wait_for(
            lambda gone=pod: running_pod(shop, "stormy") not in {None, gone},
            300, "another pod resumes the run", lambda: quickstart.explain(shop, SHOP),
        )  # fmt: skip
    until_step(shop, "stormy", 110)
    shop.kubectl("patch", "finetunejob", "stormy", "-n", SHOP, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    wait_for(
        lambda: shop.get("finetunejob", "stormy")["status"]["stage"] == "Suspended" and not running_pod(shop, "stormy"),
        180, "the run is suspended", lambda: quickstart.explain(shop, SHOP),
    )  # fmt: skip
    shop.kubectl("patch", "finetunejob", "stormy", "-n", SHOP, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    job = quickstart.follow(shop, "stormy")
    status = job["status"]
    assert [item["reason"] for item in status["attempts"]] == ["Preempted", "Preempted", "Interrupted", "Completed"]
    resumed = [item.get("resumedFrom") for item in status["attempts"]]
    assert resumed[0] is None and resumed[1] >= 20 and resumed[1] < resumed[2] < resumed[3]
    assert status["checkpoints"] == []
    with quickstart.opened_store(shop) as store:
        left = [
            item.key for item in store.objects(f"{SHOP}/runs/{job['metadata']['uid']}/") if "/checkpoints/" in item.key
        ]
    assert left == [], "a published run must have no checkpoints left"
    assert losses(shop, "stormy") == losses(shop, "calm")
    assert len(losses(shop, "calm")) == 160


def test_two_pods_have_the_same_losses_as_one_pod(shop: Access, tmp_path: Path) -> None:
    resources = {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}}
    method = {"lora": {"rank": 8}}
    submit(
        shop, tmp_path, "alone", {"maxSteps": 12, "gradientAccumulationSteps": 2}, method=method, resources=resources
    )
    quickstart.follow(shop, "alone")
    pair = {"maxSteps": 12, "gradientAccumulationSteps": 1}
    submit(shop, tmp_path, "pair", pair, method=method, resources=resources, nodes=2)
    status = quickstart.follow(shop, "pair")["status"]
    assert status["resolved"]["worldSize"] == 2
    assert [item["index"] for item in status["attempts"]] == [0, 1]
    assert losses(shop, "pair") == pytest.approx(losses(shop, "alone"), rel=1e-3)


def test_every_method_is_trained_and_compared(shop: Access, tmp_path: Path) -> None:
    methods: dict[str, tuple[Object, float]] = {
        "full": ({"full": {}}, 0.0005),
        "lora": ({"lora": {"rank": 8}}, 0.004),
        "qlora": ({"qlora": {"rank": 8}}, 0.004),
        "prompt": ({"promptTuning": {"virtualTokens": 8, "initText": "Answer the customer."}}, 0.03),
    }
    suite = {"name": "desk", "uri": "s3://graft/shop/datasets/support/heldout.jsonl", "limit": 16, "maxNewTokens": 24}
    for name, (method, rate) in methods.items():
        recipe = {"maxSteps": 15, "gradientAccumulationSteps": 1, "learningRate": rate}
        evaluation = {"maxSamples": 8, "maxNewTokens": 24, "suites": [suite]}
        submit(shop, tmp_path, f"by-{name}", recipe, method=method, evaluation=evaluation)
    for name in methods:
        status = quickstart.follow(shop, f"by-{name}")["status"]
        adapter = shop.get("adapter", status["adapterRef"]["name"])
        assert quickstart.condition(adapter, "Ready")["status"] == "True"
        assert {"evalLoss", "desk/exactMatch", "base/desk/exactMatch"} <= status["metrics"].keys()
        assert status["sizing"]["totalBytes"] > 0

    page = tmp_path / "compare.html"

    def graft(*arguments: str) -> str:  # it forwards a port to the store by itself
        done = subprocess.run(
            [sys.executable, "-m", "graft.cli", *arguments, "-n", SHOP],
            env={"KUBECONFIG": shop.kubeconfig, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    text = graft("compare", *(f"by-{name}" for name in methods), "--page", str(page))
    for word in ("Full fine-tuning", "LoRA r=8", "QLoRA r=8", "Prompt tuning", "training memory"):
        assert word in text and word in page.read_text()
    version = shop.get("finetunejob", "by-lora")["status"]["adapterRef"]["name"]
    assert "every SHA-256 verified" in graft("pull", version, "--to", str(tmp_path / "pulled"))
    assert (tmp_path / "pulled/README.md").read_text().startswith("---\nlibrary_name: peft\n")
    assert "published" in graft("logs", "by-lora") or "staged" in graft("logs", "by-lora")


def test_a_version_that_misses_a_gate_is_rejected(shop: Access, tmp_path: Path) -> None:
    evaluation = {"maxSamples": 4, "maxNewTokens": 16, "gates": [{"metric": "exactMatch", "min": 0.99}]}
    submit(shop, tmp_path, "weak", {"maxSteps": 2}, evaluation=evaluation)
    wait_for(
        lambda: quickstart.condition(shop.get("finetunejob", "weak"), "Succeeded").get("reason") == "GateFailed",
        180, "the gate is missed", lambda: quickstart.explain(shop, SHOP),
    )  # fmt: skip
    assert shop.get("finetunejob", "weak")["status"]["stage"] == "Rejected"
    assert quickstart.condition(shop.get("adapter", "weak-1.0.0"), "Ready")["reason"] == "Rejected"


def test_a_model_that_fits_nowhere_is_reported_before_anything_starts(shop: Access, tmp_path: Path) -> None:
    llama_70b = {
        "parameters": 68_976_648_192, "layers": 80, "hiddenSize": 8192, "intermediateSize": 28672, "heads": 64,
        "kvHeads": 8, "headDim": 128, "vocabSize": 32000, "contextLength": 4096, "dtype": "bfloat16",
        "architecture": "LlamaForCausalLM",
    }  # fmt: skip
    large = {"source": "s3://graft/models/tiny-llama", "facts": llama_70b}
    model = {"apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel", "metadata": {"name": "large"}, "spec": large}
    file = tmp_path / "large.yaml"
    file.write_text(yaml.safe_dump(model))
    shop.kubectl("apply", "-f", str(file))
    submit(shop, tmp_path, "too-large", {}, baseModel="large", resources=None)
    wait_for(
        lambda: quickstart.condition(shop.get("finetunejob", "too-large"), "Accepted").get("reason") == "DoesNotFit",
        60, "the job does not fit", lambda: quickstart.explain(shop, SHOP),
    )  # fmt: skip
    assert "GiB" in quickstart.condition(shop.get("finetunejob", "too-large"), "Accepted")["message"]
    assert not shop.kubectl("get", "job", "too-large", "-n", SHOP, "--ignore-not-found", "-o", "name").strip()


def test_the_remaining_resources_can_be_deleted(shop: Access) -> None:
    names = shop.kubectl("get", "finetunejob", "-n", SHOP, "-o", "name").split()
    shop.kubectl("delete", "-n", SHOP, *names, "--timeout=120s")
    shop.kubectl("delete", "adapter", "--all", "-n", SHOP, "--timeout=120s")
    shop.kubectl("delete", "basemodel", "large", "--timeout=60s")
    with quickstart.opened_store(shop) as store:
        wait_for(lambda: not list(store.objects(f"{SHOP}/runs/")), 60, "the store has no files of the runs")
