"""What the engine's tests share: one tiny base model, and an engine that serves it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from worlds.engine import Api, make_base, running


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights. Nobody writes into its folder."""
    return make_base(tmp_path_factory.mktemp("engine") / "base")


@pytest.fixture
async def api(base: Path) -> AsyncIterator[Api]:
    """An engine without adapters."""
    async with running(base) as api:
        yield api
