"""The quickstart with real pods: train, publish, serve, ask, and the next steps of a user.

The tests build on each other and run in this order only.
"""

import json
import time
import urllib.error
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml
from graft.contracts.addresses import host_port
from graft.contracts.mounts import STORAGE_DIR
from testbed import quickstart
from testbed.cluster import Cluster
from testbed.node import IPV6
from testbed.quickstart import SHOP, Access
from testbed.shell import CACHE, run, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2700)]
QUESTIONS = 20


def serving_pods(access: Access) -> dict[str, int]:
    """Return the serving pods and the restarts of their containers: pod -> restarts."""
    pods = json.loads(access.kubectl("get", "pods", "-n", SHOP, "-l", "graft.dev/component=serving", "-o", "json"))[
        "items"
    ]
    return {
        pod["metadata"]["name"]: sum(
            status["restartCount"]
            for status in [*pod["status"].get("containerStatuses", []), *pod["status"].get("initContainerStatuses", [])]
        )
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
    }


def test_a_job_is_tuned_evaluated_and_published(access: Access) -> None:
    quickstart.apply(access)
    job = quickstart.follow(access)
    status = job["status"]
    assert status["adapterRef"] == {"name": "support-1.0.0", "adapter": "support", "version": "1.0.0"}
    assert status["progress"]["percent"] == 100
    assert status["metrics"]["exactMatch"] > 0.9 > 0.2 > status["metrics"]["base/exactMatch"]
    assert status["resolved"]["training"]["learningRate"] == 0.004
    assert status["resolved"]["trainableParameters"] < status["resolved"]["totalParameters"]
    adapter = access.get("adapter", "support-1.0.0")
    assert quickstart.condition(adapter, "Ready")["status"] == "True"
    events = access.kubectl("get", "events", "-n", SHOP, "-o", "jsonpath={.items[*].reason}").split()
    assert {"Published", "Verified"} <= set(events)


def test_the_adapter_answers_better_than_the_base_model(access: Access) -> None:
    quickstart.wait_available(access)
    with quickstart.client(access) as client:
        base, adapter = quickstart.scores(quickstart.interview(client, QUESTIONS))
    assert base < 0.2
    assert adapter > 0.9


def test_the_gateway_streams_and_names_the_adapter_that_answers(access: Access) -> None:
    body = {"model": f"{SHOP}/support", "messages": [{"role": "user", "content": "Where is my tent?"}], "stream": True}
    with quickstart.client(access) as client, client.post(body) as answer:
        assert answer.headers["x-graft-adapter"] == "support-1.0.0"
        lines = [line.decode().strip() for line in answer if line.startswith(b"data: ")]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["model"] == f"{SHOP}/support"
    assert len(lines) > 3


@pytest.mark.parametrize("version", [4, *([6] if IPV6 else [])])
def test_services_answer_over_both_families(access: Access, version: int) -> None:
    """The requests pass kube-proxy and the pods' NetworkPolicies."""

    def address(service: str) -> str:
        families = access.get("service", service, quickstart.SYSTEM)["spec"]["clusterIPs"]
        return next(item for item in families if ip_address(item).version == version)

    question = quickstart.held_out(1)[0]["messages"]
    gateway = f"http://{host_port(address('graft-gateway'), 8080)}"
    answer = quickstart.ask(quickstart.Client(gateway, quickstart.api_key(access)), f"{SHOP}/support", question[:-1])
    assert quickstart.normal(answer) == quickstart.normal(question[-1]["content"])
    # From the pod of a tenant, with the tenant's key, under default deny.
    (pod,) = serving_pods(access)
    store = f"http://{host_port(address('graft-store'), 7070)}"
    program = f"""
from dataclasses import replace
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
config = replace(StorageConfig.from_dir("{STORAGE_DIR}"), endpoint="{store}")
print(S3Store(config, attempts=1).head("{SHOP}/adapters/support/1.0.0/manifest.json").size)
"""
    size = access.kubectl("exec", "-n", SHOP, pod, "-c", "agent", "--", "python", "-c", program)
    assert int(size) > 100


