"""Fixtures of the trainer's tests: one tiny base model, a Hub, and settings for fast training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds.hub import hub
from worlds.trainer import make_base, quick_training

__all__ = ["hub"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with random weights. Tests must not write into its folder."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with one thread: a second one only slows such small models down."""
    monkeypatch.setattr("graft_trainer.train.cpu_limit", lambda: 1)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Use one thread, because a second one slows down such small models. Measure the latency only briefly."""
    with quick_training():
        yield
