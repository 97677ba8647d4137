"""Adapters that are composed or imported, until their files exist.

The tests cover what the operator waits for, which failures it reports, and the resources of the Job.
"""

import json
from typing import Any

import pytest
from graft.api import Adapter
from graft.api.adapter import ResolvedParent
from graft.api.basemodel import BaseModelStatus
from graft.contracts.message import BaseModelRef
from graft.contracts.progress import Reason
from graft.manifests.adapterjob import resources, unmeasured
from graft.reconcile.adapter.adapterjob import observe, outside_namespace, resolve, waiting
from graft.reconcile.shared.access import Trouble
from graft.status import REASONS

BASE = BaseModelRef(name="tiny", uri="s3://graft/models/tiny", digest="sha256:" + "b" * 64)


def version(name: str, number: str, *, reason: str = "Verified", method: str = "lora", **changes: Any) -> Adapter:
    """Return a version of an adapter in the namespace `shop`."""
    ready = {
        "type": "Ready", "status": "True" if reason == "Verified" else "False", "reason": reason, "message": f"is {reason}",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    digest = "sha256:" + (f"{name}{number}".encode().hex() + "0" * 64)[:64]
    status = {"rank": 8, "baseModelDigest": BASE.digest, "sizeBytes": 1000, "conditions": [ready]} | changes
    return Adapter.model_validate(
        {
            "metadata": {"name": f"{name}-{number}", "namespace": "shop", "uid": f"uid-{name}-{number}"},
            "spec": {
                "adapter": name, "version": number, "baseModel": status.pop("baseModel", "tiny"), "method": method,
                "artifact": {"uri": f"s3://graft/shop/adapters/{name}/{number}/", "digest": digest},
            },
            "status": status,
        }
    )  # fmt: skip


def composed(*parents: str, **compose: Any) -> Adapter:
    into = compose.get("into", "adapter")
    return Adapter.model_validate(
        {
            "metadata": {"name": "both-1.0.0", "namespace": "shop", "uid": "uid-both"},
            "spec": {
                "adapter": "both", "version": "1.0.0", "baseModel": "tiny", "method": "full" if into == "base" else "lora",
                "compose": {"parents": [{"adapter": ref, "weight": 0.5} for ref in parents]} | compose,
            },
        }
    )  # fmt: skip


def imported(uri: str, method: str = "lora") -> Adapter:
    spec = {"adapter": "theirs", "version": "1.0.0", "baseModel": "tiny", "method": method, "import": {"uri": uri}}
    return Adapter.model_validate(
        {"metadata": {"name": "theirs-1.0.0", "namespace": "shop", "uid": "uid-theirs"}, "spec": spec}
    )


def resolved(adapter: Adapter, *versions: Adapter) -> list[ResolvedParent] | Trouble:
    assert adapter.spec.compose is not None
    return resolve(adapter, adapter.spec.compose, [adapter, *versions], BASE)


def trouble(adapter: Adapter, *versions: Adapter) -> tuple[str, str]:
    found = resolved(adapter, *versions)
    assert isinstance(found, Trouble)
    return found.reason, found.message


def test_a_reference_resolves_to_the_newest_ready_version() -> None:
    found = resolved(
        composed("a@^1", "b@latest"),
        version("a", "1.2.0"),
        version("a", "1.10.0"),
        version("a", "1.11.0", reason="Rejected"),
        version("a", "2.0.0"),
        version("b", "0.1.0"),
    )
    assert isinstance(found, list)
    assert [(item.name, item.version, item.weight) for item in found] == [
        ("a-1.10.0", "1.10.0", 0.5),
        ("b-0.1.0", "0.1.0", 0.5),
    ]
    assert found[0].uri == "s3://graft/shop/adapters/a/1.10.0/"


def test_a_version_is_never_its_own_parent() -> None:
    assert trouble(composed("both@latest", "a@latest"), version("a", "1.0.0"))[0] == "ParentMissing"


def test_the_operator_waits_for_a_missing_or_unready_parent() -> None:
    adapter = composed("a@^1", "b@latest")
    assert trouble(adapter, version("b", "1.0.0")) == (
        "ParentMissing", "a@^1: no Adapter matches this parent in spec.compose. The operator continues when one does",
    )  # fmt: skip
    reason, message = trouble(adapter, version("a", "1.0.0", reason="Rejected"), version("b", "1.0.0"))
    assert (reason, message) == ("ParentNotReady", "a@^1: Adapter a-1.0.0 is not Ready: is Rejected")
    step = waiting(adapter, Trouble(reason, message))
    assert (step.ready.status, step.status.stage) == ("Unknown", "Waiting") and step.again


@pytest.mark.parametrize(
    ("adapter", "second", "words"),
    [
        (composed("a@1", "b@1", method="linear"), version("b", "1.0.0", rank=4), "b-1.0.0 has rank 4. Use method cat or svd"),
        (composed("a@1", "b@1", method="ties", density=0.5), version("b", "1.0.0", rank=4), "Use method tiesSvd"),
        (composed("a@1", "b@1"), version("b", "1.0.0", method="promptTuning"), "was tuned with promptTuning. Only lora and qlora"),
        (composed("a@1", "b@1"), version("b", "1.0.0", baseModel="other"), "belongs to the BaseModel other"),
        (composed("a@1", "b@1"), version("b", "1.0.0", baseModelDigest="sha256:old"), "on different revisions of tiny"),
        (composed("a@1", "a@latest"), version("b", "1.0.0"), "Name each version once"),
        (composed("b@1", into="base"), version("b", "1.0.0", baseModelDigest="sha256:old"), "was tuned on sha256:old"),
    ],
)  # fmt: skip
def test_incompatible_parents_fail_the_adapter_with_a_remedy(adapter: Adapter, second: Adapter, words: str) -> None:
    reason, message = trouble(adapter, version("a", "1.0.0"), second)
    assert reason == "ParentsIncompatible" and words in message
    step = waiting(adapter, Trouble(reason, message))
    assert (step.ready.status, step.status.stage, step.again) == ("False", "Failed", None)


def test_unequal_ranks_can_be_concatenated() -> None:
    assert isinstance(resolved(composed("a@1", "b@1"), version("a", "1.0.0"), version("b", "1.0.0", rank=64)), list)


def test_an_import_from_the_prefix_of_another_tenant_is_refused() -> None:
    assert outside_namespace(imported("s3://graft/shop/uploads/a/"), "graft") is None
    assert outside_namespace(imported("s3://elsewhere/a/b/"), "graft") is None
    assert outside_namespace(imported("hf://org/name"), "graft") is None
    for uri in ("s3://graft/other/adapters/a/1.0.0/", "s3://graft/shopping/a/", "s3://graft/models/tiny/"):
        found = outside_namespace(imported(uri), "graft")
        assert found is not None and found.reason == "OutsideNamespace" and "below s3://graft/shop/" in found.message


JOB: dict[str, Any] = {"metadata": {"name": "j", "uid": "u"}, "spec": {}, "status": {}}
FAILED = JOB | {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "backoff limit"}]}}


