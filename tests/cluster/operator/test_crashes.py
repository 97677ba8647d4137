"""The operator may be killed at any moment without effect on the result. When nothing changes, it writes nothing."""

import re
import time
from collections.abc import Callable
from typing import Any

from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import OperatorProcess
from worlds.cluster.settled import CHILDREN, settled, versions
from worlds.cluster.tenant import Tenant

WRITES = {"APPLY", "PATCH", "POST", "PUT", "DELETE", "CREATE", "UPDATE"}
RESOURCES = {"finetunejobs", "adapters", "adapterdeployments", "basemodels", "jobs", "configmaps", "networkpolicies"}


def story(tenant: Tenant, between: Callable[[], None], after: Callable[[], None]) -> None:
    """Tune, publish and serve one adapter.

    `between` is called after each step. After the last step, the agent's report, `after` is called instead.
    """
    tenant.job("first", resources=None)
    between()
    tenant.pass_preflight("first", examples=10, maxTokens=100)
    between()
    pod = tenant.running_pod("first")
    tenant.progress("first", pod, stage="Training", step=1, total_steps=2, percent=50)
    between()
    tenant.publish_as_trainer("first", pod)
    tenant.end_pod(pod)
    between()
    tenant.until("FineTuneJob", "first", "Succeeded", "Published")
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest"])
    between()
    (replica,) = fleet.pods(1)
    fleet.until_wanted("support-1.0.0")
    fleet.agent_says(replica)
    after()
    fleet.until("Available", "Serving")
    fleet.until("Progressing", "Complete")
    tenant.until("Adapter", "support-1.0.0", "InUse", "Served")


def end_state(tenant: Tenant) -> Object:
    """Return the state that a user sees, without names and times that differ from run to run."""
    job, adapter, deployment = tenant.status("FineTuneJob", "first"), tenant.get("Adapter", "support-1.0.0"), None
    deployment = tenant.status("AdapterDeployment", "chat")
    seen: Object = {
        "children": [
            f"{kind} {item['metadata']['name']}"
            for kind in CHILDREN[:-1]
            for item in tenant.api.list(kind, tenant.name)
        ],
        "pods": len(tenant.pods(tenant.get("FineTuneJob", "first"))),
        "job": {key: job.get(key) for key in ("stage", "metrics", "adapterRef", "progressText")},
        "attempts": [item["reason"] for item in job["attempts"]],
        "version": job["resolved"]["version"],
        "adapter": {key: adapter["status"].get(key) for key in ("stage", "score", "usedBy", "rank")},
        "deployment": {key: deployment.get(key) for key in ("stage", "readyText", "adaptersText")},
        "conditions": [[item["type"], item["reason"]] for item in deployment["conditions"] + job["conditions"]],
        "stored": [item.key for item in tenant.store.objects(f"{tenant.name}/adapters/")],
    }
    return {key: _general(value, tenant) for key, value in seen.items()}


def _general(value: Any, tenant: Tenant) -> Any:
    if isinstance(value, list):
        return sorted((_general(item, tenant) for item in value), key=str)
    return value.replace(tenant.name, "NAMESPACE") if isinstance(value, str) else value


def test_killing_the_operator_at_many_moments_does_not_change_the_result(
    tenant: Tenant, running: OperatorProcess, calm: Tenant
) -> None:
    story(calm, lambda: None, lambda: None)

    pauses = iter([0, 0.1, 0.05, 0.25, 0.5])

    def killed_soon() -> None:
        """Kill the operator before or during its work on the step, and start it again."""
        time.sleep(next(pauses))
        running.kill9()
        running.start()

    def killed_late() -> None:
        """Kill the operator for a second, let it work for a moment, kill it again and start it."""
        running.kill9()
        time.sleep(1)
        running.start()
        time.sleep(0.3)
        running.kill9()
        running.launch()

    story(tenant, killed_soon, killed_late)
    assert end_state(tenant) == end_state(calm)
    assert len(tenant.api.list("Job", tenant.name)) == 2  # the preflight Job, and the Job that trains
    settled(tenant)


def test_a_restarted_operator_handles_changes_that_it_missed(tenant: Tenant, running: OperatorProcess) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.serve(["support@1.0.0"])
    running.stop()
    tenant.api.delete("ConfigMap", tenant.name, "chat-wanted")
    tenant.api.delete("NetworkPolicy", tenant.name, "chat-serving")
    tenant.api.patch("Deployment", tenant.name, "chat", {"spec": {"replicas": 0}})
    tenant.api.delete("FineTuneJob", tenant.name, "first")
    tenant.job("second")
    running.start()
    fleet.until_wanted("support-1.0.0")
    tenant.gone("FineTuneJob", "first")
    tenant.running_pod("second")
    (replica,) = fleet.pods(1)
    tenant.get("NetworkPolicy", "chat-serving")
    fleet.agent_says(replica)
    fleet.until("Available", "Serving")


def writes(tenant: Tenant) -> dict[str, float]:
    """Return the API server's counts of writes to resources that only the operator writes, no-op writes included."""
    counted = {}
    for line in tenant.api.text("GET", "/metrics").splitlines():
        if not line.startswith("apiserver_request_total{"):
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        applied = labels["verb"] == "APPLY"
        if labels["verb"] in WRITES and (labels["resource"] in RESOURCES or applied):
            counted[line.rpartition(" ")[0]] = float(line.rpartition(" ")[2])
    # Other components write Events, too, so these are counted themselves.
    own = [item for item in tenant.api.list("CoreEvent") if item.get("reportingComponent") == "graft.dev/operator"]
    counted["events"] = float(sum(item.get("count") or 1 for item in own))
    return counted


def test_an_idle_operator_writes_nothing(tenant: Tenant, running: OperatorProcess, calm: Tenant) -> None:
    story(calm, lambda: None, lambda: None)
    tenant.job("running")
    pod = tenant.running_pod("running")
    tenant.progress("running", pod, stage="Training", step=1, total_steps=2, percent=50)
    tenant.wait(
        lambda: tenant.status("FineTuneJob", "running").get("progressText") == "50%", "the progress is in the status"
    )
    tenant.job("waiting", baseModel="nowhere")
    tenant.until("FineTuneJob", "waiting", "Accepted", "BaseModelMissing")
    for name in (tenant, calm):
        settled(name)

    before, counted = versions(tenant) | versions(calm), writes(tenant)
    assert any('verb="APPLY"' in line for line in counted), "the API server must count the operator's writes"
    looks = running.metric("graft_reconciles_total")
    time.sleep(16)
    assert versions(tenant) | versions(calm) == before
    more = {
        line: number - counted.get(line, 0) for line, number in writes(tenant).items() if number > counted.get(line, 0)
    }
    assert more == {}
    assert running.metric("graft_reconciles_total") > looks, (
        "the operator must have reconciled the running job meanwhile"
    )


def test_a_restart_writes_nothing(tenant: Tenant, running: OperatorProcess) -> None:
    story(tenant, lambda: None, lambda: None)
    before, counted = settled(tenant), writes(tenant)
    running.stop()
    running.start()
    settled(tenant)
    assert versions(tenant) == before
    more = {
        line: number - counted.get(line, 0) for line, number in writes(tenant).items() if number > counted.get(line, 0)
    }
    assert more == {}
