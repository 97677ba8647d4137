"""The actions of an administrator in a test: create base models and namespaces, and bind the namespaces to the operator."""

import itertools
import json
import re
from typing import Any

import pytest
from graft.artifacts.store import S3Store

from worlds.cluster.api import Api
from worlds.cluster.operator_process import ACCOUNT, BUCKET, SYSTEM
from worlds.cluster.tenant import API, Tenant

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "max_position_embeddings": 512, "dtype": "float32",
}  # fmt: skip
NUMBERS = itertools.count(1)


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
