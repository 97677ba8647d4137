"""Names that are more than names, labels of strangers and reserved namespaces, against the real API server and store."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.store import S3Store
from graft.kinds import KINDS, ImpossibleName
from graft.kube import Kube, KubeError
from kubernetes.aio import client
from testbed.controlplane import ControlPlane
from worlds.cluster.api import Api, Object
from worlds.cluster.operator_process import SYSTEM, OperatorProcess
from worlds.cluster.refused import refused
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import bind

DIGEST = "sha256:" + "0" * 64
ESCAPES = ["../../../../api/v1/namespaces/{n}/secrets/bait", "../{n}", "..", "a/b", "%2e%2e", "..%2fsecrets%2fbait", ""]
ODD = ["x?watch=1", "x?watch=1&timeoutSeconds=300", "x#y", "a b", "a;b"]
READY_SECONDS = 4  # in which the operator has handled what the API server has told it


def ask(plane: ControlPlane, *calls: tuple[str, str | None, str]) -> list[Any]:
    """Return what the operator's client answers to get(kind, namespace, name), as an administrator."""

    async def run() -> list[Any]:
        configuration = client.Configuration(host=plane.server)
        configuration.ssl_ca_cert = str(plane.state / "pki/ca.crt")
        configuration.cert_file = str(plane.state / "pki/admin.crt")
        configuration.key_file = str(plane.state / "pki/admin.key")
        kube = Kube(client.ApiClient(configuration))
        try:
            return [await kube.get(*call) for call in calls]
        finally:
            await kube.close()

    return asyncio.run(run())


@pytest.fixture
def bait(tenant: Tenant) -> Object:
    """Return a Secret that nobody but its namespace may read."""
    metadata = {"name": "bait", "namespace": tenant.name}
    return tenant.api.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"k": "hunter2"}}
    )


def test_no_name_leaves_its_collection(tenant: Tenant, plane: ControlPlane, bait: Object) -> None:
    """The operator's client is asked for names that are paths or queries, with an administrator's rights -> nothing is read."""
    names = [name.format(n=tenant.name) for name in ESCAPES] + ODD
    began = time.monotonic()
    assert ask(plane, *(("BaseModel", None, name) for name in names)) == [None] * len(names)
    assert ask(plane, *(("ConfigMap", tenant.name, name) for name in names)) == [None] * len(names)
    assert time.monotonic() - began < 20, "a request was held like a watch"
    (found,) = ask(plane, ("Secret", tenant.name, "bait"))
    assert found["metadata"]["uid"] == bait["metadata"]["uid"]


def test_the_api_server_decodes_a_quoted_slash(tenant: Tenant) -> None:
    """A quoted slash still separates parts for the API server -> names with a slash are refused, not only quoted."""
    meta = {"name": "web", "namespace": tenant.name}
    pod = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": pod}
    tenant.api.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec})
    escaped = tenant.api.call("GET", f"/apis/apps/v1/namespaces/{tenant.name}/deployments/web%2Fscale")
    assert escaped["kind"] == "Scale"
    with pytest.raises(ImpossibleName):
        KINDS["Deployment"].path(tenant.name, "web/scale")


@pytest.mark.parametrize("name", ["../../../../api/v1/namespaces/x/secrets/y", "x?watch=1", "a/b", "%2e%2e", ".."])
def test_a_base_model_that_is_a_path(tenant: Tenant, plane: ControlPlane, name: str) -> None:
    """spec.baseModel of any kind is a path to another object -> the API server refuses the manifest and names the field."""
    assert "spec.baseModel" in refused(plane, tenant.job_manifest("wrong", baseModel=name))
    spec = {"adapter": "a", "version": "1.0.0", "baseModel": name, "method": "lora"}
    artifact = {"artifact": {"uri": f"s3://graft/{tenant.name}/a/", "digest": DIGEST}}
    assert "spec.baseModel" in refused(plane, tenant.resource("Adapter", "a-1.0.0", spec | artifact))
    deployment = tenant.resource("AdapterDeployment", "a", {"baseModel": name, "adapters": ["a@latest"]})
    assert "spec.baseModel" in refused(plane, deployment)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"priorityClassName": "a/b"}, "spec.priorityClassName"),
        ({"runtimeClassName": "a b"}, "spec.runtimeClassName"),
        ({"nodeSelector": {"zone": "a,b=c"}}, "spec.nodeSelector"),
        ({"nodeSelector": {f"k{i}": "v" for i in range(33)}}, "spec.nodeSelector"),
        ({"tolerations": [{"key": "a b"}]}, "spec.tolerations[0].key"),
        ({"dataset": {"train": {"uri": "pvc://data/../../etc/passwd"}}}, "spec.dataset.train.uri"),
        ({"dataset": {"train": {"uri": "hf://datasets/../x/a.jsonl"}}}, "spec.dataset.train.uri"),
        ({"evaluation": {"gates": [{"metric": "a b", "min": 0}]}}, "spec.evaluation.gates[0].metric"),
        ({"method": {"lora": {"targetModuleNames": ["../x"]}}}, "spec.method.lora.targetModuleNames[0]"),
    ],
)
def test_other_names_of_a_job(tenant: Tenant, plane: ControlPlane, change: dict[str, Any], field: str) -> None:
    """Another field of a job that names something holds more than a name -> refused with the field's path."""
    assert field in refused(plane, tenant.job_manifest("wrong", **change))


