"""What pods, tenants and authors of models write for the operator: too much of it, too deep, or what cannot be written back."""

import asyncio
import json
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kopf
import pytest
import yaml
from graft import handlers
from graft.api import AdapterDeployment, BaseModel
from graft.api.basemodel import BaseModelStatus
from graft.artifacts.manifest import Manifest
from graft.artifacts.sources import SourceError, describe, read_config
from graft.artifacts.storage import StoreError
from graft.artifacts.store import MOST_OBJECTS, S3Store
from graft.artifacts.versions import InvalidArtifact, read_manifest
from graft.contracts.agent import Residency, ResidentAdapter, Wanted
from graft.contracts.progress import Progress, Reason
from graft.manifests.metadata import OWNER_UID
from graft.placement.facts import facts_of
from graft.reconcile.adapterdeployment.adapterdeployment import _parse
from graft.reconcile.adapterdeployment.basechange import base_of
from graft.reconcile.adapterdeployment.deploymentstatus import _loaded
from graft.reconcile.adapterdeployment.scaling import demands, steady_seconds
from graft.reconcile.basemodel import observe
from graft.reconcile.finetunejob.finetunejob import reconcile
from graft.reconcile.shared import pods
from graft.reconcile.shared.jobs import job_file_of
from graft.status import find
from worlds.buckets import empty_bucket
from worlds.hub import Hub, hub
from worlds.reconciling import MemoryKube, MemoryStore, Object, context, publish

__all__ = ["hub"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client keeps what it has downloaded. Every test has the same commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))


CRDS = Path(__file__).parents[2] / "crds"
PREFIX = "shop/runs/uid-job/pod-0/progress.json"
RESOLVED = {"version": "1.0.0", "recipe": "sha256:r", "baseModelUri": "s3://b/m", "baseModelDigest": "sha256:d"}
FIELDS = {"attempt": "pod-0", "stage": "Training", "updatedAt": "2026-01-01T00:00:00Z"}
MIB = 1024 * 1024


def progress(**fields: Any) -> bytes:
    return json.dumps(FIELDS | fields).encode()


@cache
def status_schema(kind: str) -> Any:
    """The schema that the API server checks a status of the kind with."""
    for path in CRDS.glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())
        if crd["spec"]["names"]["kind"] == kind:
            return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    raise AssertionError(kind)


def would_be_stored(kind: str, status: Object) -> None:
    """Assert that the API server would store this status: it fits the schema, etcd's limit, and 64-bit numbers."""
    jsonschema.validate(status, status_schema(kind))
    text = json.dumps(status, allow_nan=False)
    assert len(text) < MIB, f"{len(text)} bytes"

    def numbers(value: Any) -> Iterator[int]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        elif isinstance(value, int):
            yield value

    assert all(abs(number) < 2**63 for number in numbers(status))


