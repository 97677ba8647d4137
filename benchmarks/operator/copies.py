"""Many copies of one ended FineTuneJob, of its children and of its Adapter, written into etcd.

The copies have the bytes that the API server itself stored, with other names and UIDs of the same length. Tens of
thousands of objects exist within seconds, and the API server and the controllers see them as any other.
"""

import base64
import json
import uuid
from functools import partial
from typing import Any

import urllib3
from graft.api import Adapter
from graft.artifacts.signing import read_keys, sign
from graft.manifests.metadata import OWNER_UID
from graft.reconcile.adapter.signing import statement_of
from graft.settings import Signing
from testbed.shell import wait_for
from worlds.cluster.api import ALL_KINDS, Refused
from worlds.cluster.operator_process import SYSTEM

from benchmarks.operator.bed import PATIENCE, Bed
from benchmarks.operator.lives import LIVES, VERSIONS

ORIGINAL = "life-00000"
ADAPTER, VERSION = "a0000", "1.0.0"  # that it published
FOLDERS = {  # kind -> folder in etcd
    "FineTuneJob": "graft.dev/finetunejobs",
    "Job": "jobs",
    "ConfigMap": "configmaps",
    "NetworkPolicy": "networkpolicies",
    "Pod": "pods",
}
AT_ONCE = 100  # objects in one transaction


def fill(made: Bed, number: int, adapters: int) -> None:
    """Copy the first life until the namespace has `number` FineTuneJobs and `adapters` verified Adapters."""
    _fill_adapters(made, adapters)
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
    version = str(
        made.api.call("GET", f"{ALL_KINDS['FineTuneJob'].path(LIVES)}?limit=1")["metadata"]["resourceVersion"]
    )
    for kind in (*FOLDERS, "Adapter"):
        wait_for(
            partial(_cached, made, kind, version),
            PATIENCE,
            f"the API server has all objects of the kind {kind} in its cache",
        )


def _fill_adapters(made: Bed, number: int) -> None:
    """Copy the Adapter of the first life. Each copy is another version, with a signature of its own by the operator's key:
    an Adapter whose signature is not valid would be verified again, and its files do not exist."""
    secret = made.api.get("Secret", SYSTEM, Signing().secret)
    assert secret is not None
    keys = read_keys({name: base64.b64decode(value) for name, value in secret["data"].items()})
    folder, first = f"/registry/graft.dev/adapters/{LIVES}/", f"{ADAPTER}-{VERSION}"
    stored = _read(made, folder + first).decode()
    have = len(made.api.list("Adapter", LIVES))
    puts = []
    for index in range(max(number - have, 0)):
        adapter, version = f"k{index // VERSIONS:04d}", f"1.{index % VERSIONS}.0"
        names = {first: f"{adapter}-{version}", f"{ADAPTER}/{VERSION}/": f"{adapter}/{version}/", ADAPTER: adapter}
        text = stored
        for old, new in names.items():
            text = text.replace(old, new)
        copied = json.loads(text)
        copied["metadata"]["uid"] = str(uuid.uuid4())
        copied["spec"]["version"] = version
        copied["status"]["signature"] = sign(keys, statement_of(Adapter.model_validate(copied))).wire()
        puts.append((f"{folder}{adapter}-{version}", json.dumps(copied).encode()))
    _write(made, puts)


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


def _cached(made: Bed, kind: str, version: str) -> bool:
    """Return whether the API server's own cache is as new as a version. It takes what was written to etcd one by one."""
    query = f"?limit=1&resourceVersion={version}&resourceVersionMatch=NotOlderThan"
    try:
        made.api.call("GET", ALL_KINDS[kind].path(LIVES) + query)
    except Refused as error:
        if error.status != 504:
            raise
        return False
    return True


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