def test_the_gateway_answers_nobody_without_a_key(access: Access) -> None:
    body = {"model": f"{SHOP}/support", "messages": [{"role": "user", "content": "Hello"}]}
    with quickstart.client(access) as client:
        stranger = quickstart.Client(client.url, client.key[:-1])
        with pytest.raises(urllib.error.HTTPError) as refused:
            stranger.post(body)
    assert refused.value.code == 401
    assert json.load(refused.value)["error"]["code"] == "invalid_api_key"


def test_the_installation_passes_its_own_test(access: Access) -> None:
    log = CACHE / "logs" / "helm-test.log"
    log.unlink(missing_ok=True)
    command = [access.helm_path, "--kubeconfig", access.kubeconfig, "test", "graft", "-n", quickstart.SYSTEM, "--logs"]
    run(command, log, "helm test")
    assert "the gateway answers" in log.read_text()


def test_every_container_runs_as_a_user_that_its_image_does_not_know(access: Access, user: int) -> None:
    (pod, *_) = serving_pods(access)
    for container, wanted in (("agent", user), ("engine", user + 1)):
        asked = ["python", "-c", "import os; print(os.getuid())"]
        assert access.kubectl("exec", "-n", SHOP, pod, "-c", container, "--", *asked).strip() == str(wanted)


def test_a_second_adapter_is_attached_without_a_restart(access: Access, tmp_path: Path) -> None:
    before = serving_pods(access)
    job = yaml.safe_load((quickstart.QUICKSTART / "20-finetunejob.yaml").read_text())
    job["metadata"]["name"] = "mini"
    job["spec"]["output"]["adapter"] = "mini"
    job["spec"]["training"]["maxSteps"] = 5
    job["spec"]["evaluation"] = {"maxSamples": 4, "maxNewTokens": 16}
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(job))
    access.kubectl("apply", "-f", str(manifest))
    quickstart.follow(access, "mini")
    patch = {"spec": {"adapters": ["support@latest", "mini@^1"]}}
    routes = [{"model": name, "adapter": name} for name in ("support", "mini")] + [{"model": "base"}]
    patch["spec"]["routes"] = routes  # type: ignore[assignment]
    access.kubectl("patch", "adapterdeployment", "desk", "-n", SHOP, "--type=merge", "-p", json.dumps(patch))

    def both_loaded() -> bool:
        status = access.get("adapterdeployment", "desk").get("status", {})
        return [item.get("loaded") for item in status.get("adapters", [])] == ["1/1", "1/1"]

    wait_for(both_loaded, 120, "both adapters are loaded", lambda: quickstart.explain(access, SHOP))
    with quickstart.client(access) as client:
        question = [{"role": "user", "content": "Hello"}]
        assert isinstance(quickstart.ask(client, f"{SHOP}/mini", question), str)
    assert serving_pods(access) == before


def test_a_new_pod_has_every_adapter_before_it_is_ready(access: Access) -> None:
    (old,) = serving_pods(access)
    access.kubectl("delete", "pod", old, "-n", SHOP, "--wait=false")

    def replaced() -> bool:
        status = access.get("adapterdeployment", "desk")["status"]
        ready = [item for item in status.get("replicaStatus", []) if item["ready"] and item["pod"] != old]
        for replica in ready:
            assert [item["state"] for item in replica["adapters"]] == ["Loaded", "Loaded"], replica
        return (
            bool(ready)
            and quickstart.condition(access.get("adapterdeployment", "desk"), "Available").get("status") == "True"
        )

    wait_for(replaced, 180, "a new pod serves", lambda: quickstart.explain(access, SHOP))


