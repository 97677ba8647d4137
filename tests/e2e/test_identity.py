"""Pods without a static key: the kubelet gives a pod a token of its service account, which a token service exchanges for keys.

The token service stands in for AWS's STS. It asks the API server whether the token is valid for its audience.
"""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from graft.contracts.mounts import STORAGE_DIR, STORAGE_SECRET
from graft.manifests.podspec import pod_security, storage_volume
from graft.settings import Images, Settings, Storage
from testbed import product, quickstart
from testbed.quickstart import Access
from testbed.shell import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NAMESPACE, AUDIENCE = "roles", "sts.example.com"
ROLE = "arn:aws:iam::123456789012:role/tuner"
Object = dict[str, Any]
SERVER = Path(__file__).with_name("sts_server.py")
CLIENT = f"""
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
store = S3Store(StorageConfig.from_dir("{STORAGE_DIR}"), attempts=1)
print("config.json has", len(store.get("models/tiny-llama/config.json")), "bytes")
"""


def made(kind: str, name: str, api: str = "v1", **rest: Any) -> Object:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}} | rest


def pod(name: str, account: str, image: str, program: str, volume: Object, folder: str, **labels: str) -> Object:
    container = {
        "name": "main", "image": product.TAGS[image], "command": ["python", "-c", program],
        "volumeMounts": [{"name": volume["name"], "mountPath": folder}], "imagePullPolicy": "Never",
    }  # fmt: skip
    found = made("Pod", name)
    found["metadata"]["labels"] = labels
    spec = {"serviceAccountName": account, "restartPolicy": "Never", "containers": [container], "volumes": [volume]}
    return found | {"spec": spec}


def tuner(name: str, account: str) -> Object:
    """Return a pod with the storage volume that training pods have, and their image."""
    images = Images(trainer="t", engine="e", agent="a")
    settings = Settings(namespace="graft-system", images=images, storage=Storage(web_identity_audience=AUDIENCE))
    # The store admits pods with this label only.
    labels = {"app.kubernetes.io/managed-by": "graft"}
    found = pod(name, account, "trainer", CLIENT, storage_volume(settings), STORAGE_DIR, **labels)
    found["spec"]["securityContext"] = pod_security(settings)
    return found


@pytest.fixture(scope="module")
def ended(access: Access, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the token service, and two pods with different service accounts. Return what they print: pod -> log."""
    key = access.get("secret", "graft-store-key", quickstart.SYSTEM)["data"]
    role = {
        "endpoint": "http://graft-store.graft-system.svc:7070", "region": "us-east-1", "bucket": "graft", "prefix": "",
        "role-arn": ROLE, "sts-endpoint": f"http://sts.{NAMESPACE}.svc:8000",
    }  # fmt: skip
    reviewer = made("ClusterRoleBinding", "sts-reviewer", "rbac.authorization.k8s.io/v1") | {
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
        "subjects": [{"kind": "ServiceAccount", "name": "sts", "namespace": NAMESPACE}],
    }
    del reviewer["metadata"]["namespace"]
    server = pod(
        "sts", "sts", "agent", SERVER.read_text(), {"name": "key", "secret": {"secretName": "key"}}, "/key", app="sts"
    )
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        *(made("ServiceAccount", name) for name in ("sts", "tuner", "stranger")),
        made("Secret", "key", data=key),
        made("Secret", STORAGE_SECRET, data={k: base64.b64encode(v.encode()).decode() for k, v in role.items()}),
        made("Service", "sts", spec={"selector": {"app": "sts"}, "ports": [{"port": 8000}]}),
        reviewer, server, tuner("tuner", "tuner"), tuner("stranger", "stranger"),
    ]  # fmt: skip
    first = [item for item in objects if item["metadata"]["name"] not in {"tuner", "stranger"} or item["kind"] != "Pod"]

    def apply(items: list[Object]) -> None:
        file = tmp_path_factory.mktemp("manifests") / "objects.json"
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        access.kubectl("apply", "-f", str(file))

    def phase(name: str) -> str:
        return str(access.get("pod", name, NAMESPACE).get("status", {}).get("phase"))

    def listens() -> bool:
        return "listens" in access.kubectl("logs", "sts", "-n", NAMESPACE, check=False)

    try:
        apply(first)
        wait_for(listens, 60, "the token service listens", lambda: quickstart.explain(access, NAMESPACE))
        apply([item for item in objects if item not in first])
        wait_for(
            lambda: {phase("tuner"), phase("stranger")} <= {"Succeeded", "Failed"},
            90, "both pods end", lambda: quickstart.explain(access, NAMESPACE),
        )  # fmt: skip
        names = ("tuner", "stranger", "sts")
        return {name: access.kubectl("logs", name, "-n", NAMESPACE) for name in names} | {
            f"{name} ended": phase(name) for name in ("tuner", "stranger")
        }
    finally:
        access.kubectl("delete", "clusterrolebinding", "sts-reviewer", "--ignore-not-found")
        access.kubectl("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")


def test_a_pod_reads_the_store_with_its_token(ended: dict[str, str]) -> None:
    assert ended["tuner ended"] == "Succeeded", ended
    assert "config.json has" in ended["tuner"]
    assert f"{ROLE} for system:serviceaccount:{NAMESPACE}:tuner" in ended["sts"]


def test_a_pod_of_another_account_does_not_get_the_role(ended: dict[str, str]) -> None:
    assert ended["stranger ended"] == "Failed", ended
    assert "InvalidIdentityToken" in ended["stranger"]
