"""The health of resources in each stage as GitOps tools see it: by Argo CD's checks in examples/argocd, run by the Lua version
that Argo CD embeds (5.1), and by the rules of kstatus, which Flux uses."""

from typing import Any

import pytest
import yaml
from graft.status import REASONS, condition, merge, transitions, with_kstatus
from lupa import lua51
from testbed.shell import REPOSITORY

CHECKS = yaml.safe_load((REPOSITORY / "examples/argocd/argocd-cm.yaml").read_text())["data"]
KEY = "resource.customizations.health.graft.dev_"
# kind -> condition, status, reason -> health
EXPECTED = {
    "BaseModel": [
        ("Ready", "True", "Resolved", "Healthy"),
        ("Ready", "True", "SourceChanged", "Healthy"),
        ("Ready", "False", "SourceUnavailable", "Progressing"),
        ("Ready", "False", "SourceInvalid", "Degraded"),
    ],
    "Tenant": [
        ("Ready", "True", "AsExpected", "Healthy"),
        ("Ready", "Unknown", "NamespaceMissing", "Progressing"),
        ("Ready", "Unknown", "NamespaceNotBound", "Progressing"),
        ("Ready", "False", "NamespaceClaimed", "Degraded"),
        ("Ready", "False", "TenantsDisabled", "Degraded"),
    ],
    "FineTuneJob": [
        ("Succeeded", "Unknown", "Waiting", "Progressing"),
        ("Succeeded", "Unknown", "Training", "Progressing"),
        ("Succeeded", "Unknown", "Suspended", "Suspended"),
        ("Succeeded", "True", "Published", "Healthy"),
        ("Succeeded", "False", "GateFailed", "Degraded"),
        ("Succeeded", "False", "OutOfMemory", "Degraded"),
    ],
    "Adapter": [
        ("Ready", "Unknown", "Verifying", "Progressing"),
        ("Ready", "Unknown", "ParentMissing", "Progressing"),
        ("Ready", "True", "Verified", "Healthy"),
        ("Ready", "False", "Archived", "Suspended"),
        ("Ready", "False", "Restoring", "Progressing"),
        ("Ready", "False", "DigestMismatch", "Degraded"),
        ("Ready", "False", "Rejected", "Degraded"),
    ],
    "AdapterDeployment": [
        ("Available", "False", "NoReplicaReady", "Progressing"),
        ("Available", "True", "Serving", "Healthy"),
        ("Available", "True", "Asleep", "Healthy"),
        ("Available", "False", "ScaledToZero", "Suspended"),
        ("Degraded", "True", "AdapterFailed", "Degraded"),
        ("Degraded", "True", "NotAccepted", "Progressing"),
    ],
    "ApiKey": [
        ("Ready", "True", "Issued", "Healthy"),
        ("Ready", "True", "HashGiven", "Healthy"),
        ("Ready", "False", "NamespaceNotBound", "Degraded"),
        ("Ready", "False", "Expired", "Suspended"),
    ],
}
CASES = [(kind, *case) for kind, cases in EXPECTED.items() for case in cases]


def health(kind: str, *observed: Any, generation: int = 1) -> tuple[str, str]:
    """Return health and message of a resource whose conditions were observed for `generation`; its spec has generation 1."""
    lua = lua51.LuaRuntime(register_eval=False, unpack_returned_tuples=True)
    conditions = [item.wire() for item in merge([], observed, generation, "2026-11-30T00:00:00Z")]
    resource = {"metadata": {"generation": 1}, "status": {"conditions": conditions}} if observed else {"metadata": {}}
    lua.globals().obj = lua.table_from(resource, recursive=True)
    found = lua.execute(CHECKS[KEY + kind])
    return str(found.status), str(found.message)


@pytest.mark.parametrize(("kind", "type_", "status", "reason", "expected"), CASES)
def test_a_stage_has_its_health(kind: str, type_: str, status: Any, reason: str, expected: str) -> None:
    seen = condition(kind, type_, status, reason, "what happened")
    assert health(kind, seen)[0] == expected
    assert health(kind, seen, generation=0)[0] == "Progressing"  # the condition is about an earlier spec


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_new_resource_is_progressing(kind: str) -> None:
    assert health(kind)[0] == "Progressing"


def test_the_message_is_the_condition_s() -> None:
    failed = condition("FineTuneJob", "Succeeded", "False", "OutOfMemory", "one example needs 9 GiB")
    assert health("FineTuneJob", failed) == ("Degraded", "one example needs 9 GiB")


def test_each_kind_has_a_check() -> None:
    assert set(CHECKS) == {KEY + kind for kind in REASONS}


# What kstatus should see where Argo CD sees this. It has no word for a suspended resource.
OF_KSTATUS = {"Healthy": "Current", "Degraded": "Failed", "Progressing": "InProgress", "Suspended": "InProgress"}


def kstatus(resource: dict[str, Any]) -> str:
    """Return the status of a custom resource by kstatus' rules (cli-utils v0.37, pkg/kstatus/status: checkGenericProperties
    and checkReadyCondition)."""
    status = resource.get("status") or {}
    if "observedGeneration" in status and status["observedGeneration"] != resource["metadata"]["generation"]:
        return "InProgress"
    found = {item["type"]: item["status"] for item in status.get("conditions", [])}
    if found.get("Reconciling") == "True":
        return "InProgress"
    if found.get("Stalled") == "True":
        return "Failed"
    return "InProgress" if found.get("Ready", "True") != "True" else "Current"


@pytest.mark.parametrize(("kind", "type_", "status", "reason", "expected"), CASES)
def test_kstatus_sees_the_same(kind: str, type_: str, status: Any, reason: str, expected: str) -> None:
    seen = with_kstatus([condition(kind, type_, status, reason, "what happened")])
    conditions = [item.wire() for item in merge([], seen, 1, "2026-11-30T00:00:00Z")]
    resource = {"metadata": {"generation": 1}, "status": {"observedGeneration": 1, "conditions": conditions}}
    wanted = "Current" if reason == "ScaledToZero" else OF_KSTATUS[expected]
    if (kind, reason) == ("AdapterDeployment", "NotAccepted"):  # Degraded alone. Its cause is in Accepted
        conditions += [
            item.wire() for item in with_kstatus([condition(kind, "Accepted", "False", "AdapterMissing", "x")])
        ]
    assert kstatus(resource) == wanted
    assert kstatus(resource | {"metadata": {"generation": 2}}) == "InProgress"


def test_the_conditions_of_kstatus_follow_the_others_and_are_no_events() -> None:
    failed = condition("FineTuneJob", "Succeeded", "False", "OutOfMemory", "one example needs 9 GiB")
    seen = with_kstatus([failed])
    assert [(item.type, item.status, item.reason, item.message) for item in seen[1:]] == [
        ("Stalled", "True", "OutOfMemory", "one example needs 9 GiB")
    ]
    assert with_kstatus(seen) == seen  # a status that is written again keeps them
    done = condition("FineTuneJob", "Succeeded", "True", "Published", "done")
    assert with_kstatus([done, *seen[1:]]) == [done]
    assert transitions([], seen) == [failed]


def test_a_deployment_that_cannot_load_an_adapter_is_stalled_although_it_rolls_out() -> None:
    rolling = condition("AdapterDeployment", "Progressing", "True", "RollingOut", "pods start")
    wrong = condition("AdapterDeployment", "Degraded", "True", "AdapterFailed", "DigestMismatch")
    assert with_kstatus([rolling, wrong])[-1].type == "Stalled"
