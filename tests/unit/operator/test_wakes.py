"""Which resources are reconciled when something changes, and which after a start."""

from types import SimpleNamespace
from typing import Any

import pytest
from graft import handlers, wakes
from graft.cache.cache import Source
from graft.cache.objects import Objects
from graft.manifests.metadata import FINALIZER, OWNER_UID
from graft.reconcile.shared.queue import Queue

SYSTEM = "graft-system"
SOURCES = {source.key: source for source in wakes.sources(SYSTEM)}
READY = {"type": "Ready", "status": "True", "reason": "Verified", "message": "verified"}
ENDED = {"type": "Succeeded", "status": "True", "reason": "Published", "message": "published"}
Object = dict[str, Any]
VERSIONS = ("support-1.0.0", "support-2.0.0", "sales-1.0.0", "support-desk-1.0.0", "both-1.0.0")


class World:
    """Objects of namespace shop. `woken`: the names of the other resources that the last change wakes."""

    def __init__(self) -> None:
        self.held = {key: Objects(item.kind, item.group, item.facts) for key, item in SOURCES.items()}
        self.version = 1

    def objects(self, key: str) -> Objects:
        return self.held[key]

    def put(self, key: str, name: str, spec: Object | None = None, namespace: str = "shop", **parts: Any) -> set[str]:
        self.version += 1
        metadata = parts.pop("metadata", {})
        metadata = {"uid": f"uid-{name}", "labels": {}} | metadata
        metadata |= {"name": name, "namespace": namespace, "resourceVersion": str(self.version)}
        item = {"metadata": metadata, "spec": spec or {}, **parts}
        change = self.held[key].put(item)
        assert change is not None
        return self._woken(SOURCES[key], change)

    def remove(self, key: str, name: str) -> set[str]:
        self.version += 1
        change = self.held[key].remove(("shop", name), self.version)
        assert change is not None
        return self._woken(SOURCES[key], change)

    def adapter(self, name: str, spec: Object | None = None, **status: Any) -> set[str]:
        adapter, _, version = name.rpartition("-")
        labels = {"graft.dev/adapter": adapter}
        return self.put(
            "Adapter",
            name,
            {"adapter": adapter, "version": version} | (spec or {}),
            metadata={"labels": labels},
            status=status,
        )

    def deployment(self, name: str, *adapters: str, **status: Any) -> set[str]:
        return self.put("AdapterDeployment", name, {"baseModel": "tiny", "adapters": list(adapters)}, status=status)

    def job(self, name: str, *conditions: Object, base: str = "tiny", **spec: Any) -> set[str]:
        spec = {"baseModel": base, "output": {"adapter": "support"}} | spec
        return self.put(
            "FineTuneJob",
            name,
            spec,
            status={"conditions": list(conditions)},
            metadata={"uid": f"uid-{name}", "finalizers": [FINALIZER]},
        )

    def _woken(self, source: Source, change: Any) -> set[str]:
        return {key[2] for key in wakes.concerned(source, change, self.objects, SYSTEM)}


@pytest.fixture
def world() -> World:
    """Return some versions of three adapters. The adapter `support` has a retention policy."""
    found = World()
    for name in VERSIONS:
        found.adapter(name, {"retention": {"keep": 1}} if name == "support-1.0.0" else None)
    return found


def test_a_composition_wakes_its_parents_because_they_may_need_a_restore(world: World) -> None:
    parents = [{"adapter": "support@^1", "weight": 1}, {"adapter": "elsewhere@latest", "weight": 1}]
    spec = {"compose": {"parents": parents, "method": "cat"}}
    assert world.adapter("mix-1.0.0", spec) == {"support-1.0.0", "support-2.0.0"}
    world.adapter("mix-1.0.0", spec, conditions=[READY])
    assert world.adapter("mix-1.0.0", spec, conditions=[READY], stage="Ready") == set()


