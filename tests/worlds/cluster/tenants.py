"""The actions of an administrator in a test: create base models, namespaces and Tenants, bind namespaces to the operator, and ask
what a person may do."""

import itertools
import json
import re
from typing import Any

import pytest
from graft.artifacts.store import S3Store

from worlds.cluster.api import Api, Object, Refused
from worlds.cluster.operator_process import ACCOUNT, BUCKET, SYSTEM
from worlds.cluster.tenant import API, Tenant

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "max_position_embeddings": 512, "dtype": "float32",
}  # fmt: skip
NUMBERS = itertools.count(1)
RBAC = "rbac.authorization.k8s.io"


def make_base_model(api: Api, store: S3Store, name: str, **spec: Any) -> str:
    """Put a model's files into the bucket and create their BaseModel. Return its name."""
    store.put(f"models/{name}/config.json", json.dumps(CONFIG).encode())
    store.put(f"models/{name}/model.safetensors", b"weights" * 100)
    source = {"source": f"s3://{BUCKET}/models/{name}"}
    api.create({"apiVersion": API, "kind": "BaseModel", "metadata": {"name": name}, "spec": source | spec})
    return name


def new_tenant(api: Api, store: S3Store, request: pytest.FixtureRequest) -> Tenant:
    """Create a namespace that is not bound yet. Its pods must meet Pod Security `restricted`."""
    told = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:30].strip("-")
    return make_namespace(api, store, f"{told}-{next(NUMBERS)}")


def make_namespace(api: Api, store: S3Store, name: str) -> Tenant:
    """Create a namespace with this name that is not bound yet. Its pods must meet Pod Security `restricted`."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    return Tenant(api, name, store)


def bind(tenant: Tenant) -> None:
    """Bind the namespace to the operator's role, as the operator's message tells an administrator to do."""
    tenant.api.create({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "graft", "namespace": tenant.name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "graft-tenant"},
        "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": SYSTEM}],
    })  # fmt: skip


def team(tenant: Tenant, name: str, members: Any = None, **spec: Any) -> Object:
    """Create the Tenant resource of a team. Without `namespaces` in the spec, it has the namespace of the test."""
    spec = {"namespaces": {"names": [tenant.name]}} | spec | ({"members": members} if members else {})
    return tenant.api.create({"apiVersion": API, "kind": "Tenant", "metadata": {"name": name}, "spec": spec})


def user(name: str, role: str) -> Object:
    return {"kind": "User", "name": name, "role": role}


def ready(tenant: Tenant, name: str, reason: str, *, says: str = "") -> Object:
    """Wait until the condition Ready of a Tenant has a reason for its present spec. Return the Tenant."""
    seen: Object = {}

    def there() -> bool:
        found = tenant.api.get("Tenant", None, name)
        assert found is not None
        for item in found.get("status", {}).get("conditions", []):
            if item["type"] == "Ready" and item["observedGeneration"] == found["metadata"]["generation"]:
                seen.update(found, condition=item)
                return bool(item["reason"] == reason and says in item["message"])
        return False

    tenant.wait(there, f"Tenant {name} has reason {reason} {says}", explain=lambda: str(seen.get("condition")))
    return seen


def bindings(tenant: Tenant) -> dict[str, list[str]]:
    """Return the people of the namespace's RoleBindings that a Tenant owns: ClusterRole -> names of its subjects."""
    found = {}
    for item in tenant.api.list("RoleBinding", tenant.name):
        owners = item["metadata"].get("ownerReferences") or []
        if any(owner["kind"] == "Tenant" for owner in owners):
            found[item["roleRef"]["name"]] = [subject["name"] for subject in item.get("subjects") or []]
    return found


def may(api: Api, verb: str, resource: str, namespace: str | None = None, name: str = "", group: str = "") -> bool:
    """Ask the API server whether an identity may do something."""
    resource, _, subresource = resource.partition("/")
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": subresource, "name": name}
    asked |= {"namespace": namespace} if namespace else {}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    answer = api.call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
    return bool(answer["status"]["allowed"])


def refused(api: Api, method: str, path: str, body: Any = None, content_type: str = "application/json") -> str:
    """Send a request that the API server must forbid. Return its answer."""
    try:
        api.text(method, path, body, content_type)
    except Refused as error:
        assert error.status == 403, error
        return str(error)
    raise AssertionError(f"{method} {path} is allowed")