def pod(name: str, phase: str, code: int | None = None, message: str = "", reason: str = "Error") -> dict[str, Any]:
    state = {} if code is None else {"terminated": {"exitCode": code, "message": message, "reason": reason}}
    statuses = [{"name": "compose", "state": state}]
    return {
        "metadata": {"name": name, "creationTimestamp": "t"},
        "status": {"phase": phase, "containerStatuses": statuses},
    }


def said(reason: Reason) -> str:
    return json.dumps({"reason": reason, "message": "It was so.", "remedy": "Do this."})


@pytest.mark.parametrize(
    ("adapter", "reason", "expected"),
    [
        (composed("a@1", "b@1"), Reason.ADAPTER_INVALID, "ParentsIncompatible"),
        (composed("a@1", "b@1"), Reason.STORAGE_UNAVAILABLE, "ComposeFailed"),
        (composed("a@1", "b@1"), Reason.VERSION_EXISTS, "VersionExists"),
        (imported("hf://a/b"), Reason.ADAPTER_INVALID, "ImportInvalid"),
        (imported("hf://a/b"), Reason.BASE_MODEL_INVALID, "ImportFailed"),
    ],
)  # fmt: skip
def test_a_failed_job_fails_the_adapter_with_the_message_of_the_pod(
    adapter: Adapter, reason: Reason, expected: str
) -> None:
    step = observe(adapter, FAILED, [pod("p", "Failed", 19, said(reason))], None)
    assert (step.ready.status, step.ready.reason, step.ready.message) == ("False", expected, "It was so. Do this.")
    assert (step.status.stage, step.again) == ("Failed", None)


def test_every_failure_of_the_trainer_has_a_documented_reason() -> None:
    for reason in Reason:
        for adapter in (composed("a@1", "b@1"), imported("hf://a/b")):
            step = observe(adapter, FAILED, [pod("p", "Failed", 1, said(reason))], None)
            assert step.ready.reason in REASONS["Adapter"]["Ready"]


def test_after_an_oom_kill_the_message_names_the_field_to_raise() -> None:
    step = observe(composed("a@1", "b@1"), FAILED, [pod("p", "Failed", 137, reason="OOMKilled")], None)
    assert "spec.compose.resources" in step.ready.message and "micro" not in step.ready.message


