"""The first build of an image, on a machine that has none."""

from pathlib import Path

import pytest
from testbed import images, packages


def test_an_image_is_built_where_none_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.install(packages.NODE)
    storage = tmp_path / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n')
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(storage))
    monkeypatch.setattr(images, "LOGS", tmp_path)
    monkeypatch.setattr(images, "REPOSITORY", tmp_path)
    program = tmp_path / "program"
    program.write_text("nothing")
    base = images.scratch("localhost/graft/test-base:1", program, ["/program"])
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"FROM {base}\n")
    assert not images.exists("localhost/graft/test:1")
    images.build("localhost/graft/test:1", dockerfile.name, (), base=base)
    assert images.exists("localhost/graft/test:1")