def test_a_deployment_wakes_the_adapters_that_it_starts_or_stops_naming(world: World) -> None:
    assert world.deployment("chat", "support@^1") == {"support-1.0.0", "support-2.0.0"}
    assert world.deployment("chat", "support@^1") == set()  # no reference has changed
    # The target of a rollback depends on the version in use.
    used = {"adapters": [{"name": "support", "resolved": "support-1.0.0"}]}
    assert world.deployment("chat", "support@^1", **used) == {"support-1.0.0", "support-2.0.0"}
    assert world.deployment("chat", "support@^1", observedGeneration=3, message="3 of 4 replicas", **used) == set()
    everything = {"support-1.0.0", "support-2.0.0", "sales-1.0.0"}
    assert world.deployment("chat", "sales@latest", **used) == everything - {"support-1.0.0"} | {"support-1.0.0"}
    assert world.remove("AdapterDeployment", "chat") == everything
    assert world.deployment("chat", "support-desk@1.0.0") == {"support-desk-1.0.0"}


def test_a_restored_version_is_woken_again_when_it_is_resolved(world: World) -> None:
    world.deployment("chat", "support@^1", adapters=[{"ref": "support@^1", "restoring": "support-1.0.0"}])
    resolved = [{"ref": "support@^1", "name": "support-1.0.0"}]
    assert world.deployment("chat", "support@^1", adapters=resolved) == {"support-1.0.0", "support-2.0.0"}


@pytest.mark.parametrize("text", ["a-1.2.²", "a-1.2." + "9" * 5000, "-", "@", ""])
def test_an_invalid_reference_does_not_keep_other_resources_from_being_woken(world: World, text: str) -> None:
    world.deployment("chat", "support@^1", text)
    assert world.adapter("support-2.0.0", stage="Ready") == {"support-1.0.0", "chat"}


def test_an_adapter_wakes_the_deployments_that_refer_to_it(world: World) -> None:
    world.deployment("chat", "support@^1")
    world.deployment("counter", "sales@latest", adapters=[{"resolved": "both-1.0.0"}])
    assert world.adapter("sales-1.0.0", stage="Ready") == {"counter"}
    assert world.adapter("both-1.0.0", stage="Ready") == {"counter"}
    assert world.adapter("support-2.0.0", stage="Ready") == {"support-1.0.0", "chat"}
    world.remove("AdapterDeployment", "chat")
    assert world.adapter("support-2.0.0", stage="Archived") == {"support-1.0.0"}


def test_siblings_are_woken_only_by_what_concerns_them(world: World) -> None:
    world.adapter("support-2.0.0", conditions=[READY])
    in_use = {"type": "InUse", "status": "True", "reason": "Served", "message": "served by chat"}
    used = {"usedBy": ["chat"], "lastUsedTime": "2026-01-01T00:00:00Z"}
    assert world.adapter("support-2.0.0", conditions=[READY, in_use], **used) == {"support-1.0.0"}
    assert world.adapter("support-2.0.0", conditions=[READY, in_use], compatibility=[], **used) == set()
    archived = {"type": "Ready", "status": "False", "reason": "Archived", "message": "unused"}
    assert world.adapter("support-2.0.0", conditions=[archived, in_use], **used) == {"support-1.0.0"}
    assert world.remove("Adapter", "support-2.0.0") == {"support-1.0.0"}


def test_without_a_retention_policy_only_siblings_that_wait_for_a_version_are_woken(world: World) -> None:
    retained = {"type": "Retained", "status": "True", "reason": "Kept", "message": "kept"}
    archived = {"type": "Ready", "status": "False", "reason": "Archived", "message": "unused"}
    world.adapter("sales-1.1.0", conditions=[READY])
    world.adapter("sales-1.2.0", conditions=[archived])
    world.adapter("sales-1.3.0", conditions=[READY, retained])
    assert world.adapter("sales-2.0.0", conditions=[READY]) == {"sales-1.2.0", "sales-1.3.0"}
    policy = {"retention": {"keep": 1}}
    everything = {"sales-1.0.0", "sales-1.1.0", "sales-1.2.0", "sales-1.3.0"}
    assert world.adapter("sales-2.0.0", policy, conditions=[READY]) == everything
    assert world.adapter("sales-2.0.0", conditions=[READY]) == everything  # the policy was removed
    assert world.remove("Adapter", "sales-2.0.0") == {"sales-1.2.0", "sales-1.3.0"}


def test_a_base_model_wakes_jobs_that_use_it_and_have_not_ended(world: World) -> None:
    world.job("waits")
    world.job("ended", ENDED)
    world.job("elsewhere", base="large")
    world.deployment("chat")
    adapters = {place[1] for place in world.objects("Adapter").places()}
    assert world.put("BaseModel", "tiny", {"source": "hf://a/b"}) == adapters | {"chat", "waits"}
    annotated = {"annotations": {"checked": "by hand"}}
    assert world.put("BaseModel", "tiny", {"source": "hf://a/b"}, metadata=annotated) == set()
    assert world.remove("BaseModel", "tiny") == adapters | {"chat", "waits"}


