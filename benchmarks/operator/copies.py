"""Many copies of one ended FineTuneJob and of its children, written into etcd.

The copies have the bytes that the API server itself stored, with other names and UIDs of the same length. Tens of
thousands of objects exist within seconds, and the API server and the controllers see them as any other.
"""

import base64
import json
import uuid
from typing import Any

import urllib3
from graft.manifests.metadata import OWNER_UID
from testbed.shell import wait_for

from benchmarks.operator.bed import PATIENCE, Bed
from benchmarks.operator.lives import LIVES

ORIGINAL = "life-00000"
FOLDERS = {  # kind -> folder in etcd
    "FineTuneJob": "graft.dev/finetunejobs",
    "Job": "jobs",
    "ConfigMap": "configmaps",
    "NetworkPolicy": "networkpolicies",
    "Pod": "pods",
}
AT_ONCE = 100  # objects in one transaction


def fill(made: Bed, number: int) -> None:
    """Copy the first life until the namespace has `number` FineTuneJobs."""
    originals = _originals(made)
    stored = {key: _read(made, key) for key in originals}
    have = len(made.api.list("FineTuneJob", LIVES))
    puts: list[tuple[str, bytes]] = []
    for index in range(max(number - have, 0)):
        names = {ORIGINAL: f"kept-{index:05d}"} | {uid: str(uuid.uuid4()) for uid in originals.values()}
        for key, value in stored.items():
            copied = value
            for old, new in names.items():
                copied = copied.replace(old.encode(), new.encode())
            puts.append((key.replace(ORIGINAL, names[ORIGINAL]), copied))
        if len(puts) >= AT_ONCE:
            _write(made, puts)
            puts = []
    _write(made, puts)
    wait_for(lambda: _count(made) >= number, PATIENCE, f"the API server shows {number} FineTuneJobs")


def _originals(made: Bed) -> dict[str, str]:
    """Return the objects of the first life: key in etcd -> UID."""
    job = made.api.get("FineTuneJob", LIVES, ORIGINAL)
    assert job is not None
    found = {f"/registry/{FOLDERS['FineTuneJob']}/{LIVES}/{ORIGINAL}": job["metadata"]["uid"]}
    for kind in list(FOLDERS)[1:]:
        for item in made.api.list(kind, LIVES, f"{OWNER_UID}={job['metadata']['uid']}"):
            assert ORIGINAL in item["metadata"]["name"]
            found[f"/registry/{FOLDERS[kind]}/{LIVES}/{item['metadata']['name']}"] = item["metadata"]["uid"]
    return found


def _count(made: Bed) -> int:
    answer = made.api.call("GET", f"/apis/graft.dev/v1alpha1/namespaces/{LIVES}/finetunejobs?limit=1")
    return len(answer["items"]) + int(answer["metadata"].get("remainingItemCount", 0))


def _read(made: Bed, key: str) -> bytes:
    (found,) = _etcd(made, "range", {"key": _text(key.encode())})["kvs"]
    return base64.b64decode(found["value"])


def _write(made: Bed, puts: list[tuple[str, bytes]]) -> None:
    if puts:
        requests = [{"requestPut": {"key": _text(key.encode()), "value": _text(value)}} for key, value in puts]
        for start in range(0, len(requests), AT_ONCE):
            _etcd(made, "txn", {"success": requests[start : start + AT_ONCE]})


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _etcd(made: Bed, call: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request to the JSON gateway of etcd."""
    address = f"http://127.0.0.1:{made.plane.etcd_port}/v3/kv/{call}"
    answer = urllib3.request("POST", address, body=json.dumps(body).encode())
    assert answer.status == 200, answer.data
    return dict(json.loads(answer.data))
