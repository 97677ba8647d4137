"""Argo CD's health checks in examples/argocd, run by the Lua version that Argo CD embeds (5.1) on resources in each stage."""

from typing import Any

import pytest
import yaml
from graft.status import REASONS, condition, merge
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
