"""The fixtures of the engine's tests: a tiny base model, and an engine that serves it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from worlds.engine import Api, make_base, running


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with random weights. Tests must not write into its folder."""
    return make_base(tmp_path_factory.mktemp("engine") / "base")


@pytest.fixture
async def api(base: Path) -> AsyncIterator[Api]:
    """Run an engine without adapters."""
    async with running(base) as api:
        yield api