@contextmanager
def schema_without_pattern(api: Api, kind: str) -> Iterator[None]:
    """Serve the schema of an older version of Graft, in which spec.baseModel was any text."""
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{KINDS[kind].plural}.graft.dev"
    place = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/baseModel/x-kubernetes-validations"
    before = api.call("GET", path)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rules = before["properties"]["baseModel"]["x-kubernetes-validations"]
    api.call("PATCH", path, [{"op": "remove", "path": place}], "application/json-patch+json")
    try:
        yield
    finally:
        api.call("PATCH", path, [{"op": "add", "path": place, "value": rules}], "application/json-patch+json")


def test_a_stored_job_that_names_a_secret(tenant: Tenant, running: OperatorProcess) -> None:
    """A job that an older schema let in names a Secret as its base model -> its condition says so, and no log has the Secret."""
    metadata = {"name": "bait", "namespace": "default"}
    tenant.api.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"k": "hunter2"}}, "test"
    )
    name = "../../../../api/v1/namespaces/default/secrets/bait"
    with schema_without_pattern(tenant.api, "FineTuneJob"):

        def created() -> bool:
            try:
                tenant.job("old", baseModel=name)
            except Exception as error:  # the API server still has the schema with the rules
                if "spec.baseModel" not in str(error):
                    raise
                return False
            return True

        tenant.wait(created, "the older schema is served")
    refusal = tenant.until("FineTuneJob", "old", "Accepted", "SpecInvalid")
    assert "spec.baseModel" in refusal["message"] and "secrets" not in refusal["message"]
    log = running.log.read_text(errors="replace")
    assert "hunter2" not in log and "aHVudGVyMg" not in log
    tenant.api.delete("FineTuneJob", tenant.name, "old")
    tenant.gone("FineTuneJob", "old")


def peak(running: OperatorProcess) -> int:
    """Return the most memory that the operator has held since its start, in bytes."""
    assert running.process is not None
    text = Path(f"/proc/{running.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM"))


def restarted(running: OperatorProcess) -> int:
    """Start the operator again and let it list everything. Return its peak in bytes."""
    running.stop()
    running.start()
    time.sleep(READY_SECONDS)
    return peak(running)


def test_large_labelled_objects_of_a_stranger(tenant: Tenant, calm: Tenant, running: OperatorProcess) -> None:
    """Somebody without rights on Graft labels 120 ConfigMaps of 900 KB as ours -> the operator's memory does not grow."""
    before = restarted(running)
    labels = {"graft.dev/owner-uid": "u", "graft.dev/owner-kind": "FineTuneJob", "graft.dev/owner": "tune"}
    for number in range(120):
        metadata = {"name": f"c{number}", "namespace": calm.name, "labels": labels | {"graft.dev/component": "demand"}}
        text = {"x": "x" * 900_000}
        calm.api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": text})
    try:
        time.sleep(READY_SECONDS)
        grown = peak(running) - before
        assert grown < 30 * 2**20, f"the watch holds {grown >> 20} MiB more"
        grown = restarted(running) - before
        assert grown < 30 * 2**20, f"the list after a start holds {grown >> 20} MiB more"
        assert running.metric("graft_watch_restarts_total") == 0
    finally:
        for number in range(120):
            calm.api.delete("ConfigMap", calm.name, f"c{number}")


