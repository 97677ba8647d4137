"""On the real API server, with the real operator: resources whose fields change end like fresh ones with the same spec."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from graft.api.finetunejob import MUTABLE
from graft.contracts.progress import Reason
from testbed.shell import Failed
from worlds.cluster.api import ALL_KINDS, Api, Object
from worlds.cluster.children import outcome, reconciled
from worlds.cluster.operator_process import OperatorProcess
from worlds.cluster.tenant import Tenant
from worlds.fields.hints import DEPLOYMENT, fields_of
from worlds.fields.sample import ALL, sample
from worlds.fields.schema import Spec
from worlds.fields.tries import Accepted, Tried, try_fields

pytestmark = pytest.mark.timeout(3600)  # all values of a kind, on a busy machine
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
JSON_PATCH = "application/json-patch+json"
DEPLOYMENTS, MODELS, JOBS, VERSIONS = 4, 2, 1, 1  # changes of a sample
MOST_PODS = 5  # more replicas make more pods, and nothing new
NEXT = tuple(name for name in MUTABLE if name != "restarts")  # of a failed job; they take effect with its next Job
OF_VERSION = ("baseVersions", "deletionPolicy", "retention")


@pytest.fixture(scope="module", autouse=True)
def permissive(operator: OperatorProcess) -> Iterator[None]:
    """For all fields, give the operator vLLM's image, and let it allow every class and every toleration.

    For a sample, a restart takes too long. There, a value that is not allowed leads to the same condition.
    """
    if not ALL:
        yield
        return
    before = operator.settings
    allowed = {
        "priorityClasses": ["*"],
        "runtimeClasses": ["*"],
        "tolerations": [{"key": "*"}],
        "podAnnotations": ["*"],
    }
    operator.settings = before | {"images": before["images"] | {"vllm": "graft/vllm:test"}, "allowed": allowed}
    operator.stop()
    operator.start()
    yield
    operator.settings = before
    operator.stop()  # the next test starts it again


def put(tenant: Tenant, kind: str, name: str, spec: Spec) -> None:
    """Replace the spec of a resource. Wait until the operator has reconciled it."""
    path = ALL_KINDS[kind].path(None if kind == "BaseModel" else tenant.name, name)
    tenant.api.call("PATCH", path, [{"op": "replace", "path": "/spec", "value": spec}], JSON_PATCH)
    reconciled(tenant, name, kind)


class Unlike(list[str]):
    """The values after which a changed resource did not become like a fresh one."""

    def compare(self, tenant: Tenant, item: Accepted, found: Callable[[], Any], wanted: Callable[[], Any]) -> None:
        """Wait until a changed resource has what a fresh one has."""
        try:
            tenant.wait(lambda: found() == wanted(), f"the changed resource equals a fresh one: {item}")
        except Failed as error:
            self.append(f"{error}{_difference(found(), wanted())}")


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    return "\n".join(f"{name}: {json.dumps(found.get(name))}\nwanted: {json.dumps(wanted.get(name))}" for name in names)


def accepted(api: Api, kind: str, names: tuple[str, ...], count: int) -> list[Accepted]:
    """Return accepted values of the fields below some fields: all of them, or a sample of `count`.

    Of podTemplate, only its own fields: what is below them is tried on deployments, which have the same schema.
    """
    below = [field for field in fields_of(kind) if field.path[0] in names]
    chosen = [field for field in below if field.path[0] != "podTemplate" or len(field.path) <= 2]
    return sample(try_fields(api, kind, sample(chosen, count, f"live {kind}")).accepted, count, f"live {kind}")


def at_rest(spec: Spec, item: Accepted) -> Spec:
    """Return the spec without pods, unless the number of replicas is what is tried."""
    tried = item.field.path[0] in {"autoscaling", "replicas", "strategy"} or "autoscaling" in spec
    return spec if tried else spec | {"replicas": 0}


def few_pods(item: Accepted) -> bool:
    spec = item.stored["spec"]
    return max(spec.get("replicas", 1), spec.get("autoscaling", {}).get("minReplicas", 1)) <= MOST_PODS


def awake(found: dict[str, Object], spec: Spec) -> dict[str, Object]:
    """Leave out whether a deployment sleeps that may: its requests and its age decide, not its spec. A fresh one is awake."""
    if spec.get("autoscaling", {}).get("minReplicas") == 0 and "routes" in found:
        routes = json.loads(found["routes"]["data"]["routes.json"])
        for key in ("unavailable", "backends"):
            routes.pop(key, None)
        found["routes"]["data"] = routes
        found["Deployment"]["spec"].pop("replicas", None)
    return found


def test_a_changed_deployment_equals_a_fresh_one(tenant: Tenant, tried: dict[str, Tried]) -> None:
    """Each value is set, and taken back, on one deployment. Its twins are created with each spec."""
    unlike = Unlike()
    tenant.trained("first")
    tenant.trained("second", "sales")
    changes = [item for item in tried["AdapterDeployment"].accepted if item.field.path != ("baseModel",)]
    plain: dict[str, str] = {}  # a spec to which a value is added -> the name of its twin
    tenant.api.create(tenant.resource("AdapterDeployment", "edited", DEPLOYMENT | {"replicas": 0}))

    def compare(item: Accepted, spec: Spec, twin: str) -> None:
        put(tenant, "AdapterDeployment", "edited", spec)
        unlike.compare(
            tenant, item, *(lambda name=name: awake(outcome(tenant, name), spec) for name in ("edited", twin))
        )

    def create(name: str, spec: Spec) -> str:
        tenant.api.create(tenant.resource("AdapterDeployment", name, spec))
        reconciled(tenant, name)
        return name

    for number, item in enumerate(
        sample([item for item in changes if few_pods(item)], DEPLOYMENTS, "live deployments")
    ):
        base, changed = at_rest(item.base, item), at_rest(item.stored["spec"], item)
        fresh = create(f"fresh-{number}", changed)
        compare(item, changed, fresh)
        tenant.api.delete("AdapterDeployment", tenant.name, fresh)
        key = json.dumps(base, sort_keys=True)
        plain[key] = plain.get(key) or create(f"plain-{len(plain)}", base)
        compare(item, base, plain[key])
    assert unlike == []


def test_a_changed_base_model_equals_a_fresh_one(tenant: Tenant, tried: dict[str, Tried], base_model: str) -> None:
    unlike = Unlike()
    plain = {"source": f"s3://graft/models/{base_model}"}
    names = [f"{tenant.name}-{part}" for part in ("edited", "fresh")]

    def create(name: str, spec: Spec) -> None:
        tenant.api.create({**tenant.resource("BaseModel", name, spec), "metadata": {"name": name}})
        reconciled(tenant, name, "BaseModel")

    try:
        create(names[0], plain)
        before = _told(tenant, "BaseModel", names[0])
        for item in sample(tried["BaseModel"].accepted, MODELS, "live models"):
            spec = plain | item.stored["spec"] if item.field.path == ("source",) else item.stored["spec"] | plain
            put(tenant, "BaseModel", names[0], spec)
            create(names[1], spec)
            unlike.compare(tenant, item, *(lambda name=name: _told(tenant, "BaseModel", name) for name in names))
            tenant.api.delete("BaseModel", None, names[1])
            put(tenant, "BaseModel", names[0], plain)
            unlike.compare(tenant, item, lambda: _told(tenant, "BaseModel", names[0]), lambda: before)
            tenant.wait(lambda: tenant.api.get("BaseModel", None, names[1]) is None, "the fresh model is deleted")
    finally:
        for name in names:
            tenant.api.delete("BaseModel", None, name)
    assert unlike == []


def _told(tenant: Tenant, kind: str, name: str) -> Object:
    """Return the status of a resource without times, digests and generations, and with NAME instead of its own."""
    found = tenant.api.get(kind, None if kind == "BaseModel" else tenant.name, name)
    if found is None:
        return {}
    skip = ("observedGeneration", "signature", "Time", "After", "At")
    status = {key: value for key, value in found.get("status", {}).items() if not key.endswith(skip)}
    keep = ("type", "status", "reason", "message")
    status["conditions"] = [{key: item[key] for key in keep} for item in status.get("conditions", [])]
    text = DIGEST.sub("DIGEST", json.dumps(status)).replace(found["spec"].get("adapter", name), "NAME")
    return dict(json.loads(text))


def test_a_changed_job_restarts_like_a_fresh_one(tenant: Tenant, namespaced: Api) -> None:
    """The fields that may be changed on a failed job decide about its next Job."""
    unlike = Unlike()
    for number, item in enumerate(accepted(namespaced, "FineTuneJob", NEXT, JOBS)):
        edited, fresh = both = f"edited-{number}", f"fresh-{number}"
        name = item.field.path[0]
        changed = tenant.job(edited, edited)["spec"] | {name: item.stored["spec"][name]}
        tenant.fail_pod(tenant.running_pod(edited), Reason.DATASET_INVALID, "line 1 is invalid", "correct it")
        tenant.until("FineTuneJob", edited, "Succeeded", "DatasetInvalid")
        put(tenant, "FineTuneJob", edited, changed | {"restarts": 1})
        tenant.api.create(
            tenant.resource("FineTuneJob", fresh, changed | {"output": changed["output"] | {"adapter": fresh}})
        )
        reconciled(tenant, fresh, "FineTuneJob")
        for name in both if changed.get("suspend") else ():
            # What the first run of the edited job needed stays while it is suspended.
            tenant.wait(
                lambda name=name: (
                    not [child for child in outcome(tenant, name, "FineTuneJob") if child.startswith("Job")]
                ),
                f"{name} has no Job while it is suspended",
            )
            tenant.api.patch("FineTuneJob", tenant.name, name, {"spec": {"suspend": False}})
            reconciled(tenant, name, "FineTuneJob")
        unlike.compare(tenant, item, *(lambda name=name: outcome(tenant, name, "FineTuneJob") for name in both))
        for name in both:
            tenant.api.delete("FineTuneJob", tenant.name, name)
    assert unlike == []


def test_a_changed_version_equals_one_that_was_published_so(tenant: Tenant, namespaced: Api) -> None:
    unlike = Unlike()
    for number, item in enumerate(accepted(namespaced, "Adapter", OF_VERSION, VERSIONS)):
        edited, fresh = (f"{part}{number}" for part in ("edited", "fresh"))
        changed = {item.field.path[0]: item.stored["spec"][item.field.path[0]]}
        tenant.trained(f"job-{edited}", edited)
        tenant.until("Adapter", f"{edited}-1.0.0", "Ready", "Verified")
        tenant.api.patch("Adapter", tenant.name, f"{edited}-1.0.0", {"spec": changed})
        reconciled(tenant, f"{edited}-1.0.0", "Adapter")
        tenant.trained(f"job-{fresh}", fresh, output={"adapter": fresh} | changed)
        both = (f"{edited}-1.0.0", f"{fresh}-1.0.0")
        unlike.compare(tenant, item, *(lambda name=name: _told(tenant, "Adapter", name) for name in both))
    assert unlike == []
