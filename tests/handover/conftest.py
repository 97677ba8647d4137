"""Fixtures for the tests with real vLLM: one server of a plain model for the whole session."""

from collections.abc import Iterator

import pytest
from handover.bases import make_llama
from handover.real_vllm import Vllm


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    folder = tmp_path_factory.mktemp("vllm")
    made = Vllm(folder, make_llama(folder / "base"))
    try:
        made.start()
        yield made
    finally:
        made.kill()
