"""Fixtures for the tests with real vLLM: one server for the whole session."""

from collections.abc import Iterator

import pytest
from handover.real_vllm import Vllm


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    made = Vllm(tmp_path_factory.mktemp("vllm"))
    made.start()
    yield made
    made.kill()