def test_while_the_job_runs_the_message_shows_its_progress() -> None:
    adapter = composed("a@1", "b@1")
    found = [
        observe(adapter, JOB, [], None),
        observe(adapter, JOB, [], "exceeded quota: team"),
        observe(adapter, JOB, [pod("p", "Running")], None),
        observe(adapter, JOB, [pod("p", "Failed", 30, said(Reason.STORAGE_UNAVAILABLE))], None),
    ]
    assert {(step.ready.status, step.ready.reason, step.status.stage) for step in found} == {
        ("Unknown", "Composing", "Composing")
    }
    assert [step.ready.message for step in found] == [
        "the Job has no pod yet",
        "Kubernetes refuses the pod of the Job and retries: exceeded quota: team",
        "the pod of the Job is p",
        "pod p failed, and another attempt follows: It was so. Do this.",
    ]
    assert observe(imported("hf://a/b"), JOB, [], None).ready.reason == "Importing"


def test_a_completed_job_without_a_result_is_a_failure() -> None:
    done = JOB | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    assert observe(composed("a@1", "b@1"), done, [pod("p", "Succeeded")], None).ready.reason == "ComposeFailed"


def memory(adapter: Adapter, base: BaseModelStatus, parents: int = 0) -> int:
    needs = resources(adapter, base, parents).wire()
    assert "nvidia.com/gpu" not in needs["limits"] and needs["requests"]["memory"] == needs["limits"]["memory"]
    return int(needs["limits"]["memory"].removesuffix("Mi")) * 1024**2


def test_the_memory_request_follows_from_the_tensors_in_memory() -> None:
    base = BaseModelStatus.model_validate(
        {"sizeBytes": 14 * 10**9, "facts": {"hiddenSize": 4096, "intermediateSize": 14336}, "conditions": []}
    )
    small = memory(composed("a@1", "b@1"), base, 100_000_000)
    assert small < 4 * 10**9, "composing two adapters does not load the weights of the 7B model"
    update = 4 * 4096 * 14336
    assert memory(composed("a@1", "b@1", method="svd"), base, 100_000_000) >= small + 5 * update
    assert memory(composed("a@1", into="base"), base, 100_000_000) > 14 * 10**9
    assert memory(imported("hf://a/b"), base) < 6 * 10**9


def test_an_import_asks_for_what_an_adapter_of_a_high_rank_needs() -> None:
    """Measured: the import of an adapter of 8B takes 0.5 GiB of memory and page cache."""

    def needs(parameters: int, hidden: int) -> tuple[float, float]:
        facts = {"facts": {"parameters": parameters, "hiddenSize": hidden}, "conditions": []}
        found = resources(imported("hf://a/b"), BaseModelStatus.model_validate(facts), 0).wire()["requests"]
        return tuple(int(found[key].removesuffix("Mi")) / 1024 for key in ("memory", "ephemeral-storage"))  # type: ignore[return-value]

    assert needs(134_515_008, 576) == (1.5, 2.0)
    assert needs(8_030_000_000, 4096) == (1.9375, 2.875)
    assert needs(70_600_000_000, 8192)[0] < 6


def test_an_effect_is_measured_if_the_base_models_files_can_be_read_for_it() -> None:
    def base(gib: float | None) -> BaseModelStatus:
        size = {} if gib is None else {"sizeBytes": int(gib * 2**30)}
        facts = {"parameters": 8_030_000_000, "hiddenSize": 4096, "intermediateSize": 14336}
        return BaseModelStatus.model_validate({**size, "facts": facts, "conditions": []})

    def disk(adapter: Adapter, gib: float) -> float:
        found = resources(adapter, base(gib), 0).wire()["requests"]
        return int(found["ephemeral-storage"].removesuffix("Mi")) / 1024

    for adapter in (imported("hf://a/b"), composed("a@1", "b@1")):
        assert unmeasured(adapter, base(16)) is None
        assert disk(adapter, 16) == pytest.approx(disk(adapter, 132) + 16, abs=0.1)
        assert "132.0 GiB" in str(unmeasured(adapter, base(132))) and "at most 32 GiB" in str(
            unmeasured(adapter, base(132))
        )
        assert "unknown" in str(unmeasured(adapter, base(None)))
    small = composed("a@1", "b@1", resources={"limits": {"memory": "4Gi", "ephemeral-storage": "8Gi"}})
    assert "spec.compose.resources.limits.ephemeral-storage" in str(unmeasured(small, base(16)))
    assert unmeasured(composed("a@1", "b@1", resources={"limits": {"memory": "4Gi"}}), base(16)) is None