def running_job(pod: Object | None = None) -> tuple[MemoryKube, Object]:
    """A FineTuneJob whose training pod runs."""
    owned = {"namespace": "shop", "labels": {OWNER_UID: "uid-job"}, "creationTimestamp": "2026-01-01T00:00:00Z"}
    by_job, by_child = (
        {"ownerReferences": [{"uid": "uid-job", "controller": True}]},
        {"ownerReferences": [{"uid": "uid-child", "controller": True}]},
    )
    job = {
        "apiVersion": "graft.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": "colours", "namespace": "shop", "uid": "uid-job", "generation": 1,
                     "finalizers": ["graft.dev/cleanup"]},
        "spec": {"baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/train.jsonl"}},
                 "method": {"lora": {"rank": 4}}, "output": {"adapter": "colours"}},
        "status": {"resolved": RESOLVED},
    }  # fmt: skip
    child = {
        "kind": "Job",
        "metadata": {**owned, **by_job, "name": "colours", "uid": "uid-child"},
        "spec": {},
        "status": {},
    }
    started = {"name": "train", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    status = {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "containerStatuses": [started]}
    running = {"kind": "Pod", "metadata": {**owned, **by_child, "name": "pod-0"}, "status": status}
    return MemoryKube(job, child, pod or running), job


ATTACKS = {
    "8 MB of brackets": b"[" * 8_000_000,
    "8 MB of empty objects": progress(training={"a": [{}] * 4_000_000}),
    "8 MB of one text": progress(missing=["x" * 8_000_000]),
    "brackets within the size": b'{"training": ' + b"[" * 200_000,
    "many values within the size": progress(training={"a": [0] * 80_000}),
    "a nested dictionary": progress(training={"a": {"b": {"c": 1}}}),
    "a number of 5,000 digits": progress(step=0).replace(b'"step": 0', b'"step": ' + b"9" * 5000),
    "a number that no API server stores": progress(step=10**30),
    "a number that is not finite": progress(loss=0).replace(b'"loss": 0', b'"loss": 1e999'),
    "NaN": progress(loss=float("nan")),
    "half a character": progress(missing=["\ud800"]),
    "a key of control characters": progress(metrics={"\x00" * 50: 1.0}),
    "no JSON": b"\xff\xfe",
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
async def test_progress_out_of_bounds_is_treated_as_unreadable(data: bytes) -> None:
    """A training pod writes progress.json of 8 MB, or deep, or of numbers that nothing stores -> it is not parsed or not
    used, the job's status comes from its pod, and the memory stays small."""
    kube, job = running_job()
    store = MemoryStore()
    store.objects_[PREFIX] = data
    ctx = context(kube, store)
    tracemalloc.start()
    try:
        assert await reconcile(ctx, "shop", "colours") is not None
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    would_be_stored("FineTuneJob", job["status"])
    assert job["status"]["stage"] == "Training"
    assert "progress" not in job["status"]


async def test_progress_within_bounds_of_bytes_is_cut_before_it_is_written() -> None:
    """A training pod fills progress.json with as much as its size allows -> the status holds the first entries, and fits
    into the API server's limits."""
    kube, job = running_job()
    store = MemoryStore()
    store.objects_[PREFIX] = progress(
        step=7,
        training={f"k{number}": "v" * 100 for number in range(300)} | {"perDeviceTrainBatchSize": "many"},
        targetModules=["m" * 100] * 800,
        metrics={f"suite/{number}": 0.5 for number in range(2_500)},
        checkpoints=[{"step": 1, "attempt": "a", "sizeBytes": 1, "createdAt": "x"}] * 500,
        rejected=["r" * 1_000] * 40,
    )
    assert len(store.objects_[PREFIX]) < Progress.limits.size
    await reconcile(context(kube, store), "shop", "colours")
    status = job["status"]
    would_be_stored("FineTuneJob", status)
    assert status["progress"]["step"] == 7
    assert len(status["resolved"]["training"]) == 64
    assert len(status["metrics"]) == 2_000
    assert len(status["resolved"]["targetModules"]) == 512
    assert len(status["checkpoints"]) == 64


async def test_sixteen_reconciles_at_once_stay_within_the_operators_memory() -> None:
    """Every job of a restart has the largest progress.json that is read -> 16 at once take some MB."""
    data = progress(metrics={f"a-longer-suite-name/{number:06d}": 0.5 for number in range(7_000)})
    assert Progress.limits.size * 0.8 < len(data) < Progress.limits.size
    worlds = [running_job() for _ in range(16)]
    store = MemoryStore()
    store.objects_[PREFIX] = data
    tracemalloc.start()
    try:
        await asyncio.gather(*(reconcile(context(kube, store), "shop", "colours") for kube, _ in worlds))
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert all(len(job["status"]["metrics"]) == 2_000 for _, job in worlds)


async def test_hyperparameters_of_another_type_do_not_become_numbers_of_the_status() -> None:
    """A training pod reports a micro-batch that is a text -> the status omits it, instead of being refused for ever."""
    kube, job = running_job()
    store = MemoryStore()
    store.objects_[PREFIX] = progress(training={"perDeviceTrainBatchSize": "many", "gradientAccumulationSteps": 1e300})
    await reconcile(context(kube, store), "shop", "colours")
    would_be_stored("FineTuneJob", job["status"])
    assert "microBatch" not in job["status"]["attempts"][0]


@pytest.mark.parametrize("reason", [reason.value for reason in Reason])
async def test_any_reason_of_a_pod_ends_in_a_documented_reason(reason: str) -> None:
    """A training pod ends with a reason that jobs do not have -> the job has Failed, with a documented reason."""
    said = {"reason": reason, "message": "m" * 100_000, "remedy": "r"}
    owned = {"namespace": "shop", "labels": {OWNER_UID: "uid-job", "batch.kubernetes.io/job-completion-index": "x"}}
    terminated = {"exitCode": 1, "message": json.dumps(said)[:4096]}
    for message in (json.dumps(said | {"message": "m"}), json.dumps(said)[:4096], "[" * 4096, "9" * 4096):
        terminated["message"] = message
        pod = {
            "kind": "Pod", "metadata": {**owned, "name": "pod-0", "creationTimestamp": "2026-01-01T00:00:00Z",
                                        "ownerReferences": [{"uid": "uid-child", "controller": True}]},
            "status": {"phase": "Failed", "containerStatuses": [{"name": "train", "state": {"terminated": terminated}}]},
        }  # fmt: skip
        kube, job = running_job(pod)
        kube.objects["Job", "shop", "colours"]["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
        await reconcile(context(kube, MemoryStore()), "shop", "colours")
        would_be_stored("FineTuneJob", job["status"])
        assert job["status"]["stage"] == "Failed"


def test_a_termination_message_of_brackets_is_no_termination_message() -> None:
    """A container ends with 4096 brackets as its message -> the operator uses the exit code."""
    state = {"terminated": {"exitCode": 10, "message": "[" * 4096}}
    pod = {
        "metadata": {"name": "p"},
        "status": {"phase": "Failed", "containerStatuses": [{"name": "train", "state": state}]},
    }
    found = pods.ending(pod)
    assert found is not None and found.reason == Reason.DATASET_INVALID


# Manifests


def manifest_with(**fields: Any) -> bytes:
    store = MemoryStore()
    publish(store, "shop/adapters/support/1.0.0/")
    return json.dumps(json.loads(store.objects_["shop/adapters/support/1.0.0/manifest.json"]) | fields).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 8_000_000,
        b"[" * 500_000,
        manifest_with(metrics={str(number): 1.0 for number in range(5_000)}),
        manifest_with(metrics={"loss": float("nan")}),
        manifest_with(hyperparameters={"a": {"b": 1}}),
        manifest_with(composition={"a": [1]}),
        manifest_with(targetModules=["m"] * 5_000),
        manifest_with(rejected=["r"] * 100),
        manifest_with(rank=10**30),
        manifest_with(adapter="a" * 500),
        manifest_with(files=[{"name": "adapter_config.json", "size": -1, "sha256": "0" * 64}]),
        manifest_with(files=[]).replace(b'"rank": 8', b'"rank": ' + b"8" * 5000),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_a_manifest_out_of_bounds_is_invalid(data: bytes) -> None:
    """A tenant publishes a manifest that is large, deep, or has numbers that nothing stores -> ManifestInvalid."""
    store = MemoryStore()
    store.objects_["shop/adapters/support/1.0.0/manifest.json"] = data
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArtifact) as caught:
            read_manifest(store, "shop/adapters/support/1.0.0/", None)  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "ManifestInvalid"
    assert len(str(caught.value)) < 1_000


async def test_a_manifest_of_another_version_makes_no_adapter() -> None:
    """A training pod writes a manifest for another adapter into its version's place -> no Adapter is made of it."""
    kube, job = running_job()
    store = MemoryStore()
    store.objects_["shop/adapters/colours/1.0.0/manifest.json"] = manifest_with(
        adapter="../../other",
        version="9.9.9",
        job={"name": "colours", "namespace": "shop", "uid": "uid-job", "attempt": "pod-0"},
    )
    kube.objects["Job", "shop", "colours"]["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    await reconcile(context(kube, store), "shop", "colours")
    (succeeded,) = [item for item in job["status"]["conditions"] if item["type"] == "Succeeded"]
    assert succeeded["reason"] == "ResultMissing"
    assert not any(kind == "Adapter" for kind, _, _ in kube.objects)


# A real store: sizes are checked before bytes are read, and listings are bounded


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Store]:
    with empty_bucket() as store:
        yield store


def test_a_large_object_is_refused_by_its_size(s3: S3Store) -> None:
    """A tenant makes an object of 60 MB where the operator expects some KB -> its content is not read."""
    key = "shop/runs/uid-1/pod-0/progress.json"
    s3.put(key, b"[" * 60_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="larger than") as caught:
            s3.get(key, most=Progress.limits.size)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert caught.value.trouble == "large"


def test_folders_of_any_number_of_objects_are_refused_or_streamed(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant puts any number of objects below a prefix -> listings in memory are bounded, deletions hold one page."""
    listed = MOST_OBJECTS + 1

    def many(bucket: str, **query: str) -> Iterator[dict[str, Any]]:
        for start in range(0, 10**9, 1000):
            nonlocal listed
            listed = start
            names = range(start, start + 1000)
            if "Delimiter" in query:
                yield {"CommonPrefixes": [{"Prefix": f"{query['Prefix']}{number}/"} for number in names]}
            else:
                found = [{"Key": f"{query['Prefix']}{number}.json", "Size": 1, "ETag": "e"} for number in names]
                yield {"Contents": found}

    monkeypatch.setattr(s3, "_pages", many)
    with pytest.raises(StoreError, match="more than 10000"):
        s3.folders("shop/adapters/support/")
    with pytest.raises(SourceError, match="more than 10000"):
        describe("s3://bucket/shop/model", s3, None)
    assert listed <= MOST_OBJECTS


# Configs of models


CONFIGS = {
    "60 MB": b'{"a": "' + b"x" * 60_000_000 + b'"}',
    "deep": b"[" * 500_000,
    "many values": json.dumps({"id2label": {str(number): "x" for number in range(60_000)}}).encode(),
    "a number of 5,000 digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "no object": b"[1]",
    "half a character": b'{"a": "\\ud800"}',
}


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_of_a_bucket_out_of_bounds_is_a_source_that_is_invalid(s3: S3Store, data: bytes) -> None:
    """An author uploads a config.json of 60 MB, or a deep one -> SourceInvalid, without reading or parsing it."""
    s3.put("shop/model/config.json", data)
    s3.put("shop/model/model.safetensors", b"w")
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as caught:
            describe("s3://bucket/shop/model", s3, None)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert not caught.value.transient
    raw = {"metadata": {"name": "m"}, "spec": {"source": "s3://bucket/shop/model"}}
    _, (ready,) = observe(BaseModel.model_validate(raw), caught.value)
    assert ready.reason == "SourceInvalid"


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_of_the_hub_out_of_bounds_is_a_source_that_is_invalid(hub: Hub, data: bytes) -> None:
    """An author pushes a config.json of 60 MB to the hub -> it is not downloaded; a deep one is not parsed."""
    hub.files["org/model/config.json"] = data
    sent: list[int] = []
    before = hub.RequestHandlerClass.send  # type: ignore[attr-defined]

    def send(self: Any, status: int, body: bytes, content: bool, headers: dict[str, str] | None = None) -> None:
        sent.append(len(body) if content else 0)
        before(self, status, body, content, headers)

    hub.RequestHandlerClass = type("Counted", (hub.RequestHandlerClass,), {"send": send})  # type: ignore[assignment, misc]
    with pytest.raises(SourceError) as caught:
        describe("hf://org/model@main", None, hub.endpoint)
    assert not caught.value.transient
    assert max(sent) < 2 * MIB


def test_a_hub_that_sends_another_config_than_it_lists_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub lists a config.json of 100 bytes and sends 3 MB -> it is not read."""
    from huggingface_hub import HfApi

    listed = HfApi.model_info

    def lies(self: HfApi, *arguments: Any, **named: Any) -> Any:
        info = listed(self, *arguments, **named)
        for sibling in info.siblings or []:
            sibling.size = 100
        return info

    monkeypatch.setattr(HfApi, "model_info", lies)
    hub.files["org/model/config.json"] = b'{"a": "' + b"x" * (3 * MIB) + b'"}'
    with pytest.raises(SourceError, match="at most 1048576 bytes"):
        describe("hf://org/model@main", None, hub.endpoint)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": {"a": 1}},
        {"architectures": ["A" * 500_000]},
        {"architectures": 5},
        {"torch_dtype": "x" * 500_000},
        {"model_type": "falcon", "num_ln_in_parallel_attn": "2" * 1000, "num_hidden_layers": 2**31, "hidden_size": 8, "vocab_size": 9},
        {"model_type": "llama", "hidden_size": 10**300, "num_hidden_layers": 10**300, "vocab_size": 10**300},
        {"model_type": "llama", "hidden_size": 2**31 - 1, "num_hidden_layers": 2**31 - 1, "vocab_size": 2**31 - 1},
        {"model_type": "opt", "word_embed_proj_dim": "x", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9},
        {"model_type": "t5", "is_encoder_decoder": True, "relative_attention_num_buckets": [], "d_model": 8, "vocab_size": 9, "num_layers": 1},
        {"model_type": ["llama"], "text_config": [], "num_attention_heads": True},
        {"hidden_size": 1e308, "num_attention_heads": "4"},
    ],
    ids=str,
)  # fmt: skip
def test_facts_of_any_config_can_be_stored(config: dict[str, Any]) -> None:
    """An author writes a config.json with absurd values -> the facts omit them, and the BaseModel's status can be written."""
    defaults = {"num_attention_heads": 4, "intermediate_size": 16}
    for given in (config, defaults | config, {"text_config": config}):
        facts = facts_of(read_config(json.dumps(given).encode(), "s3://b/m"), "l" * 100_000, 10**9)
        would_be_stored("BaseModel", {"facts": facts.wire(), "conditions": []})
        BaseModelStatus.model_validate({"facts": facts.wire()})


# ConfigMaps and annotations that tenants may write


TEXTS = [
    "[" * 500_000,
    "{" * 1000,
    '{"a":' * 900,
    "9" * 5000,
    "\ud800",
    '{"adapters": ' + "[0," * 200_000,
    "",
    "null",
    "[]",
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{text[:8]!r} x{len(text)}")
def test_messages_in_config_maps_out_of_bounds_are_ignored(text: str) -> None:
    """A tenant writes brackets into the ConfigMaps and annotations of its namespace -> they count as not written."""
    data = {"data": {"job.json": text, "wanted.json": text, "pod": text}}
    tracemalloc.start()
    try:
        assert job_file_of(data) is None
        assert _parse(Wanted, data, "wanted.json") is None
        assert _parse(Residency, data, "pod") is None
        assert demands({"shop.d.gateway": text}) == {}
        assert base_of({"metadata": {"annotations": {"graft.dev/base-model": text}}}) is None
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    live = {"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {"graft.dev/scaled-at": text}}}
    assert steady_seconds(live) > 0


def test_a_residency_fills_the_status_only_so_far() -> None:
    """A pod reports adapters with long messages -> the messages in the status are cut; too many adapters are refused."""
    one = {"engineName": "e", "adapter": "a-1.0.0", "digest": "sha256:0", "state": "Failed", "message": "x" * 100_000}
    pod = {"pod": "p", "podUid": "u", "ready": True}
    residency = Residency.read(json.dumps({**pod, "adapters": [one]}))
    assert len(_loaded(residency.adapters[0]).message or "") <= 500
    short = ResidentAdapter(engine_name="e", adapter="a-1.0.0", digest="d", state="Loaded").model_dump(by_alias=True)
    text = json.dumps({**pod, "adapters": [short] * 1_001})
    assert _parse(Residency, {"data": {"p": text}}, "p") is None


def test_the_operators_own_messages_are_within_their_limits() -> None:
    """128 adapters on 64 replicas, the most that a deployment has -> what the operator writes, it also reads."""
    names = [f"deployment-7c5b8d9f6d-{number:05d}" for number in range(64)]
    entries = [
        {
            "engineName": f"{'t' * 63}--adapter-{number}-1.0.0--012345678901", "adapter": f"adapter-{number}-1.0.0",
            "uri": f"s3://bucket/tenant/adapters/adapter-{number}/1.0.0/", "digest": "sha256:" + "0" * 64,
            "signature": {"keyId": "0" * 16, "value": "A" * 88}, "pods": names,
        }
        for number in range(128)
    ]  # fmt: skip
    wanted = Wanted.model_validate({"baseModel": "b", "maxLoraRank": 64, "adapters": entries, "assigned": names})
    assert Wanted.read(wanted.json_text()) == wanted


def test_the_types_that_are_checked_are_the_ones_of_the_product() -> None:
    """The CRDs that these tests validate with are those of the models."""
    assert status_schema("FineTuneJob")["properties"]["metrics"]["additionalProperties"] == {"type": "number"}
    assert Manifest.model_fields["metrics"].metadata
    assert AdapterDeployment.model_fields["status"]
    assert find([], "Ready") is None


async def test_kopf_watches_nothing() -> None:
    """A tenant creates thousands of resources of a megabyte -> kopf, which would hold their bodies, does not see them."""
    registry = kopf.get_default_registry()
    handlers_of_resources = [*registry._watching.get_all_handlers(), *registry._changing.get_all_handlers()]
    assert handlers.operator.cache is None and handlers_of_resources == []