def test_an_event_with_the_largest_metadata(tenant: Tenant, calm: Tenant, running: OperatorProcess) -> None:
    """Somebody labels an object whose metadata has a megabyte -> the watch of all tenants does not end."""
    before = running.metric("graft_watch_restarts_total")
    labels = {"graft.dev/owner-uid": "u"}
    references = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "<" * 900_000, "uid": "u"}]
    metadata = {"name": "big", "namespace": calm.name, "labels": labels, "ownerReferences": references}
    calm.api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    time.sleep(1)
    seen = running.metric("graft_watch_events_total")
    labels_only = {"metadata": {"name": "small", "namespace": calm.name, "labels": labels}}
    calm.api.create({"apiVersion": "v1", "kind": "ConfigMap"} | labels_only)
    calm.wait(lambda: running.metric("graft_watch_events_total") > seen, "the next event arrives")
    assert running.metric("graft_watch_restarts_total") == before


def test_a_label_of_a_stranger_wakes_nobody(tenant: Tenant, calm: Tenant, running: OperatorProcess) -> None:
    """Somebody labels objects of another namespace with our job, 40 times -> the job is not reconciled."""
    job = tenant.job("quiet", suspend=True)
    tenant.until("FineTuneJob", "quiet", "Succeeded", "Suspended")
    labels = {
        "graft.dev/owner-kind": "FineTuneJob", "graft.dev/owner": "quiet", "graft.dev/owner-uid": job["metadata"]["uid"],
        "graft.dev/namespace": tenant.name, "graft.dev/component": "routes",
    }  # fmt: skip
    metadata = {"name": "noise", "namespace": calm.name, "labels": labels}
    time.sleep(READY_SECONDS)
    events = running.metric("graft_watch_events_total")
    reconciles = running.metric("graft_reconciles_total")
    for number in range(40):
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"n": str(number)}}
        calm.api.apply(manifest, "stranger")
        time.sleep(0.05)
    tenant.wait(lambda: running.metric("graft_watch_events_total") >= events + 40, "the operator has seen the objects")
    time.sleep(1)
    assert running.metric("graft_reconciles_total") - reconciles < 10


@pytest.fixture
def models(api: Api, store: S3Store, running: OperatorProcess, base_model: str) -> Iterator[Tenant]:
    """Return a namespace that is named like the folder of the base models."""
    if api.get("Namespace", None, "models") is None:
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
    tenant = Tenant(api, "models", store)
    bind(tenant)
    yield tenant
    tenant.give_back()
    for item in api.list("Adapter", "models"):
        api.delete("Adapter", "models", item["metadata"]["name"])


def test_a_tenant_that_would_own_the_base_models(models: Tenant) -> None:
    """The namespace is named models -> nothing is created or issued; resources can be deleted, and no base model goes."""
    models.job("tune")
    uri = f"s3://graft/models/{BASE}/"
    spec = {"adapter": "tiny", "version": "1.0.0", "baseModel": BASE, "method": "lora", "deletionPolicy": "Delete"}
    artifact = {"artifact": {"uri": uri, "digest": DIGEST}}
    models.api.create(models.resource("Adapter", "tiny-1.0.0", spec | artifact))
    models.api.create(models.resource("AdapterDeployment", "chat", {"baseModel": BASE, "adapters": ["tiny@latest"]}))
    for kind, name, type_ in (
        ("FineTuneJob", "tune", "Accepted"),
        ("Adapter", "tiny-1.0.0", "Ready"),
        ("AdapterDeployment", "chat", "Accepted"),
    ):
        refusal = models.until(kind, name, type_, "NamespaceReserved")
        assert refusal["status"] == "False" and "operations.md#reserved-namespaces" in refusal["message"]
    assert models.api.get("Secret", "models", "graft-storage") is None
    assert models.api.list("Job", "models") == [] and models.api.list("Deployment", "models") == []
    routes = models.api.list("ConfigMap", SYSTEM, "graft.dev/namespace=models")
    assert routes == []
    for kind, name in (("FineTuneJob", "tune"), ("Adapter", "tiny-1.0.0"), ("AdapterDeployment", "chat")):
        models.api.delete(kind, "models", name)
        models.gone(kind, name)
    assert json.loads(models.store.get(f"models/{BASE}/config.json"))


def test_the_answer_is_another_object(tenant: Tenant, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path leads to another kind although names are checked -> what comes back is refused."""
    monkeypatch.setitem(KINDS, "BaseModel", KINDS["Namespace"])
    with pytest.raises(KubeError, match=r"asked for BaseModel .*, the API server answered with a Namespace"):
        ask(plane, ("BaseModel", None, tenant.name))
