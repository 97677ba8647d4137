"""The files of the agent: resumed downloads, size limits, disk space and quick rollbacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.manifest import ManifestFile
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from graft.contracts.agent import WantedAdapter
from graft_server.agent.decisions.reasons import AdapterError, AdapterReason
from graft_server.agent.decisions.room import Capacity, capacity
from graft_server.agent.storage.download import inspect
from graft_server.agent.storage.folders import Folders
from graft_server.agent.storage.weights import check_weights
from testbed.shell import REPOSITORY
from worlds.agent import Pod, serving
from worlds.serving import MemoryStore, eventually, safetensors

MIB = 1 << 20
DOCS = REPOSITORY / "docs"
WEIGHTS = "adapter_model.safetensors"


def key(adapter: WantedAdapter, file: str = WEIGHTS) -> str:
    return adapter.uri.removeprefix("s3://bucket/") + file


async def reason(pod: Pod, adapter: WantedAdapter, expected: str) -> None:
    await eventually(lambda: (one := pod.one(adapter)) and one.reason == expected)


def first_bytes(pod: Pod) -> list[int]:
    return [start for name, start in pod.store.starts if name == WEIGHTS]


async def test_a_broken_download_resumes_where_it_ended(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a", size=4 * MIB)
        pod.store.cut.add(key(a))
        pod.want(a)
        await reason(pod, a, "StorageUnavailable")
        there = (pod.dir / f".partial-{a.engine_name}" / WEIGHTS).stat().st_size
        assert 3 * MIB < there < 4 * MIB  # several connections, each of which sent half of the rest
        pod.store.cut.clear()
        await pod.state(a, "Loaded")
        starts = first_bytes(pod)
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] == there
        assert pod.agent.metrics.registry.get_sample_value("graft_agent_resumed_bytes_total") == there


async def test_a_new_agent_resumes_the_download_of_a_killed_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, session, url):
        a = pod.store.publish("a", size=4 * MIB)
        pod.store.cut.add(key(a))
        pod.want(a)
        await reason(pod, a, "StorageUnavailable")
        await pod.kill()
        pod.store.cut.clear()
        pod.store.starts.clear()
        await pod.start(session, url)
        pod.want(a)
        await pod.state(a, "Loaded")
        assert first_bytes(pod)[0] > 2 * MIB
        assert (pod.dir / a.engine_name / WEIGHTS).read_bytes() == pod.store.objects[key(a)]


async def test_bytes_on_disk_are_verified_like_downloaded_ones(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, session, url):
        a = pod.store.publish("a", size=4 * MIB)
        pod.store.cut.add(key(a))
        pod.want(a)
        await reason(pod, a, "StorageUnavailable")
        await pod.kill()
        with (pod.dir / f".partial-{a.engine_name}" / WEIGHTS).open("r+b") as stream:
            stream.seek(MIB)
            stream.write(b"not what was published")
        pod.store.cut.clear()
        pod.store.starts.clear()
        await pod.start(session, url)
        pod.want(a)
        await pod.state(a, "Loaded")
        assert first_bytes(pod)[-1] == 0  # downloaded again from the first byte
        assert (pod.dir / a.engine_name / WEIGHTS).read_bytes() == pod.store.objects[key(a)]


@pytest.mark.parametrize("change", ["shorter", "longer", "other"])
async def test_files_that_do_not_match_the_manifest_are_refused(tmp_path: Path, change: str) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a, good = pod.store.publish("a", size=2 * MIB), pod.store.publish("good")
        data = pod.store.objects[key(a)]
        pod.store.objects[key(a)] = {"shorter": data[:-9], "longer": data + b"x", "other": data[:-1] + b"\0"}[change]
        pod.want(a, good)
        assert (await pod.state(a, "Failed")).reason == "DigestMismatch"
        await pod.state(good, "Loaded")
        await eventually(lambda: [path.name for path in pod.dir.iterdir()] == [good.engine_name])
        assert f"load {a.engine_name}" not in pod.engine.calls


async def test_only_files_that_an_engine_needs_are_downloaded(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
        files = {"adapter_config.json": json.dumps(config).encode(), WEIGHTS: safetensors("a")}
        a = pod.store.publish(
            "a", files={**files, "report.html": b"<html>", "README.md": b"# a", "tokenizer.json": b"{}"}
        )
        pod.want(a)
        await pod.state(a, "Loaded")
        there = {path.name for path in (pod.dir / a.engine_name).iterdir()}
        assert there == {*files, "manifest.digest"}


def entries(**sizes: int) -> list[ManifestFile]:
    names = {"config": "adapter_config.json", "weights": WEIGHTS}
    return [ManifestFile(name=names[name], size=size, sha256="0" * 64) for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("fields", "expected", "words"),
    [
        ({"files": entries(config=10, weights=17 << 30)}, "TooLarge", "adapter_model.safetensors has"),
        ({"files": entries(config=2 * MIB, weights=10)}, "TooLarge", "adapter_config.json has"),
        ({"rejected": ["accuracy 0.1 is below 0.5"]}, "NotServable", "rejected by its gates"),
        ({"method": "full"}, "ManifestInvalid", "model.safetensors"),
        ({"schema_version": 2}, "ManifestInvalid", "upgrade Graft"),
        ({"rank": 64}, "RankTooHigh", "raise limits.maxLoraRank"),
    ],
)
async def test_an_unservable_version_is_refused_by_its_manifest_alone(
    tmp_path: Path, fields: dict[str, Any], expected: str, words: str
) -> None:
    async with serving(tmp_path) as (pod, _, _):
        bad = pod.store.publish("bad", fields=fields)
        pod.want(bad)
        failed = await pod.state(bad, "Failed")
        assert failed.reason == expected and words in str(failed.message)
        assert pod.store.reads and all(read.endswith("manifest.json") for read in pod.store.reads)


def test_a_manifest_that_is_too_large_is_refused() -> None:
    class Large(S3Store):
        def _call(self, operation: str, key: str, bucket: str | None = None, **arguments: Any) -> Any:
            return {"ContentLength": 9 * MIB}

    store = Large(StorageConfig("http://127.0.0.1:1", "us-east-1", "bucket", "", "key", "secret"))
    adapter = MemoryStore().publish("a")
    with pytest.raises(AdapterError, match="larger than") as caught:
        inspect(lambda: store, adapter, 8, MIB)  # type: ignore[arg-type, return-value]
    assert caught.value.reason == AdapterReason.MANIFEST_INVALID


async def test_a_tuned_prompt_is_served_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init_text": "be kind"}
        files = {"adapter_config.json": json.dumps(config).encode(), WEIGHTS: safetensors("prompt")}
        a = pod.store.publish("a", rank=None, files=files, fields={"method": "promptTuning"})
        pod.want(a)
        await pod.state(a, "Loaded")
        assert "be kind" not in (pod.dir / a.engine_name / "adapter_config.json").read_text()


# Disk space


async def test_only_the_adapter_that_does_not_fit_fails_until_there_is_room(tmp_path: Path) -> None:
    async with serving(tmp_path, cache_bytes=5 * MIB) as (pod, _, _):
        a, b, c = (pod.store.publish(name, size=2 * MIB) for name in "abc")
        pod.want(a, b, c)
        await pod.state(a, "Loaded")
        await pod.state(b, "Loaded")
        failed = await pod.state(c, "Failed")
        assert failed.reason == "DiskFull" and re.search(
            r"needs 2\.00 MiB, but only 1\.00 MiB of 5\.00 MiB", str(failed.message)
        )
        await pod.ready()  # readiness does not wait for it
        told = len(pod.told)
        pod.want(a, c)
        assert (await pod.state(c, "Loaded")).reason is None
        assert len(pod.told) - told < 40 and a.engine_name in pod.engine.adapters
        assert not (pod.dir / b.engine_name).exists()  # it was deleted to make room
        assert 'graft_agent_failures_total{reason="DiskFull"} 1.0' in pod.agent.metrics.text().decode()


async def test_a_rollback_does_not_need_the_store(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        old, new = pod.store.publish("old"), pod.store.publish("new")
        pod.want(old)
        await pod.ready()
        pod.want(new)
        await pod.state(new, "Loaded")
        await eventually(lambda: old.engine_name not in pod.engine.adapters)
        pod.store.objects.clear()
        pod.want(old)
        await pod.state(old, "Loaded")


async def test_the_most_recently_used_version_is_kept_longest(tmp_path: Path) -> None:
    async with serving(tmp_path, cache_bytes=5 * MIB) as (pod, _, _):
        one, two, three = (pod.store.publish(name, size=2 * MIB) for name in ("one", "two", "three"))
        for adapter in (one, two, one, three):
            pod.want(adapter)
            await pod.state(adapter, "Loaded")
            await eventually(lambda adapter=adapter: list(pod.engine.adapters) == [adapter.engine_name])
        there = sorted(path.name for path in pod.dir.iterdir())
        assert there == sorted([one.engine_name, three.engine_name])
        text = pod.agent.metrics.text().decode()
        assert "graft_agent_evictions_total 1.0" in text and "graft_agent_cache_limit_bytes 5.24288e+06" in text


async def test_a_disk_without_enough_free_space_is_reported_as_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folders, "free_bytes", lambda self: (300 * MIB, 1000 * MIB))
    async with serving(tmp_path, cache_bytes=None) as (pod, _, _):
        fits, large = pod.store.publish("fits"), pod.store.publish("large", size=45 * MIB)
        pod.want(large, fits)
        assert (await pod.state(large, "Failed")).reason == "DiskFull"
        await pod.state(fits, "Loaded")


async def test_a_disk_that_fills_up_during_a_download_is_reported_as_full(tmp_path: Path) -> None:
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        partial = pod.dir / f".partial-{a.engine_name}"
        await eventually(pod.dir.exists)
        partial.mkdir()
        (partial / WEIGHTS).symlink_to("/dev/full")
        pod.want(a)
        failed = await pod.state(a, "Failed")
        assert failed.reason == "DiskFull" and "No space left on device" in str(failed.message)
        await pod.state(a, "Loaded")  # the failed download has freed its space
        assert not (pod.dir / a.engine_name / WEIGHTS).is_symlink()


@pytest.mark.parametrize(
    ("limit", "used", "free", "expected"),
    [
        (None, 0, 1000, Capacity(744, 800)),  # kept versions get no more than wanted ones
        (None, 100, 150, Capacity(100, 50)),  # wanted versions stay, kept ones are deleted
        (500, 100, 1000, Capacity(500, 500)),
        (5000, 100, 1000, Capacity(844, 844)),
    ],
)
def test_the_capacity_follows_from_the_limit_and_the_free_space(
    limit: int | None, used: int, free: int, expected: Capacity
) -> None:
    found = capacity(limit and limit * MIB, used * MIB, free * MIB, 1000 * MIB)
    assert found.total == expected.total * MIB
    assert found.kept == min(expected.kept, expected.total) * MIB


# Weights


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not fit"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "does not fit"),
        ((2).to_bytes(8, "little") + b"[]", "is invalid"),
        ((2).to_bytes(8, "little") + b"{}", "no tensors"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ', "tensor a is invalid"),
        (safetensors("a")[:-1], "lies at"),
        (b"\x80\x04\x95" + b"pickle" * 9, "does not fit"),
    ],
)
def test_weights_that_are_not_a_valid_safetensors_file_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match=words) as caught:
        check_weights(tmp_path / WEIGHTS, 8)
    assert caught.value.reason == AdapterReason.WEIGHTS_INVALID


def test_weights_above_the_rank_of_the_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(safetensors("a", rank=16))
    check_weights(tmp_path / WEIGHTS, 16)
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight has rank 16, above") as caught:
        check_weights(tmp_path / WEIGHTS, 8)
    assert caught.value.reason == AdapterReason.RANK_TOO_HIGH


def test_the_documentation_explains_every_reason_and_no_other() -> None:
    table = (DOCS / "agent.md").read_text().partition("## Reasons")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(AdapterReason)
