"""What the trainer's tests share: one tiny base model, a Hub, and trainings that do not waste time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds.hub import hub
from worlds.trainer import make_base, quick_training

__all__ = ["hub"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights. Nobody writes into its folder."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """One thread and a short measurement of the latency: a second thread only slows such small models down."""
    with quick_training():
        yield