def test_after_a_start_jobs_that_have_ended_are_not_reconciled(world: World) -> None:
    failed = {"type": "Succeeded", "status": "False", "reason": "Failed", "message": "failed"}
    world.job("waits")
    world.job("ended", ENDED)
    world.job("failed", failed)
    world.job("restarts", failed, restarts=1)
    world.job("expires", ENDED, ttlSecondsAfterFinished=60)
    world.put("FineTuneJob", "deleted", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"})
    world.put("FineTuneJob", "new")
    world.deployment("chat")
    found = wakes.first(world.objects)
    jobs = [name for kind, _, name in found if kind == "FineTuneJob"]
    assert sorted(jobs) == ["deleted", "expires", "new", "restarts", "waits"]
    assert next(kind for kind, _, _ in found) == "AdapterDeployment" and found[-1][0] == "Adapter"


def test_what_a_reconcile_writes_does_not_wake_it_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[tuple[str, str, str]] = []
    queue = Queue({})
    monkeypatch.setattr(queue, "wake", lambda *key, **_: woken.append(key))
    monkeypatch.setattr(handlers.operator, "started", True)
    monkeypatch.setattr(handlers.operator, "queue", queue)
    monkeypatch.setattr(handlers.operator, "cache", world)
    monkeypatch.setattr(handlers.operator, "ctx", SimpleNamespace(settings=SimpleNamespace(namespace=SYSTEM)))

    def wakes_itself(name: str, generation: int, *conditions: Object) -> bool:
        world.version += 1
        metadata = {"name": name, "namespace": "shop", "uid": "u", "resourceVersion": str(world.version)}
        metadata |= {"generation": generation, "finalizers": [FINALIZER]}
        item = {"metadata": metadata, "spec": {}, "status": {"conditions": list(conditions)}}
        change = world.held["FineTuneJob"].put(item)
        assert change is not None
        woken.clear()
        handlers.changed(SOURCES["FineTuneJob"], change)
        return ("FineTuneJob", "shop", name) in woken

    assert wakes_itself("tune", 1)
    queue.busy["FineTuneJob", "shop", "tune"] = 0.0
    assert not wakes_itself("tune", 1, {"type": "Succeeded", "status": "Unknown", "reason": "Training", "message": "m"})
    assert wakes_itself("tune", 2)  # a user has changed the spec meanwhile
    queue.busy.clear()
    assert wakes_itself("tune", 2)  # somebody else has written the status
    assert not wakes_itself("tune", 2, ENDED)


def test_a_job_that_has_ended_is_not_reconciled_for_its_children(world: World) -> None:
    reference = {"kind": "FineTuneJob", "name": "tune", "uid": "uid-tune", "controller": True}
    labels = {"graft.dev/owner-kind": "FineTuneJob", "graft.dev/owner": "tune", "graft.dev/owner-uid": "uid-tune"}
    own = {"labels": labels, "ownerReferences": [reference]}
    of_job = {"labels": {"graft.dev/adapter": "sales", "graft.dev/job-uid": "uid-tune"}}
    made = {"adapter": "sales", "version": "3.0.0", "job": {"name": "tune"}}
    world.job("tune")
    assert world.put("Job", "tune", metadata=own) == {"tune"}
    assert world.put("Adapter", "sales-3.0.0", made, metadata=of_job) == {"tune"}
    world.job("tune", ENDED)
    assert world.put("Job", "tune", metadata=own) == set()
    assert world.put("Adapter", "sales-3.0.0", made, metadata=of_job, status={"stage": "Ready"}) == set()


def test_after_a_start_what_users_have_changed_meanwhile_comes_first(world: World) -> None:
    """A job that was created while no operator worked, or whose first reconcile was cut off after its status, does not
    wait for a thousand that run."""
    for name, generation, status in (
        ("new", 1, {}), ("runs", 1, {"observedGeneration": 1}), ("suspended", 2, {"observedGeneration": 1}),
        ("cut", 1, {"observedGeneration": 1}),
    ):  # fmt: skip
        world.put("FineTuneJob", name, metadata={"generation": generation}, status=status)
    for name in ("runs", "suspended"):
        world.put("Job", name, metadata={"uid": f"uid-{name}-job", "labels": {"graft.dev/owner-uid": f"uid-{name}"}})
    keys = wakes.first(world.objects)
    assert {name for kind, _, name in keys if kind == "FineTuneJob"} == {"new", "runs", "suspended", "cut"}
    found = {key[2] for key in keys if wakes.awaited(world.objects, key)}
    assert found == {"new", "suspended", "cut"}
    assert not wakes.awaited(world.objects, ("FineTuneJob", "shop", "deleted"))


def test_a_child_wakes_its_owner_only(world: World) -> None:
    world.job("tune")
    reference = {"kind": "FineTuneJob", "name": "tune", "uid": "uid-tune", "controller": True}
    labels = {"graft.dev/owner-kind": "FineTuneJob", "graft.dev/owner": "tune", "graft.dev/owner-uid": "uid-tune"}
    own = {"labels": labels, "ownerReferences": [reference]}
    assert world.put("Job", "tune", metadata=own) == {"tune"}
    assert world.remove("Job", "tune") == {"tune"}
    before = {"labels": labels | {"graft.dev/owner-uid": "uid-of-an-earlier-job"}}
    reference = reference | {"uid": "uid-of-an-earlier-job"}
    assert world.put("Job", "tune", metadata=before | {"ownerReferences": [reference]}) == set()
    assert world.put("ConfigMap", "noise", metadata={"labels": labels}) == set()


def test_a_new_replica_set_wakes_its_deployment(world: World) -> None:
    """Its pods count from then on. After interrupted watches they may be known before it is."""
    world.deployment("chat", "support@latest")
    reference = {"kind": "Deployment", "name": "chat-serving", "uid": "uid-serving", "controller": True}
    labels = {
        "graft.dev/owner-kind": "AdapterDeployment", "graft.dev/owner": "chat", "graft.dev/owner-uid": "uid-chat",
    }  # fmt: skip
    own = {"labels": labels, "ownerReferences": [reference]}
    assert world.put("ReplicaSet", "chat-serving-1", metadata=own) == {"chat"}
    assert world.put("ReplicaSet", "chat-serving-1", metadata=own) == set()  # its Deployment changes, too
    assert world.remove("ReplicaSet", "chat-serving-1") == {"chat"}


def test_work_that_ends_after_a_deletion_starts_no_reconcile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[tuple[str, str, str]] = []
    queue = Queue({})
    monkeypatch.setattr(queue, "wake", lambda *key: woken.append(key))
    monkeypatch.setattr(handlers.operator, "queue", queue)
    monkeypatch.setattr(handlers.operator, "cache", world)
    handlers._wake_known("Adapter", "shop", "support-1.0.0")
    handlers._wake_known("Adapter", "shop", "deleted-1.0.0")
    assert woken == [("Adapter", "shop", "support-1.0.0")]


def tenant(world: World, name: str, **namespaces: Any) -> set[str]:
    metadata = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    return world.put("Tenant", name, {"namespaces": namespaces}, namespace="", metadata=metadata)


def space(world: World, name: str, **labels: str) -> set[str]:
    return world.put("Namespace", name, namespace="", metadata={"labels": labels})


def test_a_namespace_wakes_the_tenants_that_ask_for_it_before_or_after(world: World) -> None:
    tenant(world, "by-name", names=["shop"])
    tenant(world, "by-label", selector={"matchLabels": {"team": "a"}})
    for name in VERSIONS:
        world.remove("Adapter", name)
    assert space(world, "shop") == {"by-name"}
    assert space(world, "shop", team="a") == {"by-name", "by-label"}
    assert space(world, "shop", team="a") == set()  # nothing that Tenants depend on has changed
    assert space(world, "shop", team="b") == {"by-name", "by-label"}
    assert space(world, "other", team="b") == set()


def test_a_tenant_wakes_those_that_ask_for_the_same_namespaces(world: World) -> None:
    for name in ("shop", "other"):
        space(world, name, team="a")
    for name in VERSIONS:
        world.remove("Adapter", name)
    assert tenant(world, "first", names=["shop"]) == set()
    assert tenant(world, "second", selector={"matchLabels": {"team": "a"}}) == {"first"}
    assert tenant(world, "third", names=["other"]) == {"second"}
    assert tenant(world, "third", names=["elsewhere"]) == {"second"}  # which may have it now
    assert tenant(world, "third", names=["elsewhere"]) == set()


def test_a_child_of_a_tenant_wakes_it_although_it_has_no_namespace(world: World) -> None:
    tenant(world, "team", names=["shop"])
    labels = {"graft.dev/owner-kind": "Tenant", "graft.dev/owner": "team", "graft.dev/owner-uid": "uid-team"}
    owner = {"kind": "Tenant", "name": "team", "uid": "uid-team", "controller": True}
    binding = {"uid": "b", "labels": labels, "ownerReferences": [owner]}
    assert world.put("RoleBinding", "graft-team-view", metadata=binding) == {"team"}
    assert world.put("RoleBinding", "other", metadata=binding | {"ownerReferences": []}) == set()


def test_what_may_use_a_base_model_is_woken_with_its_tenant(world: World) -> None:
    space(world, "shop", team="a")
    space(world, "other", team="b")
    world.deployment("chat", "support@^1")
    world.job("waits")
    world.job("done", ENDED)
    users = {*VERSIONS, "chat", "waits"}
    assert tenant(world, "team", names=["shop"]) == users
    assert tenant(world, "elsewhere", names=["other"]) == set()
    spec = {"namespaces": {"names": ["shop"]}, "baseModels": ["tiny"]}
    metadata = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    assert world.put("Tenant", "team", spec, namespace="", metadata=metadata) == users
    assert world.put("Tenant", "team", spec, namespace="", metadata=metadata, status={"stage": "Ready"}) == set()
    assert tenant(world, "labels", selector={"matchLabels": {"team": "b"}}) == {"elsewhere"}
    assert space(world, "shop", team="b") == users | {"team", "labels"}


def test_the_end_of_a_job_wakes_those_that_wait_for_a_quota(world: World) -> None:
    line = {"type": "Accepted", "status": "False", "reason": "QuotaExceeded", "message": "full"}
    running = {"type": "Succeeded", "status": "Unknown", "reason": "Training", "message": "trains"}
    tenant(world, "team", names=["shop"])
    space(world, "shop")
    for name in ("second", "first"):  # of the same second, so their names decide
        world.job(name, line)
    world.job("runs", running)
    assert world.job("runs", ENDED) == set()  # no Tenant has a quota
    spec = {"namespaces": {"names": ["shop"]}, "quotas": {"trainingJobs": 1}}
    world.put("Tenant", "team", spec, namespace="", metadata={"creationTimestamp": "2026-01-01T00:00:00Z"})
    world.job("more", running)
    assert world.job("more", running, suspend=True) == set()
    assert world.job("more", ENDED) == {"first"}
    assert world.job("first", running) == {"second"}  # there may be room for another one
    assert world.remove("FineTuneJob", "first") == {"second"}
    assert world.remove("FineTuneJob", "more") == set()
    # The line of another Tenant does not move.
    space(world, "elsewhere")
    world.put("Tenant", "other", {"namespaces": {"names": ["elsewhere"]}, "quotas": {"gpus": 1}}, namespace="")
    world.put("FineTuneJob", "theirs", {}, "elsewhere", status={"conditions": [running]})
    assert world.put("FineTuneJob", "theirs", {}, "elsewhere", status={"conditions": [ENDED]}) == set()


def test_a_namespace_is_at_work_while_pods_use_its_key(world: World) -> None:
    def at_work() -> bool:
        return wakes.at_work("shop", world.objects)

    def child(name: str, uid: str, kind: str = "Job") -> None:
        world.put(kind, name, metadata={"labels": {OWNER_UID: uid}})

    assert not at_work()
    world.job("run")
    assert not at_work()  # it has not started: its start issues the key
    child("run", "uid-run")
    assert at_work() and not wakes.at_work("other", world.objects)
    world.job("run", ENDED)
    assert not at_work()
    child("support-1.0.0-import", "uid-support-1.0.0")
    assert at_work()
    world.remove("Job", "support-1.0.0-import")
    assert not at_work()
    world.deployment("desk", "support@1.0.0")
    assert not at_work()  # as above
    child("desk", "uid-desk", "Deployment")
    assert at_work()
