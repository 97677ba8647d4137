"""The path from a base model to a served adapter, without faults."""

from worlds.cluster.api import Object
from worlds.cluster.fleet import Fleet
from worlds.cluster.operator_process import OperatorProcess
from worlds.cluster.tenant import BASE, Tenant


def test_a_base_model_is_pinned_and_its_facts_are_read(tenant: Tenant) -> None:
    def status() -> Object:
        return dict((tenant.api.get("BaseModel", None, BASE) or {}).get("status", {}))

    tenant.wait(lambda: status().get("stage") == "Ready", "the BaseModel is Ready")
    found = status()
    assert found["digest"].startswith("sha256:")
    assert found["facts"]["parameters"] == 1000 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert found["facts"]["contextLength"] == 512
    assert found["conditions"][0]["reason"] == "Resolved"


def test_a_job_becomes_a_verified_adapter(tenant: Tenant, running: OperatorProcess) -> None:
    own = f'resource_namespace="{tenant.name}"'
    tenant.job("first")
    pod = tenant.running_pod("first")
    training = tenant.get("Job", "first")
    assert training["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
    assert tenant.get("NetworkPolicy", "first-training")["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert tenant.job_file("first").output.version == "1.0.0"

    tenant.progress("first", pod, stage="Training", step=30, total_steps=60, percent=50, loss=1.2345, eta_seconds=200)
    tenant.wait(
        lambda: tenant.status("FineTuneJob", "first").get("progressText") == "50%", "the progress is in the status"
    )
    status = tenant.status("FineTuneJob", "first")
    assert (status["stage"], status["lossText"], status["etaText"]) == ("Training", "1.2345", "3m20s")
    assert (status["progress"]["step"], status["progress"]["totalSteps"]) == (30, 60)
    assert running.metric("graft_job_progress", own, 'finetunejob="first"') == 0.5
    assert running.metric("graft_job_loss", own, 'finetunejob="first"') == 1.2345
    assert running.metric("graft_jobs", own, 'stage="Training"') == 1

    tenant.publish_as_trainer("first", pod)
    tenant.end_pod(pod)
    ended = tenant.until("FineTuneJob", "first", "Succeeded", "Published")
    assert ended["status"] == "True" and "exactMatch 0.91" in ended["message"]
    status = tenant.status("FineTuneJob", "first")
    assert status["stage"] == "Succeeded" and status["completionTime"] and "etaText" not in status
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Completed"]
    tenant.wait(lambda: running.metric("graft_jobs", own, 'stage="Succeeded"') == 1, "the metrics show its end")
    assert running.metric("graft_jobs_ended_total", own, 'outcome="succeeded"') == 1
    assert running.metric("graft_job_attempts_ended_total", own, 'reason="Completed"') == 1
    assert running.metric("graft_job_progress", own) == 0  # its own series is gone

    adapter = tenant.get("Adapter", "support-1.0.0")
    assert adapter["status"]["stage"] == "Ready" and adapter["status"]["score"] == "exactMatch 0.12 -> 0.91"
    assert adapter["spec"]["artifact"]["uri"] == f"s3://graft/{tenant.name}/adapters/support/1.0.0/"
    tenant.until_events("first", "Published")
    ready = (own, 'kind="Adapter"', 'type="Ready"', 'status="True"', 'reason="Verified"')
    assert running.metric("graft_conditions", *ready) == 1


def test_an_adapter_is_served(tenant: Tenant) -> None:
    tenant.trained("first")
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@1.0.0"], replicas=2)
    pods = fleet.pods(2)
    fleet.until_wanted("support-1.0.0")
    adapter = tenant.get("Adapter", "support-1.0.0")
    assert [item.digest for item in fleet.wanted().adapters] == [adapter["spec"]["artifact"]["digest"]]
    fleet.until("Available", "RouteUnavailable")

    fleet.agent_says(pods[0])
    fleet.agent_says(pods[1])
    fleet.until("Available", "Serving")
    fleet.until("Progressing", "Complete")
    status = fleet.status()
    assert (status["stage"], status["readyText"], status["adaptersText"]) == ("Available", "2/2", "1/1")
    assert status["models"] == [{"model": f"{tenant.name}/support", "adapter": "support-1.0.0", "replicas": 2}]
    assert status["endpoint"] == "http://graft-gateway.graft-system.svc:8080"

    routes = fleet.routes()
    engine_model = routes.routes[0].targets[0].engine_model
    assert routes.routes[0].model == f"{tenant.name}/support"
    addresses = {f"{pod['status']['podIP']}:8000" for pod in pods}
    assert {backend.address for backend in routes.backends} == addresses
    assert all(engine_model in backend.loaded for backend in routes.backends)
    tenant.until("Adapter", "support-1.0.0", "InUse", "Served")
