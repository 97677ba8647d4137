"""Downloads of the files that a job names: compressed, of another format, too large, or damaged."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from graft.contracts.progress import Reason
from graft_trainer.run import download
from graft_trainer.run.download import download_file
from graft_trainer.run.failures import Failure
from worlds.trainer import MemoryStore, chat_lines, make_settings

LINES = chat_lines(6)


def fetched(root: Path, data: bytes, uri: str = "s3://bucket/train.jsonl", *, jsonl: bool = True) -> tuple[bytes, str]:
    """Download a file that holds `data`. Return its content in the work folder and its digest."""
    store = MemoryStore({uri.removeprefix("s3://bucket/"): data})
    target = root / "work/dataset/train.jsonl"
    digest = download_file(
        uri, target, field="dataset.train", store=store, settings=make_settings(root), hf_endpoint=None, jsonl=jsonl
    )  # type: ignore[arg-type]
    assert [path.name for path in target.parent.iterdir()] == ["train.jsonl"]
    return target.read_bytes(), digest


def refused(root: Path, data: bytes, uri: str = "s3://bucket/train.jsonl") -> Failure:
    with pytest.raises(Failure) as caught:
        fetched(root, data, uri)
    assert uri in caught.value.message and "dataset.train" in caught.value.message
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl"], ids=["by its name", "by its content"])
def test_a_gzip_file_is_decompressed_and_its_digest_is_that_of_the_stored_file(tmp_path: Path, name: str) -> None:
    packed = gzip.compress(LINES[:100]) + gzip.compress(LINES[100:])  # as pigz and `cat a.gz b.gz` write it
    content, digest = fetched(tmp_path, packed, f"s3://bucket/{name}")
    assert content == LINES
    assert digest == "sha256:" + hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize(
    "damage", [gzip.compress(LINES)[:-20], gzip.compress(LINES)[:30] + b"\0" * 60, b"\x1f\x8b\x09" + b"\0" * 30]
)
def test_a_damaged_gzip_file_is_invalid(tmp_path: Path, damage: bytes) -> None:
    failure = refused(tmp_path, damage, "s3://bucket/train.jsonl.gz")
    assert failure.reason == Reason.DATASET_INVALID
    assert "damaged gzip file" in failure.message


def test_a_gzip_file_that_decompresses_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LIMIT", 20 * 1024**2)
    failure = refused(tmp_path, gzip.compress(b"\0" * 200 * 1024**2), "s3://bucket/bomb.jsonl.gz")
    assert failure.reason == Reason.CONFIGURATION_INVALID
    assert "a file may have at most 0.02 GB" in failure.message
    assert (tmp_path / "work/dataset/train.jsonl").stat().st_size <= 20 * 1024**2


def test_a_file_that_is_too_large_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LIMIT", len(LINES) - 1)
    assert refused(tmp_path, LINES).reason == Reason.CONFIGURATION_INVALID
    assert not (tmp_path / "work/dataset/train.jsonl").exists()


def test_a_work_folder_without_enough_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SPARE", 1 << 60)
    failure = refused(tmp_path, LINES)
    assert failure.reason == Reason.CONFIGURATION_INVALID
    assert "ephemeral-storage" in failure.remedy


@pytest.mark.parametrize("name", ["train.parquet", "data/TRAIN.CSV", "train.tar.gz", "train.jsonl.zst"])
def test_files_of_other_formats_are_recognised_by_their_names(tmp_path: Path, name: str) -> None:
    failure = refused(tmp_path, LINES, f"s3://bucket/{name}")
    assert failure.reason == Reason.DATASET_INVALID
    assert "is not JSON Lines" in failure.message
    assert "to_json" in failure.remedy


def test_files_of_other_formats_are_recognised_by_their_content(tmp_path: Path) -> None:
    assert "it is a Parquet file" in refused(tmp_path, b"PAR1\0\0").message
    assert "it is a zip file" in refused(tmp_path, gzip.compress(b"PK\x03\x04\0")).message
    array = json.dumps([{"text": "a"}], indent=1).encode()
    failure = refused(tmp_path, array)
    assert "one JSON array" in failure.message
    assert "jq" in failure.remedy


def test_files_that_are_not_datasets_may_have_any_format(tmp_path: Path) -> None:
    assert fetched(tmp_path, b"[1]", "s3://bucket/task.yaml", jsonl=False)[0] == b"[1]"


def test_a_folder_instead_of_a_file_is_unavailable(tmp_path: Path) -> None:
    failure = refused(tmp_path, LINES, "s3://bucket/data/")
    assert failure.reason == Reason.DATASET_UNAVAILABLE
    assert "it is a folder" in failure.message
