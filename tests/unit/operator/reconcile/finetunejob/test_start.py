"""The writes between a new FineTuneJob and its Job, and an operator that is killed before any of them."""

import copy
from typing import Any

import pytest
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import KubeError
from graft.manifests.metadata import FINALIZER
from graft.reconcile.finetunejob import finetunejob
from graft.reconcile.finetunejob.finetunejob import reconcile
from graft.reconcile.shared.access import SECRET_KEYS
from worlds.reconciling import Killed, MemoryStore, MortalKube, Object, context

READY = {
    "type": "Ready", "status": "True", "reason": "Resolved", "message": "m", "observedGeneration": 1,
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}  # fmt: skip
WRITES = ["patch", "ConfigMap j-job", "NetworkPolicy j-training", "Job j", "status"]


def world() -> MortalKube:
    job = {
        "apiVersion": "graft.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": "j", "namespace": "shop", "uid": "u", "generation": 1, "resourceVersion": "7"},
        "spec": {
            "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
            "method": {"qlora": {}}, "output": {"adapter": "support"}, "resources": {"requests": {"cpu": "1"}},
        },
    }  # fmt: skip
    model = {
        "apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel", "metadata": {"name": "tiny", "uid": "m", "generation": 1},
        "spec": {"source": "s3://graft/models/tiny/"}, "status": {"conditions": [READY], "digest": "sha256:" + "0" * 64},
    }  # fmt: skip
    secret = {
        "kind": "Secret",
        "metadata": {"name": STORAGE_SECRET, "namespace": "shop"},
        "data": dict.fromkeys(SECRET_KEYS, "eA=="),
    }
    return MortalKube(job, model, secret)


def add_another(kube: MortalKube) -> Object:
    """Create and return the job `other`, with the same spec."""
    job = copy.deepcopy(world().objects["FineTuneJob", "shop", "j"])
    job["metadata"] |= {"name": "other", "uid": "other"}
    kube.objects["FineTuneJob", "shop", "other"] = job
    return job


def end(kube: MortalKube) -> Object:
    """What a user sees, without times."""
    state = {"/".join(map(str, key)): copy.deepcopy(item) for key, item in kube.objects.items()}
    for condition in state["FineTuneJob/shop/j"]["status"]["conditions"]:
        condition["lastTransitionTime"] = ""
    return state


async def test_a_start_makes_five_writes() -> None:
    kube = world()
    await reconcile(context(kube, MemoryStore()), "shop", "j")
    assert kube.writes == WRITES
    metadata = kube.objects["FineTuneJob", "shop", "j"]["metadata"]
    assert metadata["labels"] == {"graft.dev/method": "qlora", "graft.dev/adapter": "support"}
    assert metadata["finalizers"] == [FINALIZER]


@pytest.mark.parametrize("killed", range(len(WRITES) + 1))
async def test_a_kill_before_any_write_changes_nothing(killed: int) -> None:
    calm, kube = world(), world()
    await reconcile(context(calm, MemoryStore()), "shop", "j")
    kube.killed = killed
    for _ in range(2):
        try:
            await reconcile(context(kube, MemoryStore()), "shop", "j")
        except Killed:
            kube.start()
            continue
        break
    assert end(kube) == end(calm)
    # A Job without its status is asked for again. The API server refuses the second one of the name.
    assert kube.writes.count("Job j") == 1 + (killed == WRITES.index("status")) and kube.writes.count("patch") == 1


async def test_a_job_that_cannot_be_created_keeps_its_version() -> None:
    """Otherwise another job could get the same number."""
    kube = world()

    async def refuse(manifest: Object) -> None:
        raise KubeError(403, "Forbidden", "exceeded quota: jobs")

    kube.create = refuse  # type: ignore[method-assign]
    await reconcile(context(kube, MemoryStore()), "shop", "j")
    status = kube.objects["FineTuneJob", "shop", "j"]["status"]
    assert {item["reason"] for item in status["conditions"]} == {"CreationFailed", "Waiting"}
    assert status["resolved"]["version"] == "1.0.0"


async def test_the_secret_is_made_again_when_pods_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator may not watch Secrets. It looks at the Secret when no pod starts."""
    kube, checked = world(), list[str]()
    ctx = context(kube, MemoryStore())
    await reconcile(ctx, "shop", "j")
    kube.objects["Job", "shop", "j"]["metadata"]["uid"] = "c"

    async def not_started(*_: Any) -> str:
        return 'pod p does not start: secret "graft-storage" not found'

    async def ensure_credentials(_: Any, namespace: str, *__: Any) -> None:
        checked.append(namespace)

    async def nothing(*_: Any) -> None:
        """Find no reason."""

    monkeypatch.setattr(finetunejob, "ensure_credentials", ensure_credentials)
    monkeypatch.setattr(finetunejob, "refusal", nothing)
    await reconcile(ctx, "shop", "j")
    assert checked == []
    monkeypatch.setattr(finetunejob, "refusal", not_started)
    await reconcile(ctx, "shop", "j")
    assert checked == ["shop"]


async def test_no_other_job_gets_the_version_of_a_job_whose_status_is_not_written_yet() -> None:
    kube = world()
    kube.killed = WRITES.index("Job j")
    with pytest.raises(Killed):
        await reconcile(context(kube, MemoryStore()), "shop", "j")
    kube.start()
    add_another(kube)
    for name in ("other", "j"):
        await reconcile(context(kube, MemoryStore()), "shop", name)
    published = [kube.objects["FineTuneJob", "shop", name]["status"]["resolved"]["version"] for name in ("j", "other")]
    assert published == ["1.0.0", "1.0.1"]  # the same recipe: its digest is known, too


@pytest.mark.parametrize("version", ["7.0.0", "../1", "", "1.0.0\n"])
async def test_a_version_that_a_user_writes_as_an_annotation_does_not_count(version: str) -> None:
    kube = world()
    kube.objects["FineTuneJob", "shop", "j"]["metadata"]["annotations"] = {"graft.dev/version": version}
    await reconcile(context(kube, MemoryStore()), "shop", "j")
    job = kube.objects["FineTuneJob", "shop", "j"]
    assert job["status"]["resolved"]["version"] == job["metadata"]["annotations"]["graft.dev/version"] == "1.0.0"


async def test_an_annotation_does_not_count_once_there_is_a_status() -> None:
    kube = world()
    await reconcile(context(kube, MemoryStore()), "shop", "j")
    kube.objects["FineTuneJob", "shop", "j"]["metadata"]["annotations"]["graft.dev/version"] = "7.0.0"
    other = add_another(kube)
    await reconcile(context(kube, MemoryStore()), "shop", "other")
    assert other["status"]["resolved"]["version"] == "1.0.1"


async def test_a_job_whose_suspension_was_asked_for_after_its_job_was_created_keeps_its_version() -> None:
    """The operator was killed between the Job and the status."""
    kube = world()
    kube.killed = WRITES.index("status")
    with pytest.raises(Killed):
        await reconcile(context(kube, MemoryStore()), "shop", "j")
    kube.start()
    kube.objects["FineTuneJob", "shop", "j"]["spec"]["suspend"] = True
    for _ in range(2):
        await reconcile(context(kube, MemoryStore()), "shop", "j")
    assert kube.objects["FineTuneJob", "shop", "j"]["status"]["resolved"]["version"] == "1.0.0"
    assert kube.objects["Job", "shop", "j"]["spec"]["suspend"] is True
