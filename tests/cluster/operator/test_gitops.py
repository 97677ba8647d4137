"""The API server stores the CustomResourceDefinitions as they are written, so that GitOps tools see no difference."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from testbed.shell import REPOSITORY
from worlds.cluster.api import Api


def lost(path: str, written: Any, live: Any) -> list[str]:
    """Return the paths of the fields that the API server does not have as they were written."""
    if isinstance(written, dict) and isinstance(live, dict):
        return [
            found
            for key, value in written.items()
            for found in (lost(f"{path}.{key}", value, live[key]) if key in live else [f"{path}.{key}"])
        ]
    if isinstance(written, list) and isinstance(live, list) and len(written) == len(live):
        return [found for index, value in enumerate(written) for found in lost(f"{path}[{index}]", value, live[index])]
    return [] if written == live else [path]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "crds").glob("*.yaml")), ids=lambda path: path.name.split(".")[0])
def test_a_definition_is_stored_as_it_is_written(api: Api, path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    live = api.call("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{written['metadata']['name']}")
    assert lost("", written, live) == []