def test_a_killed_engine_restarts_and_gets_its_adapters_again(access: Access, cluster: Cluster) -> None:
    (pod,) = serving_pods(access)
    access.kubectl(
        "exec", "-n", SHOP, pod, "-c", "engine", "--", "python", "-c", "import os; os.kill(1, 9)", check=False
    )
    access.kubectl(
        "exec", "-n", SHOP, pod, "-c", "engine", "--", "python", "-c", "import os; os.kill(1, 15)", check=False
    )
    wait_for(
        lambda: serving_pods(access).get(pod, 0) > 0,
        60,
        "the engine restarted",
        lambda: quickstart.explain(access, SHOP),
    )
    quickstart.wait_available(access)
    with quickstart.client(access) as client:
        base, adapter = quickstart.scores(quickstart.interview(client, 5))
    assert adapter > 0.9 > base


def test_a_detached_adapter_is_drained_and_unloaded(access: Access) -> None:
    patch = {
        "spec": {
            "adapters": ["support@latest"],
            "routes": [{"model": "support", "adapter": "support"}],
            "drainSeconds": 1,
        }
    }
    access.kubectl("patch", "adapterdeployment", "desk", "-n", SHOP, "--type=merge", "-p", json.dumps(patch))

    def unloaded() -> bool:
        status = access.get("adapterdeployment", "desk")["status"]
        return [[item["adapter"] for item in replica["adapters"]] for replica in status["replicaStatus"]] == [
            ["support-1.0.0"]
        ]

    wait_for(unloaded, 90, "mini is unloaded", lambda: quickstart.explain(access, SHOP))


def test_an_invalid_dataset_fails_at_once_and_names_the_line(access: Access, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    bad.write_text(json.dumps(good) + "\n" + '{"messages": [{"role": "user", "content": "no answer"}]}\n')
    access.kubectl("create", "configmap", "bad", "-n", SHOP, f"--from-file=bad.jsonl={bad}")
    job = yaml.safe_load((quickstart.QUICKSTART / "20-finetunejob.yaml").read_text())
    job["metadata"]["name"] = "bad"
    job["spec"]["dataset"] = {"train": {"uri": "configMap://bad/bad.jsonl"}}
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(job))
    access.kubectl("apply", "-f", str(manifest))
    wait_for(
        lambda: quickstart.condition(access.get("finetunejob", "bad"), "Succeeded").get("status") == "False",
        120, "the job failed", lambda: quickstart.explain(access, SHOP),
    )  # fmt: skip
    ended = quickstart.condition(access.get("finetunejob", "bad"), "Succeeded")
    assert ended["reason"] == "DatasetInvalid"
    assert "line 2" in ended["message"].lower()


def test_everything_can_be_deleted_and_nothing_gets_stuck(access: Access) -> None:
    access.kubectl("delete", "adapterdeployment", "desk", "-n", SHOP, "--timeout=120s")
    access.kubectl("delete", "finetunejob", "support", "mini", "bad", "-n", SHOP, "--timeout=120s")
    access.kubectl("delete", "adapter", "--all", "-n", SHOP, "--timeout=120s")
    kept = {"networkpolicy.networking.k8s.io/default-deny"}
    wait_for(
        lambda: set(access.kubectl("get", "pods,jobs,deployments,networkpolicies", "-n", SHOP, "-o", "name").split()) == kept,
        120, "all pods, Jobs, Deployments and NetworkPolicies are deleted", lambda: quickstart.explain(access, SHOP),
    )  # fmt: skip
    access.kubectl("apply", "-f", str(quickstart.QUICKSTART / "30-adapterdeployment.yaml"))
    wait_for(
        lambda: access.get("adapterdeployment", "desk")["metadata"].get("finalizers"),
        30,
        "the operator reconciled the deployment",
    )
    from testbed.shell import output

    output(
        [
            access.helm_path,
            "--kubeconfig",
            access.kubeconfig,
            "uninstall",
            "graft",
            "-n",
            quickstart.SYSTEM,
            "--wait",
            "--timeout",
            "5m",
        ]
    )
    started = time.monotonic()
    access.kubectl("delete", "adapterdeployment", "desk", "-n", SHOP, "--timeout=60s")
    access.kubectl("delete", "namespace", SHOP, "--timeout=120s")
    assert time.monotonic() - started < 180
