"""What GitOps tools see: definitions and resources as they are written, conditions of kstatus, and jobs that train once."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from testbed.shell import REPOSITORY
from worlds.cluster.api import Api
from worlds.cluster.tenant import Tenant


def lost(path: str, written: Any, live: Any) -> list[str]:
    """Return the paths of the fields that the API server does not have as they were written."""
    if isinstance(written, dict) and isinstance(live, dict):
        return [
            found
            for key, value in written.items()
            for found in (lost(f"{path}.{key}", value, live[key]) if key in live else [f"{path}.{key}"])
        ]
    if isinstance(written, list) and isinstance(live, list) and len(written) == len(live):
        return [found for index, value in enumerate(written) for found in lost(f"{path}[{index}]", value, live[index])]
    return [] if written == live else [path]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "crds").glob("*.yaml")), ids=lambda path: path.name.split(".")[0])
def test_a_definition_is_stored_as_it_is_written(api: Api, path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    live = api.call("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{written['metadata']['name']}")
    assert lost("", written, live) == []


def test_a_second_sync_self_healing_and_the_ttl_train_nothing_again(tenant: Tenant) -> None:
    synced = tenant.job_manifest("synced", ttlSecondsAfterFinished=1)
    synced["metadata"]["annotations"] = {
        "argocd.argoproj.io/tracking-id": f"shop:graft.dev/FineTuneJob:{tenant.name}/synced"
    }
    tenant.api.apply(synced, "argocd-controller")
    pod = tenant.running_pod("synced")
    assert {"Reconciling"} == kstatus_of(tenant, "synced")
    tenant.publish_as_trainer("synced", pod)
    tenant.end_pod(pod)
    tenant.until("FineTuneJob", "synced", "Succeeded", "Published")
    assert kstatus_of(tenant, "synced") == set()
    before = tenant.get("FineTuneJob", "synced")

    # A job without a tool has the same TTL, ends later and is deleted.
    tenant.job("by-hand", adapter="other", ttlSecondsAfterFinished=1)
    pod = tenant.running_pod("by-hand")
    tenant.publish_as_trainer("by-hand", pod)
    tenant.end_pod(pod)
    tenant.gone("FineTuneJob", "by-hand")

    tenant.api.apply(synced, "argocd-controller")
    after = tenant.get("FineTuneJob", "synced")
    for field in ("uid", "generation", "resourceVersion"):
        assert after["metadata"][field] == before["metadata"][field]
    assert after["status"] == before["status"] and lost("", synced["spec"], after["spec"]) == []
    assert [job["metadata"]["name"] for job in tenant.api.list("Job", tenant.name)] == ["synced"]


def test_a_failed_job_is_stalled(tenant: Tenant) -> None:
    tenant.job("broken", retries=0)
    tenant.end_pod(tenant.running_pod("broken"), 1, "no such thing")
    tenant.wait(lambda: tenant.status("FineTuneJob", "broken").get("stage") == "Failed", "the job has failed")
    assert kstatus_of(tenant, "broken") == {"Stalled"}


def test_kubectl_sorts_the_events_of_a_job(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.until_events("first", "Published")
    found = [item for item in tenant.api.list("CoreEvent", tenant.name) if item["involvedObject"]["name"] == "first"]
    own = [item for item in found if item["reportingComponent"] == "graft.dev/operator"]
    assert own
    for item in own:
        assert item["lastTimestamp"] == item["firstTimestamp"] == item["eventTime"].replace(".000000Z", "Z")
        assert item["source"]["component"] == "graft.dev/operator" and item["involvedObject"]["uid"]
    last = max(own, key=lambda item: str(item["lastTimestamp"]))
    assert last["reason"] == "Published"


def kstatus_of(tenant: Tenant, job: str) -> set[str]:
    conditions = tenant.status("FineTuneJob", job).get("conditions", [])
    return {item["type"] for item in conditions if item["type"] in {"Reconciling", "Stalled"}}
