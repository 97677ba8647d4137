"""Two attempts of one job publish at the same time.

The published version is complete, whichever attempt is faster, slower or killed.
"""

import itertools
from pathlib import Path

import pytest
from graft.artifacts.archive import Interrupted
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob, digest
from graft.artifacts.publishing import publish_staged, stage, staged
from graft.artifacts.storage import StoreError
from graft.artifacts.versions import describe_files, verify
from worlds.buckets import play_operator
from worlds.trainer import MemoryStore

PREFIX = "team-a/adapters/colours/1.0.0/"


class Killed(BaseException):
    """Stands for the end of the process."""


class StepwiseStore(MemoryStore):
    """A store that calls a function before one of its writes. The function may kill the caller."""

    publishes = False

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.before: dict[int, object] = {}  # number of a write -> the function to call before it

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self.writes += 1
        happens = self.before.pop(self.writes, None)
        if callable(happens):
            happens()
        super().put(key, data, if_absent=if_absent)


def attempt(root: Path, name: str, uid: str = "uid-1") -> tuple[dict[str, Path], Manifest]:
    """Write the output files of an attempt. Return them with their manifest.

    Each attempt has its own weights, because no two runs agree to the last bit.
    """
    files = {}
    for file in ("adapter_config.json", "adapter_model.safetensors", "report.json"):
        files[file] = root / f"{uid}-{name}-{file}"
        files[file].write_text(f"{file} of {name} of {uid}")
    manifest = Manifest(
        adapter="colours",
        version="1.0.0",
        method="lora",
        base_model=ManifestBaseModel(name="tiny", uri="s3://bucket/models/tiny"),
        job=ManifestJob(name="colours", namespace="team-a", uid=uid, attempt=name),
        recipe="sha256:recipe",
        hyperparameters={},
        files=describe_files(files),
        created_at="2026-01-01T00:00:00Z",
    )
    return files, manifest


def published_is_whole(store: MemoryStore) -> Manifest:
    """Verify every byte of the version against its manifest, as the operator does. Return the manifest."""
    return verify(store, PREFIX, digest(store.kept[PREFIX + "manifest.json"]))  # type: ignore[arg-type]


WRITES = 4  # of an attempt: upload three files, write the claim


def work(store: MemoryStore, made: tuple[dict[str, Path], Manifest]) -> str:
    """Stage a version as an attempt does. Return the digest of the manifest that is published."""
    return stage(store, PREFIX, *made)[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", range(1, WRITES + 1))
def test_two_attempts_that_overlap_publish_one_version(tmp_path: Path, moment: int) -> None:
    store = StepwiseStore()
    first, second = attempt(tmp_path, "pod-1"), attempt(tmp_path, "pod-2")
    digests = []
    store.before[moment] = lambda: digests.append(work(store, second))
    digests.append(work(store, first))
    assert digests[0] == digests[1], "both attempts return the digest of the published version"
    play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    assert published_is_whole(store).job.attempt == "pod-2"
    assert not [key for key in store.kept if "/version/" in key], "no staged files are left"


@pytest.mark.parametrize(("killed", "woken"), itertools.product(range(1, WRITES + 1), repeat=2))
def test_an_attempt_that_was_believed_dead_cannot_change_the_published_version(
    tmp_path: Path, killed: int, woken: int
) -> None:
    """The first attempt stops before one of its writes. While the next attempt stages, the first one continues."""
    store = StepwiseStore()
    first, second = attempt(tmp_path, "pod-1"), attempt(tmp_path, "pod-2")

    def kill() -> None:
        raise Killed

    store.before[killed] = kill
    with pytest.raises(Killed):
        work(store, first)
    store.writes = 0
    store.before[woken] = lambda: work(store, first)
    work(store, second)
    play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    before = {key: data for key, data in store.kept.items() if key.startswith(PREFIX)}
    work(store, first)
    assert {key: data for key, data in store.kept.items() if key.startswith(PREFIX)} == before
    published_is_whole(store)


def test_the_operator_publishes_the_files_that_a_killed_attempt_had_claimed(tmp_path: Path) -> None:
    store = StepwiseStore()
    work(store, attempt(tmp_path, "pod-1"))
    work(store, attempt(tmp_path, "pod-2"))
    play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    assert published_is_whole(store).job.attempt == "pod-1"


@pytest.mark.parametrize("moment", range(1, 5))  # copy three files, write the manifest
def test_an_operator_that_was_killed_while_it_copied_does_it_again(tmp_path: Path, moment: int) -> None:
    store = StepwiseStore()
    work(store, attempt(tmp_path, "pod-1"))

    def kill() -> None:
        raise Killed

    store.writes = 0
    store.before[moment] = kill
    with pytest.raises(Killed):
        play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    assert PREFIX + "manifest.json" not in store.kept
    play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    before = dict(store.kept)
    play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    assert store.kept == before
    published_is_whole(store)


def test_an_operator_that_is_stopped_publishes_nothing(tmp_path: Path) -> None:
    store = StepwiseStore()
    work(store, attempt(tmp_path, "pod-1"))
    manifest, claim = staged(store, "team-a", "uid-1") or pytest.fail()  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        publish_staged(store, "team-a", PREFIX, manifest, claim, lambda: True)  # type: ignore[arg-type]
    assert not [key for key in store.kept if key.startswith(PREFIX)]


def test_another_job_cannot_publish_the_version_again(tmp_path: Path) -> None:
    store = StepwiseStore()
    work(store, attempt(tmp_path, "pod-1"))
    play_operator(store, "team-a", "uid-1")  # type: ignore[arg-type]
    before = dict(store.kept)
    with pytest.raises(StoreError) as caught:
        work(store, attempt(tmp_path, "pod-9", uid="uid-2"))
    assert caught.value.trouble == "exists"
    assert {key: store.kept[key] for key in before} == before
